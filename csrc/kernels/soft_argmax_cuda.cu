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

template <class T, Keep kKeep>
__device__ __forceinline__ MomentState<T, kKeep> shuffle_xor(const MomentState<T, kKeep>& state, int mask) {
  constexpr bool kSecond = kKeep == Keep::kCovariance;
  MomentState<T, kKeep> other;
  other.level = __shfl_xor_sync(kFullWarp, state.level, mask);
  other.sum = __shfl_xor_sync(kFullWarp, state.sum, mask);
  for (int a = 0; a < 3; ++a) {
    other.first[a] = __shfl_xor_sync(kFullWarp, state.first[a], mask);
    // Without second moments the origin is the same in all threads.
    other.origin[a] = kSecond ? __shfl_xor_sync(kFullWarp, state.origin[a], mask) : state.origin[a];
  }
  for (int k = 0; k < (kSecond ? 6 : 1); ++k)
    other.second[k] = kSecond ? __shfl_xor_sync(kFullWarp, state.second[k], mask) : T(0);
  if constexpr (kKeep == Keep::kExpectation) {
    other.value.sum = __shfl_xor_sync(kFullWarp, state.value.sum, mask);
    other.value.spoilt = __shfl_xor_sync(kFullWarp, state.value.spoilt, mask);
  }
  return other;
}

// The merge of all lanes, in every lane: the lower lane's state is always the left operand, so that all agree.
template <class T, Keep kKeep>
__device__ __forceinline__ MomentState<T, kKeep> warp_merge(MomentState<T, kKeep> state) {
  const int lane = threadIdx.x % kWarpSize;
#pragma unroll
  for (int mask = 1; mask < kWarpSize; mask *= 2) {
    MomentState<T, kKeep> other = shuffle_xor(state, mask);
    if (lane & mask) {
      other.merge(state);
      state = other;
    } else {
      state.merge(other);
    }
  }
  return state;
}

template <class T, Keep kKeep>
__device__ __forceinline__ void pack_state(const MomentState<T, kKeep>& state, T* to) {
  to[0] = state.level;
  to[1] = state.sum;
  for (int a = 0; a < 3; ++a) to[2 + a] = state.first[a];
  for (int a = 0; a < 3; ++a) to[5 + a] = state.origin[a];
  if constexpr (kKeep == Keep::kCovariance)
    for (int k = 0; k < 6; ++k) to[8 + k] = state.second[k];
  if constexpr (kKeep == Keep::kExpectation) {
    to[8] = state.value.sum;
    to[9] = state.value.spoilt;
  }
}
template <class T, Keep kKeep>
__device__ __forceinline__ MomentState<T, kKeep> unpack_state(const T* from) {
  MomentState<T, kKeep> state;
  state.level = from[0];
  state.sum = from[1];
  for (int a = 0; a < 3; ++a) state.first[a] = from[2 + a];
  for (int a = 0; a < 3; ++a) state.origin[a] = from[5 + a];
  if constexpr (kKeep == Keep::kCovariance)
    for (int k = 0; k < 6; ++k) state.second[k] = from[8 + k];
  if constexpr (kKeep == Keep::kExpectation) state.value = {from[8], from[9]};
  return state;
}

// Element (i, j, k) of a map; `base` its first.
template <class In>
__device__ __forceinline__ In* element_of(In* base, const int64_t (&stride)[3], unsigned i, unsigned j, unsigned k) {
  return base + i * stride[0] + j * stride[1] + k * stride[2];
}

// Indices of the voxels that a thread visits, equally many apart. Two divisions for each visit would be a quarter of
// all instructions of the forward (docs/roofline.md); so they are made once, and the host divides the distance.
struct Voxel {
  unsigned i, j, k;

  TRITOOL_HD Voxel(unsigned number, unsigned depth, unsigned width) : i(0), j(0), k(0) {
    if (depth == 0 || width == 0) return;  // an empty map: no voxel is visited
    const unsigned row = number / width;
    k = number - row * width;
    i = row / depth;
    j = row - i * depth;
  }

  __device__ __forceinline__ void advance(const Voxel& distance, unsigned depth, unsigned width) {
    k += distance.k;
    j += distance.j;
    i += distance.i;
    if (k >= width) {
      k -= width;
      ++j;
    }
    if (j >= depth) {
      j -= depth;
      ++i;
    }
  }
};
template <class Params>
Voxel voxel_distance(const Params& params, int64_t count) {
  return {static_cast<unsigned>(count), static_cast<unsigned>(params.size[1]), static_cast<unsigned>(params.size[2])};
}

