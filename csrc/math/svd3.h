// SPDX-License-Identifier: Apache-2.0
// Singular values and right singular vectors of a 3x3 matrix by one-sided Jacobi rotations (Hestenes).
// Chosen because it is accurate column by column: V S^2 V^T = A^T A to 17 roundings of the product of the two columns'
// lengths, however much these differ (docs/ops/triangulate.md). Division-safe: an exact zero needs no rotation.
#pragma once

#include "math/scalar.h"

TRITOOL_MATH_BEGIN

template <class T>
struct RightSvd3 {
  T v[3][3];       // columns v[.][i] are the right singular vectors
  T s_squared[3];  // squared singular values; the smallest is s_squared[2], the others in no particular order
};

// Convergence is quadratic. tests/native/test_lanes.cpp tries 10^5 matrices, graded and nearly singular: 3 sweeps leave
// 130 roundings in float32, 4 reach the 17; float64 has further to go and gets two more.
template <class T>
TRITOOL_HD constexpr int jacobi_sweeps() {
  return sizeof(Real<T>) == 4 ? 4 : 6;
}

// Where `done`, by no angle.
template <class T>
TRITOOL_HD void jacobi_rotate(T (&a)[3][3], T (&v)[3][3], int p, int q, Mask<T> done) {
  T pp = T(0), qq = T(0), pq = T(0);
  for (int k = 0; k < 3; ++k) {
    pp = pp + a[k][p] * a[k][p];
    qq = qq + a[k][q] * a[k][q];
    pq = pq + a[k][p] * a[k][q];
  }
  // tan of the rotation angle, the smaller of the two roots: t = 2 pq / (d + sign(d) sqrt(d^2 + 4 pq^2)), d = qq - pp
  const T d = qq - pp;
  const T twice = pq + pq;
  const T denominator = abs_(d) + sqrt_(d * d + twice * twice);
  T t = select(done | (denominator == T(0)), T(0), twice / select(denominator == T(0), T(1), denominator));
  t = select(d < T(0), T(0) - t, t);
  const T cosine = rsqrt_(t * t + T(1));
  const T sine = t * cosine;
  for (int k = 0; k < 3; ++k) {
    const T x = a[k][p], y = a[k][q];
    a[k][p] = cosine * x - sine * y;
    a[k][q] = sine * x + cosine * y;
  }
  for (int k = 0; k < 3; ++k) {
    const T x = v[k][p], y = v[k][q];
    v[k][p] = cosine * x - sine * y;
    v[k][q] = sine * x + cosine * y;
  }
}

// Whether all pairs of columns are orthogonal to rounding; false for NaN.
template <class T>
TRITOOL_HD Mask<T> is_orthogonal(const T (&a)[3][3]) {
  T length[3];
  for (int i = 0; i < 3; ++i) length[i] = sqrt_(a[0][i] * a[0][i] + a[1][i] * a[1][i] + a[2][i] * a[2][i]);
  const auto pair = [&](int p, int q) {
    const T product = a[0][p] * a[0][q] + a[1][p] * a[1][q] + a[2][p] * a[2][q];
    return abs_(product) <= T(epsilon<T>()) * length[p] * length[q];
  };
  return pair(0, 1) & pair(0, 2) & pair(1, 2);
}

// a is overwritten by U S, whose columns stay those of v.
template <class T>
TRITOOL_HD RightSvd3<T> right_svd3(T (&a)[3][3]) {
  RightSvd3<T> svd;
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) svd.v[i][j] = T(Real<T>(i == j));
  auto done = T(0) != T(0);
  for (int sweep = 0; sweep < jacobi_sweeps<T>(); ++sweep) {
    if (sweep + 1 == jacobi_sweeps<T>()) {  // mostly needless; asked before the others it would only cost
      done = is_orthogonal(a);              // so that a lane does not depend on its neighbours
      if (all(done)) break;
    }
    jacobi_rotate(a, svd.v, 0, 1, done);
    jacobi_rotate(a, svd.v, 0, 2, done);
    jacobi_rotate(a, svd.v, 1, 2, done);
  }
  for (int i = 0; i < 3; ++i) svd.s_squared[i] = a[0][i] * a[0][i] + a[1][i] * a[1][i] + a[2][i] * a[2][i];
  for (int i = 0; i < 2; ++i) {  // bring the smallest to index 2, lane by lane
    const auto swap = svd.s_squared[i] < svd.s_squared[2];
    const T s = svd.s_squared[i];
    svd.s_squared[i] = select(swap, svd.s_squared[2], s);
    svd.s_squared[2] = select(swap, s, svd.s_squared[2]);
    for (int k = 0; k < 3; ++k) {
      const T x = svd.v[k][i], y = a[k][i];
      svd.v[k][i] = select(swap, svd.v[k][2], x);
      svd.v[k][2] = select(swap, x, svd.v[k][2]);
      a[k][i] = select(swap, a[k][2], y);
      a[k][2] = select(swap, y, a[k][2]);
    }
  }
  return svd;
}

TRITOOL_MATH_END
