// Sparse rows: finding the entries of a row's gradient that matter, and the two products with them. Templates over the
// dtype, compiled once per instruction set.
#pragma once

#include <algorithm>
#include <vector>

#include "row_impl.h"
#include "sparse_kernels.h"

namespace fastrl {
namespace FASTRL_ISA {

// Whether any lane of a is above b; NaN is not.
inline bool any_above(Vec<float> a, Vec<float> b) {
#if defined(FASTRL_X86_FMA) && FASTRL_VECTOR_BYTES == 64
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#elif defined(FASTRL_X86_FMA)
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_GT_OQ)) != 0;
#else
  bool any = false;
  for (int lane = 0; lane < Lanes<float>::kCount; ++lane) any |= a[lane] > b[lane];
  return any;
#endif
}
inline bool any_above(Vec<double> a, Vec<double> b) {
  bool any = false;
  for (int lane = 0; lane < Lanes<double>::kCount; ++lane) any |= a[lane] > b[lane];
  return any;
}

template <class Real>
inline Vec<Real> magnitude(Vec<Real> x) {
  constexpr auto kAllButSign = static_cast<decltype(Bits<Real>{}[0] + 0)>(-1) >> 1;
  return bit_cast<Vec<Real>>(bit_cast<Bits<Real>>(x) & kAllButSign);
}

template <class Real>
struct Entry {
  Real value;
  std::int32_t index;
};

// Walks the gradient of a row: what is above the threshold goes to a list, the rest to a sum of absolute values.
template <class Real, class In, bool kSoftcap>
class TailScan {
 public:
  TailScan(const Position<Real, kSoftcap>& position, const ScaledExp<Real>& exp, const RowCoefficients& coefficients)
      : position_(position), exp_(exp) {
    reference_ = broadcast(static_cast<Real>(coefficients.reference));
    constant_ = broadcast(static_cast<Real>(coefficients.constant));
    linear_ = broadcast(static_cast<Real>(coefficients.linear));
  }

  // Return whether the row may still be sparse: no more than `limit` left out, no more than `candidates` listed. Stops
  // at the first block that decides it, so that a flat row costs little.
  bool operator()(const In* row, int64_t vocab, int64_t label, Real threshold, double limit, int64_t candidates,
                  std::vector<Entry<Real>>& listed, double* left) {
    *left = 0.0;
    for (int64_t start = 0; start < vocab; start += kBlock<Real>) {
      const int64_t end = vocab - start < kBlock<Real> ? vocab : start + kBlock<Real>;
      *left += scan_block(row, start, end, label, threshold, listed);
      if (!(*left <= limit) || static_cast<int64_t>(listed.size()) > candidates) return false;  // NaN compares false
    }
    return true;
  }

 private:
  using V = Vec<Real>;
  static constexpr int kLanes = Lanes<Real>::kCount;

  V gradient(V x) const {
    const V d = exp_.clamp(position_.minus(x, reference_));
    V value = exp_(d) * fma(linear_, d, constant_);
    if constexpr (kSoftcap) value *= position_.derivative(position_(x));
    return value;
  }

  double scan_block(const In* row, int64_t start, int64_t end, int64_t label, Real threshold,
                    std::vector<Entry<Real>>& listed) const {
    const V bar = broadcast(threshold);
    V sums[kUnroll] = {};
    double apart = 0.0;
    V values[kUnroll];
    int64_t i = start;
    for (; i + kStep<Real> <= end; i += kStep<Real>) {
      V peak = {};
      for (int u = 0; u < kUnroll; ++u) {
        __builtin_prefetch(row + i + kPrefetch + u * kLanes);
        values[u] = gradient(load(row + i + u * kLanes));
        const V size = magnitude<Real>(values[u]);
        peak = size > peak ? size : peak;
      }
      const bool has_label = label >= i && label < i + kStep<Real>;
      if (has_label || any_above(peak, bar)) {
        apart += pick(values, i, kStep<Real>, label, threshold, listed);
        continue;
      }
      for (int u = 0; u < kUnroll; ++u) sums[u] += magnitude<Real>(values[u]);
    }
    if (i < end) {
      const Tail<Real, In> tail(row + i, end - i, Real(0));
      for (int u = 0; u < kUnroll; ++u) values[u] = gradient(load(tail.values + u * kLanes));
      apart += pick(values, i, end - i, label, threshold, listed);
    }
    const V sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    for (int lane = 0; lane < kLanes; ++lane) apart += sum[lane];
    return apart;
  }

