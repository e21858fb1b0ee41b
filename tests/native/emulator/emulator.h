// SPDX-License-Identifier: Apache-2.0
//
// A CUDA device for tests: runs the kernels of csrc/kernels on the CPU, compiled by a plain C++
// compiler. This header is what a kernel sees; the scheduler behind it is in emulator.cpp.
//
// Blocks run one after another. Each CUDA thread of a block is a fiber (its own stack, its own
// point of execution) that runs until it has to wait for others: at __syncthreads() or at a
// warp-level operation. All of it happens in the host thread that launched the grid; several host
// threads may launch at once, each has a device of its own.
//
// What it reports (as std::runtime_error from the launch, with file, line, block and thread):
//   - divergent or mismatched __syncthreads(), also after some threads have returned
//   - warp operations whose mask names lanes that never come, or leaves out the caller
//   - shuffles that read a lane outside the mask
//   - misaligned __ldg and atomics, writes next to a shared array, invalid launch configurations
// Reads of unset shared memory give NaN, so a missing barrier shows in the results; with
// TRITOOL_EMULATOR_SEED=n the order of threads and blocks is shuffled to show the rest.
// Kernels built with -fsanitize=address,undefined or =thread and linked to the matching build of
// emulator.cpp get exact reports of out-of-bounds accesses and of data races.
//
// What it does not model: time, occupancy, bank conflicts, coalescing, registers, contraction to
// fused multiply-add, the accuracy of the fast intrinsics (__expf and others are the exact
// functions here), streams.
#pragma once

#include <math.h>  // not <cmath>: kernels call sqrt, isnan and the rest unqualified

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

// ---- CUDA's keywords ----

#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ _Pragma("GCC error \"write TRITOOL_SHARED(T, name, n) for __shared__ T name[n]\"")
#define __activemask() _Pragma("GCC error \"__activemask() depends on scheduling; pass the mask that is meant\"") 0u

// ---- CUDA's vector types ----

// clang-format off
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) double2 { double x, y; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float3 { float x, y, z; };
struct uint3 { unsigned x, y, z; };
// clang-format on

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned nx = 1, unsigned ny = 1, unsigned nz = 1) : x(nx), y(ny), z(nz) {}
};

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float3 make_float3(float x, float y, float z) { return {x, y, z}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace tritool::emulator {

// ---- The scheduler's interface ----

// A place in a kernel's source. Intrinsics take it as a defaulted last argument, which the compiler
// fills in where they are called.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// The built-in variables of the thread that is running.
struct ThreadView {
  uint3 thread_idx, block_idx;
  dim3 block_dim, grid_dim;
  int lane;
};
// __thread, unlike thread_local, is read without a call to an initialisation routine.
extern __thread const ThreadView* current_thread;

// Runs `body(arguments)` once for every thread of the grid.
// Throws std::runtime_error for an invalid configuration and for everything a thread did wrong;
// the device can be used again afterwards.
void run_grid(const char* kernel_name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
              const void* arguments);

// Order of threads and blocks in the launches to come, of all host threads: 0 is ascending, every
// other seed a shuffle, which is repeated at each barrier. Starts as TRITOOL_EMULATOR_SEED or 0.
void set_seed(uint64_t seed);
uint64_t seed();

// Ends the launch with an error at the place where the running thread is.
[[noreturn]] void fail(const char* what, Site site);

void sync_block(Site site);
void sync_warp(unsigned mask, Site site);
// The bits that `source_lane` passes in the same operation.
uint64_t shuffle(unsigned mask, uint64_t bits, int source_lane, const char* name, Site site);
// The lanes of the mask that pass true.
unsigned ballot(unsigned mask, bool predicate, const char* name, Site site);
void fence();

// The array that belongs to `key` in the running block: the same for all its threads.
void* shared_memory(const void* key, size_t bytes, size_t alignment, Site site);
void* dynamic_shared_memory();

// ---- Launch and shared memory, typed ----

template <class... Params, class... Args>
void launch(const char* name, void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "wrong number of kernel arguments");
  static_assert((std::is_trivially_copyable_v<Params> && ...),
                "kernel parameters are passed by value and copied byte by byte");
  struct Call {
    void (*kernel)(Params...);
    std::tuple<Params...> arguments;
  };
  const Call call{kernel, {static_cast<Params>(args)...}};
  const auto body = [](const void* p) {
    const Call& c = *static_cast<const Call*>(p);
    std::apply(c.kernel, c.arguments);
  };
  run_grid(name, grid, block, shared_bytes, body, &call);
}

template <class T, size_t n>
using SharedArray = T[n];

// An array, not a pointer: sizeof is right, and -fsanitize=undefined checks the subscripts.
template <class T, size_t n>
SharedArray<T, n>& shared_array(const void* key, Site site = Site::here()) {
  static_assert(std::is_trivially_default_constructible_v<T> && std::is_trivially_copyable_v<T>,
                "shared memory has no constructors");
  return *static_cast<SharedArray<T, n>*>(shared_memory(key, sizeof(T) * n, alignof(T), site));
}

template <class T>
T* dynamic_shared() {
  static_assert(alignof(T) <= 16, "dynamic shared memory is aligned to 16");
  return static_cast<T*>(dynamic_shared_memory());
}

// ---- Warp operations ----

inline void check_width(int width, Site site) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    fail("shuffle width is not a power of two up to 32", site);
  }
}

