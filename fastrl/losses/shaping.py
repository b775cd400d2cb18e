"""What happens to rewards and batches before the advantages: overlong answers, and which groups are worth training on.

Keep-masks are bool, True = keep. Per completion they are (B,), a group being kept or left as a whole; missing rewards
(NaN) are left out of every statistic. Groups are given as for `group_advantages`. Nothing is differentiated. All
raise ValueError or TypeError, by the name of the argument, for what does not fit.

Legend: B completions, T time, N tokens, S sequences, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.advantage import Grouping, grouping, reward_tensor
from fastrl.losses.layout import Layout

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

    DAPO, arXiv 2503.14476, eq. 13; TRL's `get_soft_overlong_punishment`.

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

    Overlong filtering, DAPO, arXiv 2503.14476, section 3.4; TRL's `mask_truncated_completions`.

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
        rewards: (B,), NaN where missing; groups without a known reward are left out.
        group_ids, group_size: as in `group_advantages`.
        low, high: open bounds.
        pass_above: the mean is that of R > pass_above, the pass rate; None: of the reward itself.
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

    DAPO, arXiv 2503.14476, eq. 11: the others have no gradient. A completion passes when R > pass_above; sample on
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

    The number of rows depends on the values, so a device is waited for.

    Args:
        rewards, group_ids, group_size: as in `zero_variance_mask`.
        policy: "drop": the rows of the groups that vary, in their order. "replace": each other group is replaced by the
            rows of a group that varies, drawn with replacement, which keeps the number of groups (SkyRL "replace");
            none are left where no group varies.
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
