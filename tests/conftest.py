"""Lanes, seeds and the interpreter switch of all tests. Where things are:

    backends/ kernels/ ops/     a file for each realisation, each kernel and each vocabulary operation
    losses/                     formulas, presets, released trainers' numbers (golden), planted faults (mutations)
    train/                      the loops: each against plain PyTorch, resumed to the bit, and learning
    integrations/               each host library with fastrl in it; hosts/ runs the hosts' own losses
    house/                      public names, documents, the `fastrl` command, build files, import layers, counts
    ptx/                        the interpreter that runs compiled kernels (support/ptx/), and faults planted in them
    data/                       golden numbers, loss curves, resources of compiled kernels
    tiny_model.py               a random model with a tokenizer: python tests/tiny_model.py FOLDER

A fixture that several files of a folder need is in the folder's conftest.py. Helpers are in support/:

    oracle.py                   the rule of accuracy: float64 decides, eager PyTorch sets the budget
    row_oracle.py               rows of logits in eager PyTorch and in long double
    vocabulary_cases.py         hard rows of logits, heads, upstream gradients
    row_placements.py           one matrix of logits at many addresses and strides
    sparse_cases.py             rows from flat to peaked, and their lists of entries
    policy_cases.py             tokens, axes and bounds of the policy loss
    policy_logits_cases.py      the kernel from logits to the loss's gradient, against its three parts
    golden.py                   inputs and outputs of released trainers
    golden_policy.py            the policy loss that a golden case describes
    mutations.py                faults to plant in the sources
    device.py                   the device of the Triton kernels, and its lane
    compile_offline.py          every kernel compiled for every target, without a GPU
    cluster_rows.py             the CUDA row kernels on a CPU, with csrc/
    cuda_stand_in.py            tensors that say `cuda` and compute on the CPU
    distributed.py              checks in groups of processes
    memory.py                   peak memory of a computation
    loop_checks.py              settings and metrics of a run, resuming, loss curves
    run_folder.py               the files of a finished run
    killed_runs.py              runs of four loops, killed at random moments and resumed
    long_runs.py                loops of many steps, watched for growth
    bandit.py                   a task with a known optimum
    tiny_families.py            a tiny model of each family
    trl_runs.py                 TRL's trainers on a tiny model
    script_loader.py            the files of scripts/ as modules

pytest puts tests/ and tests/support/ on the path: a test writes `from oracle import assert_as_accurate`. No test module
imports another.
"""

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