template <class T>
T shuffle_value(unsigned mask, T value, int source_lane, const char* name, Site site) {
  static_assert(std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8),
                "shuffles exchange 32- or 64-bit numbers");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = shuffle(mask, bits, source_lane, name, site);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// ---- Atomics ----

// Relaxed, as CUDA's: they order nothing else. A loop of compare-and-swap serves every operation.
template <class T, class Update>
T atomic_update(T* address, Update update, Site site) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static_assert(sizeof(T) == sizeof(Bits), "atomics act on 32- or 64-bit numbers");
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) fail("misaligned atomic", site);
  Bits* const target = reinterpret_cast<Bits*>(address);
  Bits old_bits = __atomic_load_n(target, __ATOMIC_RELAXED);
  for (;;) {
    T old_value;
    std::memcpy(&old_value, &old_bits, sizeof old_value);
    const T new_value = update(old_value);
    Bits new_bits;
    std::memcpy(&new_bits, &new_value, sizeof new_bits);
    if (__atomic_compare_exchange_n(target, &old_bits, new_bits, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
      return old_value;
    }
  }
}

}  // namespace tritool::emulator

// ---- What CUDA code calls: built-in variables ----

#define threadIdx (::tritool::emulator::current_thread->thread_idx)
#define blockIdx (::tritool::emulator::current_thread->block_idx)
#define blockDim (::tritool::emulator::current_thread->block_dim)
#define gridDim (::tritool::emulator::current_thread->grid_dim)
constexpr int warpSize = 32;

using TritoolSite = ::tritool::emulator::Site;

// ---- ... barriers, votes, shuffles ----

