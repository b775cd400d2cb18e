"""Fixtures of the loops' tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_model import save_tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny random model and its tokenizer. The loops only read it."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
