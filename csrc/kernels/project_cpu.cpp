// SPDX-License-Identifier: Apache-2.0
// One SIMD lane per point, views one after the other.
#include "kernels/lanes.h"
#include "kernels/project.h"
#include "kernels/shared_sum_cpu.h"
#include "math/project.h"

namespace tritool {
namespace cpu {
namespace TRITOOL_ISA {
namespace {

// The points and matrices of one group of neighbouring items.
template <class T, int N>
struct LaneItems {
  const T* projections[N];
  const int64_t* projections_stride;
  bool same_projections;
  Pack<T, N> point[3];

  template <class Params>
  TRITOOL_HD LaneItems(const Params& params, const int64_t (&offset)[N][Params::kOperands])
      : projections_stride(params.projections_stride), same_projections(true) {
    const T* points[N];
    for (int lane = 0; lane < N; ++lane) {
      points[lane] = params.points + offset[lane][Params::kPoints];
      projections[lane] = params.projections + offset[lane][Params::kProjections];
      same_projections = same_projections && projections[lane] == projections[0];
    }
    for (int k = 0; k < 3; ++k) point[k] = gather(points, k * params.points_stride);
  }

  TRITOOL_HD void load_matrix(int view, Pack<T, N> (&matrix)[3][4]) const {
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j)
        matrix[i][j] =
            gather_shared(projections, same_projections,
                          view * projections_stride[0] + i * projections_stride[1] + j * projections_stride[2]);
  }
};

template <class T>
void forward(const ProjectParams<T>& params, int64_t begin, int64_t end) {
  using Params = ProjectParams<T>;
  constexpr int N = kLanesOf<T>;
  using P = Pack<T, N>;
  const bool streamed = is_streamed(params.batch.count * params.views * 2 * int64_t(sizeof(T)));
  for (int64_t first = begin; first < end; first += N) {
    int64_t offset[N][Params::kOperands];
    const int lanes = lane_offsets<N>(params.batch, first, end, offset);
    const LaneItems<T, N> items(params, offset);
    for (int from = 0; from < params.views; from += kMostStaged) {
      const int views = params.views - from < kMostStaged ? params.views - from : kMostStaged;
      P pixels[2 * kMostStaged];
      for (int view = 0; view < views; ++view) {
        P matrix[3][4];
        items.load_matrix(from + view, matrix);
        const Projection<P> projection = project_point(items.point, matrix);
        for (int k = 0; k < 2; ++k) pixels[2 * view + k] = projection.pixel[k];
      }
      T* to[N];
      for (int lane = 0; lane < N; ++lane) to[lane] = params.pixels + offset[lane][Params::kPixels] + 2 * from;
      stream_run<N>(to, lanes, 2 * views, pixels, streamed);
    }
  }
  if (streamed) fence_streams();
}

template <class T>
void backward(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end) {
  using Params = ProjectBackwardParams<T>;
  constexpr int N = kLanesOf<T>;
  using P = Pack<T, N>;
  const bool summed = params.grad_projections != nullptr;
  for (int64_t unit = begin; unit < end; ++unit) {
    const ItemRange range = unit_items(plan, params.batch.count, params.batch.shared, unit);
    T* partial = !summed ? nullptr
                         : begin_unit(plan, params.batch, Params::kGradProjections, range, unit,
                                      params.grad_projections, params.partial_sums);
    for (int64_t first = range.begin; first < range.end; first += N) {
      int64_t offset[N][Params::kOperands];
      const int lanes = lane_offsets<N>(params.batch, first, range.end, offset);
      const LaneItems<T, N> items(params, offset);
      const T* grads[N];
      for (int lane = 0; lane < N; ++lane) grads[lane] = params.grad + offset[lane][Params::kGrad];
      SharedSumLanes<T, N> targets{};
      if (summed)
        targets = sum_targets<T, N>(offset, Params::kGradProjections, params.grad_projections, partial, lanes);
      P grad_point[3] = {P(T(0)), P(T(0)), P(T(0))};
      for (int from = 0; from < params.views; from += kMostStaged) {
        const int views = params.views - from < kMostStaged ? params.views - from : kMostStaged;
        P pixels[2 * kMostStaged];
        gather_rows<2>(grads, params.grad_stride[0], params.grad_stride[1], from, views, pixels);
        for (int view = 0; view < views; ++view) {
          P matrix[3][4], grad_matrix[3][4];
          items.load_matrix(from + view, matrix);
          const P grad[2] = {pixels[2 * view], pixels[2 * view + 1]};
          project_point_vjp(items.point, matrix, grad, grad_point, grad_matrix);
          if (summed) targets.template add<12>((from + view) * 12, &grad_matrix[0][0]);
        }
      }
      for (int lane = 0; params.grad_points != nullptr && lane < lanes; ++lane)
        for (int k = 0; k < 3; ++k) params.grad_points[offset[lane][Params::kGradPoints] + k] = grad_point[k].v[lane];
    }
  }
}

template <class T>
void backward_sum(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, int64_t begin, int64_t end) {
  add_partial_sums(plan, params.batch, ProjectBackwardParams<T>::kGradProjections, params.grad_projections,
                   params.partial_sums, begin, end);
}

}  // namespace

template <class T>
const ProjectKernels<T>& project_kernels() {
  static const ProjectKernels<T> kernels{&forward<T>, &backward<T>, &backward_sum<T>};
  return kernels;
}
template const ProjectKernels<float>& project_kernels<float>();
template const ProjectKernels<double>& project_kernels<double>();

}  // namespace TRITOOL_ISA
}  // namespace cpu
}  // namespace tritool
