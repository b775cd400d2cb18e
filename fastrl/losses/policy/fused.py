"""The policy loss from hidden states, its gradient formed in the forward.

Legend: N tokens, L live tokens, S sequences.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from fastrl import reference
from fastrl.backends.choice import companion_backend
from fastrl.losses.output import LossOutput, gemm_units, with_path, with_sparse_stats
from fastrl.losses.policy.axes import PolicyAxes
from fastrl.losses.policy.inputs import Batch
from fastrl.losses.policy.metrics import policy_metrics
from fastrl.ops.fused import FusedFromHidden
from fastrl.ops.head import LinearRows
from fastrl.ops.policy import fused_policy_terms
from fastrl.ops.sampling import check_labels_are_allowed
from fastrl.ops.segments import segment_sum_for
from fastrl.ops.sparse_rows import SparseStats


@dataclass(frozen=True)
class _Plan:
    """The loss as `FusedFromHidden` takes it."""

    spec: PolicyAxes
    batch: Batch
    rows: LinearRows
    needs: tuple[bool, bool, bool]
    columns: reference.TokenColumns
    group_sizes: Sequence[int] | None
    """Live tokens of each sequence, if the loss couples them."""
    group_lengths: Tensor | None  # (S,) int64, `group_sizes` on the device
    stats: SparseStats
    """The numbers of sparse and dense rows, counted in the forward."""
    order: None = None

    @classmethod
    def of(cls, spec: PolicyAxes, batch: Batch, rows: LinearRows) -> _Plan:
        """Return the plan of a batch. The host waits for the lengths if the loss couples the tokens of a sequence."""
        grad = torch.is_grad_enabled()
        needs = (grad and rows.needs[0], grad and rows.needs[1], grad and rows.needs[2])
        sums = segment_sum_for(rows.options.backend)
        lengths = None
        if spec.couples_sequences:
            lengths = sums(batch.mask.to(rows.inv_temperature.dtype), batch.layout.lengths).long()
        sizes = None if lengths is None else lengths.tolist()
        columns = batch.columns(spec, None, sums)
        return cls(spec, batch, rows, needs, columns, sizes, lengths, SparseStats(rows.hidden.device))

    @property
    def backend(self) -> str:
        """The backend of the rows."""
        return self.rows.options.backend

    def coefficients(
        self, logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return (dL/dlogprobs, dL/dentropy or None) of the live tokens of a block."""
        columns = self.columns.at(index)
        lengths = None
        if self.group_sizes is not None:
            assert self.group_lengths is not None
            ends = list(accumulate(self.group_sizes))
            first, last = bisect_left(ends, block.start + 1), bisect_left(ends, block.stop)
            lengths = self.group_lengths[first : last + 1]
        return policy_gradient_coefficients(self.spec, logprobs, entropy, columns, lengths, self.backend)

    def terms(self, logprobs: Tensor, entropy: Tensor) -> reference.TokenTerms:
        """Return the token arithmetic over all tokens."""
        columns = self.columns
        if self.group_sizes is not None:
            sums = segment_sum_for(self.backend)
            columns = reference.pooled_columns(
                self.spec, logprobs, columns, self.batch.mask, self.batch.layout.lengths, sums
            )
        return fused_policy_terms(self.spec, logprobs, entropy, columns, backend=companion_backend(self.backend))

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Return the loss of all tokens."""
        contribution = self.terms(logprobs, entropy).contribution
        return reference.total(contribution, self.batch.layout.lengths, segment_sum_for(self.backend))

    def gemm_units(self, recomputed: int) -> Tensor | float:
        """Return the GEMM units that ran, as a mean over live tokens."""
        live = 1 if self.group_sizes is None else max(1, sum(self.group_sizes))
        dense: Tensor | float = 1.0
        if self.rows.options.tail_mass > 0.0:
            dense = (self.stats.dense / self.batch.mask.sum().clamp(min=1)).float()
        return gemm_units(self.needs[0], self.needs[1], dense=dense, again=recomputed / live)


def fused_from_hidden(spec: PolicyAxes, batch: Batch, rows: LinearRows) -> LossOutput:
    """Return the loss with its gradient formed in the forward."""
    layout = batch.layout
    plan = _Plan.of(spec, batch, rows)
    loss, logprobs, entropy, recomputed = FusedFromHidden.apply(rows.hidden, rows.weight, rows.bias, plan)
    if rows.allowed is not None:
        check_labels_are_allowed(layout.restore(logprobs))
    with torch.no_grad():
        terms = plan.terms(logprobs, entropy)
        metrics = policy_metrics(batch, logprobs, entropy, plan.columns, terms)
    output = LossOutput(loss, metrics, layout.restore(logprobs), layout.restore(entropy))
    output = with_path(output, plan.gemm_units(recomputed))
    sparse = rows.options.tail_mass > 0.0 and any(plan.needs)
    return with_sparse_stats(output, plan.stats) if sparse else output


def policy_gradient_coefficients(
    spec: PolicyAxes,
    logprobs: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    columns: reference.TokenColumns,
    lengths: Tensor | None = None,  # (S,) where the loss couples the tokens of a sequence
    backend: str = "auto",  # of the rows
) -> tuple[Tensor, Tensor | None]:
    """Return (dL/dlogprobs, dL/dentropy or None) of live tokens, each (N,)."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        if lengths is not None:
            every = torch.ones_like(leaf, dtype=torch.bool)
            columns = reference.pooled_columns(spec, leaf, columns, every, lengths, segment_sum_for(backend))
        leaf_entropy = entropy.detach().requires_grad_() if spec.uses_entropy else None
        contribution = fused_policy_terms(
            spec, leaf, leaf_entropy, columns, backend=companion_backend(backend)
        ).contribution
        if leaf_entropy is None:
            return torch.autograd.grad(contribution.sum(), leaf)[0], None
        g, h = torch.autograd.grad(contribution.sum(), (leaf, leaf_entropy))
    return g, h
