// How a row of float32 numbers is read from a store and written back: exactly, to the nearest, or by random bits.
// The counter hash and the formulas are those of rounding.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "elements.h"

namespace dlrm {

inline uint32_t mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

inline uint32_t fold(uint32_t key, uint32_t word) { return mix(key ^ (word * 0x9E3779B9u)); }

// Where a row's random bits come from: its key, and the table's column that its first column is.
struct RandomRow {
  uint32_t key, first_column;
};

// Each way has open(), which gives the row as float32, in place or in a buffer, and close(), which writes it back.
template <typename T>
struct Nearest {
  using Element = T;
  static constexpr bool kRandom = false, kSplit = false;
  static float* open(T* row, uint16_t*, float* buffer, int64_t width) {
    for (int64_t j = 0; j < width; j += kLanes) store(buffer + j, load(row + j));
    return buffer;
  }
  static void close(const float* values, T* row, uint16_t*, int64_t width, RandomRow) {
    for (int64_t j = 0; j < width; j += kLanes) store(row + j, load(values + j));
  }
};

template <>
struct Nearest<float> {
  using Element = float;
  static constexpr bool kRandom = false, kSplit = false;
  static float* open(float* row, uint16_t*, float*, int64_t) { return row; }
  static void close(const float*, float*, uint16_t*, int64_t, RandomRow) {}
};

inline bool is_finite(uint32_t word) { return (word & 0x7f800000) != 0x7f800000; }

template <typename T>
struct Stochastic : Nearest<T> {
  static constexpr bool kRandom = true;
};

template <>
struct Stochastic<Bf16> : Nearest<Bf16> {
  static constexpr bool kRandom = true;
  static void close(float* values, Bf16* row, uint16_t*, int64_t width, RandomRow random) {
    // 16 random bits added to the low half carry with the probability of rounding up.
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t bits = fold(random.key, random.first_column + static_cast<uint32_t>(j));
      const uint32_t word = word_of(values[j]);
      values[j] = float_of(is_finite(word) ? (word + (bits & 0xffff)) & 0xffff0000 : word);
    }
    Nearest<Bf16>::close(values, row, nullptr, width, random);
  }
};

template <>
struct Stochastic<F16> : Nearest<F16> {
  static constexpr bool kRandom = true;
  static void close(float* values, F16* row, uint16_t*, int64_t width, RandomRow random) {
    for (int64_t j = 0; j < width; ++j) {
      const uint32_t bits = fold(random.key, random.first_column + static_cast<uint32_t>(j));
      const uint32_t word = word_of(values[j]);
      const uint32_t magnitude = word & 0x7fffffff;
      // 13 bits fewer of fraction than float32: as many random bits carry with the probability of rounding up.
      const float normal = float_of((magnitude + (bits & 0x1fff)) & 0xffffe000);
      // Below 2**-14 numbers are subnormal and the spacing stays at 2**-24.
      // In this order the minimum with a NaN is a number, which an integer can hold.
      const float scaled = std::min(0x1p-14f, float_of(magnitude)) * 0x1p24f;
      const float below = static_cast<float>(static_cast<int32_t>(scaled));
      const float uniform = static_cast<float>(static_cast<int32_t>(bits >> 8)) * 0x1p-24f;
      const float subnormal = (uniform < scaled - below ? below + 1.0f : below) * 0x1p-24f;
      const float rounded = float_of(magnitude) < 0x1p-14f ? subnormal : std::min(normal, 65504.0f);
      const float signed_value = float_of(word_of(rounded) | (word & 0x80000000));
      values[j] = is_finite(word) ? signed_value : values[j];
    }
    Nearest<F16>::close(values, row, nullptr, width, random);
  }
};

// Split-BF16 (Kalamkar et al. 2020): the store has the high halves of float32 weights, another one the low halves.
struct Split {
  using Element = Bf16;
  static constexpr bool kRandom = false, kSplit = true;
  static float* open(const Bf16* row, const uint16_t* low, float* buffer, int64_t width) {
    for (int64_t j = 0; j < width; ++j) buffer[j] = float_of((static_cast<uint32_t>(row[j].bits) << 16) | low[j]);
    return buffer;
  }
  static void close(const float* values, Bf16* row, uint16_t* low, int64_t width, RandomRow) {
    for (int64_t j = 0; j < width; ++j) {
      row[j].bits = static_cast<uint16_t>(word_of(values[j]) >> 16);
      low[j] = static_cast<uint16_t>(word_of(values[j]));
    }
  }
};

}  // namespace dlrm
