// What XLA calls for layers: handlers that take buffers apart and pick a kernel by dtype and processor.
#include <string_view>
#include <type_traits>

#include "cross.h"
#include "handlers.h"
#include "interaction.h"
#include "products.h"
#include "xla/ffi/api/ffi.h"

namespace dlrm {
namespace {

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

#if defined(__x86_64__)

template <typename T, typename Array>
T* data_of(Array& array) {
  return static_cast<T*>(array.untyped_data());
}

template <typename T, typename Array>
Matrix<T> matrix_of(const Array& array, const ffi::AnyBuffer* mask = nullptr) {
  const bool masked = mask != nullptr && mask->element_count() > 0;
  const auto sizes = array.dimensions();
  return {data_of<const T>(array), masked ? data_of<const Bf16>(*mask) : nullptr, sizes[0], sizes[1]};
}

// Calls run(multiplier, given) with the best multiplier here, or that of a name, and `given` of an array's dtype.
template <typename Visit>
ffi::Error with_multiplier(std::string_view name, ffi::DataType type, const Visit& run) {
  const auto of_type = [&](auto multiplier) {
    type == ffi::DataType::BF16 ? run(multiplier, Bf16{}) : run(multiplier, float{});
    return ffi::Error::Success();
  };
  if (name != "avx512_bf16" && Amx::runs_here()) return of_type(Amx{});
  if (name != "amx" && Avx512Bf16::runs_here()) return of_type(Avx512Bf16{});
  return invalid("this processor does not multiply bfloat16, or not so");
}

ffi::Error product_handler(ffi::ThreadPool threads, ffi::AnyBuffer x, ffi::AnyBuffer mask, F32s weights, F32s bias,
                           ffi::Result<BF16s> packed, ffi::Result<ffi::AnyBuffer> out, bool transposed, bool relu,
                           std::string_view multiplier) {
  return with_multiplier(multiplier, x.element_type(), [&](auto unit, auto given) {
    const auto run = [&](auto* to) {
      product<decltype(unit)>(threads, matrix_of<decltype(given)>(x, &mask), matrix_of<float>(weights), transposed,
                              data_of<Bf16>(*packed), output_of(data_or_null(bias), relu, out->dimensions()[1], to));
    };
    out->element_type() == ffi::DataType::F32 ? run(data_of<float>(*out)) : run(data_of<Bf16>(*out));
  });
}

ffi::Error parameter_gradients_handler(ffi::ThreadPool threads, BF16s x, ffi::AnyBuffer g, ffi::AnyBuffer mask,
                                       ffi::Result<BF16s> packed, ffi::Result<F32s> weights, ffi::Result<F32s> bias,
                                       std::string_view multiplier) {
  return with_multiplier(multiplier, g.element_type(), [&](auto unit, auto given) {
    parameter_gradients<decltype(unit)>(threads, matrix_of<Bf16>(x), matrix_of<decltype(given)>(g, &mask),
                                        data_of<Bf16>(*packed), weights->typed_data(), bias->typed_data());
  });
}

// Calls run(numbers) with those of an array of float32 or bfloat16.
template <typename Run>
ffi::Error with_numbers(const ffi::AnyBuffer& array, const Run& run) {
  if (!Avx512Bf16::runs_here()) return invalid("this processor does not round to bfloat16");
  array.element_type() == ffi::DataType::BF16 ? run(data_of<const Bf16>(array)) : run(data_of<const float>(array));
  return ffi::Error::Success();
}

ffi::Error cross_sum_handler(ffi::ThreadPool threads, BF16s first, BF16s u, ffi::AnyBuffer x,
                             ffi::Result<BF16s> rounded, ffi::Result<F32s> y) {
  return with_numbers(x, [&](const auto* given) {
    for_each_part(threads, first.element_count(),
                  CrossSum<std::decay_t<decltype(*given)>>{data_of<const Bf16>(first), data_of<const Bf16>(u), given,
                                                           data_of<Bf16>(*rounded), data_or_null(*y)});
  });
}

// `sum` is what first_grad begins with, in its memory, or nothing.
ffi::Error cross_grads_handler(ffi::ThreadPool threads, ffi::AnyBuffer above, ffi::AnyBuffer x_above, BF16s first,
                               BF16s u, F32s sum, ffi::Result<F32s> g, ffi::Result<BF16s> u_grad,
                               ffi::Result<F32s> first_grad) {
  return with_numbers(above, [&](const auto* given) {
    for_each_part(threads, first.element_count(),
                  CrossGrads<std::decay_t<decltype(*given)>>{
                      given, x_above.element_count() > 0 ? data_of<const Bf16>(x_above) : nullptr,
                      data_of<const Bf16>(first), data_of<const Bf16>(u), sum.element_count() > 0, data_or_null(*g),
                      data_of<Bf16>(*u_grad), first_grad->typed_data()});
  });
}

#endif

}  // namespace
}  // namespace dlrm

namespace ffi = xla::ffi;
using dlrm::BF16s, dlrm::F32s;

// Whether this processor multiplies bfloat16, and the library has handlers for it.
EXPORT int dlrm_multiplies_bf16() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  return dlrm::Amx::runs_here() || dlrm::Avx512Bf16::runs_here();
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_cross_sum, dlrm::cross_sum_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<BF16s>()
                                  .Arg<BF16s>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<BF16s>()
                                  .Ret<F32s>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dlrm_cross_grads, dlrm::cross_grads_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<BF16s>()
                                  .Arg<BF16s>()
                                  .Arg<F32s>()
                                  .Ret<F32s>()
                                  .Ret<BF16s>()
                                  .Ret<F32s>());

#endif

#pragma GCC visibility pop
