// SPDX-License-Identifier: Apache-2.0
// One thread per point and view forward; one per point backward, or one warp per unit where projections are shared.
#include "kernels/launch.cuh"
#include "kernels/project.h"
#include "kernels/shared_sum.cuh"
#include "math/project.h"

namespace tritool {
namespace {

constexpr int kBlock = 128;

template <class T, class Params>
__device__ __forceinline__ void load_point(const Params& params, int64_t offset, T (&point)[3]) {
  for (int k = 0; k < 3; ++k) point[k] = params.points[offset + k * params.points_stride];
}
template <class T, class Params>
__device__ __forceinline__ void load_matrix(const Params& params, int64_t offset, int view, T (&matrix)[3][4]) {
  const T* from = params.projections + offset + view * params.projections_stride[0];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j)
      matrix[i][j] = from[i * params.projections_stride[1] + j * params.projections_stride[2]];
}

template <class T>
__global__ void __launch_bounds__(kBlock) project_kernel(ProjectParams<T> params) {
  using Params = ProjectParams<T>;
  const int64_t count = params.batch.count * params.views;
  for (int64_t index = thread_index(); index < count; index += thread_count()) {
    const int64_t item = index / params.views;
    const int view = static_cast<int>(index - item * params.views);
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T point[3], matrix[3][4];
    load_point(params, offset[Params::kPoints], point);
    load_matrix(params, offset[Params::kProjections], view, matrix);
    const Projection<T> projection = project_point(point, matrix);
    for (int k = 0; k < 2; ++k) params.pixels[offset[Params::kPixels] + 2 * view + k] = projection.pixel[k];
  }
}

// The gradients of one point; `store(view, grad_matrix)` takes each view's.
template <class T, class Store>
__device__ __forceinline__ void point_backward(const ProjectBackwardParams<T>& params, const int64_t* offset,
                                               bool active, Store&& store) {
  using Params = ProjectBackwardParams<T>;
  T point[3], grad_point[3] = {T(0), T(0), T(0)};
  load_point(params, offset[Params::kPoints], point);
  for (int view = 0; view < params.views; ++view) {
    T matrix[3][4], grad_matrix[3][4];
    load_matrix(params, offset[Params::kProjections], view, matrix);
    const T* from = params.grad + offset[Params::kGrad] + view * params.grad_stride[0];
    const T grad[2] = {from[0], from[params.grad_stride[1]]};
    project_point_vjp(point, matrix, grad, grad_point, grad_matrix);
    store(view, grad_matrix);
  }
  if (params.grad_points == nullptr || !active) return;
  for (int k = 0; k < 3; ++k) params.grad_points[offset[Params::kGradPoints] + k] = grad_point[k];
}

template <class T>
__global__ void __launch_bounds__(kBlock) project_backward_kernel(ProjectBackwardParams<T> params) {
  using Params = ProjectBackwardParams<T>;
  for (int64_t item = thread_index(); item < params.batch.count; item += thread_count()) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    point_backward(params, offset, true, [&](int view, const T(&grad_matrix)[3][4]) {
      if (params.grad_projections == nullptr) return;
      T* out = params.grad_projections + offset[Params::kGradProjections] + 12 * view;
      for (int i = 0; i < 3; ++i)
        for (int j = 0; j < 4; ++j) out[4 * i + j] = grad_matrix[i][j];
    });
  }
}

template <class T>
__global__ void __launch_bounds__(kSharedSumBlock)
    project_backward_shared_kernel(ProjectBackwardParams<T> params, SharedSumPlan plan) {
  using Params = ProjectBackwardParams<T>;
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t unit = thread_index() / kWarpSize; unit < plan.units; unit += thread_count() / kWarpSize) {
    const ItemRange range = unit_items(plan, params.batch.count, params.batch.shared, unit);
    T* sum = begin_warp_unit(plan, params.batch, Params::kGradProjections, range.begin, unit, params.grad_projections,
                             params.partial_sums);
    for (int64_t first = range.begin; first < range.end; first += kWarpSize) {
      const bool active = first + lane < range.end;
      int64_t offset[Params::kOperands];
      params.batch.offsets(active ? first + lane : range.end - 1, offset);
      point_backward(params, offset, active, [&](int view, const T(&grad_matrix)[3][4]) {
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 4; ++j) warp_add(sum + 12 * view + 4 * i + j, active ? grad_matrix[i][j] : T(0));
      });
    }
  }
}

}  // namespace

namespace cuda {

template <class T>
int project(const ProjectParams<T>& params, CUstream_st* stream) {
  const int64_t count = params.batch.count * params.views;
  if (count == 0) return 0;
  TRITOOL_LAUNCH(project_kernel<T>, grid_size(count, kBlock), kBlock, 0, stream, params);
  return last_launch_error();
}

template <class T>
int project_backward(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  if (params.grad_projections == nullptr || params.batch.shared == 1) {
    TRITOOL_LAUNCH(project_backward_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
    return last_launch_error();
  }
  TRITOOL_LAUNCH(project_backward_shared_kernel<T>, grid_size(plan.units, kSharedSumBlock / kWarpSize), kSharedSumBlock,
                 0, stream, params, plan);
  add_partial_sums<ProjectBackwardParams<T>::kGradProjections>(plan, params.batch, params.grad_projections,
                                                               params.partial_sums, stream);
  return last_launch_error();
}

template int project<float>(const ProjectParams<float>&, CUstream_st*);
template int project<double>(const ProjectParams<double>&, CUstream_st*);
template int project_backward<float>(const ProjectBackwardParams<float>&, const SharedSumPlan&, CUstream_st*);
template int project_backward<double>(const ProjectBackwardParams<double>&, const SharedSumPlan&, CUstream_st*);

}  // namespace cuda
}  // namespace tritool
