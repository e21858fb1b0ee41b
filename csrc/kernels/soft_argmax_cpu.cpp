// SPDX-License-Identifier: Apache-2.0
// Two layouts, each read in place. Rows: a map's last axis lies along the SIMD lanes. Adjacent maps (channels last):
// the lanes are neighbouring maps, which share every cache line. Both sum a row in lanes and add rows up in float64,
// which is free at that rate and keeps a map of 10^6 voxels exact to 1e-5.
#include <type_traits>

#include "kernels/lanes.h"
#include "kernels/moment_cotangent.h"
#include "kernels/soft_argmax.h"

namespace tritool {
namespace cpu {
namespace TRITOOL_ISA {
namespace {

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

// `lanes` elements in steps of `stride`; the rest, masked voxels.
template <class P, class In>
TRITOOL_HD P load_lanes(const In* from, int64_t stride, int lanes) {
  using T = Real<P>;
  P pack = P(-infinity<T>());
  if (lanes == P::kLanes && stride == 1) {
    load_vector(from, pack);
    return pack;
  }
  for (int lane = 0; lane < lanes; ++lane) pack.v[lane] = load(from + lane * stride);
  return pack;
}

template <class P, class In>
TRITOOL_HD void store_lanes(In* to, int64_t stride, int lanes, const P& pack) {
  if (lanes == P::kLanes && stride == 1) {
    store_vector(to, pack);
    return;
  }
  for (int lane = 0; lane < lanes; ++lane) store(to + lane * stride, pack.v[lane]);
}

template <class P>
TRITOOL_HD P lane_numbers() {
  P numbers;
  for (int lane = 0; lane < P::kLanes; ++lane) numbers.v[lane] = Real<P>(lane);
  return numbers;
}

TRITOOL_HD int lanes_left(int64_t left, int lanes) { return left < lanes ? static_cast<int>(left) : lanes; }

template <class State, class In>
void write_moments(const SoftmaxMomentsParams<In>& params, int64_t map, const State& state, bool second) {
  using T = Accumulator<In>;
  const int dims = params.dims;
  for (int d = 0; d < dims; ++d) params.mean[map * dims + d] = T(state.mean(moment_axis(dims, d)));
  if constexpr (sizeof(state.second) > sizeof(state.sum)) {
    for (int a = 0; second && a < dims; ++a)
      for (int b = 0; b < dims; ++b)
        params.covariance[(map * dims + a) * dims + b] =
            T(state.covariance(moment_axis(dims, a), moment_axis(dims, b)));
  }
  params.log_partition[map] = T(state.log_partition());
  params.partition[2 * map] = T(state.level);
  params.partition[2 * map + 1] = T(state.sum);
}

// Adds the sums of all lanes, which have the level and the origin of the total, and clears them.
template <class P, bool kSecond>
TRITOOL_HD void flush_lanes(MomentState<P, kSecond>& lanes, MomentState<double, kSecond>& total) {
  constexpr int N = P::kLanes;
  total.sum += double(sum_lanes(lanes.sum, N));
  for (int a = 0; a < 3; ++a) total.first[a] += double(sum_lanes(lanes.first[a], N));
  for (int k = 0; kSecond && k < 6; ++k)
    total.second[kSecond ? k : 0] += double(sum_lanes(lanes.second[kSecond ? k : 0], N));
  lanes.clear();
}

template <class In, bool kSecond>
void forward_row_map(const SoftmaxMomentsParams<In>& params, int64_t map) {
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  constexpr int64_t kElementsPerFlush = 64 * N;  // short sums in the lanes keep float32 exact to a few roundings
  const int64_t width = params.size[2];
  int64_t offset[1];
  params.maps.offsets(map, offset);

  MomentState<double, kSecond> total;
  MomentState<P, kSecond> state;  // of the rows since the last flush, lane by lane
  const double centre[3] = {0.5 * double(params.size[0] - 1), 0.5 * double(params.size[1] - 1),
                            0.5 * double(width - 1)};
  const P centre_lanes[3] = {P(T(centre[0])), P(T(centre[1])), P(T(centre[2]))};
  total.reset(centre);
  state.reset(centre_lanes);
  const P numbers = lane_numbers<P>();
  int64_t pending = 0;
  for (int64_t i = 0; i < params.size[0]; ++i) {
    for (int64_t j = 0; j < params.size[1]; ++j) {
      const In* row = params.logits + offset[0] + i * params.stride[0] + j * params.stride[1];
      P largest = P(-infinity<T>());
      for (int64_t k = 0; k < width; k += N) {
        const P logit = load_lanes<P>(row + k * params.stride[2], params.stride[2], lanes_left(width - k, N));
        largest = select(logit > largest, logit, largest);
      }
      if (any(level_of(P(params.c), largest) > state.level)) {  // a few times a map
        T top = largest.v[0];
        for (int lane = 1; lane < N; ++lane) top = max_(largest.v[lane], top);
        double at[3] = {double(i), double(j), centre[2]};
        if constexpr (kSecond)
          for (int64_t k = 0; k < width; ++k)
            if (load(row + k * params.stride[2]) == top) at[2] = double(k);
        const T level = level_of(params.c, top);
        const P at_lanes[3] = {P(T(at[0])), P(T(at[1])), P(T(at[2]))};
        total.raise(double(level), at);
        state.raise(P(level), at_lanes);
      }
      P sum = P(T(0)), first = P(T(0)), second = P(T(0));
      for (int64_t k = 0; k < width; k += N) {
        const P logit = load_lanes<P>(row + k * params.stride[2], params.stride[2], lanes_left(width - k, N));
        const P weight = softmax_weight(P(params.c), logit, state.level);
        const P d = (numbers + P(T(k))) - state.origin[2];
        sum = sum + weight;
        first = first + weight * d;
        if constexpr (kSecond) second = second + weight * d * d;
      }
      state.add_row(sum, first, second, P(T(i)), P(T(j)));
      pending += width;
      if (pending >= kElementsPerFlush) {
        flush_lanes(state, total);
        pending = 0;
      }
    }
  }
  flush_lanes(state, total);
  write_moments(params, map, total, kSecond);
}

// float lanes as double lanes and back.
template <class To, class From>
TRITOOL_HD To convert_lanes(const From& from) {
  return To::of(__builtin_convertvector(from.v, typename To::Vector));
}

// One lane of a state of lanes, as a state of its own.
template <bool kSecond, class D>
MomentState<double, kSecond> lane_of(const MomentState<D, kSecond>& state, int lane) {
  MomentState<double, kSecond> one;
  one.level = state.level.v[lane];
  one.sum = state.sum.v[lane];
  for (int a = 0; a < 3; ++a) {
    one.first[a] = state.first[a].v[lane];
    one.origin[a] = state.origin[a].v[lane];
  }
  for (int k = 0; k < (kSecond ? 6 : 1); ++k) one.second[k] = state.second[k].v[lane];
  return one;
}

// Adjacent maps are taken in groups of one lane each; a group never crosses the innermost batch dimension.
struct MapGroups {
  int64_t inner;   // adjacent maps
  int64_t groups;  // groups of them
};
template <int kOperands>
MapGroups map_groups(const Batch<kOperands>& maps, int lanes) {
  const int64_t inner = maps.dims == 0 ? 1 : maps.size[maps.dims - 1];
  return {inner, (inner + lanes - 1) / lanes};
}

template <class In, bool kSecond>
void forward_map_group(const SoftmaxMomentsParams<In>& params, int64_t index) {
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  using D = Pack<double, N>;
  const MapGroups groups = map_groups(params.maps, N);
  const int64_t outer = index / groups.groups;
  const int64_t first_in_group = (index - outer * groups.groups) * N;
  const int lanes = lanes_left(groups.inner - first_in_group, N);
  const int64_t first_map = outer * groups.inner + first_in_group;
  int64_t offset[1];
  params.maps.offsets(first_map, offset);

  MomentState<D, kSecond> state;
  const D centre[3] = {D(0.5 * double(params.size[0] - 1)), D(0.5 * double(params.size[1] - 1)),
                       D(0.5 * double(params.size[2] - 1))};
  state.reset(centre);
  for (int64_t i = 0; i < params.size[0]; ++i) {
    for (int64_t j = 0; j < params.size[1]; ++j) {
      const In* row = params.logits + offset[0] + i * params.stride[0] + j * params.stride[1];
      P largest = P(-infinity<T>()), place = P(T(0));
      for (int64_t k = 0; k < params.size[2]; ++k) {
        const P logit = load_lanes<P>(row + k * params.stride[2], 1, lanes);
        const auto larger = logit > largest;
        largest = select(larger, logit, largest);
        if constexpr (kSecond) place = select(larger, P(T(k)), place);
      }
      const D level = convert_lanes<D>(level_of(P(params.c), largest));
      if (any(level > state.level)) {
        const D at[3] = {D(double(i)), D(double(j)), convert_lanes<D>(place)};
        state.raise(level, at);
      }
      P sum = P(T(0)), first = P(T(0)), second = P(T(0));
      const P level_pack = convert_lanes<P>(state.level);
      const P origin = convert_lanes<P>(state.origin[2]);
      for (int64_t k = 0; k < params.size[2]; ++k) {
        const P logit = load_lanes<P>(row + k * params.stride[2], 1, lanes);
        const P weight = softmax_weight(P(params.c), logit, level_pack);
        const P d = P(T(k)) - origin;
        sum = sum + weight;
        first = first + weight * d;
        if constexpr (kSecond) second = second + weight * d * d;
      }
      state.add_row(convert_lanes<D>(sum), convert_lanes<D>(first), convert_lanes<D>(second), D(double(i)),
                    D(double(j)));
    }
  }
  for (int lane = 0; lane < lanes; ++lane)
    write_moments(params, first_map + lane, lane_of<kSecond>(state, lane), kSecond);
}

template <class In>
int64_t work(const SoftmaxMomentsParams<In>& params) {
  if (!params.maps_adjacent) return params.maps.count;
  const MapGroups groups = map_groups(params.maps, NativePack<Accumulator<In>>::kLanes);
  return params.maps.count / groups.inner * groups.groups;
}

template <class In>
void forward(const SoftmaxMomentsParams<In>& params, int64_t begin, int64_t end) {
  const bool second = params.covariance != nullptr;
  for (int64_t item = begin; item < end; ++item) {
    if (params.maps_adjacent)
      second ? forward_map_group<In, true>(params, item) : forward_map_group<In, false>(params, item);
    else
      second ? forward_row_map<In, true>(params, item) : forward_row_map<In, false>(params, item);
  }
}

template <class In>
void backward_row(const SoftmaxMomentsBackwardParams<In>& params, const MomentCotangent<Accumulator<In>>& map,
                  const int64_t (&offset)[2], int64_t i, int64_t j) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  const int64_t (&from)[3] = params.stride[Params::kLogits];
  const int64_t (&to)[3] = params.stride[Params::kGradLogits];
  const In* row = params.logits + offset[Params::kLogits] + i * from[0] + j * from[1];
  In* out = params.grad_logits + offset[Params::kGradLogits] + i * to[0] + j * to[1];
  T t[3];
  map.row(T(i), T(j), t);
  const T factor = params.inverse_temperature * map.inverse_sum;
  const P numbers = lane_numbers<P>();
  for (int64_t k = 0; k < params.size[2]; k += N) {
    const int lanes = lanes_left(params.size[2] - k, N);
    P gradient = P(T(0));
    if (map.valid) {
      const P logit = load_lanes<P>(row + k * from[2], from[2], lanes);
      const P weight = softmax_weight(P(params.c), logit, P(map.level));
      const P d = (numbers + P(T(k))) - P(map.mean[2]);
      gradient = weight * P(factor) * (P(t[0]) + d * (P(t[1]) + d * P(t[2])));
    }
    store_lanes(out + k * to[2], to[2], lanes, gradient);
  }
}

// The rows of all maps, or of all groups of adjacent maps.
template <class In>
void backward(const SoftmaxMomentsBackwardParams<In>& params, int64_t begin, int64_t end) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  const int64_t rows = params.size[0] * params.size[1];
  const MapGroups groups = map_groups(params.maps, N);
  for (int64_t item = begin; item < end;) {
    const int64_t index = item / rows;
    const int64_t stop = (index + 1) * rows < end ? (index + 1) * rows : end;
    int64_t offset[2];
    if (!params.maps_adjacent) {
      params.maps.offsets(index, offset);
      const MomentCotangent<T> map = moment_cotangent(params, index);
      for (; item < stop; ++item) {
        const int64_t row = item - index * rows;
        backward_row(params, map, offset, row / params.size[1], row % params.size[1]);
      }
      continue;
    }
    const int64_t outer = index / groups.groups;
    const int64_t first_in_group = (index - outer * groups.groups) * N;
    const int lanes = lanes_left(groups.inner - first_in_group, N);
    const int64_t first_map = outer * groups.inner + first_in_group;
    params.maps.offsets(first_map, offset);
    MomentCotangent<T> maps[N];
    P level = P(T(0)), factor = P(T(0)), mean = P(T(0));
    for (int lane = 0; lane < N; ++lane) {
      maps[lane] = moment_cotangent(params, first_map + (lane < lanes ? lane : lanes - 1));
      level.v[lane] = maps[lane].valid ? maps[lane].level : T(0);
      factor.v[lane] = params.inverse_temperature * maps[lane].inverse_sum;
      mean.v[lane] = maps[lane].mean[2];
    }
    const int64_t (&from)[3] = params.stride[Params::kLogits];
    const int64_t (&to)[3] = params.stride[Params::kGradLogits];
    for (; item < stop; ++item) {
      const int64_t row = item - index * rows, i = row / params.size[1], j = row % params.size[1];
      P t[3] = {P(T(0)), P(T(0)), P(T(0))}, valid = P(T(0));
      for (int lane = 0; lane < N; ++lane) {
        T lane_t[3];
        maps[lane].row(T(i), T(j), lane_t);
        for (int n = 0; n < 3; ++n) t[n].v[lane] = lane_t[n];
        valid.v[lane] = T(maps[lane].valid);
      }
      const In* logits = params.logits + offset[Params::kLogits] + i * from[0] + j * from[1];
      In* out = params.grad_logits + offset[Params::kGradLogits] + i * to[0] + j * to[1];
      for (int64_t k = 0; k < params.size[2]; ++k) {
        const P weight = softmax_weight(P(params.c), load_lanes<P>(logits + k * from[2], 1, lanes), level);
        const P d = P(T(k)) - mean;
        const P gradient = weight * factor * (t[0] + d * (t[1] + d * t[2]));
        store_lanes(out + k * to[2], 1, lanes, select(valid > P(T(0)), gradient, P(T(0))));
      }
    }
  }
}

template <class In>
int64_t backward_work(const SoftmaxMomentsBackwardParams<In>& params) {
  const int64_t rows = params.size[0] * params.size[1];
  if (!params.maps_adjacent) return params.maps.count * rows;
  const MapGroups groups = map_groups(params.maps, NativePack<Accumulator<In>>::kLanes);
  return params.maps.count / groups.inner * groups.groups * rows;
}

}  // namespace

template <class In>
const SoftmaxMomentsKernels<In>& softmax_moments_kernels() {
  static const SoftmaxMomentsKernels<In> kernels{&work<In>, &forward<In>, &backward_work<In>, &backward<In>};
  return kernels;
}
template const SoftmaxMomentsKernels<float>& softmax_moments_kernels<float>();
template const SoftmaxMomentsKernels<double>& softmax_moments_kernels<double>();
template const SoftmaxMomentsKernels<Float16>& softmax_moments_kernels<Float16>();
template const SoftmaxMomentsKernels<BFloat16>& softmax_moments_kernels<BFloat16>();

}  // namespace TRITOOL_ISA
}  // namespace cpu
}  // namespace tritool
