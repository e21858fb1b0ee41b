// SPDX-License-Identifier: Apache-2.0
// Weighted linear triangulation (DLT) of one point from C views, and its vector-Jacobian product.
//
// Every view gives two rows a = w (u P3 - P1) and w (v P3 - P2) of A [2C, 4] (Iskakov et al., ICCV 2019, equation (3)).
// With y in R^3 and r = A (y, 1):
//   homogeneous    minimises |r|^2 / (1 + |y|^2): the smallest right singular vector of A, equation (4);
//   inhomogeneous  minimises |r|^2: independent of the unit and the origin of the world.
//
// Steps: Givens QR of A row by row; one-sided Jacobi of the leading 3x3 block; the inhomogeneous solution y0 by back
// substitution; from it the homogeneous one by the secular equation for lambda, the smallest eigenvalue of A^T A; one
// Newton correction against the rows themselves. All are accurate column by column, unlike a library SVD, whose error
// is relative to the largest column (the translations, about 5e6 in millimetres). Derivation, measured errors and the
// reasons for each threshold: docs/ops/triangulate.md.
//
// A view with weight 0 or a NaN pixel is absent. The point is not valid, and NaN, where fewer than two views are
// present, where their rays are (nearly) parallel or a present view holds a NaN, an infinity or a negative weight.
#pragma once

#include "math/scalar.h"
#include "math/svd3.h"

TRITOOL_MATH_BEGIN

// What one view says of the point: pixel (u, v), weight, projection matrix.
template <class T>
struct Observation {
  T u, v;
  T weight;
  T projection[3][4];
};

// The gradient with respect to an Observation.
template <class T>
struct ObservationGradient {
  T u, v;
  T weight;
  T projection[3][4];
};

// Below these a point counts as not determined: s3 / s1, and (s3^2 - lambda) / s3^2. Real rigs stay above 8e-4 and
// weights of 1e-5 above 1e-5; parallel rays, one view or one view twice come out below 1e-7 (float32).
template <class T>
TRITOOL_HD constexpr Real<T> degeneracy_threshold() {
  return sizeof(Real<T>) == 4 ? Real<T>(1e-6) : Real<T>(1e-13);
}

template <class T>
struct WeightedRows {
  T row[2][4];
};

// The solution, and the factors of A^T A that the gradient needs again: (B - lambda)^-1 = V diag(1/(s_i^2 - lambda))
// V^T with B = A3^T A3 the leading 3x3 block. gap = s3^2 - lambda is found without cancellation and used in its place.
template <class T>
struct Triangulation {
  T point[3];
  T lambda;
  T gap;
  RightSvd3<T> svd;
  T scale;  // power of two by which the weights were multiplied
  Mask<T> valid;

  // q = (B - lambda)^-1 x
  TRITOOL_HD void solve(const T (&x)[3], T (&q)[3]) const {
    q[0] = q[1] = q[2] = T(0);
    for (int i = 0; i < 3; ++i) {
      const T eigenvalue = i == 2 ? gap : svd.s_squared[i] - lambda;
      const T e = (svd.v[0][i] * x[0] + svd.v[1][i] * x[1] + svd.v[2][i] * x[2]) / eigenvalue;
      for (int k = 0; k < 3; ++k) q[k] = q[k] + svd.v[k][i] * e;
    }
  }
};

template <class T>
TRITOOL_HD Mask<T> is_present(const Observation<T>& view) {
  return (view.weight != T(0)) & (view.u == view.u) & (view.v == view.v);
}

// The two rows of a view. Every pass over the views calls this, so that all see the same rounded numbers: the
// correction only works against the very rows that were factored (docs/ops/triangulate.md, section 4).
template <class T>
TRITOOL_HD WeightedRows<T> weighted_rows(const Observation<T>& view, T scale) {
  const auto present = is_present(view);
  const T weight = select(view.weight < T(0), quiet_nan<T>(), view.weight) * scale;
  WeightedRows<T> rows;
  for (int j = 0; j < 4; ++j) {
    rows.row[0][j] = select(present, weight * (view.u * view.projection[2][j] - view.projection[0][j]), T(0));
    rows.row[1][j] = select(present, weight * (view.v * view.projection[2][j] - view.projection[1][j]), T(0));
  }
  return rows;
}

