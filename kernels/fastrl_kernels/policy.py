"""Token arithmetic of the policy loss in one launch: each token's contribution, its gradient and its metrics.

    contribution = w l(r, A, logp) + w_kl k(logp, r) - w_entropy H,    r = exp(u)

u is the clamped log-ratio of the token. If the tokens of a sequence share one log-ratio, u is an input, and the kernel
also returns the gradient with respect to it. Every formula is the chain rule written backwards, gate by gate, as
autograd walks it. A clamp passes a gradient on its bounds and stops it at NaN. Two equal values of a maximum get half
the gradient each. A weight of 0 selects instead of multiplying.

Surrogate, KL estimate and KL gradient are compile-time choices. Numbers are runtime arguments: no coefficient or length
compiles anew. The caller of the host function has validated its arguments.

Legend: N tokens, A advantage, d_x the derivative with respect to x.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import Tile, launch_options, on_device_of
from fastrl_kernels.policy_parts import (
    LOG_RATIO_LIMIT,
    _clipped_ratio,
    _detached_weight,
    _drops,
    _exp,
    _exp_linear,
    _kl_term,
    _load,
    _log_ratio,
    _sigmoid_and_slope,
)

# Few tokens, several columns: small programs spread them over the device. Not yet tuned on one.
TILE = Tile(256, 4)


class PolicyAxes(NamedTuple):
    """Compile-time choices."""

    surrogate: str = "clip"
    carrier: str = ""
    """"ratio": the divergence surrogates multiply the ratio, else the log-prob."""
    kl: str = ""
    """"" for none, "k1", "k2", "k3", "abs"."""
    kl_gradient: str = "plain"
    kl_ratio: str = "loss"
    """Ratio in the KL term: "loss" takes r, "anchor" the token's ratio to `anchor`, "own" to `kl_ratio_anchor`."""
    kl_clamp: str = "before"
    """"after" bounds the estimate times the ratio of "ratio_weighted", "before" the estimate alone."""


class PolicyNumbers(NamedTuple):
    """Runtime numbers. An open bound is infinite."""

    low: float = 0.8
    """Lower bound for clipping or dropping a token: on the ratio, the log-ratio, p - q, or minus the divergence."""
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
    """Per-token inputs without gradient, each (N,) of the dtype of the log-probs. A missing anchor is the log-prob."""

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


# --- a token ----------------------------------------------------------------------------------------------------------


