// SPDX-License-Identifier: Apache-2.0
// One thread per point and view forward; one per point backward, or one warp per unit where projections are shared.
#include "kernels/launch.cuh"
#include "kernels/project.h"
#include "kernels/shared_sum.cuh"
#include "math/project.h"

namespace tritool {
namespace {

constexpr int kBlock = 128;
constexpr int kPointsPerThread = 4;  // where they share their matrices
constexpr int kMaxRig = 256;         // views whose matrices shared memory holds

// Index: int32_t or int64_t, see Batch::offsets.
template <class T, class Params, class Index>
__device__ __forceinline__ void load_point(const Params& params, Index offset, T (&point)[3]) {
  for (int k = 0; k < 3; ++k) point[k] = params.points[offset + k * static_cast<Index>(params.points_stride)];
}
template <class T, class Params>
__device__ __forceinline__ void load_matrix(const Params& params, int64_t offset, int view, T (&matrix)[3][4]) {
  const T* from = params.projections + offset + view * params.projections_stride[0];
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j)
      matrix[i][j] = from[i * params.projections_stride[1] + j * params.projections_stride[2]];
}

// Neighbours write neighbouring pixels, each at once.
template <class T, class Index>
__device__ __forceinline__ void store_pixel(const ProjectParams<T>& params, Index offset, const T (&pixel)[2]) {
  *reinterpret_cast<Vector<T, 2>*>(params.pixels + offset) = {{pixel[0], pixel[1]}};
}

// One thread per point and view. A block is as wide as there are views, so that no thread divides to find its own.
template <class T>
__global__ void __launch_bounds__(kBlock) project_kernel(ProjectParams<T> params) {
  using Params = ProjectParams<T>;
  for (int64_t item = int64_t(blockIdx.x) * blockDim.y + threadIdx.y; item < params.batch.count;
       item += int64_t(gridDim.x) * blockDim.y) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T point[3];
    load_point(params, offset[Params::kPoints], point);
    for (int view = threadIdx.x; view < params.views; view += blockDim.x) {
      T matrix[3][4];
      load_matrix(params, offset[Params::kProjections], view, matrix);
      store_pixel(params, offset[Params::kPixels] + 2 * view, project_point(point, matrix).pixel);
    }
  }
}

