"""Row statistics for metrics in one read of the logits: argmax, whether it is the label, log sum p^2, mean logit.

    z = softcap * tanh(logit_scale * x / softcap) / T        (without a softcap: logit_scale * x / T)
    log sum_v p_v^2 = log1p(Q) - 2 log1p(S),    S = sum_v e^(z_v - max),  Q = sum_v e^(2 (z_v - max)),  v not the argmax

Keeping the argmax out of both sums, which only the block that raises the max has to see to, leaves log sum p^2 exact in
relative terms as p -> 1. The kernel takes the argmax of sign(logit_scale) * x. z increases with it, so rounding in the
softcap cannot move the argmax.

One program per row. The caller of the host function has validated the arguments. The kernel never uses a label outside
[0, V) as an address.

Legend: N tokens (rows), V vocabulary entries.
"""

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
)
from fastrl_kernels.rowmath import (
    LOG2E,
    entry,
    exponent,
    log1p_unit,
    lowest,
    ordered_sum,
    ordered_sum_of_signs,
    row_factor,
)

# Bytes per logit -> (largest V, tile): 16-byte loads and no spills with three sums per entry. Not tuned on a device.
TILES: TileTable = {
    2: ((8192, Tile(1024, 4)), (2**31, Tile(2048, 8))),
    4: ((8192, Tile(1024, 4)), (2**31, Tile(2048, 8))),
    8: ((2**31, Tile(512, 4)),),
}

_RUNTIME = ["stride_labels", "stride_inv_temperature", "V", "ignore_index"]
_UNALIGNED = [
    "labels_ptr",
    "inv_temperature_ptr",
    "top1_ptr",
    "log_sum_squared_ptr",
    "argmax_ptr",
    "mean_ptr",
]


@triton.jit
def _log1p(x):
    """Return log(1 + x) for x >= 0, with the relative precision of `log1p_unit` up to 1."""
    near = log1p_unit(tl.minimum(x, 1.0, propagate_nan=tl.PropagateNan.ALL))
    return tl.where(x <= 1.0, near, tl.log(1.0 + x))


