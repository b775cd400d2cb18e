// The arithmetic of one row of logits in float or double, for the host and for CUDA devices: what the threads of a
// thread-block cluster compute from their entries, how their sums merge, and the gradient.
//
// x is a logit as given; u = sign x, or tanh(slope x) under a soft cap; z = c u with c > 0 are the logits of the
// softmax; k = c log2(e), so that e^(z - z') = 2^((u - u') k). Differences are formed in u, before any scaling: a common
// offset then cancels exactly. The label's entry stays out of the sums: logp = -log1p(S_others / e_label) keeps its
// relative precision as p -> 1.
//
// Compile with contraction off (-fmad=false, -ffp-contract=off): where a product is fused into a sum is written down.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define FASTRL_INLINE __host__ __device__ __forceinline__
#define FASTRL_UNROLL _Pragma("unroll")
#else
#define FASTRL_INLINE inline
#define FASTRL_UNROLL
#endif

namespace fastrl {
namespace rows {

// ---------------------------------------------------------------------------------------------------------------------
// Numbers

template <class Real>
struct Numbers;
template <>
struct Numbers<float> {
  static constexpr float kLowest = -3.4028234663852886e38f;
};
template <>
struct Numbers<double> {
  static constexpr double kLowest = -1.7976931348623157e308;
};

constexpr double kLog2e = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
// 2^-2000 is 0. Exponents stop here, so that an entry of -inf adds 0 to the sums of p and of p log p by arithmetic
// alone (0 * -2000).
constexpr double kExponentFloor = -2000.0;

template <class Real>
FASTRL_INLINE Real infinity() {
  return static_cast<Real>(INFINITY);
}
template <class Real>
FASTRL_INLINE Real not_a_number() {
  return static_cast<Real>(NAN);
}

// The larger of the two; NaN where `x` is.
FASTRL_INLINE double at_least(double x, double low) { return x < low ? low : x; }
FASTRL_INLINE float at_least(float x, float low) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(x), "f"(low));
  return result;
#else
  return x < low ? low : x;
#endif
}

// What a row is scaled by; c is NaN where the temperature is not a positive number.
template <class Real>
struct RowScale {
  Real slope;  // from x to u, or to the argument of tanh
  Real c;      // from u to z
  Real k;      // from u to the exponent of 2
};

template <class Real>
FASTRL_INLINE RowScale<Real> row_scale(double slope, double factor, Real inverse_temperature) {
  Real c = inverse_temperature * static_cast<Real>(factor);
  if (!(inverse_temperature > 0 && c > 0 && c < infinity<Real>())) c = not_a_number<Real>();
  return {static_cast<Real>(slope), c, c * static_cast<Real>(kLog2e)};
}

// tanh(a), and 1 - tanh(a)^2 in `slope`, each with a relative error of a few roundings.
template <class Real>
FASTRL_INLINE Real tanh_and_slope(Real a, Real* slope) {
  const Real magnitude = std::fabs(a);
  const Real z = a * a;
  // Lambert's continued fraction a / (1 + z / (3 + z / (5 + ...))), cut off after 6 levels (2e-9 at |a| = 1) or
  // 8 (4e-17 at 0.7), in the form |a| (1 - z above / below): what is subtracted is small, and so are its roundings.
  Real above, below;
  bool near;
  if constexpr (sizeof(Real) == 8) {
    near = magnitude < Real(0.7);
    above = std::fma(z, std::fma(z, z + Real(594), Real(45045)), Real(675675));
    below = std::fma(z, std::fma(z, std::fma(z, z + Real(630), Real(51975)), Real(945945)), Real(2027025));
  } else {
    near = magnitude < Real(1);
    above = std::fma(z, z + Real(189), Real(3465));
    below = std::fma(z, std::fma(z, z + Real(210), Real(4725)), Real(10395));
  }
  // Elsewhere tanh|a| = 1 - r with r = 2q / (1 + q), q = e^(-2|a|), and 1 - tanh^2 = r (2 - r): nothing cancels.
  const Real q = std::exp2(magnitude * static_cast<Real>(-2.0 * kLog2e));
  const Real ratio = (near ? z * above : Real(2) * q) / (near ? below : Real(1) + q);
  const Real tanh = near ? std::fma(-magnitude, ratio, magnitude) : Real(1) - ratio;
  *slope = near ? Real(1) - tanh * tanh : ratio * (Real(2) - ratio);
  return a < Real(0) ? -tanh : tanh;
}

