// SPDX-License-Identifier: Apache-2.0
// One SIMD lane per set of points: the formulas of math/rigid_align.h on 4, 8 or 16 sets at once.
#include "kernels/lanes.h"
#include "kernels/rigid_align.h"
#include "math/rigid_align.h"

namespace tritool {
namespace cpu {
namespace TRITOOL_ISA {
namespace {

// The points of one group of neighbouring sets, gathered into lanes. Lanes past the last set repeat it.
template <class T, int N>
struct LanePoints {
  int count;
  bool weighted;
  const T* source[N];
  const T* target[N];
  const T* weights[N];
  const int64_t* source_stride;
  const int64_t* target_stride;
  int64_t weights_stride;
  bool same_source, same_target;

  template <class Params>
  TRITOOL_HD LanePoints(const Params& params, const int64_t (&offset)[N][Params::kOperands])
      : count(params.points),
        weighted(params.weights != nullptr),
        source_stride(params.source_stride),
        target_stride(params.target_stride),
        weights_stride(params.weights_stride),
        same_source(true),
        same_target(true) {
    for (int lane = 0; lane < N; ++lane) {
      source[lane] = params.source + offset[lane][Params::kSource];
      target[lane] = params.target + offset[lane][Params::kTarget];
      weights[lane] = weighted ? params.weights + offset[lane][Params::kWeights] : source[lane];  // or never read
      same_source = same_source && source[lane] == source[0];
      same_target = same_target && target[lane] == target[0];
    }
  }

  TRITOOL_HD Correspondence<Pack<T, N>> operator()(int n) const {
    Correspondence<Pack<T, N>> point;
    for (int k = 0; k < 3; ++k) {
      point.source[k] = gather_shared(source, same_source, n * source_stride[0] + k * source_stride[1]);
      point.target[k] = gather_shared(target, same_target, n * target_stride[0] + k * target_stride[1]);
    }
    point.weight = weighted ? gather(weights, n * weights_stride) : Pack<T, N>(T(1));
    return point;
  }
};

// Asks for the sets of the group that comes next, one set at a time: there is so much to compute for each point that
// the processor's own prefetching loses the thread, and asked for all at once they keep everything else waiting.
template <class T, int N>
struct Prefetcher {
  const T* source[N];
  const T* target[N];
  int64_t bytes;
  int lane = 0;

  template <class Params>
  TRITOOL_HD Prefetcher(const Params& params, const int64_t (&offset)[N][Params::kOperands])
      : bytes(params.points * 3 * int64_t(sizeof(T))) {
    for (int n = 0; n < N; ++n) {
      source[n] = params.source + offset[n][Params::kSource];
      target[n] = params.target + offset[n][Params::kTarget];
    }
  }
  TRITOOL_HD void step() {
    constexpr int64_t kLine = 64;
    if (lane == N) return;
    for (int64_t at = 0; at < bytes; at += kLine) {
      __builtin_prefetch(reinterpret_cast<const char*>(source[lane]) + at);
      __builtin_prefetch(reinterpret_cast<const char*>(target[lane]) + at);
    }
    ++lane;
  }
};

// The points of small sets, gathered once: the formulas pass over them three times.
template <class T, int N>
struct StagedPoints {
  int count;
  bool weighted;
  Prefetcher<T, N>& next;
  Pack<T, N> source[3 * kMostStaged], target[3 * kMostStaged], weight[kMostStaged];

  TRITOOL_HD StagedPoints(const LanePoints<T, N>& points, Prefetcher<T, N>& next)
      : count(points.count), weighted(points.weighted), next(next) {
    stage(points.source, points.source_stride, points.same_source, source);
    stage(points.target, points.target_stride, points.same_target, target);
    if (weighted)
      gather_rows<1>(points.weights, points.weights_stride, 0, 0, count, weight);
    else
      for (int n = 0; n < count; ++n) weight[n] = T(1);
  }
  TRITOOL_HD Correspondence<Pack<T, N>> operator()(int n) const {
    next.step();
    Correspondence<Pack<T, N>> point;
    for (int k = 0; k < 3; ++k) {
      point.source[k] = source[3 * n + k];
      point.target[k] = target[3 * n + k];
    }
    point.weight = weight[n];
    return point;
  }

