// SPDX-License-Identifier: Apache-2.0
//
// Everything a CUDA source of tritool needs besides its own mathematics: the launch, shared memory,
// index helpers and reductions over a warp or a block.
//
// This header is the one place that decides what a `.cu` file sees. Compiled by nvcc it sees CUDA.
// Compiled by an ordinary C++ compiler with TRITOOL_EMULATOR defined it sees the test device of
// tests/native/emulator, which runs the same kernels on the CPU. Three things are therefore spelled
// by macro, because C++ has no syntax for them: the launch and the two kinds of shared memory.
// The rest of a kernel is ordinary CUDA.
//
//   template <class T, bool kAligned>
//   __global__ void __launch_bounds__(256) scale(T* values, int64_t count, T factor) { ... }
//
//   TRITOOL_LAUNCH(TRITOOL_KERNEL(scale<float, true>), grid_size(count, 256), 256, 0, stream,
//                  values, count, factor);
//   return last_launch_error();
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(TRITOOL_EMULATOR)
#include "emulator.h"
#elif defined(__CUDACC__)
#include <cuda_runtime.h>
#else
#error "launch.cuh is for CUDA sources: compile with nvcc, or define TRITOOL_EMULATOR"
#endif

struct CUstream_st;  // cudaStream_t is a pointer to this; naming it needs no CUDA header

namespace tritool {

using Stream = CUstream_st*;

constexpr int kWarpSize = 32;
constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int64_t kMaxGridX = 2147483647;  // gridDim.y and .z end at 65535 already

// ---- Launching ----

// Shields the commas of a template argument list: TRITOOL_KERNEL(scale<float, true>).
#define TRITOOL_KERNEL(...) __VA_ARGS__
#define TRITOOL_TEXT(...) #__VA_ARGS__

// Launches `kernel` with the arguments that follow `stream` (at least one). They are converted to
// the kernel's parameter types once, on the host. `shared_bytes` is the dynamic shared memory;
// above the default limit of 48 KiB the kernel's limit is raised first.
// nvcc: ask last_launch_error() afterwards. Emulator: the grid has finished on return, and every
// failure, also one inside the kernel, is a std::runtime_error.
#if defined(TRITOOL_EMULATOR)

#define TRITOOL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                          \
   ::tritool::emulator::launch(TRITOOL_TEXT(kernel), kernel, grid, block, shared_bytes, __VA_ARGS__))

inline int last_launch_error() { return 0; }
inline const char* launch_error_text(int) { return "no error"; }

#else

#define TRITOOL_LAUNCH(kernel, grid, block, shared_bytes, stream, ...) \
  ::tritool::launch(kernel, grid, block, shared_bytes, stream, __VA_ARGS__)

template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Stream stream, Args... args) {
  if (shared_bytes > 48 * 1024) {
    // A failure here makes the launch below fail too; both are seen by last_launch_error().
    static_cast<void>(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Params>(args)...);
}

// The error of the launches since the last call, 0 for none; asking clears it.
inline int last_launch_error() { return static_cast<int>(cudaGetLastError()); }
inline const char* launch_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

#endif

// ---- Shared memory ----

// TRITOOL_SHARED(T, name, n): the block-wide array `T name[n]`; n is a constant, T a plain type
// without a comma in its name.
// TRITOOL_DYNAMIC_SHARED(T, name): `T* name`, the start of the dynamic shared memory of the launch,
// aligned to 16 bytes. Several declarations in one kernel name the same memory, as in CUDA.
// Both start out unset.
#if defined(TRITOOL_EMULATOR)

#define TRITOOL_SHARED(T, name, n)                 \
  static const char tritool_shared_key_##name = 0; \
  ::tritool::emulator::SharedArray<T, n>& name = ::tritool::emulator::shared_array<T, n>(&tritool_shared_key_##name)
#define TRITOOL_DYNAMIC_SHARED(T, name) T* name = ::tritool::emulator::dynamic_shared<T>()

#else

#define TRITOOL_SHARED(T, name, n) __shared__ T name[n]
#define TRITOOL_DYNAMIC_SHARED(T, name)                                          \
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16");     \
  extern __shared__ __align__(16) unsigned char tritool_dynamic_shared_memory[]; \
  T* name = reinterpret_cast<T*>(tritool_dynamic_shared_memory)

#endif

// ---- Grids and indices ----

__host__ __device__ constexpr int64_t ceil_div(int64_t count, int64_t per_group) {
  return count / per_group + (count % per_group != 0);
}

// Blocks for `count` items at `per_block` items a block. Capped at the largest grid, so a kernel
// whose count may exceed 2^31 blocks walks in a grid-stride loop:
//   for (int64_t i = thread_index(); i < count; i += thread_count()) ...
// `count` of zero gives zero, which is no valid grid: do not launch then.
inline unsigned grid_size(int64_t count, int64_t per_block) {
  const int64_t blocks = ceil_div(count, per_block);
  return static_cast<unsigned>(blocks < kMaxGridX ? blocks : kMaxGridX);
}

// Index of this thread, and number of threads, in a one-dimensional grid of one-dimensional blocks.
__device__ __forceinline__ int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ int64_t thread_count() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// ---- Memory ----

// Neighbouring elements that one instruction loads or stores.
template <class In, int kCount>
struct alignas(sizeof(In) * kCount) Vector {
  In element[kCount];
};

// ---- Reductions ----
// T is float, double or a 32- or 64-bit integer. The order of the additions is fixed, so equal
// input gives equal bits. Every lane of every warp takes part: blocks are one-dimensional multiples
// of 32.

// Sum over the warp, returned to all its lanes.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(kFullWarp, value, offset);
  }
  return value;
}

// Maximum over the warp, returned to all its lanes; NaN only wins where it comes first.
template <class T>
__device__ __forceinline__ T warp_max(T value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, value, offset);
    value = other > value ? other : value;
  }
  return value;
}

// Sum over the block, returned to all its threads; contains two __syncthreads().
template <class T>
__device__ __forceinline__ T block_sum(T value) {
  TRITOOL_SHARED(T, partial, kWarpSize);
  const int lane = threadIdx.x % kWarpSize;
  const int warp = threadIdx.x / kWarpSize;
  const int warps = blockDim.x / kWarpSize;
  value = warp_sum(value);
  if (lane == 0) partial[warp] = value;
  __syncthreads();
  // Every warp adds up the partial sums for itself: cheaper than one warp and a third barrier.
  value = warp_sum(lane < warps ? partial[lane] : T(0));
  __syncthreads();  // the next call overwrites `partial`
  return value;
}

}  // namespace tritool
