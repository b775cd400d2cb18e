// Checked tensor views, for the entry points of every backend.
//
// The public operations have validated shapes, strides and dtypes. Checked again here are the assumptions that would
// otherwise read or write out of bounds.
#pragma once

#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <cstdint>

#include "fastrl/row_kernels.h"

namespace fastrl {

using tvm::ffi::TensorView;

inline DType dtype_of(const TensorView& tensor) {
  const DLDataType dtype = tensor.dtype();
  if (dtype.lanes == 1) {
    if (dtype.code == kDLFloat && dtype.bits == 32) return DType::kFloat32;
    if (dtype.code == kDLBfloat && dtype.bits == 16) return DType::kBFloat16;
    if (dtype.code == kDLFloat && dtype.bits == 16) return DType::kFloat16;
    if (dtype.code == kDLFloat && dtype.bits == 64) return DType::kFloat64;
  }
  TVM_FFI_THROW(ValueError) << "logits must be float32, bfloat16, float16 or float64";
  throw;  // unreachable
}

inline void require(bool condition, const char* what) {
  if (!condition) TVM_FFI_THROW(ValueError) << what;
}

// An absent tensor arrives as an empty one.
template <class T = void>
T* data_or_null(const TensorView& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.data_ptr());
}

inline void check_rows(const TensorView& tensor, std::int64_t rows, bool optional, const char* what) {
  const bool absent = optional && tensor.numel() == 0;
  require(absent || (tensor.ndim() == 1 && tensor.size(0) == rows && tensor.IsContiguous()), what);
}

inline std::int64_t row_stride(const TensorView& tensor) { return tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1); }

}  // namespace fastrl
