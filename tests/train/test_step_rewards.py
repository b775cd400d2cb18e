"""The reward of steps in examples/process_steps.py knows the right step at its place from every other line."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from fastrl.train.rewards.tasks import Problem

FILE = Path(__file__).parents[2] / "examples" / "process_steps.py"


@pytest.fixture(scope="module")
def process_steps() -> ModuleType:
    spec = importlib.util.spec_from_file_location("process_steps", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def problem(expression: str) -> Problem:
    return Problem(f"{expression} =", "unused", {"metadata": {"expression": expression}})


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("9+1=10", 1.0),
        ("9 + 1 = 10", 1.0),
        ("9+1=10\n10-4=6", 1.0),
        ("\n9+1=10\n\n10-4=6\n", 1.0),
        ("9+1=11", 0.0),  # wrong
        ("9+1=10 ", 1.0),
        ("9+1=100", 0.0),
        ("19+1=10", 0.0),
        ("10-4=6", 0.0),  # left one out
        ("9+1=10\n9+1=10", 0.0),  # said it again
        ("9+1=10\n10-4=6\n6=6", 0.0),  # after the last
        ("nonsense\n10-4=6", 1.0),  # each line stands for itself
        ("", 0.0),
        ("6", 0.0),
    ],
)
def test_right_step(process_steps: ModuleType, text: str, reward: float) -> None:
    assert process_steps.right_step(problem("9 + 1 - 4"), text) == reward


def test_steps_below_zero(process_steps: ModuleType) -> None:
    assert process_steps.right_step(problem("-3 - 4 + 9"), "-3-4=-7") == 1.0
    assert process_steps.right_step(problem("-3 - 4 + 9"), "-3-4=-7\n-7+9=2") == 1.0


def test_a_zero_keeps_its_sign(process_steps: ModuleType) -> None:
    assert process_steps.right_step(problem("5 - 0 + 2"), "5-0=5") == 1.0
    assert process_steps.right_step(problem("5 - 0 + 2"), "5+0=5") == 0.0


def test_every_worked_step_is_right(process_steps: ModuleType) -> None:
    asked = problem("-3 - 0 + 9")
    assert process_steps.worked(asked) == "\n-3-0=-3\n-3+9=6"
    lines = process_steps.worked(asked).splitlines()
    assert [process_steps.right_step(asked, "\n".join(lines[:count])) for count in (2, 3)] == [1.0, 1.0]
