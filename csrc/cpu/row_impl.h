// One row of logits: its statistics, its log-prob and entropy, and its gradient. Templates over the dtype, compiled once
// per instruction set.
//
// A row is walked in blocks that stay in the first-level cache: the largest entry of a block first, then the sums
// relative to the largest entry so far. Lanes and order are fixed by V alone, so that a row gives the same bits at any
// address, in any batch and on any number of threads.
#pragma once

#include "fastrl/row_kernels.h"
#include "vector_math.h"

namespace fastrl {
namespace FASTRL_ISA {

using std::int64_t;

// The dtype in which a logit dtype is computed and its results are returned.
template <class In>
struct ComputeOf {
  using Real = float;
};
template <>
struct ComputeOf<double> {
  using Real = double;
};

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

constexpr int kUnroll = 4;  // registers per step: hides the latency of the sums
template <class Real>
constexpr int kStep = kUnroll * Lanes<Real>::kCount;
// Entries per block, at most 8 KiB of floats. A lane adds 32 numbers before the sums go on in double: rounding in float
// stays below 1e-6 even where every entry is equal and every addition rounds the same way.
template <class Real>
constexpr int64_t kBlock = 32 * kStep<Real>;
constexpr int64_t kPrefetch = 2048;  // entries ahead, while a block is summed from the first-level cache

// Beyond these, rate * d leaves the range in which e^(rate d) is split exactly.
template <class Real>
constexpr double kRateMin = sizeof(Real) == 4 ? 1e-30 : 1e-280;
template <class Real>
constexpr double kRateMax = sizeof(Real) == 4 ? 1e30 : 1e280;

template <class Real>
inline bool rate_in_range(double rate) {
  return rate >= kRateMin<Real> && rate <= kRateMax<Real>;
}

// z = rate * position(x) + constant, with rate > 0 and position increasing in z: the sign of the slope and the soft cap
// are in the position, the temperature in the rate.
template <class Real, bool kSoftcap>
class Position {
 public:
  Position(double logit_scale, double softcap) : sign_value_(logit_scale < 0 ? Real(-1) : Real(1)), exp2u_(2.0) {
    sign_ = broadcast(sign_value_);
    if constexpr (kSoftcap) {
      const double inner = logit_scale / softcap;
      const Real high = static_cast<Real>(inner);
      high_ = broadcast(high);
      low_ = broadcast(static_cast<Real>(inner - high));
      limit_ = broadcast(static_cast<Real>(20.0 / std::fabs(inner)));
    }
  }

  // position(x) - reference, for the broadcast reference.
  Vec<Real> minus(Vec<Real> x, Vec<Real> reference) const {
    if constexpr (kSoftcap) return (*this)(x) - reference;
    return fma(x, sign_, -reference);  // the product with 1 or -1 is exact
  }

  Vec<Real> operator()(Vec<Real> x) const {
    if constexpr (!kSoftcap) return x * sign_;
    x = x > limit_ ? limit_ : x;  // tanh is 1 there; NaN compares false and passes
    x = x < -limit_ ? -limit_ : x;
    return tanh_bounded(fma(x, high_, x * low_), exp2u_);
  }
  Real operator()(Real x) const { return (*this)(broadcast(x))[0]; }

  Vec<Real> oriented(Vec<Real> x) const { return x * sign_; }
  Real unoriented(Real x) const { return x * sign_value_; }

  // dposition/dx up to the constant slope.
  Vec<Real> derivative(Vec<Real> position) const {
    if constexpr (!kSoftcap) return broadcast(Real(1));
    return (Real(1) - position) * (Real(1) + position);
  }

 private:
  Real sign_value_;
  Vec<Real> sign_, high_, low_, limit_;
  ScaledExp<Real> exp2u_;
};

// Sums over a row relative to its largest position `reference`. The entries at the reference are counted apart in
// `top`, so that a row whose probability is nearly all in one entry keeps the relative precision of the rest.
struct RowStats {
  double reference = -kInfinity;
  double top = 0.0;       // number of entries at the reference (those found when it was set)
  double rest = 0.0;      // sum of e^(rate d) over the other entries
  double weighted = 0.0;  // sum of e^(rate d) d, at most 0

