"""Modules that have moved: the old name still imports, with a DeprecationWarning that names the new one.

Reward files and scripts of users name modules such as `fastrl.train.tasks`. Python asks this finder only for a name
that no file has, so it costs nothing elsewhere.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

# Old module -> the modules that hold its names today.
MOVED: dict[str, tuple[str, ...]] = {
    "fastrl.ops.buffers": ("fastrl.backends.memory",),
    "fastrl.train.checkpoint": ("fastrl.train.run.checkpoint",),
    "fastrl.train.code_reward": ("fastrl.train.rewards.code",),
    "fastrl.train.critic": ("fastrl.train.update.critic",),
    "fastrl.train.curves": ("fastrl.train.run.curves",),
    "fastrl.train.dynamic_sampling": ("fastrl.train.rollouts.dynamic_sampling",),
    "fastrl.train.epochs": ("fastrl.train.update.epochs",),
    "fastrl.train.evaluate": ("fastrl.train.rollouts.evaluate",),
    "fastrl.train.examples": ("fastrl.train.data.encoding",),
    "fastrl.train.measure": ("fastrl.train.run.measure",),
    "fastrl.train.packing": ("fastrl.train.data.packing",),
    "fastrl.train.process": ("fastrl.train.rollouts.step_rewards",),
    "fastrl.train.prompts": ("fastrl.train.rollouts.prompts",),
    "fastrl.train.reference_logprobs": ("fastrl.train.preferences.reference_logprobs",),
    "fastrl.train.rejection": ("fastrl.train.rollouts.rejection",),
    "fastrl.train.report": ("fastrl.train.run.report",),
    "fastrl.train.reward_functions": ("fastrl.train.rewards.functions",),
    "fastrl.train.reward_worker": ("fastrl.train.rewards.worker",),
    "fastrl.train.rollout": ("fastrl.train.data.rollout", "fastrl.train.rollouts.generate"),
    "fastrl.train.scoring": ("fastrl.train.rewards.model",),
    "fastrl.train.supervised": ("fastrl.train.update.supervised",),
    "fastrl.train.tasks": ("fastrl.train.rewards.tasks",),
    "fastrl.train.tracking": ("fastrl.train.run.tracking",),
    "fastrl.train.trust_region": ("fastrl.train.update.trust_region",),
}
# Names that changed with their module.
RENAMED = {"fastrl.train.evaluate": {"Evaluation": "TaskEvaluation"}}


class MovedModule(ModuleType):
    """The old name of a module. It looks each attribute up where it stands today."""

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__"):
            current = RENAMED.get(self.__name__, {}).get(name, name)
            for target in map(importlib.import_module, MOVED[self.__name__]):
                if hasattr(target, current):
                    return getattr(target, current)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


class MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of `MOVED`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old name, else None."""
        del path, target
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the module that forwards."""
        return MovedModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warn. The attributes are looked up when they are asked for."""
        name = module.__name__
        warnings.warn(f"{name} has moved: import {' or '.join(MOVED[name])}", DeprecationWarning, stacklevel=2)


def install() -> None:
    """Let Python ask for old names after every other finder."""
    if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(MovedModules())
