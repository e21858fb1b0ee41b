// SPDX-License-Identifier: Apache-2.0
//
// The scheduler of the emulated device. Sections: 1 the state of a device, 2 failures, 3 fibers,
// 4 barriers and warp operations, 5 blocks, 6 grids.
//
// Compile the files of this folder WITHOUT -fsanitize, also when the kernels are compiled with it,
// and say instead -DTRITOOL_EMULATOR_ASAN or -DTRITOOL_EMULATOR_TSAN. The scheduler works on behalf
// of all threads at once, which an instrumented build would report as races between them. For the
// same reason, code that runs inside a fiber keeps away from the library, unless it is about to
// fail: the linker might take an instrumented copy of a template, and the sanitizers intercept
// memset and its like.
#include "emulator.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"
#include "sanitizers.h"
#include "shared_memory.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace tritool::emulator {

__thread const ThreadView* current_thread = nullptr;

namespace {

// ---- 1. The state of a device ----

constexpr int kMaxThreads = 1024;          // per block, as on every CUDA device
constexpr size_t kStackBytes = 256 << 10;  // of address space; pages are used as they are touched
constexpr size_t kGuardBytes = 64 << 10;   // below each stack; a multiple of every page size

// A stack and the ThreadSanitizer thread that belongs to it for good: used by different ones, the
// memory of the stack itself would seem to be raced for.
struct Stack {
  char* mapping = nullptr;
  void* race_thread = nullptr;

  char* base() const { return mapping + kGuardBytes; }
};

enum class State : uint8_t { kReady, kAtBarrier, kAtWarpOperation, kFailed, kReturned };

struct Operation;
struct Warp;

// One CUDA thread of the running block.
struct Fiber {
  ThreadView view;
  State state = State::kReturned;
  Context context;
  const Stack* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's, while suspended
  Warp* warp = nullptr;
  unsigned barriers = 0;           // number of __syncthreads() passed
  const char* waits_in = nullptr;  // the operation at `site`
  Site site{};                     // of the last operation that concerned other threads
  Operation* operation = nullptr;  // the warp operation it waits for
};

// A warp operation that some lanes have reached and not all have left.
struct Operation {
  const char* name = nullptr;
  Site site{};
  unsigned wanted = 0;   // lanes the mask names
  unsigned arrived = 0;  // lanes that have come
  unsigned unread = 0;   // lanes that have not left
  uint64_t values[32] = {};
  Edge edge;
  Operation* next = nullptr;  // in the list of free ones, or of the warp's open ones
};

struct Warp {
  Fiber* fibers = nullptr;    // of lane 0 and those behind it
  unsigned lanes = 0;         // that exist; the last warp of a block may be partial
  Operation* open = nullptr;  // the operations that some lane still has to reach
};

struct Failure {
  bool happened = false;
  char what[512] = "";
  Site site{};
  const Fiber* fiber = nullptr;  // null: concerns the block as a whole
};

struct Device {
  Device() : fibers(kMaxThreads), warps(kMaxThreads / 32), operations(kMaxThreads) {}
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // The running grid.
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  size_t shared_bytes = 0;
  size_t threads = 0;  // per block
  bool shuffled = false;
  uint64_t random = 0;  // state of the generator behind the shuffles
  Failure failure;

  // The running block. The first `threads` fibers are in use; `order` is that of execution.
  std::vector<Fiber> fibers;
  std::vector<size_t> order;
  std::vector<Warp> warps;
  std::vector<Operation> operations;
  Operation* free_operations = nullptr;
  SharedMemory shared;
  Fiber* running = nullptr;

  std::vector<Stack> stacks;

  // The host thread, while a fiber runs.
  Context host;
  void* host_fake_stack = nullptr;
  const void* host_stack = nullptr;
  size_t host_stack_bytes = 0;
  void* host_race_thread = nullptr;