template <class T>
TRITOOL_HD T dot_with_point(const T (&row)[4], const T (&point)[3]) {
  return row[3] + (row[0] * point[0] + row[1] * point[1] + row[2] * point[2]);
}
template <class T>
TRITOOL_HD T dot3(const T (&row)[4], const T (&x)[3]) {
  return row[0] * x[0] + row[1] * x[1] + row[2] * x[2];
}

// lambda and gap: the root in (0, s) of lambda (kappa + sum_i e_i^2 s_i / (s_i - lambda)) = rho^2, kappa = 1, s_i the
// squared singular values and s the smallest of them. Each step keeps the term of s exact and replaces the others by
// their tangent, which leaves a quadratic equation. Everything is divided by s so that no square overflows.
template <class T>
TRITOOL_HD void solve_secular(const RightSvd3<T>& svd, const T (&e)[3], T rho_squared, T& lambda, T& gap) {
  const T s = svd.s_squared[2];
  const T inverse_s = T(1) / s;
  const T t = e[2] * e[2];
  const T residual = rho_squared * inverse_s;
  T root = T(0);        // lambda / s
  T complement = T(1);  // 1 - root, free of cancellation
  // Ordinary rigs need 2 or 3 steps, points near the world's origin 8.
  for (int step = 0; step < 10; ++step) {
    T phi = T(1), slope = T(0);
    for (int i = 0; i < 2; ++i) {
      const T inverse = T(1) / (svd.s_squared[i] * inverse_s - root);
      const T x = e[i] * e[i] * svd.s_squared[i] * inverse_s * inverse;
      phi = phi + x;
      slope = slope + x * inverse;
    }
    const T b = phi + root * slope;
    const T d = residual + root * root * slope;
    const T h = b - d - t;
    const T discriminant = sqrt_(h * h + T(4) * b * t);
    complement = select(h >= T(0), (h + discriminant) / (b + b), (t + t) / (discriminant - h));
    const T next = (d + d) / (b + d + t + discriminant);
    const auto settled = !(abs_(next - root) > T(2 * epsilon<T>()) * next);
    root = next;
    if (all(settled)) break;
  }
  lambda = root * s;
  gap = complement * s;
}

// Solves without the correction. Views: `int count` and `Observation<T> operator()(int view) const`.
template <class T, class Views>
TRITOOL_HD Triangulation<T> factor(const Views& views, bool homogeneous) {
  Triangulation<T> result;

  // Weights and projections may come in any scale: bring the rows near the size of pixels, exactly.
  T largest = T(0), present_views = T(0);
  for (int c = 0; c < views.count; ++c) {
    const Observation<T> view = views(c);
    T size = max_(max_(abs_(view.projection[2][0]), abs_(view.projection[2][1])), abs_(view.projection[2][2]));
    size = size * abs_(view.weight);
    const auto present = is_present(view);
    largest = select(present & (size > largest), size, largest);
    present_views = present_views + select(present, T(1), T(0));
  }
  result.scale = inverse_power_of_two(largest);

  T r[3][4];  // upper triangle of the QR factor; its last row is only ever needed squared
  T rho_squared = T(0);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) r[i][j] = T(0);
  for (int c = 0; c < views.count; ++c) {
    WeightedRows<T> rows = weighted_rows(views(c), result.scale);
    for (int half = 0; half < 2; ++half) {
      T(&a)[4] = rows.row[half];
      for (int k = 0; k < 3; ++k) {
        const T length_squared = r[k][k] * r[k][k] + a[k] * a[k];
        const auto nothing = length_squared == T(0);  // false for NaN, which must spread
        const T inverse = rsqrt_(select(nothing, T(1), length_squared));
        const T cosine = select(nothing, T(1), r[k][k] * inverse);
        const T sine = a[k] * inverse;
        r[k][k] = length_squared * inverse;
        for (int j = k + 1; j < 4; ++j) {
          const T x = r[k][j];
          r[k][j] = cosine * x + sine * a[j];
          a[j] = cosine * a[j] - sine * x;
        }
      }
      rho_squared = rho_squared + a[3] * a[3];
    }
  }

  T y[3];
  y[2] = (T(0) - r[2][3]) / r[2][2];
  y[1] = (T(0) - r[1][3] - r[1][2] * y[2]) / r[1][1];
  y[0] = (T(0) - r[0][3] - r[0][1] * y[1] - r[0][2] * y[2]) / r[0][0];

  T leading[3][3];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) leading[i][j] = r[i][j];
  result.svd = right_svd3(leading);

  result.lambda = T(0);
  result.gap = result.svd.s_squared[2];
  if (homogeneous) {
    T e[3];
    for (int i = 0; i < 3; ++i)
      e[i] = result.svd.v[0][i] * y[0] + result.svd.v[1][i] * y[1] + result.svd.v[2][i] * y[2];
    solve_secular(result.svd, e, rho_squared, result.lambda, result.gap);
    for (int i = 0; i < 3; ++i) {
      const T eigenvalue = i == 2 ? result.gap : result.svd.s_squared[i] - result.lambda;
      const T step = e[i] * result.lambda / eigenvalue;
      for (int k = 0; k < 3; ++k) y[k] = y[k] + result.svd.v[k][i] * step;
    }
  }
  for (int k = 0; k < 3; ++k) result.point[k] = y[k];

  const T tau = T(degeneracy_threshold<T>());
  const T largest_s = max_(result.svd.s_squared[0], result.svd.s_squared[1]);
  result.valid = (present_views >= T(2)) & (result.svd.s_squared[2] > tau * tau * largest_s) &
                 (result.gap > tau * result.svd.s_squared[2]) & is_finite(y[0]) & is_finite(y[1]) & is_finite(y[2]);
  return result;
}

