"""verl's advantage estimators with verl's signature: (token_level_rewards, response_mask, index, config, ...).

Each returns (advantages, returns), both (B, T). In verl's batches any hashable id names the prompt of a completion.

Legend: B completions, T padded response length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.verl._losses import _option
from fastrl.losses.advantages.estimators import (
    gpg_advantages,
    maxrl_advantages,
    opo_advantages,
    pass_at_k_advantages,
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    remax_advantages,
)
from fastrl.losses.advantages.group import group_advantages

Estimator = Callable[..., tuple[Tensor, Tensor]]


def _groups(name: str, index: Any, rewards: Tensor) -> Tensor:
    """Return (B,) int64 group ids of verl's uids."""
    if index is None:
        raise ValueError(f"fastrl_{name} compares the completions of a prompt and needs index (verl's uid), got None")
    numbers: dict[Any, int] = {}
    ids = [numbers.setdefault(uid, len(numbers)) for uid in (index.tolist() if hasattr(index, "tolist") else index)]
    if len(ids) != rewards.shape[0]:
        raise ValueError(f"index must name the prompt of each of {rewards.shape[0]} completions, got {len(ids)}")
    return torch.tensor(ids, device=rewards.device)


def _scores(token_level_rewards: Tensor, response_mask: Tensor) -> Tensor:
    """Return (B,) sums of the live tokens' rewards: a number on padding moves no other completion's advantage."""
    return torch.where(response_mask != 0, token_level_rewards, 0.0).sum(dim=-1)


def _by_std(config: Any) -> str:
    return "group" if _option(config, "norm_adv_by_std_in_grpo", True) else "none"


def _per_sequence(name: str, scalar: Callable[[Tensor, Tensor, Any, Tensor], Tensor]) -> Estimator:
    """Return the estimator that gives `scalar(rewards, group_ids, config, mask)` (B,) to the tokens of the mask."""

    def estimate(
        token_level_rewards: Tensor,  # (B, T)
        response_mask: Tensor,  # (B, T)
        index: Any = None,  # (B,)
        config: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        _refuse(name, kwargs)
        groups = _groups(name, index, token_level_rewards)
        value = scalar(_scores(token_level_rewards, response_mask), groups, config, response_mask)
        advantages = torch.where(response_mask != 0, value.unsqueeze(-1), 0.0)
        return advantages, advantages

    return _named(name, estimate)


def _refuse(name: str, kwargs: dict[str, Any], known: tuple[str, ...] = ("reward_baselines",)) -> None:
    """Raise for keywords that verl does not pass to an estimator of this kind."""
    unknown = sorted(key for key in kwargs if key not in known)
    if unknown:
        raise TypeError(f"fastrl_{name} does not take {', '.join(unknown)}")


def _named(name: str, function: Estimator) -> Estimator:
    function.__name__ = function.__qualname__ = f"fastrl_{name}"
    function.__doc__ = f"Return (advantages, returns) of verl's {name!r}, computed by fastrl."
    return function


def _reinforce_plus_plus(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, index: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    del index
    _refuse("reinforce_plus_plus", kwargs)
    gamma = _option(config, "gamma")
    if gamma is None:
        raise ValueError("fastrl_reinforce_plus_plus needs gamma in verl's algorithm config, got None")
    return reinforce_plus_plus_advantages(token_level_rewards, response_mask, gamma=float(gamma), masked="skip")


def _reinforce_plus_plus_baseline(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    del config
    _refuse("reinforce_plus_plus_baseline", kwargs)
    groups = _groups("reinforce_plus_plus_baseline", index, token_level_rewards)
    advantages = reinforce_plus_plus_baseline_advantages(
        _scores(token_level_rewards, response_mask), response_mask, group_ids=groups, singleton="reward"
    )
    return advantages, advantages


def _remax(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    reward_baselines: Tensor | None = None,  # (B,)
    config: Any = None,
    index: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    del config, index
    _refuse("remax", kwargs)
    if reward_baselines is None:
        raise ValueError("fastrl_remax needs reward_baselines, the rewards of the greedy completions, got None")
    return remax_advantages(token_level_rewards, reward_baselines, response_mask)


# singleton="reward": in verl the only completion of a prompt has its reward as advantage.
def _grpo(r: Tensor, groups: Tensor, config: Any, mask: Tensor) -> Tensor:
    del mask
    return group_advantages(r, group_ids=groups, scale=_by_std(config), eps=1e-6, singleton="reward")


def _rloo(r: Tensor, groups: Tensor, config: Any, mask: Tensor) -> Tensor:
    del config, mask
    return group_advantages(r, group_ids=groups, scale="none", baseline="leave_one_out", singleton="reward")


def _opo(r: Tensor, groups: Tensor, config: Any, mask: Tensor) -> Tensor:
    del config
    return opo_advantages(r, (mask != 0).sum(-1).to(r.dtype), group_ids=groups, singleton="reward")


def _gpg(r: Tensor, groups: Tensor, config: Any, mask: Tensor) -> Tensor:
    del config, mask
    return gpg_advantages(r, group_ids=groups, singleton="reward")


def _pass_at_k(r: Tensor, groups: Tensor, config: Any, mask: Tensor) -> Tensor:
    del mask
    return pass_at_k_advantages(r, group_ids=groups, scale=_by_std(config), eps=1e-6)


def _maxrl(r: Tensor, groups: Tensor, config: Any, mask: Tensor) -> Tensor:
    del config, mask
    return maxrl_advantages(r, group_ids=groups)


ESTIMATORS: Mapping[str, Estimator] = {
    function.__name__: function
    for function in (
        _per_sequence("grpo", _grpo),
        _per_sequence("rloo", _rloo),
        _per_sequence("opo", _opo),
        _per_sequence("gpg", _gpg),
        _per_sequence("grpo_passk", _pass_at_k),
        _per_sequence("maxrl", _maxrl),
        _named("reinforce_plus_plus", _reinforce_plus_plus),
        _named("reinforce_plus_plus_baseline", _reinforce_plus_plus_baseline),
        _named("remax", _remax),
    )
}
"""Name for verl's `algorithm.adv_estimator` -> estimator. verl does not have maxrl."""
