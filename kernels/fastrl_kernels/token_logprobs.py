"""Per-token log-prob, entropy and log-sum-exp of a row of logits: forward one read, backward one read and one write.

    z = softcap * tanh(logit_scale * x / softcap) / T        (without a softcap: logit_scale * x / T)
    logp = z_y - lse,    lse = log sum_v e^(z_v),    entropy = -sum_v p_v log p_v
    dz_v = g (1[v = y] - p_v) - h p_v (log p_v + entropy) + l p_v

One program per row, so a row's bits do not depend on the rows around it. Nor do they depend on its address and stride,
for which Triton compiles different code: `ordered_sum` adds the entries in one order.

The callers of the host functions have validated the arguments. The kernels protect memory: they never use a label
outside [0, V) as an address.

Legend: N tokens (rows), V vocabulary entries.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import (
    Tile,
    TileTable,
    launch_options,
    matrix_arguments,
    on_device_of,
    result_dtype,
    row_arguments,
    slope_and_factor,
    tile_for,
    upstream_arguments,
)
from fastrl_kernels.rowmath import (
    EXPONENT_FLOOR,
    LN2,
    LOG2E,
    entry,
    finish_row,
    lowest,
    one_minus_exp,
    online_softmax_update,
    ordered_sum,
    row_factor,
    row_frame,
    tanh_and_slope,
)

# Bytes per logit -> (largest V, tile). Chosen for 16-byte loads and no spills (the backward with a softcap spills at 16
# entries per thread). Not yet tuned on a device.
FWD_TILES: TileTable = {
    2: ((1024, Tile(1024, 4)), (8192, Tile(2048, 4)), (2**31, Tile(4096, 8))),
    4: ((1024, Tile(1024, 4)), (8192, Tile(2048, 4)), (2**31, Tile(4096, 8))),
    8: ((1024, Tile(512, 4)), (2**31, Tile(1024, 4))),
}
BWD_TILES: TileTable = {
    2: ((8192, Tile(1024, 4)), (2**31, Tile(2048, 8))),
    4: ((8192, Tile(1024, 4)), (2**31, Tile(2048, 8))),
    8: ((1024, Tile(512, 4)), (2**31, Tile(1024, 4))),
}

# Runtime values that change between calls and must not compile anew. The row and vocabulary strides of the logits are
# not listed: 16-byte loads need to know that a stride is 1 or a multiple of 16.
_FWD_RUNTIME = ["stride_labels", "stride_inv_temperature", "V", "ignore_index"]
_FWD_UNALIGNED = ["labels_ptr", "inv_temperature_ptr", "logprobs_ptr", "entropy_ptr", "logsumexp_ptr", "residual_ptr"]
_BWD_RUNTIME = [*_FWD_RUNTIME, "stride_grad_logprobs", "stride_grad_entropy", "stride_grad_logsumexp"]
_BWD_UNALIGNED = [*_FWD_UNALIGNED, "grad_logprobs_ptr", "grad_entropy_ptr", "grad_logsumexp_ptr"]


@triton.jit
def scan_row(
    block_ptr,  # to the row's first entry
    stride_v,
    label,  # int64. Outside [0, V) it is no address, and the caller must not use the results
    V,
    slope,
    c,
    ACC: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Return logp, entropy, log-sum-exp and the rounding residual of the log-sum-exp, of a row, in one read."""
    in_vocab = (label >= 0) & (label < V)
    label = tl.where(in_vocab, label, -1).to(tl.int32)
    k = c * LOG2E
    x_label = tl.load(block_ptr + label.to(tl.int64) * stride_v, mask=in_vocab, other=float("-inf")).to(ACC)
    u_label = entry(x_label, slope, HAS_SOFTCAP)
    u_label = tl.where(in_vocab, u_label, float("-inf"))
    # The label's entry opens the running max and stays out of the sums. -inf and NaN must not become the max.
    m = tl.where(u_label > lowest(ACC), u_label, lowest(ACC))
    s = tl.zeros((BLOCK_V,), ACC)
    w = tl.zeros((BLOCK_V,), ACC)

    offs_v = tl.arange(0, BLOCK_V)
    offsets = offs_v.to(tl.int64) * stride_v
    step = tl.full((), BLOCK_V, tl.int64) * stride_v
    # Whole blocks carry no mask: one that depends on a V of unknown alignment splits 16-byte loads into 2-byte ones.
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        u = entry(tl.load(block_ptr + offsets, eviction_policy=EVICTION).to(ACC), slope, HAS_SOFTCAP)
        if (label >= start) & (label < start + BLOCK_V):
            u = tl.where(start + offs_v == label, float("-inf"), u)
        m, s, w = online_softmax_update(u, m, s, w, k)
        block_ptr += step
    if whole < V:
        mask_v = whole + offs_v < V
        x = tl.load(block_ptr + offsets, mask=mask_v, other=0.0, eviction_policy=EVICTION).to(ACC)
        u = entry(x, slope, HAS_SOFTCAP)
        u = tl.where(mask_v & (whole + offs_v != label), u, float("-inf"))
        m, s, w = online_softmax_update(u, m, s, w, k)

    logp, entropy, logsumexp, log_total = finish_row(u_label, m, ordered_sum(s), ordered_sum(w), c, k)
    return logp, entropy, logsumexp, (m - row_frame(logsumexp, c)) * c + log_total


