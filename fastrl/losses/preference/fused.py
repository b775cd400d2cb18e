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

from fastrl.backends.choice import outside_graphs
from fastrl.losses.output import LossOutput, gemm_units, with_path, with_tally
from fastrl.losses.preference.axes import PreferenceAxes
from fastrl.losses.preference.inputs import PreferenceInputs
from fastrl.losses.preference.rows import kl_reference_point
from fastrl.losses.preference.tokens import loss_of_tokens
from fastrl.losses.scalars import cast_metrics
from fastrl.ops.fused import FusedFromHidden
from fastrl.ops.head import Head, check_head, inverse_temperature, make_head
from fastrl.ops.sparse_rows import Tally


@dataclass(frozen=True)
class _Plan:
    """What `FusedFromHidden` needs beside its tensors."""

    spec: PreferenceAxes
    head: Head
    needs: tuple[bool, bool, bool]
    mask: Tensor  # (B, T)
    ref_logprobs: Tensor | None  # (B, T)
    inputs: PreferenceInputs
    """The other inputs of `from_logprobs`."""
    parts: int
    """Rows of a unit: 2 for pairs, whose chosen rows are in the first half of the batch, 1 for single rows."""
    units: Sequence[int]
    """Live tokens of each pair or row."""
    live: Tensor  # (L,) flat places of the live tokens, pair by pair
    allowed: None = None
    rounding: str = ""
    tally: Tally | None = None

    def coefficients(self, logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
        """Return (dL/dlogprobs (M,), None) of the live tokens of whole pairs."""
        ends = list(accumulate(self.units))
        first, last = bisect_left(ends, block.start + 1), bisect_left(ends, block.stop)
        n, t = len(self.units), self.mask.shape[1]
        count = last + 1 - first
        rows = torch.cat([torch.arange(first, last + 1, device=index.device) + side * n for side in range(self.parts)])
        row, column = index // t, index % t
        within = row // n * count + row % n - first
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            padded = leaf.new_zeros(self.parts * count, t).index_put((within, column), leaf)
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


@outside_graphs
def fused_preference(
    spec: PreferenceAxes,
    hidden: Tensor,  # (2P, T, D), or (B, T, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ids: Tensor,  # (2P, T), the ignored id under the mask
    mask: Tensor,  # (2P, T)
    ref_logprobs: Tensor | None,  # (2P, T)
    options: dict[str, Any],
    inputs: PreferenceInputs,
    units_before: float,
) -> LossOutput:
    """Return the loss of a spec whose pairs (or rows) do not depend on each other, its gradient formed in the forward.

    Args:
        spec: the loss.
        hidden, weight, bias, ids, mask, ref_logprobs: of policy and reference.
        options: those of `linear_token_logprobs`.
        inputs: the other inputs of `from_logprobs`.
        units_before: GEMM units that the reference took.
    """
    parts = 1 if spec.unpaired else 2
    if ids.dim() != 2 or ids.shape[0] % parts:
        raise ValueError(
            f"labels must be {'(B, T)' if parts == 1 else '(2P, T), chosen first'}, got {tuple(ids.shape)}"
        )
    names = ("temperature", "logit_scale", "softcap", "ignore_index")
    temperature, scale, cap, ignored = (options.pop(name) for name in names)
    hidden, weight, ids, bias = check_head(hidden, weight, ids, bias, ignored)
    head = make_head(hidden, scale, cap, ignored, **options)
    inverse = inverse_temperature(temperature, ids, hidden)
    n = ids.shape[0] // parts
    # Every place of the batch, the two rows of a pair behind each other.
    places = torch.arange(ids.numel(), device=ids.device).view(parts, n, -1).transpose(0, 1)
    tally = Tally(hidden.device) if head.tail_mass else None
    there = (ids != ignored).view(parts, n, -1).transpose(0, 1)
    trained = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    plan = _Plan(
        spec,
        head,
        trained,
        mask,
        ref_logprobs,
        _with_totals(spec, inputs, n, mask),
        parts,
        there.sum((1, 2)).tolist(),
        places[there],
        tally=tally,
    )
    with torch.no_grad():
        # Refuses what the loss cannot use before the head is touched.
        plan.output(inverse.new_zeros(ids.numel()))
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, logprobs, entropy, recomputed = FusedFromHidden.apply(flat, weight, bias, ids.reshape(-1), inverse, plan)
    with torch.no_grad():
        metrics = plan.output(logprobs).metrics
        metrics |= cast_metrics({"entropy": (entropy.sum(), (mask != 0).sum())})
    output = LossOutput(loss, metrics, logprobs.view(ids.shape), entropy.view(ids.shape))
    live = max(1, plan.live.numel())
    dense = 1.0 if tally is None else (tally.dense / live).float()
    output = output if tally is None else with_tally(output, tally)
    return with_path(
        output, gemm_units(trained[0], trained[1], dense=dense, again=recomputed / live, before=units_before)
    )


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
