"""Prompts, completions and their scores, for one step of a loop on samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastrl.train.config.sampling import BatchConfig
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.data.rollout import Rollout
from fastrl.train.model import Policy
from fastrl.train.rewards.model import RewardModel, load_reward_model
from fastrl.train.rewards.reward_set import RewardBatch, RewardSet
from fastrl.train.rewards.tasks import Problem, Task
from fastrl.train.rollouts.evaluate import HeldOut
from fastrl.train.rollouts.generate import decode, generate
from fastrl.train.run.run import Run

REWARD_MODEL = "reward_model"


class Sampler:
    """Problems to completions and their rewards, in training and on held-out problems."""

    def __init__(
        self, run: Run[Any], task: Task, policy: Policy, rewards: RewardSet, reward_model: RewardModel | None = None
    ) -> None:
        """Take the parts of a run whose configuration is a `BatchConfig`."""
        self._run, self._task, self._rewards, self._reward_model = run, task, rewards, reward_model
        self._policy = policy
        self._config: BatchConfig = run.config
        self._stop_ids = policy.stop_ids
        self._held_out = HeldOut(run, task, rewards, policy, self._config.eval_rewards)

    def problems(self, step: int) -> list[Problem]:
        """Return the P problems of step `step`."""
        count = self._config.prompts_per_step
        return self._task.train(count, start=step * count)

    def rollout(self, problems: Sequence[Problem]) -> Rollout:
        """Sample G completions of each problem."""
        config, tokenizer = self._config, self._policy.tokenizer
        prompts = [problem.prompt for problem in problems]
        return generate(
            self._policy.model,
            encode_prompts(tokenizer, prompts, template=config.prompt_template, system=config.system_prompt),
            group_size=config.group_size,
            max_new_tokens=config.max_new_tokens,
            stop_ids=self._stop_ids,
            pad_id=self._policy.pad_id,
            temperature=self._policy.temperature,
            generator=self._run.generator,
        )

    def score(self, problems: Sequence[Problem], rollout: Rollout) -> RewardBatch:
        """Return the rewards (B,) of the completions of `problems`, with the reward model's among them."""
        lengths = rollout.completion_mask.sum(dim=1).tolist()
        repeated = [problem for problem in problems for _ in range(self._config.group_size)]
        scored = self._rewards(repeated, decode(self._policy.tokenizer, rollout), lengths)
        if self._reward_model is None:
            return scored
        prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
        scores = self._reward_model.score(
            [prompts[index] for index in rollout.prompt_index.tolist()],
            [row[mask].tolist() for row, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)],
        ).cpu()
        return dataclasses.replace(
            scored,
            total=scored.total + self._config.reward_model_weight * scores,
            components={**scored.components, REWARD_MODEL: scores},
        )

    def evaluate(self, step: int) -> dict[str, float]:
        """Evaluate on the held-out problems, log it, and return the accuracies as metrics."""
        return self._held_out.evaluate(step)


def reward_model_of(config: BatchConfig, policy: Policy) -> RewardModel | None:
    """Return the reward model that the configuration names, in the policy's precision and on its device, or None."""
    if config.reward_model is None:
        return None
    return load_reward_model(config.reward_model, policy.tokenizer, dtype=config.dtype, device=policy.device)


def batch_metrics(rollout: Rollout, scored: RewardBatch) -> dict[str, float]:
    """Return the metrics of sampled completions and their rewards."""
    lengths = rollout.completion_mask.sum(dim=1).float()
    return {
        **{f"reward/{name}": float(values.nanmean()) for name, values in scored.components.items()},
        "reward_failures": float(scored.failures),
        "completion_length": float(lengths.mean()),
        "completion_length_max": float(lengths.max()),
        "truncated_fraction": float(rollout.truncated.float().mean()),
    }
