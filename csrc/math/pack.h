// SPDX-License-Identifier: Apache-2.0
// SIMD lanes as a scalar: Pack<float, 8> is eight floats, with the vocabulary of scalar.h, so that the formulas of this
// folder work on eight points at once. Compiler vector extensions (GCC, clang): the same source becomes SSE2, AVX2,
// AVX-512 or NEON by the flags of the file that includes it.
#pragma once

#include "math/scalar.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

TRITOOL_MATH_BEGIN

template <class T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <class T, int N>
struct PackMask {
  using Integer = typename IntegerOf<T>::type;
  typedef Integer Vector __attribute__((vector_size(sizeof(T) * N)));
  Vector v;
};

template <class T, int N>
struct Pack {
  typedef T Vector __attribute__((vector_size(sizeof(T) * N)));
  static constexpr int kLanes = N;
  Vector v;
  Pack() = default;
  TRITOOL_HD Pack(T value) : v(value - Vector{}) {}
  TRITOOL_HD static Pack of(Vector vector) {
    Pack pack;
    pack.v = vector;
    return pack;
  }
  TRITOOL_HD T operator[](int lane) const { return v[lane]; }
};

template <class T, int N>
struct RealOf<Pack<T, N>> {
  using type = T;
};

#define TRITOOL_PACK template <class T, int N>
#define TRITOOL_PACK_ARITHMETIC(op)                                                          \
  TRITOOL_PACK TRITOOL_HD Pack<T, N> operator op(const Pack<T, N>& a, const Pack<T, N>& b) { \
    return Pack<T, N>::of(a.v op b.v);                                                       \
  }
#define TRITOOL_PACK_COMPARISON(op)                                                              \
  TRITOOL_PACK TRITOOL_HD PackMask<T, N> operator op(const Pack<T, N>& a, const Pack<T, N>& b) { \
    return PackMask<T, N>{a.v op b.v};                                                           \
  }
TRITOOL_PACK_ARITHMETIC(+)
TRITOOL_PACK_ARITHMETIC(-)
TRITOOL_PACK_ARITHMETIC(*)
TRITOOL_PACK_ARITHMETIC(/)
TRITOOL_PACK_COMPARISON(<)
TRITOOL_PACK_COMPARISON(>)
TRITOOL_PACK_COMPARISON(<=)
TRITOOL_PACK_COMPARISON(>=)
TRITOOL_PACK_COMPARISON(==)
TRITOOL_PACK_COMPARISON(!=)
#undef TRITOOL_PACK_ARITHMETIC
#undef TRITOOL_PACK_COMPARISON

TRITOOL_PACK TRITOOL_HD PackMask<T, N> operator&(const PackMask<T, N>& a, const PackMask<T, N>& b) {
  return PackMask<T, N>{a.v & b.v};
}
TRITOOL_PACK TRITOOL_HD PackMask<T, N> operator|(const PackMask<T, N>& a, const PackMask<T, N>& b) {
  return PackMask<T, N>{a.v | b.v};
}
TRITOOL_PACK TRITOOL_HD PackMask<T, N> operator!(const PackMask<T, N>& a) { return PackMask<T, N>{~a.v}; }
TRITOOL_PACK TRITOOL_HD Pack<T, N> select(const PackMask<T, N>& mask, const Pack<T, N>& a, const Pack<T, N>& b) {
  return Pack<T, N>::of(mask.v ? a.v : b.v);
}
TRITOOL_PACK TRITOOL_HD bool any(const PackMask<T, N>& mask) {
#if defined(__AVX512DQ__)
  if constexpr (sizeof(mask.v) == 64) return _mm512_movepi32_mask((__m512i)mask.v) != 0;
#endif
#if defined(__AVX2__)
  if constexpr (sizeof(mask.v) == 32) return _mm256_movemask_epi8((__m256i)mask.v) != 0;
#endif
#if defined(__x86_64__)
  if constexpr (sizeof(mask.v) == 16) return _mm_movemask_epi8((__m128i)mask.v) != 0;
#endif
  constexpr int kWords = sizeof(mask.v) / sizeof(uint64_t);
  uint64_t words[kWords], bits = 0;
  memcpy(words, &mask.v, sizeof words);
  for (int word = 0; word < kWords; ++word) bits |= words[word];
  return bits != 0;
}
TRITOOL_PACK TRITOOL_HD bool all(const PackMask<T, N>& mask) { return !any(!mask); }

