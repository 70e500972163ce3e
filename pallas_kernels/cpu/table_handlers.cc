// What XLA calls for tables: handlers that take buffers apart and pick a kernel by dtype, rule and storage.
#include <string_view>
#include <type_traits>

#include "bags.h"
#include "handlers.h"
#include "huge_pages.h"
#include "lookup.h"
#include "update.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {
namespace {

// The largest int32 is nobody's row.
int64_t num_rows_of(const ffi::AnyBuffer& store, int64_t width) {
  return std::min<int64_t>(store.element_count() / width, INT32_MAX);
}

template <typename T>
Rows<T> rows_of(const ffi::AnyBuffer& store, int64_t width) {
  return {static_cast<const T*>(store.untyped_data()), num_rows_of(store, width), width};
}

ffi::Error lookup_handler(ffi::ThreadPool threads, ffi::AnyBuffer store, S32s rows, S32s offsets, F32s weights,
                          ffi::ResultBuffer<ffi::DataType::F32> pooled) {
  const int64_t num_ids = rows.element_count(), num_bags = offsets.element_count() - 1;
  const int64_t width = pooled->dimensions()[1];
  use_huge_pages(store.untyped_data(), store.size_bytes());
  const auto run = [&](auto table) {
    pooled_lookup(threads, table, rows.typed_data(), num_ids, offsets.typed_data(), num_bags, data_or_null(weights),
                  pooled->typed_data());
    return ffi::Error::Success();
  };
  switch (store.element_type()) {
    case ffi::DataType::F32:
      return run(rows_of<float>(store, width));
    case ffi::DataType::BF16:
      return run(rows_of<Bf16>(store, width));
    case ffi::DataType::F16:
      return run(rows_of<F16>(store, width));
    default:
      return invalid("a store is float32, bfloat16 or float16");
  }
}

// Calls run(rule) with the rule of a name.
template <typename Visit>
ffi::Error with_rule(std::string_view name, const Visit& run) {
  if (name == "sgd") return run(Sgd{});
  if (name == "adagrad") return run(Adagrad{});
  if (name == "rowwise_adagrad") return run(RowwiseAdagrad{});
  if (name == "adam") return run(Adam{});
  if (name == "partial_rowwise_adam") return run(PartialRowwiseAdam{});
  if (name == "lamb") return run(Lamb{});
  return invalid("no such row optimizer");
}

// Calls run(storage) with the way in which a store of some dtype is read and rounded.
template <typename Visit>
ffi::Error with_storage(ffi::DataType type, std::string_view rounding, const Visit& run) {
  const bool stochastic = rounding == "stochastic";
  if (rounding == "split") return type == ffi::DataType::BF16 ? run(Split{}) : invalid("split stores are bfloat16");
  switch (type) {
    case ffi::DataType::F32:
      return run(Nearest<float>{});
    case ffi::DataType::BF16:
      return stochastic ? run(Stochastic<Bf16>{}) : run(Nearest<Bf16>{});
    case ffi::DataType::F16:
      return stochastic ? run(Stochastic<F16>{}) : run(Nearest<F16>{});
    default:
      return invalid("a store is float32, bfloat16 or float16");
  }
}

std::vector<Slot> slots_of(const S32s& places, const U32s& keys, const F32s& hyper) {
  std::vector<Slot> slots(places.dimensions()[0]);
  for (size_t s = 0; s < slots.size(); ++s) {
    const int32_t* place = places.typed_data() + 2 * s;
    const uint32_t* key = keys.typed_data() + 2 * s;
    slots[s] = {place[0], place[1], {key[0], key[1]}, {}};
    std::memcpy(&slots[s].hyper, hyper.typed_data() + s * sizeof(Hyper) / sizeof(float), sizeof(Hyper));
  }
  return slots;
}

// Stores of a rule in the order weights, elementwise state, low halves, row-wise state; get(i) gives the i-th.
template <typename Rule, typename Storage, typename Get>
ffi::Error stores_of(const Get& get, size_t given, int64_t width, Stores& stores) {
  constexpr size_t kNeeded = 1 + Rule::kElements + (Storage::kSplit ? 1 : 0) + Rule::kRows;
  if (given != kNeeded) return invalid("a rule was given the wrong number of states");
  const ffi::AnyBuffer weights = get(0);
  for (size_t k = 0; k < kNeeded; ++k) use_huge_pages(get(k).untyped_data(), get(k).size_bytes());
  stores = {};
  stores.weights = weights.untyped_data();
  stores.num_rows = num_rows_of(weights, width);
  stores.width = width;
  size_t next = 1;
  for (int k = 0; k < Rule::kElements; ++k) stores.elements[k] = static_cast<float*>(get(next++).untyped_data());
  if (Storage::kSplit) stores.low_halves = static_cast<uint16_t*>(get(next++).untyped_data());
  if (Rule::kRows > 0) {
    const ffi::AnyBuffer scalars = get(next);
    stores.scalars = static_cast<float*>(scalars.untyped_data());
    stores.num_scalars = scalars.element_count();
  }
  return ffi::Error::Success();
}

// Sorts the ids of a batch and gathers what an update needs of it.
ffi::Error batch_of(ffi::ThreadPool& threads, Scratch& scratch, const S32s& rows, const S32s& slots_of_ids,
                    const S32s& offsets, const F32s& gradients, const F32s& weights, const S32s& places,
                    const U32s& keys, const F32s& hyper, const Stores& stores, Batch& batch) {
  const int64_t num_bags = offsets.element_count() - 1;
  batch.gradients = {{gradients.typed_data(), num_bags, stores.width}, data_or_null(weights), slots_of_ids.typed_data()};
  batch.slots = slots_of(places, keys, hyper);
  return sort_ids(threads, scratch, rows.typed_data(), rows.element_count(), offsets.typed_data(), num_bags,
                  stores.num_rows, batch.sorted);
}

ffi::Error update_handler(ffi::ThreadPool threads, S32s rows, S32s slots_of_ids,
                          S32s offsets, F32s gradients, F32s weights, S32s places, U32s keys, F32s hyper,
                          U32s logical_rows, F32s statistics, ffi::Buffer<ffi::DataType::PRED> enabled,
                          ffi::RemainingArgs, ffi::Result<U32s> memory, ffi::RemainingRets rets,
                          std::string_view rule_name, std::string_view rounding) {
  if (!*enabled.typed_data()) return ffi::Error::Success();
  // Results lie where the arguments of the same number lie.
  const auto get = [&](size_t i) { return **rets.get<ffi::AnyBuffer>(i); };
  return with_rule(rule_name, [&](auto rule) {
    return with_storage(get(0).element_type(), rounding, [&](auto storage) {
      using Rule = decltype(rule);
      using Storage = decltype(storage);
      Stores stores;
      ffi::Error error = stores_of<Rule, Storage>(get, rets.size(), gradients.dimensions()[1], stores);
      if (error.failure()) return error;
      Scratch scratch(memory->untyped_data(), memory->size_bytes());
      Batch batch;
      error = batch_of(threads, scratch, rows, slots_of_ids, offsets, gradients, weights, places, keys, hyper, stores,
                       batch);
      if (error.failure()) return error;
      batch.logical_rows = logical_rows.typed_data();
      batch.words = logical_rows.dimensions()[1];
      return sparse_update<Rule, Storage>(threads, scratch, stores, batch, data_or_null(statistics));
    });
  });
}

ffi::Error statistics_handler(ffi::ThreadPool threads, S32s rows, S32s slots_of_ids,
                              S32s offsets, F32s gradients, F32s weights, S32s places, U32s keys, F32s hyper,
                              ffi::RemainingArgs args, ffi::Result<U32s> memory, ffi::Result<F32s> statistics,
                              std::string_view rule_name, std::string_view rounding) {
  const auto get = [&](size_t i) { return *args.get<ffi::AnyBuffer>(i); };
  // Ids of no row in the store have no statistics.
  std::fill_n(statistics->typed_data(), statistics->element_count(), 0.0f);
  return with_rule(rule_name, [&](auto rule) {
    using Rule = decltype(rule);
    if constexpr (Rule::kStatistics == 0) {
      return invalid("this row optimizer has no statistics");
    } else {
      return with_storage(get(0).element_type(), rounding, [&](auto storage) {
        using Storage = decltype(storage);
        Stores stores;
        ffi::Error error = stores_of<Rule, Storage>(get, args.size(), gradients.dimensions()[1], stores);
        if (error.failure()) return error;
        Scratch scratch(memory->untyped_data(), memory->size_bytes());
      Batch batch;
        error = batch_of(threads, scratch, rows, slots_of_ids, offsets, gradients, weights, places, keys, hyper, stores,
                         batch);
        if (error.failure()) return error;
        return row_statistics<Rule, Storage>(threads, scratch, stores, batch, statistics->typed_data());
      });
    }
  });
}

ffi::Error offsets_handler(ffi::ThreadPool threads, S32s lengths, ffi::Result<S32s> offsets) {
  offsets_of(threads, lengths.typed_data(), lengths.element_count(), offsets->typed_data());
  return ffi::Error::Success();
}

ffi::Error bags_handler(ffi::ThreadPool threads, S32s offsets, ffi::Result<S32s> bags) {
  bags_of_ids(threads, offsets.typed_data(), offsets.element_count() - 1, bags->element_count(), bags->typed_data());
  return ffi::Error::Success();
}

// Zeros in pages of 2 MB, if there are enough of them: those of a store, which others then write in place.
ffi::Error zeros_handler(ffi::ThreadPool threads, ffi::Result<ffi::AnyBuffer> out) {
  begin_in_huge_pages(out->untyped_data(), out->size_bytes());
  char* bytes = static_cast<char*>(out->untyped_data());
  const int64_t num_bytes = out->size_bytes(), pieces = (num_bytes + kHugePage - 1) / kHugePage;
  parallel_for(threads, pieces, [&](int64_t piece) {
    const int64_t begin = piece * kHugePage;
    std::memset(bytes + begin, 0, std::min<int64_t>(kHugePage, num_bytes - begin));
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dlrm

namespace ffi = xla::ffi;
using dlrm::F32s, dlrm::S32s, dlrm::U32s;

// Whether this processor has the instructions that the library was compiled for; itself compiled for any.
#if defined(__x86_64__)
EXPORT __attribute__((target("arch=x86-64"))) int dlrm_runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#else
EXPORT int dlrm_runs_here() { return 1; }
#endif

// What the library was built from, see build.py.
EXPORT const char* dlrm_sources() { return DLRM_SOURCES; }

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_pooled_lookup, dlrm::lookup_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<S32s>()
                                  .Arg<S32s>()
                                  .Arg<F32s>()
                                  .Ret<F32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_sparse_update, dlrm::update_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<S32s>()
                                  .Arg<S32s>()
                                  .Arg<S32s>()
                                  .Arg<F32s>()
                                  .Arg<F32s>()
                                  .Arg<S32s>()
                                  .Arg<U32s>()
                                  .Arg<F32s>()
                                  .Arg<U32s>()
                                  .Arg<F32s>()
                                  .Arg<ffi::Buffer<ffi::DataType::PRED>>()
                                  .RemainingArgs()
                                  .Ret<U32s>()
                                  .RemainingRets()
                                  .Attr<std::string_view>("rule")
                                  .Attr<std::string_view>("rounding"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_row_statistics, dlrm::statistics_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<S32s>()
                                  .Arg<S32s>()
                                  .Arg<S32s>()
                                  .Arg<F32s>()
                                  .Arg<F32s>()
                                  .Arg<S32s>()
                                  .Arg<U32s>()
                                  .Arg<F32s>()
                                  .RemainingArgs()
                                  .Ret<U32s>()
                                  .Ret<F32s>()
                                  .Attr<std::string_view>("rule")
                                  .Attr<std::string_view>("rounding"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_offsets_of, dlrm::offsets_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<S32s>()
                                  .Ret<S32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_bags_of_ids, dlrm::bags_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<S32s>()
                                  .Ret<S32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_zeros, dlrm::zeros_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Ret<ffi::AnyBuffer>());

#pragma GCC visibility pop
