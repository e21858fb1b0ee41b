// SPDX-License-Identifier: Apache-2.0
// What every math header stands on: where a function may run, and which instruction set it was compiled for.
#pragma once

#if defined(__CUDACC__)
#define TRITOOL_HD __host__ __device__ __forceinline__
#else
#define TRITOOL_HD inline __attribute__((always_inline))
#endif

// The CPU kernels are compiled once per instruction set and chosen at run time. Each copy of the inline functions
// lives in a namespace of its own, or the linker would fold them into one copy, possibly the AVX-512 one, and an
// older processor would stop at an instruction it does not have.
#if !defined(TRITOOL_ISA)
#define TRITOOL_ISA baseline
#endif

#define TRITOOL_MATH_BEGIN \
  namespace tritool {      \
  inline namespace TRITOOL_ISA {
#define TRITOOL_MATH_END \
  }                      \
  }
