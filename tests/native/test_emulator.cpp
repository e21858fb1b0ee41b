// SPDX-License-Identifier: Apache-2.0
//
// Proves the emulated device: correct kernels give the right results in every order of execution,
// wrong ones are reported.
//
//   test_emulator                  all checks; exit code 0 if they pass
//   test_emulator --plant <name>   one kernel with a bug that only a sanitizer build sees
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "launch.cuh"
#include "test_emulator_planted.h"

namespace {

using tritool::kFullWarp;

int passed = 0;
int failed = 0;

void check(bool condition, const char* text, int line) {
  ++(condition ? passed : failed);
  if (!condition) std::printf("%s:%d: failed: %s\n", __FILE__, line, text);
}
#define CHECK(condition) check((condition), #condition, __LINE__)

// The message of the exception that `action` throws; empty if it throws none.
std::string error_of(const std::function<void()>& action) {
  try {
    action();
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "";
}

bool contains(const std::string& text, const std::string& part) {
  const bool found = text.find(part) != std::string::npos;
  if (!found) std::printf("'%s' is not in '%s'\n", part.c_str(), text.c_str());
  return found;
}

// Checks that the kernel launch is refused or ends with a message that contains `part`.
#define CHECK_ERROR(part, ...) check(contains(error_of([&] { __VA_ARGS__; }), part), part, __LINE__)

// ---- Correct kernels ----

__global__ void add_one(float* sum, int64_t count) {
  if (tritool::thread_index() < count) atomicAdd(sum, 1.0f);
}

__global__ void record_index(int* visits, int* indices) {
  const dim3 g = gridDim;
  const dim3 b = blockDim;
  const int block = (blockIdx.z * g.y + blockIdx.y) * g.x + blockIdx.x;
  const int thread = (threadIdx.z * b.y + threadIdx.y) * b.x + threadIdx.x;
  const int i = block * (b.x * b.y * b.z) + thread;
  atomicAdd(&visits[i], 1);
  indices[3 * i] = blockIdx.z * 100 + threadIdx.z;
  indices[3 * i + 1] = blockIdx.y * 100 + threadIdx.y;
  indices[3 * i + 2] = blockIdx.x * 100 + threadIdx.x;
}

template <class T>
__global__ void sum_of(const T* values, int64_t count, T* sum) {
  T mine = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) mine += __ldg(values + i);
  // Twice, because block_sum has to protect its array from the next call.
  const T first = tritool::block_sum(mine);
  const T second = tritool::block_sum(T(2) * mine);
  sum[threadIdx.x] = second - first;
}

// Reverses a row in dynamic shared memory.
__global__ void reverse(float* values) {
  TRITOOL_DYNAMIC_SHARED(float, row);
  float* const mine = values + blockIdx.x * blockDim.x;
  row[threadIdx.x] = mine[threadIdx.x];
  __syncthreads();
  mine[threadIdx.x] = row[blockDim.x - 1 - threadIdx.x];
}

// Threads without work return before the warp shuffles; the others name themselves in the mask.
__global__ void early_return(int* out, int count) {
  const unsigned active = __ballot_sync(kFullWarp, static_cast<int>(threadIdx.x) < count);
  if (static_cast<int>(threadIdx.x) >= count) return;
  out[threadIdx.x] = __shfl_sync(active, static_cast<int>(threadIdx.x) * 10, 3);
}

constexpr int kShuffles = 11;

__global__ void shuffles(int* out) {
  const int lane = threadIdx.x;
  int* const o = out + kShuffles * lane;
  o[0] = __shfl_sync(kFullWarp, lane, 5);
  o[1] = __shfl_sync(kFullWarp, lane, 37);    // wraps around
  o[2] = __shfl_sync(kFullWarp, lane, 9, 8);  // lane 1 of each group of 8
  o[3] = __shfl_up_sync(kFullWarp, lane, 3);
  o[4] = __shfl_up_sync(kFullWarp, lane, 3, 8);
  o[5] = __shfl_down_sync(kFullWarp, lane, 3);
  o[6] = __shfl_down_sync(kFullWarp, lane, 3, 8);
  o[7] = __shfl_xor_sync(kFullWarp, lane, 5);
  o[8] = __shfl_xor_sync(kFullWarp, lane, 12, 8);  // into an earlier group only
  o[9] = static_cast<int>(__shfl_xor_sync(kFullWarp, lane + 0.25, 1) * 4);
  o[10] = static_cast<int>(__shfl_down_sync(kFullWarp, (int64_t{lane} << 32) + 7, 1) >> 32);
}

__global__ void votes(unsigned* out) {
  const int lane = threadIdx.x;
  unsigned* const o = out + 4 * lane;
  o[0] = __ballot_sync(kFullWarp, lane % 3 == 0);
  o[1] = __any_sync(kFullWarp, lane == 7);
  o[2] = __all_sync(kFullWarp, lane != 7);
  // The two halves of the warp vote apart, and in different branches.
  if (lane < 16) {
    o[3] = __ballot_sync(0x0000ffffu, lane % 2 == 0);
  } else {
    o[3] = __all_sync(0xffff0000u, lane >= 16);
  }
}

// A warp scan in shared memory; only __syncwarp orders its steps.
__global__ void warp_scan(const int* values, int* sums) {
  TRITOOL_SHARED(int, row, 64);
  const int i = threadIdx.x;
  const int lane = i % 32;
  row[i] = values[i];
  for (int step = 1; step < 32; step *= 2) {
    __syncwarp();
    const int left = lane >= step ? row[i - step] : 0;
    __syncwarp();
    row[i] += left;
  }
  sums[i] = row[i];
}

__global__ void atomics(int* ints, unsigned* words, unsigned long long* wide, double* real) {
  const int i = static_cast<int>(tritool::thread_index());
  atomicAdd(&ints[0], i);
  atomicMax(&ints[1], i);
  atomicMin(&ints[2], -i);
  if (atomicCAS(&ints[3], 0, i + 1) == 0) atomicAdd(&ints[4], 1);  // one thread wins
  atomicAdd(&words[0], 1u);
  atomicMax(&words[1], 3000000000u + i);
  atomicMin(&words[2], 3000000000u - i);
  atomicAdd(&words[3], atomicExch(&words[4], i + 1u));  // every value is taken out once
  atomicAdd(&wide[0], 1ull << 33);
  atomicAdd(real, 0.5);
}

// The last block to finish adds up what all have written: ordered by fences around the atomic.
__global__ void last_block_sums(int* partial, unsigned* finished, int* total) {
  if (threadIdx.x != 0) return;
  partial[blockIdx.x] = blockIdx.x + 1;
  __threadfence();
  if (atomicAdd(finished, 1u) != gridDim.x - 1) return;
  __threadfence();
  int sum = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) sum += partial[i];
  *total = sum;
}

