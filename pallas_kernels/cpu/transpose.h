// Tiles of 8 x 8 elements, transposed in registers.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

namespace dlrm {

constexpr int64_t kTile = 8;

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

}  // namespace dlrm