template <class In, Keep kKeep>
__device__ __forceinline__ void reset_state(const SoftmaxMomentsParams<In>& params,
                                            MomentState<Accumulator<In>, kKeep>& state) {
  using T = Accumulator<In>;
  const T centre[3] = {T(0.5) * T(params.size[0] - 1), T(0.5) * T(params.size[1] - 1), T(0.5) * T(params.size[2] - 1)};
  state.reset(centre);
}

// One more voxel; `value` is its place in the second map, if there is one. The branch is rare: a level is raised a few
// times a thread.
template <class T, Keep kKeep, class In>
__device__ __forceinline__ void push(MomentState<T, kKeep>& state, T c, T logit, const In* value, int i, int j, int k) {
  const T level = level_of(c, logit);
  if (level > state.level) {
    const T at[3] = {T(i), T(j), T(k)};
    state.raise(level, at);
  }
  const T weight = softmax_weight(c, logit, state.level);
  state.add(weight, T(i), T(j), T(k));
  if constexpr (kKeep == Keep::kExpectation) state.value.add(weight, logit, load(value));
}

template <class In, Keep kKeep>
__device__ __forceinline__ void write_result(const SoftmaxMomentsParams<In>& params, int64_t map,
                                             const MomentState<Accumulator<In>, kKeep>& state) {
  using T = Accumulator<In>;
  const int dims = params.dims;
  T* mean = params.mean + map * mean_size(params);
  // Loops over axes, not results: an index known only at run time would put the state into local memory.
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    const int d = moment_axis(dims, axis);
    if (d >= dims) continue;
    mean[d] = state.mean(axis);
    if constexpr (kKeep == Keep::kCovariance) {
#pragma unroll
      for (int other = 0; other < 3; ++other) {
        const int e = moment_axis(dims, other);
        if (e < dims) params.covariance[(map * dims + d) * dims + e] = state.covariance(axis, other);
      }
    }
  }
  if constexpr (kKeep == Keep::kExpectation)
    mean[dims] = state.expectation(softmax_weight(params.c, state.value.spoilt, state.level));
  else
    params.log_partition[map] = state.log_partition();
  params.partition[2 * map] = state.level;
  params.partition[2 * map + 1] = state.sum;
}

template <class In, Keep kKeep>
__device__ __forceinline__ void write_result_or_partial(const SoftmaxMomentsParams<In>& params, int64_t map, int split,
                                                        int splits, const MomentState<Accumulator<In>, kKeep>& state) {
  if (splits == 1)
    write_result<In, kKeep>(params, map, state);
  else
    pack_state(state, params.partial + (map * splits + split) * cuda::kMomentStateSize);
}

// Blocks: maps x splits. kWidth elements a load; more than one only for maps that are dense rows of a multiple of it.
template <class In, Keep kKeep, int kWidth>
__global__ void __launch_bounds__(kBlock)
    moments_rows_kernel(SoftmaxMomentsParams<In> params, int splits, Voxel distance) {
  using Params = SoftmaxMomentsParams<In>;
  using T = Accumulator<In>;
  constexpr bool kValue = kKeep == Keep::kExpectation;
  TRITOOL_SHARED(T, merged, kWarps * cuda::kMomentStateSize);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned loads = static_cast<unsigned>(params.size[0]) * depth * width / kWidth;
  const int64_t blocks = params.maps.count * splits;
  for (int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const int64_t map = block / splits;
    const int split = static_cast<int>(block - map * splits);
    int64_t offset[Params::kOperands];
    params.maps.offsets(map, offset);
    const In* logits = params.logits + offset[Params::kLogits];
    const In* values = kValue ? params.values + offset[Params::kValues] : nullptr;
    MomentState<T, kKeep> state;
    reset_state<In, kKeep>(params, state);
    unsigned load_index = split * kBlock + threadIdx.x;
    Voxel voxel(load_index * kWidth, depth, width);
    for (; load_index < loads; load_index += splits * kBlock, voxel.advance(distance, depth, width)) {
      const unsigned element = load_index * kWidth;
      const auto [i, j, k] = voxel;
      if constexpr (kWidth > 1) {
        using Load = Vector<In, kWidth>;
        const Load vector = *reinterpret_cast<const Load*>(logits + element);
        const Load value = kValue ? *reinterpret_cast<const Load*>(values + element) : Load{};
#pragma unroll
        for (int n = 0; n < kWidth; ++n)
          push(state, params.c, load(&vector.element[n]), &value.element[n], int(i), int(j), int(k) + n);
      } else {
        const T logit = load(element_of(logits, params.stride[Params::kLogits], i, j, k));
        const In* value = kValue ? element_of(values, params.stride[Params::kValues], i, j, k) : nullptr;
        push(state, params.c, logit, value, int(i), int(j), int(k));
      }
    }
    state = warp_merge(state);
    if (lane == 0) pack_state(state, &merged[warp * cuda::kMomentStateSize]);
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int other = 1; other < kWarps; ++other)
        state.merge(unpack_state<T, kKeep>(&merged[other * cuda::kMomentStateSize]));
      write_result_or_partial<In, kKeep>(params, map, split, splits, state);
    }
    __syncthreads();  // before the next block's states overwrite `merged`
  }
}

