// SPDX-License-Identifier: Apache-2.0
// The rotation, translation and, if wanted, scale that move N source points onto their targets with the least weighted
// sum of squares, and its vector-Jacobian product.
//
// With weighted means mx, my and M = sum w (y - my) (x - mx)^T = U S V^T (Kabsch, Acta Cryst. A34, 1978; Umeyama, IEEE
// PAMI 13, 1991):
//   R = U diag(1, 1, det(U V^T)) V^T,   s = tr(R^T M) / sum w |x - mx|^2 or 1,   t = my - s R mx.
//
// Steps: coordinates relative to the first point that counts, so that the distance to the world's origin costs no
// accuracy; their means; M from centred coordinates; one-sided Jacobi of M; R from its two largest columns and their
// cross products, which makes det R = 1 and never divides by the smallest singular value; one Newton correction of R
// against M itself. The gradient goes through the polar factor P = R^T M, not through U and V, so that equal singular
// values are no special case. Derivation, measured errors, thresholds: docs/ops/rigid_align.md.
//
// A point with weight 0 or a NaN coordinate is absent. The result is not valid, and NaN, where the points do not
// determine a rotation: fewer than three, all on a line, or targets that are a mirror image with a free axis; also
// where a point that counts has an infinite coordinate or a weight that is negative or not finite.
#pragma once

#include "math/scalar.h"
#include "math/svd3.h"

// Before a loop over points: nvcc takes one at a time by itself, and spends much on finding each.
#if defined(__CUDACC__)
#define TRITOOL_UNROLL_POINTS _Pragma("unroll 4")
#else
#define TRITOOL_UNROLL_POINTS
#endif

TRITOOL_MATH_BEGIN

// A source point, where it should go, and how much that matters.
template <class T>
struct Correspondence {
  T source[3];
  T target[3];
  T weight;
};

// The gradient with respect to a Correspondence.
template <class T>
struct CorrespondenceGradient {
  T source[3];
  T target[3];
  T weight;
};

// Below this share of the largest singular value, s2 + det s3 and M itself count as rounding.
template <class T>
TRITOOL_HD constexpr Real<T> rigid_threshold() {
  return sizeof(Real<T>) == 4 ? Real<T>(1e-6) : Real<T>(1e-13);
}

// Sums are made in groups of so many points, then over the groups: rounding grows with the longer of the two.
constexpr int kPointsPerSum = 32;

// The solution, and what the gradient needs again. Weights count times weight_scale, M times moment_scale, both powers
// of two; means are relative to the origins.
template <class T>
struct RigidAlignment {
  T rotation[3][3];
  T scale;
  T source_origin[3], target_origin[3];
  T source_mean[3], target_mean[3];
  T total;   // sum w
  T spread;  // sum w |x - mx|^2
  T weight_scale, moment_scale;
  T v[3][3];         // right singular vectors of M, det 1
  T inverse_sum[3];  // 1 / (s2 + s3), 1 / (s1 + s3), 1 / (s1 + s2); s3 with the sign of det(U V^T)
  Mask<T> valid;

  // (tr(P) I - P)^-1 x for P = R^T M = V diag(s1, s2, s3) V^T, both times moment_scale
  TRITOOL_HD void solve(const T (&x)[3], T (&q)[3]) const {
    q[0] = q[1] = q[2] = T(0);
    for (int i = 0; i < 3; ++i) {
      const T e = (v[0][i] * x[0] + v[1][i] * x[1] + v[2][i] * x[2]) * inverse_sum[i];
      for (int k = 0; k < 3; ++k) q[k] = q[k] + v[k][i] * e;
    }
  }
};

template <class T>
TRITOOL_HD Mask<T> is_present(const Correspondence<T>& point) {
  auto present = point.weight != T(0);
  for (int k = 0; k < 3; ++k)
    present = present & (point.source[k] == point.source[k]) & (point.target[k] == point.target[k]);
  return present;
}

template <class T>
TRITOOL_HD T counted_weight(const Correspondence<T>& point, Mask<T> present, T scale) {
  return select(present, select(point.weight < T(0), quiet_nan<T>(), point.weight) * scale, T(0));
}

// x - mx and y - my; 0 for an absent point, whatever it holds.
template <class T>
TRITOOL_HD void centre(const RigidAlignment<T>& solution, const Correspondence<T>& point, Mask<T> present, T (&x)[3],
                       T (&y)[3]) {
  for (int k = 0; k < 3; ++k) {
    x[k] = select(present, (point.source[k] - solution.source_origin[k]) - solution.source_mean[k], T(0));
    y[k] = select(present, (point.target[k] - solution.target_origin[k]) - solution.target_mean[k], T(0));
  }
}

