// 32 elements at a time with AVX-512: every x86-64 processor that multiplies bfloat16 has it.
//
// Numbers are rounded to the nearest, ties to even; subnormal ones of bfloat16 count as zero, as in multipliers.
#pragma once

#if defined(__x86_64__)

#include <immintrin.h>

#include <cstdint>

#include "elements.h"

#define DLRM_AVX512 __attribute__((target("avx512f,avx512bw,avx512bf16")))

namespace dlrm {

constexpr int64_t kLanes512 = 32;

struct Floats512 {
  __m512 left, right;
};

// The first of 32 lanes, as many as are left of a row.
inline __mmask32 first_lanes(int64_t left) { return left >= kLanes512 ? ~0u : left <= 0 ? 0u : (1u << left) - 1; }

// What other lanes would be is not read: they are zero.
DLRM_AVX512 inline Floats512 load_lanes(const float* from, __mmask32 lanes) {
  return {_mm512_maskz_loadu_ps(lanes, from), _mm512_maskz_loadu_ps(lanes >> 16, from + 16)};
}
DLRM_AVX512 inline __m512i load_lanes(const Bf16* from, __mmask32 lanes) {
  return _mm512_maskz_loadu_epi16(lanes, from);
}

DLRM_AVX512 inline __m512i rounded(Floats512 x) { return (__m512i)_mm512_cvtne2ps_pbh(x.right, x.left); }
DLRM_AVX512 inline __m512i rounded(__m512i x) { return x; }

DLRM_AVX512 inline void store_lanes(float* to, __mmask32 lanes, Floats512 x) {
  _mm512_mask_storeu_ps(to, lanes, x.left);
  _mm512_mask_storeu_ps(to + 16, lanes >> 16, x.right);
}
DLRM_AVX512 inline void store_lanes(Bf16* to, __mmask32 lanes, Floats512 x) {
  _mm512_mask_storeu_epi16(to, lanes, rounded(x));
}

DLRM_AVX512 inline Floats512 floats_of(Floats512 x) { return x; }
DLRM_AVX512 inline Floats512 floats_of(__m512i x) {
  const __m512i words[2] = {_mm512_cvtepu16_epi32(_mm512_castsi512_si256(x)),
                            _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(x, 1))};
  // bfloat16 is the high half of a float32.
  return {_mm512_castsi512_ps(_mm512_slli_epi32(words[0], 16)), _mm512_castsi512_ps(_mm512_slli_epi32(words[1], 16))};
}

DLRM_AVX512 inline Floats512 operator+(Floats512 a, Floats512 b) {
  return {_mm512_add_ps(a.left, b.left), _mm512_add_ps(a.right, b.right)};
}
DLRM_AVX512 inline Floats512 operator-(Floats512 a, Floats512 b) {
  return {_mm512_sub_ps(a.left, b.left), _mm512_sub_ps(a.right, b.right)};
}
DLRM_AVX512 inline Floats512 operator*(Floats512 a, Floats512 b) {
  return {_mm512_mul_ps(a.left, b.left), _mm512_mul_ps(a.right, b.right)};
}
// A NaN stays.
DLRM_AVX512 inline Floats512 rectified(Floats512 x) {
  // Of zero and a NaN, the second.
  return {_mm512_max_ps(_mm512_setzero_ps(), x.left), _mm512_max_ps(_mm512_setzero_ps(), x.right)};
}

// Lanes whose elements are positive, and no NaN: as integers, from the least positive one to infinity.
DLRM_AVX512 inline __mmask32 positive_lanes(__m512i x) {
  return _mm512_cmplt_epu16_mask(_mm512_sub_epi16(x, _mm512_set1_epi16(1)), _mm512_set1_epi16(0x7f80));
}

DLRM_AVX512 inline __mmask32 positive_lanes(Floats512 x) {
  const __m512 zero = _mm512_setzero_ps();
  const __mmask32 left = _mm512_cmp_ps_mask(x.left, zero, _CMP_GT_OQ);
  return left | static_cast<__mmask32>(_mm512_cmp_ps_mask(x.right, zero, _CMP_GT_OQ)) << 16;
}

// Elements as sums of bfloat16.
template <int64_t kParts>
struct Parts512 {
  __m512i of[kParts];
};

// One part is rounded. Three are exact, each what the ones before leave, but where a part is subnormal, and of numbers
// that are not finite as bfloat16: the others become NaN.
template <int64_t kParts, typename Elements>
DLRM_AVX512 inline Parts512<kParts> parts_of(Elements x) {
  if constexpr (kParts == 1) {
    return {{rounded(x)}};
  } else {
    Parts512<kParts> parts;
    for (int64_t p = 0; p < kParts; ++p) {
      parts.of[p] = rounded(x);
      x = x - floats_of(parts.of[p]);
    }
    return parts;
  }
}

// Which elements of two vectors of kCount stand where a half of each is put in turns.
template <typename Number, int kCount>
struct InTurns {
  alignas(64) Number of_first[kCount], of_second[kCount];
  constexpr InTurns() : of_first(), of_second() {
    for (int i = 0; i < kCount; ++i) {
      of_first[i] = static_cast<Number>(i / 2 + i % 2 * kCount);
      of_second[i] = static_cast<Number>(i / 2 + kCount / 2 + i % 2 * kCount);
    }
  }
};

// Pairs (a_j, b_j), of the first 16 elements and of the others.
DLRM_AVX512 inline void interleave(__m512i a, __m512i b, __m512i pairs[2]) {
  static constexpr InTurns<uint16_t, 32> kNumbers;
  pairs[0] = _mm512_permutex2var_epi16(a, _mm512_load_si512(kNumbers.of_first), b);
  pairs[1] = _mm512_permutex2var_epi16(a, _mm512_load_si512(kNumbers.of_second), b);
}

// Transposes 16 x 16 words. Putting row i in turns with row i + 8 moves one bit of a word's row number to its column
// number; the fourth time all four are there.
DLRM_AVX512 inline void transpose_words(__m512i rows[16]) {
  static constexpr InTurns<uint32_t, 16> kNumbers;
  const __m512i of_first = _mm512_load_si512(kNumbers.of_first), of_second = _mm512_load_si512(kNumbers.of_second);
  for (int round = 0; round < 4; ++round) {
    __m512i mixed[16];
    for (int i = 0; i < 8; ++i) {
      mixed[2 * i] = _mm512_permutex2var_epi32(rows[i], of_first, rows[i + 8]);
      mixed[2 * i + 1] = _mm512_permutex2var_epi32(rows[i], of_second, rows[i + 8]);
    }
    for (int i = 0; i < 16; ++i) rows[i] = mixed[i];
  }
}

}  // namespace dlrm

#endif