template <bool kSoftcap, class Real>
FASTRL_INLINE Real position(Real x, Real slope) {
  if constexpr (!kSoftcap) return x * slope;  // slope is 1 or -1: exact
  Real unused;
  return tanh_and_slope(x * slope, &unused);
}

// ---------------------------------------------------------------------------------------------------------------------
// Statistics of a part of a row

// Sums of 2^t and of t 2^t with t = (u - max) k.
template <class Real>
struct Partial {
  Real max, sum, weighted;
};

template <class Real>
FASTRL_INLINE Partial<Real> empty_partial() {
  return {Numbers<Real>::kLowest, Real(0), Real(0)};  // finite: nothing to subtract is infinite
}

template <class Real>
FASTRL_INLINE Real exponent(Real difference, Real k) {
  return at_least(difference * k, static_cast<Real>(kExponentFloor));
}

// The same sums relative to a larger max.
template <class Real>
FASTRL_INLINE Partial<Real> rescaled(const Partial<Real>& part, Real max, Real k) {
  const Real t = exponent(part.max - max, k);
  const Real e = std::exp2(t);
  return {max, e * part.sum, e * std::fma(part.sum, t, part.weighted)};
}

// Symmetric in its arguments, bit for bit.
template <class Real>
FASTRL_INLINE Partial<Real> merged(const Partial<Real>& a, const Partial<Real>& b, Real k) {
  const Real max = std::fmax(a.max, b.max);
  const Partial<Real> left = rescaled(a, max, k), right = rescaled(b, max, k);
  return {max, left.sum + right.sum, left.weighted + right.weighted};
}

template <int kCount, class Real>
FASTRL_INLINE Real tree_sum(Real (&values)[kCount]) {
  FASTRL_UNROLL
  for (int half = kCount / 2; half > 0; half /= 2) {
    FASTRL_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      if (i < half) values[i] += values[i + half];
    }
  }
  return values[0];
}

// Add entries; they are summed among themselves first, so that rounding grows with the number of additions, not of
// entries.
template <int kCount, class Real>
FASTRL_INLINE void add_entries(Partial<Real>* part, const Real (&u)[kCount], Real k) {
  Real best = u[0];
  FASTRL_UNROLL
  for (int i = 1; i < kCount; ++i) best = std::fmax(best, u[i]);  // drops NaN: the sums show it
  if (best > part->max) *part = rescaled(*part, best, k);
  Real e[kCount], weighted[kCount];
  FASTRL_UNROLL
  for (int i = 0; i < kCount; ++i) {
    const Real t = exponent(u[i] - part->max, k);
    e[i] = std::exp2(t);
    weighted[i] = e[i] * t;
  }
  part->sum += tree_sum(e);
  part->weighted += tree_sum(weighted);
}

// ---------------------------------------------------------------------------------------------------------------------
// Results of a row

template <class Real>
struct RowResult {
  Real logprob, entropy, logsumexp;
  Real residual;  // what rounding took from logsumexp, relative to frame_of(logsumexp)
};

template <class Real>
FASTRL_INLINE RowResult<Real> nan_result() {
  const Real nan = not_a_number<Real>();
  return {nan, nan, nan, nan};
}

// The log-sum-exp in units of u. Forward and backward must agree on its bits.
template <class Real>
FASTRL_INLINE Real frame_of(Real logsumexp, Real c) {
  return logsumexp / c;
}

