// offsets_of and bags_of_ids: threads share out the bags, or the ids.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "elements.h"
#include "parallel.h"

namespace dlrm {

// Ids, or bags, that one task writes.
constexpr int64_t kBagsOfTask = int64_t{1} << 15;

// offsets[0] = 0 and offsets[bag + 1] = offsets[bag] + lengths[bag], modulo 2^32.
inline void offsets_of(ffi::ThreadPool& threads, const int32_t* lengths, int64_t num_bags, int32_t* offsets) {
  const int64_t num_tasks = (num_bags + kBagsOfTask - 1) / kBagsOfTask;
  // The last one's total is not wanted.
  std::vector<uint32_t> totals(std::max<int64_t>(num_tasks, 1));
  offsets[0] = 0;
  parallel_phases(threads, {std::max<int64_t>(num_tasks - 1, 0), num_tasks}, [&](int64_t phase, int64_t task) {
    const int64_t begin = task * kBagsOfTask, end = std::min(num_bags, begin + kBagsOfTask);
    if (phase == 0) {
      totals[task] = std::accumulate(lengths + begin, lengths + end, uint32_t{0});
    } else {
      uint32_t offset = std::accumulate(totals.begin(), totals.begin() + task, uint32_t{0});
      for (int64_t bag = begin; bag < end; ++bag) {
        offset += static_cast<uint32_t>(lengths[bag]);
        offsets[bag + 1] = static_cast<int32_t>(offset);
      }
    }
  });
}

// bags[id] = how many bags end at or before the id: its own bag, and num_bags for ids beyond the last.
inline void bags_of_ids(ffi::ThreadPool& threads, const int32_t* offsets, int64_t num_bags, int64_t num_ids,
                        int32_t* bags) {
  const int32_t* ends = offsets + 1;
  parallel_for(threads, (num_ids + kBagsOfTask - 1) / kBagsOfTask, [&](int64_t task) {
    int64_t id = task * kBagsOfTask;
    const int64_t last = std::min(num_ids, id + kBagsOfTask);
    int64_t bag = std::upper_bound(ends, ends + num_bags, static_cast<int32_t>(id)) - ends;
    while (id < last) {
      const int64_t end = bag < num_bags ? std::clamp<int64_t>(ends[bag], id, last) : last;
      // Eight at a time: those beyond a bag's end are written again with the next bag's number.
      const Words number = Words{} + static_cast<uint32_t>(bag);
      for (; id < end && id + kLanes <= last; id += kLanes) std::memcpy(bags + id, &number, sizeof number);
      for (; id < end; ++id) bags[id] = static_cast<int32_t>(bag);
      id = end;
      ++bag;
    }
  });
}

}  // namespace dlrm
