// The Euclidean norm of all numbers of some arrays; threads share out pieces of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elements.h"
#include "parallel.h"

namespace dlrm {

constexpr int64_t kNumbersOfPiece = 1 << 15;

// Sums of squares of a piece's numbers in turns, so that an addition need not wait for the one before.
template <typename T>
float square_sum(const T* from, int64_t count) {
  constexpr int kTurns = 4;
  Floats sums[kTurns] = {};
  int64_t i = 0;
  for (; i + kTurns * kLanes <= count; i += kTurns * kLanes) {
    for (int turn = 0; turn < kTurns; ++turn) {
      const Floats x = load(from + i + turn * kLanes);
      sums[turn] = fused(x, x, sums[turn]);
    }
  }
  const Floats lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (; i < count; ++i) sum += to_float(from[i]) * to_float(from[i]);
  return sum;
}

// Numbers of an array, in float32 or bfloat16.
struct Numbers {
  const void* data;
  int64_t count;
  bool is_bf16;
};

inline float norm(ffi::ThreadPool& threads, const std::vector<Numbers>& arrays) {
  struct Piece {
    const Numbers* array;
    int64_t begin;
  };
  std::vector<Piece> pieces;
  for (const Numbers& array : arrays) {
    for (int64_t begin = 0; begin < array.count; begin += kNumbersOfPiece) pieces.push_back({&array, begin});
  }
  // Added up in one order by whoever has done them.
  std::vector<float> sums(pieces.size());
  parallel_for(threads, pieces.size(), [&](int64_t piece) {
    const auto [array, begin] = pieces[piece];
    const int64_t count = std::min(kNumbersOfPiece, array->count - begin);
    sums[piece] = array->is_bf16 ? square_sum(static_cast<const Bf16*>(array->data) + begin, count)
                                 : square_sum(static_cast<const float*>(array->data) + begin, count);
  });
  float total = 0.0f;
  for (const float sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace dlrm
