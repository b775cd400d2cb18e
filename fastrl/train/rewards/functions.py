"""Reward functions: of one completion's text, and of the lengths of a batch of completions.

A function of a text takes a problem and a completion, and returns a number, or None if it cannot judge. A function of
lengths takes tensors, because it compares token counts within a group. Every docstring names the reward's source.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import re
import unicodedata
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastrl.losses.masks import soft_overlong_punishment
from fastrl.train.rewards.answers import chosen_letter, extract_answer, is_marked, latex_of
from fastrl.train.rewards.tasks import Problem, Task

_TAGS = ("<think>", "</think>", "<answer>", "</answer>")
_INTEGER_OR_DECIMAL = re.compile(r"[-+]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]+)?")
# Enough for any answer. int() is slow for longer strings of digits, or refuses them.
_MAX_NUMBER_LENGTH = 400


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """The task's own score of the answer, which may give part of the score (reasoning-gym, arXiv 2505.24760)."""

    task: Task

    def __call__(self, problem: Problem, completion: str) -> float:
        """Return the task's score."""
        return self.task.score(problem, completion)


@dataclasses.dataclass(frozen=True)
class Exact:
    """1 if the task gives the full score, else 0: the accuracy reward of DeepSeek-R1 (arXiv 2501.12948)."""

    task: Task

    def __call__(self, problem: Problem, completion: str) -> float:
        """Return 1.0 or 0.0."""
        return float(self.task.is_correct(problem, completion))


class MathVerify:
    """1 if math-verify finds the completion's expression equal to the answer, else 0.

    The reference, and an answer in a tag or a box, are read as LaTeX, with dollars or without. In running text
    math-verify looks for the expression itself. A reference of one letter A to J is a choice, and letters are compared.
    None if the reference answer itself cannot be parsed. The project's own time limits are off: they use the process's
    one alarm, and turn a time-out into a wrong answer.
    Source: https://github.com/huggingface/Math-Verify.
    """

    def __init__(self) -> None:
        try:
            import math_verify
        except ModuleNotFoundError as error:
            raise ImportError('the math_verify reward needs math-verify: pip install "fastrl[train]"') from error
        self._parse: Callable[..., list[Any]] = math_verify.parse
        self._verify: Callable[..., bool] = math_verify.verify
        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limits are off

    def __reduce__(self) -> tuple[Any, ...]:
        return MathVerify, ()  # so that the worker imports the library when it starts, not in the first timed call

    def __call__(self, problem: Problem, completion: str) -> float | None:
        """Return 1.0, 0.0 or None."""
        reference = extract_answer(problem.answer)
        if letter := chosen_letter(reference) if len(reference) < MOST_OF_A_CHOICE else "":
            return float(extract_answer(completion, "choice") == letter)
        gold = self._parse(latex_of(reference), parsing_timeout=None)
        if not gold:
            return None
        text = extract_answer(completion)
        if not text or len(text) > MOST_CHARACTERS or _huge(text):
            return 0.0
        answer = self._parse(latex_of(text) if is_marked(completion) else text, parsing_timeout=None)
        return float(self._verify(gold, answer, timeout_seconds=None))


# A longer answer is no expression, and parsing it would take the time of the whole batch.
MOST_CHARACTERS = 4000
MOST_OF_A_CHOICE = 12
MOST_DEPTH = 30
_POWER = re.compile(r"\^\s*\{?\s*(?:[0-9]{6,}|[^{}]*\^)|!\s*!|[0-9]{5,}\s*!|\*\*\s*[0-9]{6,}")


def _huge(text: str) -> bool:
    """Whether a text writes a power of a power, an exponent or a factorial that no computer holds, or is too deep."""
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > MOST_DEPTH or _POWER.search(text) is not None


def format_reward(problem: Problem, completion: str) -> float:
    """Return 1 for `<think>...</think> <answer>...</answer>` and nothing else, each tag once and in order. Otherwise 0.

    `<think>` may be missing: many chat templates write it at the end of the prompt.

    Source: the format reward of DeepSeek-R1 (arXiv 2501.12948, section 2.2.2) with its template.
    """
    del problem
    text = _with_opening(completion.strip())
    if not (text.startswith("<think>") and text.endswith("</answer>")) or any(text.count(tag) != 1 for tag in _TAGS):
        return 0.0
    thought_end, answer_start = text.index("</think>"), text.index("<answer>")
    between = text[thought_end + len("</think>") : answer_start]
    return float(thought_end < answer_start and not between.strip())


def tag_count_reward(problem: Problem, completion: str) -> float:
    """Return a quarter for each of the four think and answer tags that occurs exactly once.

    A missing `<think>` before `</think>` counts as there: many chat templates write it at the end of the prompt.

    A smoother form of the format reward for models that do not know the tags yet.
    Source: the tag count reward of open-r1 (https://github.com/huggingface/open-r1).
    """
    del problem
    text = _with_opening(completion)
    return sum(text.count(tag) == 1 for tag in _TAGS) / len(_TAGS)


def _with_opening(text: str) -> str:
    """Return a text with the opening tag of its thought, if only the closing one is there."""
    return f"<think>{text}" if "</think>" in text and "<think>" not in text else text


def number_only_reward(problem: Problem, completion: str) -> float:
    """Return 1 if the whole completion is one number in ASCII digits, right or wrong. Otherwise 0.

    The format reward (arXiv 2501.12948) for short answers without reasoning. `-5`, `1,234` and `12.0` are numbers.
    `1,23`, `٥` and `5 apples` are not.
    """
    del problem
    return float(_INTEGER_OR_DECIMAL.fullmatch(completion.strip()) is not None)


