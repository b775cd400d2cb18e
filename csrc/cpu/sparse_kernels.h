// The table of sparse-row kernels that every instruction set provides. Plain pointers: no framework header.
//
// The gradient of a peaked row has few entries that matter. A sparse row is a list of (index, value); what its other
// entries add up to in absolute value is at most a given share of the row's scale.
//
// Legend: N rows, V vocabulary, K entries that a row has room for, D hidden.
#pragma once

#include <cstdint>

#include "fastrl/row_kernels.h"

namespace fastrl {

// When a row may be sparse. Its scale is (|g| + |h| + |l|) |logit_scale| inv_temperature, for the upstream gradients
// g, h and l of its log-prob, entropy and log-sum-exp.
struct SparseRule {
  double tail_mass;          // largest sum of |gradient| left out, relative to the scale
  double threshold;          // entries below this share of `tail_mass` times the scale are left out at sight
  std::int64_t candidates;   // a row with more entries above the threshold is dense
  std::int64_t min_entries;  // beside the label's: kept even where the tail mass would allow to drop them
};

// The lists of N rows. Values are double for double logits and float otherwise.
struct SparseRows {
  std::int32_t* counts;   // (N,) entries of the row; 0: no gradient, -1: the row is dense
  std::int32_t* indices;  // (N, K) ascending within a row
  void* values;           // (N, K)
  double* left;           // (N,) sum of |gradient| left out, relative to the scale; 0 for dense rows
  std::int64_t capacity;  // K
};

// Lists the entries of the rows [begin, end); args.out is not used.
using SparseFn = void (*)(const RowProblem&, const BackwardArgs&, const SparseRule&, const SparseRows&,
                          std::int64_t begin, std::int64_t end);

// out[i] = sum of value * matrix[index] over the entries of row i, out (N, D), matrix (V, D), for rows in [begin, end).
using TimesMatrixFn = void (*)(const SparseRows&, const void* matrix, std::int64_t stride, std::int64_t dim, void* out,
                               std::int64_t begin, std::int64_t end);

// total[index] += value * states[row] and sums[index] += value over the entries in `order`, which is grouped by index.
struct Accumulation {
  const std::int32_t* order;  // positions in (N, K)
  const void* states;         // (N, D)
  std::int64_t dim;
  void* total;  // (V, D) or null
  void* sums;   // (V,) or null
};
using AccumulateFn = void (*)(const SparseRows&, const Accumulation&, std::int64_t begin, std::int64_t end);

struct SparseKernels {
  SparseFn rows[kDTypes];               // by the dtype of the logits; null for 16-bit logits
  TimesMatrixFn times_matrix[kDTypes];  // by the dtype of the matrix
  AccumulateFn accumulate[kDTypes];     // by the dtype of values, states and totals; null for 16-bit ones
};

namespace baseline {
const SparseKernels& sparse_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const SparseKernels& sparse_kernels();
}
namespace avx512 {
const SparseKernels& sparse_kernels();
}
#endif

}  // namespace fastrl
