"""Dynamic sampling: redraw the groups whose rewards are all equal.

A group whose answers are all right or all wrong has advantage 0 everywhere (DAPO, arXiv 2503.14476, equation 11). A
batch with many of them teaches as little as a small batch and costs as much as a full one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.losses.masks import dynamic_sampling_mask, zero_variance_mask
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.data.rollout import Rollout, concatenate
from fastrl.train.rewards.reward_set import RewardBatch
from fastrl.train.rewards.tasks import Problem
from fastrl.train.rollouts.evaluate import CORRECT
from fastrl.train.rollouts.prompts import Prompts
from fastrl.train.rollouts.sampler import Sampler
from fastrl.train.run.run import Clock


@dataclass(frozen=True)
class SampledBatch:
    """P groups of G scored completions, and the cost of getting them."""

    problems: list[Problem]
    rollout: Rollout
    scored: RewardBatch
    rounds: int
    """Times that prompts were sampled, 1 without dynamic sampling."""
    seen: RewardBatch
    """The rewards of everything that was sampled, without a selection."""

    def metrics(self) -> dict[str, float]:
        """Return the cost of the batch, and the mean reward of everything that was sampled for it."""
        return {
            "sampling/rounds": float(self.rounds),
            "sampling/completions": float(self.seen.total.numel()),
            "sampling/reward": float(self.seen.total.nanmean()),
            "sampling/correct": float(self.seen.components[CORRECT].nanmean()),
        }


def sample_batch(sampler: Sampler, prompts: Prompts, config: GRPOConfig, pad_id: int, clock: Clock) -> SampledBatch:
    """Return a batch of `prompts_per_step` groups, as informative as `dynamic_sampling` and the tries make it.

    Every round samples as many prompts as groups are missing. After the last one the batch is filled up with groups
    that teach nothing, the earliest first. So its size does not change.
    """
    rounds: list[tuple[list[Problem], Rollout, RewardBatch, Tensor]] = []
    missing = config.prompts_per_step
    while missing and len(rounds) < (1 if config.dynamic_sampling == "off" else config.dynamic_sampling_tries):
        problems = prompts.take(missing)
        rollout = sampler.rollout(problems)
        clock.lap("rollout")
        scored = sampler.score(problems, rollout)
        clock.lap("reward")
        informative = _informative(scored, config)
        missing -= int(informative.sum())
        rounds.append((problems, rollout, scored, informative))
    seen = RewardBatch.concatenate([scored for _, _, scored, _ in rounds])
    if len(rounds) == 1:
        problems, rollout, scored, _ = rounds[0]
        return SampledBatch(problems, rollout, scored, 1, seen)

    chosen = _chosen(torch.cat([informative for *_, informative in rounds]), config.prompts_per_step)
    rows = (chosen[:, None] * config.group_size + torch.arange(config.group_size)).flatten()
    everything = concatenate([rollout for _, rollout, _, _ in rounds], pad_id)
    asked = [problem for problems, *_ in rounds for problem in problems]
    return SampledBatch(
        [asked[index] for index in chosen.tolist()],
        everything.select(rows.to(everything.prompt_index.device)),
        seen.select(rows),
        len(rounds),
        seen,
    )


def _informative(scored: RewardBatch, config: GRPOConfig) -> Tensor:
    """Return (P,) bool: groups with an advantage that is not 0, as `dynamic_sampling` sees it."""
    if config.dynamic_sampling == "correct":
        mask = dynamic_sampling_mask(scored.components[CORRECT], group_size=config.group_size, pass_above=0.5)
    else:
        mask = zero_variance_mask(scored.total, group_size=config.group_size)
    return mask[:: config.group_size]


def _chosen(informative: Tensor, count: int) -> Tensor:
    """Return the indices (count,) of the first informative groups and, if they are too few, of the first others."""
    order = torch.argsort((~informative).int(), stable=True)
    return order[:count].sort().values  # in the order of sampling
