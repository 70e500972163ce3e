// Large stores move to pages of 2 MB. Rows are read at random: with pages of 4 KB, nearly each is a miss of the
// translation buffer, which costs more than the row.
#pragma once

#include <cerrno>
#include <cstdint>
#include <map>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dlrm {

#if defined(__linux__)

// Stores smaller than this stay; so do any beyond the first so many.
constexpr int64_t kHugeStore = int64_t{64} << 20;
constexpr size_t kMostStores = 256;
constexpr uint64_t kCallsBetween = 64;
constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
// Linux 6.1 and later: make them huge now. Older headers do not name it; older kernels refuse it, and do so in time.
constexpr int kCollapse = 25;

// Asks for huge pages on a thread of its own: the numbers move while they are used. Nothing of this changes a result,
// and nothing happens where the system does not offer such pages. Asked for now and then again, since another store may
// have come to lie in the same place; where pages are huge already, that takes no time.
inline void use_huge_pages(const void* data, int64_t num_bytes) {
  if (num_bytes < kHugeStore) return;
  static std::mutex mutex;
  static std::map<const void*, uint64_t> calls;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (calls.size() >= kMostStores && calls.count(data) == 0) return;
    if (calls[data]++ % kCallsBetween != 0) return;
  }
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + num_bytes) & ~(kHugePage - 1);
  std::thread([begin, end] {
    if (madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) != 0) return;
    // Piece by piece: the system holds a lock for each. Memory that is given back meanwhile ends it.
    for (uintptr_t piece = begin; piece < end; piece += 16 * kHugePage) {
      const uintptr_t size = end - piece < 16 * kHugePage ? end - piece : 16 * kHugePage;
      if (madvise(reinterpret_cast<void*>(piece), size, kCollapse) != 0 && errno != EAGAIN) return;
    }
  }).detach();
}

#else

inline void use_huge_pages(const void*, int64_t) {}

#endif

}  // namespace dlrm
