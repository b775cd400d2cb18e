"""The preference loss from hidden states, its gradient formed in the forward, in blocks of whole pairs or rows.

Legend: P pairs, B rows, T time, L live tokens, M live tokens of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrl.backends.choice import graph_break
from fastrl.losses.output import LossOutput, with_path, with_sparse_stats
from fastrl.losses.preference.rows import kl_reference_point
from fastrl.losses.scalars import cast_metrics
from fastrl.ops.fused import FusedFromHidden
from fastrl.ops.head import LinearRows
from fastrl.ops.sparse_rows import SparseStats

PER_ROW = ("labels",)
"""Inputs of `from_logprobs` with one value per row. The others are constants of the batch."""


@dataclass(frozen=True)
class PreferenceInputs:
    """The inputs of `from_logprobs` beside the policy's log-probs."""

    mask: Tensor  # (2P, T) or (B, T)
    ref_logprobs: Tensor | None  # the same shape
    others: dict[str, Any]

    def at(self, rows: Tensor) -> PreferenceInputs:
        """Return the inputs of some rows."""
        others = {name: x[rows] if name in PER_ROW and x is not None else x for name, x in self.others.items()}
        return PreferenceInputs(self.mask[rows], None if self.ref_logprobs is None else self.ref_logprobs[rows], others)


@dataclass(frozen=True)
class _Plan:
    """The loss as `FusedFromHidden` takes it."""

    spec: Any  # PreferenceLoss
    rows: LinearRows
    inputs: PreferenceInputs
    rows_per_group: int
    """2 for pairs, whose chosen rows are the first half of the batch, 1 for single rows."""
    group_sizes: Sequence[int]
    """Live tokens of each pair or row."""
    order: Tensor  # (L,) flat places of the live tokens, pair by pair
    stats: SparseStats | None

    @classmethod
    def of(cls, spec: Any, rows: LinearRows, inputs: PreferenceInputs) -> _Plan:
        """Return the plan of a batch. The host waits for the live tokens of every pair or row."""
        size = 1 if spec.unpaired else 2
        ids = rows.restored(rows.labels)
        if ids.dim() != 2 or ids.shape[0] % size:
            shape = "(B, T)" if size == 1 else "(2P, T), chosen first"
            raise ValueError(f"labels must be {shape}, got {tuple(ids.shape)}")
        n = ids.shape[0] // size
        # Every place of the batch, the two rows of a pair behind each other.
        places = torch.arange(ids.numel(), device=ids.device).view(size, n, -1).transpose(0, 1)
        there = (ids != rows.options.ignore_index).view(size, n, -1).transpose(0, 1)
        inputs = replace(inputs, others=_with_totals(spec, inputs.others, n, inputs.mask))
        stats = SparseStats(rows.hidden.device) if rows.options.tail_mass else None
        return cls(spec, rows, inputs, size, there.sum((1, 2)).tolist(), places[there], stats)

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Which gradients to form."""
        return self.rows.needs

    def coefficients(self, logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
        """Return (dL/dlogprobs (M,), None) of the live tokens of whole pairs."""
        ends = list(accumulate(self.group_sizes))
        first, last = bisect_left(ends, block.start + 1), bisect_left(ends, block.stop)
        n, t = len(self.group_sizes), self.inputs.mask.shape[1]
        count = last + 1 - first
        rows = torch.cat(
            [torch.arange(first, last + 1, device=index.device) + side * n for side in range(self.rows_per_group)]
        )
        row, column = index // t, index % t
        within = row // n * count + row % n - first
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            padded = leaf.new_zeros(self.rows_per_group * count, t).index_put((within, column), leaf)
            output = self._evaluate(padded, self.inputs.at(rows))
            return torch.autograd.grad(output.loss, leaf)[0], None

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Return the loss of all pairs."""
        return self.output(logprobs).loss

    def output(self, logprobs: Tensor) -> LossOutput:
        """Return loss and metrics of all pairs, from (B T,) log-probs."""
        return self._evaluate(logprobs.view(self.inputs.mask.shape), self.inputs)

    def _evaluate(self, logprobs: Tensor, inputs: PreferenceInputs) -> LossOutput:
        """Return the share of some rows in the loss of the batch."""
        return self.spec.from_logprobs(logprobs, inputs.mask, inputs.ref_logprobs, **inputs.others)

    def gemm_units(self, recomputed: int) -> Tensor | float:
        """Return the GEMM units that ran, as a mean over live tokens."""
        live = max(1, self.order.numel())
        dense = 1.0 if self.stats is None else (self.stats.dense / live).float()
        return 1.0 + (self.needs[0] + self.needs[1]) * dense + recomputed / live


@graph_break
def policy_rows(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> LinearRows:
    """Return `LinearRows.checked`, outside graphs of torch.compile: inside, label values would go unchecked."""
    return LinearRows.checked(hidden, weight, labels, **options)


@graph_break
def fused_preference(
    spec: Any,  # PreferenceLoss
    rows: LinearRows,  # of the policy, MASKED_LABEL under the mask
    inputs: PreferenceInputs,
    units_before: float,
) -> LossOutput:
    """Return the loss of a spec whose pairs (or rows) do not depend on each other, its gradient formed in the forward.

    `units_before` are the GEMM units that the reference took.
    """
    plan = _Plan.of(spec, rows, inputs)
    with torch.no_grad():
        # The loss refuses unfit inputs here, before the head runs.
        plan.output(rows.inv_temperature.new_zeros(rows.labels.numel()))
    loss, logprobs, entropy, recomputed = FusedFromHidden.apply(rows.hidden, rows.weight, rows.bias, plan)
    with torch.no_grad():
        metrics = plan.output(logprobs).metrics
        metrics |= cast_metrics({"entropy": (entropy.sum(), (inputs.mask != 0).sum())})
    output = LossOutput(loss, metrics, rows.restored(logprobs), rows.restored(entropy))
    output = output if plan.stats is None else with_sparse_stats(output, plan.stats)
    return with_path(output, units_before + plan.gemm_units(recomputed))


def _with_totals(spec: Any, inputs: dict[str, Any], n: int, mask: Tensor) -> dict[str, Any]:
    """Return the inputs with the counts of the whole batch, so that blocks add up, and kto's reference point."""
    given = {name: value for name, value in inputs.items() if value is not None}
    given.setdefault("n_pairs", n)
    if not spec.unpaired:
        given.setdefault("n_tokens", (mask[:n] != 0).sum())
    elif spec.shift == "reference_point" and "reference_point" not in given:
        given["reference_point"] = kl_reference_point(
            *(given.pop(name, None) for name in ("kl_logprobs", "kl_ref_logprobs", "kl_mask"))
        )
    return given
