"""Process supervision: rewards of a completion's steps, and the advantages of their tokens.

Every step has a reward. A token's advantage is the sum of the normalised rewards of the steps that end at it or later
(DeepSeekMath, arXiv 2402.03300, section 4.1.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.losses.advantages.estimators import step_advantages
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.data.rollout import Rollout
from fastrl.train.rewards.reward_set import RewardBatch, RewardSet
from fastrl.train.rewards.tasks import Problem


def step_ends(tokenizer: Any, ids: Sequence[int], marker: str) -> list[int]:
    """Return the index of the last token of each step: the token that completes a marker, and the last token of all.

    White space between two markers belongs to the next step, white space at the end to the last one. Two markers inside
    one token end one step. Text after the last marker is a step.
    """

    def text(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    whole = text(len(ids))
    ends: list[int] = []
    before = 0  # length of the text before the current step
    for number, piece in enumerate(whole.split(marker), start=1):
        written = before + len(piece)
        last = written == len(whole)
        if piece.strip():
            ends.append(len(ids) - 1 if last else _first_with(text, len(ids), marker, number) - 1)
        before = written + len(marker)
    if not ends:
        return [len(ids) - 1]
    ends[-1] = len(ids) - 1  # white space and the stop token at the end belong to the last step
    return sorted(set(ends))


def _first_with(text: Any, length: int, marker: str, number: int) -> int:
    """Return the number of tokens until the text has `number` markers."""
    low, high = 1, length  # by halving: a text of more tokens has at least as many markers
    while low < high:
        middle = (low + high) // 2
        if text(middle).count(marker) >= number:
            high = middle
        else:
            low = middle + 1
    return low


def process_advantages(
    problems: Sequence[Problem],  # P
    rollout: Rollout,
    rewards: RewardSet,
    tokenizer: Any,
    config: GRPOConfig,
) -> tuple[Tensor, dict[str, float]]:
    """Return the advantages (B, T) of the steps, and the metrics of their rewards.

    A reward is called with the problem and the text up to the end of a step. A reward that fails is NaN: it counts in
    no statistic, and its step adds nothing.
    """
    asked: list[Problem] = []
    texts: list[str] = []
    counts: list[int] = []
    ends: list[list[int]] = []
    for row, (ids, mask) in enumerate(zip(rollout.completion_ids, rollout.completion_mask, strict=True)):
        tokens = ids[mask].tolist()
        found = step_ends(tokenizer, tokens, config.step_marker)
        ends.append(found)
        for end in found:
            asked.append(problems[row // config.group_size])
            texts.append(tokenizer.decode(tokens[: end + 1], skip_special_tokens=True))
            counts.append(end + 1)
    scored: RewardBatch = rewards(asked, texts, counts)
    width = max(len(found) for found in ends)
    places = torch.tensor([found + [-1] * (width - len(found)) for found in ends])
    values = torch.full(places.shape, torch.nan)
    values[places >= 0] = scored.total
    advantages = step_advantages(
        values, places, rollout.completion_mask.cpu(), group_size=config.group_size, scale=config.advantage_scale
    )
    metrics = {f"step_reward/{name}": float(value.nanmean()) for name, value in scored.components.items()}
    metrics |= {"steps_per_completion": len(texts) / len(ends), "step_reward_failures": float(scored.failures)}
    return advantages.to(rollout.completion_ids.device), metrics
