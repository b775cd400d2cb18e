// The row kernels for x86-64 with AVX2 and FMA.
#if defined(__x86_64__)
#include <immintrin.h>

// The standard headers come before the target switches on: their inline functions must not be compiled for it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "fastrl/row_kernels.h"
#include "sparse_kernels.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif

#define FASTRL_ISA avx2
#define FASTRL_VECTOR_BYTES 32
#define FASTRL_X86_FMA
#include "row_impl.h"
#include "sparse_impl.h"

namespace fastrl {
namespace avx2 {
const RowKernels& row_kernels() { return table(); }
const SparseKernels& sparse_kernels() { return sparse_table(); }
}  // namespace avx2
}  // namespace fastrl

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