  // List the entries above the threshold of one step; return the sum of the others. The label's entry is neither.
  static double pick(const V* values, int64_t first, int64_t count, int64_t label, Real threshold,
                     std::vector<Entry<Real>>& listed) {
    Real flat[kStep<Real>];
    for (int u = 0; u < kUnroll; ++u) store(values[u], flat + u * kLanes);
    double rest = 0.0;
    for (int64_t j = 0; j < count; ++j) {
      const int64_t index = first + j;
      if (index == label) continue;
      const Real size = std::fabs(flat[j]);
      if (size > threshold) {
        listed.push_back({flat[j], static_cast<std::int32_t>(index)});
      } else {
        rest += size;
      }
    }
    return rest;
  }

  const Position<Real, kSoftcap>& position_;
  const ScaledExp<Real>& exp_;
  V reference_, constant_, linear_;
};

// Drop the smallest listed entries while what is left out stays within the limit, down to `min_entries` of them.
// Ties go by index, so that the choice depends on the row alone.
template <class Real>
void drop_smallest(std::vector<Entry<Real>>& listed, std::vector<Entry<Real>>& scratch, int64_t min_entries,
                   double limit, double* left) {
  const int64_t count = static_cast<int64_t>(listed.size());
  if (count <= min_entries) return;
  scratch = listed;
  std::sort(scratch.begin(), scratch.end(), [](const Entry<Real>& a, const Entry<Real>& b) {
    const Real size_a = std::fabs(a.value), size_b = std::fabs(b.value);
    return size_a < size_b || (size_a == size_b && a.index > b.index);
  });
  int64_t dropped = 0;
  while (dropped < count - min_entries) {
    const double next = *left + std::fabs(static_cast<double>(scratch[dropped].value));
    if (!(next <= limit)) break;
    *left = next;
    ++dropped;
  }
  listed.assign(scratch.begin() + dropped, scratch.end());
  std::sort(listed.begin(), listed.end(),
            [](const Entry<Real>& a, const Entry<Real>& b) { return a.index < b.index; });
}

template <class Real>
struct SparseScratch {
  std::vector<Entry<Real>> listed, sorted;
};

// Whether a row is sparse; then its list is written.
template <class Real, class In, bool kSoftcap>
bool sparse_row(const RowProblem& problem, const BackwardArgs& args, const SparseRule& rule, const SparseRows& rows,
                const RowGradients& grad, const RowScale<Real>& scale, int64_t i, SparseScratch<Real>& scratch) {
  const In* row = static_cast<const In*>(problem.logits) + i * problem.row_stride;
  const int64_t label = problem.labels[i], vocab = problem.vocab;
  const Position<Real, kSoftcap> position(problem.logit_scale, problem.softcap);
  const ScaledExp<Real> exp(scale.rate);
  const RowKept kept{value_at<Real>(args.logprobs, i, kNan), value_at<Real>(args.entropy, i, kNan),
                     value_at<Real>(args.logsumexp, i, kNan), value_at<Real>(args.residual, i, kNan)};
  const RowCoefficients coefficients =
      row_coefficients<Real, In, kSoftcap>(row, label, kept, grad, position, exp, scale, vocab);
  if (!coefficients.valid) return false;
  const Real bend = position.derivative(broadcast(position(static_cast<Real>(to_real(row[label])))))[0];
  const Real at_label = static_cast<Real>(coefficients.label * bend);

  const double size = (std::fabs(grad.logprob) + std::fabs(grad.entropy) + std::fabs(grad.logsumexp)) *
                      std::fabs(scale.slope);
  const double limit = rule.tail_mass * size;
  if (!std::isfinite(limit) || !std::isfinite(at_label)) return false;
  std::vector<Entry<Real>>& listed = scratch.listed;
  listed.clear();
  double left = 0.0;
  TailScan<Real, In, kSoftcap> scan(position, exp, coefficients);
  const Real threshold = static_cast<Real>(limit * rule.threshold);
  if (!scan(row, vocab, label, threshold, limit, rule.candidates, listed, &left)) return false;
  drop_smallest(listed, scratch.sorted, rule.min_entries, limit, &left);
  // One place is the label's.
  if (static_cast<int64_t>(listed.size()) >= rows.capacity) return false;
  std::int32_t* indices = rows.indices + i * rows.capacity;
  Real* values = static_cast<Real*>(rows.values) + i * rows.capacity;
  std::int32_t count = 0;
  bool placed = false;
  for (const Entry<Real>& entry : listed) {
    if (!placed && label < entry.index) {
      indices[count] = static_cast<std::int32_t>(label);
      values[count++] = at_label;
      placed = true;
    }
    indices[count] = entry.index;
    values[count++] = entry.value;
  }
  if (!placed) {
    indices[count] = static_cast<std::int32_t>(label);
    values[count++] = at_label;
  }
  rows.counts[i] = count;
  rows.left[i] = left / size;
  return true;
}

