// SPDX-License-Identifier: Apache-2.0
// Forward: every thread keeps the running sums of some voxels of one map, the block merges them in a fixed tree. Where
// there are fewer maps than the device has room for, several blocks share a map and a second small kernel merges their
// sums. Backward: one pass, one thread per few voxels.
//
// kRows: the threads of a block run along one map, 16 bytes a load where alignment allows. kLanes: the 32 threads of a
// warp read 32 neighbouring maps (channels last), so that a warp's load is one line either way.
#include "kernels/launch.cuh"
#include "kernels/moment_cotangent.h"
#include "kernels/soft_argmax.h"

namespace tritool {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / kWarpSize;

template <class T, bool kSecond>
__device__ __forceinline__ MomentState<T, kSecond> shuffle_xor(const MomentState<T, kSecond>& state, int mask) {
  MomentState<T, kSecond> other;
  other.level = __shfl_xor_sync(kFullWarp, state.level, mask);
  other.sum = __shfl_xor_sync(kFullWarp, state.sum, mask);
  for (int a = 0; a < 3; ++a) {
    other.first[a] = __shfl_xor_sync(kFullWarp, state.first[a], mask);
    // Without second moments the origin is the same in all threads.
    other.origin[a] = kSecond ? __shfl_xor_sync(kFullWarp, state.origin[a], mask) : state.origin[a];
  }
  for (int k = 0; k < (kSecond ? 6 : 1); ++k)
    other.second[k] = kSecond ? __shfl_xor_sync(kFullWarp, state.second[k], mask) : T(0);
  return other;
}

// The merge of all lanes, in every lane: the lower lane's state is always the left operand, so that all agree.
template <class T, bool kSecond>
__device__ __forceinline__ MomentState<T, kSecond> warp_merge(MomentState<T, kSecond> state) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    MomentState<T, kSecond> other = shuffle_xor(state, mask);
    if (lane & mask) {
      other.merge(state);
      state = other;
    } else {
      state.merge(other);
    }
  }
  return state;
}

template <class T, bool kSecond>
__device__ __forceinline__ void pack_state(const MomentState<T, kSecond>& state, T* to) {
  to[0] = state.level;
  to[1] = state.sum;
  for (int a = 0; a < 3; ++a) to[2 + a] = state.first[a];
  for (int a = 0; a < 3; ++a) to[5 + a] = state.origin[a];
  for (int k = 0; k < 6; ++k) to[8 + k] = kSecond ? state.second[kSecond ? k : 0] : T(0);
}
template <class T, bool kSecond>
__device__ __forceinline__ MomentState<T, kSecond> unpack_state(const T* from) {
  MomentState<T, kSecond> state;
  state.level = from[0];
  state.sum = from[1];
  for (int a = 0; a < 3; ++a) state.first[a] = from[2 + a];
  for (int a = 0; a < 3; ++a) state.origin[a] = from[5 + a];
  for (int k = 0; k < (kSecond ? 6 : 1); ++k) state.second[k] = from[8 + k];
  return state;
}

template <class In, bool kSecond>
__device__ __forceinline__ void reset_state(const SoftmaxMomentsParams<In>& params,
                                            MomentState<Accumulator<In>, kSecond>& state) {
  using T = Accumulator<In>;
  const T centre[3] = {T(0.5) * T(params.size[0] - 1), T(0.5) * T(params.size[1] - 1), T(0.5) * T(params.size[2] - 1)};
  state.reset(centre);
}

// One more voxel. The branch is rare: a level is raised a few times a thread.
template <class T, bool kSecond>
__device__ __forceinline__ void push(MomentState<T, kSecond>& state, T c, T logit, int i, int j, int k) {
  const T level = level_of(c, logit);
  if (level > state.level) {
    const T at[3] = {T(i), T(j), T(k)};
    state.raise(level, at);
  }
  state.add(softmax_weight(c, logit, state.level), T(i), T(j), T(k));
}

template <class In, bool kSecond>
__device__ __forceinline__ void write_result(const SoftmaxMomentsParams<In>& params, int64_t map,
                                             const MomentState<Accumulator<In>, kSecond>& state) {
  const int dims = params.dims;
  // Loops over axes, not results: an index known only at run time would put the state into local memory.
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const int d = moment_axis(dims, axis);
    if (d >= dims) continue;
    params.mean[map * dims + d] = state.mean(axis);
    if constexpr (kSecond) {
#pragma unroll
      for (int other = 0; other < 3; ++other) {
        const int e = moment_axis(dims, other);
        if (e < dims) params.covariance[(map * dims + d) * dims + e] = state.covariance(axis, other);
      }
    }
  }
  params.log_partition[map] = state.log_partition();
  params.partition[2 * map] = state.level;
  params.partition[2 * map + 1] = state.sum;
}