// `a > b ? a : b` as one instruction, which the compiler does not make of a select.
#if defined(__x86_64__)
TRITOOL_HD Pack<float, 4> max_(const Pack<float, 4>& a, const Pack<float, 4>& b) {
  return Pack<float, 4>::of(_mm_max_ps(a.v, b.v));
}
TRITOOL_HD Pack<double, 2> max_(const Pack<double, 2>& a, const Pack<double, 2>& b) {
  return Pack<double, 2>::of(_mm_max_pd(a.v, b.v));
}
#endif
#if defined(__AVX2__)
TRITOOL_HD Pack<float, 8> max_(const Pack<float, 8>& a, const Pack<float, 8>& b) {
  return Pack<float, 8>::of(_mm256_max_ps(a.v, b.v));
}
TRITOOL_HD Pack<double, 4> max_(const Pack<double, 4>& a, const Pack<double, 4>& b) {
  return Pack<double, 4>::of(_mm256_max_pd(a.v, b.v));
}
#endif
#if defined(__AVX512F__)
// Here and below with a mask of all lanes: GCC 12 warns that the plain intrinsics use something uninitialised.
TRITOOL_HD Pack<float, 16> max_(const Pack<float, 16>& a, const Pack<float, 16>& b) {
  return Pack<float, 16>::of(_mm512_maskz_max_ps(0xffff, a.v, b.v));
}
TRITOOL_HD Pack<double, 8> max_(const Pack<double, 8>& a, const Pack<double, 8>& b) {
  return Pack<double, 8>::of(_mm512_maskz_max_pd(0xff, a.v, b.v));
}
#endif

// Lane by lane; the compiler turns these loops into one instruction each.
TRITOOL_PACK TRITOOL_HD Pack<T, N> sqrt_(const Pack<T, N>& x) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = sqrt_(x.v[lane]);
  return result;
}
TRITOOL_PACK TRITOOL_HD Pack<T, N> rsqrt_(const Pack<T, N>& x) { return Pack<T, N>(T(1)) / sqrt_(x); }
TRITOOL_PACK TRITOOL_HD Pack<T, N> abs_(const Pack<T, N>& x) {
  using Vector = typename PackMask<T, N>::Vector;
  using Integer = typename IntegerOf<T>::type;
  const Integer sign = Integer(1) << (8 * sizeof(T) - 2) << 1;
  return Pack<T, N>::of((typename Pack<T, N>::Vector)((Vector)x.v & ~(Vector{} + sign)));
}
TRITOOL_PACK TRITOOL_HD Pack<T, N> ceil_(const Pack<T, N>& x) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = ceil_(x.v[lane]);
  return result;
}
TRITOOL_PACK TRITOOL_HD Pack<T, N> floor_(const Pack<T, N>& x) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = floor_(x.v[lane]);
  return result;
}
TRITOOL_PACK TRITOOL_HD Pack<T, N> inverse_power_of_two(const Pack<T, N>& x) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = inverse_power_of_two(x.v[lane]);
  return result;
}

// a * b - c with one rounding, as in scalar.h. Spelled out: contraction alone would leave out a product used elsewhere.
TRITOOL_PACK TRITOOL_HD Pack<T, N> multiply_subtract(const Pack<T, N>& a, const Pack<T, N>& b, const Pack<T, N>& c) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = multiply_subtract(a.v[lane], b.v[lane], c.v[lane]);
  return result;
}

