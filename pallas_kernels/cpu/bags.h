// bags_of_ids: threads share out the ids.
#pragma once

#include <cstring>

#include "elements.h"
#include "parallel.h"

namespace dlrm {

// Ids that one task writes.
constexpr int64_t kBagsOfTask = int64_t{1} << 15;

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
