// The rules of row_optimizers.py, for one row at a time.
//
// A product and the sum it goes into are fused (std::fma) wherever XLA's CPU compiler fuses them in the reference, and
// nowhere else: the library is compiled with contraction off, so each result is what is written here on every machine.
// A quotient whose divisor is one number a row is a product with the rounded reciprocal, as XLA makes it.
// Loops over columns have no order and are left to the compiler to vectorise.
#pragma once

#include <cmath>
#include <cstdint>

#include "elements.h"

namespace dlrm {

// Hyperparameters of a slot. The corrections are 1 - beta**step.
struct Hyper {
  float learning_rate, weight_decay, eps, beta1, beta2, dim, correction1, correction2;
};

// A row in float32, its state, and the sum of its gradients.
struct Row {
  float* __restrict weights;
  float* __restrict first;
  float* __restrict second;
  float* scalar;
  const float* __restrict gradient;
  int64_t width;
};

// Columns added as a tree; STATISTICS_BLOCK of row_optimizers.py.
constexpr int64_t kStatisticsBlock = 16;

inline int64_t statistics_blocks(int64_t width) { return width < kStatisticsBlock ? 1 : width / kStatisticsBlock; }

// Sums of blocks of columns, each as a balanced tree: halves are added until one number is left.
inline void sum_blocks(const float* summands, int64_t width, float* sums, int64_t stride) {
  for (int64_t block = 0; block < statistics_blocks(width); ++block) {
    const float* x = summands + block * kStatisticsBlock;
    const Floats eight = width < kStatisticsBlock ? load(x) : load(x) + load(x + kLanes);
    const float four[4] = {eight[0] + eight[4], eight[1] + eight[5], eight[2] + eight[6], eight[3] + eight[7]};
    sums[block * stride] = (four[0] + four[2]) + (four[1] + four[3]);
  }
}

inline float decayed(const Row& row, const Hyper& hyper, int64_t j) {
  return std::fma(hyper.weight_decay, row.weights[j], row.gradient[j]);
}

inline float moved(float moment, float beta, float new_minus_moment) {
  return std::fma(1.0f - beta, new_minus_moment, moment);
}

// weights -= rate * update
inline void descend(float& weight, float rate, float update) { weight = std::fma(-rate, update, weight); }

// weights -= rate * (direction + decay * weights)
inline void descend_decayed(const Row& row, const Hyper& hyper, int64_t j, float direction) {
  descend(row.weights[j], hyper.learning_rate, std::fma(hyper.weight_decay, row.weights[j], direction));
}

struct Sgd {
  static constexpr int kElements = 0, kRows = 0, kStatistics = 0;
  static void apply(const Row& row, const Hyper& hyper, const float*) {
    for (int64_t j = 0; j < row.width; ++j) descend(row.weights[j], hyper.learning_rate, decayed(row, hyper, j));
  }
};

struct Adagrad {
  static constexpr int kElements = 1, kRows = 0, kStatistics = 0;
  static void apply(const Row& row, const Hyper& hyper, const float*) {
    for (int64_t j = 0; j < row.width; ++j) {
      const float gradient = decayed(row, hyper, j);
      row.first[j] = std::fma(gradient, gradient, row.first[j]);
      row.weights[j] -= hyper.learning_rate * gradient / (std::sqrt(row.first[j]) + hyper.eps);
    }
  }
};

struct RowwiseAdagrad {
  static constexpr int kElements = 0, kRows = 1, kStatistics = 1;
  static void summands(const Row& row, const Hyper& hyper, float* x) {
    for (int64_t j = 0; j < row.width; ++j) x[j] = decayed(row, hyper, j) * decayed(row, hyper, j);
  }
  static void apply(const Row& row, const Hyper& hyper, const float* sums) {
    *row.scalar += sums[0] / hyper.dim;
    const float inverse = 1.0f / (std::sqrt(*row.scalar) + hyper.eps);
    for (int64_t j = 0; j < row.width; ++j) {
      descend(row.weights[j], hyper.learning_rate * decayed(row, hyper, j), inverse);
    }
  }
};

struct Adam {
  static constexpr int kElements = 2, kRows = 0, kStatistics = 0;
  static void apply(const Row& row, const Hyper& hyper, const float*) {
    const float inverse1 = 1.0f / hyper.correction1, inverse2 = 1.0f / hyper.correction2;
    for (int64_t j = 0; j < row.width; ++j) {
      const float gradient = row.gradient[j];
      row.first[j] = moved(row.first[j], hyper.beta1, gradient - row.first[j]);
      row.second[j] = moved(row.second[j], hyper.beta2, std::fma(gradient, gradient, -row.second[j]));
      const float root = std::sqrt(row.second[j] * inverse2);
      descend_decayed(row, hyper, j, row.first[j] * inverse1 / (root + hyper.eps));
    }
  }
};

struct PartialRowwiseAdam {
  static constexpr int kElements = 1, kRows = 1, kStatistics = 1;
  static void summands(const Row& row, const Hyper&, float* x) {
    for (int64_t j = 0; j < row.width; ++j) x[j] = row.gradient[j] * row.gradient[j];
  }
  static void apply(const Row& row, const Hyper& hyper, const float* sums) {
    *row.scalar = moved(*row.scalar, hyper.beta2, sums[0] / hyper.dim - *row.scalar);
    const float root = std::sqrt(*row.scalar / hyper.correction2) + hyper.eps;
    const float inverse = 1.0f / (hyper.correction1 * root);
    for (int64_t j = 0; j < row.width; ++j) {
      row.first[j] = moved(row.first[j], hyper.beta1, row.gradient[j] - row.first[j]);
      descend_decayed(row, hyper, j, row.first[j] * inverse);
    }
  }
};

struct Lamb {
  static constexpr int kElements = 2, kRows = 0, kStatistics = 2;
  static float update(const Row& row, const Hyper& hyper, int64_t j, float* first, float* second) {
    const float gradient = row.gradient[j];
    *first = moved(row.first[j], hyper.beta1, gradient - row.first[j]);
    *second = moved(row.second[j], hyper.beta2, std::fma(gradient, gradient, -row.second[j]));
    const float root = std::sqrt(*second * (1.0f / hyper.correction2));
    const float direction = *first * (1.0f / hyper.correction1) / (root + hyper.eps);
    return std::fma(hyper.weight_decay, row.weights[j], direction);
  }
  static void summands(const Row& row, const Hyper& hyper, float* x) {
    float* squared_updates = x + row.width;
    for (int64_t j = 0; j < row.width; ++j) {
      float first, second;
      const float u = update(row, hyper, j, &first, &second);
      x[j] = row.weights[j] * row.weights[j];
      squared_updates[j] = u * u;
    }
  }
  static void apply(const Row& row, const Hyper& hyper, const float* sums) {
    const float weight_norm = std::sqrt(sums[0]), update_norm = std::sqrt(sums[1]);
    const float ratio = weight_norm > 0 && update_norm > 0 ? weight_norm / update_norm : 1.0f;
    const float rate = hyper.learning_rate * ratio;
    for (int64_t j = 0; j < row.width; ++j) {
      float first, second;
      const float u = update(row, hyper, j, &first, &second);
      row.first[j] = first;
      row.second[j] = second;
      descend(row.weights[j], rate, u);
    }
  }
};

}  // namespace dlrm
