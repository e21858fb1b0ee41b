// SPDX-License-Identifier: Apache-2.0
#include "kernels/rigid_align.h"

#include "torch/bindings.h"

namespace tritool {
namespace {

struct Operands {
  std::vector<int64_t> batch;
  int64_t points;
};

// All operands come in the full batch, expanded where they broadcast.
void check_batch(const Tensor& tensor, const char* name, const std::vector<int64_t>& batch) {
  for (size_t d = 0; d < batch.size(); ++d)
    STD_TORCH_CHECK(tensor.size(static_cast<int64_t>(d)) == batch[d], name, " has batch size ",
                    tensor.size(static_cast<int64_t>(d)), " where the batch has ", batch[d]);
}

Operands check_operands(const Tensor& source, const Tensor& target, const std::optional<Tensor>& weights,
                        const char* op) {
  check_device(source, op);
  STD_TORCH_CHECK(source.dim() >= 2 && source.size(-1) == 3, op, ": source must be [batch, N, 3]");
  Operands operands{leading_sizes(source, 2), source.size(-2)};
  STD_TORCH_CHECK(operands.points < (int64_t(1) << 31), op, ": more than 2^31 - 1 points");
  const auto batch_dims = static_cast<int64_t>(operands.batch.size());
  check_tensor(target, "target", source.scalar_type(), source, batch_dims, {operands.points, 3});
  check_batch(target, "target", operands.batch);
  if (weights.has_value()) {
    check_tensor(*weights, "weights", source.scalar_type(), source, batch_dims, {operands.points});
    check_batch(*weights, "weights", operands.batch);
  }
  return operands;
}

template <class Params>
void set_points(Params& params, const Tensor& source, const Tensor& target, const std::optional<Tensor>& weights,
                bool with_scale) {
  params.points = static_cast<int>(source.size(-2));
  params.with_scale = with_scale;
  for (int d = 0; d < 2; ++d) {
    params.source_stride[d] = source.stride(d - 2);
    params.target_stride[d] = target.stride(d - 2);
  }
  params.weights_stride = weights.has_value() ? weights->stride(-1) : 0;
}

const Tensor* pointer_to(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

// A gradient in the full batch and contiguous, where it is wanted.
Tensor new_full_gradient(const Tensor& like, const std::vector<int64_t>& sizes, bool wanted) {
  return torch::stable::new_empty(like, wanted ? sizes : std::vector<int64_t>{0});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> rigid_align(const Tensor& source, const Tensor& target,
                                               const std::optional<Tensor>& weights, bool with_scale) {
  constexpr const char* kOp = "rigid_align";
  const Operands operands = check_operands(source, target, weights, kOp);
  const CurrentDevice current_device(source);
  Tensor rotation = torch::stable::new_empty(source, with(operands.batch, {3, 3}));
  Tensor translation = torch::stable::new_empty(source, with(operands.batch, {3}));
  Tensor scale = torch::stable::new_empty(source, operands.batch);

  dispatch_real(source, kOp, [&](auto real) {
    using T = decltype(real);
    RigidAlignParams<T> params{};
    params.source = source.const_data_ptr<T>();
    params.target = target.const_data_ptr<T>();
    params.weights = weights.has_value() ? weights->const_data_ptr<T>() : nullptr;
    params.rotation = rotation.mutable_data_ptr<T>();
    params.translation = translation.mutable_data_ptr<T>();
    params.scale = scale.mutable_data_ptr<T>();
    set_points(params, source, target, weights, with_scale);
    set_batch(params.batch, operands.batch,
              {{&source, "source"},
               {&target, "target"},
               {pointer_to(weights), "weights"},
               {&rotation, "rotation"},
               {&translation, "translation"},
               {&scale, "scale"}},
              kOp);
    if (source.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(rigid_align_kernels, T);
      torch::stable::parallel_for(0, params.batch.count, 256,
                                  [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::rigid_align(params, current_stream(source)), kOp);
#endif
    }
  });
  return {rotation, translation, scale};
}

std::tuple<Tensor, Tensor, Tensor> rigid_align_backward(const std::optional<Tensor>& grad_rotation,
                                                        const std::optional<Tensor>& grad_translation,
                                                        const std::optional<Tensor>& grad_scale, const Tensor& source,
                                                        const Tensor& target, const std::optional<Tensor>& weights,
                                                        bool with_scale, bool want_source, bool want_target,
                                                        bool want_weights) {
  constexpr const char* kOp = "rigid_align_backward";
  const Operands operands = check_operands(source, target, weights, kOp);
  const auto batch_dims = static_cast<int64_t>(operands.batch.size());
  const auto check_grad = [&](const std::optional<Tensor>& grad, const char* name,
                              std::initializer_list<int64_t> trailing) {
    if (!grad.has_value()) return;
    check_tensor(*grad, name, source.scalar_type(), source, batch_dims, trailing);
    check_batch(*grad, name, operands.batch);
  };
  check_grad(grad_rotation, "grad_rotation", {3, 3});
  check_grad(grad_translation, "grad_translation", {3});
  check_grad(grad_scale, "grad_scale", {});
  const CurrentDevice current_device(source);
  want_weights = want_weights && weights.has_value();
  Tensor grad_source = new_full_gradient(source, with(operands.batch, {operands.points, 3}), want_source);
  Tensor grad_target = new_full_gradient(source, with(operands.batch, {operands.points, 3}), want_target);
  Tensor grad_weights = new_full_gradient(source, with(operands.batch, {operands.points}), want_weights);

  dispatch_real(source, kOp, [&](auto real) {
    using T = decltype(real);
    const auto data_or_null = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
    };
    RigidAlignBackwardParams<T> params{};
    params.grad_rotation = data_or_null(grad_rotation);
    params.grad_translation = data_or_null(grad_translation);
    params.grad_scale = data_or_null(grad_scale);
    params.source = source.const_data_ptr<T>();
    params.target = target.const_data_ptr<T>();
    params.weights = data_or_null(weights);
    params.grad_source = want_source ? grad_source.mutable_data_ptr<T>() : nullptr;
    params.grad_target = want_target ? grad_target.mutable_data_ptr<T>() : nullptr;
    params.grad_weights = want_weights ? grad_weights.mutable_data_ptr<T>() : nullptr;
    set_points(params, source, target, weights, with_scale);
    for (int d = 0; d < 2; ++d)
      params.grad_rotation_stride[d] = grad_rotation.has_value() ? grad_rotation->stride(d - 2) : 0;
    params.grad_translation_stride = grad_translation.has_value() ? grad_translation->stride(-1) : 0;
    set_batch(params.batch, operands.batch,
              {{pointer_to(grad_rotation), "grad_rotation"},
               {pointer_to(grad_translation), "grad_translation"},
               {pointer_to(grad_scale), "grad_scale"},
               {&source, "source"},
               {&target, "target"},
               {pointer_to(weights), "weights"},
               {want_source ? &grad_source : nullptr, "grad_source"},
               {want_target ? &grad_target : nullptr, "grad_target"},
               {want_weights ? &grad_weights : nullptr, "grad_weights"}},
              kOp);
    if (source.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(rigid_align_kernels, T);
      torch::stable::parallel_for(0, params.batch.count, 256,
                                  [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::rigid_align_backward(params, current_stream(source)), kOp);
#endif
    }
  });
  return {grad_source, grad_target, grad_weights};
}

}  // namespace tritool
