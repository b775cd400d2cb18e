// Entry points of the CUDA row kernels: tensor views in, launches on the caller's stream, no synchronisation.
#include "cluster_rows.cuh"
#include "fastrl/tensor_views.h"

namespace fastrl {
namespace rows {
namespace {

constexpr std::int64_t kMaxGrid = (std::int64_t{1} << 31) - 1;

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) TVM_FFI_THROW(RuntimeError) << what << ": " << cudaGetErrorString(status);
}

// Makes the device of the tensors current, and the one before again.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (device != before_) check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() { cudaSetDevice(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

struct Launch {
  cudaStream_t stream;
  std::int64_t row_count;
};

int entry_bytes(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Launch `kernel(rows, arguments...)`, `blocks` blocks per row, as clusters of that many where `cluster` is set.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(DeviceRows, Parameters...), DeviceRows rows, const Launch& how, int blocks, bool cluster,
            int threads, std::int64_t shared_bytes, const Arguments&... arguments) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared_bytes);
  config.stream = how.stream;
  config.attrs = &attribute;
  config.numAttrs = cluster ? 1 : 0;
  const std::int64_t most_rows = kMaxGrid / blocks;
  for (std::int64_t done = 0; done < how.row_count; done += most_rows) {
    const std::int64_t left = how.row_count - done;
    rows.first_row = done;
    config.gridDim = dim3(static_cast<unsigned>((left < most_rows ? left : most_rows) * blocks));
    check(cudaLaunchKernelEx(&config, kernel, rows, arguments...), "cudaLaunchKernelEx");
  }
}

template <bool kGradient>
void launch_rows(DType dtype, bool softcap, DeviceRows rows, const Launch& how, const DeviceResults& results,
                 const DeviceGradient& gradient) {
  const ClusterPlan plan = plan_of(rows.vocab, entry_bytes(dtype));
  require(!kGradient || plan.resident, "the row does not fit into the shared memory of a cluster");
  rows.slice = plan.slice;
  const std::int64_t shared = kGradient ? plan.shared_bytes : 0;
  with_entries(dtype, [&](auto entry) {
    using In = decltype(entry);
    const auto kernel = softcap ? row_kernel<In, true, kGradient> : row_kernel<In, false, kGradient>;
    launch(kernel, rows, how, plan.cluster, true, plan.threads, shared, results, gradient);
  });
}

void launch_gradient(DType dtype, bool softcap, DeviceRows rows, const Launch& how, const DeviceResults& results,
                     const DeviceGradient& gradient) {
  with_entries(dtype, [&](auto entry) {
    using In = decltype(entry);
    const auto kernel = softcap ? gradient_kernel<In, true> : gradient_kernel<In, false>;
    rows.slice = kGradientThreads * kGradientVectors * Entries<In>::kCount;
    const int blocks = (rows.vocab + rows.slice - 1) / rows.slice;
    launch(kernel, rows, how, blocks, false, kGradientThreads, 0, results, gradient, blocks);
  });
}

DeviceRows rows_of(const TensorView& logits, const TensorView& labels, const TensorView& inverse_temperatures,
                   double inverse_temperature, double slope, double factor, std::int64_t ignore_index) {
  require(logits.ndim() == 2 && (logits.size(1) == 1 || logits.stride(1) == 1), "logits must be (N, V), vocabulary stride 1");
  require(logits.size(1) >= 1 && logits.size(1) <= kMaxVocab, "V must be within 1 and 2^30");
  check_rows(labels, logits.size(0), false, "labels must be (N,) and contiguous");
  check_rows(inverse_temperatures, logits.size(0), true, "inv_temperatures must be (N,) and contiguous");
  return {logits.data_ptr(),
          row_stride(logits),
          static_cast<int>(logits.size(1)),
          0,
          static_cast<const std::int64_t*>(labels.data_ptr()),
          data_or_null<const void>(inverse_temperatures),
          inverse_temperature,
          slope,
          factor,
          ignore_index,
          0};
}

DeviceResults results_of(std::int64_t rows, const TensorView& logprobs, const TensorView& entropy,
                         const TensorView& logsumexp, const TensorView& residual) {
  for (const TensorView* view : {&logprobs, &entropy, &logsumexp, &residual}) {
    check_rows(*view, rows, false, "results must be (N,) and contiguous");
  }
  return {logprobs.data_ptr(), entropy.data_ptr(), logsumexp.data_ptr(), residual.data_ptr()};
}

