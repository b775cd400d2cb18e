// Kernels over rows of logits for devices with thread-block clusters (compute capability 9.0).
//
// `row_kernel`: one cluster per row. Each block reads its slice of the row once, 16 bytes at a time, and sums it in
// registers; the blocks exchange their sums through distributed shared memory, and every thread of the cluster then
// knows the row's results. With kGradient the slices stay in the blocks' shared memory meanwhile, and the gradient is
// written from there: one read and one write of the logits.
//
// `gradient_kernel`: the gradient of rows whose results are known, one read and one write, no exchange.
//
// No atomics, and the order of every sum is fixed by V and the dtype: the same bits each time, in any batch.
#pragma once

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include "fastrl/row_walk.h"

namespace fastrl {
namespace rows {

// What forward and backward share. Row i starts at logits + i * row_stride entries; its entries are adjacent.
struct DeviceRows {
  const void* logits;  // (N, V)
  std::int64_t row_stride;
  int vocab;
  int slice;                         // entries per block
  const std::int64_t* labels;        // (N,)
  const void* inverse_temperatures;  // (N,) of the results' dtype, or null: inverse_temperature for every row
  double inverse_temperature;
  double slope, factor;  // z = factor tanh(slope x) inverse_temperature, or factor slope x inverse_temperature
  std::int64_t ignore_index;
  std::int64_t first_row;
};

// Of the results' dtype, float or double.
struct DeviceResults {
  void* logprobs;   // (N,), and so the next three
  void* entropy;
  void* logsumexp;
  void* residual;
};

struct DeviceGradient {
  const void* grad_logprobs;   // (N,) of the results' dtype or null, and so the next two
  const void* grad_entropy;
  const void* grad_logsumexp;
  void* out;  // (N, V) of the dtype of the logits; may be them
  std::int64_t out_stride;
};

template <class Real>
__device__ __forceinline__ Real value_at(const void* values, std::int64_t i, Real otherwise) {
  return values != nullptr ? static_cast<const Real*>(values)[i] : otherwise;
}

template <class Real>
__device__ __forceinline__ RowUpstream<Real> upstream_at(const DeviceGradient& gradient, std::int64_t row) {
  return {value_at(gradient.grad_logprobs, row, Real(0)), value_at(gradient.grad_entropy, row, Real(0)),
          value_at(gradient.grad_logsumexp, row, Real(0))};
}

template <class Real>
__device__ __forceinline__ RowScale<Real> scale_at(const DeviceRows& rows, std::int64_t row) {
  return row_scale(rows.slope, rows.factor,
                   value_at(rows.inverse_temperatures, row, static_cast<Real>(rows.inverse_temperature)));
}

// The label as an index of the row, or -1 where it is none.
__device__ __forceinline__ int label_of(std::int64_t label, int vocab) {
  return label >= 0 && label < vocab ? static_cast<int>(label) : -1;
}

template <class Real>
__device__ __forceinline__ void store_results(const DeviceResults& results, std::int64_t row,
                                              const RowResult<Real>& result) {
  static_cast<Real*>(results.logprobs)[row] = result.logprob;
  static_cast<Real*>(results.entropy)[row] = result.entropy;
  static_cast<Real*>(results.logsumexp)[row] = result.logsumexp;
  static_cast<Real*>(results.residual)[row] = result.residual;
}

constexpr int kWarp = 32;

// The sums of all lanes, in every lane: merging is symmetric, so that both partners of an exchange get the same bits.
template <class Real>
__device__ __forceinline__ Partial<Real> merged_over_lanes(Partial<Real> part, Real k) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Partial<Real> other{__shfl_xor_sync(0xffffffffu, part.max, offset),
                              __shfl_xor_sync(0xffffffffu, part.sum, offset),
                              __shfl_xor_sync(0xffffffffu, part.weighted, offset)};
    part = merged(part, other, k);
  }
  return part;
}

// A cluster barrier in two halves. Arriving releases what the thread wrote, waiting acquires what others wrote.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Blocks of kMaxThreads that a multiprocessor must hold: 64 registers a thread, which double does not get by with.
template <class In>
constexpr int kResidentBlocks = sizeof(typename Entries<In>::Real) == 4 ? 2 : 1;

