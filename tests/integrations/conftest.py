"""Fixtures of the adapters' tests."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from fastrl.integrations.common.host import Host
from fastrl.integrations.common.proof import FirstUse

StandFor = Callable[[Any, Mapping[str, Any]], None]


@pytest.fixture
def stand_for(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandFor]:
    """Return a function (adapter, modules) that gives an adapter stand-ins for the modules of its host.

    `modules` maps the path of a module, or its last part, to the stand-in. The adapter's proofs are forgotten before
    and after the test.
    """
    forgotten: list[FirstUse] = []

    def use(adapter: Any, modules: Mapping[str, Any]) -> None:
        def module(self: Host, path: str) -> Any:
            return modules[path] if path in modules else modules[path.rpartition(".")[2]]

        monkeypatch.setattr(Host, "module", module)
        forgotten.extend(value for value in vars(adapter).values() if isinstance(value, FirstUse))
        for proofs in forgotten:
            proofs.forget()

    yield use
    for proofs in forgotten:
        proofs.forget()


@pytest.fixture(autouse=True)
def fresh_accelerator_state() -> None:
    """Forget the settings of an earlier test's Accelerator: they hold for a process, whatever order tests run in."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state()