// One Newton step of the eigenvalue problem with residuals taken from the rows themselves, for the point (step_y) and,
// where the gradient's q = -(B - lambda)^-1 grad is given, for q as well (step_q). Refreshes lambda and gap.
// Where the views barely determine the point the step would make it worse and is left out: `trusted` says so.
template <class T, class Views>
TRITOOL_HD void correct(const Views& views, bool homogeneous, Mask<T> trusted, Triangulation<T>& solution,
                        T (&step_y)[3], const T* negative_grad, const T* q, T* step_q) {
  T sum_y[3] = {T(0), T(0), T(0)}, sum_q[3] = {T(0), T(0), T(0)};
  T cost = T(0);
  for (int c = 0; c < views.count; ++c) {
    const WeightedRows<T> rows = weighted_rows(views(c), solution.scale);
    for (int half = 0; half < 2; ++half) {
      const T(&a)[4] = rows.row[half];
      const T residual = dot_with_point(a, solution.point);
      cost = cost + residual * residual;
      for (int k = 0; k < 3; ++k) sum_y[k] = sum_y[k] - a[k] * residual;
      if (q != nullptr) {
        const T along_q = a[0] * q[0] + a[1] * q[1] + a[2] * q[2];
        for (int k = 0; k < 3; ++k) sum_q[k] = sum_q[k] - a[k] * along_q;
      }
    }
  }
  if (homogeneous) {
    const T norm = T(1) + solution.point[0] * solution.point[0] + solution.point[1] * solution.point[1] +
                   solution.point[2] * solution.point[2];
    const T lambda = cost / norm;
    const T gap = solution.gap + (solution.lambda - lambda);
    // A new gap far from the old one is rounding, not news.
    const auto plausible = trusted & (gap > T(Real<T>(0.5)) * solution.gap) & (gap < T(2) * solution.gap);
    solution.lambda = select(plausible, lambda, solution.lambda);
    solution.gap = select(plausible, gap, solution.gap);
    for (int k = 0; k < 3; ++k) sum_y[k] = sum_y[k] + solution.lambda * solution.point[k];
    if (q != nullptr)
      for (int k = 0; k < 3; ++k) sum_q[k] = sum_q[k] + solution.lambda * q[k];
  }
  solution.solve(sum_y, step_y);
  for (int k = 0; k < 3; ++k) step_y[k] = select(trusted, step_y[k], T(0));
  if (q != nullptr) {
    T residual_q[3], step[3];
    for (int k = 0; k < 3; ++k) residual_q[k] = negative_grad[k] + sum_q[k];
    solution.solve(residual_q, step);
    for (int k = 0; k < 3; ++k) step_q[k] = select(trusted, step[k], T(0));
  }
}