  bool valid() const { return std::isfinite(reference) && std::isfinite(rest) && std::isfinite(weighted); }
  double sum() const { return top + rest; }
  double log_sum() const { return std::log(top) + std::log1p(rest / top); }
  double mean() const { return weighted / sum(); }
};

template <class Real>
inline Real largest_lane(Vec<Real> v) {
  Real best = v[0];
  for (int lane = 1; lane < Lanes<Real>::kCount; ++lane) best = v[lane] > best ? v[lane] : best;
  return best;
}

// A partial step of `count` entries, continued with entries of probability 0.
template <class Real, class In>
struct Tail {
  Real values[kStep<Real>];
  Real live[kStep<Real>];

  Tail(const In* p, int64_t count, Real padding) {
    for (int64_t i = 0; i < kStep<Real>; ++i) {
      values[i] = i < count ? to_real(p[i]) : padding;
      live[i] = i < count ? Real(1) : Real(0);
    }
  }
};

template <class Real, class In, bool kSoftcap>
class RowScan {
 public:
  RowScan(const Position<Real, kSoftcap>& position, const ScaledExp<Real>& exp, double rate)
      : position_(position), exp_(exp), rate_(rate), padding_(position.unoriented(static_cast<Real>(-kInfinity))) {}

  // Statistics of a row; not valid() where an entry is NaN, the largest z is +inf or every z is -inf.
  RowStats operator()(const In* row, int64_t vocab) {
    for (int64_t start = 0; start < vocab; start += kBlock<Real>) {
      const In* block = row + start;
      const int64_t count = vocab - start < kBlock<Real> ? vocab - start : kBlock<Real>;
      const Real peak = block_peak(block, count);
      if (!kSoftcap && peak == static_cast<Real>(-kInfinity)) {
        if (has_nan(block, count)) return RowStats{kNan};
        continue;  // nothing to add, and no reference to subtract
      }
      const Real reference = kSoftcap ? position_(position_.unoriented(peak)) : peak;
      if (reference > stats_.reference) {
        rebase(reference);
        add_block<true>(block, count);
      } else {
        add_block<false>(block, count);
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      stats_.rest += rest_[lane];
      stats_.weighted += weighted_[lane];
    }
    return stats_;
  }

 private:
  using V = Vec<Real>;
  static constexpr int kLanes = Lanes<Real>::kCount;

  Real block_peak(const In* block, int64_t count) const {
    V peaks[kUnroll];
    for (V& peak : peaks) peak = broadcast(static_cast<Real>(-kInfinity));
    const auto step = [&](const auto* p) {
      for (int u = 0; u < kUnroll; ++u) {
        const V x = position_.oriented(load(p + u * kLanes));
        peaks[u] = x > peaks[u] ? x : peaks[u];  // NaN compares false: the sums show it
      }
    };
    int64_t i = 0;
    for (; i + kStep<Real> <= count; i += kStep<Real>) step(block + i);
    if (i < count) step(Tail<Real, In>(block + i, count - i, padding_).values);
    const V low = peaks[0] > peaks[1] ? peaks[0] : peaks[1];
    const V high = peaks[2] > peaks[3] ? peaks[2] : peaks[3];
    return largest_lane<Real>(low > high ? low : high);
  }

  static bool has_nan(const In* block, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      if (std::isnan(to_real(block[i]))) return true;
    }
    return false;
  }

  // Express the sums so far relative to a larger reference.
  void rebase(Real reference) {
    if (stats_.reference > -kInfinity) {
      const double shift = stats_.reference - static_cast<double>(reference);
      const double factor = std::exp(rate_ * shift);
      rest_[0] += stats_.top;
      for (int lane = 0; lane < kLanes; ++lane) {
        weighted_[lane] = factor * (weighted_[lane] + shift * rest_[lane]);
        rest_[lane] *= factor;
      }
    }
    stats_.reference = reference;
    stats_.top = 0.0;
  }

