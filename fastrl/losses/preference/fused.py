"""The preference loss from hidden states, its gradient formed in the forward, in blocks of whole pairs or rows.

Legend: P pairs, B rows, T time, L live tokens, M live tokens of a block, D hidden, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrl.backends.choice import graph_break
from fastrl.losses.output import LossOutput, gemm_units, with_path, with_sparse_stats
from fastrl.losses.preference.axes import PreferenceAxes
from fastrl.losses.preference.inputs import PreferenceInputs
from fastrl.losses.preference.rows import kl_reference_point
from fastrl.losses.preference.tokens import loss_of_tokens
from fastrl.losses.scalars import cast_metrics
from fastrl.ops.fused import FusedFromHidden
from fastrl.ops.head import LinearRows
from fastrl.ops.sparse_rows import SparseStats


@dataclass(frozen=True)
class _Plan:
    """The loss as `FusedFromHidden` takes it."""

    spec: PreferenceAxes
    rows: LinearRows
    mask: Tensor  # (B, T)
    ref_logprobs: Tensor | None  # (B, T)
    inputs: PreferenceInputs
    """The other inputs of `from_logprobs`."""
    rows_per_group: int
    """2 for pairs, whose chosen rows are the first half of the batch, 1 for single rows."""
    group_sizes: Sequence[int]
    """Live tokens of each pair or row."""
    order: Tensor  # (L,) flat places of the live tokens, pair by pair
    stats: SparseStats | None

    @classmethod
    def of(
        cls,
        spec: PreferenceAxes,
        rows: LinearRows,
        mask: Tensor,
        ref_logprobs: Tensor | None,
        inputs: PreferenceInputs,
    ) -> _Plan:
        """Return the plan of a batch. The host waits for the live tokens of every pair or row."""
        size = 1 if spec.unpaired else 2
        ids = rows.restored(rows.labels)
        if ids.dim() != 2 or ids.shape[0] % size:
            shape = "(B, T)" if size == 1 else "(2P, T), chosen first"
            raise ValueError(f"labels must be {shape}, got {tuple(ids.shape)}")
        n = ids.shape[0] // size
        # Every place of the batch, the two rows of a pair behind each other.
        places = torch.arange(ids.numel(), device=ids.device).view(size, n, ids.shape[1]).transpose(0, 1)
        there = (ids != rows.options.ignore_index).view(size, n, ids.shape[1]).transpose(0, 1)
        inputs = _with_totals(spec, inputs, n, mask)
        stats = SparseStats(rows.hidden.device) if rows.options.tail_mass else None
        return cls(spec, rows, mask, ref_logprobs, inputs, size, there.sum((1, 2)).tolist(), places[there], stats)

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Which gradients to form."""
        return self.rows.needs

    def coefficients(self, logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
        """Return (dL/dlogprobs (M,), None) of the live tokens of whole pairs."""
        ends = list(accumulate(self.group_sizes))
        first, last = bisect_left(ends, block.start + 1), bisect_left(ends, block.stop)
        n, t = len(self.group_sizes), self.mask.shape[1]
        count = last + 1 - first
        rows = torch.cat(
            [torch.arange(first, last + 1, device=index.device) + side * n for side in range(self.rows_per_group)]
        )
        row, column = index // t, index % t
        within = row // n * count + row % n - first
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            padded = leaf.new_zeros(self.rows_per_group * count, t).index_put((within, column), leaf)
            output = self._evaluate(padded, rows)
            return torch.autograd.grad(output.loss, leaf)[0], None

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Return the loss of all pairs."""
        return self.output(logprobs).loss

    def output(self, logprobs: Tensor) -> LossOutput:
        """Return loss and metrics of all pairs, from (B T,) log-probs."""
        return loss_of_tokens(self.spec, logprobs.view(self.mask.shape), self.mask, self.ref_logprobs, self.inputs)

    def _evaluate(self, logprobs: Tensor, rows: Tensor) -> LossOutput:
        """Return what some rows add to the loss of the batch."""
        given, desirable = self.inputs.copy(), self.inputs.get("desirable")
        if desirable is not None:
            given["desirable"] = desirable[rows]
        ref = None if self.ref_logprobs is None else self.ref_logprobs[rows]
        return loss_of_tokens(self.spec, logprobs, self.mask[rows], ref, given)

    def gemm_units(self, recomputed: int, before: float) -> Tensor | float:
        """Return the GEMM units that ran, as a mean over live tokens."""
        live = max(1, self.order.numel())
        dense = 1.0 if self.stats is None else (self.stats.dense / live).float()
        return gemm_units(self.needs[0], self.needs[1], dense=dense, again=recomputed / live, before=before)


@graph_break
def policy_rows(hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> LinearRows:
    """Return `LinearRows.checked`, outside graphs of torch.compile: inside, label values would go unchecked."""
    return LinearRows.checked(hidden, weight, labels, **options)


@graph_break
def fused_preference(
    spec: PreferenceAxes,
    rows: LinearRows,  # of the policy, MASKED_LABEL under the mask
    mask: Tensor,  # (2P, T)
    ref_logprobs: Tensor | None,  # (2P, T)
    inputs: PreferenceInputs,
    units_before: float,
) -> LossOutput:
    """Return the loss of a spec whose pairs (or rows) do not depend on each other, its gradient formed in the forward.

    `units_before` are the GEMM units that the reference took.
    """
    plan = _Plan.of(spec, rows, mask, ref_logprobs, inputs)
    with torch.no_grad():
        # The loss refuses unfit inputs here, before the head runs.
        plan.output(rows.inv_temperature.new_zeros(rows.labels.numel()))
    loss, logprobs, entropy, recomputed = FusedFromHidden.apply(rows.hidden, rows.weight, rows.bias, plan)
    with torch.no_grad():
        metrics = plan.output(logprobs).metrics
        metrics |= cast_metrics({"entropy": (entropy.sum(), (mask != 0).sum())})
    output = LossOutput(loss, metrics, rows.restored(logprobs), rows.restored(entropy))
    output = output if plan.stats is None else with_sparse_stats(output, plan.stats)
    return with_path(output, plan.gemm_units(recomputed, units_before))


def _with_totals(spec: PreferenceAxes, inputs: PreferenceInputs, n: int, mask: Tensor) -> PreferenceInputs:
    """Return the inputs with the counts of the whole batch, so that blocks add up, and kto's reference point."""
    given = inputs.copy()
    if given.get("n_pairs") is None:
        given["n_pairs"] = n
    if not spec.unpaired:
        if given.get("n_tokens") is None:
            given["n_tokens"] = (mask[:n] != 0).sum()
    elif spec.shift == "reference_point" and given.get("reference_point") is None:
        mismatched = given.pop("kl_logprobs", None), given.pop("kl_ref_logprobs", None), given.pop("kl_mask", None)
        given["reference_point"] = kl_reference_point(*mismatched)
    return given
