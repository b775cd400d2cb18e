"""A trainer's package: whether it is the one that an adapter was written for, and how its functions are replaced.

An adapter names the attributes and signatures that it was tested with. If the installed package has others, one line of
error says the expected and the found ones. Version numbers decide nothing.

Every adapter except liger and transformers describes its trainer as a `Host`. A `Switch` replaces functions for trl,
verl, openrlhf, slime and nemo_rl. skyrl and prime_rl need none: SkyRL has a registry and prime-rl a hook.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

_ABSENT = object()


@dataclass(frozen=True)
class Host:
    """A trainer that an adapter is written for."""

    name: str
    """Its name in messages."""
    distribution: str
    """The distribution that holds it."""
    tested: str
    """The version or commit that the adapter was tested with."""
    adapter: str
    """The module of the adapter."""
    install: str = ""
    """How to install it, for the message of a failed import."""

    def version(self) -> str:
        """Return the installed version, or "of unknown version" for one that was not installed as a distribution."""
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "of unknown version"

    def module(self, path: str) -> Any:
        """Return a module of the host, or raise ImportError in one line."""
        try:
            return importlib.import_module(path)
        except ImportError as error:
            hint = f"; {self.install}" if self.install else ""
            raise ImportError(
                f"{self.adapter} needs {self.name} (tested with {self.tested}): {path} cannot be imported: "
                f"{error}{hint}"
            ) from error

    def attribute(self, owner: Any, name: str) -> Any:
        """Return `owner.name`, or raise RuntimeError if this version of the host does not have it."""
        found = getattr(owner, name, _ABSENT)
        if found is _ABSENT:
            raise self.unsupported(f"{_path(owner)}.{name} does not exist")
        return found

    def function(self, owner: Any, name: str, arguments: tuple[str, ...]) -> Callable[..., Any]:
        """Return the function `owner.name`, or raise RuntimeError unless it takes exactly `arguments`."""
        function = self.attribute(owner, name)
        self.check_arguments(f"{_path(owner)}.{name}", function, arguments)
        return function

    def check_arguments(self, name: str, function: Callable[..., Any] | None, arguments: tuple[str, ...]) -> None:
        """Raise RuntimeError unless `function` exists and takes exactly `arguments`; `name` is for the message."""
        if function is None:
            raise self.unsupported(f"{name} does not exist")
        found = tuple(inspect.signature(function).parameters)
        if found != arguments:
            raise self.unsupported(f"{name} takes ({', '.join(found)}), expected ({', '.join(arguments)})")

    def unsupported(self, what: str) -> RuntimeError:
        """Return the error for a version of the host that the adapter does not support."""
        return RuntimeError(
            f"{self.name} {self.version()} is not supported: {what}; {self.adapter} was tested with {self.tested}"
        )


def _path(owner: Any) -> str:
    if inspect.ismodule(owner):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"


class Switch:
    """Replaces objects of a host while it is on, and puts the same objects back when it goes off.

    Args:
        host: for messages.
        find: checks the host and returns (owner, name, replacement) of each object to replace.
    """

    def __init__(self, host: Host, find: Callable[[], list[tuple[Any, str, Any]]]) -> None:
        self._host = host
        self._find = find
        self._lock = threading.RLock()
        self._bindings: list[tuple[Any, str, Any, Any]] = []
        self._contexts = 0
        self._permanent = False

    @property
    def on(self) -> bool:
        """Whether the replacements are in place."""
        return bool(self._bindings)

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Replace the objects inside this context. Contexts nest."""
        with self._lock:
            self._install()
            self._contexts += 1
        try:
            yield
        finally:
            with self._lock:
                self._contexts -= 1
                self._restore_when_unused()

    def enable(self) -> None:
        """Replace the objects from here on. A second call changes nothing."""
        with self._lock:
            self._install()
            self._permanent = True

    def disable(self) -> None:
        """Undo `enable`. Inside a context the host's own objects come back when the context ends."""
        with self._lock:
            self._permanent = False
            self._restore_when_unused()

    def _install(self) -> None:
        if self._bindings:
            return
        # Find everything before the first change: a host that does not fit is left untouched.
        found = [(owner, name, vars(owner)[name], ours) for owner, name, ours in self._find()]
        for owner, name, _, ours in found:
            setattr(owner, name, ours)
        self._bindings.extend(found)

    def _restore_when_unused(self) -> None:
        if self._contexts or self._permanent:
            return
        while self._bindings:
            owner, name, original, ours = self._bindings.pop()
            # Another library may have patched the same name since. Its object must not be lost.
            if vars(owner).get(name) is not ours:
                warnings.warn(
                    f"{_path(owner)}.{name} was replaced by something else while fastrl's patch of {self._host.name} "
                    "was on; it is left as it is",
                    RuntimeWarning,
                    stacklevel=3,
                )
                continue
            setattr(owner, name, original)
