// SPDX-License-Identifier: Apache-2.0
// The kernels of namespace tritool, registered for CPU and CUDA tensors. Their schemas stand beside their Python
// wrappers in tritool/ops/, which also define them where this library is absent.
#include <dlfcn.h>

#include "kernels/isa.h"
#include "torch/bindings.h"
#include "torch/check.h"

#if defined(TRITOOL_CUDA)
extern "C" const char* tritool_cuda_error_text(int error);  // kernels/cuda_error.cu
#endif

namespace tritool {

void check_device(const Tensor& tensor, const char* op) {
  if (tensor.is_cpu()) return;
  STD_TORCH_CHECK(tensor.is_cuda(), op, " runs on CPU and CUDA tensors");
#if !defined(TRITOOL_CUDA)
  STD_TORCH_CHECK(false, op,
                  ": tritool was built without CUDA kernels, and the arguments are CUDA tensors; install the CUDA "
                  "compiler (pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl "
                  "nvidia-nvvm) and reinstall tritool, or move the tensors to the CPU");
#endif
}

CUstream_st* current_stream(const Tensor& tensor) {
  if (tensor.is_cpu()) return nullptr;
  // The symbol exists only in CUDA builds of torch, so it is looked up at run time: one binary serves all of them.
  using GetStream = int32_t (*)(int32_t, void**);
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
    return library == nullptr ? nullptr
                              : reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get_stream != nullptr, "this torch has no CUDA support, yet the arguments are CUDA tensors");
  void* stream = nullptr;
  STD_TORCH_CHECK(get_stream(tensor.get_device_index(), &stream) == 0, "torch gave no CUDA stream for the device");
  return static_cast<CUstream_st*>(stream);
}

void check_launch(int error, const char* op) {
#if defined(TRITOOL_CUDA)
  STD_TORCH_CHECK(error == 0, op, ": the CUDA launch failed: ", tritool_cuda_error_text(error));
#else
  (void)error;
  (void)op;
#endif
}

}  // namespace tritool

#define TRITOOL_IMPLEMENT(m)                                                 \
  m.impl("triangulate", TORCH_BOX(&tritool::triangulate));                   \
  m.impl("triangulate_backward", TORCH_BOX(&tritool::triangulate_backward)); \
  m.impl("project", TORCH_BOX(&tritool::project));                           \
  m.impl("project_backward", TORCH_BOX(&tritool::project_backward));         \
  m.impl("rigid_align", TORCH_BOX(&tritool::rigid_align));                   \
  m.impl("rigid_align_backward", TORCH_BOX(&tritool::rigid_align_backward)); \
  m.impl("softmax_moments", TORCH_BOX(&tritool::softmax_moments));           \
  m.impl("softmax_moments_backward", TORCH_BOX(&tritool::softmax_moments_backward))

STABLE_TORCH_LIBRARY_IMPL(tritool, CPU, m) { TRITOOL_IMPLEMENT(m); }
// Also where the CUDA kernels were not built: the op then says so, instead of the dispatcher's riddle.
STABLE_TORCH_LIBRARY_IMPL(tritool, CUDA, m) { TRITOOL_IMPLEMENT(m); }

// What this binary holds, for `tritool info` (read by ctypes in tritool/_native.py).
extern "C" __attribute__((visibility("default"))) const char* tritool_cpu_variant() { return tritool::isa_name(); }
extern "C" __attribute__((visibility("default"))) const char* tritool_cuda_architectures() {
#if defined(TRITOOL_CUDA)
  return TRITOOL_CUDA;
#else
  return "";
#endif
}
