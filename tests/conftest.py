"""Lanes, seeds and the interpreter switch shared by all tests."""

import os

import pytest
import torch

# Triton reads this when a kernel is decorated: it must be set before the first import of fastrl_kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the gpu lane, visibly, where there is no device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=[0], ids=["seed0"])
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch's global generator and return the seed."""
    torch.manual_seed(request.param)
    return request.param
