// SPDX-License-Identifier: Apache-2.0
#include "kernels/soft_argmax.h"

#include "torch/bindings.h"

namespace tritool {
namespace {

constexpr double kLog2OfE = 1.4426950408889634074;

ScalarType accumulator_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class Function>
void dispatch_logits(const Tensor& logits, const char* op, Function&& function) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(Float16{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, " takes float32, float64, float16 or bfloat16 logits");
  }
}

// The element pointer as the kernels' own type: float16 and bfloat16 are 16 bits to them.
template <class In>
In* data_of(const Tensor& tensor) {
  return static_cast<In*>(tensor.data_ptr());
}

void check_logits(const Tensor& logits, int64_t dims, const char* op) {
  check_device(logits, op);
  STD_TORCH_CHECK((dims == 2 || dims == 3) && logits.dim() >= dims, op, ": logits must have ", dims,
                  " trailing dimensions, got ", logits.dim());
  int64_t elements = 1;
  for (int64_t d = 1; d <= dims; ++d) elements *= logits.size(-d);
  STD_TORCH_CHECK(elements < (int64_t(1) << 31), op, ": a map of ", elements,
                  " elements; fewer than 2^31 are supported");
}

// A second map beside the first: its sizes, dtype and device.
void check_depth_maps(const Tensor& heatmaps, const Tensor& depth_maps, const char* op) {
  check_logits(heatmaps, 2, op);
  STD_TORCH_CHECK(sizes_of(depth_maps) == sizes_of(heatmaps), op, ": depth_maps have other sizes than heatmaps");
  STD_TORCH_CHECK(depth_maps.scalar_type() == heatmaps.scalar_type(), op,
                  ": depth_maps have another dtype than heatmaps");
  STD_TORCH_CHECK(depth_maps.device() == heatmaps.device(), op, ": depth_maps are on another device than heatmaps");
}

// A map's sizes and strides as three axes, the first of size 1 for a 2D map.
void set_axes(const Tensor& tensor, int64_t dims, int64_t (&size)[3], int64_t (&stride)[3]) {
  for (int axis = 0; axis < 3; ++axis) {
    const bool there = axis >= 3 - dims;
    size[axis] = there ? tensor.size(axis - 3) : 1;
    stride[axis] = there ? tensor.stride(axis - 3) : 0;
  }
}

// [batch, trailing], small next to the maps: made contiguous, so that the kernels index it by the number of the map.
Tensor contiguous_operand(const Tensor& tensor, const char* name, const Tensor& maps, int64_t dims,
                          std::initializer_list<int64_t> trailing, const char* op) {
  check_tensor(tensor, name, accumulator_dtype(maps), maps, maps.dim() - dims, trailing);
  STD_TORCH_CHECK(leading_sizes(tensor, static_cast<int64_t>(trailing.size())) == leading_sizes(maps, dims), op, ": ",
                  name, " has another batch than the maps");
  return torch::stable::contiguous(tensor);
}

// The maps of the forward pass; values may be null.
template <class In>
SoftmaxMomentsParams<In> forward_params(const Tensor& logits, const Tensor* values, int64_t dims,
                                        double inverse_temperature, const char* op) {
  using Params = SoftmaxMomentsParams<In>;
  const Tensor& second = values == nullptr ? logits : *values;
  Params params{};
  params.logits = data_of<In>(logits);
  params.values = values == nullptr ? nullptr : data_of<In>(*values);
  set_batch(params.maps, leading_sizes(logits, dims), {{&logits, "logits"}, {&second, "values"}}, op);
  set_axes(logits, dims, params.size, params.stride[Params::kLogits]);
  set_axes(second, dims, params.size, params.stride[Params::kValues]);
  params.dims = static_cast<int>(dims);
  params.c = Accumulator<In>(inverse_temperature * kLog2OfE);
  params.maps_adjacent =
      are_maps_adjacent(params.maps, {params.stride[Params::kLogits][2], params.stride[Params::kValues][2]});
  return params;
}

template <class In>
void run_forward(SoftmaxMomentsParams<In>& params, const Tensor& logits, const char* op) {
  if (logits.is_cpu()) {
    const auto& kernels = TRITOOL_PICK_KERNELS(softmax_moments_kernels, In);
    torch::stable::parallel_for(0, kernels.work(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    return;
  }
#if defined(TRITOOL_CUDA)
  using T = Accumulator<In>;
  const int64_t elements = params.size[0] * params.size[1] * params.size[2];
  const int64_t splits = cuda::softmax_moments_splits(params.maps.count, elements);
  const Tensor scratch = torch::stable::new_empty(
      logits, {splits > 1 ? params.maps.count * splits * cuda::kMomentStateSize : 0}, accumulator_dtype(logits));
  params.partial = scratch.mutable_data_ptr<T>();
  check_launch(cuda::softmax_moments(params, current_stream(logits)), op);
#else
  (void)op;
#endif
}

// The maps of the backward pass and their gradients; values and their gradient may be null.
template <class In>
SoftmaxMomentsBackwardParams<In> backward_params(const Tensor& logits, const Tensor& grad_logits, const Tensor* values,
                                                 const Tensor* grad_values, int64_t dims, double inverse_temperature,
                                                 const char* op) {
  using T = Accumulator<In>;
  using Params = SoftmaxMomentsBackwardParams<In>;
  const Tensor* const operands[Params::kOperands] = {&logits, &grad_logits, values == nullptr ? &logits : values,
                                                     values == nullptr ? &grad_logits : grad_values};
  Params params{};
  params.logits = data_of<In>(logits);
  params.grad_logits = data_of<In>(grad_logits);
  params.values = values == nullptr ? nullptr : data_of<In>(*values);
  params.grad_values = values == nullptr ? nullptr : data_of<In>(*grad_values);
  set_batch(
      params.maps, leading_sizes(logits, dims),
      {{operands[0], "logits"}, {operands[1], "grad_logits"}, {operands[2], "values"}, {operands[3], "grad_values"}},
      op);
  int64_t inner[Params::kOperands];
  for (int o = 0; o < Params::kOperands; ++o) {
    set_axes(*operands[o], dims, params.size, params.stride[o]);
    inner[o] = params.stride[o][2];
  }
  params.dims = static_cast<int>(dims);
  params.c = T(inverse_temperature * kLog2OfE);
  params.inverse_temperature = T(inverse_temperature);
  params.maps_adjacent = are_maps_adjacent(params.maps, inner);
  return params;
}

template <class In>
void run_backward(const SoftmaxMomentsBackwardParams<In>& params, const Tensor& logits, const char* op) {
  if (logits.is_cpu()) {
    const auto& kernels = TRITOOL_PICK_KERNELS(softmax_moments_kernels, In);
    torch::stable::parallel_for(0, kernels.backward_work(params), 64,
                                [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
    return;
  }
#if defined(TRITOOL_CUDA)
  check_launch(cuda::softmax_moments_backward(params, current_stream(logits)), op);
#else
  (void)op;
#endif
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> softmax_moments(const Tensor& logits, int64_t dims,
                                                           double inverse_temperature, bool with_covariance) {
  constexpr const char* kOp = "softmax_moments";
  check_logits(logits, dims, kOp);
  const CurrentDevice current_device(logits);
  const std::vector<int64_t> batch = leading_sizes(logits, dims);
  const ScalarType dtype = accumulator_dtype(logits);
  Tensor mean = torch::stable::new_empty(logits, with(batch, {dims}), dtype);
  Tensor covariance =
      torch::stable::new_empty(logits, with_covariance ? with(batch, {dims, dims}) : std::vector<int64_t>{0}, dtype);
  Tensor log_partition = torch::stable::new_empty(logits, batch, dtype);
  Tensor partition = torch::stable::new_empty(logits, with(batch, {2}), dtype);
  dispatch_logits(logits, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    SoftmaxMomentsParams<In> params = forward_params<In>(logits, nullptr, dims, inverse_temperature, kOp);
    params.mean = mean.mutable_data_ptr<T>();
    params.covariance = with_covariance ? covariance.mutable_data_ptr<T>() : nullptr;
    params.log_partition = log_partition.mutable_data_ptr<T>();
    params.partition = partition.mutable_data_ptr<T>();
    run_forward(params, logits, kOp);
  });
  return {mean, covariance, log_partition, partition};
}

Tensor softmax_moments_backward(const std::optional<Tensor>& grad_mean, const std::optional<Tensor>& grad_covariance,
                                const std::optional<Tensor>& grad_log_partition, const Tensor& logits,
                                const Tensor& mean, const Tensor& covariance, const Tensor& partition, int64_t dims,
                                double inverse_temperature) {
  constexpr const char* kOp = "softmax_moments_backward";
  check_logits(logits, dims, kOp);
  const CurrentDevice current_device(logits);
  const auto small = [&](const std::optional<Tensor>& tensor, const char* name,
                         std::initializer_list<int64_t> trailing) -> std::optional<Tensor> {
    if (!tensor.has_value()) return std::nullopt;
    return contiguous_operand(*tensor, name, logits, dims, trailing, kOp);
  };
  const auto of_mean = small(mean, "mean", {dims});
  const auto of_partition = small(partition, "partition", {2});
  const auto of_grad_mean = small(grad_mean, "grad_mean", {dims});
  const auto of_grad_covariance = small(grad_covariance, "grad_covariance", {dims, dims});
  const auto of_covariance = grad_covariance.has_value() ? small(covariance, "covariance", {dims, dims}) : std::nullopt;
  const auto of_grad_log = small(grad_log_partition, "grad_log_partition", {});
  Tensor grad_logits = torch::stable::empty_like(logits);

  dispatch_logits(logits, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    const auto pointer = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
    };
    auto params = backward_params<In>(logits, grad_logits, nullptr, nullptr, dims, inverse_temperature, kOp);
    params.mean = pointer(of_mean);
    params.covariance = pointer(of_covariance);
    params.partition = pointer(of_partition);
    params.grad_mean = pointer(of_grad_mean);
    params.grad_covariance = pointer(of_grad_covariance);
    params.grad_log_partition = pointer(of_grad_log);
    run_backward(params, logits, kOp);
  });
  return grad_logits;
}

std::tuple<Tensor, Tensor> soft_argmax25d(const Tensor& heatmaps, const Tensor& depth_maps,
                                          double inverse_temperature) {
  constexpr const char* kOp = "soft_argmax25d";
  check_depth_maps(heatmaps, depth_maps, kOp);
  const CurrentDevice current_device(heatmaps);
  const std::vector<int64_t> batch = leading_sizes(heatmaps, 2);
  const ScalarType dtype = accumulator_dtype(heatmaps);
  Tensor position = torch::stable::new_empty(heatmaps, with(batch, {3}), dtype);
  Tensor partition = torch::stable::new_empty(heatmaps, with(batch, {2}), dtype);
  dispatch_logits(heatmaps, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    SoftmaxMomentsParams<In> params = forward_params<In>(heatmaps, &depth_maps, 2, inverse_temperature, kOp);
    params.mean = position.mutable_data_ptr<T>();
    params.partition = partition.mutable_data_ptr<T>();
    run_forward(params, heatmaps, kOp);
  });
  return {position, partition};
}

std::tuple<Tensor, Tensor> soft_argmax25d_backward(const Tensor& grad, const Tensor& heatmaps, const Tensor& depth_maps,
                                                   const Tensor& position, const Tensor& partition,
                                                   double inverse_temperature) {
  constexpr const char* kOp = "soft_argmax25d_backward";
  check_depth_maps(heatmaps, depth_maps, kOp);
  const CurrentDevice current_device(heatmaps);
  const auto small = [&](const Tensor& tensor, const char* name, int64_t size) {
    return contiguous_operand(tensor, name, heatmaps, 2, {size}, kOp);
  };
  const Tensor of_grad = small(grad, "grad", 3);
  const Tensor of_position = small(position, "position", 3);
  const Tensor of_partition = small(partition, "partition", 2);
  Tensor grad_heatmaps = torch::stable::empty_like(heatmaps);
  Tensor grad_depth_maps = torch::stable::empty_like(depth_maps);
  dispatch_logits(heatmaps, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    auto params =
        backward_params<In>(heatmaps, grad_heatmaps, &depth_maps, &grad_depth_maps, 2, inverse_temperature, kOp);
    params.mean = of_position.const_data_ptr<T>();
    params.partition = of_partition.const_data_ptr<T>();
    params.grad_mean = of_grad.const_data_ptr<T>();
    run_backward(params, heatmaps, kOp);
  });
  return {grad_heatmaps, grad_depth_maps};
}

}  // namespace tritool
