// sparse_update and row_statistics: a rule applied once to each row that a batch touches, in place.
#pragma once

#include "optimizers.h"
#include "rounding.h"
#include "runs.h"

namespace dlrm {

// Where a slot's rows lie, and the start of their keys for random bits.
struct Slot {
  int64_t first_row, first_scalar;
  RandomRow random;
  Hyper hyper;
};

// Arrays of an update; null where a rule or a store does not need one.
struct Stores {
  void* weights;
  float* elements[2];
  uint16_t* low_halves;
  float* scalars;
  int64_t num_scalars;
  int64_t num_rows, width;
};

struct Batch {
  SortedIds sorted;
  Gradients gradients;
  const uint32_t* logical_rows;  // [n, words]
  int64_t words;
  std::vector<Slot> slots;

  const Slot& slot_of(const Run& run) const {
    return slots[std::clamp<int64_t>(run.slot, 0, static_cast<int64_t>(slots.size()) - 1)];
  }
};

inline int64_t scalar_of(const Run& run, const Slot& slot) { return slot.first_scalar + run.row - slot.first_row; }

// Rows of weights and state fetched ahead of their update.
template <typename Rule, typename Storage>
struct FetchAhead {
  const Stores& stores;
  const Batch& batch;

  void operator()(const Run& run) const {
    constexpr int64_t kBytes = sizeof(typename Storage::Element);
    const int64_t first = run.row * stores.width;
    prefetch(stores.weights, first * kBytes, stores.width * kBytes);
    for (int k = 0; k < Rule::kElements; ++k) prefetch(stores.elements[k], first * 4, stores.width * 4);
    if (Storage::kSplit) prefetch(stores.low_halves, first * 2, stores.width * 2);
    if (Rule::kRows > 0) prefetch(stores.scalars, scalar_of(run, batch.slot_of(run)) * 4, 4);
  }

  int64_t rows() const {
    constexpr int64_t kBytes = sizeof(typename Storage::Element) + 4 * Rule::kElements + (Storage::kSplit ? 2 : 0);
    return rows_ahead(stores.width * kBytes);
  }
};

// Applies the rule; `statistics` are sums over whole rows for each id, [n, Rule::kStatistics], or null.
template <typename Rule, typename Storage>
ffi::Error sparse_update(ffi::ThreadPool& threads, Scratch& scratch, const Stores& stores,
                         const Batch& batch, const float* statistics) {
  using Element = typename Storage::Element;
  const int64_t width = stores.width, num_blocks = statistics_blocks(width);
  const FetchAhead<Rule, Storage> ahead{stores, batch};
  // The row itself, its summands, and the sums of their blocks, which take less than a row each.
  const int64_t buffer_rows = 1 + 2 * Rule::kStatistics;
  const auto visit = [&](const Run& run, const float* gradient, float* buffer) {
    const Slot& slot = batch.slot_of(run);
    const int64_t first = run.row * width;
    Element* held = static_cast<Element*>(stores.weights) + first;
    uint16_t* low = Storage::kSplit ? stores.low_halves + first : nullptr;
    // A row whose number lies outside the store of numbers has none: it reads 0 and writes nothing.
    float nobody = 0;
    const int64_t scalar = Rule::kRows > 0 ? scalar_of(run, slot) : 0;
    const bool has_scalar = Rule::kRows > 0 && scalar >= 0 && scalar < stores.num_scalars;
    Row row{Storage::open(held, low, buffer, width),
            Rule::kElements > 0 ? stores.elements[0] + first : nullptr,
            Rule::kElements > 1 ? stores.elements[1] + first : nullptr,
            has_scalar ? stores.scalars + scalar : &nobody,
            gradient,
            width};
    float sums[2] = {0, 0};
    if constexpr (Rule::kStatistics > 0) {
      if (statistics == nullptr) {
        float *summands = buffer + width, *blocks = summands + Rule::kStatistics * width;
        Rule::summands(row, slot.hyper, summands);
        for (int k = 0; k < Rule::kStatistics; ++k) {
          sum_blocks(summands + k * width, width, blocks, 1);
          sums[k] = blocks[0];
          for (int64_t block = 1; block < num_blocks; ++block) sums[k] += blocks[block];
        }
      } else {
        for (int k = 0; k < Rule::kStatistics; ++k) sums[k] = statistics[run.first_id * Rule::kStatistics + k];
      }
    }
    Rule::apply(row, slot.hyper, sums);
    RandomRow random = slot.random;
    if (Storage::kRandom) {
      const uint32_t* logical = batch.logical_rows + run.first_id * batch.words;
      random.key = fold(random.key, logical[0]);
      if (batch.words > 1 && logical[1] != 0) random.key = fold(random.key, logical[1]);
    }
    Storage::close(row.weights, held, low, width, random);
  };
  return for_each_row(threads, scratch, batch.sorted, batch.gradients, ahead.rows(), buffer_rows, ahead, visit);
}

// Sums of a rule's summands over blocks of columns, for each id: [n, blocks, Rule::kStatistics].
template <typename Rule, typename Storage>
ffi::Error row_statistics(ffi::ThreadPool& threads, Scratch& scratch, const Stores& stores,
                          const Batch& batch, float* statistics) {
  using Element = typename Storage::Element;
  const int64_t width = stores.width, size = statistics_blocks(width) * Rule::kStatistics;
  const FetchAhead<Rule, Storage> ahead{stores, batch};
  const auto visit = [&](const Run& run, const float* gradient, float* buffer) {
    const int64_t first = run.row * width;
    Element* held = static_cast<Element*>(stores.weights) + first;
    uint16_t* low = Storage::kSplit ? stores.low_halves + first : nullptr;
    Row row{Storage::open(held, low, buffer, width),
            Rule::kElements > 0 ? stores.elements[0] + first : nullptr,
            Rule::kElements > 1 ? stores.elements[1] + first : nullptr,
            nullptr,
            gradient,
            width};
    float* summands = buffer + width;
    Rule::summands(row, batch.slot_of(run).hyper, summands);
    float* of_first = statistics + run.first_id * size;
    for (int k = 0; k < Rule::kStatistics; ++k) sum_blocks(summands + k * width, width, of_first + k, Rule::kStatistics);
    for (int64_t i = run.begin + 1; i < run.end; ++i) {
      std::copy(of_first, of_first + size, statistics + id_of(batch.sorted.entries[i]) * size);
    }
  };
  return for_each_row(threads, scratch, batch.sorted, batch.gradients, ahead.rows(), 1 + Rule::kStatistics, ahead,
                      visit);
}

}  // namespace dlrm
