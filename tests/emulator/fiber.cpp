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

static Fiber scheduler;
#if defined(__SANITIZE_ADDRESS__)
static const void* scheduler_stack;
static size_t scheduler_size;
#endif

#if defined(__x86_64__)
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
static void change(Fiber& from, Fiber& to) { cuda_emulator_switch(&from.at, to.at); }
#else
static void change(Fiber& from, Fiber& to) { swapcontext(&from.at, &to.at); }
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
#if defined(__x86_64__)
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

void clean(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  if (fiber.stack) __asan_unpoison_memory_region(fiber.stack, fiber.size);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  if (fiber.tsan) __tsan_destroy_fiber(fiber.tsan);
  fiber.tsan = nullptr;
#endif
  (void)fiber;
}

void enter(Fiber& fiber) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&scheduler.stash, fiber.stack, fiber.size);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
  change(scheduler, fiber);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(scheduler.stash, nullptr, nullptr);
#endif
}

void begun() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
}

void leave(Fiber& fiber, bool for_good) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.stash, scheduler_stack, scheduler_size);
#endif
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_switch_to_fiber(scheduler.tsan, 1);
#endif
  (void)for_good;
  change(fiber, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.stash, &scheduler_stack, &scheduler_size);
#endif
}

void release(char& tag) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_release(&tag);
#endif
  (void)tag;
}

void acquire(char& tag) {
#if defined(CUDA_EMULATOR_TSAN)
  __tsan_acquire(&tag);
#endif
  (void)tag;
}

void enter_launch() {
#if defined(CUDA_EMULATOR_TSAN)
  scheduler.tsan = __tsan_get_current_fiber();
#endif
}

}  // namespace cuda_emulator