template <class In, bool kSecond>
__device__ __forceinline__ void write_result_or_partial(const SoftmaxMomentsParams<In>& params, int64_t map, int split,
                                                        int splits,
                                                        const MomentState<Accumulator<In>, kSecond>& state) {
  if (splits == 1)
    write_result<In, kSecond>(params, map, state);
  else
    pack_state(state, params.partial + (map * splits + split) * cuda::kMomentStateSize);
}

// Blocks: maps x splits. kWidth elements a load; more than one only for maps that are dense rows of a multiple of it.
template <class In, bool kSecond, int kWidth>
__global__ void __launch_bounds__(kBlock) moments_rows_kernel(SoftmaxMomentsParams<In> params, int splits) {
  using T = Accumulator<In>;
  TRITOOL_SHARED(T, merged, kWarps * cuda::kMomentStateSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned loads = static_cast<unsigned>(params.size[0]) * depth * width / kWidth;
  const int64_t blocks = params.maps.count * splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t map = block / splits;
    const int split = static_cast<int>(block - map * splits);
    int64_t offset[1];
    params.maps.offsets(map, offset);
    const In* logits = params.logits + offset[0];
    MomentState<T, kSecond> state;
    reset_state<In, kSecond>(params, state);
    for (unsigned load_index = split * kBlock + threadIdx.x; load_index < loads; load_index += splits * kBlock) {
      const unsigned element = load_index * kWidth;
      const unsigned row = element / width, k = element - row * width;
      const unsigned i = row / depth, j = row - i * depth;
      if constexpr (kWidth > 1) {
        const auto vector = *reinterpret_cast<const Vector<In, kWidth>*>(logits + element);
#pragma unroll
        for (int n = 0; n < kWidth; ++n) push(state, params.c, load(&vector.element[n]), int(i), int(j), int(k) + n);
      } else {
        const T logit = load(logits + i * params.stride[0] + j * params.stride[1] + k * params.stride[2]);
        push(state, params.c, logit, int(i), int(j), int(k));
      }
    }
    state = warp_merge(state);
    if (lane == 0) pack_state(state, &merged[warp * cuda::kMomentStateSize]);
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < kWarps; ++other)
        state.merge(unpack_state<T, kSecond>(&merged[other * cuda::kMomentStateSize]));
      write_result_or_partial<In, kSecond>(params, map, split, splits, state);
    }
    __syncthreads();  // before the next block's states overwrite `merged`
  }
}

// Blocks: groups of 32 neighbouring maps x splits. Thread (lane, warp): map of the lane, every kWarps-th voxel.
template <class In, bool kSecond>
__global__ void __launch_bounds__(kBlock) moments_lanes_kernel(SoftmaxMomentsParams<In> params, int splits) {
  using T = Accumulator<In>;
  TRITOOL_SHARED(T, merged, kWarps * kWarpSize * cuda::kMomentStateSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned voxels = static_cast<unsigned>(params.size[0]) * depth * width;
  const int64_t blocks = ceil_div(params.maps.count, kWarpSize) * splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t group = block / splits;
    const int split = static_cast<int>(block - group * splits);
    const int64_t map = group * kWarpSize + lane;
    MomentState<T, kSecond> state;
    reset_state<In, kSecond>(params, state);
    if (map < params.maps.count) {
      int64_t offset[1];
      params.maps.offsets(map, offset);
      for (unsigned voxel = split * kWarps + warp; voxel < voxels; voxel += splits * kWarps) {
        const unsigned row = voxel / width, k = voxel - row * width;
        const unsigned i = row / depth, j = row - i * depth;
        const T logit =
            load(params.logits + offset[0] + i * params.stride[0] + j * params.stride[1] + k * params.stride[2]);
        push(state, params.c, logit, int(i), int(j), int(k));
      }
    }
    pack_state(state, &merged[threadIdx.x * cuda::kMomentStateSize]);
    __syncthreads();
    if (warp == 0 && map < params.maps.count) {
      for (int other = 1; other < kWarps; ++other)
        state.merge(unpack_state<T, kSecond>(&merged[(other * kWarpSize + lane) * cuda::kMomentStateSize]));
      write_result_or_partial<In, kSecond>(params, map, split, splits, state);
    }
    __syncthreads();
  }
}

// One warp per map: merges the splits' sums.
template <class In, bool kSecond>
__global__ void __launch_bounds__(kBlock) moments_merge_kernel(SoftmaxMomentsParams<In> params, int splits) {
  using T = Accumulator<In>;
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t map = thread_index() / kWarpSize; map < params.maps.count; map += thread_count() / kWarpSize) {
    MomentState<T, kSecond> state;
    reset_state<In, kSecond>(params, state);
    for (int split = lane; split < splits; split += kWarpSize)
      state.merge(unpack_state<T, kSecond>(params.partial + (map * splits + split) * cuda::kMomentStateSize));
    state = warp_merge(state);
    if (lane == 0) write_result<In, kSecond>(params, map, state);
  }
}

