// SPDX-License-Identifier: Apache-2.0
// One thread per set of points, which it reads three or four times. Where each thread walks over memory of its own, a
// load of a warp goes to 32 places. Therefore a warp first brings its 32 sets to shared memory together, and sends the
// results from there. Sets that are too large for that are read, and written, where they are.
#include <type_traits>

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

// ---- Sets in shared memory ----
// Of a warp's operand there is a row for each of the 32 sets: its points' numbers in order, contiguous. Rows are an odd
// number of elements apart, so that the lanes' own rows begin in different banks.

constexpr size_t kStagedBytes = 48 << 10;  // what any block may have

__host__ __device__ constexpr int row_pitch(int length) { return length | 1; }

// Where the warp's rows of an operand lie in memory, as a lane knows it.
struct MemoryRows {
  int64_t offset;     // of the lane's own set
  int64_t stride[2];  // point, coordinate
  bool dense;         // row after row, without gaps, from a multiple of 16 bytes on
};

// `dense` has a bit for each operand.
__device__ __forceinline__ bool is_dense(unsigned dense, int operand) { return (dense >> operand & 1) != 0; }

// To shared memory where `memory` is const, else from there.
template <class Memory, class T>
__device__ __forceinline__ void copy_element(Memory& memory, T& shared) {
  if constexpr (std::is_const_v<Memory>) {
    shared = memory;
  } else {
    memory = shared;
  }
}

// The elements of rows in shared memory as if there were no gaps between them; kGaps: there are.
template <class T, bool kGaps>
struct SharedRows {
  static constexpr int kAtOnce = 16 / sizeof(T);
  using Part = Vector<T, kAtOnce>;

  T* start;
  unsigned inverse;  // of the length of a row, times 2^32

  __device__ __forceinline__ SharedRows(T* first, int length)
      : start(first), inverse(kGaps ? 0xffffffffu / static_cast<unsigned>(length) + 1 : 0) {}

  // A gap of one after each row: n + n / length, a quotient that is exact for n * length < 2^32.
  __device__ __forceinline__ T& operator[](int n) const {
    return start[kGaps ? n + static_cast<int>(uint64_t(n) * inverse >> 32) : n];
  }
  __device__ __forceinline__ Part load(int n) const {
    if (!kGaps) return reinterpret_cast<const Part*>(start)[n];
    Part part;
    for (int k = 0; k < kAtOnce; ++k) part.element[k] = (*this)[kAtOnce * n + k];
    return part;
  }
  __device__ __forceinline__ void store(int n, const Part& part) const {
    if (kGaps) {
      for (int k = 0; k < kAtOnce; ++k) (*this)[kAtOnce * n + k] = part.element[k];
    } else {
      reinterpret_cast<Part*>(start)[n] = part;
    }
  }
};

// Copies dense rows of so many elements in all between memory and shared memory, several times 16 bytes in flight: to
// shared memory where Memory is const, else from there.
template <class Memory, class T, bool kGaps>
__device__ __forceinline__ void copy_dense(Memory* memory, const SharedRows<T, kGaps>& shared, int elements) {
  constexpr int kAtOnce = 16 / sizeof(T);
  using Part = Vector<T, kAtOnce>;
  constexpr bool kLoad = std::is_const_v<Memory>;
  constexpr int kInFlight = 4;
  auto* memory_parts = reinterpret_cast<std::conditional_t<kLoad, const Part, Part>*>(memory);
  const int lane = threadIdx.x % kWarpSize, parts = elements / kAtOnce;
#pragma unroll 1
  for (int first = lane; first < parts; first += kInFlight * kWarpSize) {
    Part part[kInFlight];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int n = first + k * kWarpSize;
      if (n < parts) part[k] = kLoad ? memory_parts[n] : shared.load(n);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
      const int n = first + k * kWarpSize;
      if (n >= parts) continue;
      if constexpr (kLoad) {
        shared.store(n, part[k]);
      } else {
        memory_parts[n] = part[k];
      }
    }
  }
  const int rest = parts * kAtOnce + lane;  // less than 16 bytes
  if (rest < elements) copy_element(memory[rest], shared[rest]);
}