  // Add a block; with kNewReference the entries at the reference are counted instead of summed.
  template <bool kNewReference>
  void add_block(const In* block, int64_t count) {
    const V reference = broadcast(static_cast<Real>(stats_.reference));
    V rest[kUnroll] = {}, weighted[kUnroll] = {}, top = {};
    const auto step = [&](const auto* p, const Real* live) {
      for (int u = 0; u < kUnroll; ++u) {
        const V d = exp_.clamp(position_.minus(load(p + u * kLanes), reference));
        V e = exp_(d);
        V one = broadcast(Real(1));
        if (live != nullptr) {
          one = load(live + u * kLanes);
          e *= one;
        }
        if constexpr (kNewReference) {
          top += d == 0 ? one : V{};
          e = d == 0 ? V{} : e;
        }
        rest[u] += e;
        weighted[u] = fma(e, d, weighted[u]);
      }
    };
    int64_t i = 0;
    for (; i + kStep<Real> <= count; i += kStep<Real>) {
      for (int64_t line = 0; line < kStep<Real>; line += 64 / static_cast<int64_t>(sizeof(In))) {
        __builtin_prefetch(block + i + kPrefetch + line);
      }
      step(block + i, nullptr);
    }
    if (i < count) {
      const Tail<Real, In> tail(block + i, count - i, padding_);
      step(tail.values, tail.live);
    }
    const V rest_sum = (rest[0] + rest[1]) + (rest[2] + rest[3]);
    const V weighted_sum = (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
    for (int lane = 0; lane < kLanes; ++lane) {
      rest_[lane] += rest_sum[lane];
      weighted_[lane] += weighted_sum[lane];
      if constexpr (kNewReference) stats_.top += top[lane];
    }
  }

  const Position<Real, kSoftcap>& position_;
  const ScaledExp<Real>& exp_;
  const double rate_;
  const Real padding_;
  RowStats stats_;
  double rest_[kLanes] = {}, weighted_[kLanes] = {};
};

// What a row is scaled by; `usable` is false where the temperature makes the row NaN.
template <class Real>
struct RowScale {
  double rate;   // of the position
  double slope;  // dz/dx where the soft cap does not bend
  bool usable;

