"""Every operation that has a kernel, in plain PyTorch: the formulas, the float64 judge, and the fallback.

Nothing here imports the rest of fastrl. All functions are dtype-generic and differentiable by autograd, so that in
float64 they decide what is right (`tests/support/oracle.py`), and at the working precision they are the token
arithmetic wherever the fused kernel does not run. There is no third realisation.

Legend: B batch, T time, N tokens (B*T or packed), D hidden, V vocabulary, S sequences, G groups.

The policy loss over its axes
-----------------------------
    loss = sum_t s_t [ keep_t w_t l(r_t, A_t) + kl_coef k_t ] - entropy_coef sum_t H_t / n_tokens

`l` is the surrogate, `r` the importance ratio, `w` the train-inference correction (detached), `keep` a 0/1 selection,
`k` the KL estimate and `s_t` the aggregation weight of the token, zero outside the mask. Whatever stands under the
mask is removed by selection before any arithmetic, so that it cannot reach a value or a gradient.

Exponentials of log-ratios are continued linearly beyond `EXP_LIMIT` (value and slope agree there): the ratio, the k3
estimate and their gradients stay finite and keep their sign for log-ratios of 1e4, where exp overflows float32 at 88.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.reference.correction import _reduce, correction_weights
from fastrl.reference.kl import _symmetric, binary_kl, kl_estimate
from fastrl.reference.numerics import LOG_RATIO_LIMIT, exp_linear, one_sided
from fastrl.reference.segments import SegmentSum, segment_mean, segment_sum, spread, total

VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX = math.log(1e-8), 20.0


# --- aggregation ------------------------------------------------------------------------------------------------------


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

    token_mean 1/n_tokens; sequence_mean 1/(n_sequences (|y| + denominator_eps)); sequence_sum 1/n_sequences; constant
    1/(n_sequences constant); token_sum 1; prompt_mean 1/(P tokens of the prompt). Counts that are not given are
    counted from the mask (sequences and prompts with at least one live token), and are at least 1.
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


# --- policy loss ------------------------------------------------------------------------------------------------------


class TokenColumns(NamedTuple):
    """What the token arithmetic needs beside log-prob and entropy: (N,) tensors without gradient, or None."""

    advantages: Tensor
    weights: Tensor  # s_t keep_t w_t: weight of the policy term
    kl_weights: Tensor | None  # s_t kl_coef
    entropy_weights: Tensor | None  # entropy_coef / n_tokens
    anchor: Tensor | None  # log-prob in the denominator of the ratio; None: the detached log-prob itself
    kl_anchor: Tensor | None  # log-prob that the KL is taken to; None: the detached log-prob itself
    kl_ratio_anchor: Tensor | None  # denominator of the ratio in ratio-weighted KL, where it is not `anchor`
    positive: Tensor | None  # bool: sign that TOPR splits on
    log_correction: Tensor | None  # log of the correction, for VESPO's sequence weight
    sequence_log_ratio: Tensor | None = None  # per-token copy of the sequence's log-ratio, with its gradient

    def at(self, index: Tensor) -> TokenColumns:
        """Return the columns of the tokens at `index`."""
        present = {name: x[index] for name, x in self._asdict().items() if x is not None}
        return self._replace(**present)


class TokenTerms(NamedTuple):
    """Results of the token arithmetic, each (N,)."""

    contribution: Tensor  # what the token adds to the loss; carries the gradient
    surrogate: Tensor  # l(r, A), before any weight; detached
    kl: Tensor | None  # detached
    ratio: Tensor  # detached
    clipped_low: Tensor  # bool
    clipped_high: Tensor  # bool
    dual_clipped: Tensor | None  # bool


def log_ratio(spec: Any, logprobs: Tensor, anchor: Tensor | None) -> Tensor:
    """Return log pi(y) - log pi_anchor(y) per token, clamped as the loss says."""
    u = logprobs - (logprobs.detach() if anchor is None else anchor)
    return one_sided(u, *_symmetric(spec.log_ratio_clamp)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def sequence_log_ratio(
    spec: Any,
    logprobs: Tensor,
    anchor: Tensor | None,
    mask: Tensor,
    lengths: Tensor,
    sums: SegmentSum = segment_sum,
) -> Tensor | None:
    """Return the sequence's log-ratio spread over its tokens (N,), or None for token-level ratios.

    "sequence": mean over live tokens (GSPO, arXiv 2507.18071); "sequence_token": the same value with the gradient of
    the token's own log-prob; "sequence_sum": the sum (RLOO, arXiv 2402.14740). VESPO and GMPO form their own.
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
    spec: Any,
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