// Which thread comes first shows the order of execution.
__global__ void first_of_block(int* first, int* counter, int* block_rank) {
  TRITOOL_SHARED(int, taken, 1);
  if (threadIdx.x == 0) {
    taken[0] = 0;
    block_rank[blockIdx.x] = atomicAdd(counter, 1);
  }
  __syncthreads();
  if (atomicExch(&taken[0], 1) == 0) first[blockIdx.x] = threadIdx.x;
}

struct Pair {
  float a;
  double b;
};
__global__ void parameters(Pair pair, const float4* in, float2* out, float factor) {
  const float4 v = __ldg(in);
  out[0] = make_float2(v.x + v.w, factor * static_cast<float>(pair.b) + pair.a);
}

void test_atomics() {
  float sum = 0;
  TRITOOL_LAUNCH(add_one, tritool::grid_size(250, 64), 64, 0, nullptr, &sum, 250);
  CHECK(sum == 250);

  int ints[5] = {};
  unsigned words[5] = {0, 0, ~0u, 0, 0};
  unsigned long long wide = 0;
  double real = 0;
  TRITOOL_LAUNCH(atomics, 4, 64, 0, nullptr, ints, words, &wide, &real);
  CHECK(ints[0] == 255 * 256 / 2 && ints[1] == 255 && ints[2] == -255 && ints[4] == 1);
  CHECK(words[0] == 256 && words[1] == 3000000255u && words[2] == 2999999745u);
  CHECK(words[3] + words[4] == 256 * 257 / 2);
  CHECK(wide == 256ull << 33 && real == 128.0);

  int partial[8] = {};
  unsigned finished = 0;
  int total = 0;
  TRITOOL_LAUNCH(last_block_sums, 8, 64, 0, nullptr, partial, &finished, &total);
  CHECK(total == 36);
}

