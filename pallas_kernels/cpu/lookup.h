// pooled_lookup: threads share out the bags.
#pragma once

#include "parallel.h"
#include "pool.h"

namespace dlrm {

// Ids and bags that one task takes: large enough to hide what a task costs, small enough to balance.
constexpr int64_t kWorkOfTask = 1024;

// Of a row ahead only so many bytes are asked for, the processor itself fetches lines that follow each other; and so many
// rows ahead.
constexpr int64_t kBeginning = 512;
constexpr int64_t kLeastIdsAhead = 32;

template <typename T>
void pooled_lookup(ffi::ThreadPool& threads, const Rows<T>& rows, const int32_t* ids, int64_t num_ids,
                   const int32_t* offsets, int64_t num_bags, const float* weights, float* pooled) {
  // Tasks are ranges of bags of about equal work. Offsets beyond the ids would be the caller's mistake; they are cut.
  const auto place = [&](int64_t bag) { return std::clamp<int64_t>(offsets[bag], 0, num_ids); };
  const int64_t known = place(num_bags);
  const int64_t num_tasks = std::max<int64_t>(1, (known + num_bags) / kWorkOfTask);
  const auto first_bag = [&](int64_t task) {
    // The first bag whose work, its own number and its first id, reaches the task's share.
    const int64_t share = (known + num_bags) * task / num_tasks;
    int64_t low = 0, high = num_bags;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (place(middle) + middle < share) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  const int64_t row_bytes = rows.width * sizeof(T);
  const Prefetch ahead{std::max(rows_ahead(row_bytes), kLeastIdsAhead), std::min(row_bytes, kBeginning)};
  parallel_for(threads, num_tasks, [&](int64_t task) {
    const int64_t last = task + 1 == num_tasks ? num_bags : first_bag(task + 1);
    for (int64_t bag = first_bag(task); bag < last; ++bag) {
      float* sums = pooled + bag * rows.width;
      if (weights == nullptr) {
        pool<T, false>(rows, ids, weights, place(bag), place(bag + 1), known, ahead, sums);
      } else {
        pool<T, true>(rows, ids, weights, place(bag), place(bag + 1), known, ahead, sums);
      }
    }
  });
}

}  // namespace dlrm
