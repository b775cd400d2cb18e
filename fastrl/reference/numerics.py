"""Exponentials that stay finite, and the clamp without a gradient outside."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# e^32 x 1e4 squared is 6e35: a ratio times a k3 estimate still fits float32.
EXP_LIMIT = 32.0


LOG_RATIO_LIMIT = 1e4


# Below this |x|, e^x - 1 - x is its series: the difference has lost a digit at 0.5 and all of them at 1e-7 in float32.
SERIES_REACH, SERIES_ORDER = 0.5, 16


# --- small parts ------------------------------------------------------------------------------------------------------


def exp_linear(x: Tensor, limit: float = EXP_LIMIT) -> Tensor:
    """Return exp(x), continued linearly beyond `limit`. NaN stays NaN, +inf is held at `LOG_RATIO_LIMIT`."""
    x = x.clamp(max=LOG_RATIO_LIMIT)
    return torch.where(x > limit, math.exp(limit) * (x - (limit - 1.0)), x.clamp(max=limit).exp())


def _exp_remainder_series(x: Tensor) -> Tensor:
    series = torch.ones_like(x)
    for i in range(SERIES_ORDER, 2, -1):
        series = (series * x).mul_(1.0 / i).add_(1.0)
    return 0.5 * x * x * series


class _ExpRemainder(torch.autograd.Function):
    """The series of `exp_remainder` with its derivative e^x - 1: autograd would keep each of its partial sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _exp_remainder_series(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.expm1(x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * torch.expm1(x)


def exp_remainder(x: Tensor) -> Tensor:
    """Return e^x - 1 - x for |x| <= `SERIES_REACH` as x^2/2 (1 + x/3 (1 + x/4 (...))), to a few roundings of itself."""
    # torch.compile traces no function with a jvp, and makes one pass of the plain series.
    return _exp_remainder_series(x) if torch.compiler.is_compiling() else _ExpRemainder.apply(x)


def one_sided(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Clamp `x` to [low, high], either side open when None."""
    return x if low is None and high is None else x.clamp(min=low, max=high)
