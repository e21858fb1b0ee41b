// SPDX-License-Identifier: Apache-2.0
#include "kernels/project.h"

#include "torch/bindings.h"

namespace tritool {
namespace {

struct Operands {
  std::vector<int64_t> batch;
  int64_t views;
};

Operands check_operands(const Tensor& points, const Tensor& projections, const char* op) {
  check_device(points, op);
  STD_TORCH_CHECK(points.dim() >= 1 && points.size(-1) == 3, op, ": points must be [batch, 3]");
  STD_TORCH_CHECK(projections.dim() >= 3, op, ": projections must be [batch, C, 3, 4]");
  Operands operands{leading_sizes(points, 1), projections.size(-3)};
  check_tensor(projections, "projections", points.scalar_type(), points, static_cast<int64_t>(operands.batch.size()),
               {operands.views, 3, 4});
  return operands;
}

template <class Params>
void set_strides(Params& params, const Tensor& points, const Tensor& projections) {
  params.points_stride = points.stride(-1);
  for (int d = 0; d < 3; ++d) params.projections_stride[d] = projections.stride(d - 3);
}

}  // namespace

Tensor project(const Tensor& points, const Tensor& projections) {
  constexpr const char* kOp = "project";
  const Operands operands = check_operands(points, projections, kOp);
  const CurrentDevice current_device(points);
  Tensor pixels = torch::stable::new_empty(points, with(operands.batch, {operands.views, 2}));
  dispatch_real(points, kOp, [&](auto real) {
    using T = decltype(real);
    ProjectParams<T> params{};
    params.points = points.const_data_ptr<T>();
    params.projections = projections.const_data_ptr<T>();
    params.pixels = pixels.mutable_data_ptr<T>();
    params.views = static_cast<int>(operands.views);
    set_strides(params, points, projections);
    set_batch(params.batch, operands.batch, {{&points, "points"}, {&projections, "projections"}, {&pixels, "pixels"}},
              kOp);
    if (points.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(project_kernels, T);
      torch::stable::parallel_for(0, params.batch.count, 2048,
                                  [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::project(params, current_stream(points)), kOp);
#endif
    }
  });
  return pixels;
}

std::tuple<Tensor, Tensor> project_backward(const Tensor& grad, const Tensor& points, const Tensor& projections,
                                            bool want_points, bool want_projections) {
  constexpr const char* kOp = "project_backward";
  const Operands operands = check_operands(points, projections, kOp);
  check_tensor(grad, "grad", points.scalar_type(), points, static_cast<int64_t>(operands.batch.size()),
               {operands.views, 2});
  const CurrentDevice current_device(points);
  Tensor grad_points = new_gradient(points, want_points);
  Tensor grad_projections = new_gradient(projections, want_projections);
  dispatch_real(points, kOp, [&](auto real) {
    using T = decltype(real);
    using Params = ProjectBackwardParams<T>;
    Params params{};
    params.grad = grad.const_data_ptr<T>();
    params.points = points.const_data_ptr<T>();
    params.projections = projections.const_data_ptr<T>();
    params.grad_points = want_points ? grad_points.mutable_data_ptr<T>() : nullptr;
    params.grad_projections = want_projections ? grad_projections.mutable_data_ptr<T>() : nullptr;
    params.views = static_cast<int>(operands.views);
    params.grad_stride[0] = grad.stride(-2);
    params.grad_stride[1] = grad.stride(-1);
    set_strides(params, points, projections);
    set_batch(params.batch, operands.batch,
              {{&grad, "grad"},
               {&points, "points"},
               {&projections, "projections"},
               {want_points ? &grad_points : nullptr, "grad_points"},
               {want_projections ? &grad_projections : nullptr, "grad_projections"}},
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
      run_shared_sum(params, plan, TRITOOL_PICK_KERNELS(project_kernels, T));
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::project_backward(params, plan, current_stream(points)), kOp);
#endif
    }
  });
  return {grad_points, grad_projections};
}

}  // namespace tritool