void test_grid_dimensions() {
  const dim3 grid(2, 3, 4);
  const dim3 block(5, 3, 2);
  const int threads = 24 * 30;
  std::vector<int> visits(threads), indices(3 * threads);
  TRITOOL_LAUNCH(record_index, grid, block, 0, nullptr, visits.data(), indices.data());
  bool right = true;
  for (int i = 0; i < threads; ++i) {
    const int b = i / 30;
    const int t = i % 30;
    right = right && visits[i] == 1 && indices[3 * i] == b / 6 * 100 + t / 15 &&
            indices[3 * i + 1] == b / 2 % 3 * 100 + t / 5 % 3 && indices[3 * i + 2] == b % 2 * 100 + t % 5;
  }
  CHECK(right);
  CHECK(tritool::ceil_div(0, 4) == 0 && tritool::ceil_div(8, 4) == 2);
  CHECK(tritool::ceil_div(9, 4) == 3 && tritool::ceil_div(INT64_MAX, INT64_MAX) == 1);
  CHECK(tritool::grid_size(int64_t{1} << 40, 2) == 2147483647u);
}

template <class T>
void test_block_sum() {
  std::vector<T> values(5000);
  std::iota(values.begin(), values.end(), T(1));
  for (const int threads : {32, 256, 1024}) {
    std::vector<T> sums(threads);
    TRITOOL_LAUNCH(sum_of<T>, 1, threads, 0, nullptr, values.data(), 5000, sums.data());
    CHECK(sums == std::vector<T>(threads, T(5000 * 5001 / 2)));
  }
}

void test_shared_memory() {
  std::vector<float> values(3 * 1000);
  std::iota(values.begin(), values.end(), 0.0f);
  TRITOOL_LAUNCH(reverse, 3, 1000, 1000 * sizeof(float), nullptr, values.data());
  CHECK(values[0] == 999 && values[999] == 0 && values[1000] == 1999 && values[2999] == 2000);

  std::vector<int> ones(64, 1), sums(64);
  TRITOOL_LAUNCH(warp_scan, 1, 64, 0, nullptr, ones.data(), sums.data());
  bool right = true;
  for (int i = 0; i < 64; ++i) right = right && sums[i] == i % 32 + 1;
  CHECK(right);
}

void test_warp_operations() {
  std::vector<int> out(32 * kShuffles);
  TRITOOL_LAUNCH(shuffles, 1, 32, 0, nullptr, out.data());
  int wrong[kShuffles] = {};
  for (int i = 0; i < 32; ++i) {
    const int in_group = i % 8;
    const int expected[kShuffles] = {5,
                                     5,
                                     i - in_group + 1,
                                     i >= 3 ? i - 3 : i,
                                     in_group >= 3 ? i - 3 : i,
                                     i + 3 < 32 ? i + 3 : i,
                                     in_group + 3 < 8 ? i + 3 : i,
                                     i ^ 5,
                                     (i ^ 12) / 8 <= i / 8 ? i ^ 12 : i,
                                     4 * (i ^ 1) + 1,
                                     i + 1 < 32 ? i + 1 : i};
    for (int k = 0; k < kShuffles; ++k) wrong[k] += out[kShuffles * i + k] != expected[k];
  }
  for (int k = 0; k < kShuffles; ++k) CHECK(wrong[k] == 0);

  std::vector<unsigned> vote(32 * 4);
  TRITOOL_LAUNCH(votes, 1, 32, 0, nullptr, vote.data());
  bool right = true;
  for (int i = 0; i < 32; ++i) {
    right = right && vote[4 * i] == 0x49249249u && vote[4 * i + 1] == 1 && vote[4 * i + 2] == 0 &&
            vote[4 * i + 3] == (i < 16 ? 0x5555u : 1u);
  }
  CHECK(right);

  int early[32] = {};
  TRITOOL_LAUNCH(early_return, 1, 32, 0, nullptr, early, 20);
  CHECK(early[0] == 30 && early[19] == 30 && early[20] == 0);
}

