// SPDX-License-Identifier: Apache-2.0
// One thread per set of points. A thread reads its points three or four times; neighbouring threads' points share cache
// lines, so all but the first time come from the first-level cache.
#include "kernels/launch.cuh"
#include "kernels/rigid_align.h"
#include "math/rigid_align.h"

namespace tritool {
namespace {

constexpr int kBlock = 128;

template <class T>
struct StridedPoints {
  int count;
  bool weighted;
  const T* source;
  const T* target;
  const T* weights;
  int64_t source_stride[2];
  int64_t target_stride[2];
  int64_t weights_stride;

  template <class Params>
  __device__ __forceinline__ StridedPoints(const Params& params, const int64_t (&offset)[Params::kOperands])
      : count(params.points),
        weighted(params.weights != nullptr),
        source(params.source + offset[Params::kSource]),
        target(params.target + offset[Params::kTarget]),
        weights(params.weights == nullptr ? nullptr : params.weights + offset[Params::kWeights]),
        source_stride{params.source_stride[0], params.source_stride[1]},
        target_stride{params.target_stride[0], params.target_stride[1]},
        weights_stride(params.weights_stride) {}

  __device__ __forceinline__ Correspondence<T> operator()(int n) const {
    Correspondence<T> point;
    for (int k = 0; k < 3; ++k) {
      point.source[k] = source[n * source_stride[0] + k * source_stride[1]];
      point.target[k] = target[n * target_stride[0] + k * target_stride[1]];
    }
    point.weight = weighted ? weights[n * weights_stride] : T(1);
    return point;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock) rigid_align_kernel(RigidAlignParams<T> params) {
  using Params = RigidAlignParams<T>;
  for (int64_t item = thread_index(); item < params.batch.count; item += thread_count()) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T rotation[3][3], translation[3], scale;
    rigid_align_points<T>(StridedPoints<T>(params, offset), params.with_scale, rotation, translation, scale);
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j) params.rotation[offset[Params::kRotation] + 3 * i + j] = rotation[i][j];
      params.translation[offset[Params::kTranslation] + i] = translation[i];
    }
    params.scale[offset[Params::kScale]] = scale;
  }
}

template <class T>
struct ThreadSink {
  const RigidAlignBackwardParams<T>& params;
  const int64_t* offset;

  __device__ __forceinline__ void operator()(int n, const CorrespondenceGradient<T>& gradient) {
    using Params = RigidAlignBackwardParams<T>;
    for (int k = 0; k < 3; ++k) {
      if (params.grad_source != nullptr)
        params.grad_source[offset[Params::kGradSource] + 3 * n + k] = gradient.source[k];
      if (params.grad_target != nullptr)
        params.grad_target[offset[Params::kGradTarget] + 3 * n + k] = gradient.target[k];
    }
    if (params.grad_weights != nullptr) params.grad_weights[offset[Params::kGradWeights] + n] = gradient.weight;
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock) rigid_align_backward_kernel(RigidAlignBackwardParams<T> params) {
  using Params = RigidAlignBackwardParams<T>;
  for (int64_t item = thread_index(); item < params.batch.count; item += thread_count()) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    T grad_rotation[3][3], grad_translation[3];
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j)
        grad_rotation[i][j] =
            params.grad_rotation == nullptr
                ? T(0)
                : params.grad_rotation[offset[Params::kGradRotation] + i * params.grad_rotation_stride[0] +
                                       j * params.grad_rotation_stride[1]];
      grad_translation[i] =
          params.grad_translation == nullptr
              ? T(0)
              : params.grad_translation[offset[Params::kGradTranslation] + i * params.grad_translation_stride];
    }
    const T grad_scale = params.grad_scale == nullptr ? T(0) : params.grad_scale[offset[Params::kGradScale]];
    ThreadSink<T> sink{params, offset};
    rigid_align_points_vjp<T>(StridedPoints<T>(params, offset), params.with_scale, grad_rotation, grad_translation,
                              grad_scale, sink);
  }
}

}  // namespace

namespace cuda {

template <class T>
int rigid_align(const RigidAlignParams<T>& params, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  TRITOOL_LAUNCH(rigid_align_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
  return last_launch_error();
}

template <class T>
int rigid_align_backward(const RigidAlignBackwardParams<T>& params, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  TRITOOL_LAUNCH(rigid_align_backward_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
  return last_launch_error();
}

template int rigid_align<float>(const RigidAlignParams<float>&, CUstream_st*);
template int rigid_align<double>(const RigidAlignParams<double>&, CUstream_st*);
template int rigid_align_backward<float>(const RigidAlignBackwardParams<float>&, CUstream_st*);
template int rigid_align_backward<double>(const RigidAlignBackwardParams<double>&, CUstream_st*);

}  // namespace cuda
}  // namespace tritool