// All `rows` rows of an operand, each of `points` points. The whole warp calls it, between __syncwarp().
template <int kCoordinates, class Memory, class T>
__device__ __forceinline__ void copy_rows(Memory* memory, const MemoryRows& where, int rows, int points, T* shared) {
  const int length = points * kCoordinates;
  if (where.dense) {
    memory += __shfl_sync(kFullWarp, where.offset, 0);
    if (row_pitch(length) == length) {
      copy_dense(memory, SharedRows<T, false>(shared, length), rows * length);
    } else if (length > 0) {
      copy_dense(memory, SharedRows<T, true>(shared, length), rows * length);
    }
    return;
  }
#pragma unroll 1
  for (int row = 0; row < rows; ++row) {
    Memory* from = memory + __shfl_sync(kFullWarp, where.offset, row);
#pragma unroll 1
    for (int i = threadIdx.x % kWarpSize; i < length; i += kWarpSize)
      copy_element(from[i / kCoordinates * where.stride[0] + i % kCoordinates * where.stride[1]],
                   shared[row * row_pitch(length) + i]);
  }
}

// The same as StridedPoints. Takes the points' gradients in their own place: a point is not read after its gradient.
// kWeighted is a constant, so that the loops over points do not ask.
template <class T, bool kWeighted>
struct StagedPoints {
  static constexpr bool weighted = kWeighted;
  int count;
  T *source_rows, *target_rows, *weights_rows;  // of the warp
  T *source, *target, *weights;                 // the lane's own

  __device__ __forceinline__ StagedPoints(int points, T* shared)
      : count(points),
        source_rows(shared),
        target_rows(source_rows + kWarpSize * row_pitch(3 * points)),
        weights_rows(target_rows + kWarpSize * row_pitch(3 * points)),
        source(source_rows + threadIdx.x % kWarpSize * row_pitch(3 * points)),
        target(target_rows + threadIdx.x % kWarpSize * row_pitch(3 * points)),
        weights(weights_rows + threadIdx.x % kWarpSize * row_pitch(points)) {}

  // Elements for a warp: for the points and, in their place, for rotations.
  __host__ __device__ static int size(int points) {
    const int row = 2 * row_pitch(3 * points) + (kWeighted ? row_pitch(points) : 0);
    return kWarpSize * (row > 9 ? row : 9);
  }

  template <class Params>
  __device__ __forceinline__ void load(const Params& params, const int64_t* offset, unsigned dense, int rows) {
    copy_rows<3>(
        params.source,
        {offset[Params::kSource], {params.source_stride[0], params.source_stride[1]}, is_dense(dense, Params::kSource)},
        rows, count, source_rows);
    copy_rows<3>(
        params.target,
        {offset[Params::kTarget], {params.target_stride[0], params.target_stride[1]}, is_dense(dense, Params::kTarget)},
        rows, count, target_rows);
    if (kWeighted)
      copy_rows<1>(params.weights,
                   {offset[Params::kWeights], {params.weights_stride, 0}, is_dense(dense, Params::kWeights)}, rows,
                   count, weights_rows);
  }

  __device__ __forceinline__ Correspondence<T> operator()(int n) const {
    Correspondence<T> point;
    for (int k = 0; k < 3; ++k) {
      point.source[k] = source[3 * n + k];
      point.target[k] = target[3 * n + k];
    }
    point.weight = kWeighted ? weights[n] : T(1);
    return point;
  }

  __device__ __forceinline__ void operator()(int n, const CorrespondenceGradient<T>& gradient) {
    for (int k = 0; k < 3; ++k) {
      source[3 * n + k] = gradient.source[k];
      target[3 * n + k] = gradient.target[k];
    }
    if (kWeighted) weights[n] = gradient.weight;
  }
};