@triton.jit
def _take_block(
    v,  # entries times the sign of the scale, -inf beyond the row
    start,
    in_row,
    m,
    u_top,
    best,
    s,
    q,
    w,
    slope,
    k,
    HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Take a block into the max `m`, its index `best`, and, lane by lane, S, Q and the sum of u."""
    offs = start + tl.arange(0, v.shape[0])
    u = entry(v, slope, HAS_SOFTCAP)
    # Padding of the last block is -inf in u too: a softcap would make it a finite entry.
    if MASKED:
        w += tl.where(in_row, u, 0.0)
        u = tl.where(in_row, u, float("-inf"))
    else:
        w += u

    block_max = tl.max(v, 0)
    # A first max may be the lowest finite number. Under a softcap even -inf is an entry with mass.
    opens = (best < 0) & (block_max > float("-inf"))
    if HAS_SOFTCAP:
        opens = best < 0
    if (block_max > m) | opens:
        u_new = entry(block_max, slope, HAS_SOFTCAP)
        e_old = tl.exp2(exponent(u_top - u_new, k))
        # The max so far becomes one entry among the others.
        joins = tl.where((offs == start) & (best >= 0), e_old, 0.0)
        s = tl.fma(e_old, s, joins)
        q = tl.fma(e_old * e_old, q, joins * joins)
        candidates = tl.where(in_row & (v == block_max), offs, 2147483647)
        best = tl.min(candidates, 0)
        u = tl.where(offs == best, float("-inf"), u)
        m = block_max
        u_top = u_new
    e = tl.exp2(exponent(u - u_top, k))
    return m, u_top, best, s + e, tl.fma(e, e, q), w


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_UNALIGNED)
def _row_statistics_fwd_kernel(
    logits_ptr,  # (N, V)
    stride_row,
    stride_v,
    labels_ptr,  # (N,)
    stride_labels,
    inv_temperature_ptr,  # (N,) or None
    stride_inv_temperature,
    inv_temperature: tl.float64,
    top1_ptr,  # (N,)
    log_sum_squared_ptr,  # (N,)
    argmax_ptr,  # (N,)
    mean_ptr,  # (N,)
    V,
    slope: tl.float64,
    factor: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    ACC: tl.constexpr = log_sum_squared_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * stride_labels).to(tl.int64)
    if label == ignore_index:
        tl.store(top1_ptr + row, 0)
        tl.store(log_sum_squared_ptr + row, 0.0)
        tl.store(argmax_ptr + row, -1)
        tl.store(mean_ptr + row, 0.0)
        return

    in_vocab = (label >= 0) & (label < V)
    label = tl.where(in_vocab, label, 0)
    c = row_factor(row, inv_temperature_ptr, stride_inv_temperature, inv_temperature, factor, ACC)
    k = c * LOG2E
    slope = tl.full((), slope, ACC)
    sign = tl.where(slope < 0, -1.0, 1.0).to(ACC)
    slope = tl.abs(slope)

    block_ptr = logits_ptr + row * stride_row
    v_label = tl.load(block_ptr + label * stride_v, mask=in_vocab, other=0.0).to(ACC) * sign
    m = lowest(ACC)
    u_top = lowest(ACC)
    best = tl.full((), -1, tl.int32)
    s = tl.zeros((BLOCK_V,), ACC)
    q = tl.zeros((BLOCK_V,), ACC)
    w = tl.zeros((BLOCK_V,), ACC)

    offs_v = tl.arange(0, BLOCK_V)
    offsets = offs_v.to(tl.int64) * stride_v
    step = tl.full((), BLOCK_V, tl.int64) * stride_v
    # Whole blocks carry no mask: one that depends on a V of unknown alignment splits 16-byte loads into 2-byte ones.
    whole = V // BLOCK_V * BLOCK_V
    for start in range(0, whole, BLOCK_V):
        v = tl.load(block_ptr + offsets).to(ACC) * sign
        m, u_top, best, s, q, w = _take_block(v, start, True, m, u_top, best, s, q, w, slope, k, HAS_SOFTCAP, False)
        block_ptr += step
    if whole < V:
        mask_v = whole + offs_v < V
        v = tl.load(block_ptr + offsets, mask=mask_v, other=0.0).to(ACC) * sign
        v = tl.where(mask_v, v, float("-inf"))
        m, u_top, best, s, q, w = _take_block(v, whole, mask_v, m, u_top, best, s, q, w, slope, k, HAS_SOFTCAP, True)

    # Sums over the row without the max.
    others = ordered_sum(s)
    log_sum_squared = _log1p(ordered_sum(q)) - 2.0 * _log1p(others)
    # NaN anywhere is NaN in the sums, +inf is NaN in the differences to it unless it stands alone.
    valid = in_vocab & (best >= 0) & (u_top < float("inf")) & (log_sum_squared == log_sum_squared) & (c == c)
    nan = float("nan")
    mean = ordered_sum_of_signs(w) / V * c
    tl.store(top1_ptr + row, (valid & (v_label >= m)).to(tl.int8))
    tl.store(log_sum_squared_ptr + row, tl.where(valid, log_sum_squared, nan))
    tl.store(argmax_ptr + row, tl.where(valid, best, -1).to(tl.int64))
    tl.store(mean_ptr + row, tl.where(valid, mean, nan))


def row_statistics_fwd(
    logits: Tensor,  # (N, V), any strides
    labels: Tensor,  # (N,) int32 or int64
    inv_temperature: float | Tensor,  # scalar or (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (is_top1 bool, log_sum_squared_probs, argmax int64, mean_logits), each (N,), floats of float32 or float64.

    Ignored rows are (False, 0, -1, 0) and their logits are not read. (False, NaN, -1, NaN) marks a row whose label is
    outside [0, V), whose temperature is not positive and finite, which holds NaN or +inf, or which is -inf throughout.

    Args:
        logits: the logits, of any strides.
        labels: the entry of each row to compare with the largest. Of equal entries each is the largest.
        inv_temperature: 1 / T, for all rows or per row.
        logit_scale: factor on the logits before the softcap, not 0.
        softcap: bound of the softcap, 0.0 for none.
        ignore_index: the label of rows that do not count.
    """
    n, v = logits.shape
    dtype = result_dtype(logits)
    is_top1 = torch.empty(n, dtype=torch.int8, device=logits.device)
    log_sum_squared, mean = (torch.empty(n, dtype=dtype, device=logits.device) for _ in range(2))
    argmax = torch.empty(n, dtype=torch.int64, device=logits.device)
    if n > 0:
        tile = tile_for(TILES, logits.dtype, v)
        with on_device_of(logits):
            _row_statistics_fwd_kernel[(n,)](
                *matrix_arguments(logits),
                *row_arguments(labels, inv_temperature),
                is_top1,
                log_sum_squared,
                argmax,
                mean,
                v,
                *slope_and_factor(logit_scale, softcap),
                ignore_index,
                HAS_SOFTCAP=bool(softcap),
                BLOCK_V=tile.block,
                **launch_options(tile),
            )
    return is_top1.view(torch.bool), log_sum_squared, argmax, mean
