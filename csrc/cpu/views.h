// What the entry points share: the choice of the instruction set, and OpenMP over rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "fastrl/row_kernels.h"
#include "fastrl/tensor_views.h"

namespace fastrl {

inline bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (isa == Isa::kAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  }
#endif
  return isa == Isa::kBaseline;
}

// The table of an instruction set that this processor has.
template <class Table>
const Table& table_of(Isa isa, const Table& (*const (&tables)[kIsas])()) {
  if (!isa_supported(isa)) {
    TVM_FFI_THROW(ValueError) << "this processor lacks instruction set " << static_cast<int>(isa);
  }
  return tables[static_cast<int>(isa)]();
}

inline RowProblem problem_of(const TensorView& logits, const TensorView& labels, const TensorView& inv_temperatures,
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

}  // namespace fastrl