// The same for one rig: all points share their matrices, and int32_t holds all offsets: a thread keeps the matrix of
// its view for several points. They are all loaded before the first pixel is stored, as the compiler cannot know that
// the two do not overlap. The grid has a thread for everything.
template <class T>
__global__ void __launch_bounds__(kBlock) project_rig_kernel(ProjectParams<T> params) {
  using Params = ProjectParams<T>;
  const int count = static_cast<int>(params.batch.count), rows = blockDim.y;
  const int first = static_cast<int>(blockIdx.x) * rows * kPointsPerThread + static_cast<int>(threadIdx.y);
  int offset[kPointsPerThread][Params::kOperands];
  T point[kPointsPerThread][3];
#pragma unroll
  for (int n = 0; n < kPointsPerThread; ++n) {
    const int item = first + n * rows;
    params.batch.offsets(item < count ? item : count - 1, offset[n]);  // beyond the last: not stored
    load_point(params, offset[n][Params::kPoints], point[n]);
  }
  for (int view = threadIdx.x; view < params.views; view += blockDim.x) {
    T matrix[3][4];
    load_matrix(params, 0, view, matrix);
#pragma unroll
    for (int n = 0; n < kPointsPerThread; ++n) {
      const Projection<T> projection = project_point(point[n], matrix);
      if (first + n * rows < count) store_pixel(params, offset[n][Params::kPixels] + 2 * view, projection.pixel);
    }
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

// The same for one rig, whose own gradient is not wanted: its matrices lie in shared memory, pixels' gradients are
// loaded whole, int32_t holds all offsets. The grid has a thread for every point.
template <class T>
__global__ void __launch_bounds__(kBlock) project_backward_rig_kernel(ProjectBackwardParams<T> params) {
  using Params = ProjectBackwardParams<T>;
  constexpr int kAtOnce = 16 / sizeof(T);
  TRITOOL_DYNAMIC_SHARED(T, matrices);  // [views, 3, 4]
#pragma unroll 1
  for (int n = threadIdx.x; n < params.views * 12; n += kBlock)
    matrices[n] = params.projections[n / 12 * params.projections_stride[0] + n / 4 % 3 * params.projections_stride[1] +
                                     n % 4 * params.projections_stride[2]];
  __syncthreads();
  const int item = static_cast<int>(blockIdx.x * kBlock + threadIdx.x);
  if (item >= params.batch.count) return;
  int offset[Params::kOperands];
  params.batch.offsets(item, offset);
  T point[3], grad_point[3] = {T(0), T(0), T(0)};
  load_point(params, offset[Params::kPoints], point);
  for (int view = 0; view < params.views; ++view) {
    T matrix[3][4], unused[3][4];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 4; j += kAtOnce) {
        const auto part = *reinterpret_cast<const Vector<T, kAtOnce>*>(matrices + 12 * view + 4 * i + j);
        for (int k = 0; k < kAtOnce; ++k) matrix[i][j + k] = part.element[k];
      }
    }
    const auto grad = *reinterpret_cast<const Vector<T, 2>*>(params.grad + offset[Params::kGrad] + 2 * view);
    project_point_vjp(point, matrix, grad.element, grad_point, unused);
  }
  for (int k = 0; k < 3; ++k) params.grad_points[offset[Params::kGradPoints] + k] = grad_point[k];
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

// So many, with all threads of the blocks that the last of them are in.
constexpr int64_t kInt32Items = 2147483647 - kBlock * kPointsPerThread;

// Whether all points share their matrices.
template <class Params>
bool shares_projections(const Params& params) {
  for (int d = 0; d < params.batch.dims; ++d)
    if (params.batch.stride[d][Params::kProjections] != 0) return false;
  return true;
}

// Whether project_backward_rig_kernel may do it.
template <class T>
bool is_one_rig(const ProjectBackwardParams<T>& params) {
  using Params = ProjectBackwardParams<T>;
  bool pairs = params.grad_stride[1] == 1 && (params.grad_stride[0] == 2 || params.views == 1) &&
               reinterpret_cast<uintptr_t>(params.grad) % (2 * sizeof(T)) == 0;
  for (int d = 0; d < params.batch.dims; ++d) pairs = pairs && params.batch.stride[d][Params::kGrad] % 2 == 0;
  return pairs && shares_projections(params) && params.grad_projections == nullptr && params.grad_points != nullptr &&
         params.views <= kMaxRig && params.batch.count <= kInt32Items &&
         params.batch.fits_int32(Params::kGrad, 2 * params.views) &&
         params.batch.fits_int32(Params::kPoints, 2 * params.points_stride) &&
         params.batch.fits_int32(Params::kGradPoints, 2);
}

}  // namespace

namespace cuda {

template <class T>
int project(const ProjectParams<T>& params, CUstream_st* stream) {
  if (params.batch.count == 0 || params.views == 0) return 0;
  const unsigned width = params.views < kBlock ? params.views : kBlock;
  const dim3 block(width, kBlock / width);
  if (shares_projections(params) && params.batch.count <= kInt32Items &&
      params.batch.fits_int32(ProjectParams<T>::kPoints, 2 * params.points_stride) &&
      params.batch.fits_int32(ProjectParams<T>::kPixels, 2 * int64_t(params.views))) {
    TRITOOL_LAUNCH(project_rig_kernel<T>, grid_size(params.batch.count, int64_t(block.y) * kPointsPerThread), block, 0,
                   stream, params);
    return last_launch_error();
  }
  TRITOOL_LAUNCH(project_kernel<T>, grid_size(params.batch.count, block.y), block, 0, stream, params);
  return last_launch_error();
}

template <class T>
int project_backward(const ProjectBackwardParams<T>& params, const SharedSumPlan& plan, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  if (is_one_rig(params)) {
    TRITOOL_LAUNCH(project_backward_rig_kernel<T>, grid_size(params.batch.count, kBlock), kBlock,
                   12 * sizeof(T) * params.views, stream, params);
    return last_launch_error();
  }
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
