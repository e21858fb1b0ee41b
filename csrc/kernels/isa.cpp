// SPDX-License-Identifier: Apache-2.0
#include "kernels/isa.h"

#include <cstdlib>
#include <cstring>

namespace tritool {
namespace {

Isa widest() {
#if defined(TRITOOL_X86_VARIANTS)
  __builtin_cpu_init();
  // The sets that -march=x86-64-v4 and -march=x86-64-v3 let the compiler use, the ones it does use here.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  return v4 ? Isa::kAvx512 : v3 ? Isa::kAvx2 : Isa::kBaseline;
#else
  return Isa::kBaseline;
#endif
}

Isa choose() {
  const Isa best = widest();
  const char* wanted = std::getenv("TRITOOL_CPU");
  if (wanted == nullptr) return best;
  Isa limit = best;
  if (std::strcmp(wanted, "baseline") == 0) limit = Isa::kBaseline;
  if (std::strcmp(wanted, "avx2") == 0) limit = Isa::kAvx2;
  return limit < best ? limit : best;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name() {
  switch (isa()) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace tritool