void test_parameters() {
  const float4 in = make_float4(1, 2, 3, 4);
  float2 out = {};
  int evaluations = 0;
  const auto factor = [&] { return ++evaluations, 2.0; };  // converted to float
  TRITOOL_LAUNCH(parameters, 1, 1, 0, nullptr, Pair{0.5f, 3.0}, &in, &out, factor());
  CHECK(out.x == 5.0f && out.y == 6.5f && evaluations == 1);
  CHECK(tritool::last_launch_error() == 0);
}

// A seed changes the order of execution, and the same seed repeats it.
void test_seeds() {
  const uint64_t seed_before = tritool::emulator::seed();
  const auto order = [](uint64_t seed) {
    tritool::emulator::set_seed(seed);
    std::vector<int> first(16), rank(16);
    int counter = 0;
    TRITOOL_LAUNCH(first_of_block, 16, 64, 0, nullptr, first.data(), &counter, rank.data());
    first.insert(first.end(), rank.begin(), rank.end());
    return first;
  };
  std::vector<int> ascending(16, 0);
  for (int i = 0; i < 16; ++i) ascending.push_back(i);
  CHECK(order(0) == ascending);
  CHECK(order(7) == order(7));
  CHECK(order(7) != ascending && order(7) != order(8));
  tritool::emulator::set_seed(seed_before);
}

// Several host threads have a device each.
void test_host_threads() {
  std::vector<std::thread> threads;
  float sums[3] = {};
  std::string errors[3];
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&, i] {
      errors[i] = error_of([&] { TRITOOL_LAUNCH(add_one, 1, 2000, 0, nullptr, &sums[i], 1); });
      TRITOOL_LAUNCH(add_one, 8, 64, 0, nullptr, &sums[i], 500);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int i = 0; i < 3; ++i) CHECK(sums[i] == 500 && !errors[i].empty());
}

// ---- Wrong kernels that every build reports ----

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void mismatched_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}
__global__ void barrier_against_shuffle(float* out) {
  if (threadIdx.x == 0) __syncthreads();
  out[threadIdx.x] = __shfl_sync(kFullWarp, 1.0f, 0);
}
__global__ void mask_names_returned_lanes(float* out) {
  if (threadIdx.x >= 20) return;
  out[threadIdx.x] = __shfl_xor_sync(kFullWarp, static_cast<float>(threadIdx.x), 1);
}
__global__ void mask_without_caller(float* out) { out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 0); }
__global__ void masks_differ(float* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x == 0 ? kFullWarp : 0xfffffffeu, 1.0f, 1);
}
__global__ void reads_outside_mask(float* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0x0000ffffu, 1.0f, 16);
}
__global__ void reads_missing_lane(float* out) {  // with a block of 48 threads
  out[threadIdx.x] = __shfl_down_sync(kFullWarp, 1.0f, 16);
}
__global__ void different_operations(int* out) {
  if (threadIdx.x % 2 == 0) {
    out[threadIdx.x] = __any_sync(kFullWarp, 1);
  } else {
    out[threadIdx.x] = __all_sync(kFullWarp, 1);
  }
}
__global__ void odd_width(float* out) { out[threadIdx.x] = __shfl_sync(kFullWarp, 1.0f, 0, 12); }
__global__ void far_shuffle(float* out) { out[threadIdx.x] = __shfl_down_sync(kFullWarp, 1.0f, 32); }
__global__ void misaligned_ldg(const float* in, float* out) { out[0] = __ldg(reinterpret_cast<const float4*>(in)).x; }
__global__ void misaligned_atomic(char* in) { atomicAdd(reinterpret_cast<double*>(in), 1.0); }
__global__ void too_much_shared(float* out) {
  TRITOOL_SHARED(float, first, 12000);
  TRITOOL_SHARED(float, second, 1000);
  first[0] = second[0] = 1;
  out[0] = first[0];
}
__global__ void throws(float* out) {
  if (threadIdx.x == 3) throw std::runtime_error("thrown by a kernel");
  out[threadIdx.x] = 1;
}
__global__ void launches(float* out) { TRITOOL_LAUNCH(odd_width, 1, 32, 0, nullptr, out); }

