"""Advantage estimators of the field: compositions of group statistics, returns and whitening.

Each docstring gives the formula, the paper, and the trainer with the same numbers. Rewards, groups and missing rewards
are as in `group.py`. Token rewards, masks and packing are as in `returns.py`. Shapes, dtypes, groups, options and
numbers that do not fit raise a ValueError or TypeError that names the argument.

Legend: B completions, T time, N tokens, S sequences, G groups, K rewards of a completion, J steps of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.advantages.group import Grouping, group_advantages, grouping, reward_tensor
from fastrl.losses.advantages.returns import MASKED, TokenBatch, masked_whiten, returns_to_go, whitened
from fastrl.ops.segments import running_sum

GroupIds = Tensor | Sequence[int] | None


def opo_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    lengths: Tensor,  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    singleton: str = "zero",
) -> Tensor:
    """Return R - sum L R / sum L over the group (B,): the variance-optimal baseline if all tokens weigh alike.

    OPO, arXiv 2505.23585, and verl's "opo" (with singleton="reward").
    """
    return group_advantages(
        rewards,
        group_ids=group_ids,
        group_size=group_size,
        scale="none",
        baseline="length_weighted",
        lengths=lengths,
        singleton=singleton,
    )


def maxrl_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    eps: float = 1e-6,
    singleton: str = "zero",
) -> Tensor:
    """Return (R - mean) / (mean + eps) over the group (B,), for rewards that are not negative.

    MaxRL, arXiv 2602.02710, and SkyRL's "maxrl".
    """
    return group_advantages(
        rewards, group_ids=group_ids, group_size=group_size, scale="group_mean", eps=eps, singleton=singleton
    )


def gpg_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    f_norm: float = 1.0,
    singleton: str = "zero",
) -> Tensor:
    """Return alpha (R - mean) / f_norm (B,), alpha = known rewards / rewards that are not zero (at least 1).

    GPG, arXiv 2504.02546, and verl's "gpg". alpha couples the whole batch: compute it before the batch is split.
    """
    checks.plain_float("f_norm", f_norm, low=0.0, open_low=True)
    r = reward_tensor("rewards", rewards)
    known = ~r.isnan()
    # In the dtype of the rewards: the quotient of two integer tensors is float32.
    alpha = known.sum().to(r.dtype) / (known & (r != 0)).sum().clamp(min=1)
    centred = group_advantages(r, group_ids=group_ids, group_size=group_size, scale="none", singleton=singleton)
    return alpha / f_norm * centred


def pass_at_k_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    scale: str = "group",
    eps: float = 1e-6,
) -> Tensor:
    """Return (best - second) / (std + eps) at the best completion of each group and 0 elsewhere, (B,).

    The gradient of the expected best of the group: pass@k for k = the group's size (arXiv 2503.19595), and verl's
    "grpo_passk". scale="none" leaves the division out. Two best completions that tie get 0.
    """
    checks.one_of("scale", scale, ("group", "none"))
    checks.plain_float("eps", eps, low=0.0)
    r = reward_tensor("rewards", rewards)
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    stats = reference.group_advantages(r, groups.group, groups.n_groups, scale="none")
    is_best, best, second = _top_two(torch.where(r.isnan(), -torch.inf, r), groups)
    lead = best - second
    if scale == "group":
        lead = lead / (stats.std[groups.group] + eps)
    return torch.where(is_best & second.isfinite() & (best > second), lead, 0.0)


def _top_two(x: Tensor, groups: Grouping) -> tuple[Tensor, Tensor, Tensor]:
    """Return, each (B,): whether a row is the first largest of its group, the largest, and the second largest."""
    index = groups.group
    lowest = x.new_full((groups.n_groups,), -torch.inf)
    largest = lowest.scatter_reduce(0, index, x, "amax")[index]
    n = x.numel()
    rows = torch.arange(n, device=x.device)
    first = rows.new_full((groups.n_groups,), n).scatter_reduce(0, index, torch.where(x == largest, rows, n), "amin")
    is_first = rows == first[index]
    second = lowest.scatter_reduce(0, index, torch.where(is_first, -torch.inf, x), "amax")[index]
    return is_first, largest, second


def combine_rewards(rewards: Tensor | Sequence[Any], weights: Tensor | Sequence[float] | None = None) -> Tensor:
    """Return sum_k w_k R_k (B,) of the known ones of several rewards (B, K), missing if all are.

    `group_advantages(combine_rewards(rewards, weights), ...)` is GRPO with several rewards, as in TRL
    ("sum_then_normalize"). `gdpo_advantages` normalises each before the sum.
    """
    r = reward_tensor("rewards", rewards, 2)
    known = ~r.isnan()
    return torch.where(known.any(1), (torch.where(known, r, 0.0) * _weights(weights, r)).sum(1), torch.nan)


def _weights(weights: Tensor | Sequence[float] | None, rewards: Tensor) -> Tensor:
    """Return (K,) finite weights, 1 by default, or raise."""
    if weights is None:
        return rewards.new_ones(rewards.shape[1])
    tensor = reward_tensor("weights", weights, dtype=rewards.dtype).to(rewards.device, rewards.dtype)
    checks.same_shape("weights", tensor, (rewards.shape[1],))
    if checks.checks_values(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(f"weights must be finite, got {tensor.tolist()}")
    return tensor


def gdpo_advantages(
    rewards: Tensor | Sequence[Any],  # (B, K)
    weights: Tensor | Sequence[float] | None = None,  # (K,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    eps: float = 1e-4,
    whiten: str = "batch",
    mask: Tensor | None = None,  # (B, T)
    whiten_eps: float = 1e-8,
    singleton: str = "zero",
) -> Tensor:
    """Return sum_k w_k (R_k - mean_k) / (std_k + eps), each reward normalised in its group, then whitened.

    GDPO, arXiv 2601.05242. A missing reward adds nothing. A completion without any known reward gets 0.

    Args:
        rewards: (B, K), NaN where missing.
        weights: (K,), 1 by default.
        group_ids, group_size: as in `group_advantages`.
        eps: added to each group's std, and to the batch's with whiten="batch".
        whiten: the normalisation of the sum.
            "batch": (x - mean) / (std + eps) over the completions, (B,) (TRL "normalize_then_sum")
            "tokens": x / sqrt(var + whiten_eps), centred, over the live tokens of `mask`, (B, T) (verl, with
                singleton="reward")
            "none": (B,)
        mask: (B, T) 0/1, for "tokens" only.
        whiten_eps: added to the variance with "tokens".
        singleton: as in `group_advantages`.
    """
    checks.one_of("whiten", whiten, ("batch", "tokens", "none"))
    if (mask is None) == (whiten == "tokens"):
        raise ValueError(f"mask is needed with whiten='tokens' and only then, got whiten={whiten!r}")
    r = reward_tensor("rewards", rewards, 2)
    w = _weights(weights, r)
    total = torch.zeros_like(r[:, 0]) if r.shape[1] else r.new_zeros(r.shape[0])
    for k in range(r.shape[1]):
        total = total + w[k] * group_advantages(
            r[:, k], group_ids=group_ids, group_size=group_size, eps=eps, singleton=singleton
        )
    known = (~r.isnan()).any(1)
    if whiten == "batch":
        scored = torch.where(known, total, torch.nan)
        centred = total - torch.where(known, total, 0.0).sum() / known.sum().clamp(min=1)
        total = (centred / (reference.batch_std(scored) + eps)).to(r.dtype)
    total = torch.where(known, total, 0.0)
    if mask is None:
        return total
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != total.shape[0]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape (B={total.shape[0]}, T), got {got}")
    return masked_whiten(total.unsqueeze(1).expand(mask.shape), mask, whiten_eps)


def step_advantages(
    step_rewards: Tensor,  # (B, J)
    step_ends: Tensor,  # (B, J) int
    mask: Tensor,  # (B, T)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    scale: str = "group",
    eps: float = 1e-4,
) -> Tensor:
    """Return the advantages (B, T) of process supervision: the normalised rewards of the steps ending at or after t.

        r~_j = (r_j - mean) / (std + eps), over all steps of all completions of the group
        A_t = sum over the steps j of the completion with step_ends_j >= t of r~_j, 0 outside the mask

    DeepSeekMath, arXiv 2402.03300, section 4.1.3.

    Args:
        step_rewards: one reward per step. A NaN is missing: it adds nothing and counts in no statistic.
        step_ends: index in [0, T) of the last token of each step, in any order. -1 pads rows with fewer steps.
        mask: 1 for tokens of the policy.
        group_ids, group_size: groups of completions, as in `group_advantages`.
        scale: "group" or "batch" (std over the steps of the group or batch) or "none".
        eps: added to the std.
    """
    checks.one_of("scale", scale, ("group", "batch", "none"))
    r = reward_tensor("step_rewards", step_rewards, 2)
    b, j = r.shape
    if not isinstance(step_ends, Tensor) or step_ends.dtype not in (torch.int32, torch.int64):
        got = step_ends.dtype if isinstance(step_ends, Tensor) else type(step_ends).__name__
        raise TypeError(f"step_ends must be an int32 or int64 tensor, got {got}")
    checks.same_shape("step_ends", step_ends, (b, j))
    checks.same_device("step_ends", step_ends, r.device)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != b:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape (B={b}, T), got {got}")
    keep, poison = checks.keep_mask("mask", mask, mask.shape, r.device)
    t = mask.shape[1]
    if checks.checks_values(step_ends) and bool(((step_ends < -1) | (step_ends >= t)).any()):
        bad = step_ends[(step_ends < -1) | (step_ends >= t)]
        raise ValueError(f"step_ends must be -1 or in [0, T={t}), got {bad[:4].tolist()}")
    groups = grouping(b, r.device, group_ids, group_size)
    present = torch.where(step_ends >= 0, r, torch.nan)
    normalised = group_advantages(
        present.reshape(-1), group_ids=groups.group.repeat_interleave(j), scale=scale, eps=eps
    ).view(b, j)
    places = torch.arange(t, device=r.device)
    advantages = r.new_zeros(b, t)
    # One step at a time keeps the memory at (B, T) and the order of the additions fixed.
    for k in range(j):
        advantages = advantages + torch.where(places <= step_ends[:, k : k + 1], normalised[:, k : k + 1], 0.0)
    advantages = torch.where(keep, advantages, 0.0)
    return advantages if poison is None else advantages + poison


def reinforce_plus_plus_advantages(
    token_rewards: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # same shape, 0/1
    *,
    gamma: float = 1.0,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    masked: str = "skip",
    whiten_eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns): the discounted return of r_t - kl_coef kl_t, whitened over the batch's live tokens.

    REINFORCE++, arXiv 2501.03262. masked="skip" is verl's, "reset" SkyRL's (see `discounted_returns`). Advantages are
    0 outside the mask.

    Args:
        token_rewards: reward of each token.
        mask: 1 for tokens of the policy.
        gamma: discount in [0, 1].
        kl: same shape: KL estimate of each token (`kl_estimate`), subtracted from its reward at live tokens.
        kl_coef: its coefficient, which needs `kl` unless it is 0.
        masked: "skip", "through" or "reset", as in `discounted_returns`.
        whiten_eps: added to the variance.
        cu_seqlens: offsets of packed sequences.
    """
    checks.one_of("masked", masked, MASKED)
    checks.plain_float("gamma", gamma, low=0.0, high=1.0)
    checks.plain_float("whiten_eps", whiten_eps, low=0.0)
    checks.plain_float("kl_coef", kl_coef, low=0.0)
    if (kl is None) != (kl_coef == 0.0):
        got = "no kl" if kl is None else "kl"
        raise ValueError(f"kl and kl_coef go together, got {got} and kl_coef={kl_coef}")
    tokens = TokenBatch(token_rewards, mask, cu_seqlens)
    if kl is not None:
        tokens.rewards = tokens.rewards - torch.where(tokens.mask, kl_coef * tokens.flat("kl", kl), 0.0)
    returns = returns_to_go(tokens, gamma, masked)
    advantages = torch.where(tokens.mask, whitened(returns, tokens.mask, whiten_eps), 0.0)
    return tokens.restore(advantages), tokens.restore(returns)