def last_number_reward(problem: Problem, completion: str) -> float | None:
    """Return 1 if the last number of the completion's answer equals the reference, else 0. None for other references.

    Source: the answer rule of GSM8K (Cobbe et al., arXiv 2110.14168), in the lenient form of lm-evaluation-harness.
    """
    expected = _number(problem.answer)
    if expected is None:
        return None
    return float(_number(extract_answer(completion, "last_number")) == expected)


def _number(text: str) -> float | int | None:
    text = re.sub(r"^([-+]?)\.(?=[0-9])", r"\g<1>0.", text.strip())
    if len(text) > _MAX_NUMBER_LENGTH or not _INTEGER_OR_DECIMAL.fullmatch(text):
        return None
    text = text.replace(",", "")
    return float(text) if "." in text else int(text)


@dataclasses.dataclass(frozen=True)
class Repetition:
    """Minus the share of word n-grams that repeat an earlier one: `-(1 - different / all)`, in (-1, 0].

    Source: the repetition penalty of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373). The paper's
    experiments penalise the repeated tokens. Its code also has this form, for a whole completion.
    """

    ngram: int = 3

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram of the repetition reward must be at least 1, got {self.ngram}")

    def __call__(self, problem: Problem, completion: str) -> float:
        """Return the penalty, 0 for a text that is shorter than one n-gram."""
        del problem
        words = completion.casefold().split()
        count = len(words) - self.ngram + 1
        if count < 1:
            return 0.0
        different = len({tuple(words[start : start + self.ngram]) for start in range(count)})
        return different / count - 1.0


@dataclasses.dataclass(frozen=True)
class LanguageConsistency:
    """The share of words written in one script, 0 for a completion without words.

    A word counts if all its letters are of the script, the first word of their Unicode name: LATIN, CYRILLIC, CJK,
    ARABIC, ... Numbers and signs are no words.
    Source: the language consistency reward of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2), which takes the share of
    words in the target language. Here the script stands for the language.
    """

    script: str = "LATIN"

    def __post_init__(self) -> None:
        if self.script.upper() not in _SCRIPTS:
            raise ValueError(f"script must be one of {', '.join(_SCRIPTS)}, got {self.script!r}")

    def __call__(self, problem: Problem, completion: str) -> float:
        """Return the share."""
        del problem
        wanted = self.script.upper()
        scripts = [{_script(letter) for letter in word if letter.isalpha()} for word in completion.split()]
        words = [found for found in scripts if found]
        return sum(found == {wanted} for found in words) / len(words) if words else 0.0


_SCRIPTS = (
    *("ARABIC", "BENGALI", "CJK", "CYRILLIC", "DEVANAGARI", "GREEK", "HANGUL"),
    *("HEBREW", "HIRAGANA", "KATAKANA", "LATIN", "TAMIL", "TELUGU", "THAI"),
)


@functools.lru_cache(maxsize=4096)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "UNKNOWN").split()[0]


def kimi_length_reward(
    lengths: Tensor,  # (B,)
    correct: Tensor,  # (B,) 1, 0 or NaN
    group: Tensor,  # (B,) integer ids of the problems
) -> Tensor:
    """Return `0.5 - (len - min) / (max - min)` over the group's lengths for right completions, min(0, that) for others.

    0 for a group whose completions all have one length. NaN where `correct` is NaN.
    Source: the length penalty of Kimi k1.5 (arXiv 2501.12599, section 2.3.3).
    """
    lengths = lengths.float()
    slots, members = torch.unique(group, return_inverse=True)
    shortest = lengths.new_full(slots.shape, math.inf).scatter_reduce(0, members, lengths, "amin")[members]
    longest = lengths.new_full(slots.shape, -math.inf).scatter_reduce(0, members, lengths, "amax")[members]
    spread = longest - shortest
    value = torch.where(spread > 0, 0.5 - (lengths - shortest) / spread.clamp(min=1.0), 0.0)
    return torch.where(correct.isnan(), correct, torch.where(correct > 0, value, value.clamp(max=0.0)))


def cosine_length_reward(
    lengths: Tensor,  # (B,)
    correct: Tensor,  # (B,) 1, 0 or NaN
    *,
    max_length: float,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> Tensor:
    """Return `long + (short - long) (1 + cos(pi len / max_length)) / 2`, with the bounds of right or wrong answers.

    `exceeded` if len reaches `max_length`. NaN where `correct` is NaN. The defaults are the paper's setting.
    Source: the cosine reward of "Demystifying Long Chain-of-Thought Reasoning" (arXiv 2502.03373, section 4.2).
    """
    lengths = lengths.float()
    falling = 0.5 * (1.0 + torch.cos(math.pi * lengths / max_length))  # 1 at length 0, 0 at max_length
    right = correct_long + (correct_short - correct_long) * falling
    wrong = wrong_long + (wrong_short - wrong_long) * falling
    value = torch.where(correct > 0, right, wrong)
    value = torch.where(lengths >= max_length, exceeded, value)
    return torch.where(correct.isnan(), correct, value)


def overlong_reward(
    lengths: Tensor,  # (B,)
    *,
    max_length: int,
    cache: int,
) -> Tensor:
    """Return the soft overlong punishment of DAPO, falling from 0 to -1 over the last `cache` tokens."""
    return soft_overlong_punishment(lengths.float(), max_length=max_length, buffer=cache)
