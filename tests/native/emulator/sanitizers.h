// SPDX-License-Identifier: Apache-2.0
//
// What the emulated device tells the sanitizers; every function is empty without its sanitizer.
// AddressSanitizer has to know which stack is in use and which memory may be touched. For
// ThreadSanitizer every fiber is a thread: the switch between two of them orders nothing, only an
// Edge does, and edges are drawn where CUDA guarantees an order.
#pragma once

#include <cstddef>
#include <cstdlib>

#if defined(TRITOOL_EMULATOR_ASAN)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(TRITOOL_EMULATOR_TSAN)
#include <sanitizer/tsan_interface.h>
#endif

namespace tritool::emulator {

#if defined(TRITOOL_EMULATOR_ASAN)

// Around a switch to another stack. `fake_stack` keeps what belongs to the stack that is left; null
// if it is left for good. The stack that was left before the present one is returned on arrival.
inline void before_switch(void** fake_stack, const void* stack, size_t bytes) {
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
}
inline void after_switch(void* fake_stack, const void** old_stack, size_t* old_bytes) {
  __sanitizer_finish_switch_fiber(fake_stack, old_stack, old_bytes);
}
inline void forbid_access(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
inline void allow_access(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }

#else

inline void before_switch(void**, const void*, size_t) {}
inline void after_switch(void*, const void**, size_t*) {}
inline void forbid_access(const void*, size_t) {}
inline void allow_access(const void*, size_t) {}

#endif

#if defined(TRITOOL_EMULATOR_TSAN)

constexpr bool kDetectsRaces = true;

// Orders everything before any thread's release() before everything after an acquire(). It must be
// fresh for every set of threads it is used for, or it would order them after its earlier users too
// and so hide races. ThreadSanitizer forgets an address when it is freed; close() has to be ordered
// after open() like any other use of memory.
class Edge {
 public:
  void open() { token_ = std::malloc(1); }
  void close() { std::free(token_); }
  void release() const { __tsan_release(token_); }
  void acquire() const { __tsan_acquire(token_); }

 private:
  void* token_ = nullptr;
};

inline void* race_thread_create() { return __tsan_create_fiber(0); }
inline void race_thread_destroy(void* thread) { __tsan_destroy_fiber(thread); }
inline void* race_thread_current() { return __tsan_get_current_fiber(); }
inline void race_thread_switch(void* thread) { __tsan_switch_to_fiber(thread, __tsan_switch_to_fiber_no_sync); }

#else

constexpr bool kDetectsRaces = false;

class Edge {
 public:
  void open() {}
  void close() {}
  void release() const {}
  void acquire() const {}
};

inline void* race_thread_create() { return nullptr; }
inline void race_thread_destroy(void*) {}
inline void* race_thread_current() { return nullptr; }
inline void race_thread_switch(void*) {}

#endif

}  // namespace tritool::emulator
