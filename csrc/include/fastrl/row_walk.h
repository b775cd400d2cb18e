// How a row of logits is walked by the threads of a thread-block cluster: 16 bytes at a time, any alignment.
//
// A row is cut into one slice per block of the cluster, a slice into vectors of 16 bytes counted from its first entry,
// and vector i belongs to thread i mod the number of threads. Slices depend on V and the dtype alone, so a row's sums
// are the same at any address and in any batch. A row that does not start on a 16-byte boundary is read as the two
// aligned vectors around each vector, shifted together.
//
// Compiles for the host and for CUDA devices: on a host, loops over ranks and threads stand for the cluster.
#pragma once

#include "fastrl/row_kernels.h"
#include "fastrl/row_math.h"

namespace fastrl {
namespace rows {

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// Call `body` with a value of the storage type of a dtype.
template <class Body>
void with_entries(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32: return body(float{});
    case DType::kBFloat16: return body(BFloat16{});
    case DType::kFloat16: return body(Float16{});
    case DType::kFloat64: return body(double{});
  }
}

constexpr int kVectorBytes = 16;

struct alignas(kVectorBytes) Vector {
  std::uint32_t word[4];
};

// ---------------------------------------------------------------------------------------------------------------------
// The plan of a row

constexpr int kMaxCluster = 8;  // the largest that every device with clusters can launch
constexpr int kMaxThreads = 512;
// Up to this many bytes of a row per block, four blocks share a multiprocessor's 227 KiB: while one waits for the
// cluster or for memory, the others work. Not yet tuned on a device.
constexpr std::int64_t kSliceBytes = 48 * 1024;
constexpr std::int64_t kSharedLimit = 224 * 1024;  // a block's shared memory, without its few static bytes
constexpr std::int64_t kMaxVocab = std::int64_t{1} << 30;

struct ClusterPlan {
  int cluster;                // blocks per row
  int threads;                // per block
  int slice;                  // entries per block, whole vectors
  std::int64_t shared_bytes;  // per block, of a slice that is kept
  bool resident;              // whether the cluster's shared memory holds the row
};

FASTRL_INLINE ClusterPlan plan_of(std::int64_t vocab, int entry_bytes) {
  const std::int64_t vectors = (vocab * entry_bytes + kVectorBytes - 1) / kVectorBytes;
  ClusterPlan plan;
  plan.cluster = 1;
  while (plan.cluster < kMaxCluster && vectors * kVectorBytes > plan.cluster * kSliceBytes) plan.cluster *= 2;
  const std::int64_t per_block = (vectors + plan.cluster - 1) / plan.cluster;
  plan.threads = per_block <= 512 ? 128 : per_block <= 4096 ? 256 : kMaxThreads;
  plan.slice = static_cast<int>(per_block * (kVectorBytes / entry_bytes));
  plan.shared_bytes = (per_block + 1) * kVectorBytes;  // a shifted read takes in the vector behind
  plan.resident = plan.shared_bytes <= kSharedLimit;
  return plan;
}

// ---------------------------------------------------------------------------------------------------------------------
// Entries and vectors

FASTRL_INLINE float float_of_bits(std::uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}
FASTRL_INLINE std::uint32_t bits_of_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

FASTRL_INLINE float to_real(float x) { return x; }
FASTRL_INLINE double to_real(double x) { return x; }
FASTRL_INLINE float to_real(BFloat16 x) { return float_of_bits(static_cast<std::uint32_t>(x.bits) << 16); }
FASTRL_INLINE float to_real(Float16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(x.bits));
#else
  _Float16 value;
  std::memcpy(&value, &x.bits, sizeof(value));
  return static_cast<float>(value);
#endif
}