template <class In, bool kSoftcap, bool kGradient>
__global__ void __launch_bounds__(kMaxThreads, kResidentBlocks<In>)
    row_kernel(const __grid_constant__ DeviceRows rows, const __grid_constant__ DeviceResults results,
               const __grid_constant__ DeviceGradient gradient) {
  using Real = typename Entries<In>::Real;
  namespace cg = cooperative_groups;
  __shared__ Partial<Real> of_warps[kMaxThreads / kWarp];
  __shared__ Partial<Real> of_blocks[kMaxCluster];
  extern __shared__ Vector kept[];

  const cg::cluster_group cluster = cg::this_cluster();
  const int blocks = static_cast<int>(cluster.num_blocks()), rank = static_cast<int>(cluster.block_rank());
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int lane = thread % kWarp, warp = thread / kWarp;
  const std::int64_t row = rows.first_row + blockIdx.x / blocks;
  const Slice slice = slice_of(rank, rows.slice, rows.vocab);
  In* out = nullptr;
  if constexpr (kGradient) out = static_cast<In*>(gradient.out) + row * gradient.out_stride;

  const std::int64_t given_label = rows.labels[row];
  if (given_label == rows.ignore_index) {  // the same for the whole cluster
    if (rank == 0 && thread == 0) store_results<Real>(results, row, {0, 0, 0, 0});
    if constexpr (kGradient) fill_slice(out, slice, Real(0), thread, threads);
    return;
  }
  cluster_arrive();  // waited for below: a block's shared memory may be written to once the block runs

  const int label = label_of(given_label, rows.vocab);
  const RowScale<Real> scale = scale_at<Real>(rows, row);
  const In* entries = static_cast<const In*>(rows.logits) + row * rows.row_stride;
  Real u_label = not_a_number<Real>();
  if (label >= 0) u_label = position<kSoftcap>(static_cast<Real>(to_real(entries[label])), scale.slope);

  const auto keep = [&](int first, const Vector& v) {
    if constexpr (kGradient) kept[(first - slice.begin) / Entries<In>::kCount] = v;
  };
  const Reader<In> reader(entries, rows.vocab);
  const Partial<Real> of_warp = merged_over_lanes(
      thread_partial<In, kSoftcap>(reader, slice, label, thread, threads, scale, keep), scale.k);
  if (lane == 0) of_warps[warp] = of_warp;
  __syncthreads();
  cluster_wait();
  if (warp == 0) {
    const Partial<Real> of_block =
        merged_over_lanes(lane < threads / kWarp ? of_warps[lane] : empty_partial<Real>(), scale.k);
    if (lane < blocks) cluster.map_shared_rank(of_blocks, lane)[rank] = of_block;
  }
  __syncwarp();
  cluster_arrive();
  cluster_wait();

  const Partial<Real> others = merged_over_lanes(lane < blocks ? of_blocks[lane] : empty_partial<Real>(), scale.k);
  const RowResult<Real> result = label >= 0 ? finished(u_label, others, scale) : nan_result<Real>();
  if (rank == 0 && thread == 0) store_results(results, row, result);
  if constexpr (kGradient) {
    const RowUpstream<Real> upstream = upstream_at<Real>(gradient, row);
    // Selected, not multiplied: what stands in a row without a gradient cannot matter.
    if (label >= 0 && upstream.zero()) {
      fill_slice(out, slice, Real(0), thread, threads);
    } else if (label < 0) {
      fill_slice(out, slice, not_a_number<Real>(), thread, threads);
    } else {
      const Reader<In> source(reinterpret_cast<const In*>(kept), rows.slice + Entries<In>::kCount);
      write_gradient<In, kSoftcap>(out, slice, source, slice.begin, label, row_gradient(result, upstream, scale),
                                   thread, threads);
    }
  }
}

constexpr int kGradientThreads = 256;
constexpr int kGradientVectors = 8;  // per thread

// `rows.slice` entries per block; `results` are those of `row_kernel`.
template <class In, bool kSoftcap>
__global__ void __launch_bounds__(kGradientThreads, 2 * kResidentBlocks<In>)
    gradient_kernel(const __grid_constant__ DeviceRows rows, const __grid_constant__ DeviceResults results,
                    const __grid_constant__ DeviceGradient gradient, const int blocks_per_row) {
  using Real = typename Entries<In>::Real;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const std::int64_t row = rows.first_row + blockIdx.x / blocks_per_row;
  const Slice slice = slice_of(static_cast<int>(blockIdx.x % blocks_per_row), rows.slice, rows.vocab);
  In* out = static_cast<In*>(gradient.out) + row * gradient.out_stride;
  const std::int64_t given_label = rows.labels[row];
  const int label = label_of(given_label, rows.vocab);
  const RowUpstream<Real> upstream = upstream_at<Real>(gradient, row);
  const RowScale<Real> scale = scale_at<Real>(rows, row);
  // Selected, not multiplied: what stands in a row without a gradient cannot matter, and is not read.
  if (given_label == rows.ignore_index || (label >= 0 && upstream.zero())) {
    fill_slice(out, slice, Real(0), thread, threads);
    return;
  }
  if (label < 0) {
    fill_slice(out, slice, not_a_number<Real>(), thread, threads);
    return;
  }
  const Real nan = not_a_number<Real>();
  const RowResult<Real> kept{value_at(results.logprobs, row, nan), value_at(results.entropy, row, nan),
                             value_at(results.logsumexp, row, nan), value_at(results.residual, row, nan)};
  const Reader<In> source(static_cast<const In*>(rows.logits) + row * rows.row_stride, rows.vocab);
  write_gradient<In, kSoftcap>(out, slice, source, 0, label, row_gradient(kept, upstream, scale), thread, threads);
}

}  // namespace rows
}  // namespace fastrl
