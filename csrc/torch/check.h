// SPDX-License-Identifier: Apache-2.0
// What the bindings share: memory-safety checks, batch strides, the current stream. The checks for people, with their
// friendlier texts, are in Python; these hold even for a caller of torch.ops.tritool.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "kernels/batch.h"
#include "kernels/shared_sum.h"
#include "math/half.h"

struct CUstream_st;

namespace tritool {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::vector<int64_t> sizes_of(const Tensor& tensor) {
  return std::vector<int64_t>(tensor.sizes().begin(), tensor.sizes().end());
}

// `tensor` is [batch_dims..., trailing...]; -1 in trailing: any size.
inline void check_tensor(const Tensor& tensor, const char* name, ScalarType dtype, const Tensor& same_device_as,
                         int64_t batch_dims, std::initializer_list<int64_t> trailing) {
  STD_TORCH_CHECK(tensor.dim() == batch_dims + static_cast<int64_t>(trailing.size()), name, " has ", tensor.dim(),
                  " dimensions, expected ", batch_dims + static_cast<int64_t>(trailing.size()));
  int64_t d = batch_dims;
  for (const int64_t size : trailing) {
    STD_TORCH_CHECK(size < 0 || tensor.size(d) == size, name, " has size ", tensor.size(d), " in dimension ", d,
                    ", expected ", size);
    ++d;
  }
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has another dtype than expected");
  STD_TORCH_CHECK(tensor.device() == same_device_as.device(), name, " is on another device than the other arguments");
}

// The sizes of the leading dimensions, and sizes with more behind them.
inline std::vector<int64_t> leading_sizes(const Tensor& tensor, int64_t trailing_dims) {
  std::vector<int64_t> sizes = sizes_of(tensor);
  sizes.resize(sizes.size() - static_cast<size_t>(trailing_dims));
  return sizes;
}
inline std::vector<int64_t> with(std::vector<int64_t> sizes, std::initializer_list<int64_t> trailing) {
  sizes.insert(sizes.end(), trailing);
  return sizes;
}

// The strides of the first `dims` dimensions; 0 where the tensor has size 1 and the batch more (a broadcast).
inline std::vector<int64_t> batch_strides(const Tensor& tensor, const char* name, const std::vector<int64_t>& batch) {
  std::vector<int64_t> strides(batch.size());
  for (size_t d = 0; d < batch.size(); ++d) {
    const int64_t size = tensor.size(static_cast<int64_t>(d));
    STD_TORCH_CHECK(size == batch[d] || size == 1, name, " has batch size ", size, " where the batch has ", batch[d]);
    strides[d] = size == batch[d] && size != 1 ? tensor.stride(static_cast<int64_t>(d)) : 0;
  }
  return strides;
}

// One operand of a batch: the tensor, or null where it is absent (its strides do not matter then).
struct BatchOperand {
  const Tensor* tensor;
  const char* name;
};

// The index space of an op over `batch`, each operand read through its strides; see kernels/batch.h.
template <int kOperands>
void set_batch(Batch<kOperands>& result, const std::vector<int64_t>& batch, const BatchOperand (&operands)[kOperands],
               const char* op, int owner = -1) {
  std::vector<int64_t> strides[kOperands];
  const int64_t* pointers[kOperands];
  for (int o = 0; o < kOperands; ++o) {
    strides[o] = operands[o].tensor == nullptr ? std::vector<int64_t>(batch.size(), 0)
                                               : batch_strides(*operands[o].tensor, operands[o].name, batch);
    pointers[o] = strides[o].data();
  }
  STD_TORCH_CHECK(make_batch(batch.data(), static_cast<int>(batch.size()), pointers, result, owner), op, ": more than ",
                  kMaxBatchDims, " batch dimensions that cannot be merged");
}

// A new tensor for a gradient that is wanted, else an empty one.
inline Tensor new_gradient(const Tensor& like, bool wanted) {
  return torch::stable::new_empty(like, wanted ? sizes_of(like) : std::vector<int64_t>{0});
}

// Runs the units of a shared sum and, where it has partial sums, the second pass, on torch's threads.
template <class Params, class Kernels>
void run_shared_sum(const Params& params, const SharedSumPlan& plan, const Kernels& kernels) {
  torch::stable::parallel_for(0, plan.units, 1,
                              [&](int64_t begin, int64_t end) { kernels.backward(params, plan, begin, end); });
  if (plan.units_per_owner == 1) return;
  torch::stable::parallel_for(0, params.batch.count / params.batch.shared, 1,
                              [&](int64_t begin, int64_t end) { kernels.backward_sum(params, plan, begin, end); });
}

// Makes the tensor's device the current one while it lives; nothing for a CPU tensor.
class CurrentDevice {
 public:
  explicit CurrentDevice(const Tensor& tensor) {
    if (!tensor.is_cpu()) guard_.emplace(tensor.get_device_index());
  }

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

// Where the kernels of this tensor's device run: null on the CPU.
CUstream_st* current_stream(const Tensor& tensor);
// Raises for a CUDA tensor where the CUDA kernels were not built, and for any other device.
void check_device(const Tensor& tensor, const char* op);
void check_launch(int error, const char* op);

template <class Function>
void dispatch_real(const Tensor& tensor, const char* op, Function&& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    default:
      STD_TORCH_CHECK(false, op, " takes float32 or float64, got ", torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Maps and features: also the 16-bit types, which the kernels know by bits of their own (math/half.h).
template <class Function>
void dispatch_element(const Tensor& tensor, const char* op, Function&& function) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return function(float{});
    case ScalarType::Double:
      return function(double{});
    case ScalarType::Half:
      return function(Float16{});
    case ScalarType::BFloat16:
      return function(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, " takes float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// The dtype of Accumulator<In>.
inline ScalarType accumulator_dtype(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The element pointer as the kernels' own type.
template <class In>
In* data_of(const Tensor& tensor) {
  return static_cast<In*>(tensor.data_ptr());
}

}  // namespace tritool
