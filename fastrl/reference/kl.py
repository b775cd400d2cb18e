"""Estimates of the KL per token."""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl.reference.numerics import EXP_LIMIT, LOG_RATIO_LIMIT, SERIES_REACH, exp_linear, exp_remainder, one_sided

BINARY_KL_EPS = 1e-8


# --- KL estimates -----------------------------------------------------------------------------------------------------


def kl_value(x: Tensor, estimator: str) -> Tensor:
    """Return the KL estimate of the log-ratio x = logp - logp_other (Schulman 2020, "Approximating KL divergence").

    k1 = x, k2 = x^2/2, k3 = exp(-x) - 1 + x, abs = |x|. k3 is accurate relative to itself for every x, exactly 0 at 0.
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

    The choices of `gradient`:

        "plain"                   differentiates the clamped estimate
        "ratio_weighted"          multiplies the estimate by `ratio`, with the gradient of both
        "straight_through"        value of the estimate, gradient of k2
        "straight_through_ratio"  value of the estimate, gradient of sg(min(ratio, ratio_max)) k2

    `value_clamp` bounds the estimate, or with value_clamp_order "after" the estimate times the ratio of
    "ratio_weighted".
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
