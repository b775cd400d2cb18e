"""Lanes, seeds and the interpreter switch shared by all tests."""

import os
import re

import pytest
import torch
from ptx import plugin as ptx_lane


def _is_gpu_lane(config: pytest.Config) -> bool:
    asked = re.search(r"(not\s+)?\bgpu\b", config.getoption("markexpr") or "")
    return torch.cuda.is_available() and asked is not None and asked[1] is None


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of the lane of compiled kernels."""
    ptx_lane.add_options(parser)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what ran in the lane of compiled kernels."""
    if config.getoption("ptx"):
        ptx_lane.summary(config, terminalreporter)


def pytest_configure(config: pytest.Config) -> None:
    """Let Triton interpret, on a machine with a GPU too, unless this is the gpu lane: most tests are on the CPU.

    Triton reads this when a kernel is decorated: it must be set before the first import of fastrl_kernels.
    """
    if config.getoption("ptx"):
        ptx_lane.configure(config)
    elif not _is_gpu_lane(config):
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the gpu tests, visibly, where there is no device, and beside interpreted kernels."""
    if _is_gpu_lane(config):
        return
    reason = "compiled kernels: pytest -m gpu" if torch.cuda.is_available() else "needs a GPU"
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=[0], ids=["seed0"])
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch's global generator and return the seed."""
    torch.manual_seed(request.param)
    return request.param
