"""Group-normalised advantages."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl.reference.segments import _accumulator, segment_sum

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
    scale "group": unbiased std of the group, "batch": of all known rewards, "leave_one_out": of the other rewards of
    the group, no division if that std is 0 (NeMo-RL), "group_mean": mean of the group (MaxRL, arXiv 2602.02710),
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
    """Return the unbiased standard deviation () of the known (not NaN) rewards (B,), 0 for fewer than two of them."""
    known = ~rewards.isnan()
    wide = torch.where(known, rewards, 0.0).to(_accumulator(rewards))
    n = known.sum()
    if rewards.numel() == 0:
        return wide.sum()
    from_mean = torch.where(known, wide - wide.sum() / n.clamp(min=1), 0.0)
    # Equal rewards give exactly 0, also if their mean is rounded. Infinite rewards have no difference.
    spread = torch.where(known, wide, -math.inf).amax() - torch.where(known, wide, math.inf).amin()
    return torch.where(spread == 0, 0.0, (from_mean.square().sum() / (n - 1).clamp(min=1)).sqrt())


def leave_one_out_std(
    from_mean: Tensor,  # (B,) R - group mean
    squares: Tensor,  # (B,) sum of (R - group mean)^2 over the group
    count: Tensor,  # (B,) size of the group
) -> Tensor:
    """Return the unbiased standard deviation (B,) of the group's other rewards, 0 if fewer than two are left."""
    rest = squares - from_mean.square() * count / (count - 1.0).clamp(min=1.0)
    # Equal rewards leave a rounding error by cancellation. It counts as 0: as a tiny deviation it would be a divisor.
    rest = torch.where(rest > 8.0 * torch.finfo(rest.dtype).eps * squares, rest, 0.0)
    return torch.where(count > 2, (rest / (count - 2.0).clamp(min=1.0)).sqrt(), 0.0)
