// SPDX-License-Identifier: Apache-2.0
// The vocabulary in which the formulas are written, for float and double. pack.h gives the same words for SIMD
// vectors and tests/native/dual.h for dual numbers, so that a formula is written once: a branch on a value is a
// select(), a loop that ends when all lanes are done asks all().
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "math/hd.h"

TRITOOL_MATH_BEGIN

// The floating-point type behind a scalar: float for a vector of floats, double for a dual number.
template <class T>
struct RealOf {
  using type = T;
};
template <class T>
using Real = typename RealOf<T>::type;

template <class T>
using Mask = decltype(std::declval<T>() < std::declval<T>());

template <class T>
TRITOOL_HD constexpr Real<T> epsilon() {
  return sizeof(Real<T>) == 4 ? Real<T>(1.1920928955078125e-07) : Real<T>(2.220446049250313e-16);
}
template <class T>
TRITOOL_HD T infinity() {
  return T(Real<T>(HUGE_VAL));
}
template <class T>
TRITOOL_HD T quiet_nan() {
  return infinity<T>() - infinity<T>();
}

TRITOOL_HD float select(bool condition, float a, float b) { return condition ? a : b; }
TRITOOL_HD double select(bool condition, double a, double b) { return condition ? a : b; }
TRITOOL_HD bool all(bool condition) { return condition; }
TRITOOL_HD bool any(bool condition) { return condition; }

TRITOOL_HD float sqrt_(float x) { return ::sqrtf(x); }
TRITOOL_HD double sqrt_(double x) { return ::sqrt(x); }
TRITOOL_HD float abs_(float x) { return ::fabsf(x); }
TRITOOL_HD double abs_(double x) { return ::fabs(x); }
TRITOOL_HD float ceil_(float x) { return ::ceilf(x); }
TRITOOL_HD double ceil_(double x) { return ::ceil(x); }
TRITOOL_HD float floor_(float x) { return ::floorf(x); }
TRITOOL_HD double floor_(double x) { return ::floor(x); }

#if defined(__CUDA_ARCH__)
// Two ulp, one instruction. In a Givens rotation c, s and the new diagonal share the factor, so its error cancels.
TRITOOL_HD float rsqrt_(float x) { return ::rsqrtf(x); }
TRITOOL_HD double rsqrt_(double x) { return ::rsqrt(x); }
#else
TRITOOL_HD float rsqrt_(float x) { return 1.0f / ::sqrtf(x); }
TRITOOL_HD double rsqrt_(double x) { return 1.0 / ::sqrt(x); }
#endif

// NaN in either operand: b, as in `a > b ? a : b`. Callers that must see a NaN look for it themselves.
template <class T>
TRITOOL_HD T max_(T a, T b) {
  return select(a > b, a, b);
}
template <class T>
TRITOOL_HD Mask<T> is_nan(T x) {
  return x != x;
}
template <class T>
TRITOOL_HD Mask<T> is_finite(T x) {
  return abs_(x) < infinity<T>();
}

// 2^-k for 2^k <= x < 2^(k+1): multiplying by it is exact. 1 where x is zero, denormal, or not finite: such an x says
// nothing about a useful scale, and the value itself must go on unchanged.
TRITOOL_HD float inverse_power_of_two(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t exponent = (bits >> 23) & 0xff;
  bits = (254 - exponent) << 23;  // exponents 1..253 stay normal numbers
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return exponent == 0 || exponent >= 254 ? 1.0f : scale;
}
TRITOOL_HD double inverse_power_of_two(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint64_t exponent = (bits >> 52) & 0x7ff;
  bits = (2046 - exponent) << 52;
  double scale;
  memcpy(&scale, &bits, sizeof scale);
  return exponent == 0 || exponent >= 2046 ? 1.0 : scale;
}

// a * b - c with one rounding. The softmax needs it: rounding a * b first costs 1e-4 px at logits around 100
// (docs/ops/soft_argmax.md). Without the instruction, float goes through double, whose product of two floats is exact.
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
TRITOOL_HD float multiply_subtract(float a, float b, float c) { return ::fmaf(a, b, -c); }
#else
TRITOOL_HD float multiply_subtract(float a, float b, float c) { return float(double(a) * double(b) - double(c)); }
#endif
TRITOOL_HD double multiply_subtract(double a, double b, double c) { return ::fma(a, b, -c); }

// a / b where 1 / b is at hand: the first product is corrected by what it leaves of a, and then is what a division
// gives (Markstein, IBM Journal of Research and Development 34, 1990), for numbers whose products are in range. Without
// the instruction a division costs less.
template <class T>
TRITOOL_HD T quotient(const T& a, const T& b, [[maybe_unused]] const T& inverse) {
#if defined(__CUDA_ARCH__) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  const T product = a * inverse;
  return product - multiply_subtract(product, b, a) * inverse;
#else
  return a / b;
#endif
}

TRITOOL_HD float exp2_(float x) { return ::exp2f(x); }
TRITOOL_HD double exp2_(double x) { return ::exp2(x); }
TRITOOL_HD float log2_(float x) { return ::log2f(x); }
TRITOOL_HD double log2_(double x) { return ::log2(x); }

TRITOOL_MATH_END
