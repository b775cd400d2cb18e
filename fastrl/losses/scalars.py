"""Small helpers of the losses: divisors, dtypes of results, masked means."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import checks


def wide(x: Tensor) -> Tensor:
    """Return x in the accumulation dtype: float64, or float32 on devices without it."""
    return x.float() if x.device.type == "mps" else x.double()


def result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of the loss: float64 for float64 inputs, else float32."""
    return checks.wide(x.dtype)


def live(x: Tensor, keep: Tensor) -> Tensor:
    """Return x in the accumulation dtype, with zeros at masked positions."""
    return wide(torch.where(keep, x, 0.0))


def choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """Return yes or no in the dtype of `like`. torch.where rounds plain numbers to float32 first."""
    return torch.where(condition, like.new_full((), yes), like.new_full((), no))


def constant(x: Tensor | None) -> Tensor | None:
    """Return x in the accumulation dtype, without its graph."""
    return None if x is None else wide(x.detach())


def divisor(count: float | Tensor | None) -> float | Tensor:
    """Return a count as a divisor: 1 for None, and for 0, the count of an empty batch."""
    if count is None:
        return 1.0
    checks.count("n_pairs or n_tokens", count, zero=True)
    if not isinstance(count, Tensor):
        return float(count) or 1.0
    return torch.where(count == 0, 1, count).reshape(())


def masked_mean(x: Tensor, rows: Tensor) -> Tensor:
    """Return the mean of the rows kept, 0 without any."""
    return torch.where(rows, x, 0.0).sum() / rows.sum().clamp(min=1)


def cast_metrics(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the (sum, count) pairs detached, in the accumulation dtype."""
    return {name: (wide(total.detach()), wide(count.detach())) for name, (total, count) in metrics.items()}


def scalar_like(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    """Return one number as a detached 0-d tensor like `like`, or raise."""
    if not isinstance(value, Tensor):
        return like.new_full((), checks.plain_float(name, value))
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    return value.detach().reshape(()).to(like)
