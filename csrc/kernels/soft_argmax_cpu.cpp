// SPDX-License-Identifier: Apache-2.0
// Two layouts, each read in place. Rows: a map's last axis lies along the SIMD lanes. Adjacent maps (channels last):
// the lanes are neighbouring maps, which share every cache line. Both sum a row in lanes and add rows up in float64,
// which is free at that rate and keeps a map of 10^6 voxels exact to 1e-5. A second map is read beside the first.
#include "kernels/map_lanes.h"
#include "kernels/moment_cotangent.h"
#include "kernels/soft_argmax.h"

namespace tritool {
namespace cpu {
namespace TRITOOL_ISA {
namespace {

template <Keep kKeep, class In>
void write_moments(const SoftmaxMomentsParams<In>& params, int64_t map, const MomentState<double, kKeep>& state) {
  using T = Accumulator<In>;
  using P = NativePack<T>;
  const int dims = params.dims;
  T* mean = params.mean + map * mean_size(params);
  for (int d = 0; d < dims; ++d) mean[d] = T(state.mean(moment_axis(dims, d)));
  if constexpr (kKeep == Keep::kCovariance) {
    for (int a = 0; a < dims; ++a)
      for (int b = 0; b < dims; ++b)
        params.covariance[(map * dims + a) * dims + b] =
            T(state.covariance(moment_axis(dims, a), moment_axis(dims, b)));
  }
  if constexpr (kKeep == Keep::kExpectation) {
    // By the lanes' own exp2, which is 0 sooner than that of float64.
    const P spoilt_weight = softmax_weight(P(params.c), P(T(state.value.spoilt)), P(T(state.level)));
    mean[dims] = T(state.expectation(double(spoilt_weight[0])));
  } else {
    params.log_partition[map] = T(state.log_partition());
  }
  params.partition[2 * map] = T(state.level);
  params.partition[2 * map + 1] = T(state.sum);
}

// Adds the sums since the last flush, which have the level and the origin of the total, and clears them.
template <class P, class D, Keep kKeep>
TRITOOL_HD void flush_lanes(MomentState<P, kKeep>& lanes, MomentState<D, kKeep>& total) {
  total.sum = total.sum + convert_lanes<D>(lanes.sum);
  for (int a = 0; a < 3; ++a) total.first[a] = total.first[a] + convert_lanes<D>(lanes.first[a]);
  if constexpr (kKeep == Keep::kCovariance)
    for (int k = 0; k < 6; ++k) total.second[k] = total.second[k] + convert_lanes<D>(lanes.second[k]);
  if constexpr (kKeep == Keep::kExpectation)
    total.value.add(ValueSum<D>{convert_lanes<D>(lanes.value.sum), convert_lanes<D>(lanes.value.spoilt)});
  lanes.clear();
}

// All lanes of a state as one; they have one level and one origin.
template <Keep kKeep, class D>
MomentState<double, kKeep> sum_of_lanes(const MomentState<D, kKeep>& state) {
  constexpr int N = D::kLanes;
  MomentState<double, kKeep> one;
  one.level = state.level[0];
  one.sum = sum_lanes(state.sum, N);
  for (int a = 0; a < 3; ++a) {
    one.first[a] = sum_lanes(state.first[a], N);
    one.origin[a] = state.origin[a][0];
  }
  for (int k = 0; k < (state.kSecond ? 6 : 1); ++k) one.second[k] = sum_lanes(state.second[k], N);
  one.value = {sum_lanes(state.value.sum, N), state.value.spoilt[0]};
  for (int lane = 1; lane < N; ++lane) one.value.spoilt = max_(state.value.spoilt[lane], one.value.spoilt);
  return one;
}

// A row is weighed under the level of the rows before it, and again where one of its logits turns out to be above:
// that happens a few times a map, and looking first would read every row twice.
template <class In, Keep kKeep, bool kContiguous>
void forward_row_map(const SoftmaxMomentsParams<In>& params, int64_t map) {
  using Params = SoftmaxMomentsParams<In>;
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  using D = Pack<double, N>;
  constexpr bool kSecond = kKeep == Keep::kCovariance, kValue = kKeep == Keep::kExpectation;
  constexpr int64_t kElementsPerFlush = 64 * N;  // short sums in the lanes keep float32 exact to a few roundings
  const int64_t width = params.size[2];
  const int64_t step = kContiguous ? 1 : params.stride[Params::kLogits][2];
  const int64_t value_step = kContiguous ? 1 : params.stride[Params::kValues][2];
  const P c = P(params.c);
  int64_t offset[Params::kOperands];
  params.maps.offsets(map, offset);

  MomentState<D, kKeep> total;
  MomentState<P, kKeep> state;  // of the rows since the last flush
  const double centre[3] = {0.5 * double(params.size[0] - 1), 0.5 * double(params.size[1] - 1),
                            0.5 * double(width - 1)};
  total.reset({D(centre[0]), D(centre[1]), D(centre[2])});
  state.reset({P(T(centre[0])), P(T(centre[1])), P(T(centre[2]))});
  const P numbers = lane_numbers<P>();
  int64_t pending = 0;
  for (int64_t i = 0; i < params.size[0]; ++i) {
    for (int64_t j = 0; j < params.size[1]; ++j) {
      const In* row = row_of(params.logits + offset[Params::kLogits], params.stride[Params::kLogits], i, j);
      const In* values = nullptr;
      if constexpr (kValue)
        values = row_of(params.values + offset[Params::kValues], params.stride[Params::kValues], i, j);
      P sum, first, second;
      ValueSum<P> value;
      while (true) {
        P largest = P(-infinity<T>()), d = numbers - state.origin[2];
        sum = first = second = P(T(0));
        value.reset();
        for_lanes<N>(width, [&](int64_t k, auto lanes) TRITOOL_INLINE {
          const P logit = load_lanes<P>(row + k * step, step, lanes);
          prefetch(row + k * step);
          largest = max_(logit, largest);
          const P weight = softmax_weight(c, logit, state.level);
          sum = sum + weight;
          first = first + weight * d;
          if constexpr (kSecond) second = second + weight * d * d;
          if constexpr (kValue) value.add(weight, logit, load_lanes<P>(values + k * value_step, value_step, lanes));
          d = d + P(T(N));
        });
        if (!any(c * largest > state.level)) break;
        const T top = largest_lane(largest);
        double k_top = centre[2];
        if constexpr (kSecond)
          for (int64_t k = 0; k < width; ++k)
            if (load(row + k * step) == top) k_top = double(k);
        const T level = level_of(params.c, top);
        total.raise(D(double(level)), {D(double(i)), D(double(j)), D(k_top)});
        state.raise(P(level), {P(T(i)), P(T(j)), P(T(k_top))});
      }
      state.add_row(sum, first, second, P(T(i)), P(T(j)));
      if constexpr (kValue) state.value.add(value);
      pending += width;
      if (pending >= kElementsPerFlush) {
        flush_lanes(state, total);
        pending = 0;
      }
    }
  }
  flush_lanes(state, total);
  write_moments(params, map, sum_of_lanes(total));
}

// One lane of a state of lanes, as a state of its own.
template <Keep kKeep, class D>
MomentState<double, kKeep> lane_of(const MomentState<D, kKeep>& state, int lane) {
  MomentState<double, kKeep> one;
  one.level = state.level.v[lane];
  one.sum = state.sum.v[lane];
  for (int a = 0; a < 3; ++a) {
    one.first[a] = state.first[a].v[lane];
    one.origin[a] = state.origin[a].v[lane];
  }
  for (int k = 0; k < (state.kSecond ? 6 : 1); ++k) one.second[k] = state.second[k].v[lane];
  one.value = {state.value.sum.v[lane], state.value.spoilt.v[lane]};
  return one;
}

template <class In, Keep kKeep>
void forward_map_group(const SoftmaxMomentsParams<In>& params, int64_t index) {
  using Params = SoftmaxMomentsParams<In>;
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  constexpr bool kSecond = kKeep == Keep::kCovariance, kValue = kKeep == Keep::kExpectation;
  using D = Pack<double, N>;
  const MapGroups groups = map_groups(params.maps, N);
  const int64_t outer = index / groups.groups;
  const int64_t first_in_group = (index - outer * groups.groups) * N;
  const int lanes = lanes_left(groups.inner - first_in_group, N);
  const int64_t first_map = outer * groups.inner + first_in_group;
  const int64_t step = params.stride[Params::kLogits][2], value_step = params.stride[Params::kValues][2];
  int64_t offset[Params::kOperands];
  params.maps.offsets(first_map, offset);

  MomentState<D, kKeep> state;
  const D centre[3] = {D(0.5 * double(params.size[0] - 1)), D(0.5 * double(params.size[1] - 1)),
                       D(0.5 * double(params.size[2] - 1))};
  state.reset(centre);
  for (int64_t i = 0; i < params.size[0]; ++i) {
    for (int64_t j = 0; j < params.size[1]; ++j) {
      const In* row = row_of(params.logits + offset[Params::kLogits], params.stride[Params::kLogits], i, j);
      P largest = P(-infinity<T>()), place = P(T(0));
      for (int64_t k = 0; k < params.size[2]; ++k) {
        const P logit = load_lanes<P>(row + k * step, 1, lanes);
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
      const In* values = nullptr;
      ValueSum<P> value;
      if constexpr (kValue) {
        values = row_of(params.values + offset[Params::kValues], params.stride[Params::kValues], i, j);
        value.reset();
      }
      const P level_pack = convert_lanes<P>(state.level);
      const P origin = convert_lanes<P>(state.origin[2]);
      for (int64_t k = 0; k < params.size[2]; ++k) {
        const P logit = load_lanes<P>(row + k * step, 1, lanes);
        const P weight = softmax_weight(P(params.c), logit, level_pack);
        const P d = P(T(k)) - origin;
        sum = sum + weight;
        first = first + weight * d;
        if constexpr (kSecond) second = second + weight * d * d;
        if constexpr (kValue) value.add(weight, logit, load_lanes<P>(values + k * value_step, 1, lanes));
      }
      state.add_row(convert_lanes<D>(sum), convert_lanes<D>(first), convert_lanes<D>(second), D(double(i)),
                    D(double(j)));
      if constexpr (kValue) state.value.add(ValueSum<D>{convert_lanes<D>(value.sum), convert_lanes<D>(value.spoilt)});
    }
  }
  for (int lane = 0; lane < lanes; ++lane) write_moments(params, first_map + lane, lane_of(state, lane));
}

template <class In>
int64_t work(const SoftmaxMomentsParams<In>& params) {
  if (!params.maps_adjacent) return params.maps.count;
  const MapGroups groups = map_groups(params.maps, NativePack<Accumulator<In>>::kLanes);
  return params.maps.count / groups.inner * groups.groups;
}

template <class In, Keep kKeep>
void forward_items(const SoftmaxMomentsParams<In>& params, int64_t begin, int64_t end) {
  using Params = SoftmaxMomentsParams<In>;
  bool contiguous = params.stride[Params::kLogits][2] == 1;
  if (kKeep == Keep::kExpectation) contiguous = contiguous && params.stride[Params::kValues][2] == 1;
  const auto forward_item = params.maps_adjacent ? &forward_map_group<In, kKeep>
                            : contiguous         ? &forward_row_map<In, kKeep, true>
                                                 : &forward_row_map<In, kKeep, false>;
  for (int64_t item = begin; item < end; ++item) forward_item(params, item);
}

template <class In>
void forward(const SoftmaxMomentsParams<In>& params, int64_t begin, int64_t end) {
  if (params.values != nullptr) return forward_items<In, Keep::kExpectation>(params, begin, end);
  if (params.covariance != nullptr) return forward_items<In, Keep::kCovariance>(params, begin, end);
  forward_items<In, Keep::kMean>(params, begin, end);
}

// Whether the gradient's rows can be streamed: large, in whole vectors.
template <class In>
bool streams(const SoftmaxMomentsBackwardParams<In>& params) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  constexpr int N = kLanesOf<Accumulator<In>>;
  const int64_t (&stride)[3] = params.stride[Params::kGradLogits];
  if (!std::is_same_v<In, Accumulator<In>> || params.maps_adjacent || stride[2] != 1) return false;
  bool whole = params.size[2] % N == 0 && stride[0] % N == 0 && stride[1] % N == 0 && is_aligned(params.grad_logits);
  for (int d = 0; d < params.maps.dims; ++d) whole = whole && params.maps.stride[d][Params::kGradLogits] % N == 0;
  return whole &&
         is_streamed(params.maps.count * params.size[0] * params.size[1] * params.size[2] * int64_t(sizeof(In)));
}

template <class In, bool kValue, bool kContiguous>
void backward_row(const SoftmaxMomentsBackwardParams<In>& params, const MomentCotangent<Accumulator<In>>& map,
                  const int64_t (&offset)[SoftmaxMomentsBackwardParams<In>::kOperands], int64_t i, int64_t j,
                  bool stream) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  const auto step_of = [&](int operand) { return kContiguous ? 1 : params.stride[operand][2]; };
  const int64_t from = step_of(Params::kLogits), to = step_of(Params::kGradLogits);
  const int64_t value_from = step_of(Params::kValues), value_to = step_of(Params::kGradValues);
  const In* row = row_of(params.logits + offset[Params::kLogits], params.stride[Params::kLogits], i, j);
  In* out = row_of(params.grad_logits + offset[Params::kGradLogits], params.stride[Params::kGradLogits], i, j);
  const In* values = nullptr;
  In* value_out = nullptr;
  if constexpr (kValue) {
    values = row_of(params.values + offset[Params::kValues], params.stride[Params::kValues], i, j);
    value_out = row_of(params.grad_values + offset[Params::kGradValues], params.stride[Params::kGradValues], i, j);
  }
  if (!map.valid) {
    for_lanes<N>(params.size[2], [&](int64_t k, auto lanes) TRITOOL_INLINE {
      store_lanes(out + k * to, to, lanes, P(T(0)));
      if constexpr (kValue) store_lanes(value_out + k * value_to, value_to, lanes, P(T(0)));
    });
    return;
  }
  T t[3];
  map.row(T(i), T(j), t);
  const P c = P(params.c), level = P(map.level), factor = P(params.inverse_temperature * map.inverse_sum);
  const P t0 = P(t[0]), t1 = P(t[1]), t2 = P(t[2]);
  const ValueCotangent<P> value{P(map.value.grad), P(map.value.expectation), P(map.value.floor)};
  P k_lanes = lane_numbers<P>();
  for_lanes<N>(params.size[2], [&](int64_t k, auto lanes) TRITOOL_INLINE {
    const P weight = softmax_weight(c, load_lanes<P>(row + k * from, from, lanes), level);
    prefetch(row + k * from);
    const P d = k_lanes - P(map.mean[2]);
    k_lanes = k_lanes + P(T(N));
    P slope = t0 + d * (t1 + d * t2);
    if constexpr (kValue) {
      slope = slope + value.term(weight, load_lanes<P>(values + k * value_from, value_from, lanes));
      store_lanes(value_out + k * value_to, value_to, lanes, weight * P(map.inverse_sum) * value.grad);
    }
    const P gradient = weight * factor * slope;
    if constexpr (std::is_same_v<In, T>)
      if (stream) return stream_pack(out + k, gradient);
    store_lanes(out + k * to, to, lanes, gradient);
  });
}

// Neighbouring maps' cotangents, one a lane.
template <class In, class P>
struct CotangentLanes {
  using T = Accumulator<In>;
  MomentCotangent<T> maps[P::kLanes];
  P level = P(T(0)), factor = level, inverse_sum = level, mean = level, valid = level;
  ValueCotangent<P> value{level, level, level};

