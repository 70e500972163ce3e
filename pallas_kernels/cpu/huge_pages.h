// Large stores move to pages of 2 MB. Rows are read at random: with pages of 4 KB, nearly each is a miss of the
// translation buffer, which costs more than the row.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <set>
#include <system_error>
#include <thread>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dlrm {

constexpr uintptr_t kHugePage = uintptr_t{1} << 21;

#if defined(__linux__)

// Stores smaller than this stay; so do any beyond the first so many.
constexpr int64_t kHugeStore = int64_t{64} << 20;
constexpr size_t kMostStores = 256;
// Linux 6.1 and later: make them huge now. Older headers do not name it; older kernels refuse it, and do so in time.
constexpr int kCollapse = 25;
// Time of rest for each time of work.
constexpr int kRest = 4;

// The huge pages that lie within some bytes.
struct HugePages {
  HugePages(const void* data, int64_t num_bytes)
      : begin((reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1)),
        end((reinterpret_cast<uintptr_t>(data) + num_bytes) & ~(kHugePage - 1)) {}

  // Whether the system will make them huge, those that nobody has touched as they are touched.
  bool ask() const { return madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0; }

  const uintptr_t begin, end;
};

// Asks for huge pages for memory that nobody has touched.
inline void begin_in_huge_pages(const void* data, int64_t num_bytes) {
  if (num_bytes >= kHugeStore) HugePages(data, num_bytes).ask();
}

// Asks for huge pages once for each store, on a thread of its own: the numbers move while they are used. Nothing of
// this changes a result, and nothing happens where the system does not offer such pages or has none left, or no thread.
inline void use_huge_pages(const void* data, int64_t num_bytes) {
  if (num_bytes < kHugeStore) return;
  static std::mutex mutex;
  static std::set<std::pair<const void*, int64_t>> seen;
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (seen.size() >= kMostStores || !seen.emplace(data, num_bytes).second) return;
  }
  const auto move = [pages = HugePages(data, num_bytes)] {
    if (!pages.ask()) return;
    // Page by page with rests between them, since moving one holds up whoever allocates memory. Memory that was given
    // back meanwhile ends it.
    for (uintptr_t page = pages.begin; page < pages.end; page += kHugePage) {
      const auto started = std::chrono::steady_clock::now();
      if (madvise(reinterpret_cast<void*>(page), kHugePage, kCollapse) != 0) return;
      std::this_thread::sleep_for(kRest * (std::chrono::steady_clock::now() - started));
    }
  };
  try {
    std::thread(move).detach();
  } catch (const std::system_error&) {
  }
}

#else

inline void begin_in_huge_pages(const void*, int64_t) {}
inline void use_huge_pages(const void*, int64_t) {}

#endif

}  // namespace dlrm
