// Operands of matrix products, rounded to bfloat16 or taken apart, and packed as a multiplier M reads them
// (multipliers.h), with zeros to whole blocks.
#pragma once

#include "multipliers.h"

#if defined(__x86_64__)

#include <algorithm>
#include <cstdint>

#include "avx512.h"

namespace dlrm {

// [rows, columns], row by row. Where `mask` is given, an array of the same shape, elements count as zero that are not
// positive there: the gradient of a ReLU, of whose output it is.
template <typename T>
struct Matrix {
  const T* data;
  const T* mask;
  int64_t rows, columns;
};

// 32 elements of a row, with zeros beyond the end of the row or of the matrix.
template <typename T>
DLRM_AVX512 inline auto load_masked(const Matrix<T>& from, int64_t row, int64_t column) {
  const int64_t offset = row * from.columns + column;
  __mmask32 lanes = row < from.rows ? first_lanes(from.columns - column) : 0;
  if (from.mask != nullptr) lanes &= positive_lanes(load_lanes(from.mask + offset, lanes));
  return load_lanes(from.data + offset, lanes);
}

// The same 32 elements' parts.
template <typename M, typename T>
DLRM_AVX512 inline Parts512<M::kParts> load_parts(const Matrix<T>& from, int64_t row, int64_t column) {
  return parts_of<M::kParts>(load_masked(from, row, column));
}

// Asks for the memory of a block of rows and columns, before it is packed: lines of many rows are far apart, and while
// few of them are packed at a time, as few would be waited for.
template <typename T>
void ask_for(const Matrix<T>& from, int64_t row, int64_t column, int64_t rows, int64_t columns) {
  const int64_t bytes = std::min(columns, from.columns - column) * sizeof(T);
  for (int64_t i = row; i < std::min(row + rows, from.rows); ++i) {
    prefetch(from.data + i * from.columns + column, 0, bytes);
    if (from.mask != nullptr) prefetch(from.mask + i * from.columns + column, 0, bytes);
  }
}

// Some rows of a, from[row + i, column + k], and a multiple of 32 columns. In steps they are M::kRows rows.
template <typename M, typename T>
struct PackedRows {
  // Packed in steps while other rows multiply: in three parts, that waits for arithmetic alone, and not for memory.
  static constexpr bool kInSteps = M::kParts > 1;

  const Matrix<T>& from;
  int64_t row, column, rows, columns;
  Bf16* to;

  int64_t num_steps() const { return kInSteps ? M::kRows * (columns / kLanes512) : 0; }

  void ask(int64_t step) const {
    ask_for(from, row + step % M::kRows, column + step / M::kRows * kLanes512, 1, kLanes512);
  }

  DLRM_AVX512 void pack(int64_t step) const {
    pack_lanes(step % M::kRows, step / M::kRows * kLanes512);
  }

  DLRM_AVX512 void pack_all() const {
    ask_for(from, row, column, rows, columns);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t k = 0; k < columns; k += kLanes512) pack_lanes(i, k);
    }
  }

 private:
  DLRM_AVX512 void pack_lanes(int64_t i, int64_t k) const {
    const auto parts = load_parts<M>(from, row + i, column + k);
    for (int64_t p = 0; p < M::kParts; ++p) {
      _mm512_storeu_si512(to + (i * M::kParts + p) * M::kDepth + k, parts.of[p]);
    }
  }
};

// Rows of a that are columns of a matrix, from[row + k, column + i], for a multiple of 32 rows and some columns.
template <typename M, typename T>
struct PackedColumns {
  static constexpr bool kInSteps = false;
  const Matrix<T>& from;
  int64_t row, column, rows, columns;
  Bf16* to;

  // None.
  int64_t num_steps() const { return 0; }
  void ask(int64_t /*step*/) const {}
  void pack(int64_t /*step*/) const {}