// Blocks: maps x chunks of voxels.
template <class In, int kWidth>
__global__ void __launch_bounds__(kBlock)
    moments_backward_rows_kernel(SoftmaxMomentsBackwardParams<In> params, int chunks) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned loads = static_cast<unsigned>(params.size[0]) * depth * width / kWidth;
  const int64_t (&from)[3] = params.stride[Params::kLogits];
  const int64_t (&to)[3] = params.stride[Params::kGradLogits];
  for (int64_t block = blockIdx.x; block < params.maps.count * chunks; block += gridDim.x) {
    const int64_t map = block / chunks;
    const unsigned chunk = static_cast<unsigned>(block - map * chunks);
    int64_t offset[2];
    params.maps.offsets(map, offset);
    const MomentCotangent<T> cotangent = moment_cotangent(params, map);
    const T factor = params.inverse_temperature * cotangent.inverse_sum;
    for (unsigned load_index = chunk * kBlock + threadIdx.x; load_index < loads; load_index += chunks * kBlock) {
      const unsigned element = load_index * kWidth;
      const unsigned row = element / width, k = element - row * width;
      const unsigned i = row / depth, j = row - i * depth;
      T t[3];
      cotangent.row(T(i), T(j), t);
      Vector<In, kWidth> vector;
      if constexpr (kWidth > 1)
        vector = *reinterpret_cast<const Vector<In, kWidth>*>(params.logits + offset[Params::kLogits] + element);
      else
        vector.element[0] = params.logits[offset[Params::kLogits] + i * from[0] + j * from[1] + k * from[2]];
#pragma unroll
      for (int n = 0; n < kWidth; ++n) {
        const T weight = softmax_weight(params.c, load(&vector.element[n]), cotangent.level);
        const T d = T(int(k) + n) - cotangent.mean[2];
        store(&vector.element[n], cotangent.valid ? weight * factor * (t[0] + d * (t[1] + d * t[2])) : T(0));
      }
      if constexpr (kWidth > 1)
        *reinterpret_cast<Vector<In, kWidth>*>(params.grad_logits + offset[Params::kGradLogits] + element) = vector;
      else
        params.grad_logits[offset[Params::kGradLogits] + i * to[0] + j * to[1] + k * to[2]] = vector.element[0];
    }
  }
}

template <class In>
__global__ void __launch_bounds__(kBlock)
    moments_backward_lanes_kernel(SoftmaxMomentsBackwardParams<In> params, int chunks) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned voxels = static_cast<unsigned>(params.size[0]) * depth * width;
  const int64_t (&from)[3] = params.stride[Params::kLogits];
  const int64_t (&to)[3] = params.stride[Params::kGradLogits];
  for (int64_t block = blockIdx.x; block < ceil_div(params.maps.count, kWarpSize) * chunks; block += gridDim.x) {
    const int64_t group = block / chunks;
    const unsigned chunk = static_cast<unsigned>(block - group * chunks);
    const int64_t map = group * kWarpSize + lane;
    if (map >= params.maps.count) continue;
    int64_t offset[2];
    params.maps.offsets(map, offset);
    const MomentCotangent<T> cotangent = moment_cotangent(params, map);
    const T factor = params.inverse_temperature * cotangent.inverse_sum;
    for (unsigned voxel = chunk * kWarps + warp; voxel < voxels; voxel += chunks * kWarps) {
      const unsigned row = voxel / width, k = voxel - row * width;
      const unsigned i = row / depth, j = row - i * depth;
      T t[3];
      cotangent.row(T(i), T(j), t);
      const T logit = load(params.logits + offset[Params::kLogits] + i * from[0] + j * from[1] + k * from[2]);
      const T weight = softmax_weight(params.c, logit, cotangent.level);
      const T d = T(int(k)) - cotangent.mean[2];
      store(params.grad_logits + offset[Params::kGradLogits] + i * to[0] + j * to[1] + k * to[2],
            cotangent.valid ? weight * factor * (t[0] + d * (t[1] + d * t[2])) : T(0));
    }
  }
}