// 2^x for x <= 0 (a softmax weight): 0.9 ulp with fused operations and 1.2 ulp without, exact at integers, 0 for
// x < -125 (-1021 in float64), NaN for NaN. x = n + f with n an integer and |f| <= 1/2; 2^f = 1 + f q(f), q a Chebyshev
// fit of (2^f - 1) / f whose error is 8e-9 (float32) and 1.3e-17 (float64).
template <class T>
struct Exp2Constants;
template <>
struct Exp2Constants<float> {
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  static constexpr int kMantissaBits = 23;
  static constexpr float kSmallest = -125.0f;
  static constexpr int kTerms = 6;
  static constexpr float kTerm[kTerms] = {0.69314718802622878f,   0.24022650760568127f,   0.055503571142190778f,
                                          0.0096180825572778515f, 0.0013390863364671234f, 0.00015453162945120690f};
};
template <>
struct Exp2Constants<double> {
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kMantissaBits = 52;
  static constexpr double kSmallest = -1021.0;
  static constexpr int kTerms = 11;
  static constexpr double kTerm[kTerms] = {
      0.69314718055994530942,   0.2402265069591009822,     0.055504108664821594339,    0.0096181291076068885273,
      0.001333355814641693531,  0.00015403530441736050155, 0.000015252733829836118394, 1.3215442587921689653e-6,
      1.0178062445845773521e-7, 7.0725859692492236999e-9,  4.4549605981865183938e-10};
};

#if defined(__AVX512DQ__)
// mantissa 2^n for whole n, and 0 where x < smallest.
TRITOOL_HD __m512 scale_by_power(__m512 mantissa, __m512 n, __m512 x, float smallest) {
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(smallest), _CMP_NLT_UQ), mantissa, n);
}
TRITOOL_HD __m512d scale_by_power(__m512d mantissa, __m512d n, __m512d x, double smallest) {
  return _mm512_maskz_scalef_pd(_mm512_cmp_pd_mask(x, _mm512_set1_pd(smallest), _CMP_NLT_UQ), mantissa, n);
}
TRITOOL_HD __m512 beyond_nearest_integer(__m512 x) { return _mm512_maskz_reduce_ps(0xffff, x, 0); }
TRITOOL_HD __m512d beyond_nearest_integer(__m512d x) { return _mm512_maskz_reduce_pd(0xff, x, 0); }
#endif

TRITOOL_PACK TRITOOL_HD Pack<T, N> exp2_(const Pack<T, N>& x) {
  using Constants = Exp2Constants<T>;
  using Bits = typename PackMask<T, N>::Vector;
  using Value = typename Pack<T, N>::Vector;
#if defined(__AVX512DQ__)
  if constexpr (sizeof(Value) == 64) {
    const Value f = beyond_nearest_integer(x.v);
    Value q = Constants::kTerm[Constants::kTerms - 1] - Value{};
    for (int term = Constants::kTerms - 2; term >= 0; --term) q = q * f + Constants::kTerm[term];
    return Pack<T, N>::of(scale_by_power(f * q + T(1), x.v - f, x.v, Constants::kSmallest));
  }
#endif
  const Value shifted = x.v + Constants::kRound;
  const Value f = x.v - (shifted - Constants::kRound);
  Value q = Constants::kTerm[Constants::kTerms - 1] - Value{};
  for (int term = Constants::kTerms - 2; term >= 0; --term) q = q * f + Constants::kTerm[term];
  const Value mantissa = f * q + T(1);
  const Value result = (Value)((Bits)mantissa + ((Bits)shifted << Constants::kMantissaBits));
  return select(x < Pack<T, N>(Constants::kSmallest), Pack<T, N>(T(0)), select(x == x, Pack<T, N>::of(result), x));
}
TRITOOL_PACK TRITOOL_HD Pack<T, N> log2_(const Pack<T, N>& x) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = log2_(x.v[lane]);
  return result;
}

#undef TRITOOL_PACK

TRITOOL_MATH_END