  Edge grid_begin, grid_end, fences;
  Edge barrier[2];  // used in turn: a thread may reach the next before all have left this one
};

// The device of this host thread while a grid runs, else null.
__thread Device* active = nullptr;

unsigned lane_bit(int lane) { return 1u << lane; }

bool same_site(Site a, Site b) {
  if (a.line != b.line) return false;
  const char* p = a.file;
  const char* q = b.file;
  while (*p != '\0' && *p == *q) ++p, ++q;
  return *p == *q;
}

// ---- 2. Failures ----

// The first failure counts; it ends the launch. Also called inside fibers, hence no std::string.
void record_failure(Device& device, const char* what, Site site, const Fiber* fiber) {
  Failure& failure = device.failure;
  if (failure.happened) return;
  failure.happened = true;
  size_t n = 0;
  for (; what[n] != '\0' && n + 1 < sizeof failure.what; ++n) {
    const_cast<volatile char&>(failure.what[n]) = what[n];
  }
  failure.what[n] = '\0';
  failure.site = site;
  failure.fiber = fiber;
}

std::string text(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}
std::string text(dim3 v) { return text(uint3{v.x, v.y, v.z}); }
std::string text(Site site) { return std::string(site.file) + ":" + std::to_string(site.line); }

std::string message(const Failure& failure, const std::string& kernel, uint3 block_idx) {
  std::string result = kernel + ", " + text(failure.site) + ", block " + text(block_idx);
  if (failure.fiber != nullptr) result += ", thread " + text(failure.fiber->view.thread_idx);
  return result + ": " + failure.what;
}

// ---- 3. Fibers ----

Stack create_stack() {
  Stack stack;
  stack.mapping = static_cast<char*>(map_pages(kGuardBytes + kStackBytes));
  mprotect(stack.mapping, kGuardBytes, PROT_NONE);  // a stack overflow is a crash, not corruption
  stack.race_thread = race_thread_create();
  return stack;
}

void destroy_stacks(Device& device) {
  for (const Stack& stack : device.stacks) {
    race_thread_destroy(stack.race_thread);
    allow_access(stack.base(), kStackBytes);  // red zones of frames that were abandoned
    munmap(stack.mapping, kGuardBytes + kStackBytes);
  }
  device.stacks.clear();
}

// Orders what a fiber that will never run again has done before what the host does next.
void release_abandoned(Device& device, const Fiber& fiber) {
  race_thread_switch(fiber.stack->race_thread);
  device.grid_end.release();
  race_thread_switch(device.host_race_thread);
}

// Called by the host: runs `fiber` until it waits, fails or returns.
void resume(Device& device, Fiber& fiber) {
  device.running = &fiber;
  current_thread = &fiber.view;
  before_switch(&device.host_fake_stack, fiber.stack->base(), kStackBytes);
  race_thread_switch(fiber.stack->race_thread);
  switch_context(device.host, fiber.context);
  after_switch(device.host_fake_stack, nullptr, nullptr);
}

// Called by a fiber: back to the host, until resumed. `for_ever`: it never will be.
void suspend(Device& device, Fiber& fiber, bool for_ever = false) {
  before_switch(for_ever ? nullptr : &fiber.fake_stack, device.host_stack, device.host_stack_bytes);
  race_thread_switch(device.host_race_thread);
  switch_context(fiber.context, device.host);
  after_switch(fiber.fake_stack, nullptr, nullptr);
}

[[noreturn]] void finish(Device& device, Fiber& fiber, State state) {
  fiber.state = state;
  suspend(device, fiber, true);
  std::abort();  // resumed after its end
}

void fiber_entry() {
  Device& device = *active;
  Fiber& fiber = *device.running;
  after_switch(nullptr, &device.host_stack, &device.host_stack_bytes);
  device.grid_begin.acquire();
  try {
    device.body(device.arguments);
  } catch (const std::exception& error) {
    record_failure(device, error.what(), fiber.site, &fiber);
  } catch (...) {
    record_failure(device, "the kernel threw an exception", fiber.site, &fiber);
  }
  device.grid_end.release();
  finish(device, fiber, State::kReturned);
}

// ---- 4. Barriers and warp operations ----
// A warp operation is complete when every lane of its mask has come, with the same mask. The last
// one to come marks the others ready, and each reads what it wants when it runs again.

// The caller's part in an operation of its warp: arrives with `value`, returns when complete. Every
// join is followed by a leave. `ordering`: accesses before are ordered before accesses after.
Operation* join(Device& device, unsigned mask, uint64_t value, bool ordering, const char* name, Site site) {
  Fiber& self = *device.running;
  Warp& warp = *self.warp;
  const int lane = self.view.lane;
  self.site = site;
  self.waits_in = name;
  if ((mask & lane_bit(lane)) == 0) fail("warp operation whose mask leaves out the caller", site);
  const unsigned wanted = mask & warp.lanes;

  Operation** link = &warp.open;
  while (*link != nullptr && (*link)->wanted != wanted) link = &(*link)->next;
  Operation* operation = *link;
  if (operation == nullptr) {
    operation = device.free_operations;  // never exhausted: see reset()
    device.free_operations = operation->next;
    operation->name = name;
    operation->site = site;
    operation->wanted = wanted;
    operation->arrived = 0;
    operation->next = nullptr;
    if (ordering) operation->edge.open();
    *link = operation;
  } else if (operation->name != name || !same_site(operation->site, site)) {
    fail("lanes of one mask are in different warp operations", site);
  }

  operation->values[lane] = value;
  operation->arrived |= lane_bit(lane);
  if (ordering) operation->edge.release();
  if (operation->arrived != wanted) {
    self.operation = operation;
    self.state = State::kAtWarpOperation;
    suspend(device, self);
  } else {
    *link = operation->next;
    operation->unread = wanted;
    for (int other = 0; other < 32; ++other) {
      if ((wanted & lane_bit(other)) != 0) warp.fibers[other].state = State::kReady;
    }
  }
  if (ordering) operation->edge.acquire();
  return operation;
}

void leave(Device& device, Operation* operation, bool ordering) {
  const Fiber& self = *device.running;
  operation->unread &= ~lane_bit(self.view.lane);
  if (operation->unread != 0) return;
  if (ordering) operation->edge.close();
  operation->next = device.free_operations;
  device.free_operations = operation;
}

Device& device_or_throw(const char* name) {
  if (active == nullptr) {
    throw std::runtime_error(std::string("tritool emulator: ") + name + " outside a kernel");
  }
  return *active;
}

}  // namespace

