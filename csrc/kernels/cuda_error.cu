// SPDX-License-Identifier: Apache-2.0
#include "kernels/launch.cuh"

// For the bindings, which include no CUDA header.
extern "C" const char* tritool_cuda_error_text(int error) { return tritool::launch_error_text(error); }