// Elements a 16-byte load can take: dense maps only, and every map's start aligned.
template <class In, int kOperands>
int vector_width(const Batch<kOperands>& maps, const int64_t (&size)[3], const int64_t* const (&strides)[kOperands],
                 const void* const (&pointers)[kOperands]) {
  constexpr int kWidth = 16 / sizeof(In);
  bool fits = size[2] % kWidth == 0;
  for (int o = 0; o < kOperands; ++o) {
    fits = fits && strides[o][2] == 1 && (size[1] == 1 || strides[o][1] == size[2]) &&
           (size[0] == 1 || strides[o][0] == size[1] * size[2]) && reinterpret_cast<uintptr_t>(pointers[o]) % 16 == 0;
    for (int d = 0; d < maps.dims; ++d) fits = fits && maps.stride[d][o] % kWidth == 0;
  }
  return fits ? kWidth : 1;
}

template <class In, bool kSecond>
int launch_forward(const SoftmaxMomentsParams<In>& params, Stream stream) {
  const int64_t elements = params.size[0] * params.size[1] * params.size[2];
  constexpr int kWidth = 16 / sizeof(In);
  const int splits = static_cast<int>(cuda::softmax_moments_splits(params.maps.count, elements));
  if (params.maps_adjacent) {
    const unsigned grid = grid_size(ceil_div(params.maps.count, kWarpSize) * splits, 1);
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_lanes_kernel<In, kSecond>), grid, kBlock, 0, stream, params, splits);
  } else {
    const unsigned grid = grid_size(params.maps.count * splits, 1);
    const int64_t* const strides[1] = {params.stride};
    const void* const pointers[1] = {params.logits};
    if (vector_width<In>(params.maps, params.size, strides, pointers) == kWidth)
      TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_rows_kernel<In, kSecond, kWidth>), grid, kBlock, 0, stream, params, splits);
    else
      TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_rows_kernel<In, kSecond, 1>), grid, kBlock, 0, stream, params, splits);
  }
  if (splits > 1)
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_merge_kernel<In, kSecond>), grid_size(params.maps.count, kWarps), kBlock, 0,
                   stream, params, splits);
  return last_launch_error();
}

}  // namespace

namespace cuda {

int64_t softmax_moments_splits(int64_t maps, int64_t elements) {
  if (maps == 0) return 1;
  const int64_t useful = ceil_div(elements, 8192);  // below 32 voxels a thread a block is mostly its reduction
  const int64_t wanted = ceil_div(1024, maps);      // enough blocks for every multiprocessor of a large GPU
  const int64_t splits = useful < wanted ? useful : wanted;
  return splits < 1 ? 1 : splits > 64 ? 64 : splits;
}

template <class In>
int softmax_moments(const SoftmaxMomentsParams<In>& params, CUstream_st* stream) {
  if (params.maps.count == 0) return 0;
  return params.covariance != nullptr ? launch_forward<In, true>(params, stream)
                                      : launch_forward<In, false>(params, stream);
}

template <class In>
int softmax_moments_backward(const SoftmaxMomentsBackwardParams<In>& params, CUstream_st* stream) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  const int64_t elements = params.size[0] * params.size[1] * params.size[2];
  if (params.maps.count == 0 || elements == 0) return 0;
  constexpr int kWidth = 16 / sizeof(In);
  const int64_t per_block = params.maps_adjacent ? kWarps * 8 : kBlock * 8;
  const int chunks = static_cast<int>(ceil_div(elements, per_block) < 4096 ? ceil_div(elements, per_block) : 4096);
  if (params.maps_adjacent) {
    const unsigned grid = grid_size(ceil_div(params.maps.count, kWarpSize) * chunks, 1);
    TRITOOL_LAUNCH(moments_backward_lanes_kernel<In>, grid, kBlock, 0, stream, params, chunks);
    return last_launch_error();
  }
  const unsigned grid = grid_size(params.maps.count * chunks, 1);
  const int64_t* const strides[2] = {params.stride[Params::kLogits], params.stride[Params::kGradLogits]};
  const void* const pointers[2] = {params.logits, params.grad_logits};
  if (vector_width<In>(params.maps, params.size, strides, pointers) == kWidth)
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_backward_rows_kernel<In, kWidth>), grid, kBlock, 0, stream, params, chunks);
  else
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_backward_rows_kernel<In, 1>), grid, kBlock, 0, stream, params, chunks);
  return last_launch_error();
}

#define TRITOOL_INSTANTIATE(In)                                                    \
  template int softmax_moments<In>(const SoftmaxMomentsParams<In>&, CUstream_st*); \
  template int softmax_moments_backward<In>(const SoftmaxMomentsBackwardParams<In>&, CUstream_st*);
TRITOOL_INSTANTIATE(float)
TRITOOL_INSTANTIATE(double)
TRITOOL_INSTANTIATE(Float16)
TRITOOL_INSTANTIATE(BFloat16)
#undef TRITOOL_INSTANTIATE

}  // namespace cuda
}  // namespace tritool
