"""Every operation that has a kernel, in plain PyTorch: the formulas, the float64 judge, and the fallback.

Nothing here imports the rest of fastrl. All functions are dtype-generic and differentiable by autograd, so that in
float64 they decide what is right (`tests/oracle.py`), and at the working precision they are the token arithmetic
wherever the fused kernel does not run. There is no third realisation.

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
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# e^32 x 1e4 squared is 6e35: a ratio times a k3 estimate still fits float32.
EXP_LIMIT = 32.0
LOG_RATIO_LIMIT = 1e4
VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX = math.log(1e-8), 20.0
BINARY_KL_EPS = 1e-8
# Below this |x|, e^x - 1 - x is its series: the difference has lost a digit at 0.5 and all of them at 1e-7 in float32.
SERIES_REACH, SERIES_ORDER = 0.5, 16


# --- vocabulary operation ---------------------------------------------------------------------------------------------


def scaled_logits(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor = 1.0,  # scalar or broadcastable to (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return z = softcap tanh(logit_scale logits / softcap) / temperature, shape (..., V)."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype).expand(z.shape[:-1]).unsqueeze(-1)
    return z / temperature


def token_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...) int
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    allowed: Tensor | None = None,  # (..., V) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), each of the shape of `labels`, 0 where ignored.

    logp = z_y - logsumexp(z); H = logsumexp(z) - sum_v p_v z_v with the terms of z_v = -inf left out.
    With `allowed`, z_v = -inf outside it; the log-prob of a label outside is the constant -inf.
    """
    z = scaled_logits(logits, temperature, logit_scale, softcap)
    live = labels != ignore_index
    if allowed is not None:
        z = torch.where(allowed, z, -math.inf)
    z = torch.where(live.unsqueeze(-1), z, torch.zeros((), dtype=z.dtype, device=z.device))
    logsumexp = torch.logsumexp(z, dim=-1)
    index = torch.where(live, labels, 0).long().unsqueeze(-1)
    logprobs = z.gather(-1, index).squeeze(-1) - logsumexp
    if allowed is not None:
        logprobs = torch.where(allowed.gather(-1, index).squeeze(-1), logprobs, -math.inf)
    shifted = z - logsumexp.unsqueeze(-1)
    entropy = -(shifted.exp() * torch.where(shifted.isneginf(), 0.0, shifted)).sum(-1)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return torch.where(live, logprobs, zero), torch.where(live, entropy, zero), torch.where(live, logsumexp, zero)


def linear_token_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    allowed: Tensor | None = None,  # (..., V) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `token_logprobs(hidden weight^T + bias, labels, ...)` with all logits materialised."""
    logits = F.linear(hidden, weight, bias)
    return token_logprobs(logits, labels, temperature, logit_scale, softcap, ignore_index, allowed)


# --- small parts ------------------------------------------------------------------------------------------------------


def exp_linear(x: Tensor) -> Tensor:
    """Return exp(x), continued linearly beyond `EXP_LIMIT`; NaN stays NaN, +inf is held at `LOG_RATIO_LIMIT`."""
    x = x.clamp(max=LOG_RATIO_LIMIT)
    return torch.where(x > EXP_LIMIT, math.exp(EXP_LIMIT) * (x - (EXP_LIMIT - 1.0)), x.clamp(max=EXP_LIMIT).exp())


def _remainder_series(x: Tensor) -> Tensor:
    series = torch.ones_like(x)
    for i in range(SERIES_ORDER, 2, -1):
        series = series * x * (1.0 / i) + 1.0
    return 0.5 * x * x * series


