// The dot products of all pairs of vectors of each sample, and their derivative; threads share out the samples.
//
// Letters: F vectors of dimension D of each of B samples; X the dtype that they are multiplied in; E that of the
// embeddings, X or float, which is rounded to X first.
#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "elements.h"
#include "parallel.h"

namespace dlrm {

constexpr int64_t kSamplesOfTask = 32;
constexpr int64_t kRowsOfTile = 4;

// to[i, c] = sum_k left[i, k] * right[k, c] for kRowsOfTile rows i and V * 8 columns c, the sum in the order of k.
template <int V>
inline void multiply_tile(const float* left, int64_t left_stride, const float* right, int64_t right_stride,
                          int64_t depth, float* to, int64_t to_stride) {
  Floats sums[kRowsOfTile][V] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Floats columns[V];
    for (int v = 0; v < V; ++v) columns[v] = load(right + k * right_stride + v * kLanes);
    for (int i = 0; i < kRowsOfTile; ++i) {
      const Floats factor = all_lanes(left[i * left_stride + k]);
      for (int v = 0; v < V; ++v) sums[i][v] = fused(factor, columns[v], sums[i][v]);
    }
  }
  for (int i = 0; i < kRowsOfTile; ++i) {
    for (int v = 0; v < V; ++v) store(to + i * to_stride + v * kLanes, sums[i][v]);
  }
}

// As above for any multiple of 8 columns, and a multiple of kRowsOfTile rows.
inline void multiply(const float* left, int64_t left_stride, const float* right, int64_t right_stride, int64_t rows,
                     int64_t columns, int64_t depth, float* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; i += kRowsOfTile) {
    const float* factors = left + i * left_stride;
    int64_t c = 0;
    for (; c + 2 * kLanes <= columns; c += 2 * kLanes) {
      multiply_tile<2>(factors, left_stride, right + c, right_stride, depth, to + i * to_stride + c, to_stride);
    }
    if (c < columns) {
      multiply_tile<1>(factors, left_stride, right + c, right_stride, depth, to + i * to_stride + c, to_stride);
    }
  }
}

// Arrays of one sample, padded with zeros, kept by a thread for its next tasks. `line` is what stands in out, as
// float32, with room for as many numbers as are copied at a time.
struct SampleBuffers {
  std::vector<float> vectors, other, products, line;

  static SampleBuffers& of_thread(int64_t vectors, int64_t other, int64_t products, int64_t width) {
    thread_local SampleBuffers buffers;
    buffers.vectors.assign(vectors, 0.0f);
    buffers.other.assign(other, 0.0f);
    buffers.products.assign(products, 0.0f);
    buffers.line.assign(width + kLanes, 0.0f);
    return buffers;
  }
};

// Copies numbers eight at a time, so that up to seven more are copied; they come next.
inline float* append(const float* from, int64_t count, float* to) {
  for (int64_t j = 0; j < count; j += kLanes) store(to + j, load(from + j));
  return to + count;
}

// The vectors of all samples: first x, [B, D], if there is any, then each of k features. These are [k, B, D], so that
// pooled bags and their gradients stay as the tables' kernels write and read them, or [B, k, D]. F = k + 1, or k
// without x.
template <typename X, typename E>
struct Vectors {
  X* x;  // null without x
  E* embeddings;
  int64_t B, F, D;
  bool by_sample;

  // Calls run(vector) with vector i of sample b.
  template <typename Run>
  void with(int64_t b, int64_t i, const Run& run) const {
    const int64_t feature = x == nullptr ? i : i - 1;
    const int64_t place = by_sample ? b * (F - (x == nullptr ? 0 : 1)) + feature : feature * B + b;
    feature < 0 ? run(x + b * D) : run(embeddings + place * D);
  }
  // Columns of x, which stand before the pairs.
  int64_t num_first() const { return x == nullptr ? 0 : D; }
};

// A number as it is in a dtype.
template <typename T, typename Given>
inline float in_dtype(Given given) {
  if constexpr (std::is_same_v<T, Given>) return to_float(given);
  T rounded;
  assign(rounded, to_float(given));
  return to_float(rounded);
}

inline int64_t num_pairs(int64_t F, bool with_self) { return F * (F + (with_self ? 1 : -1)) / 2; }

