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
                                                        const Tensor& projections,
                                                        const std::optional<Tensor>& weights, bool homogeneous,
                                                        bool want_points, bool want_projections, bool want_weights);

}  // namespace tritool