DeviceGradient gradient_of(const TensorView& logits, const TensorView& grad_logprobs, const TensorView& grad_entropy,
                           const TensorView& grad_logsumexp, const TensorView& out) {
  for (const TensorView* view : {&grad_logprobs, &grad_entropy, &grad_logsumexp}) {
    check_rows(*view, logits.size(0), true, "gradients must be (N,) and contiguous");
  }
  require(out.ndim() == 2 && out.size(0) == logits.size(0) && out.size(1) == logits.size(1) &&
              dtype_of(out) == dtype_of(logits) && (out.size(1) == 1 || out.stride(1) == 1),
          "out must be (N, V) with the dtype of the logits and vocabulary stride 1");
  return {data_or_null<const void>(grad_logprobs), data_or_null<const void>(grad_entropy),
          data_or_null<const void>(grad_logsumexp), out.data_ptr(), row_stride(out)};
}

Launch launch_of(const TensorView& logits, std::int64_t stream) {
  return {reinterpret_cast<cudaStream_t>(static_cast<std::intptr_t>(stream)), logits.size(0)};
}

void token_logprobs_fwd(TensorView logits, TensorView labels, TensorView inverse_temperatures,
                        double inverse_temperature, double slope, double factor, bool softcap,
                        std::int64_t ignore_index, TensorView logprobs, TensorView entropy, TensorView logsumexp,
                        TensorView residual, std::int64_t stream) {
  const DeviceRows rows =
      rows_of(logits, labels, inverse_temperatures, inverse_temperature, slope, factor, ignore_index);
  const OnDevice guard(logits.device().device_id);
  launch_rows<false>(dtype_of(logits), softcap, rows, launch_of(logits, stream),
                     results_of(logits.size(0), logprobs, entropy, logsumexp, residual), {});
}

void token_logprobs_bwd(TensorView logits, TensorView labels, TensorView inverse_temperatures,
                        double inverse_temperature, double slope, double factor, bool softcap,
                        std::int64_t ignore_index, TensorView logprobs, TensorView entropy, TensorView logsumexp,
                        TensorView residual, TensorView grad_logprobs, TensorView grad_entropy,
                        TensorView grad_logsumexp, TensorView out, std::int64_t stream) {
  const DeviceRows rows =
      rows_of(logits, labels, inverse_temperatures, inverse_temperature, slope, factor, ignore_index);
  const OnDevice guard(logits.device().device_id);
  launch_gradient(dtype_of(logits), softcap, rows, launch_of(logits, stream),
                  results_of(logits.size(0), logprobs, entropy, logsumexp, residual),
                  gradient_of(logits, grad_logprobs, grad_entropy, grad_logsumexp, out));
}

void token_logprobs_fwd_bwd(TensorView logits, TensorView labels, TensorView inverse_temperatures,
                            double inverse_temperature, double slope, double factor, bool softcap,
                            std::int64_t ignore_index, TensorView logprobs, TensorView entropy, TensorView logsumexp,
                            TensorView residual, TensorView grad_logprobs, TensorView grad_entropy,
                            TensorView grad_logsumexp, TensorView out, std::int64_t stream) {
  const DeviceRows rows =
      rows_of(logits, labels, inverse_temperatures, inverse_temperature, slope, factor, ignore_index);
  const OnDevice guard(logits.device().device_id);
  launch_rows<true>(dtype_of(logits), softcap, rows, launch_of(logits, stream),
                    results_of(logits.size(0), logprobs, entropy, logsumexp, residual),
                    gradient_of(logits, grad_logprobs, grad_entropy, grad_logsumexp, out));
}

// Whether the shared memory of a cluster holds a row.
bool row_is_resident(std::int64_t vocab, int entry_bytes) { return plan_of(vocab, entry_bytes).resident; }

}  // namespace
}  // namespace rows
}  // namespace fastrl

TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_fwd, fastrl::rows::token_logprobs_fwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_bwd, fastrl::rows::token_logprobs_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(token_logprobs_fwd_bwd, fastrl::rows::token_logprobs_fwd_bwd);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(row_is_resident, fastrl::rows::row_is_resident);
