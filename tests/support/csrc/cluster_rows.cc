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
  double inverse_temperature, slope, factor;
  bool softcap;
  std::int64_t ignore_index;
};

template <class Real>
Real value_at(const TensorView& column, std::int64_t i, Real otherwise) {
  return column.numel() == 0 ? otherwise : static_cast<const Real*>(column.data_ptr())[i];
}

// One row: what each of its blocks works with.
template <class In, bool kSoftcap>
class HostRow {
 public:
  using Real = typename Entries<In>::Real;

  HostRow(const HostRows& rows, std::int64_t i)
      : vocab_(static_cast<int>(rows.logits.size(1))),
        entries_(static_cast<const In*>(rows.logits.data_ptr()) + i * row_stride(rows.logits)),
        scale_(row_scale(rows.slope, rows.factor,
                         value_at(rows.inverse_temperatures, i, static_cast<Real>(rows.inverse_temperature)))) {
    const std::int64_t given = static_cast<const std::int64_t*>(rows.labels.data_ptr())[i];
    ignored_ = given == rows.ignore_index;
    label_ = given >= 0 && given < vocab_ ? static_cast<int>(given) : -1;
  }

  // The results, and in `kept` what the blocks keep of their slices.
  RowResult<Real> forward(const ClusterPlan& plan, std::vector<std::vector<Vector>>* kept) const {
    if (ignored_) return {0, 0, 0, 0};
    Lanes<Real> blocks;
    for (int rank = 0; rank < plan.cluster; ++rank) {
      const Slice slice = slice_of(rank, plan.slice, vocab_);
      kept->emplace_back(plan.slice / Entries<In>::kCount + 1);
      const auto keep = [&](int first, const Vector& v) {
        kept->back().at(static_cast<std::size_t>((first - slice.begin) / Entries<In>::kCount)) = v;
      };
      Lanes<Real> warps;
      for (int warp = 0; warp < plan.threads / kWarp; ++warp) {
        Lanes<Real> lanes;
        for (int lane = 0; lane < kWarp; ++lane) {
          lanes.push_back(thread_partial<In, kSoftcap>(Reader<In>(entries_, vocab_), slice, label_, warp * kWarp + lane,
                                                       plan.threads, scale_, keep));
        }
        warps.push_back(merged_over_lanes(lanes, scale_.k));
      }
      blocks.push_back(merged_over_lanes(warps, scale_.k));
    }
    if (label_ < 0) return nan_result<Real>();
    const Real u_label = position<kSoftcap>(static_cast<Real>(to_real(entries_[label_])), scale_.slope);
    return finished(u_label, merged_over_lanes(blocks, scale_.k), scale_);
  }

  // The gradient of a slice from `source`, which holds the row's entries from `offset` on.
  void backward(In* out, Slice slice, const Reader<In>& source, int offset, const RowResult<Real>& result,
                const RowUpstream<Real>& upstream, int threads) const {
    for (int thread = 0; thread < threads; ++thread) {
      if (ignored_ || (label_ >= 0 && upstream.zero())) {
        fill_slice(out, slice, Real(0), thread, threads);
      } else if (label_ < 0) {
        fill_slice(out, slice, not_a_number<Real>(), thread, threads);
      } else {
        write_gradient<In, kSoftcap>(out, slice, source, offset, label_, row_gradient(result, upstream, scale_), thread,
                                     threads);
      }
    }
  }

  int vocab() const { return vocab_; }
  const In* entries() const { return entries_; }

 private:
  int vocab_, label_;
  const In* entries_;
  RowScale<Real> scale_;
  bool ignored_;
};

template <class Body>
void for_each_row(const HostRows& rows, const Body& body) {
  with_entries(dtype_of(rows.logits), [&](auto entry) {
    using In = decltype(entry);
    for (std::int64_t i = 0; i < rows.logits.size(0); ++i) {
      if (rows.softcap) {
        body(i, HostRow<In, true>(rows, i), entry);
      } else {
        body(i, HostRow<In, false>(rows, i), entry);
      }
    }
  });
}

int entry_bytes(const TensorView& logits) { return logits.dtype().bits / 8; }

// `given` is (cluster, threads, slice), or empty for the plan that a device takes.
ClusterPlan chosen_plan(const TensorView& logits, const TensorView& given) {
  ClusterPlan plan = plan_of(logits.size(1), entry_bytes(logits));
  if (given.numel() == 3) {
    const std::int64_t* chosen = static_cast<const std::int64_t*>(given.data_ptr());
    plan.cluster = static_cast<int>(chosen[0]);
    plan.threads = static_cast<int>(chosen[1]);
    plan.slice = static_cast<int>(chosen[2]);
  }
  return plan;
}

template <class Real>
void store(const TensorView (&results)[4], std::int64_t i, const RowResult<Real>& result) {
  const Real values[4] = {result.logprob, result.entropy, result.logsumexp, result.residual};
  for (int j = 0; j < 4; ++j) static_cast<Real*>(results[j].data_ptr())[i] = values[j];
}

