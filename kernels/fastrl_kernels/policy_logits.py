"""The policy loss of a row of logits and its gradient in one launch: one read and one write of the logits.

    logp, entropy                         the row's first walk, as `token_logprobs` takes it
    contribution, g = d/dlogp, h = d/dH   the token arithmetic, as `policy` has it
    dz_v = g (1[v = y] - p_v) - h p_v (log p_v + entropy)       the row's second walk, from the cache

One program per row, for losses in which a token's gradient depends on its own row alone. A row of 151,936 entries in
bfloat16 takes 304 kB. The rows of all running programs fit the L2 cache of a large GPU, so the second walk does not
reach the memory. Every step calls the helper of the separate kernel, and gives its bits.

Legend: N tokens (rows), V vocabulary entries. The callers of the host functions have validated the arguments.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels import token_logprobs
from fastrl_kernels.launch import (
    Tile,
    launch_options,
    matrix_arguments,
    on_device_of,
    result_dtype,
    row_arguments,
    slope_and_factor,
    tile_for,
)
from fastrl_kernels.policy import (
    PolicyAxes,
    PolicyColumns,
    PolicyNumbers,
    PolicyResults,
    allocate_results,
    column_arguments,
    compiled_axes,
    result_arguments,
    token_terms,
)
from fastrl_kernels.rowmath import LOG2E, row_factor, row_frame
from fastrl_kernels.token_logprobs import row_gradient, scan_row, write_gradient, zero_row

# The first walk takes the tile of the `token_logprobs` forward, because the order of the sums depends on the tile. The
# second walk takes the block of its backward, with the warps of the first.
SCALE_TILE = Tile(2048, 8)

_RUNTIME = ["stride_labels", "stride_inv_temperature", "V", "ignore_index"]
_RESULTS = [name for name in PolicyResults._fields if not name.startswith("grad_")]
_UNALIGNED = [
    "labels_ptr",
    "inv_temperature_ptr",
    "logprobs_ptr",
    "entropy_ptr",
    *(f"{name}_ptr" for name in (*PolicyColumns._fields, *_RESULTS)),
]


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def _policy_logits_fwd_kernel(
    logits_ptr,  # (N, V)
    stride_row,
    stride_v,
    out_ptr,  # (N, V), may be logits_ptr
    stride_out_row,
    stride_out_v,
    labels_ptr,  # (N,)
    stride_labels,
    inv_temperature_ptr,  # (N,) or None
    stride_inv_temperature,
    inv_temperature: tl.float64,
    logprobs_ptr,  # (N,), and so are all that follow
    entropy_ptr,
    advantages_ptr,  # of the columns only the first two are always there
    weights_ptr,
    kl_weights_ptr,
    entropy_weights_ptr,
    anchor_ptr,
    kl_anchor_ptr,
    kl_ratio_anchor_ptr,
    positive_ptr,
    contribution_ptr,
    surrogate_ptr,
    kl_ptr,
    ratio_ptr,
    clipped_low_ptr,
    clipped_high_ptr,
    dual_clipped_ptr,
    V,
    slope: tl.float64,
    factor: tl.float64,
    ignore_index: tl.int64,
    low: tl.float64,
    high: tl.float64,
    max_ratio: tl.float64,
    dual_clip: tl.float64,
    weight_low: tl.float64,
    weight_high: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    k_pos: tl.float64,
    k_neg: tl.float64,
    lambda_pos: tl.float64,
    lambda_neg: tl.float64,
    square_tau: tl.float64,
    log_ratio_bound: tl.float64,
    kl_log_ratio_bound: tl.float64,
    kl_value_bound: tl.float64,
    kl_ratio_max: tl.float64,
    AXES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_SCAN: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    HAS_ENTROPY: tl.constexpr = entropy_weights_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * stride_labels).to(tl.int64)
    live = label != ignore_index
    block_ptr = logits_ptr + row * stride_row
    out_block_ptr = out_ptr + row * stride_out_row
    c = row_factor(row, inv_temperature_ptr, stride_inv_temperature, inv_temperature, factor, ACC)
    slope = tl.full((), slope, ACC)

    logp = tl.zeros((), ACC)
    entropy = tl.zeros((), ACC)
    frame = tl.zeros((), ACC)
    bias = tl.zeros((), ACC)
    if live:
        logp, entropy, logsumexp, residual = scan_row(
            block_ptr, stride_v, label, V, slope, c, ACC, HAS_SOFTCAP, "evict_last", BLOCK_SCAN
        )
        in_vocab = (label >= 0) & (label < V)
        logp = tl.where(in_vocab, logp, float("nan"))
        entropy = tl.where(in_vocab, entropy, float("nan"))
        frame = row_frame(logsumexp, c)
        bias = -LOG2E * residual
    tl.store(logprobs_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    anchors = (anchor_ptr, kl_anchor_ptr, kl_ratio_anchor_ptr)
    columns = PolicyColumns(advantages_ptr, weights_ptr, kl_weights_ptr, entropy_weights_ptr, *anchors, positive_ptr)
    flags = (clipped_low_ptr, clipped_high_ptr, dual_clipped_ptr)
    results = PolicyResults(contribution_ptr, surrogate_ptr, kl_ptr, ratio_ptr, *flags, None, None)
    numbers = PolicyNumbers(
        low, high, max_ratio, dual_clip, weight_low, weight_high, tau_pos, tau_neg, k_pos, k_neg,
        lambda_pos, lambda_neg, square_tau, log_ratio_bound, kl_log_ratio_bound, kl_value_bound, kl_ratio_max,
    )  # fmt: skip
    g, _ = token_terms(logp, entropy, row, row >= 0, None, columns, results, numbers, AXES)
    h = tl.zeros((), ACC)
    if HAS_ENTROPY:
        h -= tl.load(entropy_weights_ptr + row)
    # Selected, not multiplied: the logits of a row without a gradient cannot matter, and are not read again.
    if live & ((g != 0) | (h != 0)):
        in_vocab = (label >= 0) & (label < V)
        label_v = tl.where(in_vocab, label, -1).to(tl.int32)
        k = c * LOG2E
        l = tl.zeros((), ACC)
        gradient = row_gradient(logp, entropy, frame, bias, g, h, l, slope, c, k, in_vocab, HAS_ENTROPY)
        write_gradient(
            block_ptr, stride_v, out_block_ptr, stride_out_v, label_v, V,
            gradient, HAS_ENTROPY, HAS_SOFTCAP, "evict_first", BLOCK_V,
        )  # fmt: skip
    else:
        zero_row(out_block_ptr, stride_out_v, V, BLOCK_V)


@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=["factor_ptr"])
def _scale_rows_kernel(
    x_ptr,  # (N, V)
    stride_row,
    stride_v,
    out_ptr,  # (N, V), may be x_ptr
    stride_out_row,
    stride_out_v,
    factor_ptr,  # one number
    V,
    IN_PLACE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    factor = tl.load(factor_ptr).to(ACC)
    if (factor == 1.0) & IN_PLACE:
        return
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    block_ptr = x_ptr + row * stride_row + offs_v.to(tl.int64) * stride_v
    out_block_ptr = out_ptr + row * stride_out_row + offs_v.to(tl.int64) * stride_out_v
    step = tl.full((), BLOCK_V, tl.int64) * stride_v
    out_step = tl.full((), BLOCK_V, tl.int64) * stride_out_v
    whole = V // BLOCK_V * BLOCK_V
    for _ in range(0, whole, BLOCK_V):
        tl.store(out_block_ptr, (tl.load(block_ptr).to(ACC) * factor).to(out_ptr.dtype.element_ty))
        block_ptr += step
        out_block_ptr += out_step
    mask_v = whole + offs_v < V
    x = tl.load(block_ptr, mask=mask_v, other=0.0).to(ACC)
    tl.store(out_block_ptr, (x * factor).to(out_ptr.dtype.element_ty), mask=mask_v)


def policy_logits_fwd(
    axes: PolicyAxes,
    numbers: PolicyNumbers,
    logits: Tensor,  # (N, V), any strides
    labels: Tensor,  # (N,) int32 or int64
    inv_temperature: float | Tensor,  # scalar or (N,)
    columns: PolicyColumns,
    *,
    out: Tensor,  # (N, V), any strides; may be `logits`
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, PolicyResults]:
    """Return (logprobs (N,), entropy (N,), terms) and write the gradient of the contributions' sum to `out`.

    All results are, bit for bit, the results of `token_logprobs_fwd`, `policy_terms` and `token_logprobs_bwd` in turn.
    One exception: a row whose gradient is 0 throughout is written as 0, for any logits and any label. The terms have no
    gradients of their own. The kernel does not read rows whose label is `ignore_index`: their log-prob, entropy and
    gradient are 0.
    """
    n, v = logits.shape
    dtype = result_dtype(logits)
    logprobs, entropy = (torch.empty(n, dtype=dtype, device=logits.device) for _ in range(2))
    results = allocate_results(axes, numbers, n, dtype, logits.device)
    if n == 0:
        return logprobs, entropy, results
    tile = tile_for(token_logprobs.FWD_TILES, logits.dtype, v)
    with on_device_of(logits):
        _policy_logits_fwd_kernel[(n,)](
            *matrix_arguments(logits),
            *matrix_arguments(out),
            *row_arguments(labels, inv_temperature),
            logprobs,
            entropy,
            *column_arguments(columns, dtype),
            *result_arguments(results),
            v,
            *slope_and_factor(logit_scale, softcap),
            ignore_index,
            *numbers,
            AXES=compiled_axes(axes),
            HAS_SOFTCAP=bool(softcap),
            BLOCK_SCAN=tile.block,
            BLOCK_V=tile_for(token_logprobs.BWD_TILES, logits.dtype, v).block,
            **launch_options(tile),
        )
    return logprobs, entropy, results


def scale_rows(
    x: Tensor,  # (N, V), any strides
    factor: Tensor,  # one number, on the device
    *,
    out: Tensor | None = None,  # (N, V), any strides; may be `x`
) -> Tensor:
    """Return x * factor in the dtype of `x`, in `out` if given.

    In place with a factor of 1 the kernel reads nothing. It checks the factor on the device: the host does not wait.
    """
    result = torch.empty_like(x) if out is None else out
    n, v = x.shape
    if n > 0:
        options: dict[str, Any] = {"IN_PLACE": result.data_ptr() == x.data_ptr(), "BLOCK_V": SCALE_TILE.block}
        with on_device_of(x):
            _scale_rows_kernel[(n,)](
                *matrix_arguments(x),
                *matrix_arguments(result),
                factor,
                v,
                **options,
                **launch_options(SCALE_TILE),
            )
    return result
