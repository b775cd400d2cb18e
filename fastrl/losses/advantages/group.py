"""Advantages from one reward per completion, compared within groups, and the metrics of the rewards.

Rewards are (B,), one per completion. A group holds the completions of one prompt. The caller gives the groups as
`group_ids` (B,), any integers in any order, or as `group_size` consecutive rows. A NaN reward (None in a list) is
missing: it counts in no statistic and its advantage is 0. Nothing is differentiated. Advantages are (B,), and
`PolicyLoss` spreads them over the live tokens. `estimators.py` builds on these statistics, `returns.py` works on token
rewards.

Legend: B completions, G groups, K rewards of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.backends import choice

SCALES = ("group", "batch", "none", "group_mean", "leave_one_out")
BASELINES = ("group_mean", "leave_one_out", "length_weighted", "given", "none")
KERNEL_SCALES = ("group", "batch", "none")
KERNEL_BASELINES = ("group_mean", "leave_one_out")
BACKENDS = ("auto", "torch", "triton")


class Grouping(NamedTuple):
    """The group of every completion, groups in rising order of their id."""

    group: Tensor
    """(B,) int64 in [0, n_groups)."""
    n_groups: int
    """Upper bound of the number of groups. With ids it is B, because counting the groups needs a host sync."""
    order: Tensor
    """(B,) a permutation that puts the members of each group next to each other, in their own order."""
    sizes: Tensor
    """(n_groups,) int64, 0 for the places beyond the last group."""

    def count(self) -> int:
        """Return the number of groups. This is a host sync."""
        return int((self.sizes > 0).sum())


def reward_tensor(name: str, value: Any, dims: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return rewards as a detached float32 (float64 for float64) tensor of `dims` dimensions.

    A list becomes a tensor of `dtype`, None in it NaN.
    """
    if isinstance(value, (list, tuple)):
        value = torch.tensor(_numbers(name, value), dtype=dtype)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or a list of numbers, got {type(value).__name__}")
    if value.is_complex() or value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of real numbers, got {value.dtype}, layout {value.layout}")
    if value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device and holds no values")
    if value.dim() != dims:
        wanted = "(B,)" if dims == 1 else "(B, K)"
        raise ValueError(f"{name} must have shape {wanted}, got {tuple(value.shape)}")
    value = value.detach()
    if value.dtype != torch.float64:
        value = value.float()
    if checks.checks_values(value) and bool(value.isinf().any()):
        raise ValueError(f"{name} must be finite, or NaN where missing, got inf at {_rows(value.isinf())}")
    return value


def _numbers(name: str, values: Sequence[Any]) -> list[Any]:
    """Return nested lists of numbers with NaN for None, or raise."""
    numbers: list[Any] = []
    for i, value in enumerate(values):
        if isinstance(value, (list, tuple)):
            numbers.append(_numbers(f"{name}[{i}]", value))
        elif value is None:
            numbers.append(float("nan"))
        elif isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
            raise TypeError(f"{name}[{i}] must be a number or None, got {type(value).__name__} {value!r}")
        else:
            numbers.append(float(value))
    return numbers


def _rows(where: Tensor) -> str:
    rows = where.reshape(where.shape[0], -1).any(-1).nonzero().squeeze(-1)
    listed = ", ".join(str(row) for row in rows[:8].tolist())
    return f"rows {listed}{', ...' if rows.numel() > 8 else ''} ({rows.numel()} in all)"