template <class Real>
RowUpstream<Real> upstream_at(const TensorView (&grads)[3], std::int64_t i) {
  return {value_at(grads[0], i, Real(0)), value_at(grads[1], i, Real(0)), value_at(grads[2], i, Real(0))};
}

// The entry points have the arguments of those of csrc/cuda, but for the last one, which is the plan there.

void token_logprobs_fwd(TensorView logits, TensorView labels, TensorView inverse_temperatures,
                        double inverse_temperature, double slope, double factor, bool softcap,
                        std::int64_t ignore_index, TensorView logprobs, TensorView entropy, TensorView logsumexp,
                        TensorView residual, TensorView plan) {
  const HostRows rows{logits, labels, inverse_temperatures, inverse_temperature, slope, factor, softcap, ignore_index};
  const TensorView results[4] = {logprobs, entropy, logsumexp, residual};
  for_each_row(rows, [&](std::int64_t i, const auto& row, auto) {
    std::vector<std::vector<Vector>> kept;
    store(results, i, row.forward(chosen_plan(logits, plan), &kept));
  });
}

void token_logprobs_bwd(TensorView logits, TensorView labels, TensorView inverse_temperatures,
                        double inverse_temperature, double slope, double factor, bool softcap,
                        std::int64_t ignore_index, TensorView logprobs, TensorView entropy, TensorView logsumexp,
                        TensorView residual, TensorView grad_logprobs, TensorView grad_entropy,
                        TensorView grad_logsumexp, TensorView out, TensorView plan) {
  const HostRows rows{logits, labels, inverse_temperatures, inverse_temperature, slope, factor, softcap, ignore_index};
  const TensorView grads[3] = {grad_logprobs, grad_entropy, grad_logsumexp};
  const ClusterPlan chosen = chosen_plan(logits, plan);
  for_each_row(rows, [&](std::int64_t i, const auto& row, auto entry) {
    using In = decltype(entry);
    using Real = typename Entries<In>::Real;
    const Real nan = not_a_number<Real>();
    const RowResult<Real> result{value_at(logprobs, i, nan), value_at(entropy, i, nan), value_at(logsumexp, i, nan),
                                 value_at(residual, i, nan)};
    In* out_row = static_cast<In*>(out.data_ptr()) + i * row_stride(out);
    for (int rank = 0; rank < chosen.cluster; ++rank) {
      row.backward(out_row, slice_of(rank, chosen.slice, row.vocab()), Reader<In>(row.entries(), row.vocab()), 0, result,
                   upstream_at<Real>(grads, i), chosen.threads);
    }
  });
}

void token_logprobs_fwd_bwd(TensorView logits, TensorView labels, TensorView inverse_temperatures,
                            double inverse_temperature, double slope, double factor, bool softcap,
                            std::int64_t ignore_index, TensorView logprobs, TensorView entropy, TensorView logsumexp,
                            TensorView residual, TensorView grad_logprobs, TensorView grad_entropy,
                            TensorView grad_logsumexp, TensorView out, TensorView plan) {
  const HostRows rows{logits, labels, inverse_temperatures, inverse_temperature, slope, factor, softcap, ignore_index};
  const TensorView results[4] = {logprobs, entropy, logsumexp, residual};
  const TensorView grads[3] = {grad_logprobs, grad_entropy, grad_logsumexp};
  const ClusterPlan chosen = chosen_plan(logits, plan);
  for_each_row(rows, [&](std::int64_t i, const auto& row, auto entry) {
    using In = decltype(entry);
    using Real = typename Entries<In>::Real;
    std::vector<std::vector<Vector>> kept;
    const RowResult<Real> result = row.forward(chosen, &kept);
    store(results, i, result);
    kept.resize(chosen.cluster);  // an ignored row keeps nothing and reads nothing
    In* out_row = static_cast<In*>(out.data_ptr()) + i * row_stride(out);
    for (int rank = 0; rank < chosen.cluster; ++rank) {
      const Slice slice = slice_of(rank, chosen.slice, row.vocab());
      const Reader<In> source(reinterpret_cast<const In*>(kept[rank].data()), chosen.slice + Entries<In>::kCount);
      row.backward(out_row, slice, source, slice.begin, result, upstream_at<Real>(grads, i), chosen.threads);
    }
  });
}

bool row_is_resident(std::int64_t vocab, int entry_bytes) { return plan_of(vocab, entry_bytes).resident; }

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
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_fwd, fastrl::rows::token_logprobs_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_bwd, fastrl::rows::token_logprobs_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_is_resident, fastrl::rows::row_is_resident);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_fwd_bwd, fastrl::rows::token_logprobs_fwd_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(plan, fastrl::rows::plan);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(tanh_and_slopes, fastrl::rows::tanh_and_slopes);
