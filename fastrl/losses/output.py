"""What every loss returns."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.ops.sparse_rows import SparseStats


class LossOutput(NamedTuple):
    """The loss and what was learnt on the way.

    Nothing here needs a host synchronisation to build. Metrics are sums and counts, so that adding them over
    micro-batches and ranks and dividing once gives the exact mean.
    """

    loss: Tensor
    """Scalar, attached to the graph (also where there is nothing to learn from: then 0 with zero gradients)."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count), detached, on the device of the inputs."""
    logprobs: Tensor | None
    """Per-token log-probabilities, detached, where the loss computed them; 0 at masked positions."""
    entropy: Tensor | None
    """Per-token entropies, detached, where the loss computed them; 0 at masked positions."""


def shown(spec: Any) -> str:
    """Return the repr of a loss as one would write it: the fields that differ from their defaults."""
    fields = [(field, getattr(spec, field.name)) for field in dataclasses.fields(spec)]
    given = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f"{type(spec).__name__}({', '.join(given)})"


def with_sparse_stats(output: LossOutput, stats: SparseStats) -> LossOutput:
    """Return the output with the counts of `stats` among the metrics."""
    return output._replace(metrics={**output.metrics, **stats.metrics()})


def with_path(output: LossOutput, units: float | Tensor) -> LossOutput:
    """Return the output with the GEMM units that its path takes among the metrics."""
    one = torch.ones((), device=output.loss.device)
    return output._replace(metrics={**output.metrics, "path/gemm_units": (one * units, one)})