void test_reported_bugs() {
  alignas(16) float out[2048] = {};
  int ints[32] = {};

  const std::string message =
      error_of([&] { TRITOOL_LAUNCH(mask_names_returned_lanes, dim3(1, 2), 32, 0, nullptr, out); });
  CHECK(contains(message, "kernel mask_names_returned_lanes, " __FILE__ ":"));
  CHECK(contains(message, "thread (") && contains(message, "block (0, "));
  CHECK(contains(message, "deadlock: __shfl_xor_sync waits for lanes that never come: lane 20"));
  CHECK(contains(message, "thread (20, 0, 0) has returned"));

  CHECK_ERROR("divergent __syncthreads(): thread (", TRITOOL_LAUNCH(divergent_barrier, 1, 32, 0, nullptr, out));
  CHECK_ERROR("mismatched __syncthreads()", TRITOOL_LAUNCH(mismatched_barriers, 1, 64, 0, nullptr, out));
  CHECK_ERROR("lane 0, thread (0, 0, 0) waits in __syncthreads at",
              TRITOOL_LAUNCH(barrier_against_shuffle, 1, 32, 0, nullptr, out));
  CHECK_ERROR("leaves out the caller", TRITOOL_LAUNCH(mask_without_caller, 1, 32, 0, nullptr, out));
  CHECK_ERROR("deadlock: __shfl_sync waits for lanes", TRITOOL_LAUNCH(masks_differ, 1, 32, 0, nullptr, out));
  CHECK_ERROR("outside its mask", TRITOOL_LAUNCH(reads_outside_mask, 1, 32, 0, nullptr, out));
  CHECK_ERROR("outside its mask", TRITOOL_LAUNCH(reads_missing_lane, 1, 48, 0, nullptr, out));
  CHECK_ERROR("different warp operations", TRITOOL_LAUNCH(different_operations, 1, 32, 0, nullptr, ints));
  CHECK_ERROR("power of two", TRITOOL_LAUNCH(odd_width, 1, 32, 0, nullptr, out));
  CHECK_ERROR("32 or more", TRITOOL_LAUNCH(far_shuffle, 1, 32, 0, nullptr, out));
  CHECK_ERROR("misaligned __ldg", TRITOOL_LAUNCH(misaligned_ldg, 1, 1, 0, nullptr, out + 1, out));
  CHECK_ERROR("misaligned atomic",
              TRITOOL_LAUNCH(misaligned_atomic, 1, 1, 0, nullptr, reinterpret_cast<char*>(out) + 4));
  CHECK_ERROR("48 KiB of static", TRITOOL_LAUNCH(too_much_shared, 1, 1, 0, nullptr, out));
  CHECK_ERROR("thread (3, 0, 0): thrown by a kernel", TRITOOL_LAUNCH(throws, 1, 32, 0, nullptr, out));
  CHECK_ERROR("launched by a kernel", TRITOOL_LAUNCH(launches, 1, 1, 0, nullptr, out));
  CHECK_ERROR("__syncthreads outside a kernel", __syncthreads());
}

