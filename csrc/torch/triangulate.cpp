// SPDX-License-Identifier: Apache-2.0
#include "kernels/triangulate.h"

#include "torch/bindings.h"

namespace tritool {
namespace {

struct Operands {
  std::vector<int64_t> batch;
  int64_t views;
};

Operands check_operands(const Tensor& points, const Tensor& projections, const std::optional<Tensor>& weights,
                        const char* op) {
  check_device(points, op);
  STD_TORCH_CHECK(points.dim() >= 2 && points.size(-1) == 2, op, ": points must be [batch, C, 2]");
  Operands operands{leading_sizes(points, 2), points.size(-2)};
  const auto batch_dims = static_cast<int64_t>(operands.batch.size());
  check_tensor(projections, "projections", points.scalar_type(), points, batch_dims, {operands.views, 3, 4});
  if (weights.has_value())
    check_tensor(*weights, "weights", points.scalar_type(), points, batch_dims, {operands.views});
  return operands;
}

template <class Params>
void set_view_strides(Params& params, const Tensor& points, const Tensor& projections,
                      const std::optional<Tensor>& weights) {
  params.points_stride[0] = points.stride(-2);
  params.points_stride[1] = points.stride(-1);
  params.projections_stride[0] = projections.stride(-3);
  params.projections_stride[1] = projections.stride(-2);
  params.projections_stride[2] = projections.stride(-1);
  params.weights_stride = weights.has_value() ? weights->stride(-1) : 0;
}

}  // namespace

Tensor triangulate(const Tensor& points, const Tensor& projections, const std::optional<Tensor>& weights,
                   bool homogeneous) {
  constexpr const char* kOp = "triangulate";
  const Operands operands = check_operands(points, projections, weights, kOp);
  const CurrentDevice current_device(points);
  Tensor points_3d = torch::stable::new_empty(points, with(operands.batch, {3}));

  dispatch_real(points, kOp, [&](auto real) {
    using T = decltype(real);
    using Params = TriangulateParams<T>;
    Params params{};
    params.points = points.const_data_ptr<T>();
    params.projections = projections.const_data_ptr<T>();
    params.weights = weights.has_value() ? weights->const_data_ptr<T>() : nullptr;
    params.points_3d = points_3d.mutable_data_ptr<T>();
    params.views = static_cast<int>(operands.views);
    params.homogeneous = homogeneous;
    set_view_strides(params, points, projections, weights);
    set_batch(params.batch, operands.batch,
              {{&points, "points"},
               {&projections, "projections"},
               {weights.has_value() ? &*weights : nullptr, "weights"},
               {&points_3d, "points_3d"}},
              kOp);
    if (points.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(triangulate_kernels, T);
      torch::stable::parallel_for(0, params.batch.count, 256,
                                  [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::triangulate(params, current_stream(points)), kOp);
#endif
    }
  });
  return points_3d;
}

std::tuple<Tensor, Tensor, Tensor> triangulate_backward(const Tensor& grad, const Tensor& points,
                                                        const Tensor& projections, const std::optional<Tensor>& weights,
                                                        bool homogeneous, bool want_points, bool want_projections,
                                                        bool want_weights) {
  constexpr const char* kOp = "triangulate_backward";
  const Operands operands = check_operands(points, projections, weights, kOp);
  check_tensor(grad, "grad", points.scalar_type(), points, static_cast<int64_t>(operands.batch.size()), {3});
  const CurrentDevice current_device(points);
  want_weights = want_weights && weights.has_value();
  // Points and weights come in the full batch, so their gradients need no sum; projections may be shared.
  Tensor grad_points = new_gradient(points, want_points);
  Tensor grad_projections = new_gradient(projections, want_projections);
  Tensor grad_weights = new_gradient(weights.has_value() ? *weights : points, want_weights);
  if (want_weights)
    STD_TORCH_CHECK(sizes_of(*weights) == with(operands.batch, {operands.views}), kOp,
                    ": weights must have the full batch where their gradient is wanted");

  dispatch_real(points, kOp, [&](auto real) {
    using T = decltype(real);
    using Params = TriangulateBackwardParams<T>;
    Params params{};
    params.grad = grad.const_data_ptr<T>();
    params.points = points.const_data_ptr<T>();
    params.projections = projections.const_data_ptr<T>();
    params.weights = weights.has_value() ? weights->const_data_ptr<T>() : nullptr;
    params.grad_points = want_points ? grad_points.mutable_data_ptr<T>() : nullptr;
    params.grad_projections = want_projections ? grad_projections.mutable_data_ptr<T>() : nullptr;
    params.grad_weights = want_weights ? grad_weights.mutable_data_ptr<T>() : nullptr;
    params.views = static_cast<int>(operands.views);
    params.homogeneous = homogeneous;
    params.grad_stride = grad.stride(-1);
    set_view_strides(params, points, projections, weights);
    set_batch(params.batch, operands.batch,
              {{&grad, "grad"},
               {&points, "points"},
               {&projections, "projections"},
               {weights.has_value() ? &*weights : nullptr, "weights"},
               {want_points ? &grad_points : nullptr, "grad_points"},
               {want_projections ? &grad_projections : nullptr, "grad_projections"},
               {want_weights ? &grad_weights : nullptr, "grad_weights"}},
              kOp, want_projections ? int(Params::kGradProjections) : -1);
    if (params.batch.count == 0) {  // no unit runs, yet shared projections have a gradient: zero
      if (want_projections) torch::stable::zero_(grad_projections);
      return;
    }
    const SharedSumPlan plan =
        shared_sum_plan(params.batch, want_projections, operands.views * 12,
                        points.is_cpu() ? kCpuItemsPerUnit : warp_items_per_unit(params.batch.shared));
    const Tensor scratch = torch::stable::new_empty(points, {plan.partial_count});
    params.partial_sums = scratch.mutable_data_ptr<T>();
    if (points.is_cpu()) {
      run_shared_sum(params, plan, TRITOOL_PICK_KERNELS(triangulate_kernels, T));
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::triangulate_backward(params, plan, current_stream(points)), kOp);
#endif
    }
  });
  return {grad_points, grad_projections, grad_weights};
}

}  // namespace tritool
