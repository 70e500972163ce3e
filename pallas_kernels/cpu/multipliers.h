// How processors multiply matrices by products of bfloat16: blocks of float32 sums, from rows of a and columns of b that
// lie packed.
//
// A multiplier adds a block of kRows x kColumns sums, each in the order of k, in pairs of k:
//   c[i, j] = (0 or c[i, j]) + sum_k a[i, k] * b[k, j]
// A number is the sum of kParts in bfloat16: one, itself, or three, which hold the 24 bits of a float32. a is
// [kRows, kParts, kDepth], of which some columns count, a multiple of kDepthUnit; b is
// [depth / kDepthUnit, kParts, kDepthUnit / 2, kColumns, 2], and `next` is the b that comes next; rows of c are `stride`
// numbers apart. Where a number has three parts, meanwhile() is called for each kDepthUnit: what it does takes little
// time while tiles multiply.
#pragma once

#include <cstdint>
#include <cstring>

#include "elements.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dlrm {

constexpr int64_t kColumns = 32, kDepthUnit = 32;
// Numbers of a part of kDepthUnit rows of b.
constexpr int64_t kUnit = kDepthUnit * kColumns;

#if defined(__x86_64__)

#define DLRM_AMX __attribute__((target("amx-tile,amx-bf16")))

// Pairs of bfloat16 with AVX-512.
struct Avx512Bf16 {
  static constexpr int64_t kRows = 8, kParts = 1, kDepth = 256;
  // State of a thread that multiplies.
  struct Session {};

  static bool runs_here() { return __builtin_cpu_supports("avx512bf16"); }

  template <typename Meanwhile>
  __attribute__((target("avx512f,avx512bf16"))) static void multiply(const Bf16* a, const Bf16* b, const Bf16* /*next*/,
                                                                     int64_t depth, float* c, int64_t stride,
                                                                     bool fresh, Meanwhile& /*meanwhile*/) {
    __m512 sums[kRows][2];
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) sums[i][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + i * stride + v * 16);
    }
    for (int64_t k = 0; k < depth; k += 2) {
      const __m512bh left = (__m512bh)_mm512_loadu_si512(b + k * kColumns);
      const __m512bh right = (__m512bh)_mm512_loadu_si512(b + k * kColumns + 32);
      for (int i = 0; i < kRows; ++i) {
        int32_t pair;
        std::memcpy(&pair, a + i * kDepth + k, sizeof pair);
        const __m512bh factors = (__m512bh)_mm512_set1_epi32(pair);
        sums[i][0] = _mm512_dpbf16_ps(sums[i][0], factors, left);
        sums[i][1] = _mm512_dpbf16_ps(sums[i][1], factors, right);
      }
    }
    for (int i = 0; i < kRows; ++i) {
      for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + i * stride + v * 16, sums[i][v]);
    }
  }
};

// Tiles of 16 x 32 bfloat16. Of three parts each, six products count: the other three are less than 2^-24 of the whole.
template <int64_t kPartsOfNumber>
struct Amx {
  // So deep, blocks of a stay in the first-level cache.
  static constexpr int64_t kRows = 32, kParts = kPartsOfNumber, kDepth = kParts == 1 ? 256 : 64;

  // The system lends tiles to a process that asks for them.
  static bool runs_here() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    // Packing is written for AVX-512.
    static const bool lent =
        Avx512Bf16::runs_here() && has_tiles() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return lent;
  }

  struct Session {
    // Of eight tiles, all of 16 rows of 64 bytes.
    struct Config {
      uint8_t palette, first_row, reserved[14];
      uint16_t row_bytes[16];
      uint8_t rows[16];
    };
    static constexpr Config kConfig{
        1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
    __attribute__((target("amx-tile"))) Session() { _tile_loadconfig(&kConfig); }
    __attribute__((target("amx-tile"))) ~Session() { _tile_release(); }
  };

  template <typename Meanwhile>
  DLRM_AMX static void multiply(const Bf16* a, const Bf16* b, const Bf16* next, int64_t depth, float* c, int64_t stride,
                                bool fresh, Meanwhile& meanwhile) {
    const int64_t sum_bytes = stride * sizeof(float);
    // GCC's intrinsics do not say that they read and write memory.
    asm volatile("" ::: "memory");
    if (fresh) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    } else {
      _tile_loadd(0, c, sum_bytes);
      _tile_loadd(1, c + 16, sum_bytes);
      _tile_loadd(2, c + 16 * stride, sum_bytes);
      _tile_loadd(3, c + 16 * stride + 16, sum_bytes);
    }
    for (int64_t k = 0; k < depth; k += kDepthUnit) {
      // While tiles multiply, the next ones of b come from the second-level cache.
      const Bf16* unit = b + k * kColumns * kParts;
      const Bf16* ahead = k + kDepthUnit < depth ? unit + kUnit * kParts : next;
      if constexpr (kParts == 1) {
        prefetch_lines(ahead, 0, 8);
        load_a(a + k);
        load_b(unit);
        prefetch_lines(ahead, 8, 24);
        multiply_tiles();
      } else {
        // Small products first, and in an order in which of two after each other one operand is the same.
        constexpr int64_t kLines = 16;
        load_a(a + 2 * kDepth + k);
        load_b(unit);
        prefetch_lines(ahead, 0, kLines);
        multiply_tiles();
        load_a(a + kDepth + k);
        prefetch_lines(ahead, kLines, kLines);
        multiply_tiles();
        load_b(unit + kUnit);
        prefetch_lines(ahead, 2 * kLines, kLines);
        multiply_tiles();
        load_a(a + k);
        prefetch_lines(ahead, 3 * kLines, kLines);
        multiply_tiles();
        meanwhile();
        load_b(unit + 2 * kUnit);
        prefetch_lines(ahead, 4 * kLines, kLines);
        multiply_tiles();
        load_b(unit);
        prefetch_lines(ahead, 5 * kLines, kLines);
        multiply_tiles();
      }
    }
    _tile_stored(0, c, sum_bytes);
    _tile_stored(1, c + 16, sum_bytes);
    _tile_stored(2, c + 16 * stride, sum_bytes);
    _tile_stored(3, c + 16 * stride + 16, sum_bytes);
    asm volatile("" ::: "memory");
  }

 private:
  // A part of 32 rows of a, of 32 columns each.
  DLRM_AMX static void load_a(const Bf16* from) {
    constexpr int64_t kRowBytes = kParts * kDepth * sizeof(Bf16);
    _tile_loadd(4, from, kRowBytes);
    _tile_loadd(5, from + 16 * kParts * kDepth, kRowBytes);
  }

  // A part of 32 rows of b.
  DLRM_AMX static void load_b(const Bf16* from) {
    constexpr int64_t kPairBytes = kColumns * 2 * sizeof(Bf16);
    _tile_loadd(6, from, kPairBytes);
    _tile_loadd(7, from + 32, kPairBytes);
  }

  DLRM_AMX static void multiply_tiles() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  // Asks for some cache lines, from one on.
  static void prefetch_lines(const Bf16* from, int64_t first, int64_t count) {
    for (int64_t i = first; i < first + count; ++i) __builtin_prefetch(from + 32 * i);
  }

  // Clang 14's __builtin_cpu_supports knows no AMX: bits 22 (AMX-BF16) and 24 (AMX-TILE) of leaf 7's EDX.
  static bool has_tiles() {
    uint32_t eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    return (edx >> 22 & 1) && (edx >> 24 & 1);
  }
};

#endif

}  // namespace dlrm
