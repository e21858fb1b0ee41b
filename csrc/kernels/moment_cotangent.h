// SPDX-License-Identifier: Apache-2.0
// What the backward kernels of both devices load for one map.
#pragma once

#include "kernels/soft_argmax.h"
#include "math/soft_argmax.h"

TRITOOL_MATH_BEGIN

template <class In>
TRITOOL_HD MomentCotangent<Accumulator<In>> moment_cotangent(const SoftmaxMomentsBackwardParams<In>& params,
                                                             int64_t map) {
  using T = Accumulator<In>;
  const int dims = params.dims, columns = mean_size(params);
  MomentCotangent<T> result{};
  const T sum = params.partition[2 * map + 1];
  result.level = params.partition[2 * map];
  result.inverse_sum = T(1) / sum;
  result.valid = sum > T(0) && is_finite(sum) && is_finite(result.level);
  if (params.grad_log_partition != nullptr) result.constant = params.grad_log_partition[map];
  const T* grad = params.grad_covariance == nullptr ? nullptr : params.grad_covariance + map * dims * dims;
  for (int a = 0; a < 3; ++a) {
    const int d = moment_axis(dims, a);
    if (d >= dims) continue;
    result.mean[a] = params.mean[map * columns + d];
    if (params.grad_mean != nullptr) result.grad_mean[a] = params.grad_mean[map * columns + d];
    for (int b = a; grad != nullptr && b < 3; ++b) {
      const int e = moment_axis(dims, b);
      const T symmetric = T(0.5) * (grad[d * dims + e] + grad[e * dims + d]);
      result.grad_second[a == 0 ? b : a + b + 1] = symmetric;
      result.constant -= (a == b ? T(1) : T(2)) * symmetric * params.covariance[(map * dims + d) * dims + e];
    }
  }
  if (params.values != nullptr && params.grad_mean != nullptr)
    result.value = value_cotangent(params.grad_mean[map * columns + dims], params.mean[map * columns + dims]);
  return result;
}

TRITOOL_MATH_END
