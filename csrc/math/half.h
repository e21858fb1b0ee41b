// SPDX-License-Identifier: Apache-2.0
// float16 and bfloat16 as storage: read as they are, computed with as float32.
#pragma once

#include <cstdint>
#include <cstring>

#include "math/hd.h"

namespace tritool {

// Plain bits, the same type in every translation unit.
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

}  // namespace tritool

TRITOOL_MATH_BEGIN

TRITOOL_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
TRITOOL_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// What a computation on elements of type In is done in.
template <class In>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class In>
using Accumulator = typename AccumulatorOf<In>::type;

TRITOOL_HD float load(const float* p) { return *p; }
TRITOOL_HD double load(const double* p) { return *p; }
TRITOOL_HD float load(const BFloat16* p) { return float_from_bits(uint32_t(p->bits) << 16); }
// Exponent and mantissa moved into place are the value times 2^-112, denormals included; infinity and NaN keep theirs.
TRITOOL_HD float load(const Float16* p) {
  const uint32_t bits = p->bits;
  const float magnitude = float_from_bits((bits & 0x7fff) << 13) * float_from_bits(0x77800000);  // 2^112
  const uint32_t special = (bits & 0x7c00) == 0x7c00 ? 0x7f800000 : 0;
  return float_from_bits(bits_of(magnitude) | special | (bits & 0x8000) << 16);
}

TRITOOL_HD void store(float* p, float value) { *p = value; }
TRITOOL_HD void store(double* p, double value) { *p = value; }
// Both round to nearest, ties to even.
TRITOOL_HD void store(BFloat16* p, float value) {
  const uint32_t bits = bits_of(value);
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  p->bits = nan ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
TRITOOL_HD void store(Float16* p, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t sign = bits >> 16 & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;  // 65520 and above round to infinity
  } else if (magnitude < 0x38800000) {
    // Denormal: adding 0.5 leaves the value in units of 2^-24, rounded by the addition itself, in the low bits.
    half = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  p->bits = uint16_t(half | sign);
}

TRITOOL_MATH_END
