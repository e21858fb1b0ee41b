// SPDX-License-Identifier: Apache-2.0
// One SIMD lane per point: the formulas of math/triangulate.h on 4, 8 or 16 points at once.
#include "kernels/lanes.h"
#include "kernels/shared_sum_cpu.h"
#include "kernels/triangulate.h"
#include "math/triangulate.h"

namespace tritool {
namespace cpu {
namespace TRITOOL_ISA {
namespace {

// The views of one group of neighbouring points, gathered into lanes. Lanes past the last point repeat it.
template <class T, int N>
struct LaneViews {
  int count;
  const T* points[N];
  const T* projections[N];
  const T* weights[N];
  const int64_t* points_stride;
  const int64_t* projections_stride;
  int64_t weights_stride;
  bool weighted;
  bool same_projections;

  TRITOOL_HD Observation<Pack<T, N>> operator()(int view) const {
    Observation<Pack<T, N>> observation;
    const int64_t at = view * points_stride[0];
    observation.u = gather(points, at);
    observation.v = gather(points, at + points_stride[1]);
    observation.weight = weight(view);
    load_projection(view, observation.projection);
    return observation;
  }
  TRITOOL_HD Pack<T, N> weight(int view) const {
    return weighted ? gather(weights, view * weights_stride) : Pack<T, N>(T(1));
  }
  TRITOOL_HD void load_projection(int view, Pack<T, N> (&projection)[3][4]) const {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int64_t entry = view * projections_stride[0] + i * projections_stride[1] + j * projections_stride[2];
        projection[i][j] = gather_shared(projections, same_projections, entry);
      }
    }
  }
};

// The same, gathered once: the formulas pass over the views three or four times.
template <class T, int N>
struct StagedViews {
  int count;
  const LaneViews<T, N>& views;
  Pack<T, N> points[2 * kMostStaged], weights[kMostStaged];

  TRITOOL_HD explicit StagedViews(const LaneViews<T, N>& from) : count(from.count), views(from) {
    gather_rows<2>(views.points, views.points_stride[0], views.points_stride[1], 0, count, points);
    if (views.weighted)
      gather_rows<1>(views.weights, views.weights_stride, 0, 0, count, weights);
    else
      for (int view = 0; view < count; ++view) weights[view] = T(1);
  }
  TRITOOL_HD Observation<Pack<T, N>> operator()(int view) const {
    Observation<Pack<T, N>> observation;
    observation.u = points[2 * view];
    observation.v = points[2 * view + 1];
    observation.weight = weights[view];
    views.load_projection(view, observation.projection);
    return observation;
  }
};

template <class T, int N, class Params>
TRITOOL_HD LaneViews<T, N> lane_views(const Params& params, const int64_t (&offset)[N][Params::kOperands]) {
  LaneViews<T, N> views;
  views.count = params.views;
  views.weighted = params.weights != nullptr;
  views.same_projections = true;
  for (int lane = 0; lane < N; ++lane) {
    views.points[lane] = params.points + offset[lane][Params::kPoints];
    views.projections[lane] = params.projections + offset[lane][Params::kProjections];
    views.weights[lane] = views.weighted ? params.weights + offset[lane][Params::kWeights] : nullptr;
    views.same_projections = views.same_projections && views.projections[lane] == views.projections[0];
  }
  views.points_stride = params.points_stride;
  views.projections_stride = params.projections_stride;
  views.weights_stride = params.weights_stride;
  return views;
}

template <class T>
void forward(const TriangulateParams<T>& params, int64_t begin, int64_t end) {
  using Params = TriangulateParams<T>;
  constexpr int N = kLanesOf<T>;
  using P = Pack<T, N>;
  for (int64_t first = begin; first < end; first += N) {
    int64_t offset[N][Params::kOperands];
    const int lanes = lane_offsets<N>(params.batch, first, end, offset);
    P point[3];
    const LaneViews<T, N> views = lane_views<T, N>(params, offset);
    if (views.count <= kMostStaged)
      triangulate_point<P>(StagedViews<T, N>(views), params.homogeneous, point);
    else
      triangulate_point<P>(views, params.homogeneous, point);
    for (int lane = 0; lane < lanes; ++lane)
      for (int k = 0; k < 3; ++k) params.points_3d[offset[lane][Params::kPoints3d] + k] = point[k].v[lane];
  }
}

// Takes the gradients of one view for a group of points; those to the shared projections are added at once, the others
// stored by store(), as many at a time as are staged.
template <class T, int N>
struct LaneSink {
  const TriangulateBackwardParams<T>& params;
  const int64_t (&offset)[N][TriangulateBackwardParams<T>::kOperands];
  SharedSumLanes<T, N> projections;
  int lanes;
  bool streamed;
  int first = 0, count = 0;  // the views that wait
  Pack<T, N> points[2 * kMostStaged], weights[kMostStaged];