def _vespo_log_correction(
    correction: Any,  # RolloutCorrection
    weights: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,)
    sums: SegmentSum,
) -> Tensor:
    """Return what each token adds to VESPO's sequence log-weight (N,); a sequence's weight enters once, in shares."""
    found = weights.log().clamp(VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX)
    if correction.level != "token" and correction.op != "gate":
        live = sums(mask.to(found.dtype), lengths).clamp(min=1.0)
        found = found / spread(live, lengths, found.numel())
    return torch.where(mask, found, 0.0)


def geometric_log_ratio(
    spec: Any,
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


def _clip_bounds(spec: Any) -> tuple[float | None, float | None]:
    low = None if spec.clip_low is None else 1.0 - spec.clip_low
    high = None if spec.clip_high is None else 1.0 + spec.clip_high
    return low, high


def _divergence_keep(spec: Any, logprobs: Tensor, anchor: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dropped_low, dropped_high): tokens that DPPO's trust region removes, by direction.

    divergence_tv: A > 0 keeps p - q <= clip_high, A <= 0 keeps p - q >= -clip_low; with one bound only, that bound
    holds for every token. divergence_tv_symmetric: |p - q| <= clip_high for every token. divergence_kl: binary
    KL(q || p) at most the bound, only where the move is away from q in the direction of A.
    """
    p, q = logprobs.detach().exp(), anchor.exp()
    low, high, positive = spec.clip_low, spec.clip_high, advantages > 0
    never = torch.zeros_like(positive)
    if spec.surrogate == "divergence_tv_symmetric":
        bound = high if high is not None else low
        return (p - q < -bound), (p - q > bound)
    if spec.surrogate == "divergence_tv":
        every = (low is None) != (high is None)
        below = never if low is None else (p - q < -low) & (~positive | every)
        above = never if high is None else (p - q > high) & (positive | every)
        return below, above
    divergence = binary_kl(anchor, logprobs.detach())
    below = never if low is None else (divergence > low) & ~positive & (p < q)
    above = never if high is None else (divergence > high) & positive & (p > q)
    return below, above


def token_terms(
    spec: Any,  # PolicyLoss
    logprobs: Tensor,  # (N,) with gradient; anything under the mask already replaced
    entropy: Tensor | None,  # (N,)
    columns: TokenColumns,
) -> TokenTerms:
    """Return what every token adds to the loss, and what the metrics need.

    Surrogates (A advantage, r ratio, sg stop-gradient, c = spec values):
        clip             -min(r A, clip(r, 1-low, 1+high) A), r capped by max_ratio, A < 0 floored by dual_clip
        reinforce        -A logp                     importance  -A r                nll  -logp
        square           (A - tau u)^2 / (2 tau), u the log-ratio at its level (Kimi k1.5, arXiv 2501.12599, eq. 3)
        dft              -sg(exp logp) logp          sapo        -(4/tau) sigmoid(tau (r-1)) A
        clipped_weight   -sg(clip(r, weight_low, weight_high)) A logp
        masked_weight    -sg(r 1[weight_low < r < weight_high]) A logp
        topr             -A logp where positive, else -sg(clip(r, weight_low, weight_high)) A logp
        vespo            -sg(exp(lambda + k log w - lambda w)) A logp
        geometric        -exp(mean_t onesided_clip(log r)) A
        divergence_*     -A r keep  (carrier "ratio")  or  -A sg(min(r, weight_high)) keep logp  (carrier "logprob")
    """
    anchor = columns.anchor
    # A weight of 0 selects: an advantage that is not a number must not reach the gradient as 0 * NaN.
    unused = (columns.weights == 0) & ~columns.advantages.isfinite()
    columns = columns._replace(advantages=torch.where(unused, 0.0, columns.advantages))
    u = columns.sequence_log_ratio
    if u is None:
        u = log_ratio(spec, logprobs, anchor)
    ratio = exp_linear(u)
    surrogate, clipped_low, clipped_high, dual_clipped = _surrogate(spec, logprobs, ratio, u, columns)
    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    contribution = torch.where(columns.weights != 0, columns.weights * surrogate, zero)
    kl = None
    if spec.kl is not None:
        kl_ratio = ratio
        if spec.kl_ratio_anchor is not None:
            kl_ratio = exp_linear(log_ratio(spec, logprobs, columns.kl_ratio_anchor))
        elif kl_ratio_per_token(spec):
            kl_ratio = exp_linear(log_ratio(spec, logprobs, anchor))
        other = logprobs.detach() if columns.kl_anchor is None else columns.kl_anchor
        kl = kl_estimate(
            logprobs,
            other,
            spec.kl,
            spec.kl_gradient,
            kl_ratio,
            spec.kl_log_ratio_clamp,
            spec.kl_value_clamp,
            spec.kl_ratio_max,
            spec.kl_value_clamp_order,
        )
        if columns.kl_weights is not None:
            contribution = contribution + torch.where(columns.kl_weights != 0, columns.kl_weights * kl, zero)
        kl = kl.detach()
    if columns.entropy_weights is not None:
        assert entropy is not None
        bonus = columns.entropy_weights * entropy
        contribution = contribution - torch.where(columns.entropy_weights != 0, bonus, zero)
    return TokenTerms(contribution, surrogate.detach(), kl, ratio.detach(), clipped_low, clipped_high, dual_clipped)


def kl_ratio_per_token(spec: Any) -> bool:
    """Whether the ratio of a ratio-weighted KL is the token's own, not the one that the surrogate works with."""
    own = spec.surrogate in ("vespo", "geometric") and spec.ratio_level == "token"
    return own or spec.ratio_level == "none"


def _by_sign(positive: Tensor, if_positive: float, otherwise: float, like: Tensor) -> Tensor:
    return torch.where(positive, like.new_tensor(if_positive), like.new_tensor(otherwise))


def _surrogate(
    spec: Any, logprobs: Tensor, ratio: Tensor, u: Tensor, columns: TokenColumns
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return (l, clipped_low, clipped_high, dual_clipped) for `token_terms`."""
    advantages, kind = columns.advantages, spec.surrogate
    never = torch.zeros_like(advantages, dtype=torch.bool)
    weight = ratio.detach()
    if kind == "clip":
        low, high = _clip_bounds(spec)
        capped = one_sided(ratio, None, spec.max_ratio)
        loss = torch.maximum(-capped * advantages, -one_sided(ratio, low, high) * advantages)
        below = never if low is None else (weight < low) & (advantages < 0)
        above = never if high is None else (weight > high) & (advantages > 0)
        dual = None
        if spec.dual_clip is not None:
            floor = -spec.dual_clip * advantages
            dual = (advantages < 0) & (loss.detach() > floor)
            loss = torch.where(advantages < 0, torch.minimum(loss, floor), loss)
        return loss, below, above, dual
    if kind == "reinforce":
        return -advantages * logprobs, never, never, None
    if kind == "importance":
        return -advantages * ratio, never, never, None
    if kind == "square":
        return square_residual(u, advantages, spec.square_tau).square() / (2.0 * spec.square_tau), never, never, None
    if kind == "nll":
        return -logprobs, never, never, None
    if kind == "dft":
        return -logprobs.detach().exp() * logprobs, never, never, None
    if kind == "sapo":
        tau = _by_sign(advantages > 0, spec.tau_pos, spec.tau_neg, ratio)
        return -(4.0 / tau) * torch.sigmoid(tau * (ratio - 1.0)) * advantages, never, never, None
    if kind == "geometric":
        assert columns.sequence_log_ratio is not None
        token_u = log_ratio(spec, logprobs.detach(), columns.anchor)
        below = never if spec.clip_low is None else (token_u < -spec.clip_low) & (advantages < 0)
        above = never if spec.clip_high is None else (token_u > spec.clip_high) & (advantages > 0)
        return -ratio * advantages, below, above, None
    if kind == "vespo":
        k = _by_sign(advantages >= 0, spec.k_pos, spec.k_neg, ratio)
        rate = _by_sign(advantages >= 0, spec.lambda_pos, spec.lambda_neg, ratio)
        phi = torch.exp(rate + k * u.detach() - rate * u.detach().exp())
        return -phi * advantages * logprobs, never, never, None
    below = never if spec.weight_low is None else (weight < spec.weight_low)
    above = never if spec.weight_high is None else (weight > spec.weight_high)
    if kind == "clipped_weight":
        loss = -one_sided(weight, spec.weight_low, spec.weight_high) * advantages * logprobs
        return loss, below & (advantages < 0), above & (advantages > 0), None
    if kind == "masked_weight":
        outside = never if spec.weight_low is None else (weight <= spec.weight_low)
        outside = outside if spec.weight_high is None else outside | (weight >= spec.weight_high)
        return -torch.where(outside, 0.0, weight) * advantages * logprobs, below, above, None
    if kind == "topr":
        assert columns.positive is not None
        tapered = torch.where(columns.positive, 1.0, one_sided(weight, spec.weight_low, spec.weight_high))
        return -tapered * advantages * logprobs, below & ~columns.positive, above & ~columns.positive, None
    anchor = logprobs.detach() if columns.anchor is None else columns.anchor
    below, above = _divergence_keep(spec, logprobs, anchor, advantages)
    dropped = below | above
    if spec.carrier == "ratio":
        return torch.where(dropped, 0.0, -advantages * ratio), below, above, None
    capped = torch.where(dropped, 0.0, one_sided(weight, spec.weight_low, spec.weight_high))
    return -capped * advantages * logprobs, below, above, None


def square_residual(u: Tensor, target: Tensor, tau: float) -> Tensor:
    """Return tau u - target, which the squared regression of a log-ratio brings to 0."""
    return tau * u - target


def _anchors(spec: Any) -> set[str]:
    """Return which other log-probs a loss reads: "old", "rollout", "ref" or "self"."""
    read = {spec.ratio_anchor}
    if spec.kl is not None:
        read.add(spec.kl_to)
    if spec.kl_ratio_anchor is not None:
        read.add(spec.kl_ratio_anchor)
    return read if spec.correction is None else read | {"old", "rollout"}


def policy_columns(
    spec: Any,  # PolicyLoss
    *,
    advantages: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,)
    old_logprobs: Tensor | None = None,  # (N,)
    ref_logprobs: Tensor | None = None,  # (N,)
    rollout_logprobs: Tensor | None = None,  # (N,)
    selection: Tensor | None = None,  # (N,) bool
    positive: Tensor | None = None,  # (N,) bool
    kl_tokens: Tensor | None = None,  # (N,) bool: tokens that carry the KL term
    group_ids: Tensor | None = None,  # (S,)
    n_tokens: float | Tensor | None = None,
    n_sequences: float | Tensor | None = None,
    constant: float | None = None,  # length in the denominator of aggregate="constant"
    logprobs: Tensor | None = None,  # (N,) stands for the old log-probs in the correction when they are absent
    sums: SegmentSum = segment_sum,
) -> TokenColumns:
    """Return the columns of the token arithmetic; everything under the mask has been replaced by zero."""
    dtype = advantages.dtype

    def clean(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.where(mask, x.detach().to(dtype), 0.0)

    given = {"old": old_logprobs, "rollout": rollout_logprobs, "ref": ref_logprobs, "self": None}
    named = {name: clean(given[name]) for name in _anchors(spec)}
    scale = aggregate_weights(
        spec.aggregate,
        mask,
        lengths,
        dtype=dtype,
        n_tokens=n_tokens,
        n_sequences=n_sequences,
        constant=constant,
        denominator_eps=spec.denominator_eps,
        group_ids=group_ids,
        sums=sums,
    )
    weights, log_correction = scale, None
    if spec.correction is not None:
        rollout = named["rollout"]
        assert rollout is not None
        before = named["old"] if old_logprobs is not None else clean(logprobs)
        assert before is not None
        correction = correction_weights(spec.correction, before, rollout, mask, lengths, sums)
        if spec.surrogate == "vespo":
            log_correction = _vespo_log_correction(spec.correction, correction, mask, lengths, sums)
        else:
            weights = weights * correction
    if selection is not None:
        weights = torch.where(selection, weights, 0.0)
    kl_weights = None
    if spec.kl is not None and spec.kl_coef != 0.0:
        kl_weights = spec.kl_coef * scale
        if kl_tokens is not None:
            kl_weights = torch.where(kl_tokens, kl_weights, 0.0)
    entropy_weights = None
    if spec.entropy_coef != 0.0:
        entropy_weights = spec.entropy_coef * aggregate_weights(
            "token_mean", mask, lengths, dtype=dtype, n_tokens=n_tokens, sums=sums
        )
    return TokenColumns(
        advantages=torch.where(mask, advantages.detach(), 0.0),
        weights=weights,
        kl_weights=kl_weights,
        entropy_weights=entropy_weights,
        anchor=named[spec.ratio_anchor],
        kl_anchor=named[spec.kl_to] if spec.kl is not None else None,
        kl_ratio_anchor=named[spec.kl_ratio_anchor] if spec.kl_ratio_anchor is not None else None,
        positive=positive,
        log_correction=log_correction,
    )


def pooled_columns(
    spec: Any,
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


def policy_loss(
    spec: Any,  # PolicyLoss
    logprobs: Tensor,  # (N,)
    *,
    advantages: Tensor,  # (N,)
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,) tokens of each sequence, masked ones included
    entropy: Tensor | None = None,  # (N,)
    **inputs: Any,
) -> tuple[Tensor, TokenTerms, TokenColumns]:
    """Return (loss, terms, columns) of flat tokens; `inputs` are those of `policy_columns`."""
    live = torch.where(mask, logprobs, 0.0)
    columns = policy_columns(spec, advantages=advantages, mask=mask, lengths=lengths, logprobs=live, **inputs)
    columns = pooled_columns(spec, live, columns, mask, lengths)
    live_entropy = None if entropy is None else torch.where(mask, entropy, 0.0)
    terms = token_terms(spec, live, live_entropy, columns)
    return total(terms.contribution, lengths), terms, columns


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
    """Return (A - mean A)(logp - mean logp) per token (N,), the means over live tokens; 0 outside the mask."""
    count = mask.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        live = torch.where(mask, x, 0.0)
        return torch.where(mask, live - live.sum() / count, 0.0)

    return centred(advantages) * centred(logprobs)