@triton.jit
def token_terms(
    logp,  # log-prob of one token, or of a block of tokens
    entropy,
    offs,  # positions of the tokens in the columns and the results
    mask,
    sequence_ptr,  # (N,) log-ratio that the tokens of a sequence share, or None
    columns,  # PolicyColumns of pointers (N,). All but the first two may be None
    results,  # PolicyResults of pointers (N,). The caller stores the gradients
    numbers,  # PolicyNumbers, float64
    AXES: tl.constexpr,  # PolicyAxes
):
    """Store each token's contribution and its metrics. Return d_logp, and d_u of the shared log-ratio."""
    # Triton 3.6 knows the fields of a compile-time tuple only through names of their own.
    SURROGATE: tl.constexpr = AXES.surrogate
    CARRIER: tl.constexpr = AXES.carrier
    KL: tl.constexpr = AXES.kl
    KL_GRADIENT: tl.constexpr = AXES.kl_gradient
    KL_RATIO: tl.constexpr = AXES.kl_ratio
    KL_CLAMP: tl.constexpr = AXES.kl_clamp
    ACC: tl.constexpr = results.contribution.dtype.element_ty
    low, high = tl.full((), numbers.low, ACC), tl.full((), numbers.high, ACC)
    weight_low, weight_high = tl.full((), numbers.weight_low, ACC), tl.full((), numbers.weight_high, ACC)
    log_ratio_bound = tl.full((), numbers.log_ratio_bound, ACC)

    advantages = tl.load(columns.advantages + offs, mask=mask, other=0.0)
    weights = tl.load(columns.weights + offs, mask=mask, other=0.0)
    anchor = _load(columns.anchor, offs, mask, logp)
    token_u, token_inside = _log_ratio(logp, anchor, log_ratio_bound)
    if sequence_ptr is not None:
        u = tl.load(sequence_ptr + offs, mask=mask, other=0.0)
    else:
        u = token_u
    ratio, ratio_slope = _exp_linear(u)

    # The surrogate: its value, d_ratio, d_logp, and d_u without the part through the ratio.
    zero = tl.zeros_like(logp)
    never = (advantages < 0) & (advantages > 0)
    d_ratio, d_logp, d_u, below, above, dual = zero, zero, zero, never, never, never
    if SURROGATE == "clip":
        surrogate, d_ratio, dual = _clipped_ratio(
            ratio,
            advantages,
            low,
            high,
            tl.full((), numbers.max_ratio, ACC),
            tl.full((), numbers.dual_clip, ACC),
            results.dual_clipped is not None,
        )
        below = (ratio < low) & (advantages < 0)
        above = (ratio > high) & (advantages > 0)
    elif SURROGATE == "reinforce":
        surrogate, d_logp = -advantages * logp, -advantages
    elif SURROGATE == "importance":
        surrogate, d_ratio = -advantages * ratio, -advantages
    elif SURROGATE == "square":
        tau = tl.full((), numbers.square_tau, ACC)
        d_u = tau * u - advantages
        surrogate = d_u * d_u / (2.0 * tau)
    elif SURROGATE == "nll":
        surrogate, d_logp = -logp, zero - 1.0
    elif SURROGATE == "dft":
        d_logp = -_exp(logp)
        surrogate = d_logp * logp
    elif SURROGATE == "sapo":
        tau = tl.where(advantages > 0, tl.full((), numbers.tau_pos, ACC), tl.full((), numbers.tau_neg, ACC))
        sigmoid, slope = _sigmoid_and_slope(tau * (ratio - 1.0))
        surrogate, d_ratio = -(4.0 / tau) * sigmoid * advantages, -4.0 * slope * advantages
    elif SURROGATE == "geometric":
        surrogate, d_ratio = -ratio * advantages, -advantages
        below = (token_u < low) & (advantages < 0)
        above = (token_u > high) & (advantages > 0)
    elif SURROGATE == "vespo":
        k = tl.where(advantages >= 0, tl.full((), numbers.k_pos, ACC), tl.full((), numbers.k_neg, ACC))
        rate = tl.where(advantages >= 0, tl.full((), numbers.lambda_pos, ACC), tl.full((), numbers.lambda_neg, ACC))
        d_logp = -_exp(rate + k * u - rate * _exp(u)) * advantages
        surrogate = d_logp * logp
    elif CARRIER == "ratio":
        below, above = _drops(logp, anchor, advantages, low, high, SURROGATE)
        kept = tl.where(below | above, 0.0, 1.0).to(ACC)
        surrogate, d_ratio = tl.where(below | above, 0.0, -advantages * ratio), -kept * advantages
    else:
        positive = advantages > 0
        if columns.positive is not None:
            positive = tl.load(columns.positive + offs, mask=mask, other=0) != 0
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
            kl_u, kl_inside = _log_ratio(logp, _load(columns.kl_ratio_anchor, offs, mask, logp), log_ratio_bound)
            kl_ratio, kl_slope = _exp_linear(kl_u)
        kl, d_logp, d_ratio = _kl_term(
            logp,
            _load(columns.kl_anchor, offs, mask, logp),
            kl_ratio,
            tl.full((), numbers.kl_log_ratio_bound, ACC),
            tl.full((), numbers.kl_value_bound, ACC),
            tl.full((), numbers.kl_ratio_max, ACC),
            KL,
            KL_GRADIENT,
            KL_CLAMP,
        )
        tl.store(results.kl + offs, kl, mask=mask)
        if columns.kl_weights is not None:
            kl_weights = tl.load(columns.kl_weights + offs, mask=mask, other=0.0)
            counts = kl_weights != 0
            contribution += tl.where(counts, kl_weights * kl, 0.0)
            grad_logp += tl.where(counts, kl_weights * d_logp, 0.0)
            d_ratio = tl.where(counts, kl_weights * d_ratio, 0.0)
            if KL_RATIO == "loss":
                grad_ratio += d_ratio
            else:
                grad_logp += tl.where(kl_inside > 0, d_ratio * kl_slope, 0.0)
    if columns.entropy_weights is not None:
        entropy_weights = tl.load(columns.entropy_weights + offs, mask=mask, other=0.0)
        contribution -= tl.where(entropy_weights != 0, entropy_weights * entropy, 0.0)

    tl.store(results.contribution + offs, contribution, mask=mask)
    tl.store(results.surrogate + offs, surrogate, mask=mask)
    tl.store(results.ratio + offs, ratio, mask=mask)
    tl.store(results.clipped_low + offs, below.to(tl.int8), mask=mask)
    tl.store(results.clipped_high + offs, above.to(tl.int8), mask=mask)
    if results.dual_clipped is not None:
        tl.store(results.dual_clipped + offs, dual.to(tl.int8), mask=mask)
    # The exponential passes a gradient up to the limit. "square" also depends on u itself, and that part has no limit.
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
    logprobs_ptr,  # (N,), as all pointers. All but this one, the first two columns and the results may be None
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
    low: tl.float64,
    high: tl.float64,
    max_ratio: tl.float64,
    dual_clip: tl.float64,
    weight_low: tl.float64,
    weight_high: tl.float64,
    tau_pos: tl.float64,
    tau_neg: tl.float64,
    k_pos: tl.float64,
    k_neg: tl.float64,
    lambda_pos: tl.float64,
    lambda_neg: tl.float64,
    square_tau: tl.float64,
    log_ratio_bound: tl.float64,
    kl_log_ratio_bound: tl.float64,
    kl_value_bound: tl.float64,
    kl_ratio_max: tl.float64,
    AXES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    ACC: tl.constexpr = contribution_ptr.dtype.element_ty
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    logp = tl.load(logprobs_ptr + offs, mask=mask, other=0.0)
    entropy = tl.zeros((BLOCK,), ACC)
    if entropy_weights_ptr is not None:
        entropy = tl.load(entropy_ptr + offs, mask=mask, other=0.0)
    anchors = (anchor_ptr, kl_anchor_ptr, kl_ratio_anchor_ptr)
    columns = PolicyColumns(advantages_ptr, weights_ptr, kl_weights_ptr, entropy_weights_ptr, *anchors, positive_ptr)
    flags = (clipped_low_ptr, clipped_high_ptr, dual_clipped_ptr)
    results = PolicyResults(contribution_ptr, surrogate_ptr, kl_ptr, ratio_ptr, *flags, None, None)
    numbers = PolicyNumbers(
        low, high, max_ratio, dual_clip, weight_low, weight_high, tau_pos, tau_neg, k_pos, k_neg,
        lambda_pos, lambda_neg, square_tau, log_ratio_bound, kl_log_ratio_bound, kl_value_bound, kl_ratio_max,
    )  # fmt: skip
    grad_logp, grad_u = token_terms(logp, entropy, offs, mask, sequence_ptr, columns, results, numbers, AXES)
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
    """Return each token's contribution to the loss and its metrics, as `fastrl.reference.token_terms` states them.

    Args:
        axes: compile-time choices. `kl_ratio` matters only if `kl_gradient` takes a ratio.
        numbers: bounds and coefficients.
        logprobs: log-prob of each token.
        entropy: entropy of each token, needed with `entropy_weights`.
        sequence_log_ratio: replaces the token's own log-ratio. None keeps it.
        columns: all other inputs, constants of the gradient.
        gradient: whether to form `grad_logprobs`, the derivative of each token's contribution with respect to its
            log-prob. With `sequence_log_ratio` also `grad_sequence`, the derivative with respect to the token's copy
            of the log-ratio. The derivative with respect to the entropy is -entropy_weights.
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
                AXES=compiled_axes(axes),
                BLOCK=TILE.block,
                **launch_options(TILE),
            )
    return results


# --- arguments, shared with the kernel that reads the logits ----------------------------------------------------------


def compiled_axes(axes: PolicyAxes) -> PolicyAxes:
    """Return the axes as the kernels compile them: without a ratio in the KL gradient, `kl_ratio` does not matter."""
    return axes if "ratio" in axes.kl_gradient else axes._replace(kl_ratio="loss")


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
