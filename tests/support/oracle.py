"""The judge of every kernel and every loss: float64 decides, with an error budget and no per-test tolerance.

A result passes when its error against the float64 reference is at most twice the error of PyTorch's own
eager code at the precision under test on the same inputs, plus a few roundings of the largest magnitude.
The arithmetic is that of `fastrl verify`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.verify import ROUNDINGS as ROUNDINGS
from fastrl.verify import budget as budget
from fastrl.verify import max_error as max_error


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
