// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels' side of shared_sum.h: one warp per unit, one owner per warp.
#pragma once

#include "kernels/launch.cuh"
#include "kernels/shared_sum.h"

namespace tritool {

constexpr int kSharedSumBlock = 128;

// All lanes of the warp call this together; lanes that hold no item pass 0.
template <class T>
__device__ __forceinline__ void warp_add(T* sum, T value) {
  const T total = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) *sum += total;
}

// Zeroes the warp's sum and says where it is.
template <class T, int kOperands>
__device__ __forceinline__ T* begin_warp_unit(const SharedSumPlan& plan, const Batch<kOperands>& batch,
                                              int owner_operand, int64_t first_item, int64_t unit, T* owners,
                                              T* partial_sums) {
  int64_t offset[kOperands];
  batch.offsets(first_item, offset);
  T* sum = plan.units_per_owner > 1 ? partial_sums + unit * plan.entries : owners + offset[owner_operand];
  __syncwarp();  // lane 0 may still be adding to the sum of the unit before
  for (int64_t entry = threadIdx.x % kWarpSize; entry < plan.entries; entry += kWarpSize) sum[entry] = T(0);
  __syncwarp();
  return sum;
}

// One warp per number of every owner: adds up its units' partial sums. kOwner: the operand that is the owner.
template <class T, int kOwner, int kOperands>
__global__ void __launch_bounds__(kSharedSumBlock)
    add_partial_sums_kernel(SharedSumPlan plan, Batch<kOperands> batch, T* owners, const T* partial_sums) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t sums = batch.count / batch.shared * plan.entries;
  for (int64_t index = thread_index() / kWarpSize; index < sums; index += thread_count() / kWarpSize) {
    const int64_t owner = index / plan.entries, entry = index - owner * plan.entries;
    int64_t offset[kOperands];
    batch.offsets(owner * batch.shared, offset);
    const T* partial = partial_sums + owner * plan.units_per_owner * plan.entries + entry;
    T sum = T(0);
#pragma unroll 2  // four at once would spill registers
    for (int64_t unit = lane; unit < plan.units_per_owner; unit += kWarpSize) sum += partial[unit * plan.entries];
    sum = warp_sum(sum);
    if (lane == 0) owners[offset[kOwner] + entry] = sum;
  }
}

template <int kOwner, class T, int kOperands>
void add_partial_sums(const SharedSumPlan& plan, const Batch<kOperands>& batch, T* owners, const T* partial_sums,
                      Stream stream) {
  if (plan.units_per_owner == 1 || plan.entries == 0) return;  // without views there is nothing to sum
  const int64_t sums = batch.count / batch.shared * plan.entries;
  TRITOOL_LAUNCH(TRITOOL_KERNEL(add_partial_sums_kernel<T, kOwner, kOperands>),
                 grid_size(sums, kSharedSumBlock / kWarpSize), kSharedSumBlock, 0, stream, plan, batch, owners,
                 partial_sums);
}

}  // namespace tritool
