"""The lane can fail: barriers taken out of compiled kernels, and tensors that are too short, are found.

These tests need compiled kernels: `pytest --ptx=sm_90 tests/ptx`.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from ptx.checker import Checker
from ptx.machine import Options
from ptx.plugin import SESSION
from ptx.text import Fault, Instruction, Kernel
from ptx.triton_hook import Launch

N, V = 3, 9000


@pytest.fixture(scope="module")
def launches(request: pytest.FixtureRequest) -> dict[str, Launch]:
    """Return a launch of the forward and one of the in-place backward, as the compiler and the wrappers made them."""
    if not request.config.getoption("ptx"):
        pytest.skip("needs compiled kernels: pytest --ptx=sm_90")
    from fastrl_kernels.token_logprobs import token_logprobs_bwd, token_logprobs_fwd

    session = request.config.stash[SESSION]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator) * 4
    labels = torch.randint(0, V, (N,), generator=generator)
    options: dict[str, Any] = {"logit_scale": 1.0, "softcap": 0.0, "ignore_index": -100}
    session.recorded = found = []
    try:
        outputs = token_logprobs_fwd(logits, labels, 1.0, **options)
        token_logprobs_bwd(logits, labels, 1.0, *outputs, torch.ones(N), torch.ones(N), None, out=logits, **options)
    finally:
        session.recorded = None
    assert len(found) == 2
    return {"forward": found[0], "backward": found[1]}


def barriers(kernel: Kernel) -> list[int]:
    """Return where a kernel waits for its block."""
    return [ins.index for ins in kernel.code if ins.op.startswith("bar.sync")]


def without(kernel: Kernel, index: int) -> Kernel:
    """Return a kernel in which nothing happens at one instruction."""
    changed = copy.copy(kernel)
    changed.code, changed.cache = [*kernel.code], {}
    changed.code[index] = Instruction("bar.warp.sync", ["-1"], None, kernel.code[index].loc, index)
    return changed


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_nothing_is_found_in_the_kernels_as_they_are(launches: dict[str, Launch], name: str) -> None:
    for order in (None, 1):
        checker = Checker()
        launches[name].run(launches[name].kernel, Options(order=order, seed=3, watchers=[checker]))
        assert checker.accesses > 0
        assert checker.lines() == []


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_every_barrier_is_missed(launches: dict[str, Launch], name: str) -> None:
    """Taken out one by one, each leaves a race, also where the results happen to be the same."""
    kernel = launches[name].kernel
    assert barriers(kernel)
    for index in barriers(kernel):
        checker = Checker()
        launches[name].run(without(kernel, index), Options(watchers=[checker]))
        assert any("race" in kind for kind, *_ in checker.found), kernel.code[index]


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_tensor_that_is_too_short_is_out_of_bounds(launches: dict[str, Launch], name: str) -> None:
    recorded = launches[name]
    short = [
        x[:, : V - 5].contiguous() if isinstance(x, torch.Tensor) and x.dim() == 2 else x for x in recorded.arguments
    ]
    with pytest.raises(Fault, match=r"out of bounds: (ld|st)\.global.* at token_logprobs\.py:\d+"):
        dataclasses.replace(recorded, arguments=short).run(recorded.kernel, Options())


def test_garbage_and_the_order_of_warps_change_no_bit(launches: dict[str, Launch]) -> None:
    settings = [Options(seed=7), Options(seed=1, order=4)]
    for recorded in launches.values():
        first = recorded.run(recorded.kernel, Options())
        for other in (recorded.run(recorded.kernel, options) for options in settings):
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
