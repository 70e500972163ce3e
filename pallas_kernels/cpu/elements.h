// Elements of a store, and eight of them at a time as float32.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace dlrm {

struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

constexpr int kLanes = 8;
typedef float Floats __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(32)));
typedef uint16_t Halves __attribute__((vector_size(16)));

inline float float_of(uint32_t word) {
  float x;
  std::memcpy(&x, &word, 4);
  return x;
}

inline uint32_t word_of(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  return word;
}

inline Floats load(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

inline Floats load(const Bf16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  // bfloat16 is the high half of a float32.
  return reinterpret_cast<Floats>(__builtin_convertvector(halves, Words) << 16);
}

inline Floats load(const F16* from) {
#if defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#elif defined(__aarch64__)
  const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(from)));
  const float32x4_t parts[2] = {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  Floats x;
  std::memcpy(&x, parts, sizeof x);
  return x;
#else
#error "float16 needs F16C or aarch64"
#endif
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to the nearest, ties to even; a NaN becomes the quiet NaN of its sign, as in XLA.
inline Bf16 nearest_bf16(float x) {
  const uint32_t word = word_of(x);
  const uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  const uint32_t nan = ((word >> 16) & 0x8000) | 0x7fc0;
  return Bf16{static_cast<uint16_t>((word & 0x7fffffff) > 0x7f800000 ? nan : rounded)};
}

// As above, for the high halves of words; their low halves are anything.
inline Words nearest_bf16(Floats x) {
  const Words words = reinterpret_cast<Words>(x);
  const Words rounded = words + 0x7fff + ((words >> 16) & 1);
  const Words nan = (words & 0x80000000) | 0x7fc00000;
  return (words & 0x7fffffff) > 0x7f800000 ? nan : rounded;
}

inline void store(Bf16* to, Floats x) {
  const Halves halves = __builtin_convertvector(nearest_bf16(x) >> 16, Halves);
  std::memcpy(to, &halves, sizeof halves);
}

inline void store(F16* to, Floats x) {
#if defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  float32x4_t parts[2];
  std::memcpy(parts, &x, sizeof x);
  const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(parts[0]), parts[1]);
  vst1q_u16(reinterpret_cast<uint16_t*>(to), vreinterpretq_u16_f16(halves));
#endif
}

#if defined(__clang__)
#define DLRM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DLRM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Words{__VA_ARGS__})
#endif

// to[j, i] = from[i, j] of 8 x 8 numbers, whose rows are some numbers apart.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  Floats rows[8], pairs[8], fours[8];
  for (int i = 0; i < 8; ++i) rows[i] = load(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = DLRM_SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = DLRM_SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int half = 0; half < 2; ++half) {
      fours[i + 2 * half] = DLRM_SHUFFLE(pairs[i + half], pairs[i + half + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * half + 1] = DLRM_SHUFFLE(pairs[i + half], pairs[i + half + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  }
  for (int i = 0; i < 4; ++i) {
    store(to + i * to_stride, DLRM_SHUFFLE(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11));
    store(to + (i + 4) * to_stride, DLRM_SHUFFLE(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15));
  }
}

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline void assign(float& to, float x) { to = x; }
inline void assign(Bf16& to, float x) { to = nearest_bf16(x); }

// Some numbers in another dtype.
template <typename From, typename To>
void convert(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(to + i, load(from + i));
  for (; i < count; ++i) assign(to[i], to_float(from[i]));
}

// a * b + c with one rounding.
inline Floats fused(Floats a, Floats b, Floats c) {
#if defined(__FMA__)
  return reinterpret_cast<Floats>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
#endif
}

inline Floats all_lanes(float x) { return Floats{} + x; }

// Asks for all cache lines of some bytes, for the second-level cache: a core waits for more of them at a time than for
// lines of the first-level cache. Never faults, so the address need not exist.
inline void prefetch(const void* base, int64_t byte_offset, int64_t num_bytes) {
  const uintptr_t first = reinterpret_cast<uintptr_t>(base) + byte_offset;
  for (uintptr_t line = first; line < first + num_bytes; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line), 0, 2);
  }
  // GCC takes a function that only prefetches for one without effect, and drops its calls.
  asm volatile("");
}

}  // namespace dlrm
