"""Cost and error of `tail_mass` over entropy, list length and `tail_mass`, on a real model's own samples.

Every setting runs forward and backward of the loss through `PolicyLoss.from_hidden`, in turns with the exact path and
with one bare GEMM of the tokens through the head, which is the unit. Errors are relative to the largest entry of the
exact path's gradient.

Legend: N tokens, K places of a row's list.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastrl
from bench import measure
from bench.samples import Samples
from fastrl.ops import sparse_rows

TEMPERATURES = (0.5, 0.7, 1.0)
TAIL_MASSES = (1e-5, 1e-4, 1e-3, 4e-3)
PLACES = (64, 256, 1024)
LOSS = fastrl.PolicyLoss.preset("reinforce")


@contextmanager
def places(count: int) -> Iterator[None]:
    """Let lists on a CPU have `count` places."""
    before = sparse_rows.PLACES
    _, _, min_entries = before["cpu"][-1]
    sparse_rows.PLACES = {**before, "cpu": ((1.0, count, min_entries),)}
    try:
        yield
    finally:
        sparse_rows.PLACES = before


class Step:
    """Forward and backward of the loss on some samples, with advantages of both signs. It keeps its results."""

    def __init__(self, samples: Samples, tail_mass: float, count: int) -> None:
        self.samples, self.tail_mass, self.count = samples, tail_mass, count
        self.leaves = (samples.hidden.unsqueeze(0).requires_grad_(), samples.weight.clone().requires_grad_())
        self.advantages = torch.linspace(-1.0, 1.0, samples.labels.numel()).unsqueeze(0)
        self.metrics: dict[str, tuple[Tensor, Tensor]] = {}
        self.gradients: tuple[Tensor, ...] = ()

    def __call__(self) -> None:
        """Run once."""
        labels = self.samples.labels.unsqueeze(0)
        self.gradients = ()
        with places(self.count):
            output = LOSS.from_hidden(
                *self.leaves,
                labels,
                advantages=self.advantages,
                mask=torch.ones_like(self.advantages),
                temperature=self.samples.temperature,
                tail_mass=self.tail_mass,
            )
        self.gradients = torch.autograd.grad(output.loss, self.leaves)
        self.metrics = output.metrics

    def mean(self, name: str) -> float:
        """Return a metric, 0 if it is absent."""
        total, count = self.metrics.get(name, (torch.zeros(()), torch.ones(())))
        return float(total / count)


def _errors(step: Step, exact: tuple[Tensor, ...]) -> list[float]:
    return [float((a - b).abs().max() / b.abs().max()) for a, b in zip(step.gradients, exact, strict=True)]


def measure_samples(
    samples: Samples, settings: Iterable[tuple[float, int]], plan: measure.Plan
) -> list[dict[str, Any]]:
    """Return one record per (tail_mass, places), the exact path first.

    Args:
        samples: of the model.
        settings: (tail_mass, places) of each record.
        plan: rounds and budget, one budget for all settings together.
    """
    steps = [Step(samples, 0.0, max(PLACES)), *(Step(samples, *setting) for setting in settings)]
    found, exact = [], ()
    for step in steps:
        step()
        exact = exact or step.gradients
        error = _errors(step, exact)
        found.append(
            {
                "temperature": samples.temperature,
                "mean_entropy": step.mean("entropy"),
                "tail_mass": step.tail_mass,
                "places": step.count if step.tail_mass else None,
                "sparse_rows": step.mean("sparse/rows"),
                "left_max": step.mean("sparse/left_max"),
                "error_hidden": error[0],
                "error_weight": error[1],
            }
        )
        step.gradients = step.gradients if step.tail_mass == 0.0 else ()
    logits = torch.empty((samples.labels.numel(), samples.weight.shape[0]))
    actions: dict[str, measure.Action] = {
        measure.GEMM: lambda: torch.mm(samples.hidden.detach(), samples.weight.t(), out=logits)
    }
    actions |= {str(i): step for i, step in enumerate(steps)}
    seconds = measure.measure(actions, torch.device("cpu"), plan)
    for i, record in enumerate(found):
        record |= measure.summary(seconds[str(i)], seconds[measure.GEMM])
        record["best_units"] = min(seconds[str(i)]) / min(seconds[measure.GEMM])
    return found


def table(records: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of a table, the header first."""
    rows = [["T, entropy", "tail_mass", "places", "sparse rows", "GEMM units", "best", "error dX", "error dW"]]
    for r in records:
        exact = r["tail_mass"] == 0.0
        rows.append(
            [
                f"{r['temperature']:g}, {r['mean_entropy']:.2f} nats",
                "exact" if exact else f"{r['tail_mass']:g}",
                "" if exact else str(r["places"]),
                "" if exact else f"{r['sparse_rows']:.1%}",
                f"{r['units']['median']:.2f}",
                f"{r['best_units']:.2f}",
                "" if exact else f"{r['error_hidden']:.1e}",
                "" if exact else f"{r['error_weight']:.1e}",
            ]
        )
    return rows


def plot(records: list[dict[str, Any]], path: Path) -> Path:
    """Draw sparse rows, cost and error over the tail mass, a colour per temperature and a marker per list length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(19, 4.2), layout="constrained")
    columns = ("sparse_rows", "best_units", "error_hidden", "error_weight")
    titles = ("rows taken as lists", "GEMM units, forward and both gradients", "error of dX", "error of dW")
    for color, temperature in enumerate(sorted({r["temperature"] for r in records})):
        mine = [r for r in records if r["temperature"] == temperature]
        label = f"T = {temperature:g}, {mine[0]['mean_entropy']:.2f} nats"
        for marker, count in zip("ovs", sorted({r["places"] for r in mine if r["places"]}), strict=False):
            line = [r for r in mine if r["places"] == count]
            for axis, column in zip(axes, columns, strict=True):
                name = f"{label}, K = {count}" if axis is axes[0] else None
                style = {"color": f"C{color}", "marker": marker, "alpha": 0.8, "label": name}
                axis.plot([r["tail_mass"] for r in line], [r[column] for r in line], **style)
        axes[1].axhline(mine[0]["best_units"], color=f"C{color}", linestyle=":", linewidth=1)
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xscale="log", xlabel="tail_mass")
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.03)
    figure.legend(fontsize=8, loc="outside right center")
    axes[1].set_ylim(bottom=0)
    axes[1].axhline(1.0, color="black", linestyle="--", linewidth=1)
    for axis in axes[2:]:
        axis.set_yscale("log")
        axis.plot(TAIL_MASSES, TAIL_MASSES, color="black", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
