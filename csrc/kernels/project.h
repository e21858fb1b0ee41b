// SPDX-License-Identifier: Apache-2.0
// Projection of N points into C views each: the contract between the kernels and their callers.
//
//   points      [batch, 3]        world units
//   projections [batch, C, 3, 4]  world to pixels; shared by the points of a batch dimension of stride 0
//   pixels      [batch, C, 2]     (x, y); NaN where the point is not in front of the camera
//
// Gradients to points are summed over the views in order, to shared projections as in shared_sum.h.
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "kernels/isa.h"
#include "kernels/shared_sum.h"

struct CUstream_st;

namespace tritool {

template <class T>
struct ProjectParams {
  enum Operand { kPoints, kProjections, kPixels, kOperands };
  const T* points;
  const T* projections;
  T* pixels;  // out, each [C, 2] contiguous, aligned to a whole pixel
  Batch<kOperands> batch;
  int views;
  int64_t points_stride;          // coordinate
  int64_t projections_stride[3];  // view, row, column
};

template <class T>
struct ProjectBackwardParams {
  enum Operand { kGrad, kPoints, kProjections, kGradPoints, kGradProjections, kOperands };
  const T* grad;  // [batch, C, 2]
  const T* points;
  const T* projections;
  T* grad_points;          // out, each [3] contiguous; null: not wanted
  T* grad_projections;     // out, [own batch, C, 3, 4], each [C, 3, 4] contiguous; null: not wanted
  Batch<kOperands> batch;  // kGradProjections is the owner where it is wanted
  int views;
  int64_t grad_stride[2];  // view, coordinate
  int64_t points_stride;
  int64_t projections_stride[3];
  T* partial_sums;  // scratch, plan.partial_count elements
};

namespace cpu {

template <class T>
struct ProjectKernels {
  // Points begin .. end-1.
  void (*forward)(const ProjectParams<T>& params, int64_t begin, int64_t end);
  // Work units begin .. end-1; then, where the plan has partial sums, owners begin .. end-1.
  void (*backward)(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end);
  void (*backward_sum)(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end);
};

}  // namespace cpu

TRITOOL_DECLARE_KERNELS(ProjectKernels, project_kernels)

namespace cuda {

// Both return the launch's error code, 0 for none; they never wait for the device.
template <class T>
int project(const ProjectParams<T>& params, CUstream_st* stream);
template <class T>
int project_backward(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, CUstream_st* stream);

}  // namespace cuda
}  // namespace tritool
