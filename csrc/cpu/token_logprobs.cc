// Entry points of the row kernels: tensor views in, the instruction set chosen at run time, OpenMP over rows.
#include "views.h"

namespace fastrl {
namespace {

const RowKernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  return table_of<RowKernels>(isa, {baseline::row_kernels, avx2::row_kernels, avx512::row_kernels});
#else
  return table_of<RowKernels>(isa, {baseline::row_kernels, baseline::row_kernels, baseline::row_kernels});
#endif
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
