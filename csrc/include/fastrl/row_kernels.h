// The table of row kernels that every instruction set provides. Plain pointers: no framework header.
//
// Legend: N rows, V vocabulary. z = softcap tanh(logit_scale x / softcap) inv_temperature, or
// z = logit_scale x inv_temperature where softcap is 0; p = softmax(z), H = -sum p log p.
#pragma once

#include <cstdint>

namespace fastrl {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
constexpr int kDTypes = 4;

enum class Isa : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };
constexpr int kIsas = 3;

// What forward and backward share. Row i starts at logits + i * row_stride elements; its entries are adjacent.
struct RowProblem {
  const void* logits;               // (N, V)
  std::int64_t row_stride;          // in elements
  std::int64_t vocab;               // V >= 1
  const std::int64_t* labels;       // (N,)
  const double* inv_temperatures;   // (N,), or null: inv_temperature for every row
  double inv_temperature;
  double logit_scale;
  double softcap;  // 0: none
  std::int64_t ignore_index;
};

// Results are double for double logits and float otherwise.
struct ForwardOutputs {
  void* logprobs;   // (N,)
  void* entropy;    // (N,)
  void* logsumexp;  // (N,)
  void* residual;   // (N,) or null: what rounding took from logsumexp, relative to frame_of(logsumexp)
};

// Gradients have the dtype of the results; a null gradient is zero. `out` has the dtype of the logits and may be them.
struct BackwardArgs {
  const void* logprobs;        // (N,), as forward returned them, and so the next three
  const void* entropy;         // (N,)
  const void* logsumexp;       // (N,)
  const void* residual;        // (N,) or null: without it most rows are summed again
  const void* grad_logprobs;   // (N,) or null
  const void* grad_entropy;    // (N,) or null
  const void* grad_logsumexp;  // (N,) or null
  void* out;                   // (N, V)
  std::int64_t out_stride;     // in elements
};

// Both handle the rows [begin, end); a row's result depends on that row alone.
using ForwardFn = void (*)(const RowProblem&, const ForwardOutputs&, std::int64_t begin, std::int64_t end);
using BackwardFn = void (*)(const RowProblem&, const BackwardArgs&, std::int64_t begin, std::int64_t end);

struct RowKernels {
  ForwardFn forward[kDTypes];
  BackwardFn backward[kDTypes];
};

namespace baseline {
const RowKernels& row_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const RowKernels& row_kernels();
}
namespace avx512 {
const RowKernels& row_kernels();
}
#endif

}  // namespace fastrl
