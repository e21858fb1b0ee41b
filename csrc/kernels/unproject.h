// SPDX-License-Identifier: Apache-2.0
// Unprojection of image features into a volume, views aggregated: the contract between the kernels and their callers.
//
//   features    [items, C, K, H, W]  in any strides
//   projections [items, C, 3, 4]     world to pixels of the feature maps
//   grid        [items, 4, 3]        origin and steps of a grid of size (X, Y, Z); or [items, N, 3], its points
//   confidences [items, C, K]        may be null: all 1
//   volume      [items, K, N]        in any strides
//
// float16 and bfloat16 features and volumes are read and written as such; everything else is float32 then. The
// mathematics is that of math/unproject.h.
//
// The kernels read features channels last, in rows of a fixed multiple of bytes. Where the tensor is not like that a
// first pass stages them so in scratch, which costs the features once more, little beside the volume. Gradients to
// features are likewise summed in such rows, and copied to the tensor's own layout where it differs.
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "kernels/isa.h"
#include "math/half.h"
#include "math/unproject.h"

struct CUstream_st;

namespace tritool {

// Rows of features: [maps, H, W, row], where a row is the channels of a pixel, filled up with zeros.
struct UnprojectRows {
  bool staged;   // scratch; else the tensor itself is laid out so
  int64_t row;   // elements
  int64_t view;  // elements from one view's map to the next
  // CPU, staged: pixels lie in tiles of kTileRows x kTileColumns, filled up at the borders. Image rows one after the
  // other are often a multiple of 4 KiB apart; pixels below each other, which a column of voxels sees, would be as many
  // pages of memory and share a few places in the first cache.
  bool tiled;
};

template <class In>
struct UnprojectParams {
  using T = Accumulator<In>;
  enum Operand { kFeatures, kStaged, kProjections, kGrid, kConfidences, kVolume, kGradFeatures, kOperands };
  const In* features;
  const T* projections;
  const T* grid;
  const T* confidences;  // null: all 1
  In* volume;            // out; in the backward its gradient, which is only read
  Batch<kOperands> batch;

  int views;
  int64_t channels, height, width;
  int64_t points;              // N
  int64_t grid_size[3];        // of a frame; 0: the grid is points
  int64_t features_stride[4];  // view, channel, row, column
  int64_t projections_stride[3];
  int64_t grid_stride[2];
  int64_t confidences_stride[2];
  int64_t volume_stride[2];  // channel, voxel
  int aggregation;           // Aggregation of math/unproject.h
  bool exclude;              // a view that does not see a voxel takes no part in it
  bool official;             // the published code's sampling: x (W - 1) / H, y (H - 1) / W