// ---- Kernels ----
// Those with staged points have a thread for every set instead of a loop: nvcc for compute capability 10.0 and 12.0
// moves so much of the copying out of a loop that registers do not suffice.

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

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kBlock) rigid_align_staged_kernel(RigidAlignParams<T> params, unsigned dense) {
  using Params = RigidAlignParams<T>;
  TRITOOL_DYNAMIC_SHARED(T, of_block);
  const int lane = threadIdx.x % kWarpSize;
  T* shared = of_block + threadIdx.x / kWarpSize * StagedPoints<T, kWeighted>::size(params.points);
  const int64_t first = thread_index() - lane;
  if (first >= params.batch.count) return;
  const int rows = static_cast<int>(min(params.batch.count - first, int64_t(kWarpSize)));
  int64_t offset[Params::kOperands];
  params.batch.offsets(first + min(lane, rows - 1), offset);
  StagedPoints<T, kWeighted> points(params.points, shared);
  points.load(params, offset, dense, rows);
  __syncwarp();
  T rotation[3][3], translation[3], scale;
  rigid_align_points<T>(points, params.with_scale, rotation, translation, scale);
  __syncwarp();
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) shared[9 * lane + 3 * i + j] = rotation[i][j];
  __syncwarp();
  copy_rows<3>(params.rotation, {offset[Params::kRotation], {3, 1}, is_dense(dense, Params::kRotation)}, rows, 3,
               shared);
  if (lane < rows) {
    for (int i = 0; i < 3; ++i) params.translation[offset[Params::kTranslation] + i] = translation[i];
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

// The gradient that comes in for one set.
template <class T>
struct Incoming {
  T rotation[3][3], translation[3], scale;

  using Params = RigidAlignBackwardParams<T>;
  __device__ __forceinline__ Incoming(const Params& params, const int64_t* offset) {
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 3; ++j)
        rotation[i][j] = params.grad_rotation == nullptr
                             ? T(0)
                             : params.grad_rotation[offset[Params::kGradRotation] + i * params.grad_rotation_stride[0] +
                                                    j * params.grad_rotation_stride[1]];
      translation[i] =
          params.grad_translation == nullptr
              ? T(0)
              : params.grad_translation[offset[Params::kGradTranslation] + i * params.grad_translation_stride];
    }
    scale = params.grad_scale == nullptr ? T(0) : params.grad_scale[offset[Params::kGradScale]];
  }
};

template <class T>
__global__ void __launch_bounds__(kBlock) rigid_align_backward_kernel(RigidAlignBackwardParams<T> params) {
  using Params = RigidAlignBackwardParams<T>;
  for (int64_t item = thread_index(); item < params.batch.count; item += thread_count()) {
    int64_t offset[Params::kOperands];
    params.batch.offsets(item, offset);
    const Incoming<T> grad(params, offset);
    ThreadSink<T> sink{params, offset};
    rigid_align_points_vjp<T>(StridedPoints<T>(params, offset), params.with_scale, grad.rotation, grad.translation,
                              grad.scale, sink);
  }
}

template <class T, bool kWeighted>
__global__ void __launch_bounds__(kBlock, sizeof(T) == 4 ? 4 : 1)  // 128 registers: else some nvcc spill at 80
    rigid_align_backward_staged_kernel(RigidAlignBackwardParams<T> params, unsigned dense) {
  using Params = RigidAlignBackwardParams<T>;
  TRITOOL_DYNAMIC_SHARED(T, of_block);
  const int lane = threadIdx.x % kWarpSize;
  T* shared = of_block + threadIdx.x / kWarpSize * StagedPoints<T, kWeighted>::size(params.points);
  const int64_t first = thread_index() - lane;
  if (first >= params.batch.count) return;
  const int rows = static_cast<int>(min(params.batch.count - first, int64_t(kWarpSize)));
  int64_t offset[Params::kOperands];
  params.batch.offsets(first + min(lane, rows - 1), offset);
  StagedPoints<T, kWeighted> points(params.points, shared);
  points.load(params, offset, dense, rows);
  const Incoming<T> grad(params, offset);
  __syncwarp();
  rigid_align_points_vjp<T>(points, params.with_scale, grad.rotation, grad.translation, grad.scale, points);
  __syncwarp();
  if (params.grad_source != nullptr)
    copy_rows<3>(params.grad_source, {offset[Params::kGradSource], {3, 1}, is_dense(dense, Params::kGradSource)}, rows,
                 params.points, points.source_rows);
  if (params.grad_target != nullptr)
    copy_rows<3>(params.grad_target, {offset[Params::kGradTarget], {3, 1}, is_dense(dense, Params::kGradTarget)}, rows,
                 params.points, points.target_rows);
  if (kWeighted && params.grad_weights != nullptr)
    copy_rows<1>(params.grad_weights, {offset[Params::kGradWeights], {1, 0}, is_dense(dense, Params::kGradWeights)},
                 rows, params.points, points.weights_rows);
}

// The bit of an operand [batch, points, coordinates] for the kernels above.
template <class T, int kOperands>
unsigned dense_bit(const Batch<kOperands>& batch, int operand, const T* data, int points, int coordinates,
                   int64_t point_stride, int64_t coordinate_stride) {
  const int length = points * coordinates;
  const bool dense = reinterpret_cast<uintptr_t>(data) % 16 == 0 && (coordinates == 1 || coordinate_stride == 1) &&
                     (points == 1 || point_stride == coordinates) &&
                     (batch.dims == 0 || (batch.dims == 1 && batch.stride[0][operand] == length));
  return unsigned(dense) << operand;
}

