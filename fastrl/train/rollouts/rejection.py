"""Rejection sampling: completions of a task's problems, and which of them are right and kept.

Shapes: P problems, G completions of each, B = P * G completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.train.data.encoding import Example, encode_prompts
from fastrl.train.model import Policy
from fastrl.train.rewards.reward_set import RewardBatch, RewardSet
from fastrl.train.rewards.tasks import Problem
from fastrl.train.rollouts.generate import decode, generate


@dataclass(frozen=True)
class Rejection:
    """Which completions are kept."""

    keep_reward: float = 1.0
    """The least reward of a right one. A completion that did not end by itself is never right: it would not teach to
    stop."""
    keep_per_prompt: int = 0
    """At most so many of a prompt, the first ones. 0 keeps all."""
    distinct: bool = False
    """Keep a text, apart from space around it, once for each prompt."""

    def right(self, rewards: Sequence[float], truncated: Sequence[bool]) -> list[bool]:
        """Return of each completion whether it is right. A reward that failed (NaN) is not."""
        return [reward >= self.keep_reward and not cut for reward, cut in zip(rewards, truncated, strict=True)]

    def kept(self, texts: Sequence[str], right: Sequence[bool], group_size: int) -> list[int]:
        """Return the indices of the kept completions, `group_size` of each prompt one after the other."""
        kept: list[int] = []
        for start in range(0, len(texts), group_size):
            group: list[int] = []
            seen: set[str] = set()
            for index in range(start, start + group_size):
                text = texts[index].strip()
                full = 0 < self.keep_per_prompt <= len(group)
                if right[index] and not full and not (self.distinct and text in seen):
                    group.append(index)
                    seen.add(text)
            kept += group
        return kept


@dataclass(frozen=True)
class SampledRound:
    """The completions of a round."""

    kept: list[Example]
    some: list[Example]
    """The first completions, right or wrong."""
    metrics: dict[str, float]


def sample_and_reject(
    policy: Policy,
    problems: Sequence[Problem],
    rewards: RewardSet,
    rejection: Rejection,
    *,
    group_size: int,
    batch_size: int,
    prompt_template: str,
    system_prompt: str | None,
    **sampling: Any,
) -> SampledRound:
    """Sample `group_size` completions of each problem, score them, and return those that are kept.

    `batch_size` completions are sampled together, a multiple of `group_size`. `sampling` goes to
    `fastrl.train.rollouts.generate.generate`. The metrics are pass_rate (right ones over all), solved_prompts
    (prompts with a right one over all), kept_share, reward, reward_failures, completion_length,
    truncated_fraction and the counts sampled_completions, kept_completions and sampled_tokens.
    """
    kept: list[Example] = []
    some: list[Example] = []
    right: list[bool] = []
    lengths: list[int] = []
    truncated: list[bool] = []
    scores: list[RewardBatch] = []
    prompts_at_once, tokenizer, stop_ids = batch_size // group_size, policy.tokenizer, policy.stop_ids
    for start in range(0, len(problems), prompts_at_once):
        few = problems[start : start + prompts_at_once]
        encoded = encode_prompts(tokenizer, [p.prompt for p in few], template=prompt_template, system=system_prompt)
        rollout = generate(
            policy.model, encoded, group_size=group_size, stop_ids=stop_ids, pad_id=policy.pad_id,
            temperature=policy.temperature, **sampling,
        )  # fmt: skip
        texts = decode(tokenizer, rollout)
        lengths += rollout.completion_mask.sum(dim=1).tolist()
        repeated = [problem for problem in few for _ in range(group_size)]
        scores.append(rewards(repeated, texts, lengths[-len(texts) :]))
        truncated += rollout.truncated.tolist()
        right_here = rejection.right(scores[-1].total.tolist(), rollout.truncated.tolist())
        right += right_here
        examples = rollout.examples()
        kept += [examples[index] for index in rejection.kept(texts, right_here, group_size)]
        some = some or examples[:4]
    total = torch.cat([batch.total for batch in scores])
    solved = torch.tensor(right).view(-1, group_size).any(dim=1)
    count = len(right)
    metrics = {
        "pass_rate": sum(right) / count,
        "solved_prompts": float(solved.float().mean()),
        "kept_share": len(kept) / count,
        "reward": float(total.nanmean()),
        "reward_failures": float(sum(batch.failures for batch in scores)),
        "completion_length": sum(lengths) / count,
        "truncated_fraction": sum(truncated) / count,
        "sampled_completions": float(count),
        "kept_completions": float(len(kept)),
        "sampled_tokens": float(sum(lengths)),
    }
    return SampledRound(kept, some, metrics)
