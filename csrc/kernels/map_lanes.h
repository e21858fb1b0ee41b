// SPDX-License-Identifier: Apache-2.0
// Maps in SIMD lanes: a piece of one map's row, or one element of each of several neighbouring maps.
#pragma once

#include <type_traits>

#include "kernels/lanes.h"
#include "math/half.h"

TRITOOL_MATH_BEGIN

// Whole vectors of neighbouring elements. float16 and bfloat16 are converted lane by lane in an array, a loop that the
// compiler turns into vector instructions.
template <class In, class T, int N>
TRITOOL_HD void load_vector(const In* from, Pack<T, N>& pack) {
  if constexpr (std::is_same_v<In, T>) {
    memcpy(&pack.v, from, sizeof pack.v);
  } else {
    T values[N];
    for (int lane = 0; lane < N; ++lane) values[lane] = load(from + lane);
    memcpy(&pack.v, values, sizeof values);
  }
}
template <class In, class T, int N>
TRITOOL_HD void store_vector(In* to, const Pack<T, N>& pack) {
  if constexpr (std::is_same_v<In, T>) {
    memcpy(to, &pack.v, sizeof pack.v);
  } else {
    T values[N];
    memcpy(values, &pack.v, sizeof values);
    for (int lane = 0; lane < N; ++lane) store(to + lane, values[lane]);
  }
}

// `lanes` elements in steps of `stride`; the rest, masked voxels (and as values, such that no masked voxel minds).
template <class P, class In>
TRITOOL_HD P load_lanes(const In* from, int64_t stride, int lanes) {
  using T = Real<P>;
  P pack;
  if (lanes == P::kLanes && stride == 1) {
    load_vector(from, pack);
    return pack;
  }
  T values[P::kLanes];
  for (int lane = 0; lane < P::kLanes; ++lane)
    values[lane] = lane < lanes ? load(from + lane * stride) : -infinity<T>();
  memcpy(&pack.v, values, sizeof values);
  return pack;
}

template <class P, class In>
TRITOOL_HD void store_lanes(In* to, int64_t stride, int lanes, const P& pack) {
  if (lanes == P::kLanes && stride == 1) {
    store_vector(to, pack);
    return;
  }
  Real<P> values[P::kLanes];
  memcpy(values, &pack.v, sizeof values);
  for (int lane = 0; lane < P::kLanes; ++lane)
    if (lane < lanes) store(to + lane * stride, values[lane]);
}

template <class P>
TRITOOL_HD P lane_numbers() {
  P numbers;
  for (int lane = 0; lane < P::kLanes; ++lane) numbers.v[lane] = Real<P>(lane);
  return numbers;
}

// For the lambdas of inner loops, which are not worth a call.
#define TRITOOL_INLINE __attribute__((always_inline))

// Runs over `count` neighbours in whole vectors, whose number of lanes is then a constant, and at last what is left.
template <int N, class Run>
TRITOOL_HD void for_lanes(int64_t count, Run&& run) {
  int64_t k = 0;
  for (; k + N <= count; k += N) run(k, std::integral_constant<int, N>());
  if (k < count) run(k, int(count - k));
}

template <class T, int N>
TRITOOL_HD T largest_lane(const Pack<T, N>& pack) {
  T largest = pack[0];
  for (int lane = 1; lane < N; ++lane) largest = max_(pack[lane], largest);
  return largest;
}

TRITOOL_HD int lanes_left(int64_t left, int lanes) { return left < lanes ? static_cast<int>(left) : lanes; }

// Element (i, j, 0) of a map; `base` its first.
template <class In>
TRITOOL_HD In* row_of(In* base, const int64_t (&stride)[3], int64_t i, int64_t j) {
  return base + i * stride[0] + j * stride[1];
}

// float lanes as double lanes and back.
template <class To, class From>
TRITOOL_HD To convert_lanes(const From& from) {
  return To::of(__builtin_convertvector(from.v, typename To::Vector));
}

// Adjacent maps are taken in groups of one lane each; a group never crosses the innermost batch dimension.
struct MapGroups {
  int64_t inner;   // adjacent maps
  int64_t groups;  // groups of them
};
template <int kOperands>
TRITOOL_HD MapGroups map_groups(const Batch<kOperands>& maps, int lanes) {
  const int64_t inner = maps.dims == 0 ? 1 : maps.size[maps.dims - 1];
  return {inner, (inner + lanes - 1) / lanes};
}

TRITOOL_MATH_END
