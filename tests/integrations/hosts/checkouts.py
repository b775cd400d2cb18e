"""The loss modules of other trainers from a clone of their project, without the heavy packages that they import.

A trainer's loss is a file of arithmetic, but its imports need Ray, Megatron, vLLM, hydra. Inside `opened(...)` Python
runs the modules that a `Checkout` names from the clone, unchanged. Every other module of the project, and of the
packages that the `Checkout` names, is a stand-in. Names of a stand-in serve in annotations and as base classes. To call
one is an error, so no result of a stand-in can take part in a comparison. A loss does call a few functions (whether Ray
runs, the size of a process group). They are listed here by name.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch


@dataclass(frozen=True)
class Checkout:
    """The modules of a project's loss, and the stand-ins for the rest."""

    name: str
    """The project's name in messages."""
    folders: tuple[str, ...]
    """The folders of a clone that hold its packages, relative to the clone."""
    modules: tuple[str, ...]
    """The modules to run unchanged. The packages around them do not run, unless they are named too."""
    stand_ins: Mapping[str, Mapping[str, Any] | Callable[[], Mapping[str, Any]]] = field(default_factory=dict)
    """Module of another package -> its names and values, or a function that returns them when the module is imported.

    To call any other name is an error.
    """

    def files(self, clone: Path) -> dict[str, Path]:
        """Return the file of every module, or raise FileNotFoundError in one line."""
        found = {name: self._file(clone, name) for name in self.modules}
        missing = [self._expected(name) for name, path in found.items() if path is None]
        if missing:
            raise FileNotFoundError(f"{clone} is not a clone of {self.name}: it has no {', '.join(missing)}")
        return {name: path for name, path in found.items() if path is not None}

    def _file(self, clone: Path, module: str) -> Path | None:
        parts = module.split(".")
        paths = (clone.joinpath(folder, *parts) for folder in self.folders)
        tried = (file for path in paths for file in (path.with_suffix(".py"), path / "__init__.py"))
        return next((file for file in tried if file.is_file()), None)

    def _expected(self, module: str) -> str:
        return " or ".join(str(Path(folder, *module.split(".")).with_suffix(".py")) for folder in self.folders)


class _Unavailable(type):
    """The value of any name in a stand-in module."""

    def __getattr__(cls, name: str) -> _Unavailable:
        if name.startswith("__"):
            raise AttributeError(name)
        return _unavailable(f"{cls.__module__}.{cls.__qualname__}", name)

    def __getitem__(cls, item: Any) -> _Unavailable:
        return cls

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"the host called {cls.__module__}.{cls.__qualname__}, for which there is only a stand-in")


def _unavailable(module: str, name: str) -> _Unavailable:
    return _Unavailable(name, (), {"__module__": module})


class _StandIn(ModuleType):
    def __init__(self, name: str, known: frozenset[str]) -> None:
        super().__init__(name)
        self._known = known

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        path = f"{self.__name__}.{name}"
        found = importlib.import_module(path) if path in self._known else _unavailable(self.__name__, name)
        setattr(self, name, found)
        return found


class _Finder(MetaPathFinder, Loader):
    def __init__(self, checkout: Checkout, clone: Path) -> None:
        self.files = checkout.files(clone)
        self.stand_ins = checkout.stand_ins
        self.known = frozenset((*checkout.modules, *checkout.stand_ins))
        self.packages = {name.partition(".")[0] for name in self.known}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname in self.files:
            file = self.files[fullname]
            inside = [str(file.parent)] if file.name == "__init__.py" else None
            return importlib.util.spec_from_file_location(fullname, file, submodule_search_locations=inside)
        if fullname.partition(".")[0] in self.packages:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, self.known)

    def exec_module(self, module: ModuleType) -> None:
        given = self.stand_ins.get(module.__name__, {})
        vars(module).update(given() if callable(given) else given)


