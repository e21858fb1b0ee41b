// SPDX-License-Identifier: Apache-2.0
// Gradients to an operand that several items share (the projections of all joints of a frame, of all points of a
// scene), summed in an order that depends on the shapes alone: the same bits on any number of threads, without atomics.
//
// The items are ordered so that those which share an element of the operand, its "owner", are neighbours (make_batch
// with the operand as owner). A work unit takes whole owners, several or one; where one owner has more items than a
// unit holds, each of its units writes a partial sum, and a second pass adds the units up in order.
#pragma once

#include "kernels/batch.h"

namespace tritool {

struct SharedSumPlan {
  int64_t items_per_unit;
  int64_t units;
  int64_t units_per_owner;  // > 1: partial sums [owner, unit of the owner, entries]
  int64_t entries;          // numbers summed per owner
  int64_t partial_count;    // elements of scratch for the partial sums
};

// `summed` false: nothing is shared, the units merely divide the items.
template <int kOperands>
SharedSumPlan shared_sum_plan(const Batch<kOperands>& batch, bool summed, int64_t entries, int64_t items_per_unit) {
  SharedSumPlan plan{};
  plan.entries = entries;
  plan.units_per_owner = 1;
  if (batch.count == 0) return plan;
  if (summed && batch.shared > items_per_unit) {
    plan.items_per_unit = items_per_unit;
    plan.units_per_owner = (batch.shared + items_per_unit - 1) / items_per_unit;
    plan.units = plan.units_per_owner * (batch.count / batch.shared);
    plan.partial_count = plan.units * entries;
    return plan;
  }
  plan.items_per_unit = summed ? batch.shared * (items_per_unit / batch.shared) : items_per_unit;
  plan.units = (batch.count + plan.items_per_unit - 1) / plan.items_per_unit;
  return plan;
}

// The items of one unit.
struct ItemRange {
  int64_t begin, end;
};
TRITOOL_BATCH_HD ItemRange unit_items(const SharedSumPlan& plan, int64_t count, int64_t shared, int64_t unit) {
  int64_t begin = unit * plan.items_per_unit, limit = count;
  if (plan.units_per_owner > 1) {
    const int64_t owner = unit / plan.units_per_owner;
    begin = owner * shared + (unit - owner * plan.units_per_owner) * plan.items_per_unit;
    limit = (owner + 1) * shared;
  }
  const int64_t end = begin + plan.items_per_unit;
  return {begin, end < limit ? end : limit};
}

constexpr int64_t kCpuItemsPerUnit = 1024;
// Work units on a GPU are warps, and a warp serves one owner.
inline int64_t warp_items_per_unit(int64_t shared) { return shared < 256 ? shared : 256; }

}  // namespace tritool
