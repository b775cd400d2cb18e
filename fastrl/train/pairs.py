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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastrl.train.config.run import check_choice, check_int, check_positive
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.pretrained import load_model, stop_token_ids
from fastrl.train.rewards.reward_set import RewardSet, build_rewards, check_rewards
from fastrl.train.rewards.tasks import Problem, load_task
from fastrl.train.rollouts.generate import decode, generate

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of what makes data from a model's completions of a task's problems."""

    model: str = "smollm2"
    """A folder with a saved model, a name on the Hugging Face hub, or `smollm2`."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the parameters."""
    device: str = "cpu"
    """Where the model goes: cpu, cuda, ..."""
    prompt_template: str = "chat"
    """`chat` for the tokenizer's chat template, or a text with `{prompt}`."""
    system_prompt: str | None = None
    """System message of the chat template."""

    task: str = "chain_sum"
    """Name of a reasoning-gym dataset."""
    task_parameters: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Parameters of the task."""
    problems: int = 200
    """Problems of the training stream that are asked."""
    first_problem: int = 0
    """Number of the first of them in the stream: files of different stretches share no draw."""

    max_new_tokens: int = 128
    """Longest completion."""
    temperature: float = 1.0
    """Divides the logits."""
    reward_timeout_s: float | None = 5.0
    """Seconds that one call of a reward may take; None calls rewards in this process, without a limit."""
    sample_batch_size: int = 64
    """Completions that are sampled together."""
    keep_truncated: bool = True
    """Pair completions that did not end by themselves too; the file, which is text, then gives them an end."""
    seed: int = 0
    """Seed of the problems and the sampling."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        for name in ("problems", "max_new_tokens", "sample_batch_size"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("first_problem", "seed"):
            check_int(name, getattr(self, name), at_least=0)
        check_positive("temperature", self.temperature)
        if self.reward_timeout_s is not None:
            check_positive("reward_timeout_s", self.reward_timeout_s)
        check_choice("dtype", self.dtype, ("float32", "bfloat16", "float16"))


@dataclass(frozen=True, kw_only=True)
class PairsConfig(SamplingConfig):
    """Settings of `make_pairs`."""

    rewards: dict[str, float] = field(default_factory=lambda: {"exact": 1.0})
    """Reward functions by name, with their weights; they rank the completions."""
    group_size: int = 8
    """Completions of each problem, a divisor of `sample_batch_size`."""
    chosen: Literal["sampled", "answer"] = "sampled"
    """The better completion: the best sampled one, or the problem's answer."""
    answer_template: str = "{answer}"
    """What `chosen: answer` writes."""

    output: str = "pairs.jsonl"
    """The file that is written; one that is there is replaced."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        check_int("group_size", self.group_size, at_least=1)
        check_choice("chosen", self.chosen, ("sampled", "answer"))
        if self.sample_batch_size % self.group_size:
            raise ValueError(
                f"sample_batch_size must be a multiple of group_size={self.group_size}, got {self.sample_batch_size}"
            )
        if self.chosen == "sampled" and self.group_size < 2:
            raise ValueError(f"group_size must be at least 2 to pair sampled completions, got {self.group_size}")
        if "{answer}" not in self.answer_template:
            raise ValueError(f"answer_template must contain '{{answer}}', got {self.answer_template!r}")


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