class _ExpRemainder(torch.autograd.Function):
    """The series of `exp_remainder` with its derivative e^x - 1: autograd would keep each of its partial sums."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _remainder_series(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.expm1(x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * torch.expm1(x)


def exp_remainder(x: Tensor) -> Tensor:
    """Return e^x - 1 - x for |x| <= `SERIES_REACH` as x^2/2 (1 + x/3 (1 + x/4 (...))), to a few roundings of itself."""
    # A graph of torch.compile fuses the sums, and does not take a Function with a forward mode.
    return _remainder_series(x) if torch.compiler.is_compiling() else _ExpRemainder.apply(x)


def one_sided(x: Tensor, low: float | None, high: float | None) -> Tensor:
    """Clamp `x` to [low, high], either side open when None."""
    return x if low is None and high is None else x.clamp(min=low, max=high)


def _accumulator(x: Tensor) -> torch.dtype:
    return x.dtype if x.device.type == "mps" else torch.float64


def segment_sum(
    x: Tensor,  # (N,)
    lengths: Tensor,  # (S,) int64, summing to N
) -> Tensor:
    """Return the (S,) sums over consecutive segments, accumulated in float64 in a fixed order."""
    total = torch.segment_reduce(x.to(_accumulator(x)), "sum", lengths=lengths, unsafe=True, initial=0)
    return total.to(x.dtype)


SegmentSum = Callable[[Tensor, Tensor], Tensor]
"""(values (N,), lengths (S,)) -> sums (S,): what the functions that pool over sequences take, so that a kernel may
stand in for `segment_sum`."""


def segment_mean(x: Tensor, mask: Tensor, lengths: Tensor, sums: SegmentSum = segment_sum) -> Tensor:
    """Return the (S,) means of `x` over the live tokens of each segment; 0 where a segment has none."""
    count = sums(mask.to(x.dtype), lengths).clamp(min=1.0)
    return sums(torch.where(mask, x, 0.0), lengths) / count


def spread(per_sequence: Tensor, lengths: Tensor, n_tokens: int) -> Tensor:
    """Return per-sequence values (S,) repeated over their tokens (N,)."""
    return per_sequence.repeat_interleave(lengths, output_size=n_tokens)


def total(x: Tensor, lengths: Tensor, sums: SegmentSum = segment_sum) -> Tensor:
    """Return the sum of `x` (N,), sequence by sequence: padding and packing give the same bits."""
    return sums(x.to(_accumulator(x)), lengths).sum().to(x.dtype)


def reverse_scan(
    b: Tensor,  # (N,)
    c: Tensor,  # (N,) 0 where a sequence ends
    reach: int,
) -> Tensor:
    """Return x (N,) with x_t = b_t + c_t x_{t+1}, where no run of non-zero `c` is longer than `reach`.

    Every step doubles the reach of all positions (Hillis and Steele 1986): log2(reach) steps over whole tensors.
    """
    x, c = b.clone(), c.clone()
    step = 1
    while step < min(reach, b.numel()):
        # Selected, not multiplied: a NaN behind the end of the sequence must not come through a factor of zero.
        ahead = torch.where(c[:-step] != 0, c[:-step] * x[step:], 0.0)
        carried = c[:-step] * c[step:]
        x = torch.cat([x[:-step] + ahead, x[-step:]])
        c = torch.cat([carried, torch.zeros_like(c[-step:])])
        step *= 2
    return x


# --- KL estimates -----------------------------------------------------------------------------------------------------


def kl_value(x: Tensor, estimator: str) -> Tensor:
    """Return the KL estimate of the log-ratio x = logp - logp_other (Schulman 2020, "Approximating KL divergence").

    k1 = x; k2 = x^2/2; k3 = exp(-x) - 1 + x; abs = |x|. k3 is accurate relative to itself for every x, exactly 0 at 0.
    """
    if estimator == "k1":
        return x
    if estimator == "k2":
        return 0.5 * x.square()
    if estimator == "abs":
        return x.abs()
    near = x.abs() < SERIES_REACH
    inside = torch.expm1((-x).clamp(max=EXP_LIMIT))
    beyond = torch.where(-x > EXP_LIMIT, exp_linear(-x) - 1.0, inside) + x
    return torch.where(near, exp_remainder(torch.where(near, -x, 0.0)), beyond)


def kl_estimate(
    logprobs: Tensor,  # any shape
    other: Tensor,  # same shape: reference, old or rollout log-probs, no gradient
    estimator: str = "k3",
    gradient: str = "plain",
    ratio: Tensor | None = None,  # same shape: importance ratio, for the two ratio gradients
    log_ratio_clamp: float | tuple[float | None, float | None] | None = None,
    value_clamp: float | None = None,
    ratio_max: float | None = None,
    value_clamp_order: str = "before",
) -> Tensor:
    """Return the per-token KL estimate, of the shape of `logprobs`.

    gradient: "plain" differentiates the clamped estimate; "ratio_weighted" multiplies it by `ratio`, which is not
    detached; "straight_through" has the value of the estimate and the gradient of k2; "straight_through_ratio" the
    gradient of sg(min(ratio, ratio_max)) k2. `value_clamp` bounds the estimate, or with value_clamp_order "after" the
    estimate times the ratio of "ratio_weighted".
    """
    raw = (logprobs - other).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    low, high = log_ratio_clamp if isinstance(log_ratio_clamp, tuple) else _symmetric(log_ratio_clamp)
    value = kl_value(one_sided(raw, low, high), estimator)
    late = gradient == "ratio_weighted" and value_clamp_order == "after"
    if not late:
        value = one_sided(value, *_symmetric(value_clamp))
    if gradient == "plain":
        return value
    if gradient == "ratio_weighted":
        assert ratio is not None
        return one_sided(value * ratio, *_symmetric(value_clamp)) if late else value * ratio
    k2 = 0.5 * raw.square()
    if gradient == "straight_through_ratio":
        assert ratio is not None
        k2 = k2 * one_sided(ratio.detach(), None, ratio_max)
    return value.detach() + (k2 - k2.detach())


def _symmetric(bound: float | None) -> tuple[float | None, float | None]:
    return (None, None) if bound is None else (-bound, bound)


# --- train-inference correction ---------------------------------------------------------------------------------------


def binary_kl(log_q: Tensor, log_p: Tensor, eps: float = BINARY_KL_EPS) -> Tensor:
    """Return KL(q || p) of the two-outcome distributions (token, anything else), from log-probs."""
    q, p = log_q.exp(), log_p.exp()
    return q * (log_q - log_p) + (1.0 - q) * torch.log((1.0 - q + eps) / (1.0 - p + eps))


def _gate_statistic(spec: Any, delta: Tensor, old: Tensor, rollout: Tensor) -> Tensor:
    """Return the per-token statistic that a gate bounds; `delta` = old - rollout."""
    if spec.statistic == "tv":
        return (old.exp() - rollout.exp()).abs()
    if spec.statistic == "binary_kl":
        clamp = math.log(1e-6), math.log1p(-1e-6)
        return binary_kl(rollout.clamp(*clamp), old.clamp(*clamp), eps=0.0)
    return kl_value(delta if spec.statistic != "k1" else -delta, spec.statistic)


def correction_weights(
    spec: Any,  # RolloutCorrection
    old: Tensor,  # (N,) log-probs of the trainer's own forward before the update
    rollout: Tensor,  # (N,) log-probs that the inference engine reported
    mask: Tensor,  # (N,) bool
    lengths: Tensor,  # (S,)
    sums: SegmentSum = segment_sum,
) -> Tensor:
    """Return the detached weights (N,) that multiply the policy term; 1 outside the mask and at NaN `rollout`.

    w = exp(old - rollout) per token, exp(mean) or exp(sum) per sequence. "truncate" clamps w to [low, high]; "mask"
    sets it to zero outside; "gate" keeps the token weights where the statistic of the level lies inside.
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
    anchor = columns.anchor
    u = (logprobs.detach() - (logprobs.detach() if anchor is None else anchor)).clamp(-20.0, 20.0)
    if columns.log_correction is not None:
        u = u + columns.log_correction.clamp(VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX)
    pooled = sums(torch.where(mask, u, 0.0), lengths)
    return spread(pooled.clamp(VESPO_LOG_WEIGHT_MIN, VESPO_LOG_WEIGHT_MAX), lengths, logprobs.numel())


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
        elif spec.ratio_level == "none":
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
            log_correction = torch.where(mask, correction.log(), 0.0)
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


