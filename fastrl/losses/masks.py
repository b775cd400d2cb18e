"""Keep-masks that need the whole batch: the tokens, sequences or groups that a policy loss learns from.

Each function of tokens returns a bool tensor, True = keep, of the shape of its per-token inputs. Pass it as
`selection`: the policy term is left out and the denominator stays. If the trainer removes the tokens from the
denominator too, pass `mask & keep` as the mask. Inputs are (B, T) padded, or (N,) packed with `cu_seqlens`. Nothing is
differentiated.

Legend: B batch, T time, N tokens, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.advantages.group import Grouping, grouping, reward_tensor
from fastrl.losses.layout import Layout
from fastrl.ops.segments import running_sum, segment_sum


def _open(logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None) -> tuple[Layout, Tensor]:
    """Return the layout of the log-probs and the mask (N,), or raise."""
    checks.float_tensor("logprobs", logprobs)
    layout = Layout.of(logprobs.shape, logprobs.device, cu_seqlens)
    return layout, checks.keep_mask("mask", mask, layout.shape, layout.device)[0].reshape(-1)


def _tokens(layout: Layout, name: str, value: Tensor) -> Tensor:
    """Return detached log-probs of the tokens (N,), or raise."""
    return layout.tokens(name, checks.float_tensor(name, value)).detach()


def _advantages(layout: Layout, advantages: Tensor) -> Tensor:
    """Return the detached advantage of every token (N,), or raise."""
    return layout.tokens_or_sequences("advantages", checks.float_tensor("advantages", advantages)).detach()


def off_policy_sequence_mask(
    logprobs: Tensor,
    other_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return False for the sequences with A < 0 and mean_t (other - logp) > threshold (DeepSeek-V3.2, eq. 9).

    Args:
        logprobs: (B, T) or (N,) of the policy.
        other_logprobs: same shape: old or rollout log-probs.
        advantages: per sequence or per token, as `PolicyLoss` takes them.
        mask: same shape as `logprobs`, 0/1.
        threshold: nats per token. TRL suggests 0.5, slime 1e-4.
        cu_seqlens: (S+1,) for packed tokens.
    """
    checks.plain_float("threshold", threshold)
    layout, keep = _open(logprobs, mask, cu_seqlens)
    gap = _tokens(layout, "other_logprobs", other_logprobs) - _tokens(layout, "logprobs", logprobs)
    drift = layout.spread(reference.segment_mean(torch.where(keep, gap, 0.0), keep, layout.lengths, segment_sum))
    # A NaN is no reason to leave a sequence out: the loss must show it.
    return layout.restore(~((_advantages(layout, advantages) < 0) & (drift > threshold)))


def high_entropy_mask(entropy: Tensor, mask: Tensor, *, fraction: float) -> Tensor:
    """Return True for the live tokens whose entropy is at least the (1 - fraction) quantile (arXiv 2506.01939).

    Args:
        entropy: (B, T) or (N,) in nats. For a quantile over ranks, gather the live entropies first.
        mask: same shape, 0/1.
        fraction: share of tokens to keep, in (0, 1].
    """
    checks.plain_float("fraction", fraction, low=0.0, high=1.0, open_low=True)
    checks.float_tensor("entropy", entropy)
    keep = checks.keep_mask("mask", mask, entropy.shape, entropy.device)[0]
    live = entropy.detach()[keep]
    if live.dtype != torch.float64:
        live = live.float()
    if live.numel() == 0:
        return keep
    # torch.quantile takes at most 2^24 values; the order statistic is the same linear interpolation.
    position = (1.0 - fraction) * (live.numel() - 1)
    ordered = live.sort().values
    below = int(position)
    above = min(below + 1, live.numel() - 1)
    threshold = torch.lerp(ordered[below], ordered[above], position - below)
    return keep & (entropy.detach() >= threshold)