  TRITOOL_HD void operator()(int view, const ObservationGradient<Pack<T, N>>& gradient) {
    points[2 * count] = gradient.u;
    points[2 * count + 1] = gradient.v;
    weights[count] = gradient.weight;
    if (++count == kMostStaged) store();
    if (params.grad_projections != nullptr) projections.template add<12>(view * 12, &gradient.projection[0][0]);
  }
  TRITOOL_HD void store() {
    using Params = TriangulateBackwardParams<T>;
    const auto write_run = [&](T* base, int operand, int size, const Pack<T, N>* values) {
      if (base == nullptr) return;
      T* to[N];
      for (int lane = 0; lane < N; ++lane) to[lane] = base + offset[lane][operand] + size * first;
      stream_run<N>(to, lanes, size * count, values, streamed);
    };
    write_run(params.grad_points, Params::kGradPoints, 2, points);
    write_run(params.grad_weights, Params::kGradWeights, 1, weights);
    first += count;
    count = 0;
  }
};

template <class T>
void backward(const TriangulateBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end) {
  using Params = TriangulateBackwardParams<T>;
  constexpr int N = kLanesOf<T>;
  using P = Pack<T, N>;
  const bool summed = params.grad_projections != nullptr;
  const bool streamed = is_streamed(params.batch.count * params.views * 2 * int64_t(sizeof(T)));
  for (int64_t unit = begin; unit < end; ++unit) {
    const ItemRange range = unit_items(plan, params.batch.count, params.batch.shared, unit);
    T* partial = !summed ? nullptr
                         : begin_unit(plan, params.batch, Params::kGradProjections, range, unit,
                                      params.grad_projections, params.partial_sums);
    for (int64_t first = range.begin; first < range.end; first += N) {
      int64_t offset[N][Params::kOperands];
      const int lanes = lane_offsets<N>(params.batch, first, range.end, offset);
      const T* grads[N];
      for (int lane = 0; lane < N; ++lane) grads[lane] = params.grad + offset[lane][Params::kGrad];
      const P grad[3] = {gather(grads, 0), gather(grads, params.grad_stride), gather(grads, 2 * params.grad_stride)};
      LaneSink<T, N> sink{params, offset, {}, lanes, streamed, 0, 0, {}, {}};
      if (summed)
        sink.projections = sum_targets<T, N>(offset, Params::kGradProjections, params.grad_projections, partial, lanes);
      const LaneViews<T, N> views = lane_views<T, N>(params, offset);
      if (views.count <= kMostStaged)
        triangulate_point_vjp<P>(StagedViews<T, N>(views), params.homogeneous, grad, sink);
      else
        triangulate_point_vjp<P>(views, params.homogeneous, grad, sink);
      sink.store();
    }
  }
  if (streamed) fence_streams();
}

template <class T>
void backward_sum(const TriangulateBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end) {
  add_partial_sums(plan, params.batch, TriangulateBackwardParams<T>::kGradProjections, params.grad_projections,
                   params.partial_sums, begin, end);
}

}  // namespace

template <class T>
const TriangulateKernels<T>& triangulate_kernels() {
  static const TriangulateKernels<T> kernels{&forward<T>, &backward<T>, &backward_sum<T>};
  return kernels;
}
template const TriangulateKernels<float>& triangulate_kernels<float>();
template const TriangulateKernels<double>& triangulate_kernels<double>();

}  // namespace TRITOOL_ISA
}  // namespace cpu
}  // namespace tritool
