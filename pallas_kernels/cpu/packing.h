// Operands of matrix products, rounded to bfloat16 and packed as multipliers read them (multipliers.h), with zeros to
// whole blocks.
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
  const Bf16* mask;
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

// Rows of a: to[i * kDepth + k] = from[row + i, column + k], for some rows and a multiple of 32 columns.
template <typename T>
DLRM_AVX512 void pack_rows(const Matrix<T>& from, int64_t row, int64_t column, int64_t rows, int64_t columns,
                           Bf16* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t k = 0; k < columns; k += kLanes512) {
      _mm512_storeu_si512(to + i * kDepth + k, rounded(load_masked(from, row + i, column + k)));
    }
  }
}

// Rows of a that are columns of a matrix: to[i * kDepth + k] = from[row + k, column + i], for a multiple of 32 rows and
// some columns.
DLRM_AVX512 inline void pack_columns(const Matrix<Bf16>& from, int64_t row, int64_t column, int64_t rows,
                                     int64_t columns, Bf16* to) {
  for (int64_t i = 0; i < columns; i += kLanes512) {
    for (int64_t k = 0; k < rows; k += kLanes512) {
      // Columns of pairs, of the first 16 columns and of the others.
      __m512i pairs[2][16];
      for (int r = 0; r < 16; ++r) {
        __m512i both[2];
        interleave(load_masked(from, row + k + 2 * r, column + i), load_masked(from, row + k + 2 * r + 1, column + i),
                   both);
        pairs[0][r] = both[0];
        pairs[1][r] = both[1];
      }
      for (int64_t half = 0; half < 2; ++half) {
        transpose_words(pairs[half]);
        for (int64_t c = 0; c < std::min<int64_t>(16, columns - i - 16 * half); ++c) {
          _mm512_storeu_si512(to + (i + 16 * half + c) * kDepth + k, pairs[half][c]);
        }
      }
    }
  }
}

// Some rows of b, an even number, of the panels of a matrix, which are `depth` rows long: panel j / kColumns has
// to[k / 2, j, k % 2] = from[row + k, j]. To sums, unless null, sums[j] += sum_k from[row + k, j] before rounding; there
// is room for whole panels of them.
template <typename T>
DLRM_AVX512 void pack_panels(const Matrix<T>& from, int64_t row, int64_t rows, int64_t depth, Bf16* to, float* sums) {
  // Lines of one panel are written one after the other; panels are far apart.
  constexpr int64_t kBlock = 16;
  for (int64_t block = 0; block < rows; block += kBlock) {
    for (int64_t column = 0; column < from.columns; column += kColumns) {
      Bf16* panel = to + column * depth;
      Floats512 total{};
      for (int64_t k = block; k < std::min(rows, block + kBlock); k += 2) {
        const auto first = load_masked(from, row + k, column), second = load_masked(from, row + k + 1, column);
        __m512i pairs[2];
        interleave(rounded(first), rounded(second), pairs);
        _mm512_storeu_si512(panel + k * kColumns, pairs[0]);
        _mm512_storeu_si512(panel + k * kColumns + 32, pairs[1]);
        if (sums != nullptr) total = total + floats_of(first) + floats_of(second);
      }
      if (sums != nullptr) store_lanes(sums + column, ~0u, load_lanes(sums + column, ~0u) + total);
    }
  }
}

// As above, of a matrix's transpose: to[k / 2, j, k % 2] = from[row + j, k] for a multiple of 32 columns.
DLRM_AVX512 inline void pack_transposed_panel(const Matrix<float>& from, int64_t row, int64_t depth, Bf16* to) {
  for (int64_t k = 0; k < depth; k += kLanes512) {
    for (int64_t j = 0; j < kColumns; j += 16) {
      __m512i pairs[16];
      for (int64_t r = 0; r < 16; ++r) pairs[r] = rounded(load_masked(from, row + j + r, k));
      transpose_words(pairs);
      for (int64_t r = 0; r < 16; ++r) _mm512_storeu_si512(to + (k / 2 + r) * 2 * kColumns + 2 * j, pairs[r]);
    }
  }
}

}  // namespace dlrm

#endif
