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
from fastrl.backends.choice import beside
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput, gemm_units, with_path, with_tally
from fastrl.losses.policy.axes import PolicyAxes
from fastrl.losses.policy.inputs import Batch
from fastrl.losses.policy.metrics import policy_metrics
from fastrl.ops.fused import FusedFromHidden
from fastrl.ops.head import Head
from fastrl.ops.policy import fused_policy_terms
from fastrl.ops.sampling import check_labels_are_allowed
from fastrl.ops.segments import sums_beside
from fastrl.ops.sparse_rows import Tally


@dataclass(frozen=True)
class _Plan:
    """What `FusedFromHidden` needs beside its tensors."""

    spec: PolicyAxes
    head: Head
    needs: tuple[bool, bool, bool]
    layout: Layout
    mask: Tensor
    columns: reference.TokenColumns
    units: Sequence[int] | None
    """Live tokens of each sequence, where the loss couples them."""
    unit_lengths: Tensor | None  # (S,) int64, the units where the device has them
    allowed: Tensor | None
    rounding: str
    live: Tensor | None = None
    tally: Tally | None = None
    """How many rows took the short way, filled in the forward."""

    def coefficients(
        self, logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return (dL/dlogprobs, dL/dentropy or None) of the live tokens of a block."""
        columns = self.columns.at(index)
        lengths = None
        if self.units is not None:
            assert self.unit_lengths is not None
            ends = list(accumulate(self.units))
            first, last = bisect_left(ends, block.start + 1), bisect_left(ends, block.stop)
            lengths = self.unit_lengths[first : last + 1]
        return policy_gradient_coefficients(self.spec, logprobs, entropy, columns, lengths, self.head.backend)

    def terms(self, logprobs: Tensor, entropy: Tensor) -> reference.TokenTerms:
        """Return the token arithmetic over all tokens."""
        columns = self.columns
        if self.units is not None:
            sums = sums_beside(self.head.backend)
            columns = reference.pooled_columns(self.spec, logprobs, columns, self.mask, self.layout.lengths, sums)
        return fused_policy_terms(self.spec, logprobs, entropy, columns, backend=beside(self.head.backend))

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Return the loss of all tokens."""
        contribution = self.terms(logprobs, entropy).contribution
        return reference.total(contribution, self.layout.lengths, sums_beside(self.head.backend))


def fused_from_hidden(
    spec: PolicyAxes,
    layout: Layout,
    batch: Batch,
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,
    inverse: Tensor,  # (N,)
    head: Head,
    allowed: Tensor | None = None,
    rounding: str = "",
) -> LossOutput:
    """Return the loss with its gradient formed in the forward."""
    grad = torch.is_grad_enabled()
    trained = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    needs = (grad and trained[0], grad and trained[1], grad and trained[2])
    units = unit_lengths = None
    sums = sums_beside(head.backend)
    if spec.couples_sequences:
        unit_lengths = sums(batch.mask.to(inverse.dtype), layout.lengths).long()
        units = unit_lengths.tolist()
    columns = batch.columns(spec, None, sums)
    tally = Tally(hidden.device)
    plan = _Plan(spec, head, needs, layout, batch.mask, columns, units, unit_lengths, allowed, rounding, tally=tally)
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, logprobs, entropy, recomputed = FusedFromHidden.apply(flat, weight, bias, labels.reshape(-1), inverse, plan)
    if allowed is not None:
        check_labels_are_allowed(layout.restore(logprobs))
    with torch.no_grad():
        terms = plan.terms(logprobs, entropy)
        metrics = policy_metrics(batch, logprobs, entropy, columns, terms)
    output = LossOutput(loss, metrics, layout.restore(logprobs), layout.restore(entropy))
    live = max(1, sum(units) if units is not None else 1)
    dense = _dense_share(head, batch.mask, tally)
    output = with_path(output, gemm_units(needs[0], needs[1], dense=dense, again=recomputed / live))
    return output if head.tail_mass == 0.0 or not any(needs) else with_tally(output, tally)


def _dense_share(head: Head, mask: Tensor, tally: Tally) -> Tensor | float:
    """Return the share of live tokens that went through the GEMMs of the gradients."""
    return 1.0 if head.tail_mass == 0.0 else (tally.dense / mask.sum().clamp(min=1)).float()


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
            columns = reference.pooled_columns(spec, leaf, columns, every, lengths, sums_beside(backend))
        leaf_entropy = entropy.detach().requires_grad_() if spec.uses_entropy else None
        contribution = fused_policy_terms(spec, leaf, leaf_entropy, columns, backend=beside(backend)).contribution
        if leaf_entropy is None:
            return torch.autograd.grad(contribution.sum(), leaf)[0], None
        g, h = torch.autograd.grad(contribution.sum(), (leaf, leaf_entropy))
    return g, h
