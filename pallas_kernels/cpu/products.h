// Matrix products of dense layers, with the bias, the ReLU and its gradient that go with them.
//
// Letters: B samples, n inputs, m outputs; M a multiplier. Each sum runs in the same order for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

#include "avx512.h"
#include "elements.h"
#include "multipliers.h"
#include "packing.h"
#include "parallel.h"

#if defined(__x86_64__)

namespace dlrm {

// What a task goes through again and again, for its core's second-level cache: rows of a and panels of b, M::kDepth of
// each, or such panels in all their depth, so many numbers' parts.
constexpr int64_t kRowsHeld = 256, kPanelsHeld = 16, kPartsHeld = 1536;
// How far rows of sums of some panels are apart: an odd number of cache lines, so that they do not share few sets of a
// cache.
constexpr int64_t stride_of_sums(int64_t columns) { return columns + 16; }
constexpr int64_t kStrideOfSums = stride_of_sums(kPanelsHeld * kColumns);
// Rows of weights that a task packs.
constexpr int64_t kWeightsOfTask = 64;

inline int64_t num_pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Of so many columns or rows, at least one: zeros make up the rest.
inline int64_t depth_of(int64_t size) { return round_up(std::max<int64_t>(size, 1), kDepthUnit); }

// A thread's memory for numbers of one kind, kept for its next tasks.
template <typename T>
T* memory_of_thread(int64_t count) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(T* memory) const { ::operator delete(memory, kLine); }
  };
  thread_local std::unique_ptr<T, Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(static_cast<T*>(::operator new(count * sizeof(T), kLine)));
    size = count;
  }
  return memory.get();
}

// Rows of a task: few enough for all threads to have so many tasks, nearly equal ones; whole blocks of the multiplier.
template <typename M>
int64_t rows_of_task(int64_t num_rows, int64_t num_tasks) {
  const int64_t rounds = std::max<int64_t>(1, num_pieces(num_rows, kRowsHeld * num_tasks));
  return std::max(M::kRows, round_up(num_pieces(num_rows, rounds * num_tasks), M::kRows));
}

// What becomes of a product: out = product + bias, [*, num_columns], rectified if asked; `bias` is of whole panels.
template <typename Out>
struct Output {
  std::vector<float> bias;
  bool relu;
  int64_t num_columns;
  Out* out;

  // Asks for the memory of a block of sums.
  void ask_for(int64_t row, int64_t rows, int64_t column) const {
    for (int64_t i = 0; i < rows; ++i) {
      const Out* to = out + (row + i) * num_columns + column;
      for (int64_t j = 0; j < kColumns; j += 64 / sizeof(Out)) __builtin_prefetch(to + j, 1, 2);
    }
  }

  // Finishes some rows of a group's sums, which begins at a column.
  DLRM_AVX512 void finish(const float* sums, int64_t row, int64_t rows, int64_t column) const {
    const int64_t end = std::min(num_columns, column + kPanelsHeld * kColumns);
    for (int64_t i = 0; i < rows; ++i) {
      Out* to = out + (row + i) * num_columns;
      for (int64_t j = column; j < end; j += kColumns) {
        const Floats512 x = load_lanes(sums + i * kStrideOfSums + j - column, ~0u) + load_lanes(bias.data() + j, ~0u);
        store_lanes(to + j, first_lanes(end - j), relu ? rectified(x) : x);
      }
    }
  }
};

template <typename Out>
Output<Out> output_of(const float* bias, bool relu, int64_t num_columns, Out* out) {
  std::vector<float> padded(round_up(num_columns, kColumns));
  if (bias != nullptr) std::copy_n(bias, num_columns, padded.begin());
  return {std::move(padded), relu, num_columns, out};
}

// What is done while a block multiplies: some steps, evenly among so many calls.
template <typename Step>
class Spread {
 public:
  Spread(int64_t num_steps, int64_t num_calls, const Step& step)
      : step_(step), num_steps_(num_steps), num_calls_(num_calls) {}

  void operator()() {
    for (due_ += num_steps_; due_ >= num_calls_ && done_ < num_steps_; due_ -= num_calls_) step_(done_++);
  }

 private:
  const Step step_;
  const int64_t num_steps_, num_calls_;
  int64_t due_ = 0, done_ = 0;
};