void test_launch_configuration() {
  float out = 0;
  const auto refused = [&](dim3 grid, dim3 block, size_t shared_bytes) {
    return contains(error_of([&] { TRITOOL_LAUNCH(add_one, grid, block, shared_bytes, nullptr, &out, 0); }),
                    "invalid launch configuration");
  };
  CHECK(refused(1, 1025, 0));
  CHECK(refused(1, dim3(32, 33), 0));
  CHECK(refused(1, dim3(1, 1, 65), 0));
  CHECK(refused(1, dim3(65536, 65536), 0));  // 2^32 threads: no overflow in the product
  CHECK(refused(1, 0, 0));
  CHECK(refused(0, 32, 0));
  CHECK(refused(dim3(2147483648u), 1, 0));
  CHECK(refused(dim3(1, 65536), 1, 0));
  CHECK(refused(dim3(1, 1, 65536), 1, 0));
  CHECK(refused(1, 32, 227 * 1024 + 1));
  TRITOOL_LAUNCH(add_one, dim3(1, 65535), dim3(1, 1, 1), 0, nullptr, &out, 1);
  TRITOOL_LAUNCH(add_one, 1, 1024, 227 * 1024, nullptr, &out, 1);
  CHECK(out == 65536);  // thread_index() looks at x alone
}

// ---- Wrong kernels that show in the results of a plain build ----

__global__ void unset_shared(float* out) {
  TRITOOL_SHARED(float, row, 64);
  TRITOOL_DYNAMIC_SHARED(double, dynamic);
  if (threadIdx.x != 0) row[threadIdx.x] = 1;
  __syncthreads();
  out[tritool::thread_index()] = row[threadIdx.x] + static_cast<float>(threadIdx.x < 2 ? 0.0 : dynamic[0]);
}

void test_unset_shared_memory() {
  std::vector<float> out(128);
  TRITOOL_LAUNCH(unset_shared, 2, 64, sizeof(double), nullptr, out.data());
  for (int block = 0; block < 2; ++block) {  // what an earlier block wrote is gone
    const float* const o = out.data() + 64 * block;
    CHECK(std::isnan(o[0]) && o[1] == 1 && std::isnan(o[2]));
  }
}

void test_missing_barriers() {
  std::vector<float> out(64);
  const auto nans = [&] {
    int n = 0;
    for (const float v : out) n += std::isnan(v);
    return n;
  };
  CHECK(run_planted("missing_syncthreads", out) == 0);
  CHECK(nans() == 32);  // of each pair of threads the first to run finds nothing
  out.clear();
  CHECK(run_planted("missing_syncwarp", out) == 0);
  CHECK(nans() == 16);
}

__global__ void writes_past_shared(float* out, int index) {
  TRITOOL_SHARED(float, row, 33);
  float* const p = row;
  p[index] = 1;
  out[0] = p[index];
}

void test_red_zones() {
  float out = 0;
  CHECK_ERROR("write outside the shared array declared here",
              TRITOOL_LAUNCH(writes_past_shared, 1, 1, 0, nullptr, &out, 33));
  CHECK_ERROR("write outside the shared array", TRITOOL_LAUNCH(writes_past_shared, 1, 1, 0, nullptr, &out, -1));
  TRITOOL_LAUNCH(writes_past_shared, 1, 1, 0, nullptr, &out, 32);
  CHECK(out == 1);
}

void run_correct_kernels() {
  test_atomics();
  test_grid_dimensions();
  test_block_sum<float>();
  test_block_sum<double>();
  test_shared_memory();
  test_warp_operations();
  test_parameters();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--plant") == 0) {
    std::vector<float> results;
    return run_planted(argv[2], results);
  }

  const std::string variant = TRITOOL_TEST_VARIANT;
  run_correct_kernels();
  test_seeds();
  test_host_threads();
  test_reported_bugs();
  test_launch_configuration();
  test_unset_shared_memory();
  if (variant == "plain") {  // the sanitizers stop at these or report them
    test_missing_barriers();
    test_red_zones();
  }
  run_correct_kernels();  // failed launches have left the device as good as new

  std::printf("%d passed, %d failed\n", passed, failed);
  return failed == 0 ? 0 : 1;
}
