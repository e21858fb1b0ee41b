// SPDX-License-Identifier: Apache-2.0
//
// Kernels with planted bugs that only the compiler or a sanitizer build of test_emulator reports.
#include "test_emulator_planted.h"

#include <cstdio>
#include <functional>
#include <map>
#include <memory>

#include "launch.cuh"

namespace {

using tritool::kFullWarp;

// ---- For the compiler ----

#if defined(TRITOOL_PLANT_SHARED)
__global__ void plant_shared(float* out) {
  __shared__ float row[32];
  out[0] = row[0];
}
#endif
#if defined(TRITOOL_PLANT_ACTIVEMASK)
__global__ void plant_activemask(float* out) { out[0] = __shfl_sync(__activemask(), 1.0f, 0); }
#endif

// ---- For AddressSanitizer and UndefinedBehaviorSanitizer ----

__global__ void plant_global_overrun(float* out, int count) {
  if (static_cast<int>(threadIdx.x) <= count) out[threadIdx.x] = 1;
}
__global__ void plant_shared_overrun(float* out) {
  TRITOOL_SHARED(float, row, 33);
  float* const p = row;
  p[threadIdx.x + 2] = 1;
  __syncthreads();
  out[threadIdx.x] = p[threadIdx.x];
}
__global__ void plant_shared_subscript(float* out) {
  TRITOOL_SHARED(float, row, 33);
  row[threadIdx.x + 2] = 1;
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];
}
__global__ void plant_shared_leaked(float** pointer) {
  TRITOOL_SHARED(float, row, 8);
  if (blockIdx.x == 0) {
    row[0] = 1;
    *pointer = row;
  } else {
    **pointer = 2;
  }
}
__global__ void plant_misaligned_vector(const float* in, float* out) {
  out[0] = reinterpret_cast<const float4*>(in)->x;
}

// ---- For ThreadSanitizer ----

// These two also show in the results of a plain build.
__global__ void plant_missing_syncthreads(float* out) {
  TRITOOL_SHARED(float, row, 64);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = row[63 - threadIdx.x];
}
__global__ void plant_missing_syncwarp(float* out) {
  TRITOOL_SHARED(float, row, 32);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  out[threadIdx.x] = row[threadIdx.x ^ 1];
}

// A shuffle waits for the other lanes, but does not order memory.
__global__ void plant_shuffle_as_barrier(float* out) {
  TRITOOL_SHARED(float, row, 32);
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  const int other = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x), threadIdx.x ^ 1);
  out[threadIdx.x] = row[other];
}
__global__ void plant_global_race(float* out) { out[0] = static_cast<float>(threadIdx.x + blockIdx.x); }
// Barriers order the threads of a block, never those of two blocks.
__global__ void plant_global_race_after_barrier(float* out) {
  if (blockIdx.x == 0 && threadIdx.x == 0) out[0] = 1;
  __syncthreads();
  __syncthreads();
  if (blockIdx.x == 1 && threadIdx.x == 1) out[0] = 2;
}
// The barrier of one half of the warp does not order the other.
__global__ void plant_syncwarp_of_another_group(float* out) {
  TRITOOL_SHARED(float, row, 32);
  const unsigned half = threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u;
  row[threadIdx.x] = static_cast<float>(threadIdx.x);
  __syncwarp(half);
  out[threadIdx.x] = row[threadIdx.x ^ 16];
}
__global__ void plant_missing_fence(int* data, int* flag) {
  if (blockIdx.x == 0) {
    data[0] = 1;
    atomicExch(flag, 1);
  } else if (atomicAdd(flag, 0) == 1) {
    data[1] = data[0];
  }
}

}  // namespace

int run_planted(const std::string& name, std::vector<float>& results) {
  results.resize(64);
  float* const out = results.data();
  float* pointer = nullptr;
  int ints[4] = {};
  const auto short_row = std::make_unique<float[]>(32);
  const std::map<std::string, std::function<void()>> plants = {
      {"global_overrun", [&] { TRITOOL_LAUNCH(plant_global_overrun, 1, 64, 0, nullptr, short_row.get(), 32); }},
      {"shared_overrun", [&] { TRITOOL_LAUNCH(plant_shared_overrun, 1, 32, 0, nullptr, out); }},
      {"shared_subscript", [&] { TRITOOL_LAUNCH(plant_shared_subscript, 1, 32, 0, nullptr, out); }},
      {"shared_leaked", [&] { TRITOOL_LAUNCH(plant_shared_leaked, 2, 1, 0, nullptr, &pointer); }},
      {"misaligned_vector", [&] { TRITOOL_LAUNCH(plant_misaligned_vector, 1, 1, 0, nullptr, out + 1, out); }},
      {"global_race", [&] { TRITOOL_LAUNCH(plant_global_race, 2, 1, 0, nullptr, out); }},
      {"global_race_after_barrier", [&] { TRITOOL_LAUNCH(plant_global_race_after_barrier, 2, 32, 0, nullptr, out); }},
      {"missing_syncthreads", [&] { TRITOOL_LAUNCH(plant_missing_syncthreads, 1, 64, 0, nullptr, out); }},
      {"missing_syncwarp", [&] { TRITOOL_LAUNCH(plant_missing_syncwarp, 1, 32, 0, nullptr, out); }},
      {"shuffle_as_barrier", [&] { TRITOOL_LAUNCH(plant_shuffle_as_barrier, 1, 32, 0, nullptr, out); }},
      {"syncwarp_of_another_group", [&] { TRITOOL_LAUNCH(plant_syncwarp_of_another_group, 1, 32, 0, nullptr, out); }},
      {"missing_fence", [&] { TRITOOL_LAUNCH(plant_missing_fence, 2, 1, 0, nullptr, ints, ints + 2); }},
  };
  const auto plant = plants.find(name);
  if (plant == plants.end()) {
    std::printf("no planted bug is called %s\n", name.c_str());
    return 2;
  }
  plant->second();
  return 0;
}