void fail(const char* what, Site site) {
  Device& device = device_or_throw(what);
  Fiber& fiber = *device.running;
  fiber.site = site;
  record_failure(device, what, site, &fiber);
  finish(device, fiber, State::kFailed);
}

void sync_block(Site site) {
  Device& device = device_or_throw("__syncthreads");
  Fiber& self = *device.running;
  self.site = site;
  self.waits_in = "__syncthreads";
  const Edge& edge = device.barrier[self.barriers++ % 2];
  edge.release();
  self.state = State::kAtBarrier;
  suspend(device, self);
  edge.acquire();
}

void sync_warp(unsigned mask, Site site) {
  Device& device = device_or_throw("__syncwarp");
  leave(device, join(device, mask, 0, true, "__syncwarp", site), true);
}

uint64_t shuffle(unsigned mask, uint64_t bits, int source_lane, const char* name, Site site) {
  Device& device = device_or_throw(name);
  Operation* const operation = join(device, mask, bits, false, name, site);
  if ((operation->wanted & lane_bit(source_lane)) == 0) {
    fail("shuffle reads a lane outside its mask", site);
  }
  const uint64_t result = operation->values[source_lane];
  leave(device, operation, false);
  return result;
}

unsigned ballot(unsigned mask, bool predicate, const char* name, Site site) {
  Device& device = device_or_throw(name);
  Operation* const operation = join(device, mask, predicate ? 1 : 0, false, name, site);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) {
    const bool in_mask = (operation->wanted & lane_bit(lane)) != 0;
    if (in_mask && operation->values[lane] != 0) result |= lane_bit(lane);
  }
  leave(device, operation, false);
  return result;
}

// Fences are totally ordered, and each sees what came before the fences ahead of it. Thus "write,
// fence, atomic" and "atomic, fence, read" order the write before the read, as in CUDA.
void fence() {
  Device& device = device_or_throw("__threadfence");
  device.fences.acquire();
  device.fences.release();
}

void* shared_memory(const void* key, size_t bytes, size_t alignment, Site site) {
  Device& device = device_or_throw("shared memory");
  const char* error = nullptr;
  void* const array = device.shared.array(key, bytes, alignment, site, &error);
  if (error != nullptr) fail(error, site);
  return array;
}

void* dynamic_shared_memory() { return device_or_throw("shared memory").shared.dynamic(); }

