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

}  // namespace tritool
