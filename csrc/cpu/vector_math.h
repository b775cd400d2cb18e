// e^(rate d) and tanh on registers. Both let NaN through, which -ffast-math would not.
#pragma once

#include "simd.h"

namespace fastrl {
namespace FASTRL_ISA {

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLog2ETail = 2.0355273740931033e-17;  // log2(e) - kLog2E

// 2^f on |f| <= 1/2.
inline Vec<float> exp2_fraction(Vec<float> f) {
  // (2^f - 1) / f by Chebyshev interpolation: the error, 4e-9, is a fifteenth of a rounding. Exactly 1 at f = 0.
  Vec<float> p = broadcast(1.5453561402005238e-4f);
  p = fma(p, f, broadcast(1.3391323592631223e-3f));
  p = fma(p, f, broadcast(9.618081807260493e-3f));
  p = fma(p, f, broadcast(5.5503562479538596e-2f));
  p = fma(p, f, broadcast(2.4022650762136585e-1f));
  p = fma(p, f, broadcast(6.931471882073744e-1f));
  return fma(p, f, broadcast(1.0f));
}
inline Vec<double> exp2_fraction(Vec<double> f) {
  // Taylor: the first term left out, (f ln 2)^14 / 14!, is below 5e-18.
  constexpr double kLn2 = 0.69314718055994530942;
  constexpr int kDegree = 13;
  double coefficient[kDegree + 1] = {1.0};
  for (int k = 1; k <= kDegree; ++k) coefficient[k] = coefficient[k - 1] * kLn2 / k;
  Vec<double> p = broadcast(coefficient[kDegree]);
  for (int k = kDegree - 1; k >= 0; --k) p = fma(p, f, broadcast(coefficient[k]));
  return p;
}

// d -> e^(rate d) for rate > 0. `clamp` first: it bounds d from below so that the result is exactly 0 there (and at
// -inf) while d stays finite, so that 0 * d in the entropy is 0. From above, rate d must stay below 88 (709 for double).
template <class Real>
class ScaledExp {
 public:
  explicit ScaledExp(double rate) {
    const double high = static_cast<Real>(rate * kLog2E);
    const double low = std::fma(rate, kLog2E, -high) + rate * kLog2ETail;
    high_ = broadcast(static_cast<Real>(high));
    low_ = broadcast(static_cast<Real>(low));
    floor_ = broadcast(static_cast<Real>(-Lanes<Real>::kBias / high));
    high_head_ = head(high_);
    high_tail_ = high_ - high_head_;
  }

  // NaN compares false and passes.
  Vec<Real> clamp(Vec<Real> d) const { return floor_ > d ? floor_ : d; }

  Vec<Real> operator()(Vec<Real> d) const {
    // Adding kShift leaves round(rate d log2 e) + bias in the last bits: n by a subtraction, 2^n by a shift.
    const Vec<Real> shifted = fma(d, high_, broadcast(kShift));
    const Vec<Real> n = shifted - broadcast(kShift);
    const Vec<Real> power = bit_cast<Vec<Real>>(bit_cast<Bits<Real>>(shifted) << Lanes<Real>::kMantissaBits);
    return exp2_fraction(fma(d, low_, product_minus(d, n))) * power;
  }

 private:
  static constexpr Real kShift =
      static_cast<Real>(3ull << (Lanes<Real>::kMantissaBits - 1)) + static_cast<Real>(Lanes<Real>::kBias);

  static Vec<Real> head(Vec<Real> x) { return bit_cast<Vec<Real>>(bit_cast<Bits<Real>>(x) & Lanes<Real>::kHighHalf); }

  // d high - n with the rounding of the small result only.
  Vec<Real> product_minus(Vec<Real> d, Vec<Real> n) const {
    if constexpr (kFusedMultiplyAdd) return fma(d, high_, -n);
    const Vec<Real> d_head = head(d);  // the product of two heads is exact
    return (d_head * high_head_ - n) + (d_head * high_tail_ + (d - d_head) * high_);
  }

  Vec<Real> high_, low_, floor_, high_head_, high_tail_;
};

// tanh on |u| <= 20.
inline Vec<float> tanh_bounded(Vec<float> u, const ScaledExp<float>& exp2u) {
  const Bits<float> sign = bit_cast<Bits<float>>(u) & 0x80000000u;
  const Vec<float> magnitude = bit_cast<Vec<float>>(bit_cast<Bits<float>>(u) ^ sign);
  const Vec<float> large = 1.0f - 2.0f / (exp2u(magnitude) + 1.0f);
  const Bits<float> large_signed = bit_cast<Bits<float>>(large) | sign;
  // (tanh(u) / u - 1) / u^2, minimax on |u| <= 0.625 (error 1.6e-10): near 0 the form above loses relative precision.
  const Vec<float> s = u * u;
  Vec<float> q = broadcast(2.1496780092766943e-3f);
  q = fma(q, s, broadcast(-8.18527472857333e-3f));
  q = fma(q, s, broadcast(2.170416042274976e-2f));
  q = fma(q, s, broadcast(-5.3947458616389186e-2f));
  q = fma(q, s, broadcast(1.3333213221144436e-1f));
  q = fma(q, s, broadcast(-3.3333330989372933e-1f));
  const Vec<float> small = fma(q * s, u, u);
  return magnitude < 0.625f ? small : bit_cast<Vec<float>>(large_signed);
}
inline Vec<double> tanh_bounded(Vec<double> u, const ScaledExp<double>&) {
  for (int lane = 0; lane < Lanes<double>::kCount; ++lane) u[lane] = std::tanh(u[lane]);
  return u;
}

}  // namespace FASTRL_ISA
}  // namespace fastrl
