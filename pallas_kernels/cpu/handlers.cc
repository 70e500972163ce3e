// What XLA calls: handlers that take buffers apart and pick a kernel by dtype, rule and storage.
#include <string_view>
#include <type_traits>

#include "bags.h"
#include "huge_pages.h"
#include "interaction.h"
#include "lookup.h"
#include "products.h"
#include "update.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {
namespace {

using F32s = ffi::Buffer<ffi::DataType::F32>;
using S32s = ffi::Buffer<ffi::DataType::S32>;
using U32s = ffi::Buffer<ffi::DataType::U32>;
using BF16s = ffi::Buffer<ffi::DataType::BF16>;

ffi::Error invalid(const char* message) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, message); }

// An array that was left out is passed with no element.
template <typename Array>
auto* data_or_null(const Array& array) {
  return array.element_count() == 0 ? nullptr : array.typed_data();
}

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
                          U32s logical_rows, F32s statistics, ffi::RemainingArgs,
                          ffi::Result<U32s> memory, ffi::RemainingRets rets,
                          std::string_view rule_name, std::string_view rounding) {
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

ffi::Error bags_handler(ffi::ThreadPool threads, S32s offsets, ffi::Result<S32s> bags) {
  bags_of_ids(threads, offsets.typed_data(), offsets.element_count() - 1, bags->element_count(), bags->typed_data());
  return ffi::Error::Success();
}

// x is [B, D], or [B, 0] if there is none; embeddings are [k, B, D].
template <typename T>
Vectors<T> vectors_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& embeddings) {
  const auto sizes = embeddings.dimensions();
  const bool has_x = x.dimensions()[1] > 0;
  return {has_x ? static_cast<T*>(x.untyped_data()) : nullptr, static_cast<T*>(embeddings.untyped_data()), sizes[1],
          sizes[0] + (has_x ? 1 : 0), sizes[2]};
}

ffi::Error interaction_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer embeddings,
                               ffi::Result<ffi::AnyBuffer> out, bool self_interaction) {
  const auto run = [&](auto* to) {
    using T = std::remove_pointer_t<decltype(to)>;
    dot_interaction(threads, vectors_of<const T>(x, embeddings), self_interaction, to);
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::DataType::F32) return run(static_cast<float*>(out->untyped_data()));
  if (x.element_type() == ffi::DataType::BF16) return run(static_cast<Bf16*>(out->untyped_data()));
  return invalid("vectors that interact are float32 or bfloat16");
}

ffi::Error interaction_grad_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer embeddings,
                                    ffi::AnyBuffer cotangents, ffi::Result<ffi::AnyBuffer> x_grad,
                                    ffi::Result<ffi::AnyBuffer> embeddings_grad, bool self_interaction) {
  const auto run = [&](const auto* given) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(given)>>;
    dot_interaction_grad(threads, vectors_of<const T>(x, embeddings), given, self_interaction,
                         vectors_of<T>(*x_grad, *embeddings_grad));
    return ffi::Error::Success();
  };
  if (x.element_type() == ffi::DataType::F32) return run(static_cast<const float*>(cotangents.untyped_data()));
  if (x.element_type() == ffi::DataType::BF16) return run(static_cast<const Bf16*>(cotangents.untyped_data()));
  return invalid("vectors that interact are float32 or bfloat16");
}

template <typename T, typename Array>
Matrix<T> matrix_of(const Array& array, const ffi::AnyBuffer* mask = nullptr) {
  const bool masked = mask != nullptr && mask->element_count() > 0;
  const auto sizes = array.dimensions();
  return {static_cast<const T*>(array.untyped_data()), masked ? static_cast<const Bf16*>(mask->untyped_data()) : nullptr,
          sizes[0], sizes[1]};
}

// Calls run(multiplier, given) with the best multiplier here, or that of a name, and `given` of an array's dtype.
template <typename Visit>
ffi::Error with_multiplier(std::string_view name, ffi::DataType type, const Visit& run) {
#if defined(__x86_64__)
  const auto of_type = [&](auto multiplier) {
    return type == ffi::DataType::BF16 ? run(multiplier, Bf16{}) : run(multiplier, float{});
  };
  if (name != "avx512_bf16" && Amx::runs_here()) return of_type(Amx{});
  if (name != "amx" && Avx512Bf16::runs_here()) return of_type(Avx512Bf16{});
#endif
  return invalid("this processor does not multiply bfloat16, or not so");
}

ffi::Error product_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer mask, F32s weights, F32s bias,
                           ffi::Result<BF16s> packed, ffi::Result<ffi::AnyBuffer> out, bool transposed, bool relu,
                           std::string_view multiplier) {
  return with_multiplier(multiplier, x.element_type(), [&](auto unit, auto given) {
    using M = decltype(unit);
    const auto from = matrix_of<decltype(given)>(x, &mask);
    const auto run = [&](auto* to) {
      product<M>(threads, from, matrix_of<float>(weights), transposed, data_or_null(bias), relu,
                 static_cast<Bf16*>(packed->untyped_data()), to);
      return ffi::Error::Success();
    };
    if (out->element_type() == ffi::DataType::F32) return run(static_cast<float*>(out->untyped_data()));
    return run(static_cast<Bf16*>(out->untyped_data()));
  });
}

ffi::Error parameter_gradients_handler(ffi::ThreadPool threads, BF16s x, ffi::AnyBuffer g, ffi::AnyBuffer mask,
                                       ffi::Result<BF16s> packed, ffi::Result<F32s> weights, ffi::Result<F32s> bias,
                                       std::string_view multiplier) {
  return with_multiplier(multiplier, g.element_type(), [&](auto unit, auto given) {
    parameter_gradients<decltype(unit)>(threads, matrix_of<Bf16>(x), matrix_of<decltype(given)>(g, &mask),
                                        static_cast<Bf16*>(packed->untyped_data()), weights->typed_data(),
                                        bias->typed_data());
    return ffi::Error::Success();
  });
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
using F32s = ffi::Buffer<ffi::DataType::F32>;
using S32s = ffi::Buffer<ffi::DataType::S32>;
using U32s = ffi::Buffer<ffi::DataType::U32>;
using BF16s = ffi::Buffer<ffi::DataType::BF16>;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether this processor has the instructions that the library was compiled for; itself compiled for any.
#if defined(__x86_64__)
EXPORT __attribute__((target("arch=x86-64"))) int dlrm_runs_here() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#else
EXPORT int dlrm_runs_here() { return 1; }
#endif

// Whether this processor multiplies bfloat16.
EXPORT int dlrm_multiplies_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return dlrm::Amx::runs_here() || dlrm::Avx512Bf16::runs_here();
#else
  return 0;
#endif
}

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_bags_of_ids, dlrm::bags_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<S32s>()
                                  .Ret<S32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_dot_interaction, dlrm::interaction_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("self_interaction"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_dot_interaction_grad, dlrm::interaction_grad_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("self_interaction"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_product, dlrm::product_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32s>()
                                  .Arg<F32s>()
                                  .Ret<BF16s>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed")
                                  .Attr<bool>("relu")
                                  .Attr<std::string_view>("multiplier"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_parameter_gradients, dlrm::parameter_gradients_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<BF16s>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<BF16s>()
                                  .Ret<F32s>()
                                  .Ret<F32s>()
                                  .Attr<std::string_view>("multiplier"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_zeros, dlrm::zeros_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Ret<ffi::AnyBuffer>());

#pragma GCC visibility pop