template <class T>
TRITOOL_HD void cross(const T (&a)[3][3], int p, int q, T (&result)[3]) {
  result[0] = a[1][p] * a[2][q] - a[2][p] * a[1][q];
  result[1] = a[2][p] * a[0][q] - a[0][p] * a[2][q];
  result[2] = a[0][p] * a[1][q] - a[1][p] * a[0][q];
}

// The vector b with [b]x = A - A^T for A = left^T right.
template <class T>
TRITOOL_HD void twist(const T (&left)[3][3], const T (&right)[3][3], T (&b)[3]) {
  for (int k = 0; k < 3; ++k) {
    const int i = k == 0 ? 2 : k - 1, j = k == 2 ? 0 : k + 1;  // (A - A^T)_ij = b_k
    b[k] = T(0);
    for (int l = 0; l < 3; ++l) b[k] = b[k] + (left[l][i] * right[l][j] - left[l][j] * right[l][i]);
  }
}

// Row i of R [b]x.
template <class T>
TRITOOL_HD void times_twist(const T (&row)[3], const T (&b)[3], T (&result)[3]) {
  result[0] = row[1] * b[2] - row[2] * b[1];
  result[1] = row[2] * b[0] - row[0] * b[2];
  result[2] = row[0] * b[1] - row[1] * b[0];
}

// Origins, means and sums of the weights. Points: see align().
template <class T, class Points>
TRITOOL_HD void find_means(const Points& points, RigidAlignment<T>& solution) {
  solution.weight_scale = T(1);
  if (points.weighted) {  // weights may come in any scale: bring the largest near 1, exactly
    T largest = T(0);
    for (int n = 0; n < points.count; ++n) {
      const Correspondence<T> point = points(n);
      largest = select(is_present(point) & (point.weight > largest), point.weight, largest);
    }
    solution.weight_scale = inverse_power_of_two(largest);
  }
  T found = T(0), total = T(0);
  for (int k = 0; k < 3; ++k) {
    solution.source_origin[k] = solution.target_origin[k] = T(0);
    solution.source_mean[k] = solution.target_mean[k] = T(0);
  }
  for (int first = 0; first < points.count; first += kPointsPerSum) {
    const int end = points.count - first < kPointsPerSum ? points.count : first + kPointsPerSum;
    T group = T(0), source[3] = {T(0), T(0), T(0)}, target[3] = {T(0), T(0), T(0)};
    TRITOOL_UNROLL_POINTS
    for (int n = first; n < end; ++n) {
      const Correspondence<T> point = points(n);
      const auto present = is_present(point);
      const auto is_origin = present & (found == T(0));
      const T weight = counted_weight(point, present, solution.weight_scale);
      for (int k = 0; k < 3; ++k) {
        solution.source_origin[k] = select(is_origin, point.source[k], solution.source_origin[k]);
        solution.target_origin[k] = select(is_origin, point.target[k], solution.target_origin[k]);
        source[k] = source[k] + weight * select(present, point.source[k] - solution.source_origin[k], T(0));
        target[k] = target[k] + weight * select(present, point.target[k] - solution.target_origin[k], T(0));
      }
      found = select(present, T(1), found);
      group = group + weight;
    }
    total = total + group;
    for (int k = 0; k < 3; ++k) {
      solution.source_mean[k] = solution.source_mean[k] + source[k];
      solution.target_mean[k] = solution.target_mean[k] + target[k];
    }
  }
  solution.total = total;
  const T inverse = T(1) / select(found == T(0), T(1), total);
  for (int k = 0; k < 3; ++k) {
    solution.source_mean[k] = solution.source_mean[k] * inverse;
    solution.target_mean[k] = solution.target_mean[k] * inverse;
  }
}

// One Newton step of the equation that makes R^T M symmetric, and one of R^T R = I, in the same product: what is left
// of the rotations' rounding goes, and R is as good as its format. `trusted`: where the step is small.
template <class T>
TRITOOL_HD void correct_rotation(const T (&moment)[3][3], Mask<T> trusted, RigidAlignment<T>& solution) {
  T(&r)[3][3] = solution.rotation;
  T residual[3], b[3], step[3][3];
  twist(r, moment, residual);
  solution.solve(residual, b);
  for (int k = 0; k < 3; ++k) b[k] = select(trusted, b[k], T(0));
  for (int i = 0; i < 3; ++i) times_twist(r[i], b, step[i]);
  for (int p = 0; p < 3; ++p) {
    for (int q = p; q < 3; ++q) {
      const T dot = r[0][p] * r[0][q] + r[1][p] * r[1][q] + r[2][p] * r[2][q];
      const T half = T(Real<T>(0.5)) * (T(Real<T>(p == q)) - dot);
      for (int i = 0; i < 3; ++i) {
        step[i][q] = step[i][q] + r[i][p] * half;
        if (p != q) step[i][p] = step[i][p] + r[i][q] * half;
      }
    }
  }
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) r[i][j] = r[i][j] + step[i][j];
}

