// Weighted sums of rows in float32, one row after the other: the bags of a lookup and the runs of an update.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elements.h"

namespace dlrm {

// Rows seen as [num_rows, width].
template <typename T>
struct Rows {
  const T* data;
  int64_t num_rows;
  int64_t width;
};

// Columns that fit in registers as sums.
constexpr int64_t kMostColumns = 64;
// Rows that stay in the first-level cache while their blocks of columns are added.
constexpr int64_t kRowsOfBlock = 16;

// Bytes asked for ahead of use: enough to keep all of a core's outstanding loads busy, also where most rows are frequent
// ones that caches hold.
constexpr int64_t kBytesAhead = 8192;

inline int64_t rows_ahead(int64_t row_bytes) {
  return std::clamp<int64_t>(kBytesAhead / std::max<int64_t>(row_bytes, 64), 4, 32);
}

// What is asked for while a row is added: the first bytes of the row so many ids later.
struct Prefetch {
  int64_t ids, row_bytes;
};

template <typename T>
inline void prefetch_row(const Rows<T>& rows, const int32_t* ids, int64_t i, int64_t known, const Prefetch& ahead) {
  if (i + ahead.ids >= known) return;
  prefetch(rows.data, ids[i + ahead.ids] * rows.width * static_cast<int64_t>(sizeof(T)), ahead.row_bytes);
}

// sums[c] = (0 or sums[c]) + sum_i weights[i] * rows[ids[i], column + c], for V * 8 columns and i in [begin, end).
// Products are rounded before they are added: the reference is not allowed to fuse them either.
template <typename T, int V, bool kWeighted, bool kPrefetch>
inline void pool_columns(const Rows<T>& rows, const int32_t* ids, const float* weights, int64_t begin, int64_t end,
                         int64_t known, const Prefetch& ahead, int64_t column, bool fresh, float* sums) {
  const int64_t width = V * kLanes < kMostColumns ? V * kLanes : rows.width;
  Floats total[V];
  for (int v = 0; v < V; ++v) total[v] = fresh ? Floats{} : load(sums + v * kLanes);
  for (int64_t i = begin; i < end; ++i) {
    if (kPrefetch) prefetch_row(rows, ids, i, known, ahead);
    // As an unsigned number a negative row is beyond the end.
    if (static_cast<uint32_t>(ids[i]) >= rows.num_rows) continue;
    const T* row = rows.data + ids[i] * width + column;
    if (kWeighted) {
      for (int v = 0; v < V; ++v) {
        const Floats product = load(row + v * kLanes) * weights[i];
        total[v] = total[v] + product;
      }
    } else {
      for (int v = 0; v < V; ++v) total[v] = total[v] + load(row + v * kLanes);
    }
  }
  for (int v = 0; v < V; ++v) store(sums + v * kLanes, total[v]);
}

// As above for id i alone, from zero, and for all columns in one go.
template <typename T, bool kWeighted>
inline void pool_one(const Rows<T>& rows, const int32_t* ids, const float* weights, int64_t i, int64_t known,
                     const Prefetch& ahead, float* sums) {
  prefetch_row(rows, ids, i, known, ahead);
  const bool exists = static_cast<uint32_t>(ids[i]) < rows.num_rows;
  const T* row = rows.data + (exists ? ids[i] * rows.width : 0);
  for (int64_t column = 0; column < rows.width; column += kLanes) {
    Floats x{};
    if (exists) x = x + (kWeighted ? load(row + column) * weights[i] : load(row + column));
    store(sums + column, x);
  }
}

// As above, for all columns; ids up to `known` may be asked for ahead.
template <typename T, bool kWeighted>
__attribute__((noinline)) void pool(const Rows<T>& rows, const int32_t* ids, const float* weights, int64_t begin, int64_t end,
                 int64_t known, const Prefetch& ahead, float* sums) {
  switch (rows.width) {
    case 8:
      return pool_columns<T, 1, kWeighted, true>(rows, ids, weights, begin, end, known, ahead, 0, true, sums);
    case 16:
      return pool_columns<T, 2, kWeighted, true>(rows, ids, weights, begin, end, known, ahead, 0, true, sums);
    case 32:
      return pool_columns<T, 4, kWeighted, true>(rows, ids, weights, begin, end, known, ahead, 0, true, sums);
    case 64:
      return pool_columns<T, 8, kWeighted, true>(rows, ids, weights, begin, end, known, ahead, 0, true, sums);
  }
  if (end - begin == 1) return pool_one<T, kWeighted>(rows, ids, weights, begin, known, ahead, sums);
  int64_t first = begin;
  do {
    const int64_t last = std::min(end, first + kRowsOfBlock);
    pool_columns<T, 8, kWeighted, true>(rows, ids, weights, first, last, known, ahead, 0, first == begin, sums);
    for (int64_t column = kMostColumns; column < rows.width; column += kMostColumns) {
      pool_columns<T, 8, kWeighted, false>(rows, ids, weights, first, last, known, ahead, column, first == begin,
                                           sums + column);
    }
    first = last;
  } while (first < end);
}

}  // namespace dlrm
