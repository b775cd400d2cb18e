"""Tasks with answers that can be checked: the generators of reasoning-gym, split into training and held-out questions.

A hash of its text decides whether a question is held out. The seed does not matter. So the two splits never share a
question, for any number of draws, in any order, in any run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import random
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import numpy as np

from fastrl.train.rewards import evaluated
from fastrl.train.rewards.answers import Extraction as Extraction
from fastrl.train.rewards.answers import extract_answer as extract_answer

Split = Literal["train", "held_out"]

# One question in this many is held out.
HELD_OUT_SHARE = 8
# Problems per generator object: not 1 and not a million, because some generators build a table of `size` entries.
CHUNK = 512
# Number of unusable draws (of the other split, or repeated) after which the question space counts as too small.
MAX_DRAWS = 400

_PLAIN_NUMBER = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One question with its checkable answer."""

    prompt: str
    """The plain question text, without any chat template."""
    answer: str
    """The reference answer as text."""
    entry: Mapping[str, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """The generator's own record of this question, for the task's scorer."""


class Task:
    """A stream of training problems, a held-out set that shares no question with it, and a scorer.

    Build it with `load_task`. A pickled task holds its name, seed and parameters only.
    """

    def __init__(self, name: str, seed: int, extraction: Extraction, parameters: Mapping[str, Any]) -> None:
        self.name = name
        self.seed = seed
        self.extraction: Extraction = extraction
        self.parameters = dict(parameters)
        # Twice the working set, because training and held-out draws may alternate.
        self._chunk = functools.lru_cache(maxsize=4)(self._build_chunk)
        self._held_out: list[Problem] = []
        self._held_out_seen: set[str] = set()
        self._held_out_draws = 0
        self._scorer = self._chunk("train", 0)

    def __reduce__(self) -> tuple[Any, ...]:
        return Task, (self.name, self.seed, self.extraction, self.parameters)

    def __repr__(self) -> str:
        parameters = "".join(f", {name}={value!r}" for name, value in self.parameters.items())
        return f"load_task({self.name!r}, seed={self.seed}, extraction={self.extraction!r}{parameters})"

    @functools.cached_property
    def instruction(self) -> str:
        """One sentence on the form of the answer, for those who want it in the prompt. It may be empty."""
        if self.extraction == "last_number":
            return ""
        if all(_PLAIN_NUMBER.fullmatch(problem.answer) for problem in self.train(8)):
            return "Reply with the number only."
        return "Give only the final answer between <answer> and </answer>."

    def train(self, n: int, start: int = 0) -> list[Problem]:
        """Return problems `start` to `start + n` of the endless training stream, the same ones on every call."""
        _check_count("n", n)
        _check_count("start", start)
        with _global_randomness_untouched():
            return [self._train_problem(slot) for slot in range(start, start + n)]

    def held_out(self, n: int) -> list[Problem]:
        """Return the first `n` held-out problems: distinct questions that `train` never gives.

        The training stream repeats questions, this set does not. So kinds with few different questions are rarer here:
        for example sums of one digit, among sums of one or two digits.

        Raises:
            ValueError: the task has fewer than `n` different held-out questions (within a bounded search).
        """
        _check_count("n", n)
        with _global_randomness_untouched():
            while len(self._held_out) < n:
                self._held_out.append(self._next_held_out(n))
        return self._held_out[:n]

    def score(self, problem: Problem, completion: str) -> float:
        """Return the generator's own score of the answer in `completion`, 1.0 for a right answer.

        Most generators of reasoning-gym give part of the score to a text that contains the answer among other
        things: `len(answer) / len(text)`. Use `is_correct` if only a right answer counts. A text that makes the
        scorer raise is no answer: 0. No text is evaluated as a program (`fastrl.train.rewards.evaluated`), but a
        scorer may take long. The rewards and evaluations of a run call it in a confined process with a time limit.
        """
        answer = evaluated.readable(self.name, extract_answer(completion, self.extraction))
        with evaluated.literals_only(self.name, self._scorer):
            try:
                score = float(self._scorer.score_answer(answer, dict(problem.entry)))
            except Exception:  # scorers parse answers without checking them: any error means that they could not
                return 0.0
        return score

    def is_correct(self, problem: Problem, completion: str) -> bool:
        """Return whether the answer in `completion` gets the full score."""
        return self.score(problem, completion) >= 1.0

    def _train_problem(self, slot: int) -> Problem:
        # Neighbouring slots draw neighbouring items, so one generator object serves many slots.
        for attempt in range(MAX_DRAWS):
            problem = self._draw("train", attempt, slot)
            if not _is_held_out(problem.prompt):
                return problem
        raise ValueError(f"task {self.name!r} has too few different questions to split: {self.parameters}")

    def _next_held_out(self, wanted: int) -> Problem:
        for _ in range(MAX_DRAWS):
            problem = self._draw("held_out", 0, self._held_out_draws)
            self._held_out_draws += 1
            if _is_held_out(problem.prompt) and (key := _normalised(problem.prompt)) not in self._held_out_seen:
                self._held_out_seen.add(key)
                return problem
        found = len(self._held_out)
        raise ValueError(
            f"task {self.name!r} gave {found} different held-out questions, expected {wanted}: "
            f"ask for at most {found} or widen its parameters {self.parameters}"
        )

    def _draw(self, split: Split, attempt: int, index: int) -> Problem:
        chunk = self._chunk(f"{split}/{attempt}", index // CHUNK)
        entry = chunk[index % CHUNK]
        return Problem(prompt=str(entry["question"]).strip(), answer=str(entry["answer"]), entry=entry)

    def _build_chunk(self, stream: str, number: int) -> Any:
        # Generators seed item i with seed + i, so the chunks of one stream must not overlap. The seed has 31 bits,
        # because some generators seed numpy, which takes 32.
        digest = hashlib.blake2b(f"{self.seed}/{stream}".encode(), digest_size=4).digest()
        seed = (int.from_bytes(digest, "big") + number * CHUNK) % 2**31
        return _create_dataset(self.name, {**self.parameters, "seed": seed, "size": CHUNK})


def load_task(name: str, *, seed: int = 0, extraction: Extraction = "marked", **parameters: Any) -> Task:
    """Return the reasoning-gym task called `name`, for example `load_task("chain_sum", max_terms=2, max_digits=2)`.

    Args:
        name: a dataset of reasoning-gym (Stojanovski et al., arXiv 2505.24760). `task_names()` lists them.
        seed: chooses the problems. The same seed gives the same problems. The split does not depend on it.
        extraction: how the answer is found in a completion, see `extract_answer`.
        **parameters: fields of the dataset's configuration, except `seed` and `size`.

    Raises:
        ImportError: reasoning-gym is not installed.
        ValueError: an unknown name or parameter (the message lists close ones), or a value the dataset refuses.
    """
    names = task_names()
    if name not in names:
        raise ValueError(f"unknown task {name!r}{_close(name, names)}; expected one of the {len(names)} task_names()")
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if extraction not in get_args(Extraction):
        raise ValueError(f"extraction must be one of {', '.join(get_args(Extraction))}, got {extraction!r}")
    for reserved in ("seed", "size"):
        if reserved in parameters:
            raise ValueError(f"parameter {reserved!r} of task {name!r} is set by load_task and cannot be given")
    return Task(name, seed, extraction, parameters)


def task_names() -> list[str]:
    """Return the names that `load_task` knows, sorted."""
    return sorted(name for name in _datasets() if name != "composite")


def _datasets() -> Mapping[str, tuple[type, type]]:
    try:
        import reasoning_gym
    except ModuleNotFoundError as error:
        raise ImportError('tasks need reasoning-gym: pip install "fastrl[train]"') from error
    return reasoning_gym.factory.DATASETS


def _create_dataset(name: str, parameters: Mapping[str, Any]) -> Any:
    dataset_class, config_class = _datasets()[name]
    known = [field.name for field in dataclasses.fields(config_class)]
    for parameter in parameters:
        if parameter not in known:
            usable = [field for field in known if field not in ("seed", "size")]
            raise ValueError(
                f"unknown parameter {parameter!r} of task {name!r}{_close(parameter, usable)}; "
                f"expected one of {', '.join(usable)}"
            )
    try:
        return dataset_class(config_class(**parameters))
    except (AssertionError, TypeError, ValueError) as error:
        given = {key: value for key, value in parameters.items() if key not in ("seed", "size")}
        raise ValueError(f"task {name!r} refused the parameters {given}: {error}") from error


def _is_held_out(question: str) -> bool:
    digest = hashlib.blake2b(_normalised(question).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def _normalised(question: str) -> str:
    return " ".join(question.casefold().split())


def _close(name: str, names: list[str]) -> str:
    matches = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f", did you mean {' or '.join(matches)}" if matches else ""


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")


@contextlib.contextmanager
def _global_randomness_untouched() -> Iterator[None]:
    """Restore the global generators. A few datasets reseed them, which would correlate the caller's own draws."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