inline void __syncthreads(TritoolSite site = TritoolSite::here()) { ::tritool::emulator::sync_block(site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, TritoolSite site = TritoolSite::here()) {
  ::tritool::emulator::sync_warp(mask, site);
}
inline void __threadfence() { ::tritool::emulator::fence(); }
inline void __threadfence_block() { ::tritool::emulator::fence(); }

inline unsigned __ballot_sync(unsigned mask, int predicate, TritoolSite site = TritoolSite::here()) {
  return ::tritool::emulator::ballot(mask, predicate != 0, "__ballot_sync", site);
}
inline int __any_sync(unsigned mask, int predicate, TritoolSite site = TritoolSite::here()) {
  return ::tritool::emulator::ballot(mask, predicate != 0, "__any_sync", site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, TritoolSite site = TritoolSite::here()) {
  return ::tritool::emulator::ballot(mask, predicate == 0, "__all_sync", site) == 0;
}

// Shuffles act inside segments of `width` lanes. Where the source lies beyond the segment the
// caller gets its own value back; an index wraps around, and __shfl_xor_sync may reach into an
// earlier segment (PTX ISA, shfl.sync).
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, TritoolSite site = TritoolSite::here()) {
  ::tritool::emulator::check_width(width, site);
  const int start = ::tritool::emulator::current_thread->lane & ~(width - 1);
  return ::tritool::emulator::shuffle_value(mask, value, start | (source & (width - 1)), "__shfl_sync", site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, TritoolSite site = TritoolSite::here()) {
  ::tritool::emulator::check_width(width, site);
  if (delta >= 32) ::tritool::emulator::fail("shuffle distance is 32 or more", site);
  const int lane = ::tritool::emulator::current_thread->lane;
  const int source = lane - static_cast<int>(delta);
  const bool inside = source >= (lane & ~(width - 1));
  return ::tritool::emulator::shuffle_value(mask, value, inside ? source : lane, "__shfl_up_sync", site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, TritoolSite site = TritoolSite::here()) {
  ::tritool::emulator::check_width(width, site);
  if (delta >= 32) ::tritool::emulator::fail("shuffle distance is 32 or more", site);
  const int lane = ::tritool::emulator::current_thread->lane;
  const int source = lane + static_cast<int>(delta);
  const bool inside = source <= (lane | (width - 1));
  return ::tritool::emulator::shuffle_value(mask, value, inside ? source : lane, "__shfl_down_sync", site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, TritoolSite site = TritoolSite::here()) {
  ::tritool::emulator::check_width(width, site);
  if (lane_mask < 0 || lane_mask >= 32) {
    ::tritool::emulator::fail("shuffle distance is 32 or more", site);
  }
  const int lane = ::tritool::emulator::current_thread->lane;
  const int source = lane ^ lane_mask;
  const bool inside = source <= (lane | (width - 1));
  return ::tritool::emulator::shuffle_value(mask, value, inside ? source : lane, "__shfl_xor_sync", site);
}

// ---- ... memory ----

template <class T>
T __ldg(const T* address, TritoolSite site = TritoolSite::here()) {
  if (reinterpret_cast<uintptr_t>(address) % alignof(T) != 0) {
    ::tritool::emulator::fail("misaligned __ldg", site);
  }
  return *address;
}

// Functions for exactly the types CUDA has, not a template: an argument of another type is
// converted, as under nvcc.
#define TRITOOL_EMULATED_ATOMIC(name, T, new_value)                                                                   \
  inline T name(T* address, T value, TritoolSite site = TritoolSite::here()) {                                        \
    return ::tritool::emulator::atomic_update(address, [value](T old) -> T { return (void)old, (new_value); }, site); \
  }
TRITOOL_EMULATED_ATOMIC(atomicAdd, float, old + value)
TRITOOL_EMULATED_ATOMIC(atomicAdd, double, old + value)
TRITOOL_EMULATED_ATOMIC(atomicAdd, int,
                        static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value)))  // wraps around
TRITOOL_EMULATED_ATOMIC(atomicAdd, unsigned, old + value)
TRITOOL_EMULATED_ATOMIC(atomicAdd, unsigned long long, old + value)
TRITOOL_EMULATED_ATOMIC(atomicMax, int, old > value ? old : value)
TRITOOL_EMULATED_ATOMIC(atomicMax, unsigned, old > value ? old : value)
TRITOOL_EMULATED_ATOMIC(atomicMin, int, old < value ? old : value)
TRITOOL_EMULATED_ATOMIC(atomicMin, unsigned, old < value ? old : value)
TRITOOL_EMULATED_ATOMIC(atomicExch, int, value)
TRITOOL_EMULATED_ATOMIC(atomicExch, unsigned, value)
TRITOOL_EMULATED_ATOMIC(atomicExch, float, value)
#undef TRITOOL_EMULATED_ATOMIC

inline int atomicCAS(int* address, int expected, int desired, TritoolSite site = TritoolSite::here()) {
  return ::tritool::emulator::atomic_update(address, [=](int old) { return old == expected ? desired : old; }, site);
}
inline unsigned atomicCAS(unsigned* address, unsigned expected, unsigned desired,
                          TritoolSite site = TritoolSite::here()) {
  return ::tritool::emulator::atomic_update(
      address, [=](unsigned old) { return old == expected ? desired : old; }, site);
}

// ---- ... arithmetic ----

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(static_cast<unsigned>(v)); }

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline long min(long a, long b) { return a < b ? a : b; }
inline long max(long a, long b) { return a > b ? a : b; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a > b ? a : b; }
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

inline float rsqrtf(float v) { return 1.0f / sqrtf(v); }
inline double rsqrt(double v) { return 1.0 / sqrt(v); }
inline float __expf(float v) { return expf(v); }
inline float __logf(float v) { return logf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float __fsqrt_rn(float v) { return sqrtf(v); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
