// SPDX-License-Identifier: Apache-2.0
// Every op of namespace tritool as it reaches C++: the table of contents of this folder. Batch dimensions lead and
// broadcast: size 1 stands for any size in all operands but the one named "full".
#pragma once

#include <optional>
#include <tuple>

#include "torch/check.h"

namespace tritool {

// points [batch, C, 2] (full), projections [batch, C, 3, 4], weights [batch, C] -> points_3d [batch, 3]
Tensor triangulate(const Tensor& points, const Tensor& projections, const std::optional<Tensor>& weights,
                   bool homogeneous);
// grad [batch, 3] (full) -> gradients to points, projections, weights in their own shapes; empty [0] where not wanted
std::tuple<Tensor, Tensor, Tensor> triangulate_backward(const Tensor& grad, const Tensor& points,
                                                        const Tensor& projections, const std::optional<Tensor>& weights,
                                                        bool homogeneous, bool want_points, bool want_projections,
                                                        bool want_weights);

// points [batch, 3] (full), projections [batch, C, 3, 4] -> pixels [batch, C, 2]
Tensor project(const Tensor& points, const Tensor& projections);
// grad [batch, C, 2] (full) -> gradients to points and projections; empty [0] where not wanted
std::tuple<Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& points, const Tensor& projections,
                                            bool want_points, bool want_projections);

// source, target [batch, N, 3], weights [batch, N], all in the full batch
// -> rotation [batch, 3, 3], translation [batch, 3], scale [batch]
std::tuple<Tensor, Tensor, Tensor> rigid_align(const Tensor& source, const Tensor& target,
                                               const std::optional<Tensor>& weights, bool with_scale);
// -> gradients to source, target, weights in the full batch; empty [0] where not wanted
std::tuple<Tensor, Tensor, Tensor> rigid_align_backward(const std::optional<Tensor>& grad_rotation,
                                                        const std::optional<Tensor>& grad_translation,
                                                        const std::optional<Tensor>& grad_scale, const Tensor& source,
                                                        const Tensor& target, const std::optional<Tensor>& weights,
                                                        bool with_scale, bool want_source, bool want_target,
                                                        bool want_weights);

// logits [batch, H, W] (dims = 2) or [batch, X, Y, Z] (dims = 3), any strides
// -> mean [batch, dims], covariance [batch, dims, dims] or empty [0], log_partition [batch], partition [batch, 2]
std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_moments(const Tensor& logits, int64_t dims,
                                                           double inverse_temperature, bool with_covariance);
// -> gradient to logits, in their own strides
Tensor softmax_moments_backward(const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_covariance,
                                const std::optional<Tensor>& grad_log_partition, const Tensor& logits,
                                const Tensor& mean, const Tensor& covariance, const Tensor& partition, int64_t dims,
                                double inverse_temperature);

}  // namespace tritool