@triton.jit(do_not_specialize=_FWD_RUNTIME, do_not_specialize_on_alignment=_FWD_UNALIGNED)
def _token_logprobs_fwd_kernel(
    logits_ptr,  # (N, V)
    stride_row,
    stride_v,
    labels_ptr,  # (N,)
    stride_labels,
    inv_temperature_ptr,  # (N,) or None
    stride_inv_temperature,
    inv_temperature: tl.float64,
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    logsumexp_ptr,  # (N,)
    residual_ptr,  # (N,) or None
    V,
    slope: tl.float64,
    factor: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * stride_labels).to(tl.int64)
    if label == ignore_index:
        tl.store(logprobs_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(logsumexp_ptr + row, 0.0)
        if residual_ptr is not None:
            tl.store(residual_ptr + row, 0.0)
        return

    in_vocab = (label >= 0) & (label < V)
    c = row_factor(row, inv_temperature_ptr, stride_inv_temperature, inv_temperature, factor, ACC)
    slope = tl.full((), slope, ACC)
    block_ptr = logits_ptr + row * stride_row
    logp, entropy, logsumexp, residual = scan_row(
        block_ptr, stride_v, label, V, slope, c, ACC, HAS_SOFTCAP, "", BLOCK_V
    )
    tl.store(logprobs_ptr + row, tl.where(in_vocab, logp, float("nan")))
    tl.store(entropy_ptr + row, tl.where(in_vocab, entropy, float("nan")))
    tl.store(logsumexp_ptr + row, tl.where(in_vocab, logsumexp, float("nan")))
    if residual_ptr is not None:
        tl.store(residual_ptr + row, tl.where(in_vocab, residual, float("nan")))


@triton.jit
def upstream(grad_ptr, row, stride, ACC: tl.constexpr):
    """Return the row's upstream gradient, or 0 without one."""
    if grad_ptr is not None:
        return tl.load(grad_ptr + row * stride).to(ACC)
    else:
        return tl.zeros((), ACC)


class RowGradient(NamedTuple):
    """Terms of dx_v = p_v (constant - per_exponent log2 p_v) dz/dx with log2 p_v = (u_v - frame) k + bias.

    At the label the value is `grad_label`. `scale` is dz/dx without the slope of a softcap, a factor of `constant`,
    `per_exponent` and `grad_label` already. For a label outside the vocabulary it is NaN, and so is the whole row.
    """

    frame: tl.tensor
    bias: tl.tensor
    k: tl.tensor
    slope: tl.tensor
    constant: tl.tensor
    per_exponent: tl.tensor
    grad_label: tl.tensor
    scale: tl.tensor


@triton.jit
def row_gradient(logp, entropy, frame, bias, g, h, l, slope, c, k, in_vocab, HAS_ENTROPY: tl.constexpr):
    """Return a row's `RowGradient` from the gradients g, h, l of its log-prob, entropy and log-sum-exp."""
    constant = l - g
    p_label = tl.exp(logp)
    grad_label = g * one_minus_exp(logp) + p_label * l
    if HAS_ENTROPY:
        constant -= h * entropy
        # p log p is 0 at p = 0, not 0 * -inf.
        grad_label -= h * tl.where(p_label > 0, p_label * (logp + entropy), 0.0)
    scale = tl.where(in_vocab, c * slope, float("nan"))
    constant *= scale
    grad_label *= scale
    per_exponent = h * LN2 * scale
    return RowGradient(frame, bias, k, slope, constant, per_exponent, grad_label, scale)


@triton.jit
def grad_block(
    x,
    is_label,
    gradient,  # RowGradient
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """Return dx of a block of entries x."""
    if HAS_SOFTCAP:
        u, dudx = tanh_and_slope(x * gradient.slope)
    else:
        u = x * gradient.slope
    t = tl.maximum(
        tl.fma(u - gradient.frame, gradient.k, gradient.bias), EXPONENT_FLOOR, propagate_nan=tl.PropagateNan.ALL
    )
    if HAS_ENTROPY:
        dx = tl.exp2(t) * tl.fma(-gradient.per_exponent, t, gradient.constant)
    else:
        dx = tl.exp2(t) * gradient.constant
    dx = tl.where(is_label, gradient.grad_label, dx)
    if HAS_SOFTCAP:
        dx = dx * dudx
    return dx


@triton.jit
def zero_row(out_block_ptr, stride_out_v, V, BLOCK_V: tl.constexpr):
    """Write zeros to a row."""
    offs_v = tl.arange(0, BLOCK_V)
    offsets = offs_v.to(tl.int64) * stride_out_v
    step = tl.full((), BLOCK_V, tl.int64) * stride_out_v
    zeros = tl.zeros((BLOCK_V,), out_block_ptr.dtype.element_ty)
    whole = V // BLOCK_V * BLOCK_V
    for _ in range(0, whole, BLOCK_V):
        tl.store(out_block_ptr + offsets, zeros)
        out_block_ptr += step
    tl.store(out_block_ptr + offsets, zeros, mask=whole + offs_v < V)


@triton.jit
def write_gradient(
    block_ptr,  # to the row's first entry
    stride_v,
    out_block_ptr,  # may be block_ptr
    stride_out_v,
    label,  # int32, -1 outside the vocabulary
    V,
    gradient,  # RowGradient
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write the gradient of a row."""
    ACC: tl.constexpr = gradient.constant.dtype
    offs_v = tl.arange(0, BLOCK_V)
    offsets = offs_v.to(tl.int64) * stride_v
    out_offsets = offs_v.to(tl.int64) * stride_out_v
    step = tl.full((), BLOCK_V, tl.int64) * stride_v
    out_step = tl.full((), BLOCK_V, tl.int64) * stride_out_v
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        x = tl.load(block_ptr + offsets, eviction_policy=EVICTION).to(ACC)
        is_label = start + offs_v == label
        dx = grad_block(x, is_label, gradient, HAS_ENTROPY, HAS_SOFTCAP)
        tl.store(out_block_ptr + out_offsets, dx.to(out_block_ptr.dtype.element_ty), eviction_policy=EVICTION)
        block_ptr += step
        out_block_ptr += out_step
    if whole < V:
        mask_v = whole + offs_v < V
        x = tl.load(block_ptr + offsets, mask=mask_v, other=0.0).to(ACC)
        is_label = whole + offs_v == label
        dx = grad_block(x, is_label, gradient, HAS_ENTROPY, HAS_SOFTCAP)
        tl.store(out_block_ptr + out_offsets, dx.to(out_block_ptr.dtype.element_ty), mask=mask_v)


@triton.jit(do_not_specialize=_BWD_RUNTIME, do_not_specialize_on_alignment=_BWD_UNALIGNED)
def _token_logprobs_bwd_kernel(
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
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    logsumexp_ptr,  # (N,)
    residual_ptr,  # (N,) or None
    grad_logprobs_ptr,  # (N,) or None
    stride_grad_logprobs,
    grad_entropy_ptr,  # (N,) or None
    stride_grad_entropy,
    grad_logsumexp_ptr,  # (N,) or None
    stride_grad_logsumexp,
    V,
    slope: tl.float64,
    factor: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * stride_labels).to(tl.int64)
    out_block_ptr = out_ptr + row * stride_out_row
    in_vocab = (label >= 0) & (label < V)
    c = row_factor(row, inv_temperature_ptr, stride_inv_temperature, inv_temperature, factor, ACC)
    g = upstream(grad_logprobs_ptr, row, stride_grad_logprobs, ACC)
    h = upstream(grad_entropy_ptr, row, stride_grad_entropy, ACC)
    l = upstream(grad_logsumexp_ptr, row, stride_grad_logsumexp, ACC)
    # Selected, not multiplied: NaN logits under a zero gradient do not matter, and the row is not read.
    if (label == ignore_index) | (in_vocab & (c > 0) & (g == 0) & (h == 0) & (l == 0)):
        zero_row(out_block_ptr, stride_out_v, V, BLOCK_V)
        return

    slope = tl.full((), slope, ACC)
    logp = tl.load(logprobs_ptr + row)
    logsumexp = tl.load(logsumexp_ptr + row)
    block_ptr = logits_ptr + row * stride_row

    # In float32 a log-sum-exp of 1e6 is known to 0.06 only. As a frame it needs its rounding residual. Without the
    # residual, the label's entry with its known log-prob is the frame if it is finer.
    frame = row_frame(logsumexp, c)
    if residual_ptr is not None:
        bias = -LOG2E * tl.load(residual_ptr + row)
    else:
        x_label = tl.load(block_ptr + label * stride_v, mask=in_vocab, other=0.0).to(ACC)
        by_label = tl.abs(logp) < tl.abs(logsumexp)
        frame = tl.where(by_label, entry(x_label, slope, HAS_SOFTCAP), frame)
        bias = tl.where(by_label, logp * LOG2E, 0.0)
        # In place, a fast warp would overwrite the label's entry before a slow one has read it.
        tl.debug_barrier()

    entropy = tl.zeros((), ACC)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
    label = tl.where(in_vocab, label, -1).to(tl.int32)
    k = c * LOG2E
    gradient = row_gradient(logp, entropy, frame, bias, g, h, l, slope, c, k, in_vocab, HAS_ENTROPY)
    write_gradient(
        block_ptr, stride_v, out_block_ptr, stride_out_v, label, V, gradient, HAS_ENTROPY, HAS_SOFTCAP, "", BLOCK_V
    )


def token_logprobs_fwd(
    logits: Tensor,  # (N, V), any strides
    labels: Tensor,  # (N,) int32 or int64
    inv_temperature: float | Tensor,  # scalar or (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    residual: Tensor | None = None,  # (N,), written
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), each (N,) float32, or float64 for float64 logits.

    Rows whose label is `ignore_index` are 0 and their logits are not read. NaN marks a row whose label is outside
    [0, V), whose temperature is not positive and finite, which holds NaN or +inf, or which is -inf throughout.

    Args:
        logits: the logits, of any strides.
        labels: the entry of each row whose log-prob is wanted.
        inv_temperature: 1 / T, for all rows or per row.
        logit_scale: factor on the logits before the softcap, not 0.
        softcap: bound of the softcap, 0.0 for none.
        ignore_index: the label of rows that do not count.
        residual: contiguous, of the result's dtype. Receives the rounding residual of `logsumexp`. With it,
            `token_logprobs_bwd` is as accurate as a softmax computed anew. Without it, the error of p relative to p is
            about 6e-8 * min(|logprobs|, |logsumexp|) in float32.
    """
    n, v = logits.shape
    logprobs, entropy, logsumexp = (torch.empty(n, dtype=result_dtype(logits), device=logits.device) for _ in range(3))
    if n == 0:
        return logprobs, entropy, logsumexp
    tile = tile_for(FWD_TILES, logits.dtype, v)
    with on_device_of(logits):
        _token_logprobs_fwd_kernel[(n,)](
            *matrix_arguments(logits),
            *row_arguments(labels, inv_temperature),
            logprobs,
            entropy,
            logsumexp,
            residual,
            v,
            *slope_and_factor(logit_scale, softcap),
            ignore_index,
            HAS_SOFTCAP=bool(softcap),
            BLOCK_V=tile.block,
            **launch_options(tile),
        )
    return logprobs, entropy, logsumexp


def token_logprobs_bwd(
    logits: Tensor,  # (N, V), any strides
    labels: Tensor,  # (N,) int32 or int64
    inv_temperature: float | Tensor,  # scalar or (N,)
    logprobs: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    grad_logprobs: Tensor | None,  # (N,), any stride
    grad_entropy: Tensor | None,  # (N,), any stride
    grad_logsumexp: Tensor | None,  # (N,), any stride
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    out: Tensor | None = None,  # (N, V), any strides, any float dtype
    residual: Tensor | None = None,  # (N,)
) -> Tensor:  # (N, V)
    """Return the gradient with respect to `logits`, in their dtype and layout, or in `out`, which may be `logits`.

    The arguments up to `logsumexp`, and `residual`, are the arguments and results of `token_logprobs_fwd`. A gradient
    of None counts as 0. Ignored rows get exactly 0 for any logits and upstream gradients. So do rows whose upstream
    gradients are all 0, for any logits. All other rows with NaN results get NaN.
    """
    n, v = logits.shape
    result = torch.empty_like(logits) if out is None else out
    if grad_logprobs is None and grad_entropy is None and grad_logsumexp is None:
        return result.zero_()
    if n == 0:
        return result
    tile = tile_for(BWD_TILES, logits.dtype, v)
    with on_device_of(logits):
        _token_logprobs_bwd_kernel[(n,)](
            *matrix_arguments(logits),
            *matrix_arguments(result),
            *row_arguments(labels, inv_temperature),
            logprobs.contiguous(),
            entropy.contiguous(),
            logsumexp.contiguous(),
            residual,
            *upstream_arguments(grad_logprobs, grad_entropy, grad_logsumexp),
            v,
            *slope_and_factor(logit_scale, softcap),
            ignore_index,
            HAS_SOFTCAP=bool(softcap),
            BLOCK_V=tile.block,
            **launch_options(tile),
        )
    return result
