// Gradients of a dense layer's parameters: weights[i, j] = sum_b x[b, i] g[b, j] and bias[j] = sum_b g[b, j].
//
// Letters: B samples, n inputs, m outputs; M a multiplier. Each sum runs in the same order for every number of threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "multipliers.h"
#include "packing.h"
#include "parallel.h"
#include "products.h"

#if defined(__x86_64__)

namespace dlrm {

// Rows of g that a task packs for all others.
constexpr int64_t kGradientsOfTask = 128;
// Rows of the result that a task adds up.
constexpr int64_t kRowsAdded = 32;

// bias[j] = sums[0, j] + sums[1, j] + ..., which are rows of `size` numbers.
inline void add_rows(const std::vector<float>& sums, int64_t size, int64_t m, float* bias) {
  std::copy_n(sums.data(), m, bias);
  for (size_t row = size; row < sums.size(); row += size) {
    for (int64_t j = 0; j < m; ++j) bias[j] += sums[row + j];
  }
}

// A task takes some columns of x, and all samples. `packed` has room for g: kParts, and both sizes, at least 1, rounded
// up to 32.
template <typename M, typename X, typename G>
void gradients_by_columns(ffi::ThreadPool& threads, const Matrix<X>& x, const Matrix<G>& g, Bf16* packed,
                          float* weights, float* bias) {
  const int64_t n = x.columns, m = g.columns, depth = depth_of(x.rows);
  // A sum for each task that packs, so that none depends on who does it.
  const int64_t num_packs = num_pieces(depth, kGradientsOfTask), sums_size = round_up(m, kColumns);
  std::vector<float> sums(num_packs * sums_size);
  const auto pack = [&](int64_t task) {
    const int64_t row = task * kGradientsOfTask;
    pack_panels<M>(g, row, std::min(kGradientsOfTask, depth - row), depth, row_of_panel<M>(packed, row, 0),
                   sums.data() + task * sums_size);
  };
  const auto output = output_of(nullptr, false, m, weights);
  const int64_t rows_of = rows_of_task<M>(n, threads.num_threads());
  const auto multiply = [&](int64_t task) {
    const int64_t begin = task * rows_of, rows = std::min(rows_of, n - begin);
    multiply_rows<M>(
        packed, depth, begin, rows,
        [&](int64_t i, int64_t count, int64_t k, int64_t part, Bf16* to) {
          return PackedColumns<M, X>{x, k, begin + i, part, count, to};
        },
        output);
  };
  parallel_phases(threads, {num_packs, num_pieces(n, rows_of)},
                  [&](int64_t phase, int64_t task) { phase == 0 ? pack(task) : multiply(task); });
  add_rows(sums, sums_size, m, bias);
}

// A task takes a chunk of the samples and, where threads are more than chunks, some columns of x. Nothing that is
// packed leaves its core's second-level cache, nor do the sums, if the weights are so small; m is at most that of a
// group of panels. `parts` has room for [most_chunks, n, m].
template <typename M, typename X, typename G>
void gradients_by_samples(ffi::ThreadPool& threads, const Matrix<X>& x, const Matrix<G>& g, int64_t most_chunks,
                          float* parts, float* weights, float* bias) {
  const int64_t n = x.columns, m = g.columns, num_panels = num_pieces(m, kColumns), sums_size = num_panels * kColumns;
  const int64_t stride = stride_of_sums(sums_size);
  const int64_t chunk = round_up(num_pieces(x.rows, most_chunks), M::kDepth), chunks = num_pieces(x.rows, chunk);
  const int64_t most_ranges = num_pieces(threads.num_threads(), chunks);
  const int64_t rows_of = std::max(M::kRows, round_up(num_pieces(n, most_ranges), M::kRows));
  // One without columns has biases.
  const int64_t ranges = std::max<int64_t>(1, num_pieces(n, rows_of));
  std::vector<float> sums(chunks * sums_size);
  const auto multiply = [&](int64_t task) {
    const int64_t begin = task / ranges * chunk, end = std::min(x.rows, begin + chunk);
    const int64_t first = task % ranges * rows_of, rows = std::min(rows_of, n - first);
    float* of_chunk = sums.data() + task / ranges * sums_size;
    float* to = parts + (task / ranges * n + first) * m;
    constexpr int64_t kRow = M::kParts * M::kDepth;
    Bf16* a = memory_of_thread<Bf16>(kRow * (kRowsHeld + sums_size));
    Bf16* b = a + kRow * kRowsHeld;
    float* block = memory_of_thread<float>(round_up(rows, M::kRows) * stride);
    [[maybe_unused]] typename M::Session session;
    const auto nothing = [] {};
    for (int64_t k = begin; k < end; k += M::kDepth) {
      const int64_t depth = std::min(M::kDepth, depth_of(end - k));
      const auto panel_at = [&](int64_t panel) { return b + panel % num_panels * depth * kColumns * M::kParts; };
      pack_panels<M>(g, k, depth, depth, b, first == 0 ? of_chunk : nullptr);
      for (int64_t group = 0; group < rows; group += kRowsHeld) {
        const int64_t group_rows = std::min(kRowsHeld, round_up(rows - group, M::kRows));
        PackedColumns<M, X>{x, k, first + group, depth, group_rows, a}.pack_all();
        for (int64_t i = 0; i < group_rows; i += M::kRows) {
          for (int64_t panel = 0; panel < num_panels; ++panel) {
            M::multiply(a + i * kRow, panel_at(panel), panel_at(panel + 1), depth,
                        block + (group + i) * stride + panel * kColumns, stride, k == begin, nothing);
          }
        }
      }
    }
    for (int64_t i = 0; i < rows; ++i) std::copy_n(block + i * stride, m, to + i * m);
  };
  const auto add = [&](int64_t task) {
    const int64_t first = task * kRowsAdded * m, end = std::min(n, (task + 1) * kRowsAdded) * m;
    std::copy(parts + first, parts + end, weights + first);
    for (int64_t c = 1; c < chunks; ++c) {
      for (int64_t i = first; i < end; ++i) weights[i] += parts[c * n * m + i];
    }
  };
  parallel_phases(threads, {chunks * ranges, num_pieces(n, kRowsAdded)},
                  [&](int64_t phase, int64_t task) { phase == 0 ? multiply(task) : add(task); });
  add_rows(sums, sums_size, m, bias);
}

}  // namespace dlrm

#endif