template <class Params>
unsigned dense_points(const Params& params) {
  return dense_bit(params.batch, Params::kSource, params.source, params.points, 3, params.source_stride[0],
                   params.source_stride[1]) |
         dense_bit(params.batch, Params::kTarget, params.target, params.points, 3, params.target_stride[0],
                   params.target_stride[1]) |
         dense_bit(params.batch, Params::kWeights, params.weights, params.points, 1, params.weights_stride, 1);
}

// Blocks for the kernels above: the threads whose sets fit into shared memory; 0: not even a warp's do.
struct StagedBlock {
  unsigned threads = 0;
  size_t shared_bytes = 0;
};
template <class T, bool kWeighted>
StagedBlock staged_block(int points) {
  StagedBlock block;
  if (points > int(kStagedBytes / (kWarpSize * sizeof(T)))) return block;  // one coordinate alone is too much
  const size_t warp_bytes = sizeof(T) * StagedPoints<T, kWeighted>::size(points);
  for (block.threads = kBlock; block.threads >= kWarpSize; block.threads /= 2) {
    block.shared_bytes = block.threads / kWarpSize * warp_bytes;
    if (block.shared_bytes <= kStagedBytes) return block;
  }
  return {};
}
inline bool covers(const StagedBlock& block, int64_t sets) {
  return block.threads > 0 && ceil_div(sets, block.threads) <= kMaxGridX;
}

// Whether the sets fitted into shared memory and the kernel was launched.
template <bool kWeighted, class T>
bool launch_staged(const RigidAlignParams<T>& params, CUstream_st* stream) {
  using Params = RigidAlignParams<T>;
  const StagedBlock block = staged_block<T, kWeighted>(params.points);
  if (!covers(block, params.batch.count)) return false;
  const unsigned dense = dense_points(params) | dense_bit(params.batch, Params::kRotation, params.rotation, 3, 3, 3, 1);
  TRITOOL_LAUNCH(TRITOOL_KERNEL(rigid_align_staged_kernel<T, kWeighted>), grid_size(params.batch.count, block.threads),
                 block.threads, block.shared_bytes, stream, params, dense);
  return true;
}
template <bool kWeighted, class T>
bool launch_staged(const RigidAlignBackwardParams<T>& params, CUstream_st* stream) {
  using Params = RigidAlignBackwardParams<T>;
  const StagedBlock block = staged_block<T, kWeighted>(params.points);
  if (!covers(block, params.batch.count) || (!kWeighted && params.grad_weights != nullptr)) return false;
  const unsigned dense = dense_points(params) |
                         dense_bit(params.batch, Params::kGradSource, params.grad_source, params.points, 3, 3, 1) |
                         dense_bit(params.batch, Params::kGradTarget, params.grad_target, params.points, 3, 3, 1) |
                         dense_bit(params.batch, Params::kGradWeights, params.grad_weights, params.points, 1, 1, 1);
  TRITOOL_LAUNCH(TRITOOL_KERNEL(rigid_align_backward_staged_kernel<T, kWeighted>),
                 grid_size(params.batch.count, block.threads), block.threads, block.shared_bytes, stream, params,
                 dense);
  return true;
}

}  // namespace

namespace cuda {

template <class T>
int rigid_align(const RigidAlignParams<T>& params, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  if (params.weights != nullptr ? launch_staged<true>(params, stream) : launch_staged<false>(params, stream))
    return last_launch_error();
  TRITOOL_LAUNCH(rigid_align_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
  return last_launch_error();
}

template <class T>
int rigid_align_backward(const RigidAlignBackwardParams<T>& params, CUstream_st* stream) {
  if (params.batch.count == 0) return 0;
  if (params.weights != nullptr ? launch_staged<true>(params, stream) : launch_staged<false>(params, stream))
    return last_launch_error();
  TRITOOL_LAUNCH(rigid_align_backward_kernel<T>, grid_size(params.batch.count, kBlock), kBlock, 0, stream, params);
  return last_launch_error();
}

template int rigid_align<float>(const RigidAlignParams<float>&, CUstream_st*);
template int rigid_align<double>(const RigidAlignParams<double>&, CUstream_st*);
template int rigid_align_backward<float>(const RigidAlignBackwardParams<float>&, CUstream_st*);
template int rigid_align_backward<double>(const RigidAlignBackwardParams<double>&, CUstream_st*);

}  // namespace cuda
}  // namespace tritool