// Points: `int count`, `bool weighted` (false: all weights are 1) and `Correspondence<T> operator()(int n) const`.
template <class T, class Points>
TRITOOL_HD RigidAlignment<T> align(const Points& points, bool with_scale) {
  RigidAlignment<T> solution;
  find_means(points, solution);

  T moment[3][3], target_spread = T(0);
  solution.spread = T(0);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) moment[i][j] = T(0);
  for (int first = 0; first < points.count; first += kPointsPerSum) {
    const int end = points.count - first < kPointsPerSum ? points.count : first + kPointsPerSum;
    T group[3][3], source = T(0), target = T(0);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) group[i][j] = T(0);
    TRITOOL_UNROLL_POINTS
    for (int n = first; n < end; ++n) {
      const Correspondence<T> point = points(n);
      const auto present = is_present(point);
      const T weight = counted_weight(point, present, solution.weight_scale);
      T x[3], y[3];
      centre(solution, point, present, x, y);
      for (int i = 0; i < 3; ++i) {
        const T weighted_y = weight * y[i];
        source = source + weight * x[i] * x[i];
        target = target + weighted_y * y[i];
        for (int j = 0; j < 3; ++j) group[i][j] = group[i][j] + weighted_y * x[j];
      }
    }
    solution.spread = solution.spread + source;
    target_spread = target_spread + target;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) moment[i][j] = moment[i][j] + group[i][j];
  }
  // The rotations take fourth powers of M.
  T largest_entry = T(0);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) largest_entry = max_(abs_(moment[i][j]), largest_entry);
  solution.moment_scale = inverse_power_of_two(largest_entry);
  T columns[3][3];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) columns[i][j] = moment[i][j] = moment[i][j] * solution.moment_scale;

  const RightSvd3<T> svd = right_svd3(columns);
  T u[3][3], third[3];
  T s[3];
  for (int i = 0; i < 2; ++i) {
    s[i] = sqrt_(svd.s_squared[i]);
    const T inverse = T(1) / s[i];
    for (int k = 0; k < 3; ++k) {
      u[k][i] = columns[k][i] * inverse;
      solution.v[k][i] = svd.v[k][i];
    }
  }
  cross(u, 0, 1, third);
  for (int k = 0; k < 3; ++k) u[k][2] = third[k];
  cross(solution.v, 0, 1, third);
  for (int k = 0; k < 3; ++k) solution.v[k][2] = third[k];
  // The sign of det(U V^T) is that of s3 = u3^T M v3.
  s[2] = T(0);
  for (int i = 0; i < 3; ++i)
    s[2] = s[2] + u[i][2] * (moment[i][0] * third[0] + moment[i][1] * third[1] + moment[i][2] * third[2]);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j)
      solution.rotation[i][j] = u[i][0] * solution.v[j][0] + u[i][1] * solution.v[j][1] + u[i][2] * solution.v[j][2];

  const T largest = max_(s[0], s[1]);
  const T gap = select(s[0] < s[1], s[0], s[1]) + s[2];
  const T tau = T(rigid_threshold<T>());
  const T most =
      sqrt_(solution.spread) * sqrt_(target_spread) * solution.moment_scale;  // s1 + s2 + s3 are at most this
  solution.valid = (gap > tau * largest) & (largest > tau * most) & is_finite(most);
  solution.inverse_sum[0] = T(1) / (s[1] + s[2]);
  solution.inverse_sum[1] = T(1) / (s[0] + s[2]);
  solution.inverse_sum[2] = T(1) / (s[0] + s[1]);
  correct_rotation(moment, gap > T(Real<T>(1e-3)) * largest, solution);

  solution.scale = T(1);
  if (with_scale) {
    T trace = T(0);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) trace = trace + solution.rotation[i][j] * moment[i][j];
    solution.scale = trace / (solution.spread * solution.moment_scale);
  }
  return solution;
}

