// SPDX-License-Identifier: Apache-2.0
#include "kernels/soft_argmax.h"

#include "torch/bindings.h"

namespace tritool {
namespace {

constexpr double kLog2OfE = 1.4426950408889634074;

void check_logits(const Tensor& logits, int64_t dims, const char* op) {
  check_device(logits, op);
  STD_TORCH_CHECK((dims == 2 || dims == 3) && logits.dim() >= dims, op, ": logits must have ", dims,
                  " trailing dimensions, got ", logits.dim());
  int64_t elements = 1;
  for (int64_t d = 1; d <= dims; ++d) elements *= logits.size(-d);
  STD_TORCH_CHECK(elements < (int64_t(1) << 31), op, ": a map of ", elements,
                  " elements; fewer than 2^31 are supported");
}

// A map's sizes and strides as three axes, the first of size 1 for a 2D map.
void set_axes(const Tensor& tensor, int64_t dims, int64_t (&size)[3], int64_t (&stride)[3]) {
  for (int axis = 0; axis < 3; ++axis) {
    const bool there = axis >= 3 - dims;
    size[axis] = there ? tensor.size(axis - 3) : 1;
    stride[axis] = there ? tensor.stride(axis - 3) : 0;
  }
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
  dispatch_element(logits, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    SoftmaxMomentsParams<In> params{};
    params.logits = data_of<In>(logits);
    params.mean = mean.mutable_data_ptr<T>();
    params.covariance = with_covariance ? covariance.mutable_data_ptr<T>() : nullptr;
    params.log_partition = log_partition.mutable_data_ptr<T>();
    params.partition = partition.mutable_data_ptr<T>();
    set_batch(params.maps, batch, {{&logits, "logits"}}, kOp);
    set_axes(logits, dims, params.size, params.stride);
    params.dims = static_cast<int>(dims);
    params.c = T(inverse_temperature * kLog2OfE);
    params.maps_adjacent = are_maps_adjacent(params.maps, {params.stride[2]});
    if (logits.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(softmax_moments_kernels, In);
      torch::stable::parallel_for(0, kernels.work(params), 1,
                                  [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      const int64_t elements = params.size[0] * params.size[1] * params.size[2];
      const int64_t splits = cuda::softmax_moments_splits(params.maps.count, elements);
      const Tensor scratch = torch::stable::new_empty(
          logits, {splits > 1 ? params.maps.count * splits * cuda::kMomentStateSize : 0}, dtype);
      params.partial = scratch.mutable_data_ptr<T>();
      check_launch(cuda::softmax_moments(params, current_stream(logits)), kOp);
#endif
    }
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
  const std::vector<int64_t> batch = leading_sizes(logits, dims);
  const auto batch_dims = static_cast<int64_t>(batch.size());
  const ScalarType dtype = accumulator_dtype(logits);
  // Small next to the logits: made contiguous, so that the kernels index them by the number of the map.
  const auto small = [&](const std::optional<Tensor>& tensor, const char* name,
                         std::initializer_list<int64_t> trailing) -> std::optional<Tensor> {
    if (!tensor.has_value()) return std::nullopt;
    check_tensor(*tensor, name, dtype, logits, batch_dims, trailing);
    STD_TORCH_CHECK(leading_sizes(*tensor, static_cast<int64_t>(trailing.size())) == batch, kOp, ": ", name,
                    " has another batch than logits");
    return torch::stable::contiguous(*tensor);
  };
  const auto of_mean = small(mean, "mean", {dims});
  const auto of_partition = small(partition, "partition", {2});
  const auto of_grad_mean = small(grad_mean, "grad_mean", {dims});
  const auto of_grad_covariance = small(grad_covariance, "grad_covariance", {dims, dims});
  const auto of_covariance = grad_covariance.has_value() ? small(covariance, "covariance", {dims, dims}) : std::nullopt;
  const auto of_grad_log = small(grad_log_partition, "grad_log_partition", {});
  Tensor grad_logits = torch::stable::empty_like(logits);

  dispatch_element(logits, kOp, [&](auto element) {
    using In = decltype(element);
    using T = Accumulator<In>;
    using Params = SoftmaxMomentsBackwardParams<In>;
    const auto pointer = [](const std::optional<Tensor>& tensor) {
      return tensor.has_value() ? tensor->const_data_ptr<T>() : nullptr;
    };
    Params params{};
    params.logits = data_of<In>(logits);
    params.grad_logits = data_of<In>(grad_logits);
    params.mean = pointer(of_mean);
    params.covariance = pointer(of_covariance);
    params.partition = pointer(of_partition);
    params.grad_mean = pointer(of_grad_mean);
    params.grad_covariance = pointer(of_grad_covariance);
    params.grad_log_partition = pointer(of_grad_log);
    set_batch(params.maps, batch, {{&logits, "logits"}, {&grad_logits, "grad_logits"}}, kOp);
    set_axes(logits, dims, params.size, params.stride[Params::kLogits]);
    set_axes(grad_logits, dims, params.size, params.stride[Params::kGradLogits]);
    params.dims = static_cast<int>(dims);
    params.c = T(inverse_temperature * kLog2OfE);
    params.inverse_temperature = T(inverse_temperature);
    params.maps_adjacent =
        are_maps_adjacent(params.maps, {params.stride[Params::kLogits][2], params.stride[Params::kGradLogits][2]});
    if (logits.is_cpu()) {
      const auto& kernels = TRITOOL_PICK_KERNELS(softmax_moments_kernels, In);
      torch::stable::parallel_for(0, kernels.backward_work(params), 64,
                                  [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
    } else {
#if defined(TRITOOL_CUDA)
      check_launch(cuda::softmax_moments_backward(params, current_stream(logits)), kOp);
#endif
    }
  });
  return grad_logits;
}

}  // namespace tritool
