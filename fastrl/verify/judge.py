"""The rule of `fastrl verify`: compare a kernel's error with the error of plain PyTorch in the same precision."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.backends import choice

# Roundings granted on top of the eager code's own error, relative to the largest magnitude of the exact result.
# A rounding is one unit in the last place of the result's dtype.
ROUNDINGS = 4.0


# Number of values to judge at a time in float64: a gradient of real logits has 10^9.
PIECE = 1 << 26


class Disagreement(AssertionError):
    """A result that no error bound can allow: another shape, or a non-finite value where the exact one is finite."""


def max_error(result: Tensor, exact: Tensor) -> float:
    """Return max |result - exact| in float64. Both must have the same non-finite values at the same places.

    Raises:
        Disagreement: the shapes differ, or the non-finite values or their places.
    """
    if result.shape != exact.shape:
        raise Disagreement(f"expected shape {tuple(exact.shape)}, got {tuple(result.shape)}")
    largest, done = 0.0, 0
    for got, right in _pieces(result, exact):
        finite = torch.isfinite(right)
        same = torch.where(finite, torch.isfinite(got), got.eq(right) | (got.isnan() & right.isnan()))
        if not bool(same.all()):
            places = (~same).nonzero().squeeze(-1)[:8].cpu() + done
            places = torch.stack(torch.unravel_index(places, exact.shape), -1).tolist() if exact.dim() else [[]]
            raise Disagreement(f"non-finite values disagree at {places}")
        largest = max(largest, _largest_difference(got, right, finite))
        done += right.numel()
    return largest


def budget(exact: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Return the error granted: twice the eager code's error plus `ROUNDINGS` roundings of the largest value."""
    largest = eager_error = 0.0
    for usual, right in _pieces(eager, exact):
        finite = torch.isfinite(right)
        largest = max(largest, _largest_difference(right, torch.zeros_like(right), finite))
        eager_error = max(eager_error, _largest_difference(usual, right, finite & torch.isfinite(usual)))
    return 2.0 * eager_error + ROUNDINGS * torch.finfo(dtype).eps * max(largest, torch.finfo(dtype).tiny)


def _pieces(result: Tensor, exact: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both in float64, flat and piece by piece: on the GPU if both are there, else on the CPU."""
    place = exact.device if result.device == exact.device and exact.device.type == "cuda" else torch.device("cpu")
    pairs = zip(result.detach().reshape(-1).split(PIECE), exact.detach().reshape(-1).split(PIECE), strict=True)
    for got, right in pairs:
        yield got.to(place).double(), right.to(place).double()


def _largest_difference(a: Tensor, b: Tensor, where: Tensor) -> float:
    """Return max |a - b| over the places in `where`, 0 if the tensors are empty."""
    return float(torch.where(where, a - b, 0.0).abs().max()) if a.numel() else 0.0


class Verdict(NamedTuple):
    """The part of a result that came closest to its bound, or went furthest beyond it."""

    part: str
    error: float
    granted: float

    @property
    def share(self) -> float:
        """Error divided by the granted error. Above 1 it is too large."""
        if self.granted > 0.0:
            return self.error / self.granted
        return 0.0 if self.error == 0.0 else math.inf


Parts = Mapping[str, Tensor]


def judged(result: Parts, exact: Parts, eager: Parts) -> Verdict:
    """Return the worst verdict over the parts of a result."""
    if result.keys() != exact.keys():
        raise Disagreement(f"expected {', '.join(exact)}, got {', '.join(result)}")
    return worst(
        Verdict(name, max_error(value, exact[name]), budget(exact[name], eager[name], value.dtype))
        for name, value in result.items()
    )


def same_bits(result: Parts, other: Parts) -> Verdict:
    """Return the worst difference between results that must agree bit for bit."""
    return worst(
        Verdict(name, 0.0 if torch.equal(value, other[name]) else max_error(value, other[name]) or math.ulp(0.0), 0.0)
        for name, value in result.items()
    )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict that comes closest to its bound, or goes furthest beyond it."""
    return max(verdicts, key=lambda verdict: verdict.share)


@dataclass(frozen=True)
class Setting:
    """Device and backend of a check, and the seed of its inputs."""

    device: torch.device
    backend: str
    seed: int = 0
    quick: bool = False

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels, a thousand times slower than a compiler's."""
        return self.backend == "triton" and self.device.type not in choice.GPU_TYPES

    def generator(self, name: str) -> torch.Generator:
        """Return the generator of a check. It does not depend on which other checks run."""
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)


Look = Callable[[], Verdict]


Named = Iterator[tuple[str, Look]]