template <class In>
void sparse_rows(const RowProblem& problem, const BackwardArgs& args, const SparseRule& rule, const SparseRows& rows,
                 int64_t begin, int64_t end) {
  using Real = typename ComputeOf<In>::Real;
  SparseScratch<Real> scratch;
  for (int64_t i = begin; i < end; ++i) {
    const int64_t label = problem.labels[i];
    const RowGradients grad{value_at<Real>(args.grad_logprobs, i, 0.0), value_at<Real>(args.grad_entropy, i, 0.0),
                            value_at<Real>(args.grad_logsumexp, i, 0.0)};
    const RowScale<Real> scale(problem, i);
    rows.left[i] = 0.0;
    rows.counts[i] = -1;
    if (label == problem.ignore_index || (label >= 0 && label < problem.vocab && scale.usable && grad.zero())) {
      rows.counts[i] = 0;
    } else if (label >= 0 && label < problem.vocab && scale.usable) {
      if (problem.softcap > 0.0) {
        sparse_row<Real, In, true>(problem, args, rule, rows, grad, scale, i, scratch);
      } else {
        sparse_row<Real, In, false>(problem, args, rule, rows, grad, scale, i, scratch);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// A row of a matrix and the factor that it is taken with.
template <class Real, class In>
struct Term {
  const In* row;
  Real factor;
};

// out += sum of factor * row, four rows at a time so that out is loaded and stored once for the four.
template <class Real, class In>
void add_terms(const std::vector<Term<Real, In>>& terms, int64_t dim, Real* out) {
  constexpr int64_t kLanes = Lanes<Real>::kCount;
  const size_t count = terms.size();
  size_t j = 0;
  for (; j + 4 <= count; j += 4) {
    const Term<Real, In> t[4] = {terms[j], terms[j + 1], terms[j + 2], terms[j + 3]};
    Vec<Real> factor[4];
    for (int k = 0; k < 4; ++k) factor[k] = broadcast(t[k].factor);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) {
      Vec<Real> sum = load(out + d);
      for (int k = 0; k < 4; ++k) sum = fma(factor[k], load(t[k].row + d), sum);
      store(sum, out + d);
    }
    for (; d < dim; ++d) {
      for (int k = 0; k < 4; ++k) out[d] += t[k].factor * static_cast<Real>(to_real(t[k].row[d]));
    }
  }
  for (; j < count; ++j) {
    const Term<Real, In> t = terms[j];
    const Vec<Real> factor = broadcast(t.factor);
    int64_t d = 0;
    for (; d + kLanes <= dim; d += kLanes) store(fma(factor, load(t.row + d), load(out + d)), out + d);
    for (; d < dim; ++d) out[d] += t.factor * static_cast<Real>(to_real(t.row[d]));
  }
}

template <class In>
void times_matrix(const SparseRows& rows, const void* matrix, int64_t stride, int64_t dim, void* out, int64_t begin,
                  int64_t end) {
  using Real = typename ComputeOf<In>::Real;
  std::vector<Term<Real, In>> terms;
  for (int64_t i = begin; i < end; ++i) {
    const std::int32_t* indices = rows.indices + i * rows.capacity;
    const Real* values = static_cast<const Real*>(rows.values) + i * rows.capacity;
    terms.clear();
    for (int64_t j = 0; j < rows.counts[i]; ++j) {
      terms.push_back({static_cast<const In*>(matrix) + indices[j] * stride, values[j]});
    }
    Real* result = static_cast<Real*>(out) + i * dim;
    for (int64_t d = 0; d < dim; ++d) result[d] = 0;
    add_terms<Real, In>(terms, dim, result);
  }
}

template <class Real>
void accumulate(const SparseRows& rows, const Accumulation& sum, int64_t begin, int64_t end) {
  std::vector<Term<Real, Real>> terms;
  const Real* values = static_cast<const Real*>(rows.values);
  for (int64_t first = begin, last; first < end; first = last) {
    const int64_t index = rows.indices[sum.order[first]];
    terms.clear();
    double added = 0.0;
    for (last = first; last < end && rows.indices[sum.order[last]] == index; ++last) {
      const std::int64_t at = sum.order[last];
      terms.push_back({static_cast<const Real*>(sum.states) + at / rows.capacity * sum.dim, values[at]});
      added += values[at];
    }
    if (sum.total != nullptr) add_terms<Real, Real>(terms, sum.dim, static_cast<Real*>(sum.total) + index * sum.dim);
    if (sum.sums != nullptr) static_cast<Real*>(sum.sums)[index] += static_cast<Real>(added);
  }
}

template <class = void>
const SparseKernels& sparse_table() {
  static constexpr SparseKernels kernels = {
      {sparse_rows<float>, nullptr, nullptr, sparse_rows<double>},
      {times_matrix<float>, times_matrix<BFloat16>, times_matrix<Half>, times_matrix<double>},
      {accumulate<float>, nullptr, nullptr, accumulate<double>},
  };
  return kernels;
}

}  // namespace FASTRL_ISA
}  // namespace fastrl
