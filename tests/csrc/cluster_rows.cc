// The row kernels of csrc/cuda on a host: loops over the blocks of a cluster and their threads call the same functions
// in the same order, arrays stand for shuffles and for distributed shared memory. What differs is the device's exp2,
// log and log1p.
#include <vector>

#include "fastrl/row_walk.h"
#include "fastrl/tensor_views.h"

namespace fastrl {
namespace rows {
namespace {

constexpr int kWarp = 32;

template <class Real>
using Lanes = std::vector<Partial<Real>>;

// What every lane of a warp holds after the exchange.
template <class Real>
Partial<Real> merged_over_lanes(Lanes<Real> lanes, Real k) {
  lanes.resize(kWarp, empty_partial<Real>());
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const Lanes<Real> before = lanes;
    for (int lane = 0; lane < kWarp; ++lane) lanes[lane] = merged(before[lane], before[lane ^ offset], k);
  }
  for (const Partial<Real>& lane : lanes) {
    require(std::memcmp(&lane, &lanes[0], sizeof(lane)) == 0 || !(lane.sum == lane.sum), "lanes must agree bit for bit");
  }
  return lanes[0];
}

struct HostRows {
  TensorView logits, labels, inverse_temperatures;
  double slope, factor;
  std::int64_t ignore_index;
  int cluster, threads, slice;
};

template <class In, bool kSoftcap>
void host_row(const HostRows& rows, std::int64_t i, const TensorView (&results)[4], const TensorView (&grads)[3],
              const TensorView& out_rows) {
  using Real = typename Entries<In>::Real;
  const int vocab = static_cast<int>(rows.logits.size(1));
  const In* entries = static_cast<const In*>(rows.logits.data_ptr()) + i * row_stride(rows.logits);
  In* out = static_cast<In*>(out_rows.data_ptr()) + i * row_stride(out_rows);
  const std::int64_t given = static_cast<const std::int64_t*>(rows.labels.data_ptr())[i];
  const int label = given >= 0 && given < vocab ? static_cast<int>(given) : -1;
  const RowScale<Real> scale =
      row_scale(rows.slope, rows.factor, static_cast<const Real*>(rows.inverse_temperatures.data_ptr())[i]);
  const bool ignored = given == rows.ignore_index;

  std::vector<std::vector<Vector>> kept(rows.cluster);
  Lanes<Real> blocks;
  for (int rank = 0; rank < rows.cluster; ++rank) {
    const Slice slice = slice_of(rank, rows.slice, vocab);
    kept[rank].resize(rows.slice / Entries<In>::kCount + 1);
    if (ignored) continue;
    const auto keep = [&](int first, const Vector& v) {
      kept[rank].at(static_cast<std::size_t>((first - slice.begin) / Entries<In>::kCount)) = v;
    };
    Lanes<Real> warps;
    for (int warp = 0; warp < rows.threads / kWarp; ++warp) {
      Lanes<Real> lanes;
      for (int lane = 0; lane < kWarp; ++lane) {
        lanes.push_back(thread_partial<In, kSoftcap>(Reader<In>(entries, vocab), slice, label, warp * kWarp + lane,
                                                     rows.threads, scale, keep));
      }
      warps.push_back(merged_over_lanes(lanes, scale.k));
    }
    blocks.push_back(merged_over_lanes(warps, scale.k));
  }

  RowResult<Real> result{0, 0, 0, 0};
  if (!ignored && label < 0) result = nan_result<Real>();
  if (!ignored && label >= 0) {
    const Real u_label = position<kSoftcap>(static_cast<Real>(to_real(entries[label])), scale.slope);
    result = finished(u_label, merged_over_lanes(blocks, scale.k), scale);
  }
  const Real values[4] = {result.logprob, result.entropy, result.logsumexp, result.residual};
  for (int j = 0; j < 4; ++j) static_cast<Real*>(results[j].data_ptr())[i] = values[j];

  RowUpstream<Real> upstream;
  Real* const parts[3] = {&upstream.logprob, &upstream.entropy, &upstream.logsumexp};
  for (int j = 0; j < 3; ++j) *parts[j] = static_cast<const Real*>(grads[j].data_ptr())[i];
  for (int rank = 0; rank < rows.cluster; ++rank) {
    const Slice slice = slice_of(rank, rows.slice, vocab);
    for (int thread = 0; thread < rows.threads; ++thread) {
      if (ignored || (label >= 0 && upstream.zero())) {
        fill_slice(out, slice, Real(0), thread, rows.threads);
      } else if (label < 0) {
        fill_slice(out, slice, not_a_number<Real>(), thread, rows.threads);
      } else {
        const Reader<In> source(reinterpret_cast<const In*>(kept[rank].data()), rows.slice + Entries<In>::kCount);
        write_gradient<In, kSoftcap>(out, slice, source, slice.begin, label, row_gradient(result, upstream, scale),
                                     thread, rows.threads);
      }
    }
  }
}

template <class In>
void host_rows(const HostRows& rows, bool softcap, const TensorView (&results)[4], const TensorView (&grads)[3],
               const TensorView& out) {
  for (std::int64_t i = 0; i < rows.logits.size(0); ++i) {
    (softcap ? host_row<In, true> : host_row<In, false>)(rows, i, results, grads, out);
  }
}

// `plan` is (cluster, threads, slice), or empty for the one that a device takes.
void token_logprobs_fwd_bwd(TensorView logits, TensorView labels, TensorView inverse_temperatures, double slope,
                            double factor, bool softcap, std::int64_t ignore_index, TensorView logprobs,
                            TensorView entropy, TensorView logsumexp, TensorView residual, TensorView grad_logprobs,
                            TensorView grad_entropy, TensorView grad_logsumexp, TensorView out, TensorView plan) {
  const DType dtype = dtype_of(logits);
  const int bytes = dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
  const ClusterPlan own = plan_of(logits.size(1), bytes);
  HostRows rows{logits, labels, inverse_temperatures, slope, factor, ignore_index, own.cluster, own.threads, own.slice};
  if (plan.numel() == 3) {
    const std::int64_t* chosen = static_cast<const std::int64_t*>(plan.data_ptr());
    rows.cluster = static_cast<int>(chosen[0]);
    rows.threads = static_cast<int>(chosen[1]);
    rows.slice = static_cast<int>(chosen[2]);
  }
  const TensorView results[4] = {logprobs, entropy, logsumexp, residual};
  const TensorView grads[3] = {grad_logprobs, grad_entropy, grad_logsumexp};
  switch (dtype) {
    case DType::kFloat32: return host_rows<float>(rows, softcap, results, grads, out);
    case DType::kBFloat16: return host_rows<BFloat16>(rows, softcap, results, grads, out);
    case DType::kFloat16: return host_rows<Float16>(rows, softcap, results, grads, out);
    case DType::kFloat64: return host_rows<double>(rows, softcap, results, grads, out);
  }
}

// (cluster, threads, slice, shared bytes, resident) of a row.
void plan(std::int64_t vocab, std::int64_t entry_bytes, TensorView result) {
  const ClusterPlan plan = plan_of(vocab, static_cast<int>(entry_bytes));
  std::int64_t* values = static_cast<std::int64_t*>(result.data_ptr());
  values[0] = plan.cluster;
  values[1] = plan.threads;
  values[2] = plan.slice;
  values[3] = plan.shared_bytes;
  values[4] = plan.resident;
}

// tanh(a) and its slope, per entry.
void tanh_and_slopes(TensorView a, TensorView tanh, TensorView slope) {
  for (std::int64_t i = 0; i < a.numel(); ++i) {
    if (dtype_of(a) == DType::kFloat64) {
      static_cast<double*>(tanh.data_ptr())[i] =
          tanh_and_slope(static_cast<const double*>(a.data_ptr())[i], static_cast<double*>(slope.data_ptr()) + i);
    } else {
      static_cast<float*>(tanh.data_ptr())[i] =
          tanh_and_slope(static_cast<const float*>(a.data_ptr())[i], static_cast<float*>(slope.data_ptr()) + i);
    }
  }
}

}  // namespace
}  // namespace rows
}  // namespace fastrl

// The export macros expand to functions that leave a parameter unused.
#pragma GCC diagnostic ignored "-Wunused-parameter"
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_fwd_bwd, fastrl::rows::token_logprobs_fwd_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, fastrl::rows::plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tanh_and_slopes, fastrl::rows::tanh_and_slopes);
