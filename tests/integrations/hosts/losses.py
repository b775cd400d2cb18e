"""The judge of an adapter's loss beside the host's own: value, gradient and every metric, in float32 and in float64.

In float32 the reference is the host's own code in float64, and its own float32 error sets the allowed one
(tests/support/oracle.py). In float64 the two may differ by roundings of the precision in which the host computes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from oracle import ROUNDINGS, budget, max_error
from torch import Tensor

from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.verify import Disagreement

NAMES = ("slime", "nemo_rl", "skyrl", "prime_rl")
"""The adapters to compare. The cases of each stand in a module of this folder."""


class Outcome(NamedTuple):
    """The results of a loss."""

    loss: Tensor
    gradient: Tensor
    """With respect to the log-probs, or to the logits if the host's loss takes logits."""
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """One setting and one batch, for the host's loss and the adapter's."""

    setting: str
    """The options, for messages and counts."""
    batch: str
    """Which batch, for messages."""
    inputs: Mapping[str, Any]
    """Tensors and lists of tensors, floats in float64."""
    host: Callable[[Mapping[str, Any]], Outcome]
    ours: Callable[[Mapping[str, Any]], Outcome]
    leaf: str = "logprobs"
    """The input for the gradient."""
    inner: torch.dtype = torch.float64
    """The precision in which the host computes with float64 inputs."""
    precisions: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    unlike: frozenset[str] = frozenset()
    """Metrics in which the adapter differs from the host on purpose, as its page says."""
    sizes: Mapping[str, float] = field(default_factory=dict)
    """Metric with terms that cancel -> the sum of the absolute terms."""


class Tally:
    """The counts of comparisons, and the differences."""

    def __init__(self) -> None:
        self.settings: set[str] = set()
        self.batches = 0
        self.losses = 0
        """Losses, each with its gradient: one per batch and precision."""
        self.metrics = 0
        self.largest = 0.0
        """The largest error as a share of the allowed one, over losses, gradients and metrics."""
        self.complaints: list[str] = []

    def add(self, comparison: Comparison) -> None:
        """Compare in every precision."""
        self.settings.add(comparison.setting)
        self.batches += 1
        for dtype in comparison.precisions:
            rounded = cast(comparison.inputs, dtype)
            exact = comparison.host(cast(rounded, torch.float64))
            eager = exact if dtype is torch.float64 else comparison.host(rounded)
            where = f"{comparison.setting}, {comparison.batch}, {str(dtype).removeprefix('torch.')}"
            precision = comparison.inner if dtype is torch.float64 else dtype
            size = rounded_size(exact, rounded[comparison.leaf])
            try:
                result = comparison.ours(rounded)
            except AdapterMismatchError as problem:
                self.complaints.append(f"{where}: {problem}")
                continue
            self._judge_outcome(where, comparison, (result, exact, eager), precision, size)

    def _judge_outcome(
        self, where: str, of: Comparison, sides: tuple[Outcome, Outcome, Outcome], precision: torch.dtype, size: float
    ) -> None:
        self.losses += 1
        self._judge(f"{where}: loss", [side.loss for side in sides], precision, size)
        self._judge(f"{where}: gradient", [side.gradient for side in sides], precision)
        ours, theirs = (set(side.metrics) for side in sides[:2])
        if ours != theirs:
            self.complaints.append(f"{where}: metrics {sorted(ours)}, the host's own {sorted(theirs)}")
        for name in sorted(ours & theirs - of.unlike):
            self.metrics += 1
            values = [side.metrics[name] for side in sides]
            # A host's mean of a mask is float32, even with float64 log-probs.
            single = isinstance(values[1], Tensor) and values[1].dtype is torch.float32
            cancelled = size if name.endswith("loss") else of.sizes.get(name, 0.0)
            numbers = [torch.as_tensor(value, dtype=torch.float64) for value in values]
            self._judge(f"{where}: {name}", numbers, torch.float32 if single else precision, cancelled)

    def _judge(self, name: str, of: list[Tensor], precision: torch.dtype, size: float = 0.0) -> None:
        result, exact, eager = of
        granted = budget(exact, eager, precision) + ROUNDINGS * torch.finfo(precision).eps * size
        try:
            error = max_error(result, exact)
        except Disagreement as problem:
            self.complaints.append(f"{name}: {problem}")
            return
        self.largest = max(self.largest, error / granted)
        if error > granted:
            self.complaints.append(f"{name}: error {error:.3g} exceeds {granted:.3g}")


def rounded_size(exact: Outcome, leaf: Tensor) -> float:
    """Return the scale of a loss's rounding errors. Its terms have both signs, so the loss can be far smaller."""
    return float(exact.loss.abs() + (exact.gradient.abs() * leaf.abs().clamp(min=1.0)).sum())


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Return a copy of tensors, lists and dicts of them, floats in another precision."""
    if isinstance(value, Mapping):
        return {name: cast(part, dtype) for name, part in value.items()}
    if isinstance(value, list):
        return [cast(part, dtype) for part in value]
    if isinstance(value, Tensor):
        return value.detach().to(dtype if value.is_floating_point() else value.dtype, copy=True)
    return value


def outcome(loss: Callable[[Tensor], tuple[Tensor, Mapping[str, Any]]], leaf: Tensor) -> Outcome:
    """Return loss, gradient and metrics at `leaf`."""
    point = leaf.detach().clone().requires_grad_()
    value, metrics = loss(point)
    (gradient,) = torch.autograd.grad(value, point)
    return Outcome(value.detach(), gradient, metrics)


def cases(name: str) -> ModuleType:
    """Return the module with the cases of an adapter."""
    return importlib.import_module(f"hosts.{name}_losses")


def compare(comparisons: Iterable[Comparison]) -> Tally:
    """Compare everything."""
    tally = Tally()
    for comparison in comparisons:
        tally.add(comparison)
    return tally