// rotation [3][3], translation [3], scale: NaN where the points do not determine them.
template <class T, class Points>
TRITOOL_HD void rigid_align_points(const Points& points, bool with_scale, T (&rotation)[3][3], T (&translation)[3],
                                   T& scale) {
  const RigidAlignment<T> solution = align<T>(points, with_scale);
  for (int i = 0; i < 3; ++i) {
    T moved = T(0);
    for (int j = 0; j < 3; ++j) {
      rotation[i][j] = select(solution.valid, solution.rotation[i][j], quiet_nan<T>());
      moved = moved + solution.rotation[i][j] * (solution.source_origin[j] + solution.source_mean[j]);
    }
    const T target = solution.target_origin[i] + solution.target_mean[i];
    translation[i] = select(solution.valid, target - solution.scale * moved, quiet_nan<T>());
  }
  scale = select(solution.valid, solution.scale, quiet_nan<T>());
}

// Gradients of <grad_rotation, R> + <grad_translation, t> + grad_scale s. Calls sink(n, CorrespondenceGradient) for
// every point; all zero for an absent point and for a result that is not valid, whatever comes in.
//
// With G = dL/dR and g = dL/ds after t has been inserted, a the twist of R^T G, q = (tr(P) I - P)^-1 a:
//   dL/dM = R [q]x + g / spread R,  dL/dspread = -g s / spread,
// and from there to x, y and w. As a common motion of all points costs nothing, all terms of dL/dw together are
// e . dL/dy / w, e = y - my - s R (x - mx): with exact data no weight matters.
template <class T, class Points, class Sink>
TRITOOL_HD void rigid_align_points_vjp(const Points& points, bool with_scale, const T (&grad_rotation)[3][3],
                                       const T (&grad_translation)[3], T grad_scale, Sink& sink) {
  const RigidAlignment<T> solution = align<T>(points, with_scale);
  const T(&r)[3][3] = solution.rotation;

  T to_rotation[3][3];
  T to_scale = grad_scale;
  T to_source_mean[3] = {T(0), T(0), T(0)}, to_target_mean[3];  // over the sum of the weights
  const T inverse_total = T(1) / solution.total;
  for (int i = 0; i < 3; ++i) {
    T moved = T(0);
    for (int j = 0; j < 3; ++j) {
      const T mean = solution.source_origin[j] + solution.source_mean[j];
      moved = moved + r[i][j] * mean;
      to_rotation[i][j] = grad_rotation[i][j] - solution.scale * grad_translation[i] * mean;
      to_source_mean[j] = to_source_mean[j] - solution.scale * inverse_total * r[i][j] * grad_translation[i];
    }
    to_scale = to_scale - grad_translation[i] * moved;
    to_target_mean[i] = grad_translation[i] * inverse_total;
  }
  T a[3], q[3], to_moment[3][3];
  twist(r, to_rotation, a);
  solution.solve(a, q);
  for (int i = 0; i < 3; ++i) {
    times_twist(r[i], q, to_moment[i]);
    for (int j = 0; j < 3; ++j) to_moment[i][j] = to_moment[i][j] * solution.moment_scale;
  }
  T to_spread = T(0);
  if (with_scale) {
    const T share = to_scale / solution.spread;
    to_spread = T(0) - share * solution.scale;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) to_moment[i][j] = to_moment[i][j] + share * r[i][j];
  }

  TRITOOL_UNROLL_POINTS
  for (int n = 0; n < points.count; ++n) {
    const Correspondence<T> point = points(n);
    const auto present = is_present(point);
    const auto counts = solution.valid & present;
    const T weight = point.weight * solution.weight_scale;
    T x[3], y[3];
    centre(solution, point, present, x, y);
    CorrespondenceGradient<T> gradient;
    gradient.weight = T(0);
    for (int k = 0; k < 3; ++k) {
      const T to_x = to_moment[0][k] * y[0] + to_moment[1][k] * y[1] + to_moment[2][k] * y[2] + to_source_mean[k];
      const T to_y = to_moment[k][0] * x[0] + to_moment[k][1] * x[1] + to_moment[k][2] * x[2] + to_target_mean[k];
      const T residual = y[k] - solution.scale * (r[k][0] * x[0] + r[k][1] * x[1] + r[k][2] * x[2]);
      gradient.source[k] = select(counts, weight * (to_x + (to_spread + to_spread) * x[k]), T(0));
      gradient.target[k] = select(counts, weight * to_y, T(0));
      gradient.weight = gradient.weight + residual * to_y;
    }
    gradient.weight = select(counts, gradient.weight * solution.weight_scale, T(0));
    sink(n, gradient);
  }
}

TRITOOL_MATH_END

#undef TRITOOL_UNROLL_POINTS
