"""Preference losses of single rows, each desirable or not: kto, apo_zero_unpaired, bco.

Legend: B rows, T time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import checks
from fastrl.losses.output import LossOutput
from fastrl.losses.preference.axes import PreferenceAxes
from fastrl.losses.preference.inputs import PreferenceInputs
from fastrl.losses.preference.rows import kl_reference_point
from fastrl.losses.preference.terms import LINKS
from fastrl.losses.scalars import cast_metrics, choose, divisor, live, masked_mean, result_dtype, scalar_like


def loss_of_row_tokens(
    spec: PreferenceAxes,
    logprobs: Tensor,  # (B, T)
    keep: Tensor,  # (B, T) bool
    ref: Tensor,  # (B, T)
    inputs: PreferenceInputs,
) -> LossOutput:
    """Return the loss of the per-token log-probs of single rows."""
    given, reference_point = inputs.get("desirable"), inputs.get("reference_point")
    if given is None:
        raise ValueError(f"the loss {spec.name!r} needs desirable= (B,): True for desirable rows, got None")
    desirable, poison = checks.keep_mask("desirable", given, logprobs.shape[:1], logprobs.device)
    policy = live(logprobs, keep).sum(1)
    scores = policy - live(ref, keep).detach().sum(1)
    mismatched = inputs.get("kl_logprobs"), inputs.get("kl_ref_logprobs"), inputs.get("kl_mask")
    if any(part is not None for part in mismatched):
        if spec.shift != "reference_point" or reference_point is not None:
            raise ValueError("kl_logprobs give kto's reference point: pass them or reference_point, not both")
        reference_point = kl_reference_point(*mismatched)
    shift = shift_of(spec, scores, desirable, reference_point, inputs.get("baseline"))
    dtype = result_dtype(logprobs)
    output = loss_of_rows(spec, scores, policy.detach(), desirable, shift, inputs.get("n_pairs"), dtype)
    return output if poison is None else output._replace(loss=output.loss + poison)


def shift_of(
    spec: PreferenceAxes,
    scores: Tensor,  # (B,)
    desirable: Tensor,  # (B,) bool
    reference_point: float | Tensor | None,
    baseline: float | Tensor | None,
) -> Tensor:
    """Return the shift in z = sign (beta score - shift), () or (B,)."""
    for field, value in (("reference_point", reference_point), ("baseline", baseline)):
        if value is not None and spec.shift != field:
            raise ValueError(f"{field} is not used by the loss {spec.name!r} (shift={spec.shift!r}); leave it out")
    if spec.shift is None:
        return scores.new_zeros(())
    if spec.shift == "baseline":
        if baseline is None:
            return (spec.beta * scores.detach()).sum() / max(scores.numel(), 1)
        return scalar_like("baseline", baseline, scores)
    if reference_point is not None:
        return spec.beta * scalar_like("reference_point", reference_point, scores)
    mean_w, mean_l = masked_mean(scores, desirable), masked_mean(scores, ~desirable)
    return spec.beta * torch.where(desirable, torch.relu(mean_l), torch.relu(mean_w))


def loss_of_rows(
    spec: PreferenceAxes,
    scores: Tensor,  # (B,) log-ratios
    logps: Tensor,  # (B,) detached
    desirable: Tensor,  # (B,) bool
    shift: Tensor,  # () or (B,)
    n_rows: float | Tensor | None,
    dtype: torch.dtype,
) -> LossOutput:
    """Return the loss of the sequence scores of single rows. `n_rows` is the global count, None: of the rows here."""
    sign = choose(desirable, 1.0, -1.0, scores)
    z = sign * (spec.beta * scores - shift)
    per_row = torch.stack([term.weight * LINKS[term.link](term.sign * z, spec) for term in spec.terms]).sum(0)
    weights = choose(desirable, spec.desirable_weight, spec.undesirable_weight, scores)
    loss = (weights * per_row).sum() / divisor(scores.numel() if n_rows is None else n_rows)
    with torch.no_grad():
        rewards = spec.beta * scores
        metrics = {"nonfinite": ((~scores.isfinite()).sum(), torch.full_like(desirable.sum(), desirable.numel()))}
        for side, rows in (("chosen", desirable), ("rejected", ~desirable)):
            count = rows.sum()
            metrics[f"rewards/{side}"] = (torch.where(rows, rewards, 0.0).sum(), count)
            metrics[f"logps/{side}"] = (torch.where(rows, logps, 0.0).sum(), count)
        if spec.shift is not None and shift.dim() == 0:
            name, scale = ("kl", spec.beta) if spec.shift == "reference_point" else ("baseline", 1.0)
            metrics[name] = (shift / scale, torch.ones_like(shift))
    return LossOutput(loss.to(dtype), cast_metrics(metrics), None, None)
