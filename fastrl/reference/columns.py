"""The columns of the policy loss: weights, anchors and pooled log-ratios of every token, which all losses share.

    loss = sum_t s_t [ keep_t w_t l(r_t, A_t) + kl_coef k_t ] - entropy_coef sum_t H_t / n_tokens

`s_t` is the aggregation weight of the token, zero outside the mask. `keep` is a 0/1 selection and `w` the
train-inference correction, which carries no gradient. `terms.py` states l, r, k and H. Values under the mask are
replaced by zero before any arithmetic, so that they cannot reach a value or a gradient.

Legend: N tokens, S sequences, P prompts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastrl.reference.correction import _reduce, correction_weights
from fastrl.reference.kl import _symmetric
from fastrl.reference.numerics import LOG_RATIO_LIMIT, one_sided
from fastrl.reference.segments import SegmentSum, segment_mean, segment_sum, spread

if TYPE_CHECKING:
    from fastrl.losses.policy.axes import PolicyAxes
    from fastrl.losses.policy.correction import RolloutCorrection

VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX = math.log(1e-8), 20.0


class TokenColumns(NamedTuple):
    """Inputs of the token arithmetic beside log-prob and entropy: (N,) tensors without gradient, or None."""

    advantages: Tensor
    weights: Tensor  # s_t keep_t w_t: weight of the policy term
    kl_weights: Tensor | None  # s_t kl_coef
    entropy_weights: Tensor | None  # entropy_coef / n_tokens
    anchor: Tensor | None  # log-prob in the denominator of the ratio, None for the detached log-prob itself
    kl_anchor: Tensor | None  # log-prob on the other side of the KL, None for the detached log-prob itself
    kl_ratio_anchor: Tensor | None  # denominator of the ratio in ratio-weighted KL, if not `anchor`
    positive: Tensor | None  # bool: sign that TOPR splits on
    log_correction: Tensor | None  # log of the correction, for VESPO's sequence weight
    sequence_log_ratio: Tensor | None = None  # per-token copy of the sequence's log-ratio, with its gradient

    def at(self, index: Tensor) -> TokenColumns:
        """Return the columns of the tokens at `index`."""
        present = {name: x[index] for name, x in self._asdict().items() if x is not None}
        return self._replace(**present)


class TokenBatch(NamedTuple):
    """The inputs of a policy loss beside its log-probs and entropy, as flat tokens and sequences."""

    advantages: Tensor  # (N,)
    mask: Tensor  # (N,) bool
    lengths: Tensor  # (S,) tokens of each sequence, masked ones included
    old_logprobs: Tensor | None = None  # (N,)
    ref_logprobs: Tensor | None = None  # (N,)
    rollout_logprobs: Tensor | None = None  # (N,)
    selection: Tensor | None = None  # (N,) bool
    positive: Tensor | None = None  # (N,) bool
    kl_tokens: Tensor | None = None  # (N,) bool: tokens that carry the KL term
    group_ids: Tensor | None = None  # (S,)
    n_tokens: float | Tensor | None = None
    n_sequences: float | Tensor | None = None
    constant: float | None = None  # length in the denominator of aggregate="constant"


def policy_columns(
    spec: PolicyAxes,
    batch: TokenBatch,
    *,
    logprobs: Tensor | None = None,  # (N,) stands for the old log-probs in the correction when they are absent
    sums: SegmentSum = segment_sum,
) -> TokenColumns:
    """Return the columns of the token arithmetic, with zero in place of every value under the mask."""
    mask, lengths, dtype = batch.mask, batch.lengths, batch.advantages.dtype

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mask, x.detach().to(dtype), 0.0)

    given = {"old": batch.old_logprobs, "rollout": batch.rollout_logprobs, "ref": batch.ref_logprobs, "self": None}
    named = {name: clean(given[name]) for name in _anchors(spec)}
    scale = aggregate_weights(
        spec.aggregate,
        mask,
        lengths,
        dtype=dtype,
        n_tokens=batch.n_tokens,
        n_sequences=batch.n_sequences,
        constant=batch.constant,
        denominator_eps=spec.denominator_eps,
        group_ids=batch.group_ids,
        sums=sums,
    )
    weights, log_correction = scale, None
    if spec.correction is not None:
        rollout = named["rollout"]
        assert rollout is not None
        before = named["old"] if batch.old_logprobs is not None else clean(logprobs)
        assert before is not None
        correction = correction_weights(spec.correction, before, rollout, mask, lengths, sums)
        if spec.surrogate == "vespo":
            log_correction = _vespo_log_correction(spec.correction, correction, mask, lengths, sums)
        else:
            weights = weights * correction
    if batch.selection is not None:
        weights = torch.where(batch.selection, weights, 0.0)
    kl_weights = None
    if spec.kl is not None and spec.kl_coef != 0.0:
        kl_weights = spec.kl_coef * scale
        if batch.kl_tokens is not None:
            kl_weights = torch.where(batch.kl_tokens, kl_weights, 0.0)
    entropy_weights = None
    if spec.entropy_coef != 0.0:
        entropy_weights = spec.entropy_coef * aggregate_weights(
            "token_mean", mask, lengths, dtype=dtype, n_tokens=batch.n_tokens, sums=sums
        )
    return TokenColumns(
        advantages=torch.where(mask, batch.advantages.detach(), 0.0),
        weights=weights,
        kl_weights=kl_weights,
        entropy_weights=entropy_weights,
        anchor=named[spec.ratio_anchor],
        kl_anchor=named[spec.kl_to] if spec.kl is not None else None,
        kl_ratio_anchor=named[spec.kl_ratio_anchor] if spec.kl_ratio_anchor is not None else None,
        positive=batch.positive,
        log_correction=log_correction,
    )


def _anchors(spec: PolicyAxes) -> set[str]:
    """Return which other log-probs a loss reads: "old", "rollout", "ref" or "self"."""
    read = {spec.ratio_anchor}
    if spec.kl is not None:
        read.add(spec.kl_to)
    if spec.kl_ratio_anchor is not None:
        read.add(spec.kl_ratio_anchor)
    return read if spec.correction is None else read | {"old", "rollout"}


def aggregate_weights(
    aggregate: str,
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,)
    *,
    dtype: torch.dtype,
    n_tokens: float | Tensor | None = None,
    n_sequences: float | Tensor | None = None,
    constant: float | None = None,
    denominator_eps: float = 0.0,
    group_ids: Tensor | None = None,  # (S,) prompt of each sequence, for "prompt_mean"
    sums: SegmentSum = segment_sum,
) -> Tensor:
    """Return s_t (N,), zero outside the mask, such that the aggregated loss is sum_t s_t l_t.

        token_mean      1 / n_tokens
        sequence_mean   1 / (n_sequences (|y| + denominator_eps))
        sequence_sum    1 / n_sequences
        constant        1 / (n_sequences constant)
        token_sum       1
        prompt_mean     1 / (P tokens of the prompt)

    Missing counts are counted from the mask: sequences and prompts with at least one live token, at least 1.
    """
    n = mask.numel()
    wide = torch.float64 if mask.device.type != "mps" else torch.float32
    counts = sums(mask.to(wide), lengths)
    if n_tokens is None:
        n_tokens = counts.sum().clamp(min=1.0)
    if n_sequences is None:
        n_sequences = (counts > 0).sum().clamp(min=1)
    one = torch.ones((), dtype=wide, device=mask.device)
    if aggregate == "token_mean":
        per_sequence = (one / n_tokens).expand(lengths.shape)
    elif aggregate == "sequence_mean":
        per_sequence = one / (n_sequences * (counts.clamp(min=1.0) + denominator_eps))
    elif aggregate == "sequence_sum":
        per_sequence = (one / n_sequences).expand(lengths.shape)
    elif aggregate == "constant":
        assert constant is not None
        per_sequence = (one / (n_sequences * constant)).expand(lengths.shape)
    elif aggregate == "token_sum":
        per_sequence = one.expand(lengths.shape)
    else:
        assert group_ids is not None
        _, group = torch.unique(group_ids, return_inverse=True)
        per_group = torch.zeros(lengths.numel(), dtype=wide, device=mask.device).index_add(0, group, counts)
        n_groups = (per_group > 0).sum().clamp(min=1)
        per_sequence = one / (n_groups * per_group[group].clamp(min=1.0))
    return torch.where(mask, spread(per_sequence, lengths, n).to(dtype), 0.0)


def _vespo_log_correction(
    correction: RolloutCorrection,
    weights: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,)
    sums: SegmentSum,
) -> Tensor:
    """Return each token's addend to VESPO's sequence log-weight (N,). A sequence's weight enters once, in shares."""
    found = weights.log().clamp(VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX)
    if correction.level != "token" and correction.op != "gate":
        live = sums(mask.to(found.dtype), lengths).clamp(min=1.0)
        found = found / spread(live, lengths, found.numel())
    return torch.where(mask, found, 0.0)