  RowScale(const RowProblem& problem, int64_t row) {
    const double inverse = problem.inv_temperatures ? problem.inv_temperatures[row] : problem.inv_temperature;
    slope = problem.logit_scale * inverse;
    rate = problem.softcap > 0.0 ? problem.softcap * inverse : std::fabs(slope);
    usable = inverse > 0.0 && rate_in_range<Real>(rate);
    if (problem.softcap > 0.0) usable = usable && rate_in_range<Real>(std::fabs(problem.logit_scale) / problem.softcap);
  }
};

struct RowResult {
  double logprob = kNan, entropy = kNan, logsumexp = kNan, residual = kNan;
};

// The position of a row's rounded log-sum-exp: forward and backward must agree on its bits.
template <class Real>
inline Real frame_of(Real logsumexp, double rate) {
  return static_cast<Real>(static_cast<double>(logsumexp) / rate);
}

template <class Real, class In, bool kSoftcap>
RowResult row_forward(const In* row, int64_t label, const RowProblem& problem, const RowScale<Real>& scale) {
  const Position<Real, kSoftcap> position(problem.logit_scale, problem.softcap);
  const ScaledExp<Real> exp(scale.rate);
  const RowStats stats = RowScan<Real, In, kSoftcap>(position, exp, scale.rate)(row, problem.vocab);
  if (!stats.valid()) return {};
  const double log_sum = stats.log_sum();
  const double target = static_cast<double>(position(static_cast<Real>(to_real(row[label])))) - stats.reference;
  RowResult result;
  result.logprob = scale.rate * target - log_sum;
  result.entropy = log_sum - scale.rate * stats.mean();
  result.logsumexp = scale.rate * stats.reference + log_sum;
  const double frame = frame_of(static_cast<Real>(result.logsumexp), scale.rate);
  result.residual = scale.rate * (stats.reference - frame) + log_sum;
  return result;
}

template <class In>
void forward_rows(const RowProblem& problem, const ForwardOutputs& outputs, int64_t begin, int64_t end) {
  using Real = typename ComputeOf<In>::Real;
  for (int64_t i = begin; i < end; ++i) {
    const In* row = static_cast<const In*>(problem.logits) + i * problem.row_stride;
    const int64_t label = problem.labels[i];
    const RowScale<Real> scale(problem, i);
    RowResult result;
    if (label == problem.ignore_index) {
      result = {0.0, 0.0, 0.0, 0.0};
    } else if (label >= 0 && label < problem.vocab && scale.usable) {
      result = problem.softcap > 0.0 ? row_forward<Real, In, true>(row, label, problem, scale)
                                     : row_forward<Real, In, false>(row, label, problem, scale);
    }
    static_cast<Real*>(outputs.logprobs)[i] = static_cast<Real>(result.logprob);
    static_cast<Real*>(outputs.entropy)[i] = static_cast<Real>(result.entropy);
    static_cast<Real*>(outputs.logsumexp)[i] = static_cast<Real>(result.logsumexp);
    if (outputs.residual) static_cast<Real*>(outputs.residual)[i] = static_cast<Real>(result.residual);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

struct RowGradients {
  double logprob, entropy, logsumexp;  // dL/dlogp, dL/dH, dL/dlse of the row
  bool zero() const { return logprob == 0.0 && entropy == 0.0 && logsumexp == 0.0; }
};

// The gradient of an entry at distance d from the reference is e^(rate d) (constant + linear d), times the bend of the
// soft cap; the label's entry is computed apart, from 1 - p_y = -expm1(logp).
struct RowCoefficients {
  double reference, constant, linear, label;
  bool valid;
};

// What forward left of a row. Without a residual it is NaN.
struct RowKept {
  double logprob, entropy, logsumexp, residual;
};

// A residual beyond this, of a log-sum-exp of 1e9 and more, would leave the range of float as a factor.
constexpr double kTrustedResidual = 40.0;

// A log-prob above this has an absolute rounding error of at most 1.2e-7 in float: the normaliser of the row can be
// taken from it where there is no residual. Below, and for the entropy's gradient, it is summed again; the row is then
// in the cache when the gradient is written.
constexpr double kTrustedLogprob = -4.0;

// log p_v = rate (position_v - frame) - residual.
template <class Real>
RowCoefficients kept_coefficients(const RowKept& kept, const RowGradients& grad, const RowScale<Real>& scale) {
  const double frame = frame_of(static_cast<Real>(kept.logsumexp), scale.rate);
  const double unit = scale.slope * std::exp(-kept.residual);
  const double probability = std::exp(kept.logprob);
  double constant = grad.logsumexp - grad.logprob, at_label = -grad.logprob * std::expm1(kept.logprob);
  if (grad.entropy != 0.0) constant -= grad.entropy * (kept.entropy - kept.residual);
  // At probability 0 the product is 0, whatever its other factor.
  if (probability > 0.0) {
    at_label += probability * (grad.logsumexp - grad.entropy * (kept.logprob + kept.entropy));
  }
  return {frame, unit * constant, -unit * grad.entropy * scale.rate, scale.slope * at_label, true};
}

template <class Real, class In, bool kSoftcap>
RowCoefficients row_coefficients(const In* row, int64_t label, const RowKept& kept, const RowGradients& grad,
                                 const Position<Real, kSoftcap>& position, const ScaledExp<Real>& exp,
                                 const RowScale<Real>& scale, int64_t vocab) {
  const double logprob = kept.logprob;
  if (std::isfinite(kept.logsumexp) && std::fabs(kept.residual) <= kTrustedResidual) {
    return kept_coefficients<Real>(kept, grad, scale);
  }
  const double target = position(static_cast<Real>(to_real(row[label])));
  if (grad.entropy == 0.0 && logprob > kTrustedLogprob && logprob <= 0.0 && std::isfinite(target)) {
    const double probability = std::exp(logprob);
    return {target, scale.slope * (grad.logsumexp - grad.logprob) * probability, 0.0,
            scale.slope * (grad.logsumexp * probability - grad.logprob * std::expm1(logprob)), true};
  }
  const RowStats stats = RowScan<Real, In, kSoftcap>(position, exp, scale.rate)(row, vocab);
  if (!stats.valid()) return {0.0, 0.0, 0.0, 0.0, false};
  const double mean = scale.rate * stats.mean();
  const double distance = scale.rate * (target - stats.reference);
  const double exact_logprob = distance - stats.log_sum();
  const double probability = std::exp(exact_logprob);
  const double per_sum = scale.slope / stats.sum();
  double at_label = -grad.logprob * std::expm1(exact_logprob);
  // log p + H = (z - max) - mean; at probability 0 the product is 0, whatever its other factor.
  if (probability > 0.0) at_label += probability * (grad.logsumexp - grad.entropy * (distance - mean));
  return {stats.reference, per_sum * (grad.logsumexp - grad.logprob + grad.entropy * mean),
          -per_sum * grad.entropy * scale.rate, scale.slope * at_label, true};
}

template <class Real, class In, bool kSoftcap>
void write_gradient(const In* row, In* out, int64_t vocab, const RowCoefficients& coefficients,
                    const Position<Real, kSoftcap>& position, const ScaledExp<Real>& exp) {
  using V = Vec<Real>;
  constexpr int kLanes = Lanes<Real>::kCount;
  const V reference = broadcast(static_cast<Real>(coefficients.reference));
  const V constant = broadcast(static_cast<Real>(coefficients.constant));
  const V linear = broadcast(static_cast<Real>(coefficients.linear));
  const auto step = [&](const auto* from, auto* to) {
    for (int u = 0; u < kUnroll; ++u) {
      const V x = load(from + u * kLanes);
      const V d = exp.clamp(position.minus(x, reference));
      V gradient = exp(d) * fma(linear, d, constant);
      if constexpr (kSoftcap) gradient *= position.derivative(position(x));
      store(gradient, to + u * kLanes);
    }
  };
  int64_t i = 0;
  for (; i + kStep<Real> <= vocab; i += kStep<Real>) step(row + i, out + i);
  if (i < vocab) {
    const Tail<Real, In> tail(row + i, vocab - i, Real(0));
    Real gradient[kStep<Real>];
    step(tail.values, gradient);
    for (int64_t j = 0; i + j < vocab; ++j) from_real(gradient[j], out + i + j);
  }
}

template <class Real, class In, bool kSoftcap>
bool row_backward(const In* row, In* out, int64_t label, const RowKept& kept, const RowGradients& grad,
                  const RowProblem& problem, const RowScale<Real>& scale) {
  const Position<Real, kSoftcap> position(problem.logit_scale, problem.softcap);
  const ScaledExp<Real> exp(scale.rate);
  const RowCoefficients coefficients =
      row_coefficients<Real, In, kSoftcap>(row, label, kept, grad, position, exp, scale, problem.vocab);
  if (!coefficients.valid) return false;
  const Real bend = position.derivative(broadcast(position(static_cast<Real>(to_real(row[label])))))[0];
  write_gradient<Real, In, kSoftcap>(row, out, problem.vocab, coefficients, position, exp);
  from_real(static_cast<Real>(coefficients.label * bend), out + label);
  return true;
}

template <class In>
void fill_row(In* out, int64_t vocab, double value) {
  using Real = typename ComputeOf<In>::Real;
  In filler;
  from_real(static_cast<Real>(value), &filler);
  for (int64_t j = 0; j < vocab; ++j) out[j] = filler;
}

template <class Real>
inline double value_at(const void* values, int64_t i, double otherwise) {
  return values ? static_cast<double>(static_cast<const Real*>(values)[i]) : otherwise;
}

template <class In>
void backward_rows(const RowProblem& problem, const BackwardArgs& args, int64_t begin, int64_t end) {
  using Real = typename ComputeOf<In>::Real;
  for (int64_t i = begin; i < end; ++i) {
    const In* row = static_cast<const In*>(problem.logits) + i * problem.row_stride;
    In* out = static_cast<In*>(args.out) + i * args.out_stride;
    const int64_t label = problem.labels[i];
    const RowGradients grad{value_at<Real>(args.grad_logprobs, i, 0.0), value_at<Real>(args.grad_entropy, i, 0.0),
                            value_at<Real>(args.grad_logsumexp, i, 0.0)};
    const RowScale<Real> scale(problem, i);
    bool valid = false;
    if (label == problem.ignore_index) {
      fill_row(out, problem.vocab, 0.0);
      valid = true;
    } else if (label >= 0 && label < problem.vocab && scale.usable) {
      if (grad.zero()) {
        fill_row(out, problem.vocab, 0.0);  // selected, not multiplied: NaN logits under a zero gradient do not matter
        valid = true;
      } else {
        const RowKept kept{value_at<Real>(args.logprobs, i, kNan), value_at<Real>(args.entropy, i, kNan),
                           value_at<Real>(args.logsumexp, i, kNan), value_at<Real>(args.residual, i, kNan)};
        valid = problem.softcap > 0.0 ? row_backward<Real, In, true>(row, out, label, kept, grad, problem, scale)
                                      : row_backward<Real, In, false>(row, out, label, kept, grad, problem, scale);
      }
    }
    if (!valid) fill_row(out, problem.vocab, kNan);
  }
}

template <class = void>
const RowKernels& table() {
  static constexpr RowKernels kernels = {
      {forward_rows<float>, forward_rows<BFloat16>, forward_rows<Half>, forward_rows<double>},
      {backward_rows<float>, backward_rows<BFloat16>, backward_rows<Half>, backward_rows<double>},
  };
  return kernels;
}

}  // namespace FASTRL_ISA
}  // namespace fastrl
