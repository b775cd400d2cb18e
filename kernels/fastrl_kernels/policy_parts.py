"""Parts of the token arithmetic: exponentials, gates, ratios and KL values with their derivatives."""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Beyond EXP_LIMIT the exponential continues as its tangent. Log-ratios end at LOG_RATIO_LIMIT.
EXP_LIMIT = tl.constexpr(32.0)
LOG_RATIO_LIMIT = tl.constexpr(1e4)
EXP_AT_LIMIT = tl.constexpr(math.exp(32.0))
BINARY_KL_EPS = tl.constexpr(1e-8)


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
    # held = n ln 2 + s with |s| <= 0.35. n * LN2_HIGH is exact.
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
    """Return exp(x) and its slope. Beyond `EXP_LIMIT` exp continues as its tangent, x is held at `LOG_RATIO_LIMIT`."""
    near = _exp(_between(x, float("-inf"), EXP_LIMIT))
    far = x > EXP_LIMIT
    beyond = EXP_AT_LIMIT * (_between(x, float("-inf"), LOG_RATIO_LIMIT) - (EXP_LIMIT - 1.0))
    return tl.where(far, beyond, near), tl.where(far, EXP_AT_LIMIT, near)


# --- small parts ------------------------------------------------------------------------------------------------------


@triton.jit
def _between(x, low, high):
    """Return x clamped to [low, high]. NaN stays NaN."""
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