  DLRM_AVX512 void pack_all() const {
    ask_for(from, row, column, rows, columns);
    for (int64_t i = 0; i < columns; i += kLanes512) {
      for (int64_t k = 0; k < rows; k += kLanes512) {
        // Of each part, columns of pairs, of the first 16 columns and of the others.
        __m512i pairs[M::kParts][2][16];
        for (int r = 0; r < 16; ++r) {
          const auto first = load_parts<M>(from, row + k + 2 * r, column + i);
          const auto second = load_parts<M>(from, row + k + 2 * r + 1, column + i);
          for (int64_t p = 0; p < M::kParts; ++p) {
            __m512i both[2];
            interleave(first.of[p], second.of[p], both);
            pairs[p][0][r] = both[0];
            pairs[p][1][r] = both[1];
          }
        }
        for (int64_t p = 0; p < M::kParts; ++p) {
          for (int64_t half = 0; half < 2; ++half) {
            transpose_words(pairs[p][half]);
            for (int64_t c = 0; c < std::min<int64_t>(16, columns - i - 16 * half); ++c) {
              _mm512_storeu_si512(to + ((i + 16 * half + c) * M::kParts + p) * M::kDepth + k, pairs[p][half][c]);
            }
          }
        }
      }
    }
  }
};

// Where row k of a panel's part begins.
template <typename M>
inline Bf16* row_of_panel(Bf16* panel, int64_t k, int64_t part) {
  return panel + (k / kDepthUnit * M::kParts + part) * kUnit + k % kDepthUnit * kColumns;
}

// Some rows of b, an even number from a multiple of kDepthUnit on, of the panels of a matrix, which are `depth` rows
// long: from[row + k, j], of which panel j / kColumns has row k there. To sums, unless null,
// sums[j] += sum_k from[row + k, j] before rounding; there is room for whole panels of them.
template <typename M, typename T>
DLRM_AVX512 void pack_panels(const Matrix<T>& from, int64_t row, int64_t rows, int64_t depth, Bf16* to, float* sums) {
  // Lines of one panel are written one after the other; panels are far apart.
  constexpr int64_t kBlock = 16;
  for (int64_t block = 0; block < rows; block += kBlock) {
    for (int64_t column = 0; column < from.columns; column += kColumns) {
      Bf16* panel = to + column * depth * M::kParts;
      Floats512 total{};
      for (int64_t k = block; k < std::min(rows, block + kBlock); k += 2) {
        const auto first = load_masked(from, row + k, column), second = load_masked(from, row + k + 1, column);
        const auto parts = parts_of<M::kParts>(first), next_parts = parts_of<M::kParts>(second);
        for (int64_t p = 0; p < M::kParts; ++p) {
          __m512i pairs[2];
          interleave(parts.of[p], next_parts.of[p], pairs);
          Bf16* to_row = row_of_panel<M>(panel, k, p);
          _mm512_storeu_si512(to_row, pairs[0]);
          _mm512_storeu_si512(to_row + 32, pairs[1]);
        }
        if (sums != nullptr) total = total + floats_of(first) + floats_of(second);
      }
      if (sums != nullptr) store_lanes(sums + column, ~0u, load_lanes(sums + column, ~0u) + total);
    }
  }
}

// A panel of a matrix's transpose, from[row + j, k], for a multiple of 32 columns.
template <typename M>
DLRM_AVX512 void pack_transposed_panel(const Matrix<float>& from, int64_t row, int64_t depth, Bf16* to) {
  for (int64_t k = 0; k < depth; k += kLanes512) {
    for (int64_t j = 0; j < kColumns; j += 16) {
      __m512i pairs[M::kParts][16];
      for (int64_t r = 0; r < 16; ++r) {
        const auto parts = load_parts<M>(from, row + j + r, k);
        for (int64_t p = 0; p < M::kParts; ++p) pairs[p][r] = parts.of[p];
      }
      for (int64_t p = 0; p < M::kParts; ++p) {
        transpose_words(pairs[p]);
        for (int64_t r = 0; r < 16; ++r) {
          _mm512_storeu_si512(row_of_panel<M>(to, k + 2 * r, p) + 2 * j, pairs[p][r]);
        }
      }
    }
  }
}

}  // namespace dlrm

#endif
