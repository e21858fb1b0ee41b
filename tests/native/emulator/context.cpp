// SPDX-License-Identifier: Apache-2.0
#include "context.h"

#if defined(TRITOOL_EMULATOR_UCONTEXT)

namespace tritool::emulator {

void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

}  // namespace tritool::emulator

#elif defined(__x86_64__)

// System V ABI: rbp, rbx and r12-r15 are preserved; the return address lies above them.
asm(R"(
.pushsection .text
.globl tritool_emulator_switch
.hidden tritool_emulator_switch
.type tritool_emulator_switch,@function
tritool_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size tritool_emulator_switch,.-tritool_emulator_switch
.popsection
)");

namespace tritool::emulator {

void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** const top = reinterpret_cast<void**>(stack + bytes);
  top[-1] = nullptr;  // the return address of `entry`: backtraces end here
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 8;
}

}  // namespace tritool::emulator

#else

// AAPCS64: x19-x29 and d8-d15 are preserved, x30 is the return address. A new context starts in
// tritool_emulator_start, which jumps to x19 without a return address: backtraces end there.
asm(R"(
.pushsection .text
.globl tritool_emulator_switch
.hidden tritool_emulator_switch
.type tritool_emulator_switch,@function
tritool_emulator_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size tritool_emulator_switch,.-tritool_emulator_switch

.globl tritool_emulator_start
.hidden tritool_emulator_start
.type tritool_emulator_start,@function
tritool_emulator_start:
  mov x30, xzr
  br x19
.size tritool_emulator_start,.-tritool_emulator_start
.popsection
)");
extern "C" void tritool_emulator_start();

namespace tritool::emulator {

void start_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** const frame = reinterpret_cast<void**>(stack + bytes) - 20;
  for (int i = 0; i < 20; ++i) frame[i] = nullptr;
  frame[0] = reinterpret_cast<void*>(entry);                     // x19
  frame[11] = reinterpret_cast<void*>(&tritool_emulator_start);  // x30
  context.stack_pointer = frame;
}

}  // namespace tritool::emulator

#endif
