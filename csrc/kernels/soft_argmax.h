// SPDX-License-Identifier: Apache-2.0
// Softmax moments of N maps of logits: the contract between the kernels and their callers.
//
//   logits        [maps, X, Y, Z] in any strides; a 2D heat map has X = 1, Y = H, Z = W
//   mean          [maps, D]       D = 2: (x, y), that is axes (Z, Y); D = 3: axes (X, Y, Z); in index coordinates
//   covariance    [maps, D, D]    in the same axes; null: not wanted
//   log_partition [maps]          log sum exp(inverse_temperature * logits)
//   partition     [maps, 2]       (level, sum), what the backward needs to make the weights again
//
// or, with a second map of values (soft_argmax25d), which has strides of its own,
//
//   values        [maps, 1, Y, Z]
//   mean          [maps, 3]       (x, y) and the expectation of the values; no covariance, no log_partition
//
// float16 and bfloat16 maps are read as such; everything else is float32 then. The mathematics, masks (-inf) and maps
// that have no mean (NaN) are those of math/soft_argmax.h. Sums are taken in a fixed order: same input, same bits.
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "kernels/isa.h"
#include "math/half.h"

struct CUstream_st;

namespace tritool {

// Coordinate d of the result is axis moment_axis(dims, d) of the map; its own inverse, so axis a is coordinate
// moment_axis(dims, a), or none where that is not below dims.
TRITOOL_BATCH_HD int moment_axis(int dims, int d) { return dims == 2 ? 2 - d : d; }

template <class In>
struct SoftmaxMomentsParams {
  using T = Accumulator<In>;
  enum Operand { kLogits, kValues, kOperands };
  const In* logits;
  const In* values;  // may be null; its strides are those of the logits then
  T* mean;
  T* covariance;     // may be null; is, where there are values
  T* log_partition;  // null where there are values
  T* partition;
  Batch<kOperands> maps;
  int64_t size[3];
  int64_t stride[kOperands][3];
  int dims;            // 2 or 3
  T c;                 // inverse_temperature * log2(e)
  bool maps_adjacent;  // neighbouring maps lie side by side in memory (channels last)
  T* partial;          // scratch of the CUDA kernels, see cuda::softmax_moments_splits
};

template <class In>
struct SoftmaxMomentsBackwardParams {
  using T = Accumulator<In>;
  enum Operand { kLogits, kGradLogits, kValues, kGradValues, kOperands };
  const In* logits;
  In* grad_logits;
  const In* values;  // null, and its gradient too, as in the forward pass
  In* grad_values;
  const T* mean;        // as it came out of the forward pass, contiguous, and so are the next ones
  const T* covariance;  // null where grad_covariance is
  const T* partition;
  const T* grad_mean;  // each may be null: no such gradient
  const T* grad_covariance;
  const T* grad_log_partition;
  Batch<kOperands> maps;
  int64_t size[3];
  int64_t stride[kOperands][3];
  int dims;
  T c;
  T inverse_temperature;
  bool maps_adjacent;
};

// The length of a mean: with values, their expectation comes last.
template <class Params>
TRITOOL_BATCH_HD int mean_size(const Params& params) {
  return params.values == nullptr ? params.dims : params.dims + 1;
}

// What maps_adjacent is to be: whether neighbouring maps lie side by side in memory, and are enough to fill the lanes.
// inner_stride: each operand's stride along the last axis.
template <int kOperands>
bool are_maps_adjacent(const Batch<kOperands>& maps, const int64_t (&inner_stride)[kOperands]) {
  if (maps.dims == 0 || maps.size[maps.dims - 1] < 4) return false;
  for (int o = 0; o < kOperands; ++o)
    if (maps.stride[maps.dims - 1][o] != 1 || inner_stride[o] == 1) return false;
  return true;
}

namespace cpu {

template <class In>
struct SoftmaxMomentsKernels {
  int64_t (*work)(const SoftmaxMomentsParams<In>& params);  // number of work items: maps, or groups of adjacent maps
  void (*forward)(const SoftmaxMomentsParams<In>& params, int64_t begin, int64_t end);
  // Rows begin .. end-1 of all maps, counted map by map; or of all groups of adjacent maps.
  int64_t (*backward_work)(const SoftmaxMomentsBackwardParams<In>& params);
  void (*backward)(const SoftmaxMomentsBackwardParams<In>& params, int64_t begin, int64_t end);
};

}  // namespace cpu

TRITOOL_DECLARE_KERNELS(SoftmaxMomentsKernels, softmax_moments_kernels)

namespace cuda {

// Blocks that share one map: several where there are few large ones. Depends on the shapes alone.
int64_t softmax_moments_splits(int64_t maps, int64_t elements);
constexpr int kMomentStateSize = 14;  // numbers of scratch a map and split

template <class In>
int softmax_moments(const SoftmaxMomentsParams<In>& params, CUstream_st* stream);
template <class In>
int softmax_moments_backward(const SoftmaxMomentsBackwardParams<In>& params, CUstream_st* stream);

}  // namespace cuda
}  // namespace tritool
