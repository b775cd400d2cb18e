"""Sums and linear recurrences over the tokens of each sequence: a kernel where Triton runs, else plain PyTorch.

Legend: N tokens, S sequences.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl import reference
from fastrl.backends import choice


def segment_sum(
    x: Tensor,  # (N,)
    lengths: Tensor,  # (S,) int64, summing to N
    *,
    backend: str = "auto",
) -> Tensor:
    """Return the sums (S,) over consecutive segments, 0 for an empty one: `reference.segment_sum`.

    Sums are accumulated in float64 in an order that depends on the length of a segment only, and zeros behind the end
    of a segment change no bit, so that padded and packed sequences have the same sum. No host synchronisation.

    Args:
        x: (N,) float32 or float64.
        lengths: (S,) on the device of `x`, checked by the caller.
        backend: "auto" takes Triton on GPUs and PyTorch elsewhere. "torch" and "triton" are used or refused.

    Returns:
        (S,) in the dtype of `x`, differentiable any number of times: each element gets the gradient of its sum.
    """
    if not choice.kernel_runs(backend, x.device):
        return reference.segment_sum(x, lengths)
    return _segment_sum(x, F.pad(lengths.cumsum(0), (1, 0)))


def segment_sum_for(backend: str) -> reference.SegmentSum:
    """Return `segment_sum` on the backend that goes with row kernels of a chosen backend."""
    return partial(segment_sum, backend=choice.companion_backend(backend))


def reverse_scan(
    b: Tensor,  # (N,)
    c: Tensor,  # (N,) 0 where a sequence ends
    lengths: Tensor,  # (S,) int64, summing to N
    reach: int,
    *,
    backend: str = "auto",
) -> Tensor:
    """Return x (N,) with x_t = b_t + c_t x_{t+1} inside each sequence, x = b at its last token. Not differentiated.

    If c_t is 0, the values behind t do not matter, not even NaN. Terms of 0 behind the end of a sequence change no bit.
    The kernel accumulates in float64, PyTorch in the dtype of `b`. No host synchronisation.

    Args:
        b: (N,) float32 or float64: the terms.
        c: (N,) as `b`: the factors.
        lengths: (S,) on the device of `b`, checked by the caller.
        reach: an upper bound of the lengths. The kernel does not need it.
        backend: as for `segment_sum`.
    """
    b, c = b.detach(), c.detach()
    if not choice.kernel_runs(backend, b.device):
        return reference.reverse_scan(b, c, reach)
    from fastrl_kernels import segments

    return segments.reverse_scan_fwd(b, c, F.pad(lengths.cumsum(0), (1, 0)))


def running_sum(x: Tensor) -> Tensor:  # (..., L) -> (..., L)
    """Return x.cumsum(-1) of float32 or float64, not differentiated, the same bits each time on every device.

    PyTorch's cumulative sum of floats on a GPU is not deterministic, and raises if deterministic algorithms are asked
    for. No host synchronisation.
    """
    if x.numel() == 0:
        return x.detach().clone()
    if x.device.type == "cpu":
        return x.detach().cumsum(-1)
    # A running sum is the reverse scan of the flipped terms with factors of 1.
    length = x.shape[-1]
    terms = x.detach().flip(-1)
    factors = torch.ones_like(terms)
    factors[..., -1] = 0.0
    lengths = torch.full((x.numel() // length,), length, dtype=torch.int64, device=x.device)
    return reverse_scan(terms.reshape(-1), factors.reshape(-1), lengths, length).view(x.shape).flip(-1)


@torch.library.custom_op("fastrl::segment_sum", mutates_args=())
def _segment_sum(x: Tensor, offsets: Tensor) -> Tensor:
    from fastrl_kernels import segments

    return segments.segment_sum_fwd(x, offsets)


@_segment_sum.register_fake
def _(x: Tensor, offsets: Tensor) -> Tensor:
    return x.new_empty(offsets.shape[0] - 1)


@torch.library.custom_op("fastrl::segment_spread", mutates_args=())
def _segment_spread(values: Tensor, offsets: Tensor, n: int) -> Tensor:
    from fastrl_kernels import segments

    return segments.segment_sum_bwd(values, offsets, n)


@_segment_spread.register_fake
def _(values: Tensor, offsets: Tensor, n: int) -> Tensor:
    return values.new_empty(n)


def _sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, offsets = inputs
    ctx.n = x.shape[0]
    ctx.save_for_backward(offsets)


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return _segment_spread(grad, *ctx.saved_tensors, ctx.n), None


def _spread_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _spread_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _segment_sum(grad, *ctx.saved_tensors), None, None


_segment_sum.register_autograd(_sum_backward, setup_context=_sum_context)
_segment_spread.register_autograd(_spread_backward, setup_context=_spread_context)