# --- advantages -------------------------------------------------------------------------------------------------------


class GroupAdvantages(NamedTuple):
    """Advantages (B,) and, per group (G,), the mean, the unbiased standard deviation and the count of known rewards."""

    advantages: Tensor
    mean: Tensor
    std: Tensor
    count: Tensor


def group_advantages(
    rewards: Tensor,  # (B,), NaN = missing
    group: Tensor,  # (B,) int64 in [0, n_groups)
    n_groups: int,
    *,
    scale: str = "group",
    baseline: str = "group_mean",
    eps: float = 1e-4,
    lengths: Tensor | None = None,  # (B,) for "length_weighted"
    baseline_rewards: Tensor | None = None,  # (B,) for "given", NaN = missing
) -> GroupAdvantages:
    """Return (R - baseline) / (scale + eps) with the statistics of each group's known rewards.

    baseline "group_mean" (GRPO, arXiv 2402.03300), "leave_one_out" n/(n-1) (R - mean) (RLOO, arXiv 2402.14740),
    "length_weighted" sum L R / sum L (OPO, arXiv 2505.23585), "given" (ReMax, arXiv 2310.10505), "none".
    scale "group": unbiased std of the group; "batch": of all known rewards; "leave_one_out": of the other rewards of
    the group, no division where that is 0 (NeMo-RL); "group_mean": mean of the group (MaxRL, arXiv 2602.02710);
    "none" (Dr. GRPO, arXiv 2503.20783).

    Missing rewards are left out of every statistic and get advantage 0. Groups of one and of equal rewards get
    exactly 0 unless neither baseline nor scale comes from the group, and so does a batch of equal rewards with scale
    "batch". Sums are taken in float64, in a fixed order.
    """
    known = ~rewards.isnan()
    wide = torch.where(known, rewards, 0.0).to(_accumulator(rewards))
    order = group.argsort(stable=True)
    sizes = torch.zeros(n_groups, dtype=torch.int64, device=group.device).index_add(0, group, torch.ones_like(group))

    def per_group(x: Tensor) -> Tensor:
        return segment_sum(x[order], sizes)

    count = per_group(known.to(wide.dtype))
    mean = per_group(wide) / count.clamp(min=1.0)
    from_mean = torch.where(known, wide - mean[group], 0.0)
    squares = per_group(from_mean.square())
    infinity = torch.full((n_groups,), math.inf, dtype=wide.dtype, device=rewards.device)
    smallest = infinity.scatter_reduce(0, group, torch.where(known, wide, math.inf), "amin")
    largest = (-infinity).scatter_reduce(0, group, torch.where(known, wide, -math.inf), "amax")
    # A difference, not largest > smallest: rewards that are all infinite are not equal but undefined.
    varied = (count > 1) & (largest - smallest != 0)
    std = torch.where(varied, (squares / (count - 1.0).clamp(min=1.0)).sqrt(), 0.0)

    n, mates = count[group], varied[group]
    leave_one_out = from_mean * n / (n - 1.0).clamp(min=1.0)
    if baseline == "group_mean":
        centred = from_mean
    elif baseline == "leave_one_out":
        centred = leave_one_out
    elif baseline == "length_weighted":
        assert lengths is not None
        weight = torch.where(known, lengths.to(wide.dtype), 0.0)
        weights = per_group(weight)
        weighted = torch.where(weights > 0, per_group(weight * from_mean) / weights.clamp(min=1.0), 0.0)
        centred = from_mean - weighted[group]
    elif baseline == "given":
        assert baseline_rewards is not None
        known = known & ~baseline_rewards.isnan()
        centred = wide - baseline_rewards.to(wide.dtype)
    else:
        centred = wide
    if baseline not in ("given", "none"):
        centred = torch.where(mates, centred, 0.0)
    if scale == "group":
        centred = torch.where(mates, centred / (std[group] + eps), 0.0)
    elif scale == "batch":
        deviation = batch_std(rewards)
        centred = torch.where(deviation == 0, 0.0, centred / (deviation + eps))
    elif scale == "leave_one_out":
        others = leave_one_out_std(from_mean, squares[group], n)
        centred = torch.where(mates, torch.where(others > 0, centred / (others + eps), centred), 0.0)
    elif scale == "group_mean":
        divisor = mean[group] + eps
        centred = torch.where(mates & (divisor != 0), centred / divisor, 0.0)
    advantages = torch.where(known, centred, 0.0)
    return GroupAdvantages(*(x.to(rewards.dtype) for x in (advantages, mean, std, count)))


def batch_std(rewards: Tensor) -> Tensor:
    """Return the unbiased standard deviation () of the known (not NaN) rewards (B,); 0 for fewer than two of them."""
    known = ~rewards.isnan()
    wide = torch.where(known, rewards, 0.0).to(_accumulator(rewards))
    n = known.sum()
    from_mean = torch.where(known, wide - wide.sum() / n.clamp(min=1), 0.0)
    return (from_mean.square().sum() / (n - 1).clamp(min=1)).sqrt()


def leave_one_out_std(
    from_mean: Tensor,  # (B,) R - group mean
    squares: Tensor,  # (B,) sum of (R - group mean)^2 over the group
    count: Tensor,  # (B,) size of the group
) -> Tensor:
    """Return the unbiased standard deviation (B,) of the group's other rewards; 0 where fewer than two are left."""
    rest = squares - from_mean.square() * count / (count - 1.0).clamp(min=1.0)
    # What cancellation leaves of equal rewards is zero, not a tiny deviation to divide by.
    rest = torch.where(rest > 8.0 * torch.finfo(rest.dtype).eps * squares, rest, 0.0)
    return torch.where(count > 2, (rest / (count - 2.0).clamp(min=1.0)).sqrt(), 0.0)


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
