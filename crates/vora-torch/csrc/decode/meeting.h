// Where the threads of a step wait for each other, some hundred times a step.
//
// libgomp's barrier sleeps after a hundred glances as soon as a program's teams have more threads together than there are
// processors, and a program has a team for each thread that computed something: with two threads a step was then slower than
// with one. This one looks for a while, and then lets others have the processor between glances, so that it does no harm on a
// machine that is busy.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

namespace vora::decode {

class Meeting {
 public:
  // Returns once `threads` have called it.
  void meet(int64_t threads) {
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int glances = 0; round_.load(std::memory_order_acquire) == round; glances++) {
      if (glances < GLANCES) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int GLANCES = 4000;  // some 50 microseconds

  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

}  // namespace vora::decode