def reinforce_plus_plus_baseline_advantages(
    rewards: Tensor | Sequence[Any],  # (B,)
    mask: Tensor,  # (B, T)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    whiten_eps: float = 1e-8,
    singleton: str = "zero",
) -> Tensor:
    """Return R - group mean, given to every token and whitened over the live tokens, (B, T), 0 outside the mask.

    REINFORCE++-baseline, arXiv 2501.03262, and verl's "reinforce_plus_plus_baseline" (with singleton="reward").
    """
    centred = group_advantages(rewards, group_ids=group_ids, group_size=group_size, scale="none", singleton=singleton)
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != centred.shape[0]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask must have shape (B={centred.shape[0]}, T), got {got}")
    return masked_whiten(centred.unsqueeze(1).expand(mask.shape), mask, whiten_eps)


def remax_advantages(
    token_rewards: Tensor,  # (B, T) or (N,)
    baseline_rewards: Tensor,  # (B,) or (S,)
    mask: Tensor,  # same shape as token_rewards, 0/1
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns): the sum of the rewards to come minus the reward of the greedy completion.

    ReMax, arXiv 2310.10505, and verl's "remax". Masked tokens have reward 0, and both outputs carry the return through
    them.
    `group_advantages(rewards, baseline="given", scale="none", ...)` is the form with one reward per completion.
    """
    tokens = TokenBatch(token_rewards, mask, cu_seqlens)
    checks.float_tensor("baseline_rewards", baseline_rewards)
    base = tokens.layout.spread(tokens.layout.sequences("baseline_rewards", baseline_rewards).detach().to(tokens.dtype))
    paid = torch.where(tokens.mask, tokens.rewards, 0.0)
    returns = tokens.scan(paid, torch.ones_like(paid))
    advantages = returns - torch.where(tokens.mask, base, 0.0)
    return tokens.restore(advantages), tokens.restore(returns)


def otb_advantages(
    token_rewards: Tensor,  # (B, T)
    old_logprobs: Tensor,  # (B, T)
    sum_squared_probs: Tensor,  # (B, T)
    mask: Tensor,  # (B, T), 0/1
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    eps: float = 1e-8,
    zero_tail: bool = True,
    singleton: str = "zero",
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns), each (B, T), with the optimal token baseline.

        W_t = m_t sum_{s <= t} m_s (1 - 2 p_s + sum_v p_sv^2),  p_s = exp(old_logprobs_s)
        b_t = sum_i G_it W_it / (sum_i W_it + eps), over the group;  A_t = m_t (G_t - b_t)

    1 - 2 p + sum p^2 is the squared norm of the gradient of the token's log-prob with respect to its logits. verl's
    "optimal_token_baseline" (with singleton="reward").

    Args:
        token_rewards: reward of each token. Rewards under the mask do not count.
        old_logprobs: log-probs of the policy that sampled.
        sum_squared_probs: sum over the vocabulary of the squared probabilities at each token.
        mask: 1 for tokens of the policy.
        group_ids, group_size: as in `group_advantages`.
        eps: added to the sum of the weights.
        zero_tail: the longest completion of a group has baseline 0 beyond the live length of the second longest,
            because it would be compared with itself there.
        singleton: advantages of a group of one: "zero", or "reward", its returns.
    """
    checks.one_of("singleton", singleton, ("zero", "reward"))
    checks.plain_float("eps", eps, low=0.0)
    tokens = TokenBatch(token_rewards, mask, None)
    shape = tokens.layout.shape
    groups = grouping(shape[0], tokens.layout.device, group_ids, group_size)
    live = tokens.mask.view(shape)
    p = tokens.flat("old_logprobs", old_logprobs).exp()
    energy = torch.where(tokens.mask, 1.0 - 2.0 * p + tokens.flat("sum_squared_probs", sum_squared_probs), 0.0)
    weight = torch.where(live, running_sum(energy.view(shape)), 0.0)
    paid = torch.where(tokens.mask, tokens.rewards, 0.0)
    returns = tokens.scan(paid, torch.ones_like(paid)).view(shape)

    def per_group(x: Tensor) -> Tensor:
        summed = torch.segment_reduce(x[groups.order], "sum", lengths=groups.sizes, axis=0, unsafe=True, initial=0)
        return summed[groups.group]

    baseline = per_group(returns * weight) / (per_group(weight) + eps)
    if zero_tail:
        longest, _, second = _top_two(live.sum(1).to(returns.dtype), groups)
        places = torch.arange(shape[1], device=returns.device)
        tail = longest.unsqueeze(1) & (places >= second.unsqueeze(1))
        baseline = torch.where(tail, 0.0, baseline)
    alone = (groups.sizes[groups.group] == 1).unsqueeze(1)
    baseline = torch.where(alone, 0.0 if singleton == "reward" else returns, baseline)
    advantages = torch.where(live, returns - baseline, 0.0)
    return tokens.restore(advantages.view(-1)), tokens.restore(returns.view(-1))
