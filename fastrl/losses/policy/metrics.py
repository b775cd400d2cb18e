"""Metrics of a policy loss as (sum, count) tensors, to be added over micro-batches and ranks and divided once."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import reference
from fastrl.losses.policy.inputs import Batch


def policy_metrics(
    batch: Batch,
    logprobs: Tensor,  # (N,) 0 outside the mask
    entropy: Tensor | None,  # (N,)
    columns: reference.TokenColumns,
    terms: reference.TokenTerms,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (sum, count) over live tokens, without a host sync.

    | metric | of a token |
    |---|---|
    | policy_loss | the surrogate before weights |
    | ratio | r |
    | clip_fraction, clip_fraction_low, clip_fraction_high, dual_clip_fraction | whether the clip removed the gradient |
    | approx_kl_old | old - logp |
    | kl | the estimate in the loss |
    | entropy | H |
    | grad_signal | whether weight and advantage are both not zero |
    | rollout_kl | rollout - old, over tokens with a known rollout log-prob |
    | rollout_abs_diff | abs(exp(old) - exp(rollout)), over the same tokens |
    | rollout_unknown | whether the rollout log-prob is NaN |
    | nonfinite | whether log-prob, advantage or a log-ratio is NaN or infinite |
    | saturated | whether a log-ratio is beyond `reference.EXP_LIMIT`, from which exp goes on linearly |
    """
    mask = batch.mask
    dtype = torch.float64 if logprobs.device.type != "mps" else torch.float32
    count = mask.sum().to(dtype)

    def mean(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(mask, x.detach().to(dtype), 0.0).sum(), count

    metrics = {
        "policy_loss": mean(terms.surrogate),
        "ratio": mean(terms.ratio),
        "clip_fraction": mean(terms.clipped_low | terms.clipped_high),
        "clip_fraction_low": mean(terms.clipped_low),
        "clip_fraction_high": mean(terms.clipped_high),
        "grad_signal": mean((columns.weights != 0) & (columns.advantages != 0)),
    }
    if terms.dual_clipped is not None:
        metrics["dual_clip_fraction"] = mean(terms.dual_clipped)
    if terms.kl is not None:
        metrics["kl"] = mean(terms.kl)
    if entropy is not None:
        metrics["entropy"] = mean(entropy)
    old = batch.old_logprobs
    suspicious = ~(logprobs.isfinite() & columns.advantages.isfinite())
    saturated = torch.zeros_like(mask)
    for other in (columns.anchor, columns.kl_anchor):
        if other is not None:
            difference = logprobs - other
            suspicious = suspicious | ~difference.isfinite()
            saturated = saturated | (difference.abs() > reference.EXP_LIMIT)
    metrics["nonfinite"] = mean(suspicious)
    metrics["saturated"] = mean(saturated)
    if old is not None:
        metrics["approx_kl_old"] = mean(torch.where(mask, old, 0.0) - logprobs)
    rollout = batch.rollout_logprobs
    if rollout is not None:
        before = logprobs if old is None else torch.where(mask, old, 0.0)
        known = mask & ~rollout.isnan()
        clean = torch.where(known, rollout, 0.0)
        n_known = known.sum().to(dtype)
        gap = torch.where(known, before - clean, 0.0).to(dtype)
        metrics["rollout_kl"] = (-gap.sum(), n_known)
        metrics["rollout_abs_diff"] = (
            torch.where(known, (before.exp() - clean.exp()).abs(), 0.0).to(dtype).sum(),
            n_known,
        )
        metrics["rollout_unknown"] = mean(mask & ~known)
    return metrics
