"""Float32 master weights of 16-bit parameters: small updates add up, float16 stays finite, and float32 has none."""

from __future__ import annotations

import torch
from torch import nn

from fastrl.train.run.masters import MasterWeights


def train(dtype: torch.dtype, steps: int = 100, rate: float = 1e-4) -> tuple[torch.Tensor, MasterWeights]:
    parameter = nn.Parameter(torch.ones(1000, dtype=dtype))
    masters = MasterWeights({"w": parameter})
    optimizer = torch.optim.AdamW(masters.optimised().values(), lr=rate, weight_decay=0.0)
    for _ in range(steps):
        parameter.grad = torch.ones_like(parameter) * 1e-3
        masters.take_gradients()
        optimizer.step()
        masters.write_back()
        optimizer.zero_grad()
    return parameter.detach(), masters


def test_small_updates_add_up_in_16_bits() -> None:
    exact, none = train(torch.float32)
    assert len(none) == 0
    for dtype in (torch.bfloat16, torch.float16):
        moved, masters = train(dtype)
        assert len(masters) == 1
        assert torch.equal(masters.optimised()["w"].detach(), exact)  # the same steps as in float32
        assert torch.equal(moved, exact.to(dtype))


def test_without_masters_the_same_updates_are_lost() -> None:
    """So that the test above can fail: AdamW on bfloat16 weights leaves them where they are."""
    parameter = nn.Parameter(torch.ones(10, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
    assert bool((parameter == 1).all())


def test_the_share_of_weights_that_moved() -> None:
    parameter = nn.Parameter(torch.zeros(100))
    masters = MasterWeights({"w": parameter})
    before = masters.look()
    with torch.no_grad():
        parameter[:25] = 1.0
    moved, looked_at = masters.moved(before)
    assert (float(moved), float(looked_at)) == (25.0, 100.0)


def test_reading_anew_takes_the_parameters() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    masters = MasterWeights({"w": parameter})
    with torch.no_grad():
        parameter.fill_(2.0)
    masters.read_anew()
    assert masters.of(parameter).tolist() == [2.0] * 4