// point [3]: NaN where the views do not determine it.
template <class T, class Views>
TRITOOL_HD void triangulate_point(const Views& views, bool homogeneous, T (&point)[3]) {
  Triangulation<T> solution = factor<T>(views, homogeneous);
  const T largest_s = max_(solution.svd.s_squared[0], solution.svd.s_squared[1]);
  const auto trusted = (solution.svd.s_squared[2] > T(Real<T>(1e-8)) * largest_s) &
                       (solution.gap > T(Real<T>(0.1)) * solution.svd.s_squared[2]);
  T step[3];
  correct<T>(views, homogeneous, trusted, solution, step, nullptr, nullptr, nullptr);
  for (int k = 0; k < 3; ++k) point[k] = select(solution.valid, solution.point[k] + step[k], quiet_nan<T>());
}

// Gradients of <grad, point>. Calls sink(view, ObservationGradient) for every view; all zero for an absent view and for
// a point that is not valid, whatever grad holds. The weight of an absent view has gradient 0: it enters squared.
//
// With q = -(B - lambda)^-1 grad, mu = q.y / (1 + |y|^2) and, for a row, alpha = a.(y, 1) and beta = a3.q:
//   d/d(unweighted row) = w ((beta - 2 mu alpha) (y, 1) + alpha (q, 0)),  d/dw = 2/w sum_rows alpha (beta - mu alpha).
// The corrections of y and q are added to alpha and beta, not to y and q, where rounding would lose them.
template <class T, class Views, class Sink>
TRITOOL_HD void triangulate_point_vjp(const Views& views, bool homogeneous, const T (&grad)[3], Sink& sink) {
  Triangulation<T> solution = factor<T>(views, homogeneous);
  T negative_grad[3], q[3], step_y[3], step_q[3];
  for (int k = 0; k < 3; ++k) negative_grad[k] = T(0) - grad[k];
  solution.solve(negative_grad, q);
  // Unlike the forward, a large s1 / s3 is the very case that needs the correction.
  const auto trusted = solution.gap > T(Real<T>(0.1)) * solution.svd.s_squared[2];
  correct<T>(views, homogeneous, trusted, solution, step_y, negative_grad, q, step_q);

  const T(&y)[3] = solution.point;
  T mu = T(0);
  if (homogeneous) {
    const T norm = T(1) + y[0] * y[0] + y[1] * y[1] + y[2] * y[2];
    mu = ((q[0] + step_q[0]) * y[0] + (q[1] + step_q[1]) * y[1] + (q[2] + step_q[2]) * y[2]) / norm;
  }
  for (int c = 0; c < views.count; ++c) {
    const Observation<T> view = views(c);
    const WeightedRows<T> rows = weighted_rows(view, solution.scale);
    const auto counts = solution.valid & is_present(view);
    const T weight = view.weight * solution.scale;
    T grad_row[2][4];
    T grad_weight = T(0);
    for (int half = 0; half < 2; ++half) {
      const T(&a)[4] = rows.row[half];
      const T alpha = dot_with_point(a, y) + dot3(a, step_y);
      const T beta = dot3(a, q) + dot3(a, step_q);
      const T along_point = weight * (beta - (mu + mu) * alpha);
      const T along_q = weight * alpha;
      for (int k = 0; k < 3; ++k) grad_row[half][k] = select(counts, along_point * y[k] + along_q * q[k], T(0));
      grad_row[half][3] = select(counts, along_point, T(0));
      grad_weight = grad_weight + alpha * (beta - mu * alpha);
    }
    ObservationGradient<T> gradient;
    gradient.weight = select(counts, (grad_weight + grad_weight) / view.weight, T(0));
    gradient.u = gradient.v = T(0);
    for (int j = 0; j < 4; ++j) {
      gradient.u = gradient.u + grad_row[0][j] * select(counts, view.projection[2][j], T(0));
      gradient.v = gradient.v + grad_row[1][j] * select(counts, view.projection[2][j], T(0));
      gradient.projection[0][j] = T(0) - grad_row[0][j];
      gradient.projection[1][j] = T(0) - grad_row[1][j];
      gradient.projection[2][j] = select(counts, view.u * grad_row[0][j] + view.v * grad_row[1][j], T(0));
    }
    sink(c, gradient);
  }
}

TRITOOL_MATH_END
