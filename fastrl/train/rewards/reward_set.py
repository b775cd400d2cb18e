"""Rewards by name, their weighted sum, and the handling of failures.

A reward function takes a problem and the text of a completion. A call fails if it raises, hangs, or returns anything
but a finite number. A failed call gives NaN and is counted. It does not end the run. It does not count as 0 either,
because a crash of a grader must not move the mean of a group.

The functions themselves are in `fastrl.train.rewards.functions`.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.train.rewards import functions
from fastrl.train.rewards.code import CodeTests
from fastrl.train.rewards.functions import (
    Accuracy,
    Exact,
    LanguageConsistency,
    MathVerify,
    Repetition,
    cosine_length_reward,
    format_reward,
    kimi_length_reward,
    last_number_reward,
    number_only_reward,
    overlong_reward,
    tag_count_reward,
)
from fastrl.train.rewards.tasks import Problem, Task
from fastrl.train.rewards.worker import RewardWorker, Score, call_reward

logger = logging.getLogger(__name__)

RewardFunction = Callable[[Problem, str], float | None]

# A reward that fails on all completions of so many batches in a row stops the run: nothing can be learnt from it.
DEAD_BATCHES = 5


@dataclasses.dataclass(frozen=True)
class RewardBatch:
    """The rewards of B completions."""

    total: Tensor
    """(B,) float32, the weighted sum. NaN where a component with a nonzero weight is NaN."""
    components: dict[str, Tensor]
    """Name -> (B,) float32, before weighting. NaN where the function failed."""
    failures: int
    """Number of failed calls."""
    reasons: tuple[str, ...] = ()
    """Up to five different reasons of failures, each with the name of its reward."""

    @classmethod
    def concatenate(cls, parts: Sequence[RewardBatch]) -> RewardBatch:
        """Return the rewards of all parts, in order."""
        reasons = dict.fromkeys(reason for part in parts for reason in part.reasons)
        return cls(
            torch.cat([part.total for part in parts]),
            {name: torch.cat([part.components[name] for part in parts]) for name in parts[0].components},
            sum(part.failures for part in parts),
            tuple(reasons)[:5],
        )

    def select(self, rows: Tensor) -> RewardBatch:  # (R,) int64
        """Return the rewards at `rows`, with the failures and reasons of the whole batch."""
        components = {name: values[rows] for name, values in self.components.items()}
        return dataclasses.replace(self, total=self.total[rows], components=components)


@dataclasses.dataclass(frozen=True)
class LengthReward:
    """A reward of the completions' lengths: tensors in, tensor out."""

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(lengths (B,), correct (B,) 1 or 0 or NaN, group (B,) integer ids) -> rewards (B,)."""


def _kimi_length() -> LengthReward:
    return LengthReward(kimi_length_reward)


def _cosine_length(
    max_length: float,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> LengthReward:
    _check_positive(max_length=max_length)

    def reward(lengths: Tensor, correct: Tensor, group: Tensor) -> Tensor:
        del group
        return cosine_length_reward(
            lengths,
            correct,
            max_length=max_length,
            correct_short=correct_short,
            correct_long=correct_long,
            wrong_short=wrong_short,
            wrong_long=wrong_long,
            exceeded=exceeded,
        )

    return LengthReward(reward)


def _overlong(max_length: int, cache: int) -> LengthReward:
    for name, value in (("max_length", max_length), ("cache", cache)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} of the overlong reward must be an int, a number of tokens, got {value!r}")
    _check_positive(max_length=max_length, cache=cache)
    if cache > max_length:
        raise ValueError(f"cache of the overlong reward must be at most max_length {max_length:g}, got {cache:g}")

    def reward(lengths: Tensor, correct: Tensor, group: Tensor) -> Tensor:
        del correct, group
        return overlong_reward(lengths, max_length=max_length, cache=cache)

    return LengthReward(reward)


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be greater than 0, got {value:g}")


# Name -> (takes the task, builder). The name may carry the builder's parameters in brackets.
_BUILDERS: dict[str, tuple[bool, Callable[..., RewardFunction | LengthReward]]] = {
    "accuracy": (True, Accuracy),
    "exact": (True, Exact),
    "math_verify": (False, MathVerify),
    "format": (False, lambda: format_reward),
    "tag_count": (False, lambda: tag_count_reward),
    "number_only": (False, lambda: number_only_reward),
    "last_number": (False, lambda: last_number_reward),
    "code_tests": (False, CodeTests),
    "repetition": (False, Repetition),
    "language_consistency": (False, LanguageConsistency),
    "kimi_length": (False, _kimi_length),
    "cosine_length": (False, _cosine_length),
    "overlong": (False, _overlong),
}


def reward_names() -> list[str]:
    """Return the names that `build_rewards` knows, each with its parameters in brackets."""
    shown = []
    for name, (takes_task, builder) in _BUILDERS.items():
        parameters = list(inspect.signature(builder).parameters.values())[1 if takes_task else 0 :]
        shown.append(f"{name}({', '.join(p.name for p in parameters)})" if parameters else name)
    return shown


def build_rewards(names_and_weights: Mapping[str, float], task: Task, timeout_s: float | None = 5.0) -> RewardSet:
    """Return the weighted sum of the named rewards.

    Args:
        names_and_weights: name -> weight. A weight of 0 reports the component and leaves it out of the sum. A name is
            one of `reward_names()`, with parameters as in `"overlong(max_length=256, cache=64)"`, or
            `"module:function"` for a reward function of your own.
        task: the task that scores the answers.
        timeout_s: the time that one call may take. The functions run in a worker process that is replaced when a call
            takes longer (POSIX only). None calls them in this process, which cannot stop a call that hangs.

    Raises:
        ValueError: an unknown name or parameter (the message lists the known ones), a weight that is not finite.
        TypeError: a function of your own that another process cannot import.
    """
    if not names_and_weights:
        raise ValueError("names_and_weights must name at least one reward, got none")
    rewards = {name: _build(name, task) for name in names_and_weights}
    return RewardSet(rewards, names_and_weights, task, timeout_s)


def check_rewards(names_and_weights: Mapping[str, float], task: Task) -> None:
    """Raise the errors of `build_rewards` without starting a worker, so before a model is loaded."""
    _check_weights({name: _build(name, task) for name in names_and_weights}, names_and_weights)


def _build(specification: str, task: Task) -> RewardFunction | LengthReward:
    if ":" in specification.partition("(")[0]:
        return _import_function(specification)
    name, parameters = _parse(specification)
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=3, cutoff=0.5)
        hint = f", did you mean {' or '.join(close)}" if close else ""
        raise ValueError(f"unknown reward {name!r}{hint}; expected one of {', '.join(reward_names())}, module:function")
    takes_task, builder = _BUILDERS[name]
    arguments = [task] if takes_task else []
    try:
        inspect.signature(builder).bind(*arguments, **parameters)
    except TypeError as error:
        raise ValueError(
            f"reward {specification!r}: {error}; expected {reward_names()[[*_BUILDERS].index(name)]}"
        ) from None
    return builder(*arguments, **parameters)


def _parse(specification: str) -> tuple[str, dict[str, Any]]:
    """Split `name(key=value, ...)`, whose values are literals."""
    try:
        call = ast.parse(specification.strip(), mode="eval").body
        if isinstance(call, ast.Name):
            return call.id, {}
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return call.func.id, {word.arg: ast.literal_eval(word.value) for word in call.keywords if word.arg}
    except (SyntaxError, ValueError):
        pass
    raise ValueError(f"a reward must be written name or name(key=value, ...), got {specification!r}")


def _import_function(specification: str) -> RewardFunction:
    module_name, _, attribute = specification.partition(":")
    try:
        function = functools.reduce(getattr, attribute.split("."), importlib.import_module(module_name))
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"reward {specification!r} cannot be imported: {error}; modules are looked for on PYTHONPATH, and by the "
            "command in the current directory"
        ) from error
    if not callable(function):
        raise ValueError(f"reward {specification!r} must be a function, got {type(function).__name__}")
    return function


class RewardSet:
    """The weighted sum of named rewards. Build it with `build_rewards`, or from functions of your own.

    Any thread may call it. The worker process ends with `close`, at the end of the `with` block, or with this process.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardFunction | LengthReward],
        weights: Mapping[str, float],
        task: Task | None = None,
        timeout_s: float | None = 5.0,
    ) -> None:
        """Check the parts and start the worker.

        Args:
            rewards: name -> function of one completion, or `LengthReward`.
            weights: name -> weight, the same names.
            task: judges whether a completion is right. Only a `LengthReward` needs it.
            timeout_s: see `build_rewards`.
        """
        _check_weights(rewards, weights)
        if timeout_s is not None and not (timeout_s > 0 and math.isfinite(timeout_s)):
            raise ValueError(f"timeout_s must be None or finite and greater than 0, got {timeout_s}")
        self.weights = dict(weights)
        self._names = list(rewards)
        self._length_rewards = {name: part for name, part in rewards.items() if isinstance(part, LengthReward)}
        self._functions = {name: part for name, part in rewards.items() if not isinstance(part, LengthReward)}
        if self._length_rewards:
            if task is None:
                raise ValueError(f"rewards of lengths ({', '.join(self._length_rewards)}) need a task, got None")
            self._functions[_CORRECT] = Exact(task)
        # The project's own functions need no rights. A function of the user is the user's code: it may call a judge
        # over the network, and CodeTests starts the programs that it confines.
        kinds = {name: _needs_no_rights(function) for name, function in self._functions.items()}
        self._groups = [names for wanted in (True, False) if (names := [n for n in kinds if kinds[n] == wanted])]
        self._workers = [
            None
            if timeout_s is None
            else RewardWorker([self._functions[name] for name in names], timeout_s, confined=kinds[names[0]])
            for names in self._groups
        ]
        self._dead_batches = dict.fromkeys(self._functions, 0)

    def __call__(
        self, problems: Sequence[Problem], completions: Sequence[str], lengths: Sequence[int] | Tensor | None = None
    ) -> RewardBatch:
        """Return the rewards of `completions[i]` as answers to `problems[i]`.

        Args:
            problems: B problems, a problem repeated for each completion of its group.
            completions: B texts.
            lengths: (B,) token counts of the completions. Only rewards of lengths need them.
        """
        if len(problems) != len(completions):
            raise ValueError(f"completions must be as many as problems ({len(problems)}), got {len(completions)}")
        for completion in completions:
            if not isinstance(completion, str):
                raise TypeError(f"completions must be str, got {type(completion).__name__}")
        columns, failures, reasons = self._evaluate(problems, completions)
        if self._length_rewards:
            columns |= self._lengths(problems, columns[_CORRECT], lengths)
        components = {name: columns[name] for name in self._names}
        total = torch.zeros(len(completions))
        for name, weight in self.weights.items():
            if weight != 0:  # 0 * NaN would be NaN
                total = total + weight * components[name]
        if failures:
            logger.warning("%d reward calls failed: %s", failures, "; ".join(reasons))
        return RewardBatch(total, components, failures, reasons)

    def __enter__(self) -> RewardSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes. A later call would start new ones."""
        for worker in self._workers:
            if worker is not None:
                worker.close()

    def _evaluate(
        self, problems: Sequence[Problem], completions: Sequence[str]
    ) -> tuple[dict[str, Tensor], int, tuple[str, ...]]:
        n = len(completions)
        if not n or not self._functions:
            return {name: torch.zeros(n) for name in self._functions}, 0, ()
        columns: dict[str, Tensor] = {}
        reasons: dict[str, None] = {}
        failures = 0
        for names, worker in zip(self._groups, self._workers, strict=True):
            if worker is None:
                scores = [
                    call_reward(self._functions[name], problem, completion)
                    for name in names
                    for problem, completion in zip(problems, completions, strict=True)
                ]
            else:
                scores = worker.evaluate(problems, completions, len(names))
            for position, name in enumerate(names):
                column: list[Score] = scores[position * n : (position + 1) * n]
                columns[name] = torch.tensor([score.value for score in column], dtype=torch.float32)
                reasons |= {f"{name} {score.failure}": None for score in column if score.failure is not None}
                failed = sum(score.failure is not None for score in column)
                failures += failed
                self._watch(name, failed, column)
        return columns, failures, tuple(reasons)[:5]

    def _watch(self, name: str, failed: int, column: Sequence[Score]) -> None:
        """Stop the run if a reward has failed on all completions of `DEAD_BATCHES` batches in a row."""
        self._dead_batches[name] = self._dead_batches[name] + 1 if failed == len(column) else 0
        if self._dead_batches[name] >= DEAD_BATCHES:
            raise RuntimeError(
                f"reward {name!r} failed on every completion of {DEAD_BATCHES} batches in a row, the last time because "
                f"it {column[-1].failure}; expected a number for some of them: mend the reward, then resume the run"
            )

    def _lengths(
        self, problems: Sequence[Problem], correct: Tensor, lengths: Sequence[int] | Tensor | None
    ) -> dict[str, Tensor]:
        if lengths is None or len(lengths) != len(problems):
            got = "none" if lengths is None else len(lengths)
            raise ValueError(
                f"{', '.join(self._length_rewards)} need lengths, the {len(problems)} token counts, got {got}"
            )
        counts = torch.as_tensor(lengths).cpu()
        prompts: dict[str, int] = {}
        group = torch.tensor([prompts.setdefault(problem.prompt, len(prompts)) for problem in problems])
        return {name: part.function(counts, correct, group) for name, part in self._length_rewards.items()}


def _needs_no_rights(function: RewardFunction) -> bool:
    """Whether a function reads a text and computes a number, and nothing else."""
    return getattr(function, "__module__", "") == functions.__name__


# Not a name that `build_rewards` takes, so no reward can have it.
_CORRECT = "(correct)"


def _check_weights(rewards: Mapping[str, object], weights: Mapping[str, float]) -> None:
    if set(rewards) != set(weights):
        raise ValueError(f"weights must be given for {sorted(rewards)}, got {sorted(weights)}")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}")
