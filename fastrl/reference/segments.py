"""Sums and means over the tokens of a sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _accumulator(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type == "mps" else torch.float64


def segment_sum(
    x: Tensor,  # (N,)
    lengths: Tensor,  # (S,) int64, summing to N
) -> Tensor:
    """Return the (S,) sums over consecutive segments, accumulated in float64 in a fixed order."""
    total = torch.segment_reduce(x.to(_accumulator(x)), "sum", lengths=lengths, unsafe=True, initial=0)
    return total.to(x.dtype)


SegmentSum = Callable[[Tensor, Tensor], Tensor]
"""(values (N,), lengths (S,)) -> sums (S,). Functions that pool over sequences take one, so that a kernel may replace
`segment_sum`."""


def segment_mean(x: Tensor, mask: Tensor, lengths: Tensor, sums: SegmentSum = segment_sum) -> Tensor:
    """Return the (S,) means of `x` over the live tokens of each segment, 0 for a segment without any."""
    count = sums(mask.to(x.dtype), lengths).clamp(min=1.0)
    return sums(torch.where(mask, x, 0.0), lengths) / count


def spread(per_sequence: Tensor, lengths: Tensor, n_tokens: int) -> Tensor:
    """Return per-sequence values (S,) repeated over their tokens (N,)."""
    return per_sequence.repeat_interleave(lengths, output_size=n_tokens)


def total(x: Tensor, lengths: Tensor, sums: SegmentSum = segment_sum) -> Tensor:
    """Return the sum of `x` (N,), sequence by sequence: padding and packing give the same bits."""
    return sums(x.to(_accumulator(x)), lengths).sum().to(x.dtype)


def reverse_scan(
    b: Tensor,  # (N,)
    c: Tensor,  # (N,) 0 where a sequence ends
    reach: int,
) -> Tensor:
    """Return x (N,) with x_t = b_t + c_t x_{t+1}, where no run of non-zero `c` is longer than `reach`.

    Every step doubles the reach of all positions (Hillis and Steele 1986): log2(reach) steps over whole tensors.
    """
    x, c = b.clone(), c.clone()
    step = 1
    while step < min(reach, b.numel()):
        # Selected, not multiplied: a NaN behind the end of the sequence must not come through a factor of zero.
        ahead = torch.where(c[:-step] != 0, c[:-step] * x[step:], 0.0)
        carried = c[:-step] * c[step:]
        x = torch.cat([x[:-step] + ahead, x[-step:]])
        c = torch.cat([carried, torch.zeros_like(c[-step:])])
        step *= 2
    return x