  // Lanes past the last map repeat it.
  CotangentLanes(const SoftmaxMomentsBackwardParams<In>& params, int64_t first_map, int lanes) {
    for (int lane = 0; lane < P::kLanes; ++lane) {
      maps[lane] = moment_cotangent(params, first_map + (lane < lanes ? lane : lanes - 1));
      const MomentCotangent<T>& map = maps[lane];
      level.v[lane] = map.valid ? map.level : T(0);
      factor.v[lane] = params.inverse_temperature * map.inverse_sum;
      inverse_sum.v[lane] = map.inverse_sum;
      mean.v[lane] = map.mean[2];
      valid.v[lane] = T(map.valid);
      value.grad.v[lane] = map.value.grad;
      value.expectation.v[lane] = map.value.expectation;
      value.floor.v[lane] = map.value.floor;
    }
  }

  TRITOOL_HD void row(int64_t i, int64_t j, P (&t)[3]) const {
    for (int lane = 0; lane < P::kLanes; ++lane) {
      T lane_t[3];
      maps[lane].row(T(i), T(j), lane_t);
      for (int n = 0; n < 3; ++n) t[n].v[lane] = lane_t[n];
    }
  }
};

template <class In, bool kValue, class P>
void backward_group_row(const SoftmaxMomentsBackwardParams<In>& params, const CotangentLanes<In, P>& maps,
                        const int64_t (&offset)[SoftmaxMomentsBackwardParams<In>::kOperands], int lanes, int64_t i,
                        int64_t j) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  const int64_t (&from)[3] = params.stride[Params::kLogits];
  const int64_t (&to)[3] = params.stride[Params::kGradLogits];
  const int64_t (&value_from)[3] = params.stride[Params::kValues];
  const int64_t (&value_to)[3] = params.stride[Params::kGradValues];
  const In* logits = row_of(params.logits + offset[Params::kLogits], from, i, j);
  In* out = row_of(params.grad_logits + offset[Params::kGradLogits], to, i, j);
  const In* values = kValue ? row_of(params.values + offset[Params::kValues], value_from, i, j) : nullptr;
  In* value_out = kValue ? row_of(params.grad_values + offset[Params::kGradValues], value_to, i, j) : nullptr;
  const auto valid = maps.valid > P(T(0));
  P t[3] = {P(T(0)), P(T(0)), P(T(0))};
  maps.row(i, j, t);
  for (int64_t k = 0; k < params.size[2]; ++k) {
    const P weight = softmax_weight(P(params.c), load_lanes<P>(logits + k * from[2], 1, lanes), maps.level);
    const P d = P(T(k)) - maps.mean;
    P slope = t[0] + d * (t[1] + d * t[2]);
    if constexpr (kValue) {
      slope = slope + maps.value.term(weight, load_lanes<P>(values + k * value_from[2], 1, lanes));
      const P value_gradient = weight * maps.inverse_sum * maps.value.grad;
      store_lanes(value_out + k * value_to[2], 1, lanes, select(valid, value_gradient, P(T(0))));
    }
    store_lanes(out + k * to[2], 1, lanes, select(valid, weight * maps.factor * slope, P(T(0))));
  }
}

// The rows of all maps, or of all groups of adjacent maps.
template <class In, bool kValue>
void backward_rows(const SoftmaxMomentsBackwardParams<In>& params, int64_t begin, int64_t end) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  using P = NativePack<T>;
  constexpr int N = P::kLanes;
  const int64_t rows = params.size[0] * params.size[1];
  const MapGroups groups = map_groups(params.maps, N);
  const bool stream = streams(params);
  bool contiguous = true;
  for (int o = 0; o < (kValue ? Params::kOperands : Params::kValues); ++o)
    contiguous = contiguous && params.stride[o][2] == 1;
  const auto backward_row_of = contiguous ? &backward_row<In, kValue, true> : &backward_row<In, kValue, false>;
  for (int64_t item = begin; item < end;) {
    const int64_t index = item / rows;
    const int64_t stop = (index + 1) * rows < end ? (index + 1) * rows : end;
    int64_t offset[Params::kOperands];
    if (!params.maps_adjacent) {
      params.maps.offsets(index, offset);
      const MomentCotangent<T> map = moment_cotangent(params, index);
      for (; item < stop; ++item) {
        const int64_t row = item - index * rows;
        backward_row_of(params, map, offset, row / params.size[1], row % params.size[1], stream);
      }
      continue;
    }
    const int64_t outer = index / groups.groups;
    const int64_t first_in_group = (index - outer * groups.groups) * N;
    const int lanes = lanes_left(groups.inner - first_in_group, N);
    const int64_t first_map = outer * groups.inner + first_in_group;
    params.maps.offsets(first_map, offset);
    const CotangentLanes<In, P> maps(params, first_map, lanes);
    for (; item < stop; ++item) {
      const int64_t row = item - index * rows;
      backward_group_row<In, kValue>(params, maps, offset, lanes, row / params.size[1], row % params.size[1]);
    }
  }
  if (stream) fence_streams();
}

template <class In>
void backward(const SoftmaxMomentsBackwardParams<In>& params, int64_t begin, int64_t end) {
  params.values != nullptr ? backward_rows<In, true>(params, begin, end) : backward_rows<In, false>(params, begin, end);
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
