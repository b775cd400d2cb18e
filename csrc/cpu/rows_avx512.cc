// The row kernels for x86-64 with AVX-512 (F, BW, DQ, VL).
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
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#define FASTRL_ISA avx512
#define FASTRL_VECTOR_BYTES 64
#define FASTRL_X86_FMA
#include "row_impl.h"
#include "sparse_impl.h"

namespace fastrl {
namespace avx512 {
const RowKernels& row_kernels() { return table(); }
const SparseKernels& sparse_kernels() { return sparse_table(); }
}  // namespace avx512
}  // namespace fastrl

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif  // __x86_64__
