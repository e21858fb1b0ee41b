// SPDX-License-Identifier: Apache-2.0
// One thread per point. The backward has two shapes: a thread per point where every point has projections of its own
// (or their gradient is not wanted), and a warp per work unit where points share projections, whose gradient the warp
// adds up with shuffles in a fixed order. No atomics: the same input gives the same bits.
#include "kernels/launch.cuh"
#include "kernels/shared_sum.cuh"
#include "kernels/triangulate.h"
#include "math/triangulate.h"

namespace tritool {
namespace {

constexpr int kBlock = 128;

template <class T>
struct StridedViews {
  int count;
  const T* points;
  const T* projections;
  const T* weights;
  int64_t points_stride[2];
  int64_t projections_stride[3];
  int64_t weights_stride;

  template <class Params>
  __device__ __forceinline__ StridedViews(const Params& params, const int64_t (&offset)[Params::kOperands])
      : count(params.views),
        points(params.points + offset[Params::kPoints]),
        projections(params.projections + offset[Params::kProjections]),
        weights(params.weights == nullptr ? nullptr : params.weights + offset[Params::kWeights]),
        points_stride{params.points_stride[0], params.points_stride[1]},
        projections_stride{params.projections_stride[0], params.projections_stride[1], params.projections_stride[2]},
        weights_stride(params.weights_stride) {}

  __device__ __forceinline__ Observation<T> operator()(int view) const {
    Observation<T> observation;
    const T* pixel = points + view * points_stride[0];
    observation.u = pixel[0];
    observation.v = pixel[points_stride[1]];
    observation.weight = weights == nullptr ? T(1) : weights[view * weights_stride];
    const T* matrix = projections + view * projections_stride[0];
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j)
        observation.projection[i][j] = matrix[i * projections_stride[1] + j * projections_stride[2]];
    return observation;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock) triangulate_kernel(TriangulateParams<T> params) {
  using Params = TriangulateParams<T>;
  for (int64_t item = thread_index(); item < params.batch.count; item += thread_count()) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T point[3];
    triangulate_point<T>(StridedViews<T>(params, offset), params.homogeneous, point);
    for (int k = 0; k < 3; ++k) params.points_3d[offset[Params::kPoints3d] + k] = point[k];
  }
}

template <class T>
__device__ __forceinline__ void store_point_gradients(const TriangulateBackwardParams<T>& params, const int64_t* offset,
                                                      int view, const ObservationGradient<T>& gradient) {
  using Params = TriangulateBackwardParams<T>;
  if (params.grad_points != nullptr) {
    T* out = params.grad_points + offset[Params::kGradPoints] + 2 * view;
    out[0] = gradient.u;
    out[1] = gradient.v;
  }
  if (params.grad_weights != nullptr) params.grad_weights[offset[Params::kGradWeights] + view] = gradient.weight;
}

template <class T>
struct ThreadSink {
  const TriangulateBackwardParams<T>& params;
  const int64_t* offset;

  __device__ __forceinline__ void operator()(int view, const ObservationGradient<T>& gradient) {
    using Params = TriangulateBackwardParams<T>;
    store_point_gradients(params, offset, view, gradient);
    if (params.grad_projections == nullptr) return;
    T* out = params.grad_projections + offset[Params::kGradProjections] + 12 * view;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j) out[4 * i + j] = gradient.projection[i][j];
  }
};

template <class T>
__device__ __forceinline__ void load_grad(const TriangulateBackwardParams<T>& params, const int64_t* offset,
                                          T (&grad)[3]) {
  for (int k = 0; k < 3; ++k)
    grad[k] = params.grad[offset[TriangulateBackwardParams<T>::kGrad] + k * params.grad_stride];
}

template <class T>
__global__ void __launch_bounds__(kBlock) triangulate_backward_kernel(TriangulateBackwardParams<T> params) {
  using Params = TriangulateBackwardParams<T>;
  for (int64_t item = thread_index(); item < params.batch.count; item += thread_count()) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T grad[3];
    load_grad(params, offset, grad);
    ThreadSink<T> sink{params, offset};
    triangulate_point_vjp<T>(StridedViews<T>(params, offset), params.homogeneous, grad, sink);
  }
}

// All lanes of the warp call this together, view by view: it shuffles.
template <class T>
struct WarpSink {
  const TriangulateBackwardParams<T>& params;
  const int64_t* offset;
  T* sum;       // [C, 3, 4], this warp's alone
  bool active;  // false for the lanes beyond the last point, which repeat it

  __device__ __forceinline__ void operator()(int view, const ObservationGradient<T>& gradient) {
    if (active) store_point_gradients(params, offset, view, gradient);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 4; ++j) warp_add(sum + 12 * view + 4 * i + j, active ? gradient.projection[i][j] : T(0));
  }
};

template <class T>
__global__ void __launch_bounds__(kSharedSumBlock, sizeof(T) == 4 ? 4 : 1)  // as in rigid_align_cuda.cu
    triangulate_backward_shared_kernel(TriangulateBackwardParams<T> params, SharedSumPlan plan) {
  using Params = TriangulateBackwardParams<T>;
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t unit = thread_index() / kWarpSize; unit < plan.units; unit += thread_count() / kWarpSize) {
    const ItemRange range = unit_items(plan, params.batch.count, params.batch.shared, unit);
    T* sum = begin_warp_unit(plan, params.batch, Params::kGradProjections, range.begin, unit, params.grad_projections,
                             params.partial_sums);
    for (int64_t first = range.begin; first < range.end; first += kWarpSize) {
      const bool active = first + lane < range.end;
      int64_t offset[Params::kOperands];
      params.batch.offsets(active ? first + lane : range.end - 1, offset);
      T grad[3];
      load_grad(params, offset, grad);
      WarpSink<T> sink{params, offset, sum, active};
      triangulate_point_vjp<T>(StridedViews<T>(params, offset), params.homogeneous, grad, sink);
    }
  }
}

}  // namespace

namespace cuda {

template <class T>
int triangulate(const TriangulateParams<T>& params, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  TRITOOL_LAUNCH(triangulate_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
  return last_launch_error();
}

template <class T>
int triangulate_backward(const TriangulateBackwardParams<T>& params, const SharedSumPlan& plan, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  if (params.grad_projections == nullptr || params.batch.shared == 1) {
    TRITOOL_LAUNCH(triangulate_backward_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
    return last_launch_error();
  }
  TRITOOL_LAUNCH(triangulate_backward_shared_kernel<T>, grid_size(plan.units, kSharedSumBlock / kWarpSize),
                 kSharedSumBlock, 0, stream, params, plan);
  add_partial_sums<TriangulateBackwardParams<T>::kGradProjections>(plan, params.batch, params.grad_projections,
                                                                   params.partial_sums, stream);
  return last_launch_error();
}

template int triangulate<float>(const TriangulateParams<float>&, CUstream_st*);
template int triangulate<double>(const TriangulateParams<double>&, CUstream_st*);
template int triangulate_backward<float>(const TriangulateBackwardParams<float>&, const SharedSumPlan&, CUstream_st*);
template int triangulate_backward<double>(const TriangulateBackwardParams<double>&, const SharedSumPlan&, CUstream_st*);

}  // namespace cuda
}  // namespace tritool
