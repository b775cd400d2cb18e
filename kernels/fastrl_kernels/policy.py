"""Token arithmetic of the policy loss: what each token adds, its gradient and what the metrics need, in one launch.

    contribution = w l(r, A, logp) + w_kl k(logp, r) - w_entropy H,    r = exp(u)

u is the clamped log-ratio of the token, or an input where tokens of a sequence share one: the gradient with respect to
it is then a result of its own. Every formula is the chain rule written backwards, gate by gate, as autograd walks it:
clamps let a gradient through on their bounds and stop that of NaN, the larger of two equal values gets half of it, and
weights of 0 select instead of multiplying. Legend: N tokens, A advantage, d_x the derivative with respect to x.

Which surrogate, KL estimate and gradient are compiled in; numbers are not: no coefficient or length compiles anew.
The host function validates nothing: its caller did.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import COMPILE_OPTIONS, Tile, on_device_of

# Few tokens, several columns: small programs spread them over the device. Not yet tuned on one.
TILE = Tile(256, 4)

LOG2E = tl.constexpr(1.4426950408889634)
# Beyond EXP_LIMIT the exponential goes on as its tangent; log-ratios end at LOG_RATIO_LIMIT.
EXP_LIMIT = tl.constexpr(32.0)
LOG_RATIO_LIMIT = tl.constexpr(1e4)
EXP_AT_LIMIT = tl.constexpr(math.exp(32.0))
BINARY_KL_EPS = tl.constexpr(1e-8)


class PolicyAxes(NamedTuple):
    """What is compiled in."""

    surrogate: str = "clip"
    carrier: str = ""
    """"ratio": the divergence surrogates multiply the ratio, else the log-prob."""
    kl: str = ""
    """"" for none, "k1", "k2", "k3", "abs"."""
    kl_gradient: str = "plain"
    kl_ratio: str = "loss"
    """Ratio in the KL term: "loss" that of the loss; "anchor", "own": the token's to `anchor`, `kl_ratio_anchor`."""
    kl_clamp: str = "before"
    """"after": the value bound is on the estimate times the ratio of "ratio_weighted", else on the estimate."""


class PolicyNumbers(NamedTuple):
    """What is not; an open bound is infinite."""

    low: float = 0.8
    """Lower bound of what the surrogate clips or drops by: the ratio, the log-ratio, p - q, or minus the divergence."""
    high: float = 1.2
    max_ratio: float = math.inf
    dual_clip: float = math.inf
    weight_low: float = -math.inf
    weight_high: float = math.inf
    tau_pos: float = 1.0
    tau_neg: float = 1.05
    k_pos: float = 2.0
    k_neg: float = 3.0
    lambda_pos: float = 3.0
    lambda_neg: float = 2.0
    square_tau: float = 0.1
    log_ratio_bound: float = 1e4
    kl_log_ratio_bound: float = 1e4
    kl_value_bound: float = math.inf
    kl_ratio_max: float = math.inf


class PolicyColumns(NamedTuple):
    """Per-token inputs without gradient, each (N,) of the dtype of the log-probs; a missing anchor is the log-prob."""

    advantages: Tensor
    weights: Tensor
    kl_weights: Tensor | None = None
    entropy_weights: Tensor | None = None
    anchor: Tensor | None = None
    kl_anchor: Tensor | None = None
    kl_ratio_anchor: Tensor | None = None
    positive: Tensor | None = None
    """bool"""


class PolicyResults(NamedTuple):
    """Results, each (N,)."""

    contribution: Tensor
    surrogate: Tensor
    kl: Tensor | None
    ratio: Tensor
    clipped_low: Tensor
    """bool, as the next two"""
    clipped_high: Tensor
    dual_clipped: Tensor | None
    grad_logprobs: Tensor | None
    grad_sequence: Tensor | None


# --- exponentials -----------------------------------------------------------------------------------------------------


