"""The judge of every kernel and every loss: float64 decides, with an error budget and no per-test tolerance.

A result passes when its error against the float64 reference is at most twice the error of PyTorch's own
eager code at the precision under test on the same inputs, plus a few roundings of the largest magnitude.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Roundings granted beside the eager code's own error, relative to the largest magnitude of the exact result.
# A rounding is one unit in the last place of the dtype in which the result is returned.
ROUNDINGS = 4.0


def max_error(result: Tensor, exact: Tensor) -> float:
    """Return max |result - exact| in float64; positions must agree on where they are not finite."""
    result64, exact64 = result.detach().double().cpu(), exact.detach().double().cpu()
    assert result64.shape == exact64.shape, f"expected shape {tuple(exact64.shape)}, got {tuple(result64.shape)}"
    finite = torch.isfinite(exact64)
    same = torch.where(finite, torch.isfinite(result64), result64.eq(exact64) | (result64.isnan() & exact64.isnan()))
    assert bool(same.all()), f"non-finite values disagree at {(~same).nonzero()[:8].tolist()}"
    if not bool(finite.any()):
        return 0.0
    return float((result64 - exact64)[finite].abs().max())


def budget(exact: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Return the error granted: twice the eager code's error plus `ROUNDINGS` roundings of the largest value."""
    exact64 = exact.detach().double().cpu()
    finite = exact64[torch.isfinite(exact64)]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    eager64 = eager.detach().double().cpu()
    both = torch.isfinite(exact64) & torch.isfinite(eager64)
    eager_error = float((eager64 - exact64)[both].abs().max()) if bool(both.any()) else 0.0
    return 2.0 * eager_error + ROUNDINGS * torch.finfo(dtype).eps * max(largest, torch.finfo(dtype).tiny)


def assert_as_accurate(
    name: str, result: Tensor, exact: Tensor, eager: Tensor, dtype: torch.dtype | None = None
) -> None:
    """Assert that `result` is as close to `exact` (float64) as the budget of `eager` grants.

    Args:
        name: what is judged, for the message.
        result: the value under test.
        exact: the float64 reference on the same inputs.
        eager: PyTorch's eager code at the precision under test, on the same inputs.
        dtype: the precision under test; that of `result` unless given.
    """
    error, granted = max_error(result, exact), budget(exact, eager, dtype or result.dtype)
    assert error <= granted, f"{name}: error {error:.3e} against float64 exceeds the budget {granted:.3e}"