@contextlib.contextmanager
def opened(checkout: Checkout, clone: Path, *, compiled: bool = False) -> Iterator[dict[str, ModuleType]]:
    """Make the modules of a clone importable inside this context, and yield them by name.

    Args:
        checkout: the modules to run.
        clone: the folder of the clone.
        compiled: whether `torch.compile` compiles the host's functions, or leaves them as they are written.

    Raises:
        FileNotFoundError: `clone` lacks files that `checkout` names.
    """
    finder = _Finder(checkout, clone)
    before = _taken(finder.packages)
    sys.meta_path.insert(0, finder)
    try:
        with contextlib.nullcontext() if compiled else mock.patch.object(torch, "compile", _as_written):
            yield {name: importlib.import_module(name) for name in checkout.modules}
    finally:
        sys.meta_path.remove(finder)
        _taken(finder.packages)
        sys.modules.update(before)


def _taken(packages: set[str]) -> dict[str, ModuleType]:
    """Take the modules of packages out of `sys.modules` and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def _as_written(function: Any = None, **options: Any) -> Any:
    return (lambda decorated: decorated) if function is None else function


def commit_of(clone: Path) -> str:
    """Return the first nine digits of the clone's commit, or "of an unknown commit" without Git's folder."""
    if not (clone / ".git").exists():
        return "of an unknown commit"
    command = ["git", "-C", str(clone), "rev-parse", "--short=9", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"at {found.stdout.strip()}" if found.returncode == 0 else "of an unknown commit"


class _Annotation:
    """jaxtyping's annotations: the type without the shape."""

    def __class_getitem__(cls, item: Any) -> Any:
        return item[0] if isinstance(item, tuple) else item


def _pydantic_config() -> Mapping[str, Any]:
    """Return pydantic's model for prime-rl's, which adds a command line to it."""
    return {"BaseConfig": importlib.import_module("pydantic").BaseModel}


def _unchanged(decorated: Any) -> Any:
    return decorated


_ANNOTATIONS = {
    **dict.fromkeys(("Float", "Int", "Integer", "Bool"), _Annotation),
    "jaxtyped": lambda **options: _unchanged,
}
_ONE_RANK = SimpleNamespace(
    get_context_parallel_world_size=lambda: 1,
    get_context_parallel_rank=lambda: 0,
    get_context_parallel_group=lambda: None,
    get_tensor_model_parallel_group=lambda: None,
)

CHECKOUTS = {
    "slime": Checkout(
        "slime",
        ("",),
        (
            "slime.utils.ppo_utils",
            "slime.backends.megatron_utils.cp_utils",
            "slime.backends.megatron_utils.loss",
        ),
        {"megatron.core": {"mpu": _ONE_RANK}},
    ),
    "nemo_rl": Checkout(
        "NeMo-RL",
        ("",),
        (
            "nemo_rl.algorithms.utils",
            "nemo_rl.algorithms.loss.interfaces",
            "nemo_rl.algorithms.loss.loss_functions",
            "nemo_rl.algorithms.loss",
        ),
    ),
    "skyrl": Checkout(
        "SkyRL",
        ("",),
        (
            "skyrl.train.config.config",
            "skyrl.backends.skyrl_train.utils.torch_utils",
            "skyrl.backends.skyrl_train.utils.off_policy_correction_utils",
            "skyrl.backends.skyrl_train.utils.ppo_utils",
        ),
        {
            "ray": {"remote": _unchanged, "is_initialized": lambda: False},
            "jaxtyping": _ANNOTATIONS,
            "loguru": {"logger": logging.getLogger("skyrl")},
            "omegaconf": {},
            "skyrl_gym": {},
        },
    ),
    "prime_rl": Checkout(
        "prime-rl",
        ("src", "packages/prime-rl-configs/src"),
        (
            "prime_rl.utils.config",
            "prime_rl.configs.shared",
            "prime_rl.configs.monitors",
            "prime_rl.configs.trainer",
            "prime_rl.trainer.rl.loss",
        ),
        {
            "beartype": {"beartype": _unchanged},
            "jaxtyping": _ANNOTATIONS,
            "pydantic_config": _pydantic_config,
        },
    ),
}
"""The projects by the names of their adapters."""
