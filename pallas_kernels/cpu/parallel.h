// Work shared among the threads of XLA's pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sched.h>
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

// Waits, without sleeping, until a number of tasks are done that threads have begun.
inline void wait_for(const std::atomic<int64_t>& done, int64_t num_tasks) {
  for (int spins = 0; done.load(std::memory_order_acquire) < num_tasks; ++spins) {
    if (spins > 200) std::this_thread::yield();
  }
}

// The processor that runs the calling thread, -1 where the system does not say.
inline int this_processor() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Moves the calling thread to another of the processors that it may use, if there is one; it may use all of them after.
inline void leave_processor(int processor) {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0 || CPU_COUNT(&allowed) < 2) return;
  cpu_set_t others = allowed;
  CPU_CLR(processor, &others);
  sched_setaffinity(0, sizeof others, &others);
  sched_setaffinity(0, sizeof allowed, &allowed);
#endif
}

// Calls work(phase, task) once for each of sizes[phase] tasks of each phase, on the calling thread and on threads of
// the pool; none before all tasks of the phase before are done.
//
// The caller takes tasks too, in order, as all do, and each waits only for tasks that a thread has begun. So no call
// waits for a free thread, and calls of many devices may share one pool without a deadlock. A helper that the pool
// starts late finds no task left, and touches nothing but the counters, which it keeps alive.
//
// If all processors are busy when a helper is woken, if only for some microseconds, Linux lets it wait for the caller's,
// and may leave it there for milliseconds, longer than most calls take, while another becomes idle. So a caller that
// nobody helps yet lets others run after its first task, and a helper that finds itself on its processor goes elsewhere.
template <typename Work>
void parallel_phases(ffi::ThreadPool& pool, const std::vector<int64_t>& sizes, const Work& work) {
  struct Progress {
    explicit Progress(const std::vector<int64_t>& sizes) : sizes(sizes), done(sizes.size()) {}
    const std::vector<int64_t> sizes;
    const int64_t num_tasks = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    const int caller = this_processor();
    std::atomic<int64_t> next{0};
    std::atomic<bool> helped{false};
    std::vector<std::atomic<int64_t>> done;
  };
  auto progress = std::make_shared<Progress>(sizes);
  const auto take = [progress, &work] {
    FlushSubnormals flush;
    size_t phase = 0;
    int64_t first = 0;
    for (int64_t taken = 0;; ++taken) {
      if (taken == 1 && !progress->helped.load(std::memory_order_relaxed)) std::this_thread::yield();
      const int64_t task = progress->next.fetch_add(1, std::memory_order_relaxed);
      if (task >= progress->num_tasks) return;
      while (task - first >= progress->sizes[phase]) first += progress->sizes[phase++];
      if (phase > 0) wait_for(progress->done[phase - 1], progress->sizes[phase - 1]);
      work(static_cast<int64_t>(phase), task - first);
      progress->done[phase].fetch_add(1, std::memory_order_release);
    }
  };
  auto help = [progress, take] {
    if (progress->next.load(std::memory_order_relaxed) >= progress->num_tasks) return;
    progress->helped.store(true, std::memory_order_relaxed);
    if (this_processor() == progress->caller) leave_processor(progress->caller);
    take();
  };
  const int64_t most = sizes.empty() ? 0 : *std::max_element(sizes.begin(), sizes.end());
  const int64_t helpers = std::min(most, pool.num_threads()) - 1;
  for (int64_t helper = 0; helper < helpers; ++helper) pool.Schedule(decltype(help)(help));
  take();
  for (size_t phase = 0; phase < sizes.size(); ++phase) wait_for(progress->done[phase], sizes[phase]);
}

// Calls work(task) once for each task in [0, num_tasks), as above.
template <typename Work>
void parallel_for(ffi::ThreadPool& pool, int64_t num_tasks, const Work& work) {
  parallel_phases(pool, {num_tasks}, [&](int64_t, int64_t task) { work(task); });
}

}  // namespace dlrm