// Blocks: groups of 32 neighbouring maps x splits. Thread (lane, warp): map of the lane, every kWarps-th voxel.
template <class In, Keep kKeep>
__global__ void __launch_bounds__(kBlock)
    moments_lanes_kernel(SoftmaxMomentsParams<In> params, int splits, Voxel distance) {
  using Params = SoftmaxMomentsParams<In>;
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
    MomentState<T, kKeep> state;
    reset_state<In, kKeep>(params, state);
    if (map < params.maps.count) {
      int64_t offset[Params::kOperands];
      params.maps.offsets(map, offset);
      const In* logits = params.logits + offset[Params::kLogits];
      const In* values = kKeep == Keep::kExpectation ? params.values + offset[Params::kValues] : nullptr;
      unsigned number = split * kWarps + warp;
      Voxel voxel(number, depth, width);
      for (; number < voxels; number += splits * kWarps, voxel.advance(distance, depth, width)) {
        const auto [i, j, k] = voxel;
        const T logit = load(element_of(logits, params.stride[Params::kLogits], i, j, k));
        const In* value = element_of(values, params.stride[Params::kValues], i, j, k);
        push(state, params.c, logit, value, int(i), int(j), int(k));
      }
    }
    pack_state(state, &merged[threadIdx.x * cuda::kMomentStateSize]);
    __syncthreads();
    if (warp == 0 && map < params.maps.count) {
      for (int other = 1; other < kWarps; ++other)
        state.merge(unpack_state<T, kKeep>(&merged[(other * kWarpSize + lane) * cuda::kMomentStateSize]));
      write_result_or_partial<In, kKeep>(params, map, split, splits, state);
    }
    __syncthreads();
  }
}

// One warp per map: merges the splits' sums.
template <class In, Keep kKeep>
__global__ void __launch_bounds__(kBlock) moments_merge_kernel(SoftmaxMomentsParams<In> params, int splits) {
  using T = Accumulator<In>;
  const int lane = threadIdx.x % kWarpSize;
  for (int64_t map = thread_index() / kWarpSize; map < params.maps.count; map += thread_count() / kWarpSize) {
    MomentState<T, kKeep> state;
    reset_state<In, kKeep>(params, state);
    for (int split = lane; split < splits; split += kWarpSize)
      state.merge(unpack_state<T, kKeep>(params.partial + (map * splits + split) * cuda::kMomentStateSize));
    state = warp_merge(state);
    if (lane == 0) write_result<In, kKeep>(params, map, state);
  }
}

// The gradients to a logit and to its value (not touched without values).
template <bool kValue, class In>
__device__ __forceinline__ void pull(const SoftmaxMomentsBackwardParams<In>& params,
                                     const MomentCotangent<Accumulator<In>>& map, const Accumulator<In> (&t)[3], int k,
                                     In& logit, In& value) {
  using T = Accumulator<In>;
  const T weight = softmax_weight(params.c, load(&logit), map.level);
  const T d = T(k) - map.mean[2];
  T slope = t[0] + d * (t[1] + d * t[2]);
  if constexpr (kValue) {
    slope += map.value.term(weight, load(&value));
    store(&value, map.valid ? weight * map.inverse_sum * map.value.grad : T(0));
  }
  store(&logit, map.valid ? weight * (params.inverse_temperature * map.inverse_sum) * slope : T(0));
}

