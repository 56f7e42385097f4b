// A stack that is left and entered again, and what sanitizers must be told about it.
#pragma once
#include <stddef.h>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_emulator {

struct Fiber {
  char* stack;
  size_t size;
#if defined(__x86_64__)
  void* at;  // the stack pointer where it stopped
#else
  ucontext_t at;
#endif
  void* tsan;   // ThreadSanitizer's name for it
  void* stash;  // AddressSanitizer's, while it does not run
};

void make(Fiber& fiber, int id);              // its stack, the first time
void clean(Fiber& fiber);                     // whatever it was doing when it stopped is forgotten
void prepare(Fiber& fiber, void (*entry)());  // the next `enter` begins `entry` anew

void enter(Fiber& fiber);                 // from the scheduler
void begun();                             // first thing of `entry`
void leave(Fiber& fiber, bool for_good);  // back to the scheduler

// Ordering that ThreadSanitizer has to know of: what was before a release is before what comes after an acquire.
void release(char& tag);
void acquire(char& tag);
void enter_launch();  // names the OS thread that schedules

}  // namespace cuda_emulator
