"""The policy loss from hidden states, its gradient formed in the forward.

Legend: N tokens, L live tokens, S sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput
from fastrl.losses.policy_metrics import policy_metrics
from fastrl.ops.dispatch import beside
from fastrl.ops.linear_token_logprobs import Head, fused_gradient
from fastrl.ops.policy import fused_policy_terms
from fastrl.ops.sampling_rows import check_labels_are_allowed
from fastrl.ops.scaling import handed_out
from fastrl.ops.segments import sums_beside
from fastrl.ops.sparse_rows import Tally


@dataclass(frozen=True)
class Batch:
    """The inputs of a call as flat tensors: (N,) per token, (S,) per sequence."""

    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    selection: Tensor | None
    positive: Tensor | None
    group_ids: Tensor | None
    n_tokens: float | Tensor | None
    n_sequences: float | Tensor | None


@dataclass(frozen=True)
class _Plan:
    """What `FusedFromHidden` needs beside its tensors."""

    spec: Any  # PolicyLoss
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


class FusedFromHidden(torch.autograd.Function):
    """(hidden, weight, bias) -> loss, with the gradient formed in the forward; backward hands it over, scaled.

    The plan says how: `head`, `needs`, `units`, `live`, `allowed`, `rounding` and `coefficients` are those of
    `fused_gradient`, and `loss` maps (logprobs, entropy) of all tokens to the scalar.

    The first backward gives the buffers themselves away, scaled in place: a second copy of the head's gradient would
    be the largest tensor of the step. Those of float16 inputs wait in float32 and are rounded when they are scaled.
    Autograd may keep a buffer as `.grad` and add to it later, so nothing here reads it again: a further backward
    (`retain_graph=True`) forms the gradient anew from the coefficients, to the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, inverse: Tensor, plan: Any
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return (loss, logprobs (N,), entropy (N,), rows whose logits were formed twice)."""
        found: list[tuple[Tensor, Tensor | None]] = []

        def coefficients(*block: Any) -> tuple[Tensor, Tensor | None]:
            found.append(plan.coefficients(*block))
            return found[-1]

        logprobs, entropy, gradients, recomputed = fused_gradient(
            hidden,
            weight,
            bias,
            labels,
            inverse,
            plan.head,
            plan.needs,
            coefficients,
            plan.units,
            plan.live,
            plan.allowed,
            plan.rounding,
            plan.tally,
        )
        loss = plan.loss(logprobs, entropy)
        if any(plan.needs):
            ctx.gradients = gradients
            ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
            ctx.how = (plan.head, plan.needs, plan.units, plan.live, plan.rounding)
            g, h = (_joined([block[i] for block in found]) for i in range(2))
            ctx.save_for_backward(hidden, weight, bias, labels, inverse, plan.allowed, g, h)
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy, recomputed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward times the upstream factor."""
        if torch.is_grad_enabled():
            raise RuntimeError("from_hidden is differentiable once: create_graph=True is not supported")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _formed_again(*ctx.saved_tensors, *ctx.how)
        backend = ctx.how[0].backend
        handed = (handed_out(*given, grads[0], backend) for given in zip(gradients, ctx.dtypes, strict=True))
        return (*handed, None, None, None)


def _joined(blocks: list[Any]) -> Tensor | None:
    """Return the coefficients of all live tokens from those of the blocks, or None where the loss has none."""
    return None if not blocks or blocks[0] is None else torch.cat(blocks)


def _formed_again(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    inverse: Tensor,  # (N,)
    allowed: Tensor | None,
    g: Tensor | None,  # (L,)
    h: Tensor | None,  # (L,)
    head: Head,
    needs: tuple[bool, bool, bool],
    units: Sequence[int] | None,
    live: Tensor | None,
    rounding: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias from dL/dlogprobs and dL/dentropy of the live tokens."""

    def known(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, Tensor | None]:
        assert g is not None
        return g[block], None if h is None else h[block]

    return fused_gradient(hidden, weight, bias, labels, inverse, head, needs, known, units, live, allowed, rounding)[2]


def fused_from_hidden(
    spec: Any,  # PolicyLoss
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
    columns = spec.columns(layout, batch, None, sums)
    tally = Tally(hidden.device)
    plan = _Plan(spec, head, needs, layout, batch.mask, columns, units, unit_lengths, allowed, rounding, tally=tally)
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, logprobs, entropy, recomputed = FusedFromHidden.apply(flat, weight, bias, labels.reshape(-1), inverse, plan)
    if allowed is not None:
        check_labels_are_allowed(layout.restore(logprobs))
    with torch.no_grad():
        terms = plan.terms(logprobs, entropy)
        metrics = policy_metrics(spec, batch, logprobs, entropy, columns, terms)
    output = LossOutput(loss, metrics, layout.restore(logprobs), layout.restore(entropy))
    live = max(1, sum(units) if units is not None else 1)
    dense = _dense_share(head, batch.mask, tally)
    output = with_path(output, 1.0 + (needs[0] + needs[1]) * dense + recomputed / live)
    return output if head.tail_mass == 0.0 or not any(needs) else with_tally(output, tally)


def _dense_share(head: Head, mask: Tensor, tally: Tally) -> Tensor | float:
    """Return the share of live tokens that went through the GEMMs of the gradients."""
    return 1.0 if head.tail_mass == 0.0 else (tally.dense / mask.sum().clamp(min=1)).float()


def with_tally(output: LossOutput, tally: Tally) -> LossOutput:
    """Return the output with what the tally counts among the metrics."""
    return output._replace(metrics={**output.metrics, **tally.metrics()})


def with_path(output: LossOutput, units: float | Tensor) -> LossOutput:
    """Return the output with the GEMM units that its path takes among the metrics."""
    one = torch.ones((), device=output.loss.device)
    return output._replace(metrics={**output.metrics, "path/gemm_units": (one * units, one)})


def policy_gradient_coefficients(
    spec: Any,  # PolicyLoss
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
