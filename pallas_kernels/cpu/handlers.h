// What all handlers need: names of buffers, errors, and what is visible outside the library.
#pragma once

#include "xla/ffi/api/ffi.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace dlrm {

namespace ffi = xla::ffi;
using F32s = ffi::Buffer<ffi::DataType::F32>;
using S32s = ffi::Buffer<ffi::DataType::S32>;
using U32s = ffi::Buffer<ffi::DataType::U32>;
using BF16s = ffi::Buffer<ffi::DataType::BF16>;

inline ffi::Error invalid(const char* message) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, message); }

// An array that was left out is passed with no element.
template <typename Array>
auto* data_or_null(const Array& array) {
  return array.element_count() == 0 ? nullptr : array.typed_data();
}

}  // namespace dlrm
