"""Old module names import, say where they have gone, and give the same objects."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest

from fastrl.moved import MOVED, RENAMED


@pytest.mark.parametrize("name", sorted(MOVED))
def test_an_old_name_gives_the_objects_of_the_new_module(name: str) -> None:
    """Every public name of the new module is the same object under the old name."""
    old = _import_again(name)
    for target in map(importlib.import_module, reversed(MOVED[name])):
        public = [key for key, value in vars(target).items() if getattr(value, "__module__", None) == target.__name__]
        assert public
        assert all(getattr(old, key) is getattr(target, key) for key in public if not key.startswith("_"))


def _import_again(name: str) -> ModuleType:
    sys.modules.pop(name, None)
    with pytest.warns(DeprecationWarning, match=f"{name} has moved"):
        return importlib.import_module(name)


def test_a_renamed_class_has_its_old_name_in_the_old_module() -> None:
    """`Evaluation` of the old module is `TaskEvaluation` of the new one."""
    old = _import_again("fastrl.train.evaluate")
    for name, current in RENAMED["fastrl.train.evaluate"].items():
        assert getattr(old, name) is getattr(importlib.import_module("fastrl.train.rollouts.evaluate"), current)


def test_a_name_that_never_was_is_still_an_error() -> None:
    """An unknown module and an unknown attribute raise what Python raises."""
    with pytest.raises(ModuleNotFoundError, match="nothing_here"):
        importlib.import_module("fastrl.train.nothing_here")
    tasks = _import_again("fastrl.train.tasks")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tasks.nothing  # noqa: B018
