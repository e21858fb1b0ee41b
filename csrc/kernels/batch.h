// SPDX-License-Identifier: Apache-2.0
// One batch index, several operands read through their own strides: how broadcast operands are read without a copy.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define TRITOOL_BATCH_HD __host__ __device__ __forceinline__
#else
// Always inlined: also used by the files that are compiled once per instruction set (see math/hd.h).
#define TRITOOL_BATCH_HD inline __attribute__((always_inline))
#endif

namespace tritool {

constexpr int kMaxBatchDims = 8;

// The items 0 .. count-1, in row-major order of `size`; strides count elements. A stride of 0 is a broadcast.
template <int kOperands>
struct Batch {
  int64_t count = 1;
  int64_t shared = 1;  // see make_batch
  int dims = 0;
  int64_t size[kMaxBatchDims] = {};
  int64_t stride[kMaxBatchDims][kOperands] = {};

  // Index: int64_t, or int32_t where neither the items nor any operand's offsets go beyond it (see fits_int32).
  template <class Index>
  TRITOOL_BATCH_HD void offsets(Index item, Index (&offset)[kOperands]) const {
    for (int o = 0; o < kOperands; ++o) offset[o] = 0;
#if defined(__CUDACC__)
#pragma unroll 1  // seldom runs at all; copies of a 64-bit division would only make kernels long
#endif
    for (int d = dims - 1; d > 0; --d) {
      const Index rest = item / static_cast<Index>(size[d]);
      const Index index = item - rest * static_cast<Index>(size[d]);
      item = rest;
      for (int o = 0; o < kOperands; ++o) offset[o] += index * static_cast<Index>(stride[d][o]);
    }
    if (dims == 0) return;
    // The outermost dimension holds what is left, without a division.
    for (int o = 0; o < kOperands; ++o) offset[o] += item * static_cast<Index>(stride[0][o]);
  }

  // Whether int32_t holds the number of items and every offset of the operand, and as much as `within` further.
  bool fits_int32(int operand, int64_t within) const {
    constexpr int64_t kLimit = 2147483647;
    int64_t reach = within < 0 ? -within : within;
    bool fits = count <= kLimit && reach <= kLimit;
    for (int d = 0; d < dims && fits; ++d) {
      const int64_t step = stride[d][operand] < 0 ? -stride[d][operand] : stride[d][operand];
      fits = size[d] <= 1 || step <= (kLimit - reach) / (size[d] - 1);
      if (fits && size[d] > 1) reach += step * (size[d] - 1);
    }
    return fits;
  }
};

// Builds a Batch from the sizes of the batch dimensions and each operand's strides, merging dimensions where it can.
// With owner >= 0 the dimensions in which that operand moves (stride != 0) come first: the items that share one element
// of the owner are then neighbours, `shared` of them. False if more than kMaxBatchDims dimensions remain.
template <int kOperands>
bool make_batch(const int64_t* size, int dims, const int64_t* const (&strides)[kOperands], Batch<kOperands>& batch,
                int owner = -1) {
  batch = Batch<kOperands>{};
  for (int pass = 0; pass < 2; ++pass) {  // first what the owner owns, then what its elements share
    bool first = true;
    for (int d = 0; d < dims; ++d) {
      const bool owned = owner < 0 || strides[owner][d] != 0;
      batch.count *= pass == 0 ? size[d] : 1;
      if (size[d] == 1 || owned != (pass == 0)) continue;
      if (pass == 1) batch.shared *= size[d];
      bool merges = !first;
      for (int o = 0; o < kOperands && merges; ++o) merges = batch.stride[batch.dims - 1][o] == strides[o][d] * size[d];
      if (merges) {
        batch.size[batch.dims - 1] *= size[d];
      } else {
        if (batch.dims == kMaxBatchDims) return false;
        batch.size[batch.dims++] = size[d];
      }
      for (int o = 0; o < kOperands; ++o) batch.stride[batch.dims - 1][o] = strides[o][d];
      first = false;
    }
  }
  return true;
}

}  // namespace tritool