namespace {

// ---- 5. Blocks ----

// SplitMix64 (Steele, Lea, Flood 2014): the same order on every system, unlike std::shuffle.
uint64_t next_random(uint64_t& state) {
  uint64_t z = (state += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

template <class T>
void shuffle_order(std::vector<T>& order, uint64_t& random) {
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[next_random(random) % i]);
}

// Where a thread is that others wait for.
std::string whereabouts(const Fiber& fiber) {
  std::string result = "thread " + text(fiber.view.thread_idx);
  if (fiber.state == State::kReturned) return result + " has returned";
  return result + " waits in " + fiber.waits_in + " at " + text(fiber.site);
}

void report_deadlock(Device& device, const Fiber& waiting) {
  const Operation& operation = *waiting.operation;
  const int lane = __builtin_ctz(operation.wanted & ~operation.arrived);
  const std::string what = std::string("deadlock: ") + operation.name + " waits for lanes that never come: lane " +
                           std::to_string(lane) + ", " + whereabouts(waiting.warp->fibers[lane]);
  record_failure(device, what.c_str(), waiting.site, &waiting);
}

// No thread can go on: the block has ended, or all have reached one barrier, or they never will.
// Returns whether the block continues.
bool pass_barrier(Device& device) {
  const Fiber* returned = nullptr;
  const Fiber* waiting = nullptr;
  for (size_t i = 0; i < device.threads; ++i) {
    const Fiber& fiber = device.fibers[i];
    if (fiber.state == State::kAtWarpOperation) {
      report_deadlock(device, fiber);
      return false;
    }
    if (fiber.state == State::kReturned) {
      returned = &fiber;
    } else if (waiting == nullptr) {
      waiting = &fiber;
    } else if (!same_site(waiting->site, fiber.site)) {
      const std::string what = "mismatched __syncthreads(): " + whereabouts(*waiting) + ", and this one elsewhere";
      record_failure(device, what.c_str(), fiber.site, &fiber);
      return false;
    }
  }
  if (waiting == nullptr) return false;
  if (returned != nullptr) {
    const std::string what = "divergent __syncthreads(): " + whereabouts(*returned);
    record_failure(device, what.c_str(), waiting->site, waiting);
    return false;
  }
  for (size_t i = 0; i < device.threads; ++i) device.fibers[i].state = State::kReady;
  if (device.shuffled) shuffle_order(device.order, device.random);
  return true;
}

// Runs every thread once until it waits. Returns whether any could run.
bool run_ready_threads(Device& device) {
  bool progress = false;
  for (const size_t i : device.order) {
    Fiber& fiber = device.fibers[i];
    if (fiber.state != State::kReady) continue;
    resume(device, fiber);
    if (device.failure.happened) return false;
    progress = true;
  }
  return progress;
}

void begin_threads(Device& device, uint3 block_idx, dim3 grid, dim3 block, size_t first_stack) {
  for (size_t i = 0; i < device.threads; ++i) {
    const unsigned index = static_cast<unsigned>(i);
    Fiber& fiber = device.fibers[i];
    fiber.view.thread_idx = {index % block.x, index / block.x % block.y, index / (block.x * block.y)};
    fiber.view.block_idx = block_idx;
    fiber.view.block_dim = block;
    fiber.view.grid_dim = grid;
    fiber.view.lane = static_cast<int>(index % 32);
    fiber.state = State::kReady;
    fiber.stack = &device.stacks[first_stack + i];
    fiber.fake_stack = nullptr;
    fiber.warp = &device.warps[i / 32];
    fiber.barriers = 0;
    fiber.site = {"the start of the kernel", 0};
    // Stacks lie at multiples of a power of two; if all began alike their frames would compete for
    // the same few lines of the cache.
    const size_t stack_bytes = kStackBytes - i % 64 * 192;
    start_context(fiber.context, fiber.stack->base(), stack_bytes, &fiber_entry);
    device.order[i] = i;
  }
  if (device.shuffled) shuffle_order(device.order, device.random);
}

void run_block(Device& device, uint3 block_idx, dim3 grid, dim3 block, size_t first_stack) {
  device.shared.begin_block(device.shared_bytes);
  for (Edge& edge : device.barrier) edge.open();
  device.grid_begin.release();
  begin_threads(device, block_idx, grid, block, first_stack);
  do {
    while (run_ready_threads(device)) {
    }
  } while (!device.failure.happened && pass_barrier(device));
  for (Edge& edge : device.barrier) edge.close();
  const Site damaged = device.shared.end_block();
  if (damaged.file != nullptr) {
    record_failure(device, "write outside the shared array declared here", damaged, nullptr);
  }
}

// ---- 6. Grids ----

Device::~Device() { destroy_stacks(*this); }

// Brings the device to its initial state, whatever an earlier launch left behind. An operation is
// in use only while a thread still has to leave it, and a thread is in one operation at a time:
// so as many of them as threads suffice.
void reset(Device& device) {
  device.failure = Failure{};
  device.free_operations = nullptr;
  for (Operation& operation : device.operations) {
    operation.next = device.free_operations;
    device.free_operations = &operation;
  }
  for (size_t first = 0; first < device.threads; first += 32) {
    const size_t lanes = device.threads - first;
    const unsigned mask = lanes >= 32 ? 0xffffffffu : (1u << lanes) - 1;
    device.warps[first / 32] = Warp{&device.fibers[first], mask, nullptr};
  }
  device.order.resize(device.threads);
}

// Sets of stacks that the blocks use in turn. ThreadSanitizer needs several: a race between two
// blocks can only be seen where their threads are different ones for it.
size_t stack_sets(size_t threads, uint64_t blocks) {
  if (!kDetectsRaces) return 1;
  const size_t sets = threads < 128 ? 256 / threads : 2;
  return blocks < sets ? blocks : sets;
}

void check_configuration(const std::string& kernel, dim3 grid, dim3 block, size_t shared_bytes) {
  std::string wrong;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (block.x > 1024 || block.y > 1024 || block.z > 64 || threads < 1 || threads > kMaxThreads) {
    wrong = "block " + text(block) + " is not between 1 and 1024 threads, at most (1024, 1024, 64)";
  } else if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535) {
    wrong = "grid " + text(grid) + " is not between (1, 1, 1) and (2147483647, 65535, 65535)";
  } else if (shared_bytes > SharedMemory::kMaxDynamicBytes) {
    wrong = std::to_string(shared_bytes) + " bytes of dynamic shared memory, more than 227 KiB";
  } else {
    return;
  }
  throw std::runtime_error(kernel + ": invalid launch configuration: " + wrong);
}

// Makes a device the active one of its host thread. The host's accesses before are ordered before
// those of the grid, and these before the host's accesses after it.
class Activation {
 public:
  explicit Activation(Device& device) : device_(device) {
    for (Edge* edge : {&device_.grid_begin, &device_.grid_end, &device_.fences}) edge->open();
    active = &device_;
  }
  ~Activation() {
    active = nullptr;
    current_thread = nullptr;
    device_.grid_end.acquire();
    for (Edge* edge : {&device_.grid_begin, &device_.grid_end, &device_.fences}) edge->close();
  }
  Activation(const Activation&) = delete;
  Activation& operator=(const Activation&) = delete;

