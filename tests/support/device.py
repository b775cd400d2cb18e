"""Where the tests of the Triton kernels run: compiled on a GPU in the gpu lane, interpreted on the CPU elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available() else "cuda"
LANE = [pytest.mark.gpu] if DEVICE == "cuda" else []
"""The `pytestmark` of a file whose tests run on `DEVICE`: in the gpu lane where that is a GPU."""


def on_device(test: Callable[..., None]) -> Callable[..., None]:
    """Put one test of a file into the gpu lane where `DEVICE` is a GPU."""
    return pytest.mark.gpu(test) if DEVICE == "cuda" else test