// The same for voxel (i, j, k) of maps in any strides.
template <bool kValue, class In>
__device__ __forceinline__ void pull_element(const SoftmaxMomentsBackwardParams<In>& params,
                                             const MomentCotangent<Accumulator<In>>& map, const Accumulator<In> (&t)[3],
                                             unsigned i, unsigned j, unsigned k, const In* logits, In* grad_logits,
                                             const In* values, In* grad_values) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  In logit = *element_of(logits, params.stride[Params::kLogits], i, j, k);
  In value = kValue ? *element_of(values, params.stride[Params::kValues], i, j, k) : In{};
  pull<kValue>(params, map, t, int(k), logit, value);
  *element_of(grad_logits, params.stride[Params::kGradLogits], i, j, k) = logit;
  if constexpr (kValue) *element_of(grad_values, params.stride[Params::kGradValues], i, j, k) = value;
}

// Blocks: maps x chunks of voxels.
template <class In, bool kValue, int kWidth>
__global__ void __launch_bounds__(kBlock)
    moments_backward_rows_kernel(SoftmaxMomentsBackwardParams<In> params, int chunks, Voxel distance) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned loads = static_cast<unsigned>(params.size[0]) * depth * width / kWidth;
  for (int64_t block = blockIdx.x; block < params.maps.count * chunks; block += gridDim.x) {
    const int64_t map = block / chunks;
    const unsigned chunk = static_cast<unsigned>(block - map * chunks);
    int64_t offset[Params::kOperands];
    params.maps.offsets(map, offset);
    const In* logits = params.logits + offset[Params::kLogits];
    In* grad_logits = params.grad_logits + offset[Params::kGradLogits];
    const In* values = kValue ? params.values + offset[Params::kValues] : nullptr;
    In* grad_values = kValue ? params.grad_values + offset[Params::kGradValues] : nullptr;
    const MomentCotangent<T> cotangent = moment_cotangent(params, map);
    unsigned load_index = chunk * kBlock + threadIdx.x;
    Voxel voxel(load_index * kWidth, depth, width);
    for (; load_index < loads; load_index += chunks * kBlock, voxel.advance(distance, depth, width)) {
      const unsigned element = load_index * kWidth;
      const auto [i, j, k] = voxel;
      T t[3];
      cotangent.row(T(i), T(j), t);
      if constexpr (kWidth > 1) {
        using Load = Vector<In, kWidth>;
        Load vector = *reinterpret_cast<const Load*>(logits + element);
        Load value = kValue ? *reinterpret_cast<const Load*>(values + element) : Load{};
#pragma unroll
        for (int n = 0; n < kWidth; ++n)
          pull<kValue>(params, cotangent, t, int(k) + n, vector.element[n], value.element[n]);
        *reinterpret_cast<Load*>(grad_logits + element) = vector;
        if constexpr (kValue) *reinterpret_cast<Load*>(grad_values + element) = value;
      } else {
        pull_element<kValue>(params, cotangent, t, i, j, k, logits, grad_logits, values, grad_values);
      }
    }
  }
}

template <class In, bool kValue>
__global__ void __launch_bounds__(kBlock)
    moments_backward_lanes_kernel(SoftmaxMomentsBackwardParams<In> params, int chunks, Voxel distance) {
  using Params = SoftmaxMomentsBackwardParams<In>;
  using T = Accumulator<In>;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const unsigned depth = static_cast<unsigned>(params.size[1]), width = static_cast<unsigned>(params.size[2]);
  const unsigned voxels = static_cast<unsigned>(params.size[0]) * depth * width;
  for (int64_t block = blockIdx.x; block < ceil_div(params.maps.count, kWarpSize) * chunks; block += gridDim.x) {
    const int64_t group = block / chunks;
    const unsigned chunk = static_cast<unsigned>(block - group * chunks);
    const int64_t map = group * kWarpSize + lane;
    if (map >= params.maps.count) continue;
    int64_t offset[Params::kOperands];
    params.maps.offsets(map, offset);
    const In* logits = params.logits + offset[Params::kLogits];
    In* grad_logits = params.grad_logits + offset[Params::kGradLogits];
    const In* values = kValue ? params.values + offset[Params::kValues] : nullptr;
    In* grad_values = kValue ? params.grad_values + offset[Params::kGradValues] : nullptr;
    const MomentCotangent<T> cotangent = moment_cotangent(params, map);
    unsigned number = chunk * kWarps + warp;
    Voxel voxel(number, depth, width);
    for (; number < voxels; number += chunks * kWarps, voxel.advance(distance, depth, width)) {
      const auto [i, j, k] = voxel;
      T t[3];
      cotangent.row(T(i), T(j), t);
      pull_element<kValue>(params, cotangent, t, i, j, k, logits, grad_logits, values, grad_values);
    }
  }
}

