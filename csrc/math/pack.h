// SPDX-License-Identifier: Apache-2.0
// SIMD lanes as a scalar: Pack<float, 8> is eight floats, with the vocabulary of scalar.h, so that the formulas of this
// folder work on eight points at once. Compiler vector extensions (GCC, clang): the same source becomes SSE2, AVX2,
// AVX-512 or NEON by the flags of the file that includes it.
#pragma once

#include "math/scalar.h"

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
#define TRITOOL_PACK_ARITHMETIC(op)                                                        \
  TRITOOL_PACK TRITOOL_HD Pack<T, N> operator op(const Pack<T, N>& a, const Pack<T, N>& b) { \
    return Pack<T, N>::of(a.v op b.v);                                                         \
  }
#define TRITOOL_PACK_COMPARISON(op)                                                            \
  TRITOOL_PACK TRITOOL_HD PackMask<T, N> operator op(const Pack<T, N>& a, const Pack<T, N>& b) { \
    return PackMask<T, N>{a.v op b.v};                                                         \
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
TRITOOL_PACK TRITOOL_HD PackMask<T, N> operator!(const PackMask<T, N>& a) { return PackMask<T, N>{~a.v}; }
TRITOOL_PACK TRITOOL_HD Pack<T, N> select(const PackMask<T, N>& mask, const Pack<T, N>& a, const Pack<T, N>& b) {
  return Pack<T, N>::of(mask.v ? a.v : b.v);
}
TRITOOL_PACK TRITOOL_HD bool any(const PackMask<T, N>& mask) {
  typename PackMask<T, N>::Integer bits = 0;
  for (int lane = 0; lane < N; ++lane) bits |= mask.v[lane];
  return bits != 0;
}
TRITOOL_PACK TRITOOL_HD bool all(const PackMask<T, N>& mask) { return !any(!mask); }

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
TRITOOL_PACK TRITOOL_HD Pack<T, N> inverse_power_of_two(const Pack<T, N>& x) {
  Pack<T, N> result;
  for (int lane = 0; lane < N; ++lane) result.v[lane] = inverse_power_of_two(x.v[lane]);
  return result;
}

#undef TRITOOL_PACK

TRITOOL_MATH_END