// out[b] = x[b], then the lower triangle of V[b] V[b]^T row by row, with its diagonal if `with_self`; and, unless it is
// null, `rounded` = the embeddings as they are multiplied, [B, k, D]: feature by feature its lines would share few sets of
// a cache, and be written half by half.
template <typename X, typename E>
void dot_interaction(ffi::ThreadPool& threads, const Vectors<const X, const E>& vectors, bool with_self, X* out,
                     X* rounded) {
  const int64_t F = vectors.F, D = vectors.D, first = vectors.num_first();
  const int64_t padded = round_up(F, kLanes), length = round_up(D, kLanes);
  const int64_t width = first + num_pairs(F, with_self);
  parallel_for(threads, (vectors.B + kSamplesOfTask - 1) / kSamplesOfTask, [&](int64_t task) {
    SampleBuffers& buffers = SampleBuffers::of_thread(padded * length, length * padded, kRowsOfTile * padded, width);
    float *rows = buffers.vectors.data(), *columns = buffers.other.data(), *products = buffers.products.data();
    const int64_t end = std::min(vectors.B, (task + 1) * kSamplesOfTask);
    for (int64_t b = task * kSamplesOfTask; b < end; ++b) {
      for (int64_t i = 0; i < F; ++i) {
        vectors.with(b, i, [&](const auto* vector) {
          for (int64_t d = 0; d < D; ++d) rows[i * length + d] = in_dtype<X>(vector[d]);
        });
      }
      const int64_t of_x = first > 0 ? 1 : 0;
      for (int64_t i = of_x; rounded != nullptr && i < F; ++i) {
        convert(rows + i * length, D, rounded + (b * (F - of_x) + i - of_x) * D);
      }
      for (int64_t i = 0; i < padded; i += kLanes) {
        for (int64_t d = 0; d < length; d += kLanes) {
          transpose(rows + i * length + d, length, columns + d * padded + i, padded);
        }
      }
      // x is the first vector.
      float* to = append(rows, first, buffers.line.data());
      for (int64_t i = 0; i < F; i += kRowsOfTile) {
        const int64_t needed = std::min(padded, round_up(i + kRowsOfTile, kLanes));
        multiply(rows + i * length, length, columns, padded, kRowsOfTile, needed, D, products, padded);
        for (int64_t row = i; row < std::min(F, i + kRowsOfTile); ++row) {
          to = append(products + (row - i) * padded, row + (with_self ? 1 : 0), to);
        }
      }
      convert(buffers.line.data(), width, out + b * width);
    }
  });
}

// V_grad[b] = S[b] V[b], where S is symmetric, has the pairs' cotangents in its triangles and, with `with_self`, twice
// those of the diagonal on it. x has its own cotangents besides.
template <typename X, typename E>
void dot_interaction_grad(ffi::ThreadPool& threads, const Vectors<const X, const X>& vectors, const X* cotangents,
                          bool with_self, const Vectors<X, E>& grads) {
  const int64_t F = vectors.F, D = vectors.D, first = vectors.num_first();
  const int64_t rows = round_up(F, kRowsOfTile), columns = round_up(D, kLanes);
  const int64_t width = first + num_pairs(F, with_self);
  parallel_for(threads, (vectors.B + kSamplesOfTask - 1) / kSamplesOfTask, [&](int64_t task) {
    SampleBuffers& buffers = SampleBuffers::of_thread(F * columns, rows * F, rows * columns, 0);
    float *held = buffers.vectors.data(), *symmetric = buffers.other.data(), *sums = buffers.products.data();
    const int64_t begin = task * kSamplesOfTask, end = std::min(vectors.B, begin + kSamplesOfTask);
    // A sample's vectors are far apart: each would be waited for.
    for (int64_t i = 0; i < F; ++i) {
      vectors.with(begin, i, [&](const X* vector) { prefetch(vector, 0, (end - begin) * D * sizeof(X)); });
    }
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < F; ++i) {
        vectors.with(b, i, [&](const X* vector) {
          for (int64_t d = 0; d < D; ++d) held[i * columns + d] = to_float(vector[d]);
        });
      }
      const X* own = cotangents + b * width;
      const X* given = own + first;
      for (int64_t i = 0; i < F; ++i) {
        for (int64_t j = 0; j < i; ++j) symmetric[j * F + i] = symmetric[i * F + j] = to_float(*given++);
        if (with_self) symmetric[i * F + i] = 2.0f * to_float(*given++);
      }
      multiply(symmetric, F, held, columns, rows, columns, F, sums, columns);
      // x is the first vector.
      for (int64_t d = 0; d < first; ++d) sums[d] += to_float(own[d]);
      for (int64_t i = 0; i < F; ++i) {
        grads.with(b, i, [&](auto* to) {
          for (int64_t d = 0; d < D; ++d) assign(to[d], in_dtype<X>(sums[i * columns + d]));
        });
      }
    }
  });
}

}  // namespace dlrm
