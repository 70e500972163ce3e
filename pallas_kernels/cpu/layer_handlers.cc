// What XLA calls for layers: handlers that take buffers apart and pick a kernel by dtype and processor.
#include <string_view>
#include <type_traits>
#include <vector>

#include "cross.h"
#include "gradients.h"
#include "handlers.h"
#include "interaction.h"
#include "norm.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {
namespace {

// x is [B, D], or [B, 0] if there is none; embeddings are [k, B, D], or [B, k, D] if they go `by_sample`.
template <typename X, typename E>
Vectors<X, E> vectors_of(const ffi::AnyBuffer& x, const ffi::AnyBuffer& embeddings, bool by_sample) {
  const auto sizes = embeddings.dimensions();
  const bool has_x = x.dimensions()[1] > 0;
  return {has_x ? static_cast<X*>(x.untyped_data()) : nullptr,
          static_cast<E*>(embeddings.untyped_data()),
          sizes[by_sample ? 0 : 1],
          sizes[by_sample ? 1 : 0] + (has_x ? 1 : 0),
          sizes[2],
          by_sample};
}

// Calls run(number of `first`, number of `second`): both float32, or the first bfloat16 and the second either.
template <typename Run>
ffi::Error with_dtypes(const ffi::AnyBuffer& first, const ffi::AnyBuffer& second, const Run& run) {
  const auto of_first = first.element_type(), of_second = second.element_type();
  if (of_first == ffi::DataType::F32 && of_second == ffi::DataType::F32) {
    run(float{}, float{});
  } else if (of_first == ffi::DataType::BF16 && of_second == ffi::DataType::F32) {
    run(Bf16{}, float{});
  } else if (of_first == ffi::DataType::BF16 && of_second == ffi::DataType::BF16) {
    run(Bf16{}, Bf16{});
  } else {
    return invalid("arrays are float32 or bfloat16, and all float32 where the first one is");
  }
  return ffi::Error::Success();
}

ffi::Error interaction_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer embeddings,
                               ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> rounded,
                               bool self_interaction) {
  return with_dtypes(x, embeddings, [&](auto of_x, auto of_embeddings) {
    using X = decltype(of_x);
    dot_interaction(threads, vectors_of<const X, const decltype(of_embeddings)>(x, embeddings, false), self_interaction,
                    static_cast<X*>(out->untyped_data()),
                    rounded->element_count() > 0 ? static_cast<X*>(rounded->untyped_data()) : nullptr);
  });
}

ffi::Error interaction_grad_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer embeddings,
                                    ffi::AnyBuffer cotangents, ffi::Result<ffi::AnyBuffer> x_grad,
                                    ffi::Result<ffi::AnyBuffer> embeddings_grad, bool by_sample,
                                    bool self_interaction) {
  return with_dtypes(x, *embeddings_grad, [&](auto of_x, auto of_embeddings) {
    using X = decltype(of_x);
    dot_interaction_grad(threads, vectors_of<const X, const X>(x, embeddings, by_sample),
                         static_cast<const X*>(cotangents.untyped_data()), self_interaction,
                         vectors_of<X, decltype(of_embeddings)>(*x_grad, *embeddings_grad, false));
  });
}

ffi::Error norm_handler(ffi::ThreadPool threads, ffi::RemainingArgs args, ffi::Result<F32s> result) {
  std::vector<Numbers> arrays;
  for (size_t i = 0; i < args.size(); ++i) {
    const auto array = *args.get<ffi::AnyBuffer>(i);
    const bool is_bf16 = array.element_type() == ffi::DataType::BF16;
    if (!is_bf16 && array.element_type() != ffi::DataType::F32) return invalid("numbers are float32 or bfloat16");
    arrays.push_back({array.untyped_data(), static_cast<int64_t>(array.element_count()), is_bf16});
  }
  *result->typed_data() = norm(threads, arrays);
  return ffi::Error::Success();
}

#if defined(__x86_64__)

template <typename T, typename Array>
T* data_of(Array& array) {
  return static_cast<T*>(array.untyped_data());
}

template <typename T, typename Array>
Matrix<T> matrix_of(const Array& array, const ffi::AnyBuffer* mask = nullptr) {
  const bool masked = mask != nullptr && mask->element_count() > 0;
  const auto sizes = array.dimensions();
  return {data_of<const T>(array), masked ? data_of<const T>(*mask) : nullptr, sizes[0], sizes[1]};
}

// Calls run(multiplier) with the best multiplier here, or that of a name, of numbers in one or three parts.
template <typename Run>
ffi::Error with_multiplier(std::string_view name, int64_t parts, const Run& run) {
  const auto of = [&](auto multiplier) {
    run(multiplier);
    return ffi::Error::Success();
  };
  const bool amx = name != "avx512_bf16" && Amx<1>::runs_here();
  if (parts == 3 && amx) return of(Amx<3>{});
  if (parts == 1 && amx) return of(Amx<1>{});
  if (parts == 1 && name != "amx" && Avx512Bf16::runs_here()) return of(Avx512Bf16{});
  return invalid("this processor does not multiply bfloat16, or not so");
}

// Calls run(number) with a number of an array's dtype, float32 or bfloat16.
template <typename Run>
void with_dtype(ffi::DataType type, const Run& run) {
  type == ffi::DataType::BF16 ? run(Bf16{}) : run(float{});
}

