// A stack that is left and entered again, and what sanitizers must be told about it.
#pragma once
#include <stddef.h>

#if defined(__x86_64__) && !defined(CUDA_EMULATOR_UCONTEXT)
#define CUDA_EMULATOR_OWN_SWITCH
#else
#include <ucontext.h>
#endif

namespace cuda_emulator {

struct Fiber {
  char* stack;
  size_t size;
#if defined(CUDA_EMULATOR_OWN_SWITCH)
  void* at;  // the stack pointer where it stopped
#else
  ucontext_t at;
#endif
  void* tsan;   // ThreadSanitizer's name for it
  int launch;   // the last that it took part in
  void* stash;  // AddressSanitizer's, while it does not run
};

extern Fiber scheduler;  // the stack of the OS thread that launches

void make(Fiber& fiber, int id);  // its stack, the first time
void abandon(Fiber& fiber);       // it will not go on: what it did lies before what its launch's caller does
void prepare(Fiber& fiber, void (*entry)());  // the next change to it begins `entry` anew, which first calls `begun`
void begun();
void change(Fiber& from, Fiber& to, bool for_good = false);

// Ordering that ThreadSanitizer has to know of: what was before a release is before what comes after an acquire. Each
// costs it a microsecond or more, as many fibers as there are, and most of its time.
#if defined(CUDA_EMULATOR_TSAN)
void release(char& tag);
void acquire(char& tag);
#else
inline void release(char&) {}
inline void acquire(char&) {}
#endif
void enter_launch();                         // names the OS thread that schedules
void leave_launch(Fiber& fiber, char& tag);  // what the fiber did lies before whoever acquires the tag

}  // namespace cuda_emulator