 private:
  TRITOOL_HD void stage(const T* const (&base)[N], const int64_t* stride, bool same, Pack<T, N>* result) const {
    if (!same) return gather_rows<3>(base, stride[0], stride[1], 0, count, result);
    for (int n = 0; n < count; ++n)
      for (int k = 0; k < 3; ++k) result[3 * n + k] = base[0][n * stride[0] + k * stride[1]];
  }
};

// A group of neighbouring sets: how many lanes hold one, and the offsets of their operands.
template <int N, int kOperands>
struct LaneGroup {
  int lanes;
  int64_t offset[N][kOperands];

  TRITOOL_HD LaneGroup(const Batch<kOperands>& batch, int64_t first, int64_t end)
      : lanes(lane_offsets<N>(batch, first, end, offset)) {}
};

template <class T>
void forward(const RigidAlignParams<T>& params, int64_t begin, int64_t end) {
  using Params = RigidAlignParams<T>;
  constexpr int N = kLanesOf<T>;
  using P = Pack<T, N>;
  if (begin == end) return;  // an empty batch has no offsets
  LaneGroup<N, Params::kOperands> next(params.batch, begin, end);
  for (int64_t first = begin; first < end; first += N) {
    const LaneGroup<N, Params::kOperands> group = next;
    const auto& offset = group.offset;
    const int lanes = group.lanes;
    if (first + N < end) next = LaneGroup<N, Params::kOperands>(params.batch, first + N, end);
    Prefetcher<T, N> prefetcher(params, next.offset);
    const LanePoints<T, N> points(params, offset);
    P rotation[3][3], translation[3], scale;
    if (points.count <= kMostStaged)
      rigid_align_points<P>(StagedPoints<T, N>(points, prefetcher), params.with_scale, rotation, translation, scale);
    else
      rigid_align_points<P>(points, params.with_scale, rotation, translation, scale);
    for (int lane = 0; lane < lanes; ++lane) {
      T* const rotations = params.rotation + offset[lane][Params::kRotation];
      T* const translations = params.translation + offset[lane][Params::kTranslation];
      for (int i = 0; i < 3; ++i) {
        for (int j = 0; j < 3; ++j) rotations[3 * i + j] = rotation[i][j].v[lane];
        translations[i] = translation[i].v[lane];
      }
      params.scale[offset[lane][Params::kScale]] = scale.v[lane];
    }
  }
}

// Where the gradients of one group of sets go; null where not wanted.
template <class T, int N>
struct LaneGradients {
  int lanes;
  T* source[N];
  T* target[N];
  T* weights[N];

  TRITOOL_HD LaneGradients(const RigidAlignBackwardParams<T>& params,
                           const int64_t (&offset)[N][RigidAlignBackwardParams<T>::kOperands], int lanes)
      : lanes(lanes) {
    using Params = RigidAlignBackwardParams<T>;
    for (int lane = 0; lane < N; ++lane) {
      source[lane] = at(params.grad_source, offset[lane][Params::kGradSource]);
      target[lane] = at(params.grad_target, offset[lane][Params::kGradTarget]);
      weights[lane] = at(params.grad_weights, offset[lane][Params::kGradWeights]);
    }
  }
  TRITOOL_HD void operator()(int n, const CorrespondenceGradient<Pack<T, N>>& gradient) {
    for (int lane = 0; lane < lanes; ++lane) {
      for (int k = 0; k < 3; ++k) {
        if (source[lane] != nullptr) source[lane][3 * n + k] = gradient.source[k].v[lane];
        if (target[lane] != nullptr) target[lane][3 * n + k] = gradient.target[k].v[lane];
      }
      if (weights[lane] != nullptr) weights[lane][n] = gradient.weight.v[lane];
    }
  }

