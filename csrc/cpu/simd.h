// Vectors of one register, in the compiler's portable vector extension, and the conversions of 16-bit floats.
//
// Included by one source file per instruction set, which defines FASTRL_ISA (the namespace), FASTRL_VECTOR_BYTES and,
// where the set has it, FASTRL_X86_FMA. Everything lives in that namespace, so that no function compiled for
// a newer set can be picked by the linker for an older one.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

namespace fastrl {
namespace FASTRL_ISA {

struct BFloat16 {
  std::uint16_t bits;
};
struct Half {
  std::uint16_t bits;
};

template <class Real>
struct Lanes;

template <>
struct Lanes<float> {
  static constexpr int kCount = FASTRL_VECTOR_BYTES / 4;
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr std::uint32_t kHighHalf = 0xfffff000u;  // sign, exponent and the upper 12 bits of the significand
  typedef float Vec __attribute__((vector_size(FASTRL_VECTOR_BYTES)));
  typedef std::uint32_t Bits __attribute__((vector_size(FASTRL_VECTOR_BYTES)));
  typedef std::uint16_t Short __attribute__((vector_size(FASTRL_VECTOR_BYTES / 2)));
};

template <>
struct Lanes<double> {
  static constexpr int kCount = FASTRL_VECTOR_BYTES / 8;
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr std::uint64_t kHighHalf = 0xfffffffff8000000u;  // the upper 26 bits of the significand
  typedef double Vec __attribute__((vector_size(FASTRL_VECTOR_BYTES)));
  typedef std::uint64_t Bits __attribute__((vector_size(FASTRL_VECTOR_BYTES)));
};

template <class Real>
using Vec = typename Lanes<Real>::Vec;
template <class Real>
using Bits = typename Lanes<Real>::Bits;

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class Real>
inline Vec<Real> broadcast(Real value) {
  return value - Vec<Real>{};
}

// a b + c, rounded once where the instruction set can (kFusedMultiplyAdd).
#if defined(FASTRL_X86_FMA) && FASTRL_VECTOR_BYTES == 64
constexpr bool kFusedMultiplyAdd = true;
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
}
#elif defined(FASTRL_X86_FMA)
constexpr bool kFusedMultiplyAdd = true;
inline Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return (Vec<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
}
#else
constexpr bool kFusedMultiplyAdd = false;
template <class V>
inline V fma(V a, V b, V c) {
  return a * b + c;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 16-bit floats. U is an unsigned 32-bit integer or a vector of them, F the float of that shape.

template <class F, class U>
inline U float_bits_of_half(U half) {
  const U magnitude = half & 0x7fffu;
  // The exponent is rebiased by a product, which also makes subnormal halves exact normal floats.
  const U finite = bit_cast<U>(bit_cast<F>(magnitude << 13) * 0x1p112f);
  const U value = magnitude >= 0x7c00u ? finite | 0x7f800000u : finite;
  return value | ((half & 0x8000u) << 16);
}

template <class F, class U>
inline U half_of_float_bits(U bits) {
  const U sign = bits & 0x80000000u;
  const U magnitude = bits ^ sign;
  const U not_a_number = (magnitude & 0u) + 0x7e00u;
  const U infinite = (magnitude & 0u) + 0x7c00u;
  // Adding 0.5 aligns the last bit of a subnormal half with the last bit of the float sum, so the adder rounds.
  const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - 0x3f000000u;
  const U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? infinite : half;
  half = magnitude > 0x7f800000u ? not_a_number : half;
  return half | (sign >> 16);
}

template <class U>
inline U bfloat16_of_float_bits(U bits) {
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U quiet = (bits >> 16) | 0x40u;
  return (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
}

inline double to_real(double x) { return x; }
inline float to_real(float x) { return x; }
inline float to_real(BFloat16 x) { return bit_cast<float>(std::uint32_t{x.bits} << 16); }
inline float to_real(Half x) { return bit_cast<float>(float_bits_of_half<float>(std::uint32_t{x.bits})); }

inline void from_real(double value, double* out) { *out = value; }
inline void from_real(float value, float* out) { *out = value; }
inline void from_real(float value, BFloat16* out) {
  out->bits = static_cast<std::uint16_t>(bfloat16_of_float_bits(bit_cast<std::uint32_t>(value)));
}
inline void from_real(float value, Half* out) {
  out->bits = static_cast<std::uint16_t>(half_of_float_bits<float>(bit_cast<std::uint32_t>(value)));
}

// ---------------------------------------------------------------------------------------------------------------------
// One register from or to memory of any alignment.

inline Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline Bits<float> load_short(const void* p) {
  Lanes<float>::Short v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Bits<float>);
}
inline Vec<float> load(const BFloat16* p) { return bit_cast<Vec<float>>(load_short(p) << 16); }
inline Vec<float> load(const Half* p) { return bit_cast<Vec<float>>(float_bits_of_half<Vec<float>>(load_short(p))); }

inline void store(Vec<double> v, double* p) { std::memcpy(p, &v, sizeof v); }
inline void store(Vec<float> v, float* p) { std::memcpy(p, &v, sizeof v); }
inline void store_short(Bits<float> v, void* p) {
  const auto narrow = __builtin_convertvector(v, Lanes<float>::Short);
  std::memcpy(p, &narrow, sizeof narrow);
}
inline void store(Vec<float> v, BFloat16* p) { store_short(bfloat16_of_float_bits(bit_cast<Bits<float>>(v)), p); }
inline void store(Vec<float> v, Half* p) { store_short(half_of_float_bits<Vec<float>>(bit_cast<Bits<float>>(v)), p); }

}  // namespace FASTRL_ISA
}  // namespace fastrl
