// SPDX-License-Identifier: Apache-2.0
// Rigid alignment of many sets of N points each: the contract between the kernels and their callers.
//
//   source, target [batch, N, 3]  NaN: the point is absent
//   weights        [batch, N]     >= 0, 0: the point is absent; null: all ones
//   rotation       [batch, 3, 3]  determinant 1
//   translation    [batch, 3]     target = scale rotation source + translation, the least weighted sum of squares
//   scale          [batch]        1 without with_scale
//
// All three results are NaN, and all gradients exactly 0, for a set that does not determine them; the formulas and the
// degenerate cases are those of math/rigid_align.h. Every operand is read through its strides; gradients come out in
// the full batch. An item never depends on its neighbours.
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "kernels/isa.h"

struct CUstream_st;

namespace tritool {

template <class T>
struct RigidAlignParams {
  enum Operand { kSource, kTarget, kWeights, kRotation, kTranslation, kScale, kOperands };
  const T* source;
  const T* target;
  const T* weights;  // may be null
  T* rotation;       // out, each [3, 3] contiguous
  T* translation;    // out, each [3] contiguous
  T* scale;          // out
  Batch<kOperands> batch;
  int points;
  bool with_scale;
  int64_t source_stride[2];  // point, coordinate
  int64_t target_stride[2];
  int64_t weights_stride;  // point
};

template <class T>
struct RigidAlignBackwardParams {
  enum Operand {
    kGradRotation,
    kGradTranslation,
    kGradScale,
    kSource,
    kTarget,
    kWeights,
    kGradSource,
    kGradTarget,
    kGradWeights,
    kOperands
  };
  const T* grad_rotation;     // [batch, 3, 3]; null: zero
  const T* grad_translation;  // [batch, 3]; null: zero
  const T* grad_scale;        // [batch]; null: zero
  const T* source;
  const T* target;
  const T* weights;  // may be null
  T* grad_source;    // out, each [N, 3] contiguous; null: not wanted
  T* grad_target;    // out, each [N, 3] contiguous; null: not wanted
  T* grad_weights;   // out, each [N] contiguous; null: not wanted
  Batch<kOperands> batch;
  int points;
  bool with_scale;
  int64_t grad_rotation_stride[2];  // row, column
  int64_t grad_translation_stride;  // coordinate
  int64_t source_stride[2];
  int64_t target_stride[2];
  int64_t weights_stride;
};

namespace cpu {

// Both: items begin .. end-1.
template <class T>
struct RigidAlignKernels {
  void (*forward)(const RigidAlignParams<T>& params, int64_t begin, int64_t end);
  void (*backward)(const RigidAlignBackwardParams<T>& params, int64_t begin, int64_t end);
};

}  // namespace cpu

TRITOOL_DECLARE_KERNELS(RigidAlignKernels, rigid_align_kernels)

namespace cuda {

// Both return the launch's error code, 0 for none; they never wait for the device.
template <class T>
int rigid_align(const RigidAlignParams<T>& params, CUstream_st* stream);
template <class T>
int rigid_align_backward(const RigidAlignBackwardParams<T>& params, CUstream_st* stream);

}  // namespace cuda
}  // namespace tritool