@triton.jit
def _power_of_two(n, like):
    """Return 2^n in the dtype of `like`, exactly, for integers n whose power is a normal number."""
    if like.dtype == tl.float64:
        return ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    else:
        return ((n + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _exp_terms(x):
    """Return e^x for any x, and e^x - 1 and e^x - 1 - x for finite x <= `EXP_LIMIT`, to a few roundings of themselves.

    The hardware's exponential errs by |x| roundings in float32, and e^x - 1 formed from it has none left near 0.
    """
    if x.dtype == tl.float64:
        ORDER: tl.constexpr = 14
        LN2_HIGH: tl.constexpr = 0.6931471803691238
        LN2_LOW: tl.constexpr = 1.9082149292705877e-10
        held = _between(x, -746.0, 710.0)
    else:
        ORDER: tl.constexpr = 9
        LN2_HIGH: tl.constexpr = 0.693145751953125
        LN2_LOW: tl.constexpr = 1.42860677e-06
        held = _between(x, -104.0, 89.5)
    # held = n ln 2 + s with |s| <= 0.35; n * LN2_HIGH is exact.
    n = tl.floor(held * LOG2E + 0.5)
    s = (held - n * LN2_HIGH) - n * LN2_LOW
    # e^s = 1 + s + s^2/2 (1 + s/3 (1 + s/4 (...)))
    series = s * 0.0 + 1.0
    for i in tl.static_range(ORDER - 2):
        series = tl.fma(series * s, 1.0 / (ORDER - i), 1.0)
    tail = 0.5 * s * s * series
    # 2^n in two factors: n itself reaches beyond the exponents of normal numbers.
    whole = n.to(tl.int32)
    half = whole >> 1
    first = _power_of_two(half, x)
    second = _power_of_two(whole - half, x)
    exp = (1.0 + (s + tail)) * first * second
    scale = first * second
    expm1 = tl.where(n == 0.0, s + tail, tl.fma(scale, s + tail, scale - 1.0))
    return exp, expm1, tl.where(n == 0.0, tail, expm1 - x)


@triton.jit
def _exp(x):
    exp, _, _ = _exp_terms(x)
    return exp


@triton.jit
def _exp_linear(x):
    """Return exp(x), continued as its tangent beyond `EXP_LIMIT`, and the slope; x is held at `LOG_RATIO_LIMIT`."""
    near = _exp(_between(x, float("-inf"), EXP_LIMIT))
    far = x > EXP_LIMIT
    beyond = EXP_AT_LIMIT * (_between(x, float("-inf"), LOG_RATIO_LIMIT) - (EXP_LIMIT - 1.0))
    return tl.where(far, beyond, near), tl.where(far, EXP_AT_LIMIT, near)


# --- small parts ------------------------------------------------------------------------------------------------------


@triton.jit
def _between(x, low, high):
    """Return x clamped to [low, high]; NaN stays NaN."""
    raised = tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(raised, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _gate(gradient, x, low, high):
    """Return the gradient that a clamp to [low, high] lets through: on its bounds too, and none at NaN."""
    return tl.where((x >= low) & (x <= high), gradient, 0.0)


@triton.jit
def _load(ptr, offs, mask, otherwise):
    """Return a column, or `otherwise` where there is none."""
    if ptr is not None:
        return tl.load(ptr + offs, mask=mask, other=0.0)
    else:
        return otherwise


@triton.jit
def _log_ratio(logp, anchor, bound):
    """Return logp - anchor clamped to [-bound, bound], and 1 where the clamp lets a gradient through, else 0."""
    x = logp - anchor
    return _between(x, -bound, bound), tl.where(tl.abs(x) <= bound, 1.0, 0.0).to(logp.dtype)


@triton.jit
def _sigmoid_and_slope(z):
    """Return 1 / (1 + e^-z) and its derivative, neither by a difference."""
    e = _exp(-tl.abs(z))
    s = 1.0 / (1.0 + e)
    return tl.where(z >= 0, s, e * s), e * s * s


# --- surrogates -------------------------------------------------------------------------------------------------------


@triton.jit
def _clipped_ratio(ratio, advantages, low, high, max_ratio, dual_clip, HAS_DUAL: tl.constexpr):
    """Return max(-min(r, max_ratio) A, -clip(r) A), for A < 0 at most -dual_clip A, d_ratio, and where that bites."""
    free = -_between(ratio, float("-inf"), max_ratio) * advantages
    clipped = -_between(ratio, low, high) * advantages
    loss = tl.maximum(free, clipped, propagate_nan=tl.PropagateNan.ALL)
    tie = free == clipped
    # Shares by exclusion, so that NaN goes down both branches.
    to_free = tl.where(tie, 0.5, tl.where(free < clipped, 0.0, 1.0)).to(ratio.dtype)
    to_clipped = tl.where(tie, 0.5, tl.where(free > clipped, 0.0, 1.0)).to(ratio.dtype)
    dual = (advantages < 0) & (advantages > 0)
    if HAS_DUAL:
        negative = advantages < 0
        roof = -dual_clip * advantages
        dual = negative & (loss > roof)
        share = tl.where(loss == roof, 0.5, tl.where(loss > roof, 0.0, 1.0)).to(ratio.dtype)
        share = tl.where(negative, share, 1.0)
        to_free *= share
        to_clipped *= share
        loss = tl.where(negative, tl.minimum(loss, roof, propagate_nan=tl.PropagateNan.ALL), loss)
    d_ratio = _gate(-to_free * advantages, ratio, float("-inf"), max_ratio)
    return loss, d_ratio + _gate(-to_clipped * advantages, ratio, low, high), dual


@triton.jit
def _drops(logp, anchor, advantages, low, high, SURROGATE: tl.constexpr):
    """Return where a trust region on the distance of p = e^logp and q = e^anchor removes a token, by direction."""
    p = _exp(logp)
    q = _exp(anchor)
    positive = advantages > 0
    if SURROGATE == "divergence_kl":
        distance = q * (anchor - logp) + (1.0 - q) * tl.log((1.0 - q + BINARY_KL_EPS) / (1.0 - p + BINARY_KL_EPS))
        return (distance > -low) & ~positive & (p < q), (distance > high) & positive & (p > q)
    elif SURROGATE == "divergence_tv":
        # A bound that stands alone holds for every sign of the advantage.
        alone = (low == float("-inf")) != (high == float("inf"))
        every = tl.zeros_like(p) + tl.where(alone, 1.0, 0.0).to(p.dtype) > 0
        return (p - q < low) & (~positive | every), (p - q > high) & (positive | every)
    else:
        return p - q < low, p - q > high


@triton.jit
def _detached_weight(
    logp, anchor, ratio, advantages, positive, low, high, weight_low, weight_high, SURROGATE: tl.constexpr
):
    """Return the weight of -A logp that carries no gradient, and where it was bounded below and above."""
    weight = _between(ratio, weight_low, weight_high)
    below = ratio < weight_low
    above = ratio > weight_high
    if SURROGATE == "clipped_weight":
        return weight, below & (advantages < 0), above & (advantages > 0)
    elif SURROGATE == "masked_weight":
        return tl.where((ratio <= weight_low) | (ratio >= weight_high), 0.0, ratio), below, above
    elif SURROGATE == "topr":
        return tl.where(positive, 1.0, weight), below & ~positive, above & ~positive
    else:
        dropped_low, dropped_high = _drops(logp, anchor, advantages, low, high, SURROGATE)
        return tl.where(dropped_low | dropped_high, 0.0, weight), dropped_low, dropped_high


# --- KL estimates -----------------------------------------------------------------------------------------------------


@triton.jit
def _kl_value(x, KL: tl.constexpr):
    """Return the estimate of the log-ratio x, and its derivative."""
    if KL == "k1":
        return x, x * 0.0 + 1.0
    elif KL == "k2":
        return 0.5 * x * x, x
    elif KL == "abs":
        sign = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
        return tl.abs(x), sign
    else:
        _, expm1, beyond_linear = _exp_terms(_between(-x, float("-inf"), EXP_LIMIT))
        far = EXP_AT_LIMIT * (-x - (EXP_LIMIT - 1.0)) - 1.0 + x
        return tl.where(-x > EXP_LIMIT, far, beyond_linear), -expm1


@triton.jit
def _kl_term(
    logp,
    other,
    ratio,
    log_ratio_bound,
    value_bound,
    ratio_max,
    KL: tl.constexpr,
    GRADIENT: tl.constexpr,
    CLAMP: tl.constexpr,
):
    """Return the KL term, d_logp, and d_ratio."""
    # Bounds of log-ratios are at most `LOG_RATIO_LIMIT`: one clamp stands for both.
    x, inside = _log_ratio(logp, other, log_ratio_bound)
    raw_value, slope = _kl_value(x, KL)
    value = _between(raw_value, -value_bound, value_bound)
    d_ratio = tl.zeros_like(logp)
    if GRADIENT == "plain":
        d_logp = tl.where(inside > 0, _gate(slope, raw_value, -value_bound, value_bound), 0.0)
    elif GRADIENT == "ratio_weighted" and CLAMP == "after":
        weighted = raw_value * ratio
        value = _between(weighted, -value_bound, value_bound)
        # A factor, as the product rule has it: the ratio's gradient of an estimate that is NaN is NaN.
        let_through = _gate(tl.zeros_like(logp) + 1.0, weighted, -value_bound, value_bound)
        d_logp = tl.where(inside > 0, let_through * ratio * slope, 0.0)
        d_ratio = let_through * raw_value
    elif GRADIENT == "ratio_weighted":
        d_logp = tl.where(inside > 0, _gate(ratio * slope, raw_value, -value_bound, value_bound), 0.0)
        d_ratio = value
        value *= ratio
    else:
        d_logp, _ = _log_ratio(logp, other, LOG_RATIO_LIMIT)
        if GRADIENT == "straight_through_ratio":
            d_logp *= _between(ratio, float("-inf"), ratio_max)
        d_logp = tl.where(tl.abs(logp - other) <= LOG_RATIO_LIMIT, d_logp, 0.0)
    return value, d_logp, d_ratio


# --- a token ----------------------------------------------------------------------------------------------------------


@triton.jit
def token_terms(
    logp,  # of one token, or of a block of them
    entropy,
    offs,  # their places in the columns and results
    mask,
    sequence_ptr,  # (N,), and so are all pointers: the log-ratio that the tokens of a sequence share, or None
    advantages_ptr,  # of the next eight only the first two are always there
    weights_ptr,
    kl_weights_ptr,
    entropy_weights_ptr,
    anchor_ptr,
    kl_anchor_ptr,
    kl_ratio_anchor_ptr,
    positive_ptr,
    contribution_ptr,
    surrogate_ptr,
    kl_ptr,
    ratio_ptr,
    clipped_low_ptr,
    clipped_high_ptr,
    dual_clipped_ptr,
    low,
    high,
    max_ratio,
    dual_clip,
    weight_low,
    weight_high,
    tau_pos,
    tau_neg,
    k_pos,
    k_neg,
    lambda_pos,
    lambda_neg,
    square_tau,
    log_ratio_bound,
    kl_log_ratio_bound,
    kl_value_bound,
    kl_ratio_max,
    SURROGATE: tl.constexpr,
    CARRIER: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO: tl.constexpr,
    KL_CLAMP: tl.constexpr,
):
    """Store what tokens add to the loss and what the metrics need; return d_logp, and d_u of the shared log-ratio."""
    ACC: tl.constexpr = contribution_ptr.dtype.element_ty
    low, high = tl.full((), low, ACC), tl.full((), high, ACC)
    weight_low, weight_high = tl.full((), weight_low, ACC), tl.full((), weight_high, ACC)
    log_ratio_bound = tl.full((), log_ratio_bound, ACC)

    advantages = tl.load(advantages_ptr + offs, mask=mask, other=0.0)
    weights = tl.load(weights_ptr + offs, mask=mask, other=0.0)
    anchor = _load(anchor_ptr, offs, mask, logp)
    token_u, token_inside = _log_ratio(logp, anchor, log_ratio_bound)
    if sequence_ptr is not None:
        u = tl.load(sequence_ptr + offs, mask=mask, other=0.0)
    else:
        u = token_u
    ratio, ratio_slope = _exp_linear(u)

    # The surrogate: value, d_ratio, d_logp, and d_u beside what goes through the ratio.
    zero = tl.zeros_like(logp)
    never = (advantages < 0) & (advantages > 0)
    d_ratio, d_logp, d_u, below, above, dual = zero, zero, zero, never, never, never
    if SURROGATE == "clip":
        surrogate, d_ratio, dual = _clipped_ratio(
            ratio,
            advantages,
            low,
            high,
            tl.full((), max_ratio, ACC),
            tl.full((), dual_clip, ACC),
            dual_clipped_ptr is not None,
        )
        below = (ratio < low) & (advantages < 0)
        above = (ratio > high) & (advantages > 0)
    elif SURROGATE == "reinforce":
        surrogate, d_logp = -advantages * logp, -advantages
    elif SURROGATE == "importance":
        surrogate, d_ratio = -advantages * ratio, -advantages
    elif SURROGATE == "square":
        tau = tl.full((), square_tau, ACC)
        d_u = tau * u - advantages
        surrogate = d_u * d_u / (2.0 * tau)
    elif SURROGATE == "nll":
        surrogate, d_logp = -logp, zero - 1.0
    elif SURROGATE == "dft":
        d_logp = -_exp(logp)
        surrogate = d_logp * logp
    elif SURROGATE == "sapo":
        tau = tl.where(advantages > 0, tl.full((), tau_pos, ACC), tl.full((), tau_neg, ACC))
        sigmoid, slope = _sigmoid_and_slope(tau * (ratio - 1.0))
        surrogate, d_ratio = -(4.0 / tau) * sigmoid * advantages, -4.0 * slope * advantages
    elif SURROGATE == "geometric":
        surrogate, d_ratio = -ratio * advantages, -advantages
        below = (token_u < low) & (advantages < 0)
        above = (token_u > high) & (advantages > 0)
    elif SURROGATE == "vespo":
        k = tl.where(advantages >= 0, tl.full((), k_pos, ACC), tl.full((), k_neg, ACC))
        rate = tl.where(advantages >= 0, tl.full((), lambda_pos, ACC), tl.full((), lambda_neg, ACC))
        d_logp = -_exp(rate + k * u - rate * _exp(u)) * advantages
        surrogate = d_logp * logp
    elif CARRIER == "ratio":
        below, above = _drops(logp, anchor, advantages, low, high, SURROGATE)
        kept = tl.where(below | above, 0.0, 1.0).to(ACC)
        surrogate, d_ratio = tl.where(below | above, 0.0, -advantages * ratio), -kept * advantages
    else:
        positive = advantages > 0
        if positive_ptr is not None:
            positive = tl.load(positive_ptr + offs, mask=mask, other=0) != 0
        weight, below, above = _detached_weight(
            logp, anchor, ratio, advantages, positive, low, high, weight_low, weight_high, SURROGATE
        )
        d_logp = -weight * advantages
        surrogate = d_logp * logp
    counts = weights != 0
    contribution = tl.where(counts, weights * surrogate, 0.0)
    grad_logp = tl.where(counts, weights * d_logp, 0.0)
    grad_ratio = tl.where(counts, weights * d_ratio, 0.0)
    grad_u = tl.where(counts, weights * d_u, 0.0)

    if KL != "":
        kl_ratio = ratio
        if KL_RATIO == "anchor":
            kl_inside = token_inside
            kl_ratio, kl_slope = _exp_linear(token_u)
        elif KL_RATIO == "own":
            kl_u, kl_inside = _log_ratio(logp, _load(kl_ratio_anchor_ptr, offs, mask, logp), log_ratio_bound)
            kl_ratio, kl_slope = _exp_linear(kl_u)
        kl, d_logp, d_ratio = _kl_term(
            logp,
            _load(kl_anchor_ptr, offs, mask, logp),
            kl_ratio,
            tl.full((), kl_log_ratio_bound, ACC),
            tl.full((), kl_value_bound, ACC),
            tl.full((), kl_ratio_max, ACC),
            KL,
            KL_GRADIENT,
            KL_CLAMP,
        )
        tl.store(kl_ptr + offs, kl, mask=mask)
        if kl_weights_ptr is not None:
            kl_weights = tl.load(kl_weights_ptr + offs, mask=mask, other=0.0)
            counts = kl_weights != 0
            contribution += tl.where(counts, kl_weights * kl, 0.0)
            grad_logp += tl.where(counts, kl_weights * d_logp, 0.0)
            d_ratio = tl.where(counts, kl_weights * d_ratio, 0.0)
            if KL_RATIO == "loss":
                grad_ratio += d_ratio
            else:
                grad_logp += tl.where(kl_inside > 0, d_ratio * kl_slope, 0.0)
    if entropy_weights_ptr is not None:
        entropy_weights = tl.load(entropy_weights_ptr + offs, mask=mask, other=0.0)
        contribution -= tl.where(entropy_weights != 0, entropy_weights * entropy, 0.0)

    tl.store(contribution_ptr + offs, contribution, mask=mask)
    tl.store(surrogate_ptr + offs, surrogate, mask=mask)
    tl.store(ratio_ptr + offs, ratio, mask=mask)
    tl.store(clipped_low_ptr + offs, below.to(tl.int8), mask=mask)
    tl.store(clipped_high_ptr + offs, above.to(tl.int8), mask=mask)
    if dual_clipped_ptr is not None:
        tl.store(dual_clipped_ptr + offs, dual.to(tl.int8), mask=mask)
    # The exponential lets a gradient through up to the limit; what is a function of u itself has none.
    through_ratio = tl.where(u <= LOG_RATIO_LIMIT, grad_ratio * ratio_slope, 0.0)
    if SURROGATE == "square":
        grad_u += through_ratio
    else:
        grad_u = through_ratio
    if sequence_ptr is None:
        grad_logp += tl.where(token_inside > 0, grad_u, 0.0)
    return grad_logp, grad_u


# --- the kernel -------------------------------------------------------------------------------------------------------

_NUMBERS = list(PolicyNumbers._fields)
_POINTERS = [
    "logprobs_ptr",
    "entropy_ptr",
    "sequence_ptr",
    *(f"{name}_ptr" for name in PolicyColumns._fields),
    "contribution_ptr",
    "surrogate_ptr",
    "kl_ptr",
    "ratio_ptr",
    "clipped_low_ptr",
    "clipped_high_ptr",
    "dual_clipped_ptr",
    "grad_logprobs_ptr",
    "grad_sequence_ptr",
]


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=_POINTERS)
def _policy_fwd_kernel(
    logprobs_ptr,  # (N,), and so are all pointers; all but this one, the first two columns and the results may be None
    entropy_ptr,
    sequence_ptr,  # log-ratio that the tokens of a sequence share
    advantages_ptr,
    weights_ptr,
    kl_weights_ptr,
    entropy_weights_ptr,
    anchor_ptr,
    kl_anchor_ptr,
    kl_ratio_anchor_ptr,
    positive_ptr,
    contribution_ptr,
    surrogate_ptr,
    kl_ptr,
    ratio_ptr,
    clipped_low_ptr,
    clipped_high_ptr,
    dual_clipped_ptr,
    grad_logprobs_ptr,
    grad_sequence_ptr,
    N,
    low: "fp64",  # noqa: F821
    high: "fp64",  # noqa: F821
    max_ratio: "fp64",  # noqa: F821
    dual_clip: "fp64",  # noqa: F821
    weight_low: "fp64",  # noqa: F821
    weight_high: "fp64",  # noqa: F821
    tau_pos: "fp64",  # noqa: F821
    tau_neg: "fp64",  # noqa: F821
    k_pos: "fp64",  # noqa: F821
    k_neg: "fp64",  # noqa: F821
    lambda_pos: "fp64",  # noqa: F821
    lambda_neg: "fp64",  # noqa: F821
    square_tau: "fp64",  # noqa: F821
    log_ratio_bound: "fp64",  # noqa: F821
    kl_log_ratio_bound: "fp64",  # noqa: F821
    kl_value_bound: "fp64",  # noqa: F821
    kl_ratio_max: "fp64",  # noqa: F821
    SURROGATE: tl.constexpr,
    CARRIER: tl.constexpr,
    KL: tl.constexpr,
    KL_GRADIENT: tl.constexpr,
    KL_RATIO: tl.constexpr,
    KL_CLAMP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = contribution_ptr.dtype.element_ty
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    logp = tl.load(logprobs_ptr + offs, mask=mask, other=0.0)
    entropy = tl.zeros((BLOCK,), ACC)
    if entropy_weights_ptr is not None:
        entropy = tl.load(entropy_ptr + offs, mask=mask, other=0.0)
    grad_logp, grad_u = token_terms(
        logp,
        entropy,
        offs,
        mask,
        sequence_ptr,
        advantages_ptr,
        weights_ptr,
        kl_weights_ptr,
        entropy_weights_ptr,
        anchor_ptr,
        kl_anchor_ptr,
        kl_ratio_anchor_ptr,
        positive_ptr,
        contribution_ptr,
        surrogate_ptr,
        kl_ptr,
        ratio_ptr,
        clipped_low_ptr,
        clipped_high_ptr,
        dual_clipped_ptr,
        low,
        high,
        max_ratio,
        dual_clip,
        weight_low,
        weight_high,
        tau_pos,
        tau_neg,
        k_pos,
        k_neg,
        lambda_pos,
        lambda_neg,
        square_tau,
        log_ratio_bound,
        kl_log_ratio_bound,
        kl_value_bound,
        kl_ratio_max,
        SURROGATE,
        CARRIER,
        KL,
        KL_GRADIENT,
        KL_RATIO,
        KL_CLAMP,
    )
    if grad_logprobs_ptr is not None:
        tl.store(grad_logprobs_ptr + offs, grad_logp, mask=mask)
        if grad_sequence_ptr is not None:
            tl.store(grad_sequence_ptr + offs, grad_u, mask=mask)


def policy_terms(
    axes: PolicyAxes,
    numbers: PolicyNumbers,
    logprobs: Tensor,  # (N,) float32 or float64
    entropy: Tensor | None,  # (N,)
    sequence_log_ratio: Tensor | None,  # (N,)
    columns: PolicyColumns,
    *,
    gradient: bool = True,
) -> PolicyResults:
    """Return what every token adds to the loss and what the metrics need; see `fastrl.reference.token_terms`.

    Args:
        axes: what is compiled in; `kl_ratio` matters only where `kl_gradient` takes a ratio.
        numbers: bounds and coefficients.
        logprobs: log-prob of each token.
        entropy: entropy of each token, needed with `entropy_weights`.
        sequence_log_ratio: the log-ratio that stands for the token's own; None: the token's own.
        columns: everything else, constants of the gradient.
        gradient: whether to form `grad_logprobs`, the derivative of each token's contribution with respect to its
            log-prob, and, with `sequence_log_ratio`, `grad_sequence`, that with respect to its copy of the log-ratio.
            The derivative with respect to the entropy is -entropy_weights.
    """
    n = logprobs.numel()
    dtype = logprobs.dtype
    results = allocate_results(axes, numbers, n, dtype, logprobs.device)
    if gradient:
        results = results._replace(grad_logprobs=_row(n, dtype, logprobs.device))
    if gradient and sequence_log_ratio is not None:
        results = results._replace(grad_sequence=_row(n, dtype, logprobs.device))
    if n > 0:
        with on_device_of(logprobs):
            _policy_fwd_kernel[(triton.cdiv(n, TILE.block),)](
                logprobs.contiguous(),
                _given(entropy, dtype),
                _given(sequence_log_ratio, dtype),
                *column_arguments(columns, dtype),
                *result_arguments(results),
                results.grad_logprobs,
                results.grad_sequence,
                n,
                *numbers,
                **compiled_axes(axes),
                BLOCK=TILE.block,
                num_warps=TILE.num_warps,
                **COMPILE_OPTIONS,
            )
    return results


# --- arguments, shared with the kernel that reads the logits ----------------------------------------------------------


def compiled_axes(axes: PolicyAxes) -> dict[str, str]:
    """Return the axes as the kernels' compile-time arguments."""
    return {
        "SURROGATE": axes.surrogate,
        "CARRIER": axes.carrier,
        "KL": axes.kl,
        "KL_GRADIENT": axes.kl_gradient,
        "KL_RATIO": axes.kl_ratio if "ratio" in axes.kl_gradient else "loss",
        "KL_CLAMP": axes.kl_clamp,
    }


def column_arguments(columns: PolicyColumns, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
    """Return the columns as the kernels read them: contiguous, of the dtype of the log-probs, flags as bytes."""
    positive = None if columns.positive is None else columns.positive.contiguous().view(torch.int8)
    return (*(_given(column, dtype) for column in columns[:-1]), positive)


def allocate_results(
    axes: PolicyAxes, numbers: PolicyNumbers, n: int, dtype: torch.dtype, device: torch.device
) -> PolicyResults:
    """Return room for the results of n tokens, without their gradients."""
    has_dual = axes.surrogate == "clip" and numbers.dual_clip < math.inf
    below, above, dual = (torch.empty(n, dtype=torch.bool, device=device) for _ in range(3))
    contribution, surrogate, kl, ratio = (_row(n, dtype, device) for _ in range(4))
    return PolicyResults(
        contribution, surrogate, kl if axes.kl else None, ratio, below, above, dual if has_dual else None, None, None
    )


def result_arguments(results: PolicyResults) -> tuple[Tensor | None, ...]:
    """Return the results but the gradients as the kernels write them, flags as bytes."""
    return tuple(x.view(torch.int8) if x is not None and x.dtype == torch.bool else x for x in results[:7])


def _row(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(n, dtype=dtype, device=device)


def _given(column: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if column is None else column.to(dtype).contiguous()
