"""KL to a reference policy: per-token estimates, the penalty in the reward, its controller, and the exact KL.

Estimates of KL(policy || reference) from the log-probs of sampled tokens, x = logp - logp_ref (Schulman 2020,
"Approximating KL divergence"):

    k1 = x      k2 = x^2/2      k3 = exp(-x) - 1 + x      abs = |x|

`fastrl.reference.kl_estimate` computes them. k2, k3 and abs are exactly 0 with zero gradient at tokens on which the
policies agree. All are finite forward and backward for |x| up to 1e4 in float32.

Legend: B batch, T time, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl import checks, reference

ESTIMATORS = ("k1", "k2", "k3", "abs")
GRADIENTS = ("plain", "ratio_weighted", "straight_through", "straight_through_ratio")
# Name here -> name in the reference and in `PolicyLoss.kl_value_clamp_order`.
CLAMP_ORDERS = {"after_ratio": "after", "before_ratio": "before"}
Clamp = float | tuple[float | None, float | None] | None
TILE_ENTRIES = 1 << 22


def kl_estimate(
    logprobs: Tensor,  # any shape
    ref_logprobs: Tensor,  # same shape
    estimator: str = "k3",
    *,
    gradient: str = "plain",
    old_logprobs: Tensor | None = None,  # same shape
    log_ratio_clamp: Clamp = None,
    value_clamp: float | None = None,
    mask: Tensor | None = None,  # same shape, 0/1
    ratio_max: float | None = None,
    value_clamp_order: str = "after_ratio",
) -> Tensor:
    """Return the KL estimate of each token, of the shape of `logprobs`, float32 (float64 for float64).

    Args:
        logprobs: of the policy, the only argument that carries a gradient.
        ref_logprobs: of the reference policy.
        estimator: "k1", "k2", "k3", "abs".
        gradient: the function that is differentiated; r = exp(logp - old_logp).
            "plain": the clamped estimate
            "ratio_weighted": r times the estimate, r not detached (TRL and slime's unbiased KL)
            "straight_through": value of the estimate, gradient of k2 (verl "k3+")
            "straight_through_ratio": value of the estimate, gradient of sg(min(r, ratio_max)) k2 (OpenRLHF)
        old_logprobs: denominator of r in the two ratio gradients. None anchors r on the detached `logprobs`: its value
            is 1 and its gradient the gradient of logp (NeMo-RL).
        mask: tokens with 0 give 0 and no gradient, whatever they hold.
        log_ratio_clamp: bound of x inside the estimate: c for [-c, c], or (low, high), either None. Outside it the
            gradient of the estimate is 0. verl 20; OpenRLHF (-10, None) for k3.
        value_clamp: bound of the absolute value of the result. 10 in verl, OpenRLHF and slime ("low_var_kl").
        ratio_max: cap of r, with "straight_through_ratio" only. OpenRLHF 10.
        value_clamp_order: with "ratio_weighted", whether `value_clamp` bounds r times the estimate ("after_ratio",
            slime and NeMo-RL) or the estimate alone ("before_ratio"). `PolicyLoss` calls it `kl_value_clamp_order`.

    Raises:
        ValueError, TypeError: unknown options, shapes that differ, options that have no effect together.
    """
    _check_options(estimator, gradient, old_logprobs, value_clamp, ratio_max, value_clamp_order)
    bounds = _bounds(log_ratio_clamp)
    lp, ref = _same("logprobs", logprobs, None), _same("ref_logprobs", ref_logprobs, logprobs)
    old = None if old_logprobs is None else _same("old_logprobs", old_logprobs, logprobs)
    keep, poison = None, None
    if mask is not None:
        keep, poison = checks.keep_mask("mask", mask, lp.shape, lp.device)
        lp, ref = torch.where(keep, lp, 0.0), torch.where(keep, ref, 0.0)
        old = None if old is None else torch.where(keep, old, 0.0)
    value = _estimate(lp, ref.detach(), old, estimator, gradient, bounds, value_clamp, ratio_max, value_clamp_order)
    if keep is not None:
        value = torch.where(keep, value, 0.0)
    return value if poison is None else value + poison


def _check_options(
    estimator: str,
    gradient: str,
    old_logprobs: Tensor | None,
    value_clamp: float | None,
    ratio_max: float | None,
    value_clamp_order: str,
) -> None:
    checks.one_of("estimator", estimator, ESTIMATORS)
    checks.one_of("gradient", gradient, GRADIENTS)
    checks.one_of("value_clamp_order", value_clamp_order, tuple(CLAMP_ORDERS))
    if value_clamp is not None:
        checks.plain_float("value_clamp", value_clamp, low=0.0, open_low=True)
    if ratio_max is not None:
        checks.plain_float("ratio_max", ratio_max, low=0.0, open_low=True)
        if gradient != "straight_through_ratio":
            raise ValueError(f"ratio_max has no effect with gradient={gradient!r}: it needs 'straight_through_ratio'")
    if old_logprobs is not None and "ratio" not in gradient:
        raise ValueError(
            f"old_logprobs has no effect with gradient={gradient!r}: it needs 'ratio_weighted' or "
            "'straight_through_ratio'"
        )
    if value_clamp_order != "after_ratio" and gradient != "ratio_weighted":
        raise ValueError(f"value_clamp_order has no effect with gradient={gradient!r}: it needs 'ratio_weighted'")


def _bounds(clamp: Any) -> tuple[float | None, float | None]:
    """Return the (low, high) of the log-ratio, or raise."""
    if clamp is None:
        return None, None
    if not isinstance(clamp, (tuple, list)):
        bound = checks.plain_float("log_ratio_clamp", clamp, low=0.0, open_low=True)
        return -bound, bound
    if len(clamp) != 2:
        raise ValueError(f"log_ratio_clamp must be a number or (low, high), got {clamp!r}")
    low, high = (None if bound is None else checks.plain_float("log_ratio_clamp", bound) for bound in clamp)
    if low is not None and high is not None and low > high:
        raise ValueError(f"log_ratio_clamp must have low <= high, got {clamp!r}")
    return low, high


def _same(name: str, value: Any, like: Tensor | None) -> Tensor:
    """Return log-probs as float32 or float64, of the shape and on the device of `like`, or raise."""
    checks.float_tensor(name, value)
    if like is not None:
        checks.same_shape(name, value, like.shape)
        checks.same_device(name, value, like.device)
    wide = checks.wide((value if like is None else like).dtype)
    return value.to(wide)


def _estimate(
    lp: Tensor,
    ref: Tensor,
    old: Tensor | None,
    estimator: str,
    gradient: str,
    bounds: tuple[float | None, float | None],
    value_clamp: float | None,
    ratio_max: float | None,
    value_clamp_order: str,
) -> Tensor:
    ratio = None
    if "ratio" in gradient:
        ratio = reference.exp_linear(lp - (lp if old is None else old).detach())
    order = CLAMP_ORDERS[value_clamp_order]
    return reference.kl_estimate(lp, ref, estimator, gradient, ratio, bounds, value_clamp, ratio_max, order)


def kl_penalty_rewards(
    token_rewards: Tensor,  # (B, T) or (N,)
    logprobs: Tensor,  # same shape
    ref_logprobs: Tensor,  # same shape
    mask: Tensor,  # same shape, 0/1
    *,
    coef: float | Tensor,
    estimator: str = "k1",
    log_ratio_clamp: Clamp = None,
    value_clamp: float | None = None,
) -> Tensor:
    """Return token_rewards - coef * estimate at live tokens, token_rewards elsewhere, without a gradient.

    The KL in the reward of RLHF with PPO (arXiv 1909.08593, eq. 2), from log-probs before the update. verl
    (`use_kl_in_reward`), OpenRLHF, slime and TRL's RLOO have it, with k1.

    Args:
        token_rewards: reward of each token.
        logprobs: of the policy that sampled.
        ref_logprobs: of the reference policy.
        mask: 1 for tokens of the policy.
        coef: >= 0, a number or a tensor of one element (an `AdaptiveKLController`'s value on the device).
        estimator, log_ratio_clamp, value_clamp: as in `kl_estimate`.
    """
    rewards = _same("token_rewards", token_rewards, None).detach()
    if isinstance(coef, Tensor):
        if coef.numel() != 1:
            raise ValueError(f"coef must be a number or a tensor of one element, got shape {tuple(coef.shape)}")
        if checks.checks_values(coef):
            checks.plain_float("coef", float(coef), low=0.0)
        coef = coef.detach().to(rewards.device, rewards.dtype).reshape(())
    else:
        checks.plain_float("coef", coef, low=0.0)
    _same("logprobs", logprobs, token_rewards)
    estimate = kl_estimate(
        logprobs.detach(), ref_logprobs, estimator, mask=mask, log_ratio_clamp=log_ratio_clamp, value_clamp=value_clamp
    )
    return rewards - coef * estimate.to(rewards.dtype)


class AdaptiveKLController:
    """A KL coefficient that follows a target (Ziegler et al. 2019, arXiv 1909.08593, section 2.2).

    update(kl, n): value *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon. The same in verl, OpenRLHF, SkyRL, ROLL.

    Args:
        init: first value, > 0.
        target: KL to hold, > 0, in the unit of the KL that `update` gets.
        horizon: number of samples over which the coefficient can move by a fifth, > 0. Trainers use 10000.
    """

    def __init__(self, init: float, target: float, horizon: float = 10_000) -> None:
        self.value = checks.plain_float("init", init, low=0.0, open_low=True)
        self.target = checks.plain_float("target", target, low=0.0, open_low=True)
        self.horizon = checks.plain_float("horizon", horizon, low=0.0, open_low=True)

    def update(self, kl: float, n: float) -> float:
        """Move the coefficient after `n` samples whose mean KL was `kl`, and return it.

        Raises:
            ValueError: a KL that is not finite, or n outside [0, 5 horizon), where the coefficient could turn negative.
        """
        checks.plain_float("kl", kl)
        checks.plain_float("n", n, low=0.0)
        if n >= 5.0 * self.horizon:
            raise ValueError(f"n must be below 5 * horizon = {5.0 * self.horizon:g}, got {n!r}")
        self.value *= 1.0 + min(max(kl / self.target - 1.0, -0.2), 0.2) * n / self.horizon
        return self.value

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"value": self.value, "target": self.target, "horizon": self.horizon}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state from `state_dict`."""
        self.__init__(state["value"], state["target"], state["horizon"])


def full_kl(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    mask: Tensor | None = None,  # (...), 0/1
    *,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Return KL(policy || reference) = sum_v p_v (log p_v - log q_v) of each token, (...), exact over the vocabulary.

    Differentiable once with respect to `logits`: dKL/dz_v = p_v (log p_v - log q_v - KL) / temperature. The
    memory beside inputs and gradient is a few tiles of `chunk_tokens` x V float32. A token that the policy excludes
    (logit -inf) adds nothing. A token that only the reference excludes makes the KL infinite.

    Args:
        logits: of the policy, any float dtype. Results are float32 (float64 for float64).
        ref_logits: of the reference, without a gradient.
        mask: tokens with 0 give 0 and no gradient, whatever their logits hold.
        temperature: > 0, divides both logits.
        chunk_tokens: rows of a tile, by default as many as make 4 million entries.
    """
    checks.float_tensor("logits", logits)
    checks.float_tensor("ref_logits", ref_logits)
    checks.same_shape("ref_logits", ref_logits, logits.shape)
    checks.same_device("ref_logits", ref_logits, logits.device)
    checks.plain_float("temperature", temperature, low=0.0, open_low=True)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got shape {tuple(logits.shape)}")
    if chunk_tokens is not None and (
        isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1
    ):
        raise ValueError(f"chunk_tokens must be an int >= 1, got {chunk_tokens!r}")
    shape = logits.shape[:-1]
    keep, poison = torch.ones(shape, dtype=torch.bool, device=logits.device), None
    if mask is not None:
        keep, poison = checks.keep_mask("mask", mask, shape, logits.device)
    v = logits.shape[-1]
    rows = chunk_tokens or max(1, TILE_ENTRIES // v)
    flat, ref = logits.reshape(-1, v), ref_logits.detach().reshape(-1, v)
    value: Tensor = _FullKL.apply(flat, ref, keep.reshape(-1), 1.0 / temperature, rows)  # pyright: ignore[reportAssignmentType]
    value = value.view(shape)
    return value if poison is None else value + poison


class _FullKL(torch.autograd.Function):
    """(logits (N, V), ref_logits (N, V), keep (N,)) -> KL (N,), one tile of rows at a time in both directions."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ref_logits: Tensor, keep: Tensor, inverse: float, rows: int) -> Tensor:
        wide = checks.wide(logits.dtype)
        value = torch.empty(logits.shape[0], dtype=wide, device=logits.device)
        for part in _tiles(logits.shape[0], rows):
            p, gap = _tile(logits[part], ref_logits[part], keep[part], inverse, wide)
            value[part] = (p * gap).sum(-1)
        ctx.save_for_backward(logits, ref_logits, keep, value)
        ctx.inverse, ctx.rows = inverse, rows
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("full_kl is differentiable once: create_graph=True is not supported")
        logits, ref_logits, keep, value = ctx.saved_tensors
        result = torch.empty_like(logits)
        for part in _tiles(logits.shape[0], ctx.rows):
            p, gap = _tile(logits[part], ref_logits[part], keep[part], ctx.inverse, value.dtype)
            scale = torch.where(keep[part], grads[0][part], 0.0) * ctx.inverse
            tile = gap.sub_(value[part].unsqueeze(-1)).mul_(p).mul_(scale.unsqueeze(-1))
            # Rows under the mask may carry a NaN gradient from above, so select them: 0 * NaN is NaN.
            result[part] = torch.where(keep[part].unsqueeze(-1), tile, 0.0).to(result.dtype)
        return result, None, None, None, None


def _tiles(n: int, rows: int) -> list[slice]:
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def _tile(logits: Tensor, ref_logits: Tensor, keep: Tensor, inverse: float, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (p, log p - log q) of some rows, each (rows, V); p = 1/V and 0 under the mask, 0 where p = 0."""
    live = keep.unsqueeze(-1)
    z = torch.where(live, logits.to(wide), 0.0).mul_(inverse)
    z = z.sub_(z.amax(-1, keepdim=True))
    y = torch.where(live, ref_logits.to(wide), 0.0).mul_(inverse)
    y = y.sub_(y.amax(-1, keepdim=True))
    log_p = z.sub_(z.logsumexp(-1, keepdim=True))
    p = log_p.exp()
    gap = log_p.sub_(y.sub_(y.logsumexp(-1, keepdim=True)))
    return p, torch.where(p > 0, gap, torch.where(p == 0, 0.0, p))
