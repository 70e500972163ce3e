// Operands of matrix products, rounded to bfloat16 and packed as multipliers read them (multipliers.h), with zeros to
// whole blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "elements.h"
#include "multipliers.h"
#include "transpose.h"

namespace dlrm {

// [rows, columns], row by row. Where `mask` is given, an array of the same shape, elements count as zero that are not
// positive there: the gradient of a ReLU, of whose output it is.
template <typename T>
struct Matrix {
  const T* data;
  const T* mask;
  int64_t rows, columns;
};

// Eight elements.
template <typename T>
using Eight = std::conditional_t<std::is_same_v<T, float>, Floats, Halves>;

inline Floats where_positive(Floats y, Floats x) { return y > 0.0f ? x : Floats{}; }
// Of bfloat16 as integers: from the least positive one to infinity.
inline Halves where_positive(Halves y, Halves x) { return y - 1 < 0x7f80 ? x : Halves{}; }

// Eight elements of a row, with zeros beyond the end of the row or of the matrix.
template <typename T>
inline Eight<T> load_masked(const Matrix<T>& from, int64_t row, int64_t column) {
  Eight<T> x{}, y{};
  const int64_t left = row < from.rows ? std::min<int64_t>(from.columns - column, kLanes) : 0;
  if (left <= 0) return x;
  const int64_t offset = row * from.columns + column;
  const size_t num_bytes = left * sizeof(T);
  if (left == kLanes) {
    std::memcpy(&x, from.data + offset, sizeof x);
    if (from.mask == nullptr) return x;
    std::memcpy(&y, from.mask + offset, sizeof y);
  } else {
    std::memcpy(&x, from.data + offset, num_bytes);
    if (from.mask == nullptr) return x;
    std::memcpy(&y, from.mask + offset, num_bytes);
  }
  return where_positive(y, x);
}

inline Floats floats_of(Floats x) { return x; }
inline Floats floats_of(Halves x) { return load(reinterpret_cast<const Bf16*>(&x)); }

inline Halves rounded(Halves x) { return x; }
inline Halves rounded(Floats x) { return __builtin_convertvector(nearest_bf16(x) >> 16, Halves); }

// Rows of a: to[i * kDepth + k] = from[row + i, column + k], for some rows and a multiple of 8 columns.
template <typename T>
void pack_rows(const Matrix<T>& from, int64_t row, int64_t column, int64_t rows, int64_t columns, Bf16* to) {
  const int64_t given = std::min(columns, from.columns - column);
  for (int64_t i = 0; i < rows; ++i) {
    Bf16* packed = to + i * kDepth;
    if constexpr (std::is_same_v<T, Bf16>) {
      if (from.mask == nullptr && row + i < from.rows) {
        std::memcpy(packed, from.data + (row + i) * from.columns + column, given * sizeof(T));
        std::fill(packed + given, packed + columns, T{});
        continue;
      }
    }
    for (int64_t k = 0; k < columns; k += kLanes) {
      const Halves x = rounded(load_masked(from, row + i, column + k));
      std::memcpy(packed + k, &x, sizeof x);
    }
  }
}

// Rows of a that are columns of a matrix: to[i * kDepth + k] = from[row + k, column + i] for multiples of 8 of both.
inline void pack_columns(const Matrix<Bf16>& from, int64_t row, int64_t column, int64_t rows, int64_t columns,
                         Bf16* to) {
  // Rows of `to` are so far apart that a cache holds few of their lines: those of a line of columns are filled first.
  constexpr int64_t kStrip = 32;
  for (int64_t strip = 0; strip < columns; strip += kStrip) {
    for (int64_t k = 0; k < rows; k += kTile) {
      for (int64_t i = strip; i < std::min(columns, strip + kStrip); i += kTile) {
        Bf16* corner = to + i * kDepth + k;
        if (row + k + kTile <= from.rows && column + i + kTile <= from.columns) {
          const Bf16* given = from.data + (row + k) * from.columns + column + i;
          transpose_tile<Halves>(given, from.columns, corner, kDepth);
          continue;
        }
        Halves tile[kTile];
        for (int64_t r = 0; r < kTile; ++r) tile[r] = load_masked(from, row + k + r, column + i);
        transpose_tile<Halves>(reinterpret_cast<const Bf16*>(tile), kTile, corner, kDepth);
      }
    }
  }
}

// Some rows of b, an even number, of the panels of a matrix, which are `depth` rows long: panel j / kColumns has
// to[k / 2, j, k % 2] = from[row + k, j]. To sums, unless null, sums[j] += sum_k from[row + k, j] before rounding; there
// is room for whole panels of them.
template <typename T>
void pack_panels(const Matrix<T>& from, int64_t row, int64_t rows, int64_t depth, Bf16* to, float* sums) {
  // Lines of one panel are written one after the other; panels are far apart.
  constexpr int64_t kBlock = 16;
  for (int64_t block = 0; block < rows; block += kBlock) {
    for (int64_t column = 0; column < round_up(from.columns, kColumns); column += kLanes) {
      Bf16* panel = to + (column / kColumns * depth) * kColumns + column % kColumns * 2;
      Floats total{};
      for (int64_t k = block; k < std::min(rows, block + kBlock); k += 2) {
        const Eight<T> first = load_masked(from, row + k, column), second = load_masked(from, row + k + 1, column);
        const Halves pairs[2] = {in_turns<0>(rounded(first), rounded(second)),
                                 in_turns<4>(rounded(first), rounded(second))};
        std::memcpy(panel + k * kColumns, pairs, sizeof pairs);
        total = total + floats_of(first) + floats_of(second);
      }
      if (sums != nullptr) store(sums + column, load(sums + column) + total);
    }
  }
}

// As above, of a matrix's transpose: to[k / 2, j, k % 2] = from[row + j, k] for a multiple of 16 columns.
inline void pack_transposed_panel(const Matrix<float>& from, int64_t row, int64_t depth, Bf16* to) {
  // Pairs are turned as words.
  constexpr int64_t kPairs = 2 * kTile;
  for (int64_t k = 0; k < depth; k += kPairs) {
    for (int64_t j = 0; j < kColumns; j += kTile) {
      Halves tile[kTile][2];
      for (int64_t r = 0; r < kTile; ++r) {
        tile[r][0] = rounded(load_masked(from, row + j + r, k));
        tile[r][1] = rounded(load_masked(from, row + j + r, k + kLanes));
      }
      Words turned[kTile];
      transpose_tile<Words>(reinterpret_cast<const uint32_t*>(tile), kTile, reinterpret_cast<uint32_t*>(turned), kTile);
      for (int64_t r = 0; r < kTile; ++r) {
        std::memcpy(to + (k / 2 + r) * 2 * kColumns + 2 * j, &turned[r], sizeof turned[r]);
      }
    }
  }
}

}  // namespace dlrm
