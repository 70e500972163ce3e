// The ids of a batch in the order of their rows, ids of one row in the order given.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "parallel.h"

namespace dlrm {

// Row in the high 32 bits, number of the id in the low ones.
using Entry = uint64_t;
inline uint32_t row_of(Entry entry) { return entry >> 32; }
inline uint32_t id_of(Entry entry) { return static_cast<uint32_t>(entry); }

// Entries of one bucket on average: they and their copy fit in the first-level cache.
constexpr int kLogEntriesOfBucket = 10;
// With more buckets than this the scatter writes to more pages than the translation buffer of the first level holds.
constexpr int kLogMostBuckets = 7;
// Pieces of ids that threads count and scatter.
constexpr int64_t kMostPieces = 64;
constexpr int64_t kFewEntries = 24;

inline int bits_of(uint64_t x) { return x == 0 ? 0 : 64 - __builtin_clzll(x); }

// Sorts entries by row, stably, given in the order of ids. `spare` has the same size.
inline void sort_entries(Entry* entries, Entry* spare, int64_t size) {
  Entry differing = 0;
  bool sorted = true;
  for (int64_t i = 1; i < size; ++i) {
    differing |= entries[i] ^ entries[0];
    sorted &= entries[i - 1] <= entries[i];
  }
  if (sorted) return;
  if (size <= kFewEntries) {
    // Ids ascend, so whole entries compare as rows do, and ties do not occur.
    for (int64_t i = 1; i < size; ++i) {
      const Entry entry = entries[i];
      int64_t place = i;
      for (; place > 0 && entries[place - 1] > entry; --place) entries[place] = entries[place - 1];
      entries[place] = entry;
    }
    return;
  }
  const int bits = bits_of(differing >> 32);
  const int passes = (bits + 7) / 8;
  const int digit_bits = (bits + passes - 1) / passes;
  const uint64_t mask = (uint64_t{1} << digit_bits) - 1;
  Entry *from = entries, *to = spare;
  for (int pass = 0; pass < passes; ++pass) {
    const int shift = 32 + pass * digit_bits;
    if (((differing >> shift) & mask) == 0) continue;
    uint32_t places[256] = {};
    for (int64_t i = 0; i < size; ++i) ++places[(from[i] >> shift) & mask];
    uint32_t total = 0;
    for (uint64_t digit = 0; digit <= mask; ++digit) total += std::exchange(places[digit], total);
    for (int64_t i = 0; i < size; ++i) to[places[(from[i] >> shift) & mask]++] = from[i];
    std::swap(from, to);
  }
  if (from != entries) std::memcpy(entries, from, size * sizeof(Entry));
}

// Memory of one call, which XLA planned as one more result of it. See `_scratch_words` in cpu.py.
class Scratch {
 public:
  Scratch(void* begin, int64_t bytes) : next_(static_cast<char*>(begin)), end_(next_ + bytes) {}

  // Null if there is not enough left.
  template <typename T>
  T* take(int64_t size) {
    const int64_t bytes = (size * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    if (bytes > end_ - next_) return nullptr;
    char* taken = next_;
    next_ += bytes;
    return reinterpret_cast<T*>(taken);
  }

 private:
  char *next_, *end_;
};

inline ffi::Error no_memory() { return ffi::Error(ffi::ErrorCode::kInternal, "the scratch memory of an update is too small"); }

struct SortedIds {
  // Those of rows in the store and of bags, by row, then by id.
  Entry* entries = nullptr;
  int64_t size = 0;
  // Bag of each id, in the order given; only those before the padding.
  int32_t* bags = nullptr;
};

// Stable sort by row: a scatter into buckets by the highest bits of the row, then a sort of each bucket.
inline ffi::Error sort_ids(ffi::ThreadPool& threads, Scratch& scratch, const int32_t* rows,
                                        int64_t num_ids, const int32_t* offsets, int64_t num_bags, int64_t num_rows,
                           SortedIds& sorted) {
  const auto place = [&](int64_t bag) { return std::clamp<int64_t>(offsets[bag], 0, num_ids); };
  const int64_t known = place(num_bags);
  if (known == 0 || num_rows == 0) return ffi::Error::Success();
  const int log_buckets = std::clamp(bits_of(known) - kLogEntriesOfBucket, 0, kLogMostBuckets);
  const int shift = std::max(0, bits_of(num_rows - 1) - log_buckets);
  const int64_t num_buckets = ((num_rows - 1) >> shift) + 1;
  // Pieces of ids: one for each thread, since each has a count of every bucket.
  const int64_t num_pieces = std::clamp<int64_t>(known >> kLogEntriesOfBucket, 1, std::clamp<int64_t>(threads.num_threads(), 1, kMostPieces));
  const auto piece_start = [&](int64_t piece) { return known * piece / num_pieces; };

  sorted.entries = scratch.take<Entry>(known);
  sorted.bags = scratch.take<int32_t>(known);
  Entry* spare = scratch.take<Entry>(known);
  uint32_t* places = scratch.take<uint32_t>(num_pieces * num_buckets);
  uint32_t* bucket_starts = scratch.take<uint32_t>(num_buckets + 1);
  if (!sorted.entries || !sorted.bags || !spare || !places || !bucket_starts) return no_memory();

  parallel_for(threads, num_pieces, [&](int64_t piece) {
    uint32_t* count = places + piece * num_buckets;
    std::fill(count, count + num_buckets, 0);
    const int64_t begin = piece_start(piece), end = piece_start(piece + 1);
    // The bag of the first id: the last one that starts no later; empty bags before it share its start.
    int64_t bag = std::upper_bound(offsets, offsets + num_bags + 1, static_cast<int32_t>(begin)) - offsets - 1;
    for (int64_t id = begin; id < end; ++bag) {
      const int64_t bag_end = std::min(end, place(bag + 1));
      for (; id < bag_end; ++id) {
        sorted.bags[id] = static_cast<int32_t>(bag);
        if (static_cast<uint32_t>(rows[id]) < num_rows) ++count[rows[id] >> shift];
      }
    }
  });
  uint32_t total = 0;
  for (int64_t bucket = 0; bucket < num_buckets; ++bucket) {
    bucket_starts[bucket] = total;
    for (int64_t piece = 0; piece < num_pieces; ++piece) {
      total += std::exchange(places[piece * num_buckets + bucket], total);
    }
  }
  bucket_starts[num_buckets] = total;
  sorted.size = total;
  parallel_for(threads, num_pieces, [&](int64_t piece) {
    uint32_t* next = places + piece * num_buckets;
    for (int64_t id = piece_start(piece); id < piece_start(piece + 1); ++id) {
      const uint32_t row = rows[id];
      if (row < num_rows) sorted.entries[next[row >> shift]++] = (static_cast<Entry>(row) << 32) | id;
    }
  });
  parallel_for(threads, num_buckets, [&](int64_t bucket) {
    const int64_t begin = bucket_starts[bucket];
    sort_entries(sorted.entries + begin, spare + begin, bucket_starts[bucket + 1] - begin);
  });
  return ffi::Error::Success();
}

}  // namespace dlrm
