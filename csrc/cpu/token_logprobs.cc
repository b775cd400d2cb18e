// Entry points of the CPU module: tensor views in, the instruction set chosen at run time, OpenMP over rows.
//
// The Python wrapper has validated shapes, strides and dtypes; what is checked again here are the assumptions that
// would otherwise read or write out of bounds.
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/error.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>

#include "fastrl/row_kernels.h"

namespace fastrl {
namespace {

using tvm::ffi::TensorView;

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

const RowKernels& kernels_of(Isa isa) {
  if (!isa_supported(isa)) TVM_FFI_THROW(ValueError) << "this processor lacks instruction set " << static_cast<int>(isa);
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return avx2::row_kernels();
  if (isa == Isa::kAvx512) return avx512::row_kernels();
#endif
  return baseline::row_kernels();
}

DType dtype_of(const TensorView& tensor) {
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

void require(bool condition, const char* what) {
  if (!condition) TVM_FFI_THROW(ValueError) << what;
}

// An absent tensor arrives as an empty one.
template <class T = void>
T* data_or_null(const TensorView& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.data_ptr());
}

void check_rows(const TensorView& tensor, std::int64_t rows, bool optional, const char* what) {
  const bool absent = optional && tensor.numel() == 0;
  require(absent || (tensor.ndim() == 1 && tensor.size(0) == rows && tensor.IsContiguous()), what);
}

std::int64_t row_stride(const TensorView& tensor) { return tensor.size(0) > 1 ? tensor.stride(0) : tensor.size(1); }

RowProblem problem_of(const TensorView& logits, const TensorView& labels, const TensorView& inv_temperatures,
                      double inv_temperature, double logit_scale, double softcap, std::int64_t ignore_index) {
  require(logits.ndim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1), "logits must be (N, V), vocabulary stride 1");
  check_rows(labels, logits.size(0), false, "labels must be (N,) and contiguous");
  check_rows(inv_temperatures, logits.size(0), true, "inv_temperatures must be (N,) and contiguous");
  return {logits.data_ptr(),      row_stride(logits),
          logits.size(1),         static_cast<const std::int64_t*>(labels.data_ptr()),
          data_or_null<const double>(inv_temperatures), inv_temperature, logit_scale, softcap, ignore_index};
}

// Rows go out in chunks as threads ask for them: masked rows cost nothing and often stand together.
template <class Fn>
void for_each_chunk(std::int64_t rows, std::int64_t vocab, std::int64_t num_threads, const Fn& fn) {
  constexpr std::int64_t kChunkEntries = 1 << 17;
  const std::int64_t chunk = std::max<std::int64_t>(1, kChunkEntries / vocab);
  const std::int64_t chunks = (rows + chunk - 1) / chunk;
  const int threads = static_cast<int>(std::max<std::int64_t>(1, std::min(num_threads, chunks)));
  if (threads == 1) {
    fn(0, rows);
    return;
  }
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t c = 0; c < chunks; ++c) fn(c * chunk, std::min(rows, (c + 1) * chunk));
}

void token_logprobs_fwd(TensorView logits, TensorView labels, TensorView inv_temperatures, double inv_temperature,
                        double logit_scale, double softcap, std::int64_t ignore_index, TensorView logprobs,
                        TensorView entropy, TensorView logsumexp, TensorView residual, int isa,
                        std::int64_t num_threads) {
  const RowProblem problem =
      problem_of(logits, labels, inv_temperatures, inv_temperature, logit_scale, softcap, ignore_index);
  const std::int64_t rows = logits.size(0);
  for (const TensorView* out : {&logprobs, &entropy, &logsumexp}) {
    check_rows(*out, rows, false, "outputs must be (N,) and contiguous");
  }
  check_rows(residual, rows, true, "residual must be (N,) and contiguous");
  const ForwardOutputs outputs{logprobs.data_ptr(), entropy.data_ptr(), logsumexp.data_ptr(), data_or_null(residual)};
  const ForwardFn kernel = kernels_of(static_cast<Isa>(isa)).forward[static_cast<int>(dtype_of(logits))];
  for_each_chunk(rows, problem.vocab, num_threads,
                 [&](std::int64_t begin, std::int64_t end) { kernel(problem, outputs, begin, end); });
}

void token_logprobs_bwd(TensorView logits, TensorView labels, TensorView inv_temperatures, double inv_temperature,
                        double logit_scale, double softcap, std::int64_t ignore_index, TensorView logprobs,
                        TensorView entropy, TensorView logsumexp, TensorView residual, TensorView grad_logprobs,
                        TensorView grad_entropy, TensorView grad_logsumexp, TensorView out, int isa, std::int64_t num_threads) {
  const RowProblem problem =
      problem_of(logits, labels, inv_temperatures, inv_temperature, logit_scale, softcap, ignore_index);
  const std::int64_t rows = logits.size(0);
  for (const TensorView* kept : {&logprobs, &entropy, &logsumexp}) {
    check_rows(*kept, rows, false, "outputs of the forward must be (N,) and contiguous");
  }
  check_rows(residual, rows, true, "residual must be (N,) and contiguous");
  for (const TensorView* grad : {&grad_logprobs, &grad_entropy, &grad_logsumexp}) {
    check_rows(*grad, rows, true, "gradients must be (N,) and contiguous");
  }
  require(out.ndim() == 2 && out.size(0) == rows && out.size(1) == problem.vocab && dtype_of(out) == dtype_of(logits) &&
              (out.size(1) == 1 || out.stride(1) == 1),
          "out must be (N, V) with the dtype of the logits and vocabulary stride 1");
  const BackwardArgs args{logprobs.data_ptr(),
                          entropy.data_ptr(),
                          logsumexp.data_ptr(),
                          data_or_null<const void>(residual),
                          data_or_null<const void>(grad_logprobs),
                          data_or_null<const void>(grad_entropy),
                          data_or_null<const void>(grad_logsumexp),
                          out.data_ptr(),
                          row_stride(out)};
  const BackwardFn kernel = kernels_of(static_cast<Isa>(isa)).backward[static_cast<int>(dtype_of(logits))];
  for_each_chunk(rows, problem.vocab, num_threads,
                 [&](std::int64_t begin, std::int64_t end) { kernel(problem, args, begin, end); });
}

bool supports_isa(int isa) { return isa_supported(static_cast<Isa>(isa)); }

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

}  // namespace
}  // namespace fastrl

// The export macros expand to functions that leave a parameter unused.
#pragma GCC diagnostic ignored "-Wunused-parameter"
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_fwd, fastrl::token_logprobs_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_bwd, fastrl::token_logprobs_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(supports_isa, fastrl::supports_isa);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(has_openmp, fastrl::has_openmp);
