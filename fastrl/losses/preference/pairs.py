"""Preference losses of pairs: from the sequence log-probs of chosen and rejected rows to loss and metrics.

Legend: P pairs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.losses.output import LossOutput
from fastrl.losses.preference.axes import PreferenceAxes
from fastrl.losses.preference.rows import Counts, PairRows
from fastrl.losses.preference.terms import (
    F_DIVERGENCES,
    FEATURES,
    LINKS,
    SCORE_EXP_LIMIT,
    SQUARED_EXP_LIMIT,
    Scores,
    alphapo,
    identity,
    log_odds,
)
from fastrl.losses.scalars import cast_metrics, divisor


def loss_of_pairs(
    spec: PreferenceAxes,
    rows: PairRows,
    n_pairs: float | Tensor | None,
    n_tokens: float | Tensor | None,
    dtype: torch.dtype,
) -> LossOutput:
    """Return the loss and the metrics of pairs. `n_pairs` and `n_tokens` are global counts, None: of the rows here."""
    counts = Counts(divisor(rows.chosen.numel() if n_pairs is None else n_pairs), n_tokens)
    loss = _pair_loss(spec, rows, counts)
    with torch.no_grad():
        metrics = _pair_metrics(spec, rows)
    return LossOutput(loss.to(dtype), cast_metrics(metrics), None, None)


def _scores(spec: PreferenceAxes, rows: PairRows) -> Scores:
    """Return the scores that features compare: log-ratios or log-probs, transformed and normalised."""
    rows = rows.reduced(spec.reduce)
    policy_margin = rows.chosen - rows.rejected
    chosen, rejected, ref_margin = rows.chosen, rows.rejected, torch.zeros_like(policy_margin)
    if spec.reference and rows.ref_chosen is not None:
        assert rows.ref_rejected is not None
        chosen, rejected = chosen - rows.ref_chosen, rejected - rows.ref_rejected
        ref_margin = rows.ref_chosen - rows.ref_rejected
    if spec.odds:
        chosen, rejected = log_odds(chosen), log_odds(rejected)
    else:
        transform, alpha = _transform(spec)
        squared = any(term.link == "square" for term in spec.terms)
        limit = SQUARED_EXP_LIMIT if squared else SCORE_EXP_LIMIT
        chosen, rejected = transform(chosen, alpha, limit), transform(rejected, alpha, limit)
    if spec.score_normalise == "length" and rows.chosen_lengths is not None and rows.rejected_lengths is not None:
        chosen, rejected = chosen / rows.chosen_lengths, rejected / rows.rejected_lengths
    return Scores(chosen, rejected, policy_margin, ref_margin)


def _transform(spec: PreferenceAxes) -> tuple[Any, float]:
    if spec.f_divergence != "reverse_kl":
        return F_DIVERGENCES[spec.f_divergence], 0.5 if spec.alpha is None else spec.alpha
    return (alphapo, spec.alpha) if spec.alpha else (identity, 0.0)


def _linked(spec: PreferenceAxes, link: str, z: Tensor) -> Tensor:
    """Return link(z), with the label smoothing of the loss."""
    function, e = LINKS[link], spec.label_smoothing
    if e == 0.0 or spec.smoothing not in ("conservative", "robust"):
        return function(z, spec)
    kept, flipped = (1.0 - e) * function(z, spec), e * function(-z, spec)
    return kept + flipped if spec.smoothing == "conservative" else (kept - flipped) / (1.0 - 2.0 * e)


def _pair_loss(spec: PreferenceAxes, rows: PairRows, counts: Counts) -> Tensor:
    """Return the scalar loss of pairs, NLL included."""
    if spec.components:
        return torch.stack([weight * _pair_loss(loss, rows, counts) for loss, weight in spec.components]).sum()
    total = rows.chosen.new_zeros(())
    if spec.terms:
        scores = _scores(spec, rows)
        per_pair = torch.zeros_like(scores.chosen)  # (P,)
        for term in spec.terms:
            z = term.sign * (spec.beta * FEATURES[term.feature](scores) - spec.margin)
            per_pair = per_pair + term.weight * _linked(spec, term.link, z)
        if rows.weights is not None:
            per_pair = per_pair * rows.weights
        total = per_pair.sum() / counts.pairs
    if spec.sft_coef and not (spec.sft_optional and rows.chosen_total is None):
        total = total + spec.sft_coef * _nll(spec, rows, counts)
    return total


def _nll(spec: PreferenceAxes, rows: PairRows, counts: Counts) -> Tensor:
    if rows.chosen_total is None or rows.chosen_lengths is None:
        raise ValueError(f"the NLL of the loss {spec.name!r} needs chosen_lengths and rejected_lengths, got None")
    if spec.sft_normalise == "tokens":
        n_tokens = rows.chosen_tokens if counts.tokens is None else counts.tokens
        return -rows.chosen_total.sum() / divisor(n_tokens)
    per_pair = rows.chosen_total / rows.chosen_lengths if spec.sft_normalise == "length" else rows.chosen_total
    return -per_pair.sum() / counts.pairs


def _pair_metrics(spec: PreferenceAxes, rows: PairRows) -> dict[str, tuple[Tensor, Tensor]]:
    """Return TRL's metrics of a batch of pairs. Rewards are beta times the (untransformed) score."""
    reduced = rows.reduced(spec.reduce)
    chosen, rejected = reduced.chosen, reduced.rejected
    if reduced.ref_chosen is not None and reduced.ref_rejected is not None:
        chosen, rejected = chosen - reduced.ref_chosen, rejected - reduced.ref_rejected
    elif spec.alpha:
        chosen, rejected = alphapo(chosen, spec.alpha), alphapo(rejected, spec.alpha)
    chosen, rejected = spec.beta * chosen, spec.beta * rejected
    count = torch.full_like(chosen.sum(), chosen.numel())
    metrics = {
        "rewards/chosen": (chosen.sum(), count),
        "rewards/rejected": (rejected.sum(), count),
        "rewards/accuracies": ((chosen > rejected).sum(), count),
        "rewards/margins": ((chosen - rejected).sum(), count),
        "logps/chosen": (reduced.chosen.sum(), count),
        "logps/rejected": (reduced.rejected.sum(), count),
        "nonfinite": ((~(chosen - rejected).isfinite()).sum(), count),
    }
    if rows.chosen_total is not None and rows.chosen_tokens is not None:
        metrics["nll_loss"] = (-rows.chosen_total.sum(), rows.chosen_tokens)
    if spec.odds:
        scores = _scores(spec, rows)
        odds = scores.chosen - scores.rejected
        metrics["log_odds_chosen"] = (odds.sum(), count)
        metrics["log_odds_ratio"] = (F.logsigmoid(odds).sum(), count)
    return metrics
