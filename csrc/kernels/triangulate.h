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
#include "kernels/shared_sum.h"

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
  const T* grad;  // [batch, 3]
  const T* points;
  const T* projections;
  const T* weights;        // may be null
  T* grad_points;          // out, [batch, C, 2], each [C, 2] contiguous; null: not wanted
  T* grad_projections;     // out, [own batch, C, 3, 4], each [C, 3, 4] contiguous; null: not wanted
  T* grad_weights;         // out, [batch, C], each [C] contiguous; null: not wanted
  Batch<kOperands> batch;  // kGradProjections is the owner where it is wanted, see shared_sum.h
  int views;
  bool homogeneous;
  int64_t grad_stride;  // coordinate
  int64_t points_stride[2];
  int64_t projections_stride[3];
  int64_t weights_stride;
  T* partial_sums;  // scratch, plan.partial_count elements
};

namespace cpu {

template <class T>
struct TriangulateKernels {
  // Points begin .. end-1.
  void (*forward)(const TriangulateParams<T>& params, int64_t begin, int64_t end);
  // Work units begin .. end-1 of the plan.
  void (*backward)(const TriangulateBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end);
  // Where the plan has partial sums, afterwards: owners begin .. end-1.
  void (*backward_sum)(const TriangulateBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin,
                       int64_t end);
};

}  // namespace cpu

TRITOOL_DECLARE_KERNELS(TriangulateKernels, triangulate_kernels)

namespace cuda {

// Both return the launch's error code, 0 for none; they never wait for the device.
template <class T>
int triangulate(const TriangulateParams<T>& params, CUstream_st* stream);
template <class T>
int triangulate_backward(const TriangulateBackwardParams<T>& params, const SharedSumPlan& plan, CUstream_st* stream);

}  // namespace cuda
}  // namespace tritool
