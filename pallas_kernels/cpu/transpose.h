// Matrices written out transposed, in tiles of 8 x 8 that registers hold; threads share out the rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "elements.h"
#include "parallel.h"

namespace dlrm {

constexpr int64_t kTile = 8;
// A task's rows end a cache line of each column that it writes, in both sizes of elements.
constexpr int64_t kRowsOfTranspose = 64;

// Four elements of each of two vectors of 8, from element `First` on, in turns.
template <int First, typename Vector>
inline Vector in_turns(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, First, First + 8, First + 1, First + 9, First + 2, First + 10, First + 3,
                                 First + 11);
#else
  return __builtin_shuffle(a, b, Vector{First, First + 8, First + 1, First + 9, First + 2, First + 10, First + 3,
                                        First + 11});
#endif
}

// to[c * to_stride + r] = from[r * from_stride + c] for 8 rows and 8 columns. Putting row i in turns with row i + 4
// moves one bit of an element's row number to its column number; the third time all three are there.
template <typename Vector, typename T>
inline void transpose_tile(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  Vector rows[kTile], mixed[kTile];
  for (int i = 0; i < kTile; ++i) std::memcpy(&rows[i], from + i * from_stride, sizeof rows[i]);
  for (int round = 0; round < 3; ++round) {
    for (int i = 0; i < kTile / 2; ++i) {
      mixed[2 * i] = in_turns<0>(rows[i], rows[i + kTile / 2]);
      mixed[2 * i + 1] = in_turns<4>(rows[i], rows[i + kTile / 2]);
    }
    std::memcpy(rows, mixed, sizeof rows);
  }
  for (int i = 0; i < kTile; ++i) std::memcpy(to + i * to_stride, &rows[i], sizeof rows[i]);
}

// to[k, c, r] = from[k, r, c] for each of some matrices.
template <typename Vector, typename T>
void transpose(ffi::ThreadPool& threads, const T* from, int64_t num_matrices, int64_t num_rows, int64_t num_columns,
               T* to) {
  const int64_t tasks_of_matrix = (num_rows + kRowsOfTranspose - 1) / kRowsOfTranspose;
  parallel_for(threads, num_matrices * tasks_of_matrix, [&](int64_t task) {
    const int64_t offset = task / tasks_of_matrix * num_rows * num_columns;
    const T* matrix = from + offset;
    T* transposed = to + offset;
    const int64_t begin = task % tasks_of_matrix * kRowsOfTranspose;
    const int64_t end = std::min(num_rows, begin + kRowsOfTranspose);
    for (int64_t column = 0; column < num_columns; column += kTile) {
      for (int64_t row = begin; row < end; row += kTile) {
        const int64_t rows = std::min(kTile, end - row), columns = std::min(kTile, num_columns - column);
        const T* corner = matrix + row * num_columns + column;
        T* to_corner = transposed + column * num_rows + row;
        if (rows == kTile && columns == kTile) {
          transpose_tile<Vector>(corner, num_columns, to_corner, num_rows);
          continue;
        }
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < columns; ++c) to_corner[c * num_rows + r] = corner[r * num_columns + c];
        }
      }
    }
  });
}

}  // namespace dlrm
