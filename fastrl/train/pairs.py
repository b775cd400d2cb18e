"""Preference pairs from a policy's own completions: sample several for each problem, score them, pair best and worst.

    problems -> completions -> rewards        `group_size` of each problem, as in the loops
    best of a problem, worst of it            a pair, unless their rewards are equal
    pairs.jsonl                               prompt, chosen, rejected, and the rewards of both

The preference loops read the file. With `chosen: answer` the better completion is the answer of the problem, put into
`answer_template`, and every worse completion is a sampled one. So a policy that is hardly ever right gives pairs too,
but their chosen side is not its own.

Shapes: P problems, G completions of each, B = P * G completions.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastrl.train.config.pairs import PairsConfig
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.pretrained import load_model, stop_token_ids
from fastrl.train.rewards.reward_set import RewardSet, build_rewards, check_rewards
from fastrl.train.rewards.tasks import Problem, load_task
from fastrl.train.rollouts.generate import decode, generate

logger = logging.getLogger(__name__)


def best_and_worst(
    scores: Tensor,  # (B,)
    group_size: int,
) -> tuple[Tensor, Tensor]:
    """Return the indices, (P',) each, of the best and the worst completion of every group whose scores differ.

    The first one wins among equals. A score that is NaN is neither, and a group with fewer than two others gives no
    pair.

    Raises:
        ValueError: B is no multiple of `group_size`.
    """
    if scores.dim() != 1 or scores.numel() % group_size:
        raise ValueError(f"scores must be (P * group_size={group_size},), got shape {tuple(scores.shape)}")
    grouped = scores.view(-1, group_size)
    best, best_index = grouped.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).max(dim=1)
    worst, worst_index = grouped.nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).min(dim=1)
    kept = (best > worst).nonzero()[:, 0]
    return kept * group_size + best_index[kept], kept * group_size + worst_index[kept]


def make_pairs(config: PairsConfig) -> Path:
    """Sample, score and pair as `config` says, and return the file.

    Raises:
        ValueError: settings that do not fit together, or not one pair came out.
        OSError: the file cannot be written.
    """
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    check_rewards(config.rewards, task)
    check_output(config.output)
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
    problems = task.train(config.problems, start=config.first_problem)
    records: list[dict[str, Any]] = []
    generator = torch.Generator(device=config.device).manual_seed(config.seed)
    with build_rewards(config.rewards, task, config.reward_timeout_s) as rewards:
        at_once = config.sample_batch_size // config.group_size
        for start in range(0, len(problems), at_once):
            few = problems[start : start + at_once]
            records += _pairs_of(model, tokenizer, few, rewards, config, generator)
            logger.info("%d of %d problems: %d pairs", start + len(few), len(problems), len(records))
    if not records:
        raise ValueError(
            f"none of {len(problems)} problems gave completions with different rewards; take more of them, a larger "
            "group_size, or chosen=answer"
        )
    return write_pairs(records, config.output)


def check_output(path: str | Path) -> None:
    """Make the folder of the file. Raise `OSError` now if the file could not be written in the end."""
    output = Path(path)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"output must be a file that can be written, got {str(path)!r}: {error}") from error
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise OSError(f"output must be a file that can be written, got {str(path)!r}")


def write_pairs(records: Sequence[dict[str, Any]], path: str | Path) -> Path:
    """Write one JSON object a line and return the path."""
    output = Path(path)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return output


def _pairs_of(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    rewards: RewardSet,
    config: PairsConfig,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    prompts = [problem.prompt for problem in problems]
    rollout = generate(
        model,
        encode_prompts(tokenizer, prompts, template=config.prompt_template, system=config.system_prompt),
        group_size=config.group_size,
        max_new_tokens=config.max_new_tokens,
        stop_ids=stop_token_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=config.temperature,
        generator=generator,
    )
    texts = decode(tokenizer, rollout)
    repeated = [problem for problem in problems for _ in range(config.group_size)]
    scores = rewards(repeated, texts, rollout.completion_mask.sum(dim=1).tolist()).total
    if not config.keep_truncated:
        scores = scores.masked_fill(rollout.truncated.cpu(), math.nan)
    if config.chosen == "answer":
        return _answer_pairs(repeated, texts, rewards, scores, config)
    return [
        _record(repeated[best], texts[best], texts[worst], float(scores[best]), float(scores[worst]))
        for best, worst in zip(*(index.tolist() for index in best_and_worst(scores, config.group_size)), strict=True)
    ]


def _answer_pairs(
    problems: Sequence[Problem], texts: Sequence[str], rewards: RewardSet, scores: Tensor, config: PairsConfig
) -> list[dict[str, Any]]:
    """Return a pair of the answer and each completion with a lower score, a text once for each problem."""
    answers = [config.answer_template.replace("{answer}", problem.answer) for problem in problems]
    best = rewards(problems, answers, [1] * len(answers)).total
    seen: set[tuple[str, str]] = set()
    records = []
    for problem, answer, text, high, low in zip(problems, answers, texts, best.tolist(), scores.tolist(), strict=True):
        if high > low and (problem.prompt, text) not in seen:
            seen.add((problem.prompt, text))
            records.append(_record(problem, answer, text, high, low))
    return records


def _record(problem: Problem, chosen: str, rejected: str, high: float, low: float) -> dict[str, Any]:
    return {
        "prompt": problem.prompt,
        "chosen": chosen,
        "rejected": rejected,
        "chosen_reward": high,
        "rejected_reward": low,
    }
