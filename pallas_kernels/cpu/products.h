// Matrix products of dense layers in bfloat16 and their gradients, with the bias, the ReLU and its gradient that go with
// them.
//
// Letters: B samples, n inputs, m outputs. Each sum runs in the same order for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "elements.h"
#include "multipliers.h"
#include "packing.h"
#include "parallel.h"

namespace dlrm {

// What a task goes through again and again, for its core's second-level cache: rows of a, and panels of b, kDepth of
// each, and their sums.
constexpr int64_t kRowsHeld = 256, kPanelsHeld = 16;
// Samples whose gradients are packed before they are multiplied.
constexpr int64_t kSamplesPacked = 1024;
// Rows that a task packs: of weights, and of gradients.
constexpr int64_t kWeightsOfTask = 64, kGradientsOfTask = 128;

inline int64_t num_pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// A thread's memory, kept for its next tasks.
inline Bf16* memory_of_thread(int64_t count) {
  constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(Bf16* memory) const { ::operator delete(memory, kLine); }
  };
  thread_local std::unique_ptr<Bf16, Free> memory;
  thread_local int64_t size = 0;
  if (size < count) {
    memory.reset(static_cast<Bf16*>(::operator new(count * sizeof(Bf16), kLine)));
    size = count;
  }
  return memory.get();
}

// Rows of a task: at most so many, but enough tasks for all threads; whole blocks of the multiplier.
template <typename M>
int64_t rows_of_task(int64_t num_rows, int64_t most, int64_t num_tasks) {
  const int64_t rows = std::min(most, num_pieces(num_rows, std::max<int64_t>(num_tasks, 1)));
  return std::max(M::kRows, rows / M::kRows * M::kRows);
}

// Asks for the cache lines of out, [*, num_columns], that a block of sums will be written to.
template <typename Out>
void prefetch_block(const Out* out, int64_t rows, int64_t column, int64_t num_columns) {
  const int64_t columns = std::min(kColumns, num_columns - column);
  for (int64_t i = 0; i < rows; ++i) {
    const Out* row = out + i * num_columns + column;
    for (int64_t j = 0; j < columns; j += 64 / sizeof(Out)) __builtin_prefetch(row + j, 1);
  }
}


// Multiplies rows of a by the panels of b, and hands each block of sums to write(row, panel, sums), whose cache lines
// ask_for(row, panel) has asked for. pack(k, depth, to) packs `depth` columns of a from k on, at most kDepth.
//
// Part by part of the depth, a block's rows stay in the first-level cache while panels from the second-level cache pass
// by, and all of these while rows do.
template <typename M, typename Pack, typename Ask, typename Write>
void multiply_rows(const Bf16* b, int64_t depth, int64_t rows, int64_t num_panels, const Pack& pack, const Ask& ask_for,
                   const Write& write) {
  constexpr int64_t kBlock = M::kRows * kColumns;
  const int64_t blocks = num_pieces(rows, M::kRows), part_size = blocks * M::kRows * kDepth;
  const bool one_part = depth <= kDepth, one_group = num_panels <= kPanelsHeld;
  Bf16* a = memory_of_thread(one_group ? part_size : num_pieces(depth, kDepth) * part_size);
  thread_local std::vector<float> memory;
  // The sums of all blocks wait for the next part, if there is one.
  memory.resize(std::max<int64_t>(memory.size(), kBlock * (one_part ? 1 : blocks * kPanelsHeld)));
  [[maybe_unused]] typename M::Session session;
  for (int64_t group = 0; group < num_panels; group += kPanelsHeld) {
    const int64_t end = std::min(num_panels, group + kPanelsHeld);
    for (int64_t k = 0; k < depth; k += kDepth) {
      const int64_t part_depth = std::min(kDepth, depth - k);
      const bool ends = k + kDepth >= depth;
      Bf16* part = a + (one_group ? 0 : k / kDepth * part_size);
      if (group == 0) pack(k, part_depth, part);
      for (int64_t i = 0; i < rows; i += M::kRows) {
        for (int64_t panel = group; panel < end; ++panel) {
          float* sums = memory.data() + (one_part ? 0 : (i / M::kRows * kPanelsHeld + panel - group) * kBlock);
          if (ends) ask_for(i, panel);
          M::multiply(part + i * kDepth, b + (panel * depth + k) * kColumns, part_depth, sums, k == 0);
          if (ends) write(i, panel, sums);
        }
      }
    }
  }
}

// Writes a block of sums and a bias, rectified if asked, to columns of out, [*, num_columns].
template <typename Out>
DLRM_AVX512 void finish_block(const float* sums, int64_t rows, const float* bias, bool relu, int64_t column,
                              int64_t num_columns, Out* out) {
  const __mmask32 lanes = first_lanes(num_columns - column);
  const Floats512 added = load_lanes(bias, ~0u);
  for (int64_t i = 0; i < rows; ++i) {
    const Floats512 x = load_lanes(sums + i * kColumns, ~0u) + added;
    store_lanes(out + i * num_columns + column, lanes, relu ? rectified(x) : x);
  }
}

// Adds a block of sums to columns of out, [*, num_columns], or writes it there, if it is the first.
DLRM_AVX512 inline void add_block(const float* sums, int64_t rows, bool first, int64_t column, int64_t num_columns,
                                  float* out) {
  const __mmask32 lanes = first_lanes(num_columns - column);
  for (int64_t i = 0; i < rows; ++i) {
    float* row = out + i * num_columns + column;
    const Floats512 x = load_lanes(sums + i * kColumns, ~0u);
    store_lanes(row, lanes, first ? x : load_lanes(row, lanes) + x);
  }
}

