"""A pytest plugin for TRL's own test suite: every test runs with fastrl switched on (`pytest -p trl_plugin`).

It rounds half-precision logits as TRL does, because TRL's tests expect the rounded values.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fastrl.integrations import trl


def pytest_configure(config: pytest.Config) -> None:
    """Switch on before TRL's test modules bind its function by name."""
    del config
    trl.enable(round_logits=True)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Give TRL its own function back."""
    del config
    trl.disable()


@pytest.fixture(autouse=True)
def _on() -> Iterator[None]:
    """Fail a test that would run on TRL's own function."""
    assert trl.enabled()
    yield
    assert trl.enabled()
