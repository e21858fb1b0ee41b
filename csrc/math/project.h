// SPDX-License-Identifier: Apache-2.0
// Projection of a world point by a 3x4 matrix, and its vector-Jacobian product. A point that is not in front of the
// camera (depth <= 0) has no pixel: NaN, with gradient 0, rather than its mirror image.
#pragma once

#include "math/scalar.h"

TRITOOL_MATH_BEGIN

template <class T>
struct Projection {
  T pixel[2];
  T depth;
  Mask<T> visible;
};

// h = P (X, 1)
template <class T>
TRITOOL_HD void image_of(const T (&point)[3], const T (&matrix)[3][4], T (&image)[3]) {
  for (int i = 0; i < 3; ++i)
    image[i] = matrix[i][0] * point[0] + matrix[i][1] * point[1] + matrix[i][2] * point[2] + matrix[i][3];
}

template <class T>
TRITOOL_HD Projection<T> project_point(const T (&point)[3], const T (&matrix)[3][4]) {
  T image[3];
  image_of(point, matrix, image);
  Projection<T> result;
  result.depth = image[2];
  const T x = image[0] / image[2], y = image[1] / image[2];
  result.visible = (image[2] > T(0)) & is_finite(x) & is_finite(y) & is_finite(image[2]);
  result.pixel[0] = select(result.visible, x, quiet_nan<T>());
  result.pixel[1] = select(result.visible, y, quiet_nan<T>());
  return result;
}

// With h = P (X, 1), x = h0 / h2, y = h1 / h2: d/dh = (g_x, g_y, -(g_x x + g_y y)) / h2, d/dX = P3x3^T d/dh,
// d/dP = d/dh (X, 1)^T. Adds to grad_point.
template <class T>
TRITOOL_HD void project_point_vjp(const T (&point)[3], const T (&matrix)[3][4], const T (&grad)[2], T (&grad_point)[3],
                                  T (&grad_matrix)[3][4]) {
  const Projection<T> projection = project_point(point, matrix);
  const T inverse = T(1) / projection.depth;
  const T grad_image[3] = {grad[0] * inverse, grad[1] * inverse,
                           (T(0) - (grad[0] * projection.pixel[0] + grad[1] * projection.pixel[1])) * inverse};
  T sum[3] = {grad_point[0], grad_point[1], grad_point[2]};
  for (int i = 0; i < 3; ++i) {
    const T g = select(projection.visible, grad_image[i], T(0));
    for (int j = 0; j < 3; ++j) {
      grad_matrix[i][j] = g * select(projection.visible, point[j], T(0));
      sum[j] = sum[j] + grad_image[i] * matrix[i][j];
    }
    grad_matrix[i][3] = g;
  }
  for (int j = 0; j < 3; ++j) grad_point[j] = select(projection.visible, sum[j], grad_point[j]);
}

TRITOOL_MATH_END
