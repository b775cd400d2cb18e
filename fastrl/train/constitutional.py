"""Preference pairs without judges: the model answers, criticises its answer by a principle, and revises it.

    problem -> answer                                     sampled
    problem, answer, principle -> critique                the model's own
    problem, answer, critique -> revision                 the model's own
    pair: the revision is chosen, the answer rejected     unless their texts are equal, or one was cut off

This is the supervised half of constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 3.1), written as the pairs
that `fastrl train dpo` and `reward-model` read. The prompt of a pair is the bare problem, without the critique: the
policy must learn to answer well at once. Principles are drawn at random, one for each problem.

With `rewards` the pairs are judged as well, and a pair is kept only if its revision earns more. A small model may
revise for the worse as readily as for the better, and only a check can tell.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastrl.train.config.pairs import ConstitutionalConfig, PairSourceConfig
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.pairs import check_output, write_pairs
from fastrl.train.pretrained import load_model, stop_token_ids
from fastrl.train.rewards.reward_set import build_rewards, check_rewards
from fastrl.train.rewards.tasks import Problem, load_task
from fastrl.train.rollouts.generate import decode, generate

logger = logging.getLogger(__name__)


class Speaker:
    """A model that answers questions with one sampled reply each."""

    def __init__(self, config: PairSourceConfig) -> None:
        """Load the model of the configuration."""
        self._config = config
        self._model, self._tokenizer = load_model(config.model, dtype=config.dtype, device=config.device)
        self._stop_ids = stop_token_ids(self._model, self._tokenizer)
        self._generator = torch.Generator(device=config.device).manual_seed(config.seed)

    def reply(self, questions: Sequence[str], max_new_tokens: int) -> tuple[list[str], list[bool]]:
        """Return the replies, and whether each was cut off."""
        config = self._config
        rollout = generate(
            self._model,
            encode_prompts(self._tokenizer, questions, template=config.prompt_template, system=config.system_prompt),
            group_size=1,
            max_new_tokens=max_new_tokens,
            stop_ids=self._stop_ids,
            pad_id=self._tokenizer.pad_token_id,
            temperature=config.temperature,
            generator=self._generator,
        )
        return decode(self._tokenizer, rollout), rollout.truncated.tolist()


def make_constitutional_pairs(config: ConstitutionalConfig) -> Path:
    """Answer, criticise, revise and pair as `config` says, and return the file.

    Raises:
        ValueError: settings that do not fit together, or not one pair came out.
        OSError: the file cannot be written.
    """
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    check_rewards(config.rewards, task)
    check_output(config.output)
    speaker = Speaker(config)
    problems = task.train(config.problems, start=config.first_problem)
    chooser = random.Random(config.seed)
    records: list[dict[str, Any]] = []
    for start in range(0, len(problems), config.sample_batch_size):
        few = problems[start : start + config.sample_batch_size]
        records += revised(speaker, few, [chooser.choice(config.principles) for _ in few], config)
        logger.info("%d of %d problems: %d revisions", start + len(few), len(problems), len(records))
    if config.rewards and records:
        asked = {problem.prompt: problem for problem in problems}
        repeated = [asked[record["prompt"]] for record in records]
        with build_rewards(config.rewards, task, config.reward_timeout_s) as rewards:
            high, low = (
                rewards(repeated, [record[side] for record in records]).total.tolist()
                for side in ("chosen", "rejected")
            )
        records = [
            {**record, "chosen_reward": better, "rejected_reward": worse}
            for record, better, worse in zip(records, high, low, strict=True)
            if better > worse
        ]
    if not records:
        raise ValueError(f"not one of {len(problems)} answers was revised to a pair; take more problems or other ones")
    return write_pairs(records, config.output)


def revised(
    speaker: Speaker, problems: Sequence[Problem], principles: Sequence[str], config: ConstitutionalConfig
) -> list[dict[str, Any]]:
    """Return the pairs of revision and answer, each with its principle and its critique."""
    answers, cut_answers = speaker.reply([problem.prompt for problem in problems], config.max_new_tokens)
    known = [
        {"{prompt}": problem.prompt, "{answer}": answer.strip(), "{principle}": principle}
        for problem, answer, principle in zip(problems, answers, principles, strict=True)
    ]
    critiques, _ = speaker.reply([_filled(config.critique_template, words) for words in known], config.critique_tokens)
    for words, critique in zip(known, critiques, strict=True):
        words["{critique}"] = critique.strip()
    revisions, cut_revisions = speaker.reply(
        [_filled(config.revision_template, words) for words in known], config.max_new_tokens
    )
    return [
        {
            "prompt": problem.prompt,
            "chosen": revision,
            "rejected": answer,
            "principle": words["{principle}"],
            "critique": words["{critique}"],
        }
        for problem, answer, revision, words, first, second in zip(
            problems, answers, revisions, known, cut_answers, cut_revisions, strict=True
        )
        if revision.strip() != answer.strip() and (config.keep_truncated or not (first or second))
    ]


def _filled(template: str, words: dict[str, str]) -> str:
    """Return the template with the words put in."""
    # In one pass: an answer that contains "{critique}" keeps it.
    return re.sub("|".join(map(re.escape, words)), lambda found: words[found[0]], template)