def covariance_keep_mask(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    low: float = 1.0,
    high: float = 5.0,
    fraction: float = 2e-4,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    generator: torch.Generator | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return False for a random subset of the tokens of high covariance that the clip left alone (Clip-Cov).

    Candidates have (A - mean A)(logp - mean logp) strictly inside (low, high) and are not clipped by
    [1 - clip_low, 1 + clip_high]. The function drops max(1, int(fraction * live tokens)) of them at random, or all if
    there are fewer. Cui et al. 2025, arXiv 2505.22617.
    """
    checks.plain_float("fraction", fraction, low=0.0, high=1.0, open_low=True)
    layout, keep = _open(logprobs, mask, cu_seqlens)
    lp = torch.where(keep, _tokens(layout, "logprobs", logprobs), 0.0)
    old = torch.where(keep, _tokens(layout, "old_logprobs", old_logprobs).to(lp.dtype), 0.0)
    spread = torch.where(keep, _advantages(layout, advantages).to(lp.dtype), 0.0)
    ratio = reference.exp_linear(lp - old)
    clipped = ((spread < 0) & (ratio < 1.0 - clip_low)) | ((spread > 0) & (ratio > 1.0 + clip_high))
    covariance = reference.covariances(lp, spread, keep)
    candidates = (keep & ~clipped & (covariance > low) & (covariance < high)).nonzero().squeeze(-1)
    wanted = max(1, int(fraction * int(keep.sum())))
    if candidates.numel() > wanted:
        order = torch.randperm(candidates.numel(), generator=generator, device=candidates.device)
        candidates = candidates[order[:wanted]]
    dropped = torch.zeros_like(keep)
    dropped[candidates] = True
    return layout.restore(~dropped)


def rollout_divergence_mask(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    *,
    level: str = "token",
    divergence: str = "k1",
    low: float | None = None,
    high: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Return True where the divergence of trainer and rollout is within bounds (verl's rejection sampling).

    With y = logprobs - rollout, clamped to +-log_ratio_clamp:

        k1 = -y, with bounds on exp(k1)
        k2 = y^2/2
        k3 = exp(y) - 1 - y

    Args:
        logprobs: (B, T) or (N,): old log-probs of the trainer (the current ones in bypass mode).
        rollout_logprobs: same shape.
        mask: same shape, 0/1.
        level: "token", or the "sequence_sum", "sequence_mean", "sequence_max" over live tokens.
        divergence: "k1", "k2", "k3".
        low, high: bounds, `low` only for k1.
        log_ratio_clamp: bound of the token log-ratio, or None.
        cu_seqlens: (S+1,) for packed tokens.
    """
    checks.one_of("level", level, ("token", "sequence_sum", "sequence_mean", "sequence_max"))
    checks.one_of("divergence", divergence, ("k1", "k2", "k3"))
    if low is not None and divergence != "k1":
        raise ValueError(f"low={low} needs divergence='k1': {divergence!r} is never negative")
    if low is None and high is None:
        raise ValueError("low, high or both must be given: without a bound every token is kept")
    for name, bound in (("low", low), ("high", high)):
        if bound is not None:
            checks.plain_float(name, bound)
    if log_ratio_clamp is not None:
        checks.plain_float("log_ratio_clamp", log_ratio_clamp, low=0.0, open_low=True)
    layout, keep = _open(logprobs, mask, cu_seqlens)
    gap = _tokens(layout, "logprobs", logprobs) - _tokens(layout, "rollout_logprobs", rollout_logprobs)
    y = torch.where(keep, gap, 0.0)
    if log_ratio_clamp is not None:
        y = y.clamp(-log_ratio_clamp, log_ratio_clamp)
    value = -y if divergence == "k1" else reference.kl_value(-y if divergence == "k3" else y, divergence)
    if level == "sequence_max":
        largest = torch.segment_reduce(
            torch.where(keep, value, -torch.inf), "max", lengths=layout.lengths, unsafe=True, initial=-torch.inf
        )
        value = layout.spread(largest)
    elif level != "token":
        pooled = segment_sum(torch.where(keep, value, 0.0), layout.lengths)
        if level == "sequence_mean":
            pooled = reference.segment_mean(value, keep, layout.lengths, segment_sum)
        value = layout.spread(pooled)
    bounded = reference.exp_linear(value) if divergence == "k1" else value
    inside = keep.clone()
    if low is not None:
        inside &= bounded >= low
    if high is not None:
        inside &= bounded <= high
    return layout.restore(inside)


def second_moment_mask(logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, *, threshold: float) -> Tensor:
    """Return False for the live tokens of largest (logp - rollout)^2, dropped until the mean of the rest is small.

    The fewest tokens are dropped for which the mean of the rest is below `threshold`. M2PO, arXiv 2510.01161.

    Args:
        logprobs, rollout_logprobs: (B, T) or (N,).
        mask: same shape, 0/1.
        threshold: bound on the mean squared log-ratio, > 0 (the paper uses 0.04).
    """
    checks.plain_float("threshold", threshold, low=0.0, open_low=True)
    for name, value in (("logprobs", logprobs), ("rollout_logprobs", rollout_logprobs)):
        checks.float_tensor(name, value)
        checks.same_shape(name, value, logprobs.shape)
        checks.same_device(name, value, logprobs.device)
    keep = checks.keep_mask("mask", mask, logprobs.shape, logprobs.device)[0].reshape(-1)
    squared = (logprobs.detach() - rollout_logprobs.detach()).double().square().reshape(-1)
    squared = torch.where(keep, squared, torch.inf)
    ordered, order = squared.sort(stable=True)
    live = torch.where(ordered.isinf(), 0.0, ordered)
    means = running_sum(live) / torch.arange(1, live.numel() + 1, device=live.device)
    allowed = (means < threshold) & ~ordered.isinf()
    selected = torch.zeros_like(keep)
    selected[order] = allowed
    return (selected & keep).view(mask.shape)


GroupIds = Tensor | Sequence[int] | None


def soft_overlong_punishment(
    lengths: Tensor,  # (B,)
    *,
    max_length: int,
    buffer: int,
) -> Tensor:
    """Return the length penalty (B,), to be added to the reward: 0, falling linearly to -1 over the last tokens.

        0                                        length <= max_length - buffer
        (max_length - buffer - length) / buffer  length <= max_length
        -1                                       beyond

    DAPO, arXiv 2503.14476, eq. 13, and TRL's `get_soft_overlong_punishment`.

    Args:
        lengths: (B,) tokens of each completion.
        max_length: longest completion that is scored at all.
        buffer: width of the fall, in [1, max_length]. The paper uses 16384 + 4096 tokens, 4096 of them buffer.
    """
    for name, value in (("max_length", max_length), ("buffer", buffer)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an int >= 1, got {value!r}")
    if buffer > max_length:
        raise ValueError(f"buffer must be <= max_length={max_length}, got {buffer}")
    count = reward_tensor("lengths", lengths)
    if checks.checks_values(count) and not bool((count >= 0).all()):
        raise ValueError(f"lengths must be >= 0, got {count[~(count >= 0)][:4].tolist()}")
    return (((max_length - buffer) - count) / buffer).clamp(-1.0, 0.0)


def overlong_filter_mask(
    mask: Tensor,  # (B, T) or (N,)
    truncated: Tensor,  # (B,) or (S,)
    *,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> Tensor:
    """Return `mask`, as bool, without the tokens of truncated completions.

    Overlong filtering, DAPO, arXiv 2503.14476, section 3.4, and TRL's `mask_truncated_completions`.

    Args:
        mask: 0/1.
        truncated: whether the completion was cut off before its end of sequence, 0/1.
        cu_seqlens: offsets of packed sequences.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor, got {type(mask).__name__}")
    layout = Layout.of(mask.shape, mask.device, cu_seqlens, "mask")
    keep = checks.keep_mask("mask", mask, layout.shape, layout.device)[0]
    cut = checks.keep_mask("truncated", truncated, (layout.n_sequences,), layout.device)[0]
    return keep & layout.restore(~layout.spread(cut))


def difficulty_mask(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    low: float = 0.0,
    high: float = 1.0,
    pass_above: float | None = None,
) -> Tensor:
    """Return True (B,) for the groups with low < mean < high of their rewards, or of their passes.

    Args:
        rewards: (B,), NaN if missing. Groups without a known reward are left out.
        group_ids, group_size: as in `group_advantages`.
        low, high: open bounds.
        pass_above: take the mean of R > pass_above, the pass rate; None: of the reward itself.
    """
    checks.plain_float("low", low)
    checks.plain_float("high", high)
    if low >= high:
        raise ValueError(f"low must be < high, got {low} >= {high}")
    r = reward_tensor("rewards", rewards)
    if pass_above is not None:
        checks.plain_float("pass_above", pass_above)
        r = torch.where(r.isnan(), r, (r > pass_above).to(r.dtype))
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    stats = _statistics(r, groups)
    inside = (stats.count > 0) & (stats.mean > low) & (stats.mean < high)
    return inside[groups.group]


def dynamic_sampling_mask(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    pass_above: float = 0.0,
) -> Tensor:
    """Return True (B,) for the groups that some completions pass and some fail, 0 < pass rate < 1.

    DAPO, arXiv 2503.14476, eq. 11: the others have no gradient. A completion passes if R > pass_above. Sample
    until enough groups are kept. For rewards that are not pass or fail, see `zero_variance_mask`.
    """
    return difficulty_mask(rewards, group_ids=group_ids, group_size=group_size, pass_above=pass_above)


def zero_variance_mask(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
) -> Tensor:
    """Return False (B,) for the groups whose known rewards are all equal, or fewer than two: their advantages are 0."""
    r = reward_tensor("rewards", rewards)
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    return (_statistics(r, groups).std > 0)[groups.group]


def zero_variance_rows(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: GroupIds = None,  # (B,)
    group_size: int | None = None,
    policy: str = "drop",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the rows (M,) int64 to train on when groups of zero variance are dropped or replaced.

    The number of rows depends on the values, so this is a host sync.

    Args:
        rewards, group_ids, group_size: as in `zero_variance_mask`.
        policy: for the groups that do not vary.
            "drop": return the rows of the others, in their order
            "replace": put the rows of a group that varies in their place, drawn with replacement, which keeps the
                number of groups (SkyRL "replace"); no rows if no group varies
        generator: for the draw, on the device of the rewards.
    """
    checks.one_of("policy", policy, ("drop", "replace"))
    r = reward_tensor("rewards", rewards)
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    varied = _statistics(r, groups).std > 0
    if policy == "drop":
        return varied[groups.group].nonzero().squeeze(-1)
    present = (groups.sizes > 0).nonzero().squeeze(-1)
    good = varied.nonzero().squeeze(-1)
    if good.numel() == 0:
        return groups.order[:0]
    drawn = good[torch.randint(good.numel(), (present.numel(),), generator=generator, device=r.device)]
    chosen = torch.where(varied[present], present, drawn)
    starts = groups.sizes.cumsum(0) - groups.sizes
    sizes = groups.sizes[chosen]
    within = torch.arange(int(sizes.sum()), device=r.device)
    within = within - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    return groups.order[starts[chosen].repeat_interleave(sizes) + within]


def _statistics(rewards: Tensor, groups: Grouping) -> reference.GroupAdvantages:
    return reference.group_advantages(rewards, groups.group, groups.n_groups, scale="none")