def pooled_columns(
    spec: PolicyAxes,
    logprobs: Tensor,
    columns: TokenColumns,
    mask: Tensor,
    lengths: Tensor,
    sums: SegmentSum = segment_sum,
) -> TokenColumns:
    """Return the columns with the sequence's log-ratio filled in, for losses that couple the tokens of a sequence."""
    if spec.surrogate == "vespo":
        pooled: Tensor | None = vespo_log_weight(spec, logprobs, columns, mask, lengths, sums)
    elif spec.surrogate == "geometric":
        pooled = geometric_log_ratio(spec, logprobs, columns, mask, lengths, sums)
    else:
        pooled = sequence_log_ratio(spec, logprobs, columns.anchor, mask, lengths, sums)
    return columns._replace(sequence_log_ratio=pooled)


def log_ratio(spec: PolicyAxes, logprobs: Tensor, anchor: Tensor | None) -> Tensor:
    """Return log pi(y) - log pi_anchor(y) per token, clamped as the loss says."""
    u = logprobs - (logprobs.detach() if anchor is None else anchor)
    return one_sided(u, *_symmetric(spec.log_ratio_clamp)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratio(
    spec: PolicyAxes,
    logprobs: Tensor,
    anchor: Tensor | None,
    mask: Tensor,
    lengths: Tensor,
    sums: SegmentSum = segment_sum,
) -> Tensor | None:
    """Return the sequence's log-ratio spread over its tokens (N,), or None for token-level ratios.

        "sequence"        mean over live tokens (GSPO, arXiv 2507.18071)
        "sequence_token"  the same value with the gradient of the token's own log-prob
        "sequence_sum"    sum over live tokens (RLOO, arXiv 2402.14740)

    VESPO and GMPO form their own.
    """
    if spec.ratio_level in ("token", "none"):
        return None
    n = logprobs.numel()
    u = log_ratio(spec, logprobs, anchor)
    if spec.ratio_level == "sequence_sum":
        pooled = spread(_reduce(u, mask, lengths, "sequence_sum", sums), lengths, n)
    else:
        pooled = spread(_reduce(u, mask, lengths, "sequence", sums), lengths, n)
    if spec.ratio_level == "sequence_token":
        pooled = pooled.detach() + (logprobs - logprobs.detach())
    return one_sided(pooled, None, spec.sequence_log_ratio_max)


def vespo_log_weight(
    spec: PolicyAxes,
    logprobs: Tensor,
    columns: TokenColumns,
    mask: Tensor,
    lengths: Tensor,
    sums: SegmentSum = segment_sum,
) -> Tensor:
    """Return VESPO's sequence log-weight spread over the tokens (N,), detached (arXiv 2602.10693)."""
    u = log_ratio(spec, logprobs.detach(), columns.anchor).clamp(-20.0, 20.0)
    if columns.log_correction is not None:
        u = u + columns.log_correction
    pooled = sums(torch.where(mask, u, 0.0), lengths)
    return spread(pooled.clamp(VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX), lengths, logprobs.numel())


def geometric_log_ratio(
    spec: PolicyAxes,
    logprobs: Tensor,
    columns: TokenColumns,
    mask: Tensor,
    lengths: Tensor,
    sums: SegmentSum = segment_sum,
) -> Tensor:
    """Return GMPO's mean of one-sidedly clipped token log-ratios spread over the tokens (arXiv 2507.20673)."""
    u = log_ratio(spec, logprobs, columns.anchor)
    clipped = torch.where(
        columns.advantages > 0, one_sided(u, None, spec.clip_high), one_sided(u, _neg(spec.clip_low), None)
    )
    return spread(segment_mean(torch.where(mask, clipped, 0.0), mask, lengths, sums), lengths, logprobs.numel())


def _neg(bound: float | None) -> float | None:
    return None if bound is None else -bound


def top_covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor, fraction: float) -> Tensor:
    """Return the mask (N,) of the live tokens with the largest (A - mean A)(logp - mean logp), max(1, int(n fraction)).

    KL-Cov, arXiv 2505.22617. Ties at the boundary go to the earlier token.
    """
    count = mask.sum()
    covariance = covariances(logprobs, advantages, mask)
    order = torch.where(mask, covariance, -math.inf).argsort(descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    return mask & (rank < (count * fraction).long().clamp(min=1))


def covariances(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """Return (A - mean A)(logp - mean logp) per token (N,), the means over live tokens, and 0 outside the mask."""
    count = mask.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        live = torch.where(mask, x, 0.0)
        return torch.where(mask, live - live.sum() / count, 0.0)

    return centred(advantages) * centred(logprobs)