// Multiplies rows of a by the panels of b, for `output` from a row on. packing_at(i, rows, k, depth, to) packs some rows
// of a from i on, and `depth` columns from k on, at most M::kDepth.
//
// A block's rows stay in the first-level cache, part by part of the depth, while panels from the second-level cache pass
// by. Where that holds a group of panels in all their depth, blocks are finished one after the other; else all rows pass
// by a part of the panels, and their sums wait. Rows of the result are far apart, each in another page: its memory is
// asked for while tiles multiply.
template <typename M, typename PackingAt, typename Out>
void multiply_rows(const Bf16* b, int64_t depth, int64_t row, int64_t rows, const PackingAt& packing_at,
                   const Output<Out>& output) {
  using Packing = decltype(packing_at(0, 0, 0, 0, nullptr));
  const int64_t num_panels = num_pieces(output.num_columns, kColumns), padded_rows = round_up(rows, M::kRows);
  const int64_t sweep = depth * M::kParts <= kPartsHeld ? M::kRows : padded_rows;
  const bool one_group = num_panels <= kPanelsHeld;
  // Turns: some rows and a part of the depth. What a turn multiplies is packed then, or in steps in the turn before and
  // asked for in the one before that.
  const int64_t rows_of_turn = Packing::kInSteps ? M::kRows : sweep, turns_of_sweep = sweep / rows_of_turn;
  const int64_t num_parts = num_pieces(depth, M::kDepth), num_turns = padded_rows / rows_of_turn * num_parts;
  const auto first_of = [&](int64_t turn) {
    return turn / (turns_of_sweep * num_parts) * sweep + turn % turns_of_sweep * rows_of_turn;
  };
  const auto k_of = [&](int64_t turn) { return turn / turns_of_sweep % num_parts * M::kDepth; };
  // Numbers' parts, a row of a part of the depth after the other.
  constexpr int64_t kRow = M::kParts * M::kDepth;
  const int64_t num_kept = one_group ? (Packing::kInSteps ? 2 : 1) : num_turns;
  Bf16* a = memory_of_thread<Bf16>(num_kept * rows_of_turn * kRow);
  const auto packing_of = [&](int64_t turn) {
    const int64_t k = k_of(turn);
    return packing_at(first_of(turn), rows_of_turn, k, std::min(M::kDepth, depth - k),
                      a + turn % num_kept * rows_of_turn * kRow);
  };
  float* sums = memory_of_thread<float>(sweep * kStrideOfSums);
  [[maybe_unused]] typename M::Session session;
  for (int64_t group = 0; group < num_panels; group += kPanelsHeld) {
    const int64_t end = std::min(num_panels, group + kPanelsHeld);
    for (int64_t turn = 0; turn < num_turns; ++turn) {
      const Packing now = packing_of(turn), next = packing_of(turn + 1), after = packing_of(turn + 2);
      if (group == 0 && (turn == 0 || !Packing::kInSteps)) now.pack_all();
      const int64_t first = first_of(turn), last = std::min(rows, first + rows_of_turn), k = k_of(turn);
      const int64_t part_depth = std::min(M::kDepth, depth - k);
      const bool ends = k + M::kDepth >= depth;
      const auto panel_at = [&](int64_t panel) { return b + (panel * depth + k) * kColumns * M::kParts; };
      const int64_t num_steps = group == 0 && turn + 1 < num_turns ? next.num_steps() : 0;
      const int64_t num_calls = num_pieces(last - first, M::kRows) * (end - group) * part_depth / kDepthUnit;
      Spread meanwhile(num_steps, num_calls, [&](int64_t step) {
        if (step < after.num_steps()) after.ask(step);
        next.pack(step);
      });
      for (int64_t i = first; i < last; i += M::kRows) {
        const int64_t rows_here = std::min(M::kRows, rows - i);
        float* of_rows = sums + i % sweep * kStrideOfSums;
        for (int64_t panel = group; panel < end; ++panel) {
          if (ends) output.ask_for(row + i, rows_here, panel * kColumns);
          M::multiply(now.to + (i - first) * kRow, panel_at(panel), panel_at(panel + 1 < end ? panel + 1 : group),
                      part_depth, of_rows + (panel - group) * kColumns, kStrideOfSums, k == 0, meanwhile);
        }
        if (ends) output.finish(of_rows, row + i, rows_here, group * kColumns);
      }
    }
  }
}

// The product of `from` and `weights`, or their transpose, for which `packed` has room: kParts, and both sizes, at least
// 1, rounded up to 32.
template <typename M, typename T, typename Out>
void product(ffi::ThreadPool& threads, const Matrix<T>& from, const Matrix<float>& weights, bool transposed,
             Bf16* packed, const Output<Out>& output) {
  const int64_t depth = depth_of(from.columns), num_panels = num_pieces(output.num_columns, kColumns);
  const auto pack = [&](int64_t task) {
    if (transposed) {
      pack_transposed_panel<M>(weights, task * kColumns, depth, packed + task * depth * kColumns * M::kParts);
    } else {
      const int64_t row = task * kWeightsOfTask;
      pack_panels<M>(weights, row, std::min(kWeightsOfTask, depth - row), depth, row_of_panel<M>(packed, row, 0),
                     nullptr);
    }
  };
  const int64_t num_packs = transposed ? num_panels : num_pieces(depth, kWeightsOfTask);
  const int64_t rows_of = rows_of_task<M>(from.rows, 4 * threads.num_threads());
  const auto multiply = [&](int64_t task) {
    const int64_t begin = task * rows_of, rows = std::min(rows_of, from.rows - begin);
    multiply_rows<M>(
        packed, depth, begin, rows,
        [&](int64_t i, int64_t count, int64_t k, int64_t part, Bf16* to) {
          return PackedRows<M, T>{from, begin + i, k, count, part, to};
        },
        output);
  };
  parallel_phases(threads, {num_packs, num_pieces(from.rows, rows_of)},
                  [&](int64_t phase, int64_t task) { phase == 0 ? pack(task) : multiply(task); });
}

}  // namespace dlrm

#endif
