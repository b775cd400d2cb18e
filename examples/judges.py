"""A judge for examples/iterative.py: the known preference, which the reward model has to learn from pairs."""

from __future__ import annotations

import re

from fastrl.train.rewards.tasks import Problem

_BARE_NUMBER = re.compile(r"-?[0-9]+\.?")


def bare_number(problem: Problem, text: str) -> float:
    """Return 1.0 if the answer is one whole number, right or wrong, perhaps with a full stop. Otherwise 0.0."""
    del problem
    return float(_BARE_NUMBER.fullmatch(text.strip()) is not None)
