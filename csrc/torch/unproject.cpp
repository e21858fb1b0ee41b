// SPDX-License-Identifier: Apache-2.0
#include "kernels/unproject.h"

#include "torch/bindings.h"

namespace tritool {
namespace {

// What forward and backward are given alike.
struct Inputs {
  const Tensor& features;
  const Tensor& projections;
  const Tensor& grid;
  const std::optional<Tensor>& confidences;
  const std::vector<int64_t>& size;
};

int64_t check_inputs(const Inputs& inputs, int64_t aggregation, const char* op) {
  const Tensor& features = inputs.features;
  check_device(features, op);
  STD_TORCH_CHECK(features.dim() >= 4, op, ": features must be [batch, C, K, H, W]");
  const int64_t batch_dims = features.dim() - 4;
  const ScalarType dtype = accumulator_dtype(features);
  check_tensor(inputs.projections, "projections", dtype, features, batch_dims, {features.size(-4), 3, 4});
  check_tensor(inputs.grid, "grid", dtype, features, batch_dims, {inputs.size.empty() ? -1 : 4, 3});
  if (inputs.confidences.has_value())
    check_tensor(*inputs.confidences, "confidences", dtype, features, batch_dims,
                 {features.size(-4), features.size(-3)});
  STD_TORCH_CHECK(inputs.size.empty() || inputs.size.size() == 3, op, ": size must be (X, Y, Z) or (), got ",
                  inputs.size.size(), " numbers");
  int64_t points = inputs.size.empty() ? inputs.grid.size(-2) : 1;
  for (const int64_t n : inputs.size) {
    // Before the next factor, or the product could overflow.
    STD_TORCH_CHECK(n > 0 && n < (int64_t(1) << 31), op, ": size must be positive and below 2^31, got ", n);
    points *= n;
    STD_TORCH_CHECK(points < (int64_t(1) << 31), op, ": ", points, " voxels; fewer than 2^31 are supported");
  }
  STD_TORCH_CHECK(aggregation >= 0 && aggregation <= 3, op, ": aggregation must be from 0 to 3, got ", aggregation);
  // One view's map is addressed by 32 bits, its rows filled up to 16 elements or more.
  const int64_t row = (features.size(-3) + 15) / 16 * 16;
  STD_TORCH_CHECK(features.size(-2) >= 1 && features.size(-1) >= 1, op, ": features must have H and W of 1 or more");
  const bool on_cpu = features.is_cpu();
  const int64_t height = on_cpu ? cpu::tiles_up(features.size(-2), cpu::kTileRows) : features.size(-2);
  const int64_t width = on_cpu ? cpu::tiles_up(features.size(-1), cpu::kTileColumns) : features.size(-1);
  STD_TORCH_CHECK(row * height * width < (int64_t(1) << 31), op, ": a view has ", row * height * width,
                  " features; fewer than 2^31 are supported");
  STD_TORCH_CHECK(points < (int64_t(1) << 31), op, ": ", points, " voxels; fewer than 2^31 are supported");
  STD_TORCH_CHECK(features.is_cpu() || features.size(-4) <= cuda::kUnprojectMaxViews, op, ": ", features.size(-4),
                  " views; on CUDA at most ", cuda::kUnprojectMaxViews, " are supported");
  return points;
}

// Tensors that share the batch of an op; sizes are checked, strides of size 1 or of an expanded dimension are 0.
std::vector<int64_t> full_batch_strides(const Tensor& tensor, const char* name, const std::vector<int64_t>& batch) {
  for (size_t d = 0; d < batch.size(); ++d)
    STD_TORCH_CHECK(tensor.size(int64_t(d)) == batch[d], name, " has batch size ", tensor.size(int64_t(d)),
                    " where the batch has ", batch[d]);
  return batch_strides(tensor, name, batch);
}

template <int64_t kCount>
void set_strides(int64_t (&strides)[kCount], const Tensor& tensor) {
  for (int64_t d = 0; d < kCount; ++d) strides[d] = tensor.stride(d - kCount);
}

// Everything but the batch, and pointers to what is computed.
template <class In>
UnprojectParams<In> params_of(const Inputs& inputs, int64_t points, int64_t aggregation, bool exclude, bool official) {
  using T = Accumulator<In>;
  const Tensor& features = inputs.features;
  UnprojectParams<In> params{};
  params.features = data_of<In>(features);
  params.projections = inputs.projections.template const_data_ptr<T>();
  params.grid = inputs.grid.template const_data_ptr<T>();
  params.confidences = inputs.confidences.has_value() ? inputs.confidences->template const_data_ptr<T>() : nullptr;
  params.views = static_cast<int>(features.size(-4));
  params.channels = features.size(-3);
  params.height = features.size(-2);
  params.width = features.size(-1);
  params.points = points;
  for (size_t d = 0; d < inputs.size.size(); ++d) params.grid_size[d] = inputs.size[d];
  set_strides(params.features_stride, features);
  set_strides(params.projections_stride, inputs.projections);
  set_strides(params.grid_stride, inputs.grid);
  if (inputs.confidences.has_value()) set_strides(params.confidences_stride, *inputs.confidences);
  params.aggregation = static_cast<int>(aggregation);
  params.exclude = exclude;
  params.official = official;
  return params;
}

// The rows, for the device, and the batch of all operands.
template <class In>
void set_rows_and_batch(UnprojectParams<In>& params, const Inputs& inputs, const std::vector<int64_t>& batch,
                        const Tensor& volume, const Tensor* grad_features, const char* op) {
  using Params = UnprojectParams<In>;
  using T = Accumulator<In>;
  const bool on_cpu = inputs.features.is_cpu();
  if (on_cpu) params.rows = cpu::unproject_rows(params);
#if defined(TRITOOL_CUDA)
  else
    params.rows = cuda::unproject_rows(params);
#endif
  set_strides(params.volume_stride, volume);
  const std::vector<int64_t> absent(batch.size(), 0);
  const std::vector<int64_t> strides[] = {
      full_batch_strides(inputs.features, "features", batch),
      absent,
      full_batch_strides(inputs.projections, "projections", batch),
      full_batch_strides(inputs.grid, "grid", batch),
      inputs.confidences.has_value() ? full_batch_strides(*inputs.confidences, "confidences", batch) : absent,
      full_batch_strides(volume, "grad", batch),
      grad_features != nullptr ? full_batch_strides(*grad_features, "grad_features", batch) : absent};
  const int64_t* pointers[Params::kOperands];
  for (int o = 0; o < Params::kOperands; ++o) pointers[o] = strides[o].data();
  STD_TORCH_CHECK(set_unproject_batch(params, batch.data(), static_cast<int>(batch.size()), pointers), op,
                  ": more than ", kMaxBatchDims, " batch dimensions that cannot be merged");
}

// Where the features are staged: scratch, to be kept while the kernels run, or `lent`, if given and large enough.
template <class In>
Tensor set_staged(UnprojectParams<In>& params, const Tensor& features, const Tensor* lent) {
  const ScalarType stored = features.is_cpu() ? accumulator_dtype(features) : features.scalar_type();
  const int64_t count = staged_count(params);
  Tensor staged = lent != nullptr && lent->scalar_type() == stored && lent->numel() >= count
                      ? *lent
                      : torch::stable::new_empty(features, {count}, stored);
  params.staged = staged.data_ptr();
  return staged;
}

template <class In, class Kernels>
void stage_on_cpu(const UnprojectParams<In>& params, const Kernels& kernels) {
  if (!params.rows.staged) return;
  torch::stable::parallel_for(0, params.own_maps.count * params.views * params.height, 16,
                              [&](int64_t begin, int64_t end) { kernels.stage(params, begin, end); });
}

}  // namespace

Tensor unproject(const Tensor& features, const Tensor& projections, const Tensor& grid,
                 const std::optional<Tensor>& confidences, std::vector<int64_t> size, int64_t aggregation, bool exclude,
                 bool official, bool channels_last) {
  constexpr const char* kOp = "unproject";
  const Inputs inputs{features, projections, grid, confidences, size};
  const int64_t points = check_inputs(inputs, aggregation, kOp);
  const CurrentDevice current_device(features);
  const std::vector<int64_t> batch = leading_sizes(features, 4);
  const int64_t channels = features.size(-3);
  Tensor volume = channels_last ? torch::stable::transpose(
                                      torch::stable::new_empty(features, with(batch, {points, channels})), -1, -2)
                                : torch::stable::new_empty(features, with(batch, {channels, points}));
  dispatch_element(features, kOp, [&](auto element) {
    using In = decltype(element);
    UnprojectParams<In> params = params_of<In>(inputs, points, aggregation, exclude, official);
    params.volume = data_of<In>(volume);
    set_rows_and_batch(params, inputs, batch, volume, nullptr, kOp);
    const Tensor staged = set_staged(params, features, nullptr);
    if (features.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(unproject_kernels, In);
      stage_on_cpu(params, kernels);
      torch::stable::parallel_for(0, params.batch.count * cpu::unproject_blocks(points), 64,
                                  [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::unproject(params, current_stream(features)), kOp);
#endif
    }
  });
  return volume;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> unproject_backward(const Tensor& grad, const Tensor& features,
                                                              const Tensor& projections, const Tensor& grid,
                                                              const std::optional<Tensor>& confidences,
                                                              std::vector<int64_t> size, int64_t aggregation,
                                                              bool exclude, bool official, bool deterministic,
                                                              bool want_features, bool want_projections, bool want_grid,
                                                              bool want_confidences) {
  constexpr const char* kOp = "unproject_backward";
  const Inputs inputs{features, projections, grid, confidences, size};
  const int64_t points = check_inputs(inputs, aggregation, kOp);
  const CurrentDevice current_device(features);
  const std::vector<int64_t> batch = leading_sizes(features, 4);
  check_tensor(grad, "grad", features.scalar_type(), features, int64_t(batch.size()), {features.size(-3), points});
  want_confidences = want_confidences && confidences.has_value();
  Tensor grad_features = want_features ? torch::stable::empty_like(features) : new_gradient(features, false);
  Tensor grad_projections = new_gradient(projections, want_projections);
  Tensor grad_grid = new_gradient(grid, want_grid);
  Tensor grad_confidences = new_gradient(want_confidences ? *confidences : projections, want_confidences);
  (void)deterministic;  // the CPU kernels always are

  dispatch_element(features, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    UnprojectParams<In> params = params_of<In>(inputs, points, aggregation, exclude, official);
    params.volume = data_of<In>(grad);
    set_rows_and_batch(params, inputs, batch, grad, want_features ? &grad_features : nullptr, kOp);
    UnprojectGradients<In> gradients{};
    gradients.features = want_features ? data_of<In>(grad_features) : nullptr;
    gradients.projections = want_projections ? grad_projections.mutable_data_ptr<T>() : nullptr;
    gradients.grid = want_grid ? grad_grid.mutable_data_ptr<T>() : nullptr;
    gradients.confidences = want_confidences ? grad_confidences.mutable_data_ptr<T>() : nullptr;
    if (want_features) set_strides(gradients.features_stride, grad_features);
    const auto new_scratch = [&](const UnprojectPlan& plan) {
      // Where the features' gradient is summed elsewhere, its memory is free until the features are not needed any
      // more.
      Tensor staged = set_staged(params, features, want_features && !gradients.direct ? &grad_features : nullptr);
      Tensor sums = torch::stable::new_empty(features, {plan.sums_count}, accumulator_dtype(features));
      gradients.sums = sums.mutable_data_ptr<T>();
      Tensor partial = torch::stable::new_empty(features, {plan.partial_bytes}, ScalarType::Byte);
      gradients.partial = partial.data_ptr();
      return std::make_tuple(staged, sums, partial);
    };
    if (features.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(unproject_kernels, In);
      const UnprojectPlan plan = cpu::unproject_plan(params, gradients);
      const auto scratch = new_scratch(plan);
      if (unproject_backward_samples(params, gradients)) stage_on_cpu(params, kernels);
      torch::stable::parallel_for(
          0, plan.units, 1, [&](int64_t begin, int64_t end) { kernels.backward(params, gradients, plan, begin, end); });
      if (want_features && !gradients.direct)
        torch::stable::parallel_for(
            0, params.batch.count * params.views * params.height, 16,
            [&](int64_t begin, int64_t end) { kernels.backward_rows(params, gradients, plan, begin, end); });
      torch::stable::parallel_for(0, params.batch.count, 1, [&](int64_t begin, int64_t end) {
        kernels.backward_sums(params, gradients, plan, begin, end);
      });
    } else {
#if defined(TRITOOL_CUDA)
      const UnprojectPlan plan = cuda::unproject_plan(params, gradients, deterministic);
      const auto scratch = new_scratch(plan);
      check_launch(cuda::unproject_backward(params, gradients, plan, current_stream(features)), kOp);
#endif
    }
  });
  return {grad_features, grad_projections, grad_grid, grad_confidences};
}

}  // namespace tritool
