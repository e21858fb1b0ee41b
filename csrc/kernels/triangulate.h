// SPDX-License-Identifier: Apache-2.0
// Weighted linear triangulation of N points from C views each: the contract between the kernels and their callers.
//
//   points      [batch, C, 2]     pixels (x, y); NaN: the view is absent
//   projections [batch, C, 3, 4]  world to pixels; shared by the points of a batch dimension of stride 0
//   weights     [batch, C]        >= 0, 0: the view is absent; null: all ones
//   points_3d   [batch, 3]        world units; NaN where fewer than two views are present or the rays are parallel
//
// The formulas and the degenerate cases are those of math/triangulate.h. Every operand is read through its strides.
// The gradient of points that are not valid is exactly 0. Results do not depend on the number of threads: gradients
// to shared projections are summed in a fixed order.
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "kernels/isa.h"

struct CUstream_st;

namespace tritool {

template <class T>
struct TriangulateParams {
  enum Operand { kPoints, kProjections, kWeights, kPoints3d, kOperands };
  const T* points;
  const T* projections;
  const T* weights;  // may be null
  T* points_3d;      // out
  Batch<kOperands> batch;
  int views;
  bool homogeneous;
  int64_t points_stride[2];       // view, coordinate
  int64_t projections_stride[3];  // view, row, column
  int64_t weights_stride;         // view
};

template <class T>
struct TriangulateBackwardParams {
  enum Operand { kGrad, kPoints, kProjections, kWeights, kGradPoints, kGradProjections, kGradWeights, kOperands };
  const T* grad;         // [batch, 3]
  const T* points;
  const T* projections;
  const T* weights;      // may be null
  T* grad_points;        // out, [batch, C, 2], each [C, 2] contiguous; null: not wanted
  T* grad_projections;   // out, [own batch, C, 3, 4], each [C, 3, 4] contiguous; null: not wanted
  T* grad_weights;       // out, [batch, C], each [C] contiguous; null: not wanted
  // The items are ordered so that those which share a projection are neighbours (make_batch with kGradProjections as
  // the owner). Where one set of projections is shared by more items than a work unit holds, each unit writes its sum
  // to partial_sums [owner, units per owner, C, 3, 4] and a second pass adds the units up in order.
  Batch<kOperands> batch;
  int views;
  bool homogeneous;
  int64_t grad_stride;  // coordinate
  int64_t points_stride[2];
  int64_t projections_stride[3];
  int64_t weights_stride;
  T* partial_sums;  // scratch of `partial_count` elements, see plan()
};

// How the backward divides its items among work units. The same on every machine, so that sums are, too.
struct TriangulateBackwardPlan {
  int64_t items_per_unit;
  int64_t units;
  int64_t units_per_owner;  // > 1: partial sums are needed
  int64_t partial_count;    // elements of scratch
};

template <int kOperands>
TriangulateBackwardPlan triangulate_backward_plan(const Batch<kOperands>& batch, int views, bool grad_projections,
                                                  int64_t items_per_unit) {
  TriangulateBackwardPlan plan{};
  if (batch.count == 0) return plan;
  if (!grad_projections) {
    plan.items_per_unit = items_per_unit;
    plan.units = (batch.count + items_per_unit - 1) / items_per_unit;
    plan.units_per_owner = 1;
  } else if (batch.shared > items_per_unit) {
    plan.items_per_unit = items_per_unit;
    plan.units_per_owner = (batch.shared + items_per_unit - 1) / items_per_unit;
    plan.units = plan.units_per_owner * (batch.count / batch.shared);
    plan.partial_count = plan.units * views * 12;
  } else {  // whole owners in every unit
    plan.items_per_unit = batch.shared * (items_per_unit / batch.shared);
    plan.units = (batch.count + plan.items_per_unit - 1) / plan.items_per_unit;
    plan.units_per_owner = 1;
  }
  return plan;
}

namespace cpu {

constexpr int64_t kTriangulateItemsPerUnit = 1024;

template <class T>
struct TriangulateKernels {
  // Points begin .. end-1.
  void (*forward)(const TriangulateParams<T>& params, int64_t begin, int64_t end);
  // Work units begin .. end-1 of the plan.
  void (*backward)(const TriangulateBackwardParams<T>& params, const TriangulateBackwardPlan& plan, int64_t begin,
                   int64_t end);
  // Where the plan has partial sums, afterwards: owners begin .. end-1.
  void (*backward_sum)(const TriangulateBackwardParams<T>& params, const TriangulateBackwardPlan& plan, int64_t begin,
                       int64_t end);
};

}  // namespace cpu

TRITOOL_DECLARE_KERNELS(TriangulateKernels, triangulate_kernels)

namespace cuda {

// Work units of the backward that sum into shared projections: one warp each, so never more than one owner.
inline int64_t triangulate_items_per_unit(int64_t shared) { return shared < 256 ? shared : 256; }

// Both return the launch's error code, 0 for none; they never wait for the device.
template <class T>
int triangulate(const TriangulateParams<T>& params, CUstream_st* stream);
template <class T>
int triangulate_backward(const TriangulateBackwardParams<T>& params, const TriangulateBackwardPlan& plan,
                         CUstream_st* stream);

}  // namespace cuda
}  // namespace tritool