FASTRL_INLINE void from_real(float value, float* x) { *x = value; }
FASTRL_INLINE void from_real(double value, double* x) { *x = value; }
// To the nearest, ties to even.
FASTRL_INLINE void from_real(float value, BFloat16* x) {
#if defined(__CUDA_ARCH__)
  x->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
#else
  const std::uint32_t bits = bits_of_float(value);
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  x->bits = static_cast<std::uint16_t>(nan ? 0x7fff : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}
FASTRL_INLINE void from_real(float value, Float16* x) {
#if defined(__CUDA_ARCH__)
  x->bits = __half_as_ushort(__float2half_rn(value));
#else
  const _Float16 rounded = static_cast<_Float16>(value);
  std::memcpy(&x->bits, &rounded, sizeof(rounded));
#endif
}

// `Real` computes and returns what `In` stores, kCount to a vector.
template <class In>
struct Entries {
  using Real = float;
  static constexpr int kCount = kVectorBytes / static_cast<int>(sizeof(In));

  static FASTRL_INLINE In entry(const Vector& v, int i) {
    static_assert(sizeof(In) == 2, "16-bit entries, two to a word");
    return In{static_cast<std::uint16_t>(v.word[i / 2] >> (i % 2 * 16))};
  }
  static FASTRL_INLINE void set(Vector* v, int i, In x) {
    const std::uint32_t keep = i % 2 ? 0x0000ffffu : 0xffff0000u;
    v->word[i / 2] = (v->word[i / 2] & keep) | (static_cast<std::uint32_t>(x.bits) << (i % 2 * 16));
  }
};
template <>
struct Entries<float> {
  using Real = float;
  static constexpr int kCount = 4;
  static FASTRL_INLINE float entry(const Vector& v, int i) { return float_of_bits(v.word[i]); }
  static FASTRL_INLINE void set(Vector* v, int i, float x) { v->word[i] = bits_of_float(x); }
};
template <>
struct Entries<double> {
  using Real = double;
  static constexpr int kCount = 2;
  static FASTRL_INLINE double entry(const Vector& v, int i) {
#if defined(__CUDA_ARCH__)
    return __hiloint2double(static_cast<int>(v.word[2 * i + 1]), static_cast<int>(v.word[2 * i]));
#else
    double value;
    std::memcpy(&value, &v.word[2 * i], sizeof(value));
    return value;
#endif
  }
  static FASTRL_INLINE void set(Vector* v, int i, double x) {
#if defined(__CUDA_ARCH__)
    v->word[2 * i] = static_cast<std::uint32_t>(__double2loint(x));
    v->word[2 * i + 1] = static_cast<std::uint32_t>(__double2hiint(x));
#else
    std::memcpy(&v->word[2 * i], &x, sizeof(x));
#endif
  }
};

template <class In>
FASTRL_INLINE void unpack(const Vector& v, typename Entries<In>::Real (&x)[Entries<In>::kCount]) {
  FASTRL_UNROLL
  for (int i = 0; i < Entries<In>::kCount; ++i) x[i] = to_real(Entries<In>::entry(v, i));
}

template <class In>
FASTRL_INLINE Vector packed(const typename Entries<In>::Real (&x)[Entries<In>::kCount]) {
  Vector v{};
  FASTRL_UNROLL
  for (int i = 0; i < Entries<In>::kCount; ++i) {
    In entry;
    from_real(x[i], &entry);
    Entries<In>::set(&v, i, entry);
  }
  return v;
}

// The 16 bytes that begin `shift` bytes (even, below 16) into two adjacent vectors.
FASTRL_INLINE Vector shifted(const Vector& low, const Vector& high, unsigned shift) {
  std::uint32_t w[8];
  FASTRL_UNROLL
  for (int i = 0; i < 4; ++i) {
    w[i] = low.word[i];
    w[i + 4] = high.word[i];
  }
  FASTRL_UNROLL
  for (int i = 0; i < 6; ++i) w[i] = shift & 8u ? w[i + 2] : w[i];
  FASTRL_UNROLL
  for (int i = 0; i < 5; ++i) w[i] = shift & 4u ? w[i + 1] : w[i];
  Vector v;
  FASTRL_UNROLL
  for (int i = 0; i < 4; ++i) v.word[i] = shift & 2u ? (w[i] >> 16) | (w[i + 1] << 16) : w[i];
  return v;
}

template <class T>
FASTRL_INLINE unsigned misalignment(const T* p) {
  return static_cast<unsigned>(reinterpret_cast<std::uintptr_t>(p) % kVectorBytes);
}

// One access of 16 bytes: of a struct the compiler would read the words that it needs one by one.
FASTRL_INLINE Vector load(const Vector* p) {
#if defined(__CUDA_ARCH__)
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
#else
  return *p;
#endif
}

// Reads entries that lie one after another; never a byte before the first or behind the last.
template <class In>
class Reader {
 public:
  static constexpr int kCount = Entries<In>::kCount;

  FASTRL_INLINE Reader(const In* entries, int size) : entries_(entries), size_(size) {}

  FASTRL_INLINE In at(int i) const { return entries_[i]; }

  // Entries [first, first + kCount), all of them there.
  FASTRL_INLINE Vector vector(int first) const {
    const unsigned shift = misalignment(entries_ + first);
    if (shift == 0) return load(reinterpret_cast<const Vector*>(entries_ + first));
    const int before = static_cast<int>(shift / sizeof(In));
    if (first >= before && first - before + 2 * kCount <= size_) {
      const Vector* around = reinterpret_cast<const Vector*>(entries_ + (first - before));
      return shifted(load(around), load(around + 1), shift);
    }
    return part(first, kCount);
  }

  // Entries [first, first + count), the rest 0.
  FASTRL_INLINE Vector part(int first, int count) const {
    Vector v{};
    FASTRL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (i < count) Entries<In>::set(&v, i, entries_[first + i]);
    }
    return v;
  }

 private:
  const In* entries_;
  int size_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Walks of one thread through its block's slice

struct Slice {
  int begin, end;  // entries of the row; may be empty
};

FASTRL_INLINE Slice slice_of(int rank, int entries, int vocab) {
  const std::int64_t begin = static_cast<std::int64_t>(rank) * entries, end = begin + entries;
  return {static_cast<int>(begin < vocab ? begin : vocab), static_cast<int>(end < vocab ? end : vocab)};
}

constexpr int kInFlight = 4;  // vectors that a thread asks for before it uses the first

template <class In, bool kSoftcap>
FASTRL_INLINE void add_vector(Partial<typename Entries<In>::Real>* part, const Vector& v, int first, int end, int label,
                              const RowScale<typename Entries<In>::Real>& scale) {
  using Real = typename Entries<In>::Real;
  constexpr int kCount = Entries<In>::kCount;
  Real u[kCount];
  unpack<In>(v, u);
  FASTRL_UNROLL
  for (int i = 0; i < kCount; ++i) u[i] = position<kSoftcap>(u[i], scale.slope);
  const bool has_label = label >= first && label < first + kCount;
  if (has_label || end - first < kCount) {
    FASTRL_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if (first + i == label || first + i >= end) u[i] = -infinity<Real>();
    }
  }
  add_entries(part, u, scale.k);
}