def grouping(n: int, device: torch.device, group_ids: Any, group_size: Any) -> Grouping:
    """Return the groups of `n` completions from ids or from a size. Raise unless exactly one of them is given."""
    if (group_ids is None) == (group_size is None):
        got = "neither" if group_ids is None else "both"
        raise ValueError(f"exactly one of group_ids and group_size must be given, got {got}")
    if group_size is not None:
        group_size = checks.plain_int("group_size", group_size)
        if group_size < 1 or n % group_size:
            raise ValueError(f"group_size must be >= 1 and divide B={n}, got {group_size}")
        order = torch.arange(n, device=device)
        sizes = torch.full((n // group_size,), group_size, dtype=torch.int64, device=device)
        return Grouping(order // group_size, n // group_size, order, sizes)
    if isinstance(group_ids, (list, tuple)):
        if (text := next((entry for entry in group_ids if isinstance(entry, str)), None)) is not None:
            raise TypeError(
                f"group_ids must be an int, got str {text!r}: number texts, for example with "
                "numpy.unique(ids, return_inverse=True)[1]"
            )
        group_ids = torch.tensor([checks.plain_int("group_ids", entry) for entry in group_ids], dtype=torch.int64)
        group_ids = group_ids.to(device)
    if not isinstance(group_ids, Tensor) or group_ids.is_floating_point() or group_ids.is_complex():
        got = group_ids.dtype if isinstance(group_ids, Tensor) else type(group_ids).__name__
        raise TypeError(f"group_ids must be integers, got {got}")
    checks.same_shape("group_ids", group_ids, (n,))
    checks.same_device("group_ids", group_ids, device)
    ids, order = group_ids.long().sort(stable=True)
    starts = torch.ones_like(ids)
    starts[1:] = ids[1:] != ids[:-1]
    ranked = starts.cumsum(0) - 1
    group = torch.empty_like(ranked).scatter_(0, order, ranked)
    sizes = torch.zeros(n, dtype=torch.int64, device=device).index_add(0, ranked, torch.ones_like(ranked))
    return Grouping(group, n, order, sizes)


@overload
def group_advantages(
    rewards: Tensor | Sequence[Any], *, return_stats: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def group_advantages(
    rewards: Tensor | Sequence[Any], *, return_stats: Literal[True], **options: Any
) -> reference.GroupAdvantages: ...
def group_advantages(  # pyright: ignore[reportInconsistentOverload]  # the overloads leave the options to this one
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: Tensor | Sequence[int] | None = None,  # (B,)
    group_size: int | None = None,
    scale: str = "group",
    baseline: str = "group_mean",
    eps: float = 1e-4,
    lengths: Tensor | None = None,  # (B,)
    baseline_rewards: Tensor | None = None,  # (B,)
    missing: str = "ignore",
    singleton: str = "zero",
    return_stats: bool = False,
    backend: str = "auto",
) -> Tensor | reference.GroupAdvantages:
    """Return the advantages (B,) = (R - baseline) / (scale + eps) of completions compared within their groups.

    All standard deviations are unbiased (ddof 1). A missing reward, a group of one and a group of equal rewards give
    exactly 0. Exceptions, with baseline "given" or "none": with scale "none" only missing rewards give 0, because ReMax
    works with one completion per prompt, and with scale "batch" also a batch of equal rewards. Trainers use different
    eps: TRL 1e-4; verl, NeMo-RL, slime and SkyRL 1e-6; OpenRLHF 1e-9.

    Args:
        rewards: (B,), any real dtype, or a list of numbers; NaN or None if the reward is missing. Results are float32,
            or float64 for float64.
        group_ids: (B,) integers. Equal ids are one group. Unsorted ids and groups of different sizes are fine.
        group_size: in place of ids: this many consecutive rows are one group. It must divide B.
        scale: the divisor.
            "group": std of the group + eps (GRPO, arXiv 2402.03300)
            "batch": std of all rewards + eps (TRL `scale_rewards="batch"`)
            "none": no division (Dr. GRPO, arXiv 2503.20783)
            "group_mean": mean of the group + eps (MaxRL, arXiv 2602.02710)
            "leave_one_out": std of the other rewards of the group + eps, no division if that std is 0 (NeMo-RL)
        baseline: the number that R is compared with.
            "group_mean"
            "leave_one_out": mean of the others, R - baseline = n/(n-1) (R - mean) (RLOO, arXiv 2402.14740)
            "length_weighted": sum L R / sum L (OPO, arXiv 2505.23585), needs `lengths`
            "given": needs `baseline_rewards` (ReMax, arXiv 2310.10505)
            "none"
        eps: >= 0, added to the divisor.
        lengths: (B,) tokens of each completion, >= 0.
        baseline_rewards: (B,) reward of the baseline completion of the same prompt. NaN makes the advantage 0.
        missing: "ignore", or "raise" to refuse missing rewards, which needs a host sync.
        singleton: "zero", or "reward": the group of one keeps R (divided by 1 + eps with scale "group" or
            "group_mean"), as in verl. Not with baseline "given".
        return_stats: also return the mean, std and count of known rewards per group, groups in rising order of id.
        backend: "auto", "torch" or "triton". The kernel has the scales group, batch, none and the baselines group_mean
            and leave_one_out. For others "triton" raises and "auto" takes torch.

    Returns:
        The advantages, or with `return_stats` GroupAdvantages(advantages (B,), mean (G,), std (G,), count (G,)).

    Raises:
        ValueError, TypeError: shapes, options and values outside the above; infinite rewards (on a CPU).
    """
    checks.one_of("scale", scale, SCALES)
    checks.one_of("baseline", baseline, BASELINES)
    checks.one_of("missing", missing, ("ignore", "raise"))
    checks.one_of("singleton", singleton, ("zero", "reward"))
    checks.plain_float("eps", eps, low=0.0)
    if singleton == "reward" and baseline == "given":
        raise ValueError("singleton='reward' has no effect with baseline='given': leave it out")
    r = reward_tensor("rewards", rewards)
    lengths = _needed("lengths", lengths, baseline, "length_weighted", r)
    baseline_rewards = _needed("baseline_rewards", baseline_rewards, baseline, "given", r)
    if missing == "raise":
        absent = r.isnan() if baseline_rewards is None else r.isnan() | baseline_rewards.isnan()
        if bool(absent.any()):
            raise ValueError(f"rewards are missing (NaN or None) at {_rows(absent)}; missing='ignore' leaves them out")
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    result = _computed(backend, r, groups, scale, baseline, eps, lengths, baseline_rewards)
    if singleton == "reward":
        alone = (result.count[groups.group] == 1) & ~r.isnan()
        kept = r / (1.0 + eps) if scale in ("group", "group_mean") else r
        result = result._replace(advantages=torch.where(alone, kept, result.advantages))
    if not return_stats:
        return result.advantages
    there = groups.count()
    return reference.GroupAdvantages(result.advantages, *(x[:there] for x in result[1:]))


def _needed(name: str, value: Any, baseline: str, owner: str, rewards: Tensor) -> Tensor | None:
    """Return the (B,) tensor of the baseline `owner`, None for other baselines, or raise."""
    if value is None and baseline == owner:
        raise ValueError(f"baseline={owner!r} needs {name}, got None")
    if value is None:
        return None
    if baseline != owner:
        raise ValueError(f"{name} has no effect with baseline={baseline!r}: it needs baseline={owner!r}")
    tensor = reward_tensor(name, value, dtype=rewards.dtype).to(rewards.dtype)
    checks.same_shape(name, tensor, rewards.shape)
    checks.same_device(name, tensor, rewards.device)
    if name == "lengths" and checks.checks_values(tensor) and not bool((tensor >= 0).all()):
        raise ValueError(f"lengths must be >= 0, got {tensor[~(tensor >= 0)][:4].tolist()}")
    return tensor


def _computed(
    backend: str,
    rewards: Tensor,
    groups: Grouping,
    scale: str,
    baseline: str,
    eps: float,
    lengths: Tensor | None,
    baseline_rewards: Tensor | None,
) -> reference.GroupAdvantages:
    checks.one_of("backend", backend, BACKENDS)
    in_kernel = scale in KERNEL_SCALES and baseline in KERNEL_BASELINES
    if backend == "triton" and not in_kernel:
        raise ValueError(
            f"backend 'triton' has scale in {KERNEL_SCALES} and baseline in {KERNEL_BASELINES}, got scale={scale!r}, "
            f"baseline={baseline!r}; backend 'torch' has them all"
        )
    if in_kernel and choice.choose(backend, rewards.device).backend == "triton":
        from fastrl_kernels.advantages import group_advantages_fwd

        offsets = torch.cat([groups.sizes.new_zeros(1), groups.sizes.cumsum(0)])
        spread = reference.batch_std(rewards).to(rewards.dtype).reshape(1) if scale == "batch" else None
        result = group_advantages_fwd(
            rewards, groups.order, offsets, baseline=baseline, scale=scale, eps=eps, batch_std=spread
        )
        return reference.GroupAdvantages(*result[:3], result[3].to(rewards.dtype))
    return reference.group_advantages(
        rewards,
        groups.group,
        groups.n_groups,
        scale=scale,
        baseline=baseline,
        eps=eps,
        lengths=lengths,
        baseline_rewards=baseline_rewards,
    )


def group_baselines(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: Tensor | Sequence[int] | None = None,  # (B,)
    group_size: int | None = None,
    leave_one_out: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (baseline, std), each (B,): mean and unbiased std of the completion's group, or of the others in it.

    NeMo-RL computes these per prompt. Both are 0 if no reward is left. A missing reward gets the mean and std of the
    known rewards of its group.
    """
    r = reward_tensor("rewards", rewards)
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    index = groups.group
    stats = reference.group_advantages(r.double(), index, groups.n_groups, scale="none")
    mean, std, count = stats.mean[index], stats.std[index], stats.count[index]
    if not leave_one_out:
        return mean.to(r.dtype), std.to(r.dtype)
    known = ~r.isnan()
    from_mean = torch.where(known, r - mean, 0.0)
    others = mean - from_mean / (count - 1.0).clamp(min=1.0)
    without = reference.leave_one_out_std(from_mean, std.square() * (count - 1.0).clamp(min=0.0), count)
    baseline = torch.where(known, torch.where(count > 1, others, 0.0), mean)
    return baseline.to(r.dtype), torch.where(known, without, std).to(r.dtype)


def reward_metrics(
    rewards: Tensor | Sequence[Any],  # (B,)
    *,
    group_ids: Tensor | Sequence[int] | None = None,  # (B,)
    group_size: int | None = None,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the metrics of a batch of rewards, name -> (sum, count), exact over any split into whole groups.

    | metric | mean over |
    |---|---|
    | reward | known rewards |
    | reward_std: std of a group | groups with a known reward |
    | frac_reward_zero_std: whether it is zero, as for a group of one | groups with a known reward |
    | n_missing: whether the reward is missing | all B |
    """
    r = reward_tensor("rewards", rewards)
    groups = grouping(r.numel(), r.device, group_ids, group_size)
    stats = reference.group_advantages(r, groups.group, groups.n_groups, scale="none")
    known = ~r.isnan()
    there = stats.count > 0
    n_groups = there.sum().to(r.dtype)
    return {
        "reward": (torch.where(known, r, 0.0).sum(), known.sum().to(r.dtype)),
        "reward_std": (torch.where(there, stats.std, 0.0).sum(), n_groups),
        "frac_reward_zero_std": ((there & (stats.std == 0)).sum().to(r.dtype), n_groups),
        "n_missing": ((~known).sum().to(r.dtype), torch.full_like(n_groups, r.numel())),
    }