// out[b, :] = from[b, :] w + bias, unless that is null, and rectified if asked; w is `weights`, or its transpose, and
// `packed` has room for it with both sizes rounded up to 32.
template <typename M, typename T, typename Out>
void product(ffi::ThreadPool& threads, const Matrix<T>& from, const Matrix<float>& weights, bool transposed,
             const float* bias, bool relu, Bf16* packed, Out* out) {
  const int64_t num_columns = transposed ? weights.rows : weights.columns;
  const int64_t depth = round_up(from.columns, kDepthUnit), num_panels = num_pieces(num_columns, kColumns);
  std::vector<float> padded_bias(num_panels * kColumns);
  if (bias != nullptr) std::copy_n(bias, num_columns, padded_bias.begin());
  const auto pack = [&](int64_t task) {
    if (transposed) {
      pack_transposed_panel(weights, task * kColumns, depth, packed + task * depth * kColumns);
    } else {
      const int64_t row = task * kWeightsOfTask;
      pack_panels(weights, row, std::min(kWeightsOfTask, depth - row), depth, packed + row * kColumns, nullptr);
    }
  };
  const int64_t num_packs = transposed ? num_panels : num_pieces(depth, kWeightsOfTask);
  const int64_t rows_of = rows_of_task<M>(from.rows, kRowsHeld, 4 * threads.num_threads());
  const auto multiply = [&](int64_t task) {
    const int64_t begin = task * rows_of, rows = std::min(rows_of, from.rows - begin);
    multiply_rows<M>(
        packed, depth, rows, num_panels,
        [&](int64_t k, int64_t part, Bf16* to) { pack_rows(from, begin, k, round_up(rows, M::kRows), part, to); },
        [&](int64_t i, int64_t panel) {
          prefetch_block(out + (begin + i) * num_columns, std::min(M::kRows, rows - i), panel * kColumns, num_columns);
        },
        [&](int64_t i, int64_t panel, const float* sums) {
          finish_block(sums, std::min(M::kRows, rows - i), padded_bias.data() + panel * kColumns, relu,
                       panel * kColumns, num_columns, out + (begin + i) * num_columns);
        });
  };
  parallel_phases(threads, {num_packs, num_pieces(from.rows, rows_of)},
                  [&](int64_t phase, int64_t task) { phase == 0 ? pack(task) : multiply(task); });
}

// Gradients of a layer's parameters: weights[i, j] = sum_b x[b, i] g[b, j] and bias[j] = sum_b g[b, j]. `packed` has
// room for the outputs, rounded up to 32, of kSamplesPacked samples, or of all, rounded up to 32.
template <typename M, typename G>
void parameter_gradients(ffi::ThreadPool& threads, const Matrix<Bf16>& x, const Matrix<G>& g, Bf16* packed,
                         float* weights, float* bias) {
  const int64_t n = x.columns, m = g.columns, num_panels = num_pieces(m, kColumns);
  const auto depth_at = [&](int64_t sample) { return std::min(kSamplesPacked, round_up(x.rows - sample, kDepthUnit)); };
  // A sum for each task that packs, so that none depends on who does it.
  const int64_t num_sums = num_pieces(x.rows, kGradientsOfTask), sums_size = num_panels * kColumns;
  std::vector<float> sums(num_sums * sums_size);
  const auto pack = [&](int64_t sample, int64_t task) {
    const int64_t row = task * kGradientsOfTask, depth = depth_at(sample);
    pack_panels(g, sample + row, std::min(kGradientsOfTask, depth - row), depth, packed + row * kColumns,
                sums.data() + (sample + row) / kGradientsOfTask * sums_size);
  };
  const int64_t rows_of = rows_of_task<M>(n, kRowsHeld, 2 * threads.num_threads());
  const auto multiply = [&](int64_t sample, int64_t task) {
    const int64_t begin = task * rows_of, rows = std::min(rows_of, n - begin), depth = depth_at(sample);
    float* to = weights + begin * m;
    multiply_rows<M>(
        packed, depth, rows, num_panels,
        [&](int64_t k, int64_t part, Bf16* a) {
          pack_columns(x, sample + k, begin, part, round_up(rows, M::kRows), a);
        },
        [&](int64_t i, int64_t panel) {
          prefetch_block(to + i * m, std::min(M::kRows, rows - i), panel * kColumns, m);
        },
        [&](int64_t i, int64_t panel, const float* block) {
          add_block(block, std::min(M::kRows, rows - i), sample == 0, panel * kColumns, m, to + i * m);
        });
  };
  if (x.rows == 0) std::fill_n(weights, n * m, 0.0f);
  std::vector<int64_t> phases;
  for (int64_t sample = 0; sample < x.rows; sample += kSamplesPacked) {
    phases.insert(phases.end(), {num_pieces(depth_at(sample), kGradientsOfTask), num_pieces(n, rows_of)});
  }
  parallel_phases(threads, phases, [&](int64_t phase, int64_t task) {
    const int64_t sample = phase / 2 * kSamplesPacked;
    phase % 2 == 0 ? pack(sample, task) : multiply(sample, task);
  });
  for (int64_t j = 0; j < m; ++j) {
    bias[j] = 0.0f;
    for (int64_t task = 0; task < num_sums; ++task) bias[j] += sums[task * sums_size + j];
  }
}

}  // namespace dlrm
