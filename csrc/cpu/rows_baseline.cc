// The row kernels for any 64-bit processor that the compiler targets by default (SSE2 on x86-64, NEON on AArch64).
#define FASTRL_ISA baseline
#define FASTRL_VECTOR_BYTES 16
#include "row_impl.h"
#include "sparse_impl.h"

namespace fastrl {
namespace baseline {
const RowKernels& row_kernels() { return table(); }
const SparseKernels& sparse_kernels() { return sparse_table(); }
}  // namespace baseline
}  // namespace fastrl
