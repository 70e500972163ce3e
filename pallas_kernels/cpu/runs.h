// Each distinct row of a batch once, with the sum of its gradients.
//
// A row's gradients are added one after the other in blocks of kRunBlock, counted from the row's first, then block
// after block. Threads share out the sorted ids by fixed cuts, and a run belongs to the piece in which it starts, so a
// row has one writer. A run longer than kLongRun is left for a second round, in which threads share out its blocks.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "pool.h"
#include "sorted_ids.h"

namespace dlrm {

constexpr int64_t kRunBlock = 128;  // RUN_BLOCK of xla.py
constexpr int64_t kLongRun = 16 * kRunBlock;
constexpr int64_t kIdsOfPiece = 1024;
constexpr int64_t kBlocksOfTask = 8;

struct Run {
  int64_t begin, end;  // in the sorted ids
  int64_t row;
  uint32_t first_id;
  int32_t slot;
};

struct Gradients {
  Rows<float> rows;             // of bags
  const float* weights;         // of ids, or null
  const int32_t* slots_of_ids;  // here so that they are read with an id's bag, many at a time
};

// Bags and weights of a stretch of sorted ids, side by side.
template <int64_t kSize>
struct Stretch {
  int32_t bags[kSize];
  float weights[kSize];
  int64_t size = 0;

  void add(const SortedIds& sorted, const Gradients& gradients, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i, ++size) bags[size] = sorted.bags[id_of(sorted.entries[i])];
    if (gradients.weights == nullptr) return;
    for (int64_t i = begin, to = size - (end - begin); i < end; ++i, ++to) {
      weights[to] = gradients.weights[id_of(sorted.entries[i])];
    }
  }

  void sum(const Gradients& gradients, int64_t begin, int64_t end, float* sums) const {
    const int64_t row_bytes = gradients.rows.width * sizeof(float);
    const Prefetch ahead{rows_ahead(row_bytes), row_bytes};
    if (gradients.weights == nullptr) {
      pool<float, false>(gradients.rows, bags, weights, begin, end, size, ahead, sums);
    } else {
      pool<float, true>(gradients.rows, bags, weights, begin, end, size, ahead, sums);
    }
  }
};

inline void add_to(float* sums, const float* block, int64_t width) {
  for (int64_t j = 0; j < width; ++j) sums[j] += block[j];
}

// Memory of a thread for one row, kept for its next tasks.
inline float* row_buffer(int64_t size) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

// Calls visit(run, sum, buffer) once for each row, with ahead(run) some rows earlier so that it may be fetched.
// `buffer` has room for `buffer_rows` rows of float32.
//
// Not a template: a call for each row costs less than forty copies of this in the library.
using Ahead = std::function<void(const Run&)>;
using Visit = std::function<void(const Run&, const float* sum, float* buffer)>;

inline ffi::Error for_each_row(ffi::ThreadPool& threads, Scratch& scratch, const SortedIds& sorted,
                               const Gradients& gradients, int64_t rows_ahead, int64_t buffer_rows, const Ahead& ahead,
                               const Visit& visit) {
  const int64_t width = gradients.rows.width;
  const Entry* entries = sorted.entries;
  std::mutex long_runs_lock;
  std::vector<Run> long_runs;

  parallel_for(threads, (sorted.size + kIdsOfPiece - 1) / kIdsOfPiece, [&](int64_t piece) {
    int64_t begin = piece * kIdsOfPiece;
    const int64_t end = std::min(sorted.size, begin + kIdsOfPiece);
    while (begin > 0 && begin < end && row_of(entries[begin]) == row_of(entries[begin - 1])) ++begin;
    Run runs[kIdsOfPiece];
    Stretch<kIdsOfPiece + kLongRun> stretch;
    int64_t num_runs = 0;
    for (int64_t i = begin; i < end;) {
      int64_t next = i + 1;
      while (next < sorted.size && next <= i + kLongRun && row_of(entries[next]) == row_of(entries[i])) ++next;
      const uint32_t first_id = id_of(entries[i]);
      Run run{i, next, row_of(entries[i]), first_id, gradients.slots_of_ids[first_id]};
      if (next <= i + kLongRun) {
        stretch.add(sorted, gradients, i, next);
        runs[num_runs++] = run;
      } else {
        const Entry beyond = (static_cast<Entry>(run.row) + 1) << 32;
        next = run.end = std::lower_bound(entries + next, entries + sorted.size, beyond) - entries;
        const std::lock_guard<std::mutex> guard(long_runs_lock);
        long_runs.push_back(run);
      }
      i = next;
    }
    float* buffer = row_buffer((buffer_rows + 2) * width);
    float *sum = buffer, *block = sum + width, *rest = block + width;
    for (int64_t r = 0; r < std::min(rows_ahead, num_runs); ++r) ahead(runs[r]);
    int64_t place = 0;
    for (int64_t r = 0; r < num_runs; ++r) {
      if (r + rows_ahead < num_runs) ahead(runs[r + rows_ahead]);
      const int64_t last = place + runs[r].end - runs[r].begin;
      stretch.sum(gradients, place, std::min(last, place + kRunBlock), sum);
      for (place += kRunBlock; place < last; place += kRunBlock) {
        stretch.sum(gradients, place, std::min(last, place + kRunBlock), block);
        add_to(sum, block, width);
      }
      place = last;
      visit(runs[r], sum, rest);
    }
  });
  if (long_runs.empty()) return ffi::Error::Success();

  // First block of each long run among the blocks of all, and tasks of some blocks of one run.
  struct Task {
    const Run* run;
    int64_t begin, end, first_block;
  };
  std::vector<int64_t> first_blocks;
  std::vector<Task> tasks;
  int64_t num_blocks = 0;
  for (const Run& run : long_runs) {
    first_blocks.push_back(num_blocks);
    for (int64_t i = run.begin; i < run.end; i += kBlocksOfTask * kRunBlock) {
      const int64_t block = num_blocks + (i - run.begin) / kRunBlock;
      tasks.push_back({&run, i, std::min(run.end, i + kBlocksOfTask * kRunBlock), block});
    }
    num_blocks += (run.end - run.begin + kRunBlock - 1) / kRunBlock;
  }
  float* block_sums = scratch.take<float>(num_blocks * width);
  if (block_sums == nullptr) return no_memory();
  parallel_for(threads, tasks.size(), [&](int64_t number) {
    const Task& task = tasks[number];
    Stretch<kBlocksOfTask * kRunBlock> stretch;
    stretch.add(sorted, gradients, task.begin, task.end);
    float* sums = block_sums + task.first_block * width;
    for (int64_t place = 0; place < stretch.size; place += kRunBlock, sums += width) {
      stretch.sum(gradients, place, std::min(stretch.size, place + kRunBlock), sums);
    }
  });
  parallel_for(threads, long_runs.size(), [&](int64_t r) {
    const Run& run = long_runs[r];
    float* sum = row_buffer((buffer_rows + 2) * width);
    const float* block = block_sums + first_blocks[r] * width;
    ahead(run);
    std::copy(block, block + width, sum);
    for (int64_t i = run.begin + kRunBlock; i < run.end; i += kRunBlock) add_to(sum, block += width, width);
    visit(run, sum, sum + 2 * width);
  });
  return ffi::Error::Success();
}

}  // namespace dlrm