// Sums over the thread's vectors of a slice, the label's entry left out. `keep(first, vector)` sees each vector.
template <class In, bool kSoftcap, class Keep>
FASTRL_INLINE Partial<typename Entries<In>::Real> thread_partial(const Reader<In>& row, Slice slice, int label, int thread,
                                                                 int threads,
                                                                 const RowScale<typename Entries<In>::Real>& scale,
                                                                 const Keep& keep) {
  constexpr int kCount = Entries<In>::kCount;
  auto part = empty_partial<typename Entries<In>::Real>();
  const int step = threads * kCount;
  int first = slice.begin + thread * kCount;
  for (; first + (kInFlight - 1) * step + kCount <= slice.end; first += kInFlight * step) {
    Vector vectors[kInFlight];
    FASTRL_UNROLL
    for (int i = 0; i < kInFlight; ++i) vectors[i] = row.vector(first + i * step);
    FASTRL_UNROLL
    for (int i = 0; i < kInFlight; ++i) {
      keep(first + i * step, vectors[i]);
      add_vector<In, kSoftcap>(&part, vectors[i], first + i * step, slice.end, label, scale);
    }
  }
  for (; first < slice.end; first += step) {
    const int count = slice.end - first;
    const Vector v = count >= kCount ? row.vector(first) : row.part(first, count);
    keep(first, v);
    add_vector<In, kSoftcap>(&part, v, first, slice.end, label, scale);
  }
  return part;
}

// Write the thread's part of a slice of `out`: whole vectors where `out` is aligned, single entries around them.
// `vector(first)` and `entry(i)` give what is written there.
template <class In, class VectorAt, class EntryAt>
FASTRL_INLINE void write_slice(In* out, Slice slice, int thread, int threads, const VectorAt& vector,
                               const EntryAt& entry) {
  constexpr int kCount = Entries<In>::kCount;
  const int over = static_cast<int>(misalignment(out + slice.begin) / sizeof(In));
  const int size = slice.end - slice.begin;
  const int wanted = over == 0 ? 0 : kCount - over;
  const int body = slice.begin + (wanted < size ? wanted : size);
  const int tail = body + (slice.end - body) / kCount * kCount;
  for (int i = slice.begin + thread; i < body; i += threads) out[i] = entry(i);
  for (int first = body + thread * kCount; first < tail; first += threads * kCount) {
    *reinterpret_cast<Vector*>(out + first) = vector(first);
  }
  for (int i = tail + thread; i < slice.end; i += threads) out[i] = entry(i);
}

// Write the gradient of a slice. `source` holds the row's entries from `offset` on.
template <class In, bool kSoftcap>
FASTRL_INLINE void write_gradient(In* out, Slice slice, const Reader<In>& source, int offset, int label,
                                  const RowGradient<typename Entries<In>::Real>& row, int thread, int threads) {
  using Real = typename Entries<In>::Real;
  constexpr int kCount = Entries<In>::kCount;
  const auto vector = [&](int first) {
    Real x[kCount];
    unpack<In>(source.vector(first - offset), x);
    FASTRL_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = entry_gradient<kSoftcap>(x[i], first + i == label, row);
    return packed<In>(x);
  };
  const auto entry = [&](int i) {
    In x;
    from_real(entry_gradient<kSoftcap>(static_cast<Real>(to_real(source.at(i - offset))), i == label, row), &x);
    return x;
  };
  write_slice(out, slice, thread, threads, vector, entry);
}

template <class In>
FASTRL_INLINE void fill_slice(In* out, Slice slice, typename Entries<In>::Real value, int thread, int threads) {
  typename Entries<In>::Real values[Entries<In>::kCount];
  FASTRL_UNROLL
  for (int i = 0; i < Entries<In>::kCount; ++i) values[i] = value;
  In filler;
  from_real(value, &filler);
  const Vector fillers = packed<In>(values);
  write_slice(out, slice, thread, threads, [&](int) { return fillers; }, [&](int) { return filler; });
}

}  // namespace rows
}  // namespace fastrl