ffi::Error product_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer mask, F32s weights, F32s bias,
                           ffi::Result<BF16s> packed, ffi::Result<ffi::AnyBuffer> out, bool transposed, bool relu,
                           int64_t parts, std::string_view multiplier) {
  return with_multiplier(multiplier, parts, [&](auto unit) {
    const auto run = [&](auto given, auto* to) {
      product<decltype(unit)>(threads, matrix_of<decltype(given)>(x, &mask), matrix_of<float>(weights), transposed,
                              data_of<Bf16>(*packed), output_of(data_or_null(bias), relu, out->dimensions()[1], to));
    };
    if constexpr (decltype(unit)::kParts > 1) {
      run(float{}, data_of<float>(*out));
    } else {
      with_dtype(x.element_type(), [&](auto given) {
        with_dtype(out->element_type(), [&](auto result) { run(given, data_of<decltype(result)>(*out)); });
      });
    }
  });
}

ffi::Error parameter_gradients_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer g, ffi::AnyBuffer mask,
                                       ffi::Result<ffi::AnyBuffer> scratch, ffi::Result<F32s> weights,
                                       ffi::Result<F32s> bias, int64_t chunks, int64_t parts,
                                       std::string_view multiplier) {
  return with_multiplier(multiplier, parts, [&](auto unit) {
    const auto run = [&](auto of_x, auto of_g) {
      using M = decltype(unit);
      const auto from = matrix_of<decltype(of_x)>(x);
      const auto gradients = matrix_of<decltype(of_g)>(g, &mask);
      float *to = weights->typed_data(), *to_bias = bias->typed_data();
      if (chunks > 1) {
        gradients_by_samples<M>(threads, from, gradients, chunks, data_of<float>(*scratch), to, to_bias);
      } else {
        gradients_by_columns<M>(threads, from, gradients, data_of<Bf16>(*scratch), to, to_bias);
      }
    };
    if constexpr (decltype(unit)::kParts > 1) {
      run(float{}, float{});
    } else {
      with_dtype(g.element_type(), [&](auto of_g) { run(Bf16{}, of_g); });
    }
  });
}

// As above, for the cross network.
template <typename Run>
ffi::Error with_dtypes_of_network(const ffi::AnyBuffer& network, const ffi::AnyBuffer& array, const Run& run) {
  if (!Avx512Bf16::runs_here()) return invalid("this processor does not round to bfloat16");
  return with_dtypes(network, array, run);
}

ffi::Error cross_sum_handler(ffi::ThreadPool threads, ffi::AnyBuffer first, ffi::AnyBuffer u, ffi::AnyBuffer x,
                             ffi::Result<ffi::AnyBuffer> rounded, ffi::Result<F32s> y) {
  return with_dtypes_of_network(first, x, [&](auto number, auto given) {
    using T = decltype(number);
    for_each_part(threads, first.element_count(),
                  CrossSum<T, decltype(given)>{data_of<const T>(first), data_of<const T>(u),
                                               data_of<const decltype(given)>(x), data_of<T>(*rounded),
                                               data_or_null(*y)});
  });
}

// `sum` is what first_grad begins with, in its memory, or nothing.
ffi::Error cross_grads_handler(ffi::ThreadPool threads, ffi::AnyBuffer above, ffi::AnyBuffer x_above,
                               ffi::AnyBuffer first, ffi::AnyBuffer u, F32s sum, ffi::Result<F32s> g,
                               ffi::Result<ffi::AnyBuffer> u_grad, ffi::Result<F32s> first_grad) {
  return with_dtypes_of_network(first, above, [&](auto number, auto given) {
    using T = decltype(number);
    for_each_part(threads, first.element_count(),
                  CrossGrads<T, decltype(given)>{data_of<const decltype(given)>(above),
                                                 x_above.element_count() > 0 ? data_of<const T>(x_above) : nullptr,
                                                 data_of<const T>(first), data_of<const T>(u), sum.element_count() > 0,
                                                 data_or_null(*g), data_of<T>(*u_grad), first_grad->typed_data()});
  });
}

#endif

}  // namespace
}  // namespace dlrm

namespace ffi = xla::ffi;
using dlrm::BF16s, dlrm::F32s;

// In how many parts at most this processor multiplies numbers as bfloat16, and the library has handlers for it: three
// hold a float32, one a bfloat16.
EXPORT int dlrm_parts_of_products() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return dlrm::Amx<1>::runs_here() ? 3 : dlrm::Avx512Bf16::runs_here() ? 1 : 0;
#else
  return 0;
#endif
}

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_dot_interaction, dlrm::interaction_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
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
                                  .Attr<bool>("by_sample")
                                  .Attr<bool>("self_interaction"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_norm, dlrm::norm_handler,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().RemainingArgs().Ret<F32s>());

#if defined(__x86_64__)

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
                                  .Attr<int64_t>("parts")
                                  .Attr<std::string_view>("multiplier"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_parameter_gradients, dlrm::parameter_gradients_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32s>()
                                  .Ret<F32s>()
                                  .Attr<int64_t>("chunks")
                                  .Attr<int64_t>("parts")
                                  .Attr<std::string_view>("multiplier"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_cross_sum, dlrm::cross_sum_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_cross_grads, dlrm::cross_grads_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<F32s>()
                                  .Ret<F32s>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<F32s>());

#endif

#pragma GCC visibility pop
