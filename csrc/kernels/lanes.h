// SPDX-License-Identifier: Apache-2.0
// The SIMD width of the variant being compiled, and moving numbers between memory and lanes.
#pragma once

#include <cstdint>

#include "kernels/batch.h"
#include "math/pack.h"

TRITOOL_MATH_BEGIN

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(T));
template <class T>
using NativePack = Pack<T, kLanesOf<T>>;

// One element from each of several places.
template <class T, int N>
TRITOOL_HD Pack<T, N> gather(const T* const (&base)[N], int64_t offset) {
  Pack<T, N> pack;
  for (int lane = 0; lane < N; ++lane) pack.v[lane] = base[lane][offset];
  return pack;
}

// The same, where all places may be one.
template <class T, int N>
TRITOOL_HD Pack<T, N> gather_shared(const T* const (&base)[N], bool same, int64_t offset) {
  return same ? Pack<T, N>(base[0][offset]) : gather(base, offset);
}

// The operands' offsets of the items first .. end-1, as many as there are lanes; lanes past the last item repeat it.
// Returns the number of lanes that hold an item.
template <int N, int kOperands>
TRITOOL_HD int lane_offsets(const Batch<kOperands>& batch, int64_t first, int64_t end,
                            int64_t (&offset)[N][kOperands]) {
  const int lanes = end - first < N ? static_cast<int>(end - first) : N;
  for (int lane = 0; lane < N; ++lane) batch.offsets(first + (lane < lanes ? lane : lanes - 1), offset[lane]);
  return lanes;
}

// The sum of the first `lanes` lanes, in lane order.
template <class T, int N>
TRITOOL_HD T sum_lanes(const Pack<T, N>& pack, int lanes) {
  T sum = T(0);
  for (int lane = 0; lane < lanes; ++lane) sum += pack.v[lane];
  return sum;
}

TRITOOL_MATH_END
