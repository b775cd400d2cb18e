"""Sums and values over consecutive segments of a flat tensor: one program per segment, of any length.

    sums_s = sum_{t in s} x_t          and, the gradient of one the other,          x_t = values_s for t in s

The tiles of a segment start at its first element and are added lane by lane in float64, so that zeros behind its end
change no bit: a padded sequence has the sum of the packed one. Nothing is added atomically.
N elements, S segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import COMPILE_OPTIONS, Tile, on_device_of

# A sequence of RL post-training has 10^2 to 10^5 tokens: 1 to 100 steps. Not yet tuned on a device.
SUM_TILE = Tile(1024, 4)


@triton.jit
def _segment(offsets_ptr, N):
    """Return (segment, first element, end) of this program; the end is held inside the tensor."""
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


def segment_sum_fwd(
    x: Tensor,  # (N,) float32 or float64, any stride
    offsets: Tensor,  # (S + 1,) int32 or int64
) -> Tensor:
    """Return the sums (S,) of the segments, accumulated in float64 and rounded once to the dtype of `x`.

    Args:
        x: the values.
        offsets: where each segment starts, and at the end N; what lies beyond N is not read.
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
                num_warps=SUM_TILE.num_warps,
                **COMPILE_OPTIONS,
            )
    return sums


def segment_sum_bwd(
    values: Tensor,  # (S,) any stride
    offsets: Tensor,  # (S + 1,) int32 or int64
    n: int,
) -> Tensor:
    """Return (N,): the value of its segment at every element, 0 at elements that no segment holds."""
    x = torch.zeros(n, dtype=values.dtype, device=values.device)
    if values.numel() > 0 and n > 0:
        with on_device_of(values):
            _segment_sum_bwd_kernel[(values.numel(),)](
                values.contiguous(),
                offsets.contiguous(),
                x,
                n,
                BLOCK=SUM_TILE.block,
                num_warps=SUM_TILE.num_warps,
                **COMPILE_OPTIONS,
            )
    return x
