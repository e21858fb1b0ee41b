// SPDX-License-Identifier: Apache-2.0
// Run-time choice of instruction set. Every <op>_cpu.cpp is compiled once per variant, with TRITOOL_ISA naming it, and
// each copy hands out its kernels as a table; <op>.cpp picks the table of the widest variant this processor runs.
#pragma once

namespace tritool {

enum class Isa { kBaseline, kAvx2, kAvx512 };

// Of this processor; the environment variable TRITOOL_CPU=baseline|avx2|avx512 lowers it (for tests).
Isa isa();
const char* isa_name();

// Declares `function<T>()` in every variant's namespace.
#define TRITOOL_DECLARE_KERNELS(Kernels, function) \
  namespace cpu {                                  \
  namespace baseline {                             \
  template <class T>                               \
  const Kernels<T>& function();                    \
  }                                                \
  namespace avx2 {                                 \
  template <class T>                               \
  const Kernels<T>& function();                    \
  }                                                \
  namespace avx512 {                               \
  template <class T>                               \
  const Kernels<T>& function();                    \
  }                                                \
  }

// TRITOOL_X86_VARIANTS says that the build compiled the AVX variants (x86-64 only; NEON is AArch64's baseline).
#if defined(TRITOOL_X86_VARIANTS)
#define TRITOOL_KERNELS_OF(isa, function, T)          \
  ((isa) == Isa::kAvx512 ? cpu::avx512::function<T>() \
   : (isa) == Isa::kAvx2 ? cpu::avx2::function<T>()   \
                         : cpu::baseline::function<T>())
#else
#define TRITOOL_KERNELS_OF(isa, function, T) (cpu::baseline::function<T>())
#endif

#define TRITOOL_PICK_KERNELS(function, T) TRITOOL_KERNELS_OF(isa(), function, T)

}  // namespace tritool
