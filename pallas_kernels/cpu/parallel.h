// Work shared among the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "xla/ffi/api/ffi.h"

namespace dlrm {

namespace ffi = xla::ffi;

// Subnormal numbers are read and written as zero within its life, as in XLA's own CPU programs. Set in each task, since
// a result must not depend on the thread that computes it.
class FlushSubnormals {
 public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  uint32_t saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    asm volatile("mrs %0, fpcr" : "=r"(saved_));
    asm volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

 private:
  uint64_t saved_;
#endif
};

// Calls work(task) once for each task in [0, num_tasks), on the calling thread and on threads of the pool.
//
// The caller takes tasks too, and waits only for tasks that a thread has begun. So no call waits for a free thread,
// and calls of many devices may share one pool without a deadlock. A helper that the pool starts late finds no task
// left, and touches nothing but the counters, which it keeps alive.
template <typename Work>
void parallel_for(ffi::ThreadPool& pool, int64_t num_tasks, const Work& work) {
  if (num_tasks <= 0) return;
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto progress = std::make_shared<Progress>();
  auto take = [progress, num_tasks, &work] {
    FlushSubnormals flush;
    for (;;) {
      const int64_t task = progress->next.fetch_add(1, std::memory_order_relaxed);
      if (task >= num_tasks) return;
      work(task);
      progress->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t helpers = std::min(num_tasks, pool.num_threads()) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(decltype(take)(take));
  take();
  for (int spins = 0; progress->done.load(std::memory_order_acquire) < num_tasks; ++spins) {
    if (spins > 200) std::this_thread::yield();
  }
}

}  // namespace dlrm
