// The elementwise arithmetic of the low-rank cross network's layers, forward and backward.
//
// A layer has y = first * u + x. Arrays have as many numbers each, and threads share them out. T is the dtype of the
// network.
#pragma once

#include <algorithm>
#include <cstdint>

#include "avx512.h"
#include "parallel.h"

#if defined(__x86_64__)

namespace dlrm {

// Calls work(begin, end) for parts of some numbers.
template <typename Work>
void for_each_part(ffi::ThreadPool& threads, int64_t count, const Work& work) {
  constexpr int64_t kNumbers = 1 << 15;
  parallel_for(threads, (count + kNumbers - 1) / kNumbers, [&](int64_t part) {
    work(part * kNumbers, std::min(count, (part + 1) * kNumbers));
  });
}

// A layer's y, rounded, and in float32, unless that is null; it may lie where x does.
template <typename T, typename X>
struct CrossSum {
  const T* first;
  const T* u;
  const X* x;
  T* rounded;
  float* y;

  DLRM_AVX512 void operator()(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j += kLanes512) {
      const __mmask32 lanes = first_lanes(end - j);
      const Floats512 product = floats_of(load_lanes(first + j, lanes)) * floats_of(load_lanes(u + j, lanes));
      const Floats512 sum = product + floats_of(load_lanes(x + j, lanes));
      store_lanes(rounded + j, lanes, sum);
      if (y != nullptr) store_lanes(y + j, lanes, sum);
    }
  }
};

// With y's gradient g = above + x_above, of which x_above and then g may be null, as y is of the layer above the input:
// the gradient of u, first * g, rounded; and first_grad = first_grad + g * u, which begins as zero unless `begun`. It may
// be that g lies where `above` does.
template <typename T, typename Above>
struct CrossGrads {
  const Above* above;
  const T* x_above;
  const T* first;
  const T* u;
  bool begun;
  float* g;
  T* u_grad;
  float* first_grad;

  DLRM_AVX512 void operator()(int64_t begin, int64_t end) const {
    for (int64_t j = begin; j < end; j += kLanes512) {
      const __mmask32 lanes = first_lanes(end - j);
      Floats512 grad = floats_of(load_lanes(above + j, lanes));
      if (x_above != nullptr) {
        grad = grad + floats_of(load_lanes(x_above + j, lanes));
        store_lanes(g + j, lanes, grad);
      }
      store_lanes(u_grad + j, lanes, grad * floats_of(load_lanes(first + j, lanes)));
      const Floats512 of_first = grad * floats_of(load_lanes(u + j, lanes));
      store_lanes(first_grad + j, lanes, begun ? load_lanes(first_grad + j, lanes) + of_first : of_first);
    }
  }
};

}  // namespace dlrm

#endif
