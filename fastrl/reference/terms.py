"""The token arithmetic of the policy loss: surrogate, KL and entropy of each token, with gradients by autograd.

    contribution = w l(r, A, logp) + w_kl k(logp, r) - w_entropy H,    r = exp(u)

`l` is the surrogate, `r` the importance ratio, `k` the KL estimate and `H` the entropy. `columns.py` makes the weights.

Exponentials of log-ratios continue as their tangent beyond `EXP_LIMIT`: value and slope agree there. The ratio, the k3
estimate and their gradients stay finite and keep their sign for log-ratios of 1e4. In float32, exp overflows at 88.

Legend: N tokens, S sequences, A advantage.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastrl.reference.columns import TokenBatch, TokenColumns, log_ratio, policy_columns, pooled_columns
from fastrl.reference.kl import binary_kl, kl_estimate
from fastrl.reference.numerics import exp_linear, one_sided
from fastrl.reference.segments import total

if TYPE_CHECKING:
    from fastrl.losses.policy.axes import PolicyAxes


class TokenTerms(NamedTuple):
    """Results of the token arithmetic, each (N,)."""

    contribution: Tensor  # the token's addend to the loss, with the gradient
    surrogate: Tensor  # l(r, A) before any weight, detached
    kl: Tensor | None  # detached
    ratio: Tensor  # detached
    clipped_low: Tensor  # bool
    clipped_high: Tensor  # bool
    dual_clipped: Tensor | None  # bool


def token_terms(
    spec: PolicyAxes,
    logprobs: Tensor,  # (N,) with gradient, zero under the mask
    entropy: Tensor | None,  # (N,)
    columns: TokenColumns,
) -> TokenTerms:
    """Return each token's contribution to the loss, and the terms of the metrics.

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


def _surrogate(
    spec: PolicyAxes, logprobs: Tensor, ratio: Tensor, u: Tensor, columns: TokenColumns
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
        # 4 sigmoid(x) = 2 (1 + tanh(x / 2)). PyTorch's sigmoid gives the last entries of a tensor other bits than the
        # rest, on processors with AVX2 as the widest set. Its tanh does not.
        return -(2.0 / tau) * (1.0 + torch.tanh(0.5 * tau * (ratio - 1.0))) * advantages, never, never, None
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


def _by_sign(positive: Tensor, if_positive: float, otherwise: float, like: Tensor) -> Tensor:
    return torch.where(positive, like.new_tensor(if_positive), like.new_tensor(otherwise))


def _clip_bounds(spec: PolicyAxes) -> tuple[float | None, float | None]:
    low = None if spec.clip_low is None else 1.0 - spec.clip_low
    high = None if spec.clip_high is None else 1.0 + spec.clip_high
    return low, high


def _divergence_keep(spec: PolicyAxes, logprobs: Tensor, anchor: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Return (dropped_low, dropped_high): tokens that DPPO's trust region removes, by direction.

    divergence_tv: A > 0 keeps p - q <= clip_high, A <= 0 keeps p - q >= -clip_low. A single bound
    holds for every token. divergence_tv_symmetric: |p - q| <= clip_high for every token. divergence_kl: binary
    KL(q || p) at most the bound, only where the move is away from q in the direction of A.
    """
    p, q = logprobs.detach().exp(), anchor.exp()
    low, high, positive = spec.clip_low, spec.clip_high, advantages > 0
    never = torch.zeros_like(positive)
    if spec.surrogate == "divergence_tv_symmetric":
        bound = high if high is not None else low
        assert bound is not None  # the loss refuses this surrogate without a bound
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


def square_residual(u: Tensor, target: Tensor, tau: float) -> Tensor:
    """Return tau u - target, which the squared regression of a log-ratio brings to 0."""
    return tau * u - target


def kl_ratio_per_token(spec: PolicyAxes) -> bool:
    """Whether the ratio of a ratio-weighted KL is the token's own, not the one that the surrogate works with."""
    own = spec.surrogate in ("vespo", "geometric") and spec.ratio_level == "token"
    return own or spec.ratio_level == "none"


def policy_loss(
    spec: PolicyAxes,
    logprobs: Tensor,  # (N,)
    *,
    entropy: Tensor | None = None,  # (N,)
    **inputs: Any,
) -> tuple[Tensor, TokenTerms, TokenColumns]:
    """Return (loss, terms, columns) of flat tokens. `inputs` are the fields of `TokenBatch`."""
    batch = TokenBatch(**inputs)
    mask, lengths = batch.mask, batch.lengths
    live = torch.where(mask, logprobs, 0.0)
    columns = policy_columns(spec, batch, logprobs=live)
    columns = pooled_columns(spec, live, columns, mask, lengths)
    live_entropy = None if entropy is None else torch.where(mask, entropy, 0.0)
    terms = token_terms(spec, live, live_entropy, columns)
    return total(terms.contribution, lengths), terms, columns
