// Fibers: 15 ns a switch on x86-64, ucontext elsewhere. Under ThreadSanitizer each is a thread of its own that no
// switch orders (flag 1); creating one takes 0.2 ms, so they are made once.
#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(CUDA_EMULATOR_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void* __tsan_get_current_fiber();
void __tsan_acquire(void*);
void __tsan_release(void*);
}
#endif

namespace cuda_emulator {

constexpr size_t kStack = 256 << 10, kGuard = 64 << 10;  // touched pages alone cost memory

Fiber scheduler;
static Fiber* stopped;  // the last to stop

#if defined(CUDA_EMULATOR_OWN_SWITCH)
// Saves what the ABI keeps across calls, changes the stack, restores.
extern "C" void cuda_emulator_switch(void** save, void* load);
asm(R"(.text
.globl cuda_emulator_switch
.type cuda_emulator_switch, @function
cuda_emulator_switch:
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
.size cuda_emulator_switch, .-cuda_emulator_switch
)");
#endif

// Stacks begin at different places of a page, or their tops would share a few lines of the cache.
void make(Fiber& fiber, int id) {
  if (fiber.stack) return;
  void* const memory =
      mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) {
    perror("cuda_emulator: no memory for a stack");
    abort();
  }
  fiber.stack = static_cast<char*>(memory) + kGuard;
  fiber.size = kStack - id * 11 % 64 * 64;
}

void prepare(Fiber& fiber, void (*entry)()) {
#if defined(CUDA_EMULATOR_TSAN)
  if (!fiber.tsan) fiber.tsan = __tsan_create_fiber(0);
#endif
#if defined(CUDA_EMULATOR_OWN_SWITCH)
  void** top = reinterpret_cast<void**>(fiber.stack + fiber.size - 64);
  *--top = nullptr;  // where `entry` would return to; it keeps the stack aligned as after a call
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
  fiber.at = top;
#else
  getcontext(&fiber.at);
  fiber.at.uc_stack.ss_sp = fiber.stack;
  fiber.at.uc_stack.ss_size = fiber.size;
  fiber.at.uc_link = nullptr;
  makecontext(&fiber.at, entry, 0);
#endif
}

void abandon(Fiber& fiber) {
  if (!fiber.stack) return;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.stack, kStack);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  if (!fiber.tsan) return;
  __tsan_switch_to_fiber(fiber.tsan, 1);
  __tsan_switch_to_fiber(scheduler.tsan, 0);  // orders
  __tsan_destroy_fiber(fiber.tsan);
  fiber.tsan = nullptr;
  fiber.launch = 0;
#endif
}

static void arrived(void* stash) {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t size;
  __sanitizer_finish_switch_fiber(stash, &stack, &size);
  if (stopped == &scheduler) scheduler.stack = static_cast<char*>(const_cast<void*>(stack)), scheduler.size = size;
#endif
  (void)stash;
}

void begun() { arrived(nullptr); }

void change(Fiber& from, Fiber& to, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.stash, to.stack, to.size);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(to.tsan, 1);
#endif
  (void)for_good;
  stopped = &from;
#if defined(CUDA_EMULATOR_OWN_SWITCH)
  cuda_emulator_switch(&from.at, to.at);
#else
  swapcontext(&from.at, &to.at);
#endif
  arrived(from.stash);
}

#if defined(CUDA_EMULATOR_TSAN)
void release(char& tag) { __tsan_release(&tag); }
void acquire(char& tag) { __tsan_acquire(&tag); }
#endif

void enter_launch() {
#if defined(CUDA_EMULATOR_TSAN)
  scheduler.tsan = __tsan_get_current_fiber();
#endif
}

void leave_launch(Fiber& fiber, char& tag) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 1);
  __tsan_release(&tag);
  __tsan_switch_to_fiber(scheduler.tsan, 1);
#endif
  (void)fiber, (void)tag;
}

}  // namespace cuda_emulator