// The results of a row from its label's u and the sums over its other entries; NaN for a row without any mass.
template <class Real>
FASTRL_INLINE RowResult<Real> finished(Real u_label, const Partial<Real>& others, const RowScale<Real>& scale) {
  const Real max = std::fmax(others.max, u_label);
  const Partial<Real> rest = rescaled(others, max, scale.k);
  const Real t_label = exponent(u_label - max, scale.k);
  const Real e_label = std::exp2(t_label);
  const Real total = rest.sum + e_label;
  if (!(total > 0)) return nan_result<Real>();
  // Where the label outweighs the rest it is the max and e_label is 1.
  const bool dominant = rest.sum <= e_label;
  const Real log_total = dominant ? std::log1p(rest.sum) : std::log(total);
  const Real weighted = std::fma(e_label, t_label, rest.weighted);
  RowResult<Real> result;
  result.logprob = dominant ? -log_total : (u_label - max) * scale.c - log_total;
  result.entropy = log_total - static_cast<Real>(kLn2) * (weighted / total);
  result.logsumexp = max * scale.c + log_total;
  result.residual = (max - frame_of(result.logsumexp, scale.c)) * scale.c + log_total;
  return result;
}

// ---------------------------------------------------------------------------------------------------------------------
// Gradient

// dL/dlogp, dL/dH, dL/dlse of a row.
template <class Real>
struct RowUpstream {
  Real logprob, entropy, logsumexp;
  FASTRL_INLINE bool zero() const { return logprob == 0 && entropy == 0 && logsumexp == 0; }
};

// dz_v = p_v (constant - per_exponent log2 p_v), log2 p_v = (u_v - frame) k + bias, all in units of x.
template <class Real>
struct RowGradient {
  Real slope, k, frame, bias, constant, per_exponent, at_label;
};

// dz_v = g (1[v = y] - p_v) - h p_v (log p_v + H) + l p_v
template <class Real>
FASTRL_INLINE RowGradient<Real> row_gradient(const RowResult<Real>& kept, const RowUpstream<Real>& grad,
                                             const RowScale<Real>& scale) {
  const Real p_label = std::exp(kept.logprob);
  Real constant = grad.logsumexp - grad.logprob;
  Real at_label = p_label * grad.logsumexp - grad.logprob * std::expm1(kept.logprob);
  if (grad.entropy != 0) {
    constant -= grad.entropy * kept.entropy;
    // p log p is 0 at p = 0, not 0 * -inf.
    at_label -= p_label > 0 ? grad.entropy * (p_label * (kept.logprob + kept.entropy)) : Real(0);
  }
  const Real per_x = scale.c * scale.slope;
  RowGradient<Real> row;
  row.slope = scale.slope;
  row.k = scale.k;
  row.frame = frame_of(kept.logsumexp, scale.c);
  row.bias = -static_cast<Real>(kLog2e) * kept.residual;
  row.constant = constant * per_x;
  row.per_exponent = grad.entropy * static_cast<Real>(kLn2) * per_x;
  row.at_label = at_label * per_x;
  return row;
}

template <bool kSoftcap, class Real>
FASTRL_INLINE Real entry_gradient(Real x, bool is_label, const RowGradient<Real>& row) {
  Real u, bend = 1;
  if constexpr (kSoftcap) {
    u = tanh_and_slope(x * row.slope, &bend);
  } else {
    u = x * row.slope;
  }
  const Real t = at_least(std::fma(u - row.frame, row.k, row.bias), static_cast<Real>(kExponentFloor));
  Real dx = std::exp2(t) * std::fma(-row.per_exponent, t, row.constant);
  dx = is_label ? row.at_label : dx;
  if constexpr (kSoftcap) dx *= bend;
  return dx;
}

}  // namespace rows
}  // namespace fastrl
