// Entry points of the sparse rows: which entries of each row's gradient matter, and the two products with them.
#include <vector>

#include "sparse_kernels.h"
#include "views.h"

namespace fastrl {
namespace {

const SparseKernels& kernels_of(Isa isa) {
#if defined(__x86_64__)
  return table_of<SparseKernels>(isa, {baseline::sparse_kernels, avx2::sparse_kernels, avx512::sparse_kernels});
#else
  return table_of<SparseKernels>(isa, {baseline::sparse_kernels, baseline::sparse_kernels, baseline::sparse_kernels});
#endif
}

bool is_int32(const TensorView& tensor) {
  const DLDataType dtype = tensor.dtype();
  return dtype.code == kDLInt && dtype.bits == 32 && dtype.lanes == 1;
}

DType wide(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

SparseRows sparse_rows_of(const TensorView& counts, const TensorView& indices, const TensorView& values, double* left) {
  const std::int64_t rows = counts.size(0);
  check_rows(counts, rows, false, "counts must be (N,) and contiguous");
  for (const TensorView* entries : {&indices, &values}) {
    require(entries->ndim() == 2 && entries->size(0) == rows && entries->size(1) >= 1 && entries->IsContiguous(),
            "indices and values must be (N, K) and contiguous");
  }
  require(is_int32(counts) && is_int32(indices), "counts and indices must be int32");
  require(values.size(1) == indices.size(1), "indices and values must have the same number of places");
  require(rows * indices.size(1) < (std::int64_t{1} << 31), "the entries of one call must be fewer than 2^31");
  return {static_cast<std::int32_t*>(counts.data_ptr()), static_cast<std::int32_t*>(indices.data_ptr()),
          values.data_ptr(), left, indices.size(1)};
}

void require_indices(const SparseRows& rows, std::int64_t n, std::int64_t vocab) {
  for (std::int64_t i = 0; i < n; ++i) {
    require(rows.counts[i] <= rows.capacity, "counts must be at most K");
    for (std::int64_t j = 0; j < rows.counts[i]; ++j) {
      const std::int32_t index = rows.indices[i * rows.capacity + j];
      require(index >= 0 && index < vocab, "indices must be in [0, V)");
    }
  }
}

void sparse_rows(TensorView logits, TensorView labels, TensorView inv_temperatures, double inv_temperature,
                 double logit_scale, double softcap, std::int64_t ignore_index, TensorView logprobs,
                 TensorView entropy, TensorView logsumexp, TensorView residual, TensorView grad_logprobs,
                 TensorView grad_entropy, TensorView grad_logsumexp, double tail_mass,
                 double threshold, std::int64_t candidates, std::int64_t min_entries, TensorView counts, TensorView indices,
                 TensorView values, TensorView left, int isa, std::int64_t num_threads) {
  const RowProblem problem =
      problem_of(logits, labels, inv_temperatures, inv_temperature, logit_scale, softcap, ignore_index);
  const std::int64_t rows = logits.size(0);
  for (const TensorView* output : {&logprobs, &entropy, &logsumexp}) {
    check_rows(*output, rows, false, "outputs must be (N,) and contiguous");
  }
  check_rows(residual, rows, true, "residual must be (N,) and contiguous");
  for (const TensorView* grad : {&grad_logprobs, &grad_entropy, &grad_logsumexp}) {
    check_rows(*grad, rows, true, "gradients must be (N,) and contiguous");
  }
  check_rows(left, rows, false, "left must be (N,) and contiguous");
  require(dtype_of(left) == DType::kFloat64, "left must be float64");
  require(counts.ndim() == 1 && counts.size(0) == rows, "counts must be (N,)");
  require(dtype_of(values) == dtype_of(logits), "values must have the dtype of the logits");
  const SparseRows found = sparse_rows_of(counts, indices, values, static_cast<double*>(left.data_ptr()));
  const SparseFn kernel = kernels_of(static_cast<Isa>(isa)).rows[static_cast<int>(dtype_of(logits))];
  require(kernel != nullptr, "logits must be float32 or float64");
  const BackwardArgs args{logprobs.data_ptr(),
                          entropy.data_ptr(),
                          logsumexp.data_ptr(),
                          data_or_null<const void>(residual),
                          data_or_null<const void>(grad_logprobs),
                          data_or_null<const void>(grad_entropy),
                          data_or_null<const void>(grad_logsumexp),
                          nullptr,
                          0};
  const SparseRule rule{tail_mass, threshold, candidates, min_entries};
  for_each_chunk(rows, problem.vocab, num_threads,
                 [&](std::int64_t begin, std::int64_t end) { kernel(problem, args, rule, found, begin, end); });
}

void sparse_times_matrix(TensorView counts, TensorView indices, TensorView values, TensorView matrix, TensorView out,
                         int isa, std::int64_t num_threads) {
  const SparseRows rows = sparse_rows_of(counts, indices, values, nullptr);
  require(matrix.ndim() == 2 && (matrix.size(1) == 1 || matrix.stride(1) == 1), "matrix must be (V, D), last stride 1");
  require(out.ndim() == 2 && out.size(0) == counts.size(0) && out.size(1) == matrix.size(1) && out.IsContiguous(),
          "out must be (N, D) and contiguous");
  const DType dtype = dtype_of(matrix);
  require(dtype_of(values) == wide(dtype) && dtype_of(out) == wide(dtype),
          "values and out must be float64 for a float64 matrix, else float32");
  require_indices(rows, counts.size(0), matrix.size(0));
  const TimesMatrixFn kernel = kernels_of(static_cast<Isa>(isa)).times_matrix[static_cast<int>(dtype)];
  constexpr std::int64_t kEntriesPerRow = 1 << 13;  // rows per chunk follow from it
  for_each_chunk(counts.size(0), kEntriesPerRow, num_threads, [&](std::int64_t begin, std::int64_t end) {
    kernel(rows, matrix.data_ptr(), row_stride(matrix), matrix.size(1), out.data_ptr(), begin, end);
  });
}

// Positions in (N, K) of all entries, grouped by index, in row order within an index: a counting sort.
std::vector<std::int32_t> grouped(const SparseRows& rows, std::int64_t n, std::int64_t vocab) {
  std::vector<std::int32_t> next(static_cast<std::size_t>(vocab) + 1, 0);
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < rows.counts[i]; ++j) {
      ++next[static_cast<std::size_t>(rows.indices[i * rows.capacity + j]) + 1];
    }
  }
  for (std::size_t v = 1; v < next.size(); ++v) next[v] += next[v - 1];
  std::vector<std::int32_t> order(static_cast<std::size_t>(next.back()));
  for (std::int64_t i = 0; i < n; ++i) {
    for (std::int64_t j = 0; j < rows.counts[i]; ++j) {
      const std::int64_t at = i * rows.capacity + j;
      order[static_cast<std::size_t>(next[static_cast<std::size_t>(rows.indices[at])]++)] =
          static_cast<std::int32_t>(at);
    }
  }
  return order;
}

void sparse_accumulate(TensorView counts, TensorView indices, TensorView values, TensorView states, TensorView total,
                       TensorView sums, std::int64_t vocab, int isa, std::int64_t num_threads) {
  const SparseRows rows = sparse_rows_of(counts, indices, values, nullptr);
  const std::int64_t n = counts.size(0);
  const DType dtype = dtype_of(values);
  require(states.ndim() == 2 && states.size(0) == n && states.IsContiguous() && dtype_of(states) == dtype,
          "states must be (N, D), contiguous, with the dtype of the values");
  require(total.numel() == 0 || (total.ndim() == 2 && total.size(0) == vocab && total.size(1) == states.size(1) &&
                                 total.IsContiguous() && dtype_of(total) == dtype),
          "total must be (V, D), contiguous, with the dtype of the values, or empty");
  check_rows(sums, vocab, true, "sums must be (V,) and contiguous, or empty");
  require(sums.numel() == 0 || dtype_of(sums) == dtype, "sums must have the dtype of the values");
  const AccumulateFn kernel = kernels_of(static_cast<Isa>(isa)).accumulate[static_cast<int>(dtype)];
  require(kernel != nullptr, "values must be float32 or float64");

  require_indices(rows, n, vocab);
  const std::vector<std::int32_t> order = grouped(rows, n, vocab);
  const auto size = static_cast<std::int64_t>(order.size());
  // A piece begins where an index does: one thread owns an index, and the sums do not depend on the pieces.
  const auto piece_start = [&](std::int64_t position) {
    while (position > 0 && position < size &&
           rows.indices[order[static_cast<std::size_t>(position)]] ==
               rows.indices[order[static_cast<std::size_t>(position) - 1]]) {
      ++position;
    }
    return std::min(position, size);
  };
  const Accumulation sum{order.data(), states.data_ptr(), states.size(1), data_or_null(total), data_or_null(sums)};
  constexpr std::int64_t kEntriesPerPiece = 512;
  const std::int64_t pieces = (size + kEntriesPerPiece - 1) / kEntriesPerPiece;
  const int threads = static_cast<int>(std::max<std::int64_t>(1, std::min(num_threads, pieces)));
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (std::int64_t p = 0; p < pieces; ++p) {
    kernel(rows, sum, piece_start(p * kEntriesPerPiece), piece_start((p + 1) * kEntriesPerPiece));
  }
}

}  // namespace
}  // namespace fastrl

// The export macros expand to functions that leave a parameter unused.
#pragma GCC diagnostic ignored "-Wunused-parameter"
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_rows, fastrl::sparse_rows);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_times_matrix, fastrl::sparse_times_matrix);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(sparse_accumulate, fastrl::sparse_accumulate);