 private:
  TRITOOL_HD static T* at(T* base, int64_t offset) { return base == nullptr ? nullptr : base + offset; }
};

// The same for as many points as StagedPoints takes, written at the end and in whole vectors.
template <class T, int N>
struct StagedGradients {
  Pack<T, N> source[3 * kMostStaged], target[3 * kMostStaged], weight[kMostStaged];

  TRITOOL_HD void operator()(int n, const CorrespondenceGradient<Pack<T, N>>& gradient) {
    for (int k = 0; k < 3; ++k) {
      source[3 * n + k] = gradient.source[k];
      target[3 * n + k] = gradient.target[k];
    }
    weight[n] = gradient.weight;
  }
  TRITOOL_HD void write(const LaneGradients<T, N>& to, int count, bool streamed) const {
    const auto write_run = [&](T* const(&base)[N], int length, const Pack<T, N>* values) {
      if (base[0] != nullptr) stream_run<N>(base, to.lanes, length, values, streamed);
    };
    write_run(to.source, 3 * count, source);
    write_run(to.target, 3 * count, target);
    write_run(to.weights, count, weight);
  }
};

template <class T, int N>
TRITOOL_HD Pack<T, N> gather_or_zero(const T* const (&base)[N], int64_t offset) {
  return base[0] == nullptr ? Pack<T, N>(T(0)) : gather(base, offset);
}

template <class T>
void backward(const RigidAlignBackwardParams<T>& params, int64_t begin, int64_t end) {
  using Params = RigidAlignBackwardParams<T>;
  constexpr int N = kLanesOf<T>;
  using P = Pack<T, N>;
  const bool streamed = is_streamed(params.batch.count * params.points * 3 * int64_t(sizeof(T)));
  if (begin == end) return;  // an empty batch has no offsets
  LaneGroup<N, Params::kOperands> next(params.batch, begin, end);
  for (int64_t first = begin; first < end; first += N) {
    const LaneGroup<N, Params::kOperands> group = next;
    const auto& offset = group.offset;
    const int lanes = group.lanes;
    if (first + N < end) next = LaneGroup<N, Params::kOperands>(params.batch, first + N, end);
    Prefetcher<T, N> prefetcher(params, next.offset);
    const T *rotations[N], *translations[N], *scales[N];
    for (int lane = 0; lane < N; ++lane) {
      const auto at = [&](const T* base, int operand) {
        return base == nullptr ? nullptr : base + offset[lane][operand];
      };
      rotations[lane] = at(params.grad_rotation, Params::kGradRotation);
      translations[lane] = at(params.grad_translation, Params::kGradTranslation);
      scales[lane] = at(params.grad_scale, Params::kGradScale);
    }
    P grad_rotation[3][3], grad_translation[3];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j)
        grad_rotation[i][j] =
            gather_or_zero(rotations, i * params.grad_rotation_stride[0] + j * params.grad_rotation_stride[1]);
      grad_translation[i] = gather_or_zero(translations, i * params.grad_translation_stride);
    }
    const P grad_scale = gather_or_zero(scales, 0);
    const LanePoints<T, N> points(params, offset);
    LaneGradients<T, N> gradients(params, offset, lanes);
    if (points.count <= kMostStaged) {
      StagedGradients<T, N> staged;
      rigid_align_points_vjp<P>(StagedPoints<T, N>(points, prefetcher), params.with_scale, grad_rotation,
                                grad_translation, grad_scale, staged);
      staged.write(gradients, points.count, streamed);
    } else {
      rigid_align_points_vjp<P>(points, params.with_scale, grad_rotation, grad_translation, grad_scale, gradients);
    }
  }
  if (streamed) fence_streams();
}

}  // namespace

template <class T>
const RigidAlignKernels<T>& rigid_align_kernels() {
  static const RigidAlignKernels<T> kernels{&forward<T>, &backward<T>};
  return kernels;
}
template const RigidAlignKernels<float>& rigid_align_kernels<float>();
template const RigidAlignKernels<double>& rigid_align_kernels<double>();

}  // namespace TRITOOL_ISA
}  // namespace cpu
}  // namespace tritool
