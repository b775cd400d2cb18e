"""Sums and linear recurrences over consecutive segments of a flat tensor: one program per segment, of any length.

    sums_s = sum_{t in s} x_t          and            x_t = values_s for t in s         (each is the other's gradient)
    x_t = b_t + c_t x_{t+1} within the segment, x = b at its last element

The tiles of a segment start at its first element. Sums are in float64, in an order that depends on the position in the
segment only. Zeros behind its end change no bit: a padded sequence has the results of the packed one. No atomics.

Legend: N elements, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import Tile, launch_options, on_device_of

# A sequence of RL post-training has 10^2 to 10^5 tokens: 1 to 100 steps. Not yet tuned on a device.
SUM_TILE = Tile(1024, 4)
SCAN_TILE = Tile(512, 4)


@triton.jit
def _segment(offsets_ptr, N):
    """Return (segment, first element, end) of this program. The end is held inside the tensor."""
    segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(offsets_ptr + segment).to(tl.int64)
    end = tl.load(offsets_ptr + (segment + 1)).to(tl.int64)
    return segment, tl.maximum(begin, 0), tl.minimum(end, N.to(tl.int64))


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["x_ptr", "offsets_ptr", "sums_ptr"],
)
def _segment_sum_fwd_kernel(
    x_ptr,  # (N,)
    offsets_ptr,  # (S + 1,)
    sums_ptr,  # (S,)
    N,
    BLOCK: tl.constexpr,
):
    segment, begin, end = _segment(offsets_ptr, N)
    acc = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        acc += tl.load(x_ptr + offs, mask=offs < end, other=0.0).to(tl.float64)
    tl.store(sums_ptr + segment, tl.sum(acc, 0).to(sums_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["values_ptr", "offsets_ptr", "x_ptr"],
)
def _segment_sum_bwd_kernel(
    values_ptr,  # (S,)
    offsets_ptr,  # (S + 1,)
    x_ptr,  # (N,)
    N,
    BLOCK: tl.constexpr,
):
    segment, begin, end = _segment(offsets_ptr, N)
    value = tl.load(values_ptr + segment)
    for start in range(begin, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, tl.zeros((BLOCK,), value.dtype) + value, mask=offs < end)


@triton.jit
def _then(c_later, x_later, c, b):
    """Return the recurrence over a stretch of elements followed by another: (product of the factors, value).

    Selected, not multiplied: a factor of zero keeps out a NaN that stands behind it.
    """
    return c_later * c, b + tl.where(c != 0, c * x_later, 0.0)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=["b_ptr", "c_ptr", "offsets_ptr", "x_ptr"],
)
def _reverse_scan_fwd_kernel(
    b_ptr,  # (N,)
    c_ptr,  # (N,)
    offsets_ptr,  # (S + 1,)
    x_ptr,  # (N,)
    N,
    BLOCK: tl.constexpr,
):
    _, begin, end = _segment(offsets_ptr, N)
    lanes = tl.arange(0, BLOCK)
    carry = tl.zeros((), tl.float64)
    tiles = tl.cdiv(tl.maximum(end - begin, 0), BLOCK)
    for i in range(tiles):
        # The first lane holds the last element of the tile, so that the scan runs forward over the lanes.
        offs = begin + (tiles - 1 - i) * BLOCK + (BLOCK - 1 - lanes)
        mask = offs < end
        b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float64)
        c = tl.load(c_ptr + offs, mask=mask, other=1.0).to(tl.float64)
        factor, x = tl.associative_scan((c, b), 0, _then)
        x += tl.where(factor != 0, factor * carry, 0.0)
        carry = tl.sum(tl.where(lanes == BLOCK - 1, x, 0.0), 0)
        tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=mask)


def reverse_scan_fwd(
    b: Tensor,  # (N,) float32 or float64, any stride
    c: Tensor,  # (N,) as b
    offsets: Tensor,  # (S + 1,) int32 or int64
) -> Tensor:
    """Return x (N,) with x_t = b_t + c_t x_{t+1} within each segment, x = b at its last element.

    Accumulated in float64 and rounded once to the dtype of `b`. If c_t is 0, no element behind t matters, not even a
    NaN. Elements outside all segments are NaN.

    Args:
        b: the terms.
        c: the factors. The factor of a segment's last element is not used.
        offsets: where each segment starts, and at the end N. Nothing beyond N is read.
    """
    segments = offsets.numel() - 1
    x = torch.full((b.numel(),), float("nan"), dtype=b.dtype, device=b.device)
    if segments > 0 and b.numel() > 0:
        with on_device_of(b):
            _reverse_scan_fwd_kernel[(segments,)](
                b.contiguous(),
                c.contiguous(),
                offsets.contiguous(),
                x,
                b.numel(),
                BLOCK=SCAN_TILE.block,
                **launch_options(SCAN_TILE),
            )
    return x


def segment_sum_fwd(
    x: Tensor,  # (N,) float32 or float64, any stride
    offsets: Tensor,  # (S + 1,) int32 or int64
) -> Tensor:
    """Return the sums (S,) of the segments, accumulated in float64 and rounded once to the dtype of `x`.

    Args:
        x: the values.
        offsets: where each segment starts, and at the end N. Nothing beyond N is read.
    """
    segments = offsets.numel() - 1
    sums = torch.empty(segments, dtype=x.dtype, device=x.device)
    if segments > 0:
        with on_device_of(x):
            _segment_sum_fwd_kernel[(segments,)](
                x.contiguous(),
                offsets.contiguous(),
                sums,
                x.numel(),
                BLOCK=SUM_TILE.block,
                **launch_options(SUM_TILE),
            )
    return sums


def segment_sum_bwd(
    values: Tensor,  # (S,) any stride
    offsets: Tensor,  # (S + 1,) int32 or int64
    n: int,
) -> Tensor:
    """Return (N,): the value of its segment at every element, 0 at elements outside all segments."""
    x = torch.zeros(n, dtype=values.dtype, device=values.device)
    if values.numel() > 0 and n > 0:
        with on_device_of(values):
            _segment_sum_bwd_kernel[(values.numel(),)](
                values.contiguous(),
                offsets.contiguous(),
                x,
                n,
                BLOCK=SUM_TILE.block,
                **launch_options(SUM_TILE),
            )
    return x
