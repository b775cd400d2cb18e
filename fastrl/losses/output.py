"""The output of every loss."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.ops.sparse_rows import SparseStats


class LossOutput(NamedTuple):
    """A loss with its metrics and, if the loss computed them, log-probs and entropies.

    No field costs a host sync. Metrics are sums and counts: add them over micro-batches and ranks, divide once, and the
    mean is exact.
    """

    loss: Tensor
    """Scalar, attached to the graph. An empty batch gives 0 with zero gradients."""
    metrics: dict[str, tuple[Tensor, Tensor]]
    """Name -> (sum, count), detached, on the device of the inputs."""
    logprobs: Tensor | None
    """Per-token log-probabilities, detached, if the loss computed them. 0 at masked positions."""
    entropy: Tensor | None
    """Per-token entropies, detached, if the loss computed them. 0 at masked positions."""


def shown(spec: Any) -> str:
    """Return the repr of a loss as source code: the fields that differ from their defaults."""
    fields = [(field, getattr(spec, field.name)) for field in dataclasses.fields(spec)]
    given = [f"{field.name}={value!r}" for field, value in fields if value != field.default]
    return f"{type(spec).__name__}({', '.join(given)})"


def with_sparse_stats(output: LossOutput, stats: SparseStats) -> LossOutput:
    """Return the output with the counts of `stats` among the metrics."""
    return output._replace(metrics={**output.metrics, **stats.metrics()})


def gemm_units(
    trains_hidden: bool,
    trains_head: bool,
    *,
    dense: float | Tensor = 1.0,
    again: float | Tensor = 0.0,
    before: float = 0.0,
) -> float | Tensor:
    """Return the cost of a loss from hidden states, in products of the size of hidden times head.

    | product | units |
    |---|---|
    | logits in the forward | 1 |
    | gradient of the hidden states | `dense`, if they are trained |
    | gradient of the head | `dense`, if it is trained |
    | logits formed a second time | `again` |

    Args:
        trains_hidden, trains_head: which gradients are formed. The gradient of a bias costs no product.
        dense: share of the live tokens whose gradient goes through the products.
        again: share of the live tokens whose logits are formed twice.
        before: units that other passes took, for example the reference's forward.
    """
    return before + 1.0 + (trains_hidden + trains_head) * dense + again


def with_path(output: LossOutput, units: float | Tensor) -> LossOutput:
    """Return the output with the GEMM units of its path among the metrics."""
    one = torch.ones((), device=output.loss.device)
    return output._replace(metrics={**output.metrics, "path/gemm_units": (one * units, one)})