// Elements a 16-byte load can take: dense maps only, and every map's start aligned.
template <class In, int kOperands>
int vector_width(const Batch<kOperands>& maps, const int64_t (&size)[3], const int64_t (&strides)[kOperands][3],
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

template <class In, Keep kKeep>
int launch_forward(const SoftmaxMomentsParams<In>& params, Stream stream) {
  const int64_t elements = params.size[0] * params.size[1] * params.size[2];
  constexpr int kWidth = 16 / sizeof(In);
  const int splits = static_cast<int>(cuda::softmax_moments_splits(params.maps.count, elements));
  if (params.maps_adjacent) {
    const unsigned grid = grid_size(ceil_div(params.maps.count, kWarpSize) * splits, 1);
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_lanes_kernel<In, kKeep>), grid, kBlock, 0, stream, params, splits,
                   voxel_distance(params, int64_t(splits) * kWarps));
  } else {
    const unsigned grid = grid_size(params.maps.count * splits, 1);
    if (vector_width<In>(params.maps, params.size, params.stride, {params.logits, params.values}) == kWidth)
      TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_rows_kernel<In, kKeep, kWidth>), grid, kBlock, 0, stream, params, splits,
                     voxel_distance(params, int64_t(splits) * kBlock * kWidth));
    else
      TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_rows_kernel<In, kKeep, 1>), grid, kBlock, 0, stream, params, splits,
                     voxel_distance(params, int64_t(splits) * kBlock));
  }
  if (splits > 1)
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_merge_kernel<In, kKeep>), grid_size(params.maps.count, kWarps), kBlock, 0,
                   stream, params, splits);
  return last_launch_error();
}

template <class In, bool kValue>
int launch_backward(const SoftmaxMomentsBackwardParams<In>& params, Stream stream) {
  const int64_t elements = params.size[0] * params.size[1] * params.size[2];
  constexpr int kWidth = 16 / sizeof(In);
  const int64_t per_block = params.maps_adjacent ? kWarps * 8 : kBlock * 8;
  const int chunks = static_cast<int>(ceil_div(elements, per_block) < 4096 ? ceil_div(elements, per_block) : 4096);
  if (params.maps_adjacent) {
    const unsigned grid = grid_size(ceil_div(params.maps.count, kWarpSize) * chunks, 1);
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_backward_lanes_kernel<In, kValue>), grid, kBlock, 0, stream, params, chunks,
                   voxel_distance(params, int64_t(chunks) * kWarps));
    return last_launch_error();
  }
  const unsigned grid = grid_size(params.maps.count * chunks, 1);
  const int width = vector_width<In>(params.maps, params.size, params.stride,
                                     {params.logits, params.grad_logits, params.values, params.grad_values});
  if (width == kWidth)
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_backward_rows_kernel<In, kValue, kWidth>), grid, kBlock, 0, stream, params,
                   chunks, voxel_distance(params, int64_t(chunks) * kBlock * kWidth));
  else
    TRITOOL_LAUNCH(TRITOOL_KERNEL(moments_backward_rows_kernel<In, kValue, 1>), grid, kBlock, 0, stream, params, chunks,
                   voxel_distance(params, int64_t(chunks) * kBlock));
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
  if (params.values != nullptr) return launch_forward<In, Keep::kExpectation>(params, stream);
  if (params.covariance != nullptr) return launch_forward<In, Keep::kCovariance>(params, stream);
  return launch_forward<In, Keep::kMean>(params, stream);
}

template <class In>
int softmax_moments_backward(const SoftmaxMomentsBackwardParams<In>& params, CUstream_st* stream) {
  if (params.maps.count == 0 || params.size[0] * params.size[1] * params.size[2] == 0) return 0;
  return params.values != nullptr ? launch_backward<In, true>(params, stream)
                                  : launch_backward<In, false>(params, stream);
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