 private:
  Device& device_;
};

uint64_t seed_from_environment() {
  const char* const value = std::getenv("TRITOOL_EMULATOR_SEED");
  return value == nullptr ? 0 : std::strtoull(value, nullptr, 10);
}

std::atomic<uint64_t>& seed_storage() {
  static std::atomic<uint64_t> storage{seed_from_environment()};
  return storage;
}

}  // namespace

void set_seed(uint64_t seed) { seed_storage() = seed; }
uint64_t seed() { return seed_storage(); }

void run_grid(const char* kernel_name, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(const void*),
              const void* arguments) {
  const std::string kernel = std::string("tritool emulator: kernel ") + kernel_name;
  if (active != nullptr) throw std::runtime_error(kernel + ": launched by a kernel");
  check_configuration(kernel, grid, block, shared_bytes);

  static thread_local Device device;
  device.body = body;
  device.arguments = arguments;
  device.shared_bytes = shared_bytes;
  device.threads = size_t{block.x} * block.y * block.z;
  device.random = seed();
  device.shuffled = device.random != 0;
  device.host_race_thread = race_thread_current();
  reset(device);

  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const size_t sets = stack_sets(device.threads, blocks);
  while (device.stacks.size() < sets * device.threads) device.stacks.push_back(create_stack());
  std::vector<uint64_t> block_order;  // left empty for the ascending order
  if (device.shuffled) {
    for (uint64_t i = 0; i < blocks; ++i) block_order.push_back(i);
    shuffle_order(block_order, device.random);
  }

  const Activation activation(device);
  uint3 block_idx{};
  for (uint64_t i = 0; i < blocks && !device.failure.happened; ++i) {
    const uint64_t index = device.shuffled ? block_order[i] : i;
    block_idx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
                 static_cast<unsigned>(index / grid.x / grid.y)};
    run_block(device, block_idx, grid, block, i % sets * device.threads);
  }
  if (device.failure.happened) {
    for (size_t i = 0; i < device.threads; ++i) release_abandoned(device, device.fibers[i]);
    destroy_stacks(device);  // the fibers on them are suspended for ever
    throw std::runtime_error(message(device.failure, kernel, block_idx));
  }
}

}  // namespace tritool::emulator