  UnprojectRows rows;
  void* staged;       // where rows.staged: T on the CPU, In on CUDA; by stage() first, where the features are read
  Batch<2> own_maps;  // what is staged: the features' own items, in (features, staged)
};

// Gradients, each null where it is not wanted; those of the small operands are contiguous, item by item.
template <class In>
struct UnprojectGradients {
  using T = Accumulator<In>;
  In* features;
  int64_t features_stride[4];
  T* projections;  // [items, C, 3, 4]
  T* grid;         // [items, 4, 3] or [items, N, 3]
  T* confidences;  // [items, C, K]
  bool direct;     // the features' gradient is summed where it is to be, which has the layout of the rows; by the plan
  T* sums;         // scratch [parts, items, C, H, W, row], where not direct
  void* partial;   // scratch, plan.partial_bytes
};

// How the backward is divided. Every part sums into its own copy of the features' gradient; copies and partial sums are
// added up in order, so the result depends on the shapes alone.
struct UnprojectPlan {
  int64_t parts;           // the voxels of an item are divided among so many
  int64_t groups;          // and its channels
  int64_t group_channels;  // elements of the row
  int64_t units;           // items * groups * parts
  int64_t entries;         // numbers in a unit's partial sums
  int64_t partial_bytes;
  int64_t sums_count;  // elements of UnprojectGradients::sums
  bool fixed_point;    // CUDA: the features' gradient is summed in integers, so that the order does not matter
};

// `quantum`: elements that a row is a multiple of; `same_type`: the tensor's elements are those of the rows.
template <class In>
UnprojectRows unproject_rows(const UnprojectParams<In>& params, const int64_t (&strides)[4], int64_t quantum,
                             bool same_type) {
  UnprojectRows rows{};
  rows.row = (params.channels + quantum - 1) / quantum * quantum;
  rows.view = params.height * params.width * rows.row;
  rows.staged = !same_type || params.channels != rows.row || (rows.row > 1 && strides[1] != 1) ||
                (params.width > 1 && strides[3] != rows.row) ||
                (params.height > 1 && strides[2] != params.width * rows.row) ||
                (params.views > 1 && strides[0] != rows.view);
  return rows;
}

// Fills batch and own_maps from the batch dimensions' sizes and the strides of each operand in them (kStaged is made
// here). False if there are more dimensions than Batch holds.
template <class In>
bool set_unproject_batch(UnprojectParams<In>& params, const int64_t* size, int dims,
                         const int64_t* const (&strides)[UnprojectParams<In>::kOperands]) {
  using Params = UnprojectParams<In>;
  if (dims > kMaxBatchDims) return false;
  int64_t own_size[kMaxBatchDims], staged[kMaxBatchDims], map = params.views * params.rows.view;
  for (int d = dims - 1; d >= 0; --d) {
    const bool owned = strides[Params::kFeatures][d] != 0;
    own_size[d] = owned ? size[d] : 1;
    staged[d] = owned ? map : 0;
    map *= own_size[d];
  }
  const int64_t* all[Params::kOperands];
  for (int o = 0; o < Params::kOperands; ++o) all[o] = o == Params::kStaged ? staged : strides[o];
  const int64_t* const own[2] = {strides[Params::kFeatures], staged};
  return make_batch(size, dims, all, params.batch) && make_batch(own_size, dims, own, params.own_maps);
}

// The number of elements to stage.
template <class In>
int64_t staged_count(const UnprojectParams<In>& params) {
  return params.rows.staged ? params.own_maps.count * params.views * params.rows.view : 0;
}

// Whether the backward reads the features.
template <class In>
bool unproject_backward_samples(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients) {
  return !is_linear(static_cast<Aggregation>(params.aggregation)) || gradients.projections != nullptr ||
         gradients.grid != nullptr || gradients.confidences != nullptr;
}

namespace cpu {

constexpr int64_t kUnprojectBlock = 16;  // voxels projected at once

template <class In>
struct UnprojectKernels {
  // Image rows begin .. end-1 of all own maps' views.
  void (*stage)(const UnprojectParams<In>& params, int64_t begin, int64_t end);
  // Blocks of voxels begin .. end-1, counted item by item.
  void (*forward)(const UnprojectParams<In>& params, int64_t begin, int64_t end);
  // Units begin .. end-1, counted item by item, group by group, part by part.
  void (*backward)(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                   const UnprojectPlan& plan, int64_t begin, int64_t end);
  // Then, image rows begin .. end-1 of all items' views, where gradients.sums are used; and the partial sums of items
  // begin .. end-1.
  void (*backward_rows)(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                        const UnprojectPlan& plan, int64_t begin, int64_t end);
  void (*backward_sums)(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                        const UnprojectPlan& plan, int64_t begin, int64_t end);
};

// What the CPU kernels' rows are multiples of: a cache line of the accumulator's type.
template <class In>
constexpr int64_t unproject_quantum = 64 / int64_t(sizeof(Accumulator<In>));

constexpr int64_t kTileRows = 8, kTileColumns = 4;
inline int64_t tiles_up(int64_t size, int64_t tile) { return (size + tile - 1) / tile * tile; }

template <class In>
UnprojectRows unproject_rows(const UnprojectParams<In>& params) {
  UnprojectRows rows = tritool::unproject_rows(params, params.features_stride, unproject_quantum<In>,
                                               sizeof(In) == sizeof(Accumulator<In>));
  rows.tiled = rows.staged;
  if (rows.tiled) rows.view = tiles_up(params.height, kTileRows) * tiles_up(params.width, kTileColumns) * rows.row;
  return rows;
}

inline int64_t unproject_blocks(int64_t points) { return (points + kUnprojectBlock - 1) / kUnprojectBlock; }

// Independent of the number of threads, so that the sums are, too.
template <class In>
UnprojectPlan unproject_plan(const UnprojectParams<In>& params, UnprojectGradients<In>& gradients) {
  UnprojectPlan plan{};
  const int64_t items = params.batch.count;
  // The gradient to a point sums over all channels: they stay together.
  const bool together = gradients.grid != nullptr && params.grid_size[0] == 0;
  plan.group_channels = together && params.rows.row > 0 ? params.rows.row : 2 * unproject_quantum<In>;
  plan.groups = params.rows.row == 0 ? 1 : (params.rows.row + plan.group_channels - 1) / plan.group_channels;
  // A second copy of the features' gradient, small beside the volume, gives a second thread something to do.
  const bool small = 4 * params.views * params.rows.view <= params.channels * params.points;
  plan.parts = items * plan.groups < 4 && small ? 2 : 1;
  plan.units = items * plan.groups * plan.parts;
  plan.entries = params.views * 12 + 12 + params.views * params.rows.row;
  plan.partial_bytes = plan.units * plan.entries * int64_t(sizeof(double));
  gradients.direct = plan.parts == 1 && !params.rows.tiled && sizeof(In) == sizeof(Accumulator<In>) &&
                     !tritool::unproject_rows(params, gradients.features_stride, unproject_quantum<In>, true).staged;
  plan.sums_count =
      gradients.features == nullptr || gradients.direct ? 0 : plan.parts * items * params.views * params.rows.view;
  return plan;
}

}  // namespace cpu

TRITOOL_DECLARE_KERNELS(UnprojectKernels, unproject_kernels)

namespace cuda {

constexpr int64_t kUnprojectMaxViews = 128;  // what one block's shared memory holds

template <class In>
UnprojectRows unproject_rows(const UnprojectParams<In>& params);
// The features' gradient is summed by atomics, or in fixed point where it has to come out the same every time.
template <class In>
UnprojectPlan unproject_plan(const UnprojectParams<In>& params, UnprojectGradients<In>& gradients, bool deterministic);
template <class In>
int unproject(const UnprojectParams<In>& params, CUstream_st* stream);
template <class In>
int unproject_backward(const UnprojectParams<In>& params, const UnprojectGradients<In>& gradients,
                       const UnprojectPlan& plan, CUstream_st* stream);

}  // namespace cuda

}  // namespace tritool
