"""Weights that correct for the inference engine."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastrl.reference.kl import _symmetric, binary_kl, kl_value
from fastrl.reference.numerics import LOG_RATIO_LIMIT, exp_linear, one_sided
from fastrl.reference.segments import SegmentSum, segment_mean, segment_sum, spread, total

if TYPE_CHECKING:
    from fastrl.losses.policy.correction import RolloutCorrection


def _gate_statistic(spec: RolloutCorrection, delta: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    """Return the per-token statistic that a gate bounds, with `delta` = old - rollout."""
    if spec.statistic == "tv":
        return (old.exp() - rollout.exp()).abs()
    if spec.statistic == "binary_kl":
        clamp = math.log(1e-6), math.log1p(-1e-6)
        return binary_kl(rollout.clamp(*clamp), old.clamp(*clamp), eps=0.0)
    # Estimates of KL(rollout || old), which the tokens were sampled for: their log-ratio is rollout - old.
    return kl_value(-delta, spec.statistic)


def correction_weights(
    spec: RolloutCorrection,
    old: Tensor,  # (N,) log-probs of the trainer's own forward before the update
    rollout: Tensor,  # (N,) log-probs that the inference engine reported
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,)
    sums: SegmentSum = segment_sum,
) -> Tensor:
    """Return the detached weights (N,) that multiply the policy term, 1 outside the mask and at NaN `rollout`.

    w = exp(old - rollout) per token, exp(mean) or exp(sum) per sequence. "truncate" clamps w to [low, high]. "mask"
    sets w to zero outside. "gate" keeps the token weights if the statistic of the level lies inside.
    """
    n = old.numel()
    known = mask & ~rollout.isnan()
    delta = torch.where(known, old - rollout, 0.0).detach().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    token_delta = one_sided(delta, *_symmetric(spec.log_weight_clamp))
    if spec.op == "gate":
        if spec.statistic == "ratio":
            statistic = (
                delta if spec.level == "token" else spread(_reduce(delta, mask, lengths, spec.level, sums), lengths, n)
            )
            statistic = exp_linear(statistic)
        else:
            zero = torch.zeros_like(old)
            live_old, live_rollout = torch.where(known, old, zero), torch.where(known, rollout, zero)
            statistic = _gate_statistic(spec, delta, live_old.detach(), live_rollout.detach())
            if spec.level != "token":
                statistic = spread(_reduce(statistic, mask, lengths, spec.level, sums), lengths, n)
        weights = torch.where(_inside(statistic, spec.low, spec.high), exp_linear(token_delta), 0.0)
    else:
        log_weights = token_delta
        if spec.level != "token":
            reduced = one_sided(_reduce(delta, mask, lengths, spec.level, sums), *_symmetric(spec.log_weight_clamp))
            log_weights = spread(reduced, lengths, n)
        weights = exp_linear(log_weights)
        if spec.op == "truncate":
            weights = one_sided(weights, spec.low, spec.high)
        else:
            weights = torch.where(_inside(weights, spec.low, spec.high), weights, 0.0)
    if spec.batch_normalize:
        live = torch.where(mask, weights, 0.0)
        if spec.level == "token":
            mean = total(live, lengths, sums) / mask.sum().clamp(min=1)
        else:
            present = sums(mask.to(weights.dtype), lengths) > 0
            mean = segment_mean(live, mask, lengths, sums).sum() / present.sum().clamp(min=1)
        weights = weights / mean.clamp(min=torch.finfo(weights.dtype).tiny)
    return torch.where(mask, weights, 1.0)


def _reduce(x: Tensor, mask: Tensor, lengths: Tensor, level: str, sums: SegmentSum) -> Tensor:
    """Return the mean ("sequence") or the sum ("sequence_sum") over the live tokens of each sequence, (S,)."""
    return segment_mean(x, mask, lengths, sums) if level == "sequence" else sums(torch.where(mask, x, 0.0), lengths)


def _inside(x: Tensor, low: float | None, high: float | None) -> Tensor:
    inside = torch.ones_like(x, dtype=torch.bool)
    if low is not None:
        inside = inside & (x >= low)
    if high is not None:
        inside = inside & (x <= high)
    return inside
