"""Rejection sampling: completions of a task's problems, and which of them are right and kept.

Shapes: P problems, G completions of each, B = P * G completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastrl.train.data.encoding import Example, encode_prompts
from fastrl.train.rewards.reward_set import RewardBatch, RewardSet
from fastrl.train.rewards.tasks import Problem
from fastrl.train.rollouts.generate import Rollout, decode, generate


@dataclass(frozen=True)
class Rejection:
    """Which completions are kept."""

    keep_reward: float = 1.0
    """The least reward of a right one. One that did not end by itself is never right: it would not teach to stop."""
    keep_per_prompt: int = 0
    """At most so many of a prompt, the first ones; 0 keeps all."""
    distinct: bool = False
    """Keep a text, apart from space around it, once for each prompt."""

    def right(self, rewards: Sequence[float], truncated: Sequence[bool]) -> list[bool]:
        """Return of each completion whether it is right; a reward that failed (NaN) is not."""
        return [reward >= self.keep_reward and not cut for reward, cut in zip(rewards, truncated, strict=True)]

    def kept(self, texts: Sequence[str], right: Sequence[bool], group_size: int) -> list[int]:
        """Return the indices of the kept completions; each prompt has `group_size` of them, one after the other."""
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
class Sampled:
    """The completions of a round."""

    kept: list[Example]
    some: list[Example]
    """The first completions, right or wrong."""
    metrics: dict[str, float]


def sample_and_reject(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    rewards: RewardSet,
    rejection: Rejection,
    *,
    group_size: int,
    batch_size: int,
    prompt_template: str,
    system_prompt: str | None,
    **sampling: Any,
) -> Sampled:
    """Sample `group_size` completions of each problem, score them, and return those that are kept.

    `batch_size` completions are sampled together, a multiple of `group_size`; `sampling` goes to
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
    prompts_at_once = batch_size // group_size
    for start in range(0, len(problems), prompts_at_once):
        few = problems[start : start + prompts_at_once]
        encoded = encode_prompts(tokenizer, [p.prompt for p in few], template=prompt_template, system=system_prompt)
        rollout = generate(model, encoded, group_size=group_size, **sampling)
        texts = decode(tokenizer, rollout)
        lengths += rollout.completion_mask.sum(dim=1).tolist()
        repeated = [problem for problem in few for _ in range(group_size)]
        scores.append(rewards(repeated, texts, lengths[-len(texts) :]))
        truncated += rollout.truncated.tolist()
        right_here = rejection.right(scores[-1].total.tolist(), rollout.truncated.tolist())
        right += right_here
        examples = _examples(encoded, rollout)
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
    return Sampled(kept, some, metrics)


def _examples(prompts: Sequence[Sequence[int]], rollout: Rollout) -> list[Example]:
    return [
        Example.of(prompts[prompt], ids[mask].tolist())
        for prompt, ids, mask in zip(
            rollout.prompt_index.tolist(), rollout.completion_ids, rollout.completion_mask, strict=True
        )
    ]
