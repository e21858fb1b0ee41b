// SPDX-License-Identifier: Apache-2.0
// The CPU kernels' side of shared_sum.h.
#pragma once

#include "kernels/lanes.h"
#include "kernels/shared_sum.h"

TRITOOL_MATH_BEGIN

// Where the lanes of one group of items add their contributions to the shared operand.
template <class T, int N>
struct SharedSumLanes {
  T* sum[N];
  bool same;  // all lanes add to one owner
  int lanes;

  // What the lanes contribute to the entries from `entry` on.
  template <int kCount>
  TRITOOL_HD void add(int64_t entry, const Pack<T, N>* values) const {
    if (same && lanes == N) {
      for (int first = 0; first < kCount; first += N) {
        Pack<T, N> some[N];
        for (int n = 0; n < N; ++n) some[n] = first + n < kCount ? values[first + n] : Pack<T, N>(T(0));
        const Pack<T, N> sums = sum_each(some);
        for (int n = 0; n < N && first + n < kCount; ++n) sum[0][entry + first + n] += sums.v[n];
      }
    } else {
      for (int n = 0; n < kCount; ++n)
        for (int lane = 0; lane < lanes; ++lane) sum[lane][entry + n] += values[n].v[lane];
    }
  }
};

// Zeroes what the unit will add to; null where the unit adds to its owners themselves, else its partial sum.
template <class T, int kOperands>
TRITOOL_HD T* begin_unit(const SharedSumPlan& plan, const Batch<kOperands>& batch, int owner_operand, ItemRange items,
                         int64_t unit, T* owners, T* partial_sums) {
  if (plan.units_per_owner > 1) {
    T* partial = partial_sums + unit * plan.entries;
    for (int64_t entry = 0; entry < plan.entries; ++entry) partial[entry] = T(0);
    return partial;
  }
  for (int64_t item = items.begin; item < items.end; item += batch.shared) {
    int64_t offset[kOperands];
    batch.offsets(item, offset);
    for (int64_t entry = 0; entry < plan.entries; ++entry) owners[offset[owner_operand] + entry] = T(0);
  }
  return nullptr;
}

template <class T, int N, int kOperands>
TRITOOL_HD SharedSumLanes<T, N> sum_targets(const int64_t (&offset)[N][kOperands], int owner_operand, T* owners,
                                            T* partial, int lanes) {
  SharedSumLanes<T, N> targets;
  targets.same = true;
  targets.lanes = lanes;
  for (int lane = 0; lane < N; ++lane) {
    targets.sum[lane] = partial != nullptr ? partial : owners + offset[lane][owner_operand];
    targets.same = targets.same && targets.sum[lane] == targets.sum[0];
  }
  return targets;
}

// The second pass, for owners begin .. end-1.
template <class T, int kOperands>
TRITOOL_HD void add_partial_sums(const SharedSumPlan& plan, const Batch<kOperands>& batch, int owner_operand, T* owners,
                                 const T* partial_sums, int64_t begin, int64_t end) {
  for (int64_t owner = begin; owner < end; ++owner) {
    int64_t offset[kOperands];
    batch.offsets(owner * batch.shared, offset);
    T* sum = owners + offset[owner_operand];
    const T* partial = partial_sums + owner * plan.units_per_owner * plan.entries;
    for (int64_t entry = 0; entry < plan.entries; ++entry) sum[entry] = T(0);
    for (int64_t unit = 0; unit < plan.units_per_owner; ++unit)
      for (int64_t entry = 0; entry < plan.entries; ++entry) sum[entry] += partial[unit * plan.entries + entry];
  }
}

TRITOOL_MATH_END
