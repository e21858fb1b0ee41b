// SPDX-License-Identifier: Apache-2.0
//
// A suspended point of execution on a stack of its own, and the switch between two of them:
// assembly for x86-64 and AArch64, ucontext elsewhere or with TRITOOL_EMULATOR_UCONTEXT.
#pragma once

#include <cstddef>

#if !defined(__x86_64__) && !defined(__aarch64__) && !defined(TRITOOL_EMULATOR_UCONTEXT)
#define TRITOOL_EMULATOR_UCONTEXT
#endif

#if defined(TRITOOL_EMULATOR_UCONTEXT)
#include <ucontext.h>
#else
// Saves the registers that a function must preserve on the present stack, stores the stack pointer
// in *from, and restores the registers from the other stack.
extern "C" void tritool_emulator_switch(void** from, void* to);
#endif

namespace tritool::emulator {

#if defined(TRITOOL_EMULATOR_UCONTEXT)

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

#else

struct Context {
  void* stack_pointer = nullptr;
};

inline void switch_context(Context& from, Context& to) {
  tritool_emulator_switch(&from.stack_pointer, to.stack_pointer);
}

#endif

// Makes `context` the point where `entry`, which must not return, is entered on the given stack.
// The end of the stack is aligned to 16 bytes.
void start_context(Context& context, char* stack, size_t bytes, void (*entry)());

}  // namespace tritool::emulator
