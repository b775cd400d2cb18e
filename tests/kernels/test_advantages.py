"""The fused group advantages against float64, in the interpreter where there is no device."""

from __future__ import annotations

import pytest
import torch
from device import DEVICE, LANE
from oracle import assert_as_accurate
from torch import Tensor

from fastrl_kernels import advantages as module
from fastrl_kernels.advantages import group_advantages_fwd
from fastrl_kernels.launch import Tile

pytestmark = [*LANE, pytest.mark.usefixtures("poisoned")]
NAN, INF = float("nan"), float("inf")


def grouped(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return (order, offsets) of unsorted ids."""
    order = torch.sort(group_ids, stable=True).indices
    counts = torch.bincount(group_ids)
    return order, torch.cat((counts.new_zeros(1), counts.cumsum(0)))


def expected(
    rewards: Tensor, group_ids: Tensor, baseline: str, scale: str, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (advantages, mean, std, count) group by group, in plain PyTorch at `dtype`."""
    rewards = rewards.to(dtype)
    groups = int(group_ids.max()) + 1
    result = torch.zeros(rewards.shape, dtype=dtype, device=rewards.device)
    mean, std = (torch.zeros(groups, dtype=dtype, device=rewards.device) for _ in range(2))
    count = torch.zeros(groups, dtype=torch.int64, device=rewards.device)
    batch = rewards[~rewards.isnan()].std()
    for group in range(groups):
        members = (group_ids == group) & ~rewards.isnan()
        r = rewards[members]
        n = count[group] = len(r)
        if n == 0:
            continue
        mean[group] = r.mean()
        if n == 1 or r.max() == r.min():
            continue
        std[group] = r.std()
        centred = r - r.mean()
        if baseline == "leave_one_out":
            centred = centred * (n / (n - 1))
        divisor = {"group": std[group] + eps, "batch": batch + eps, "none": 1.0}[scale]
        result[members] = centred / divisor
    return result, mean, std, count


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ragged_unsorted_groups(dtype: torch.dtype, baseline: str, scale: str, seed: int) -> None:
    # Groups of 1, 2, 3, 8 and 150 members (more than one block), one empty, in any order; some rewards missing.
    group_ids = torch.repeat_interleave(torch.arange(6), torch.tensor([1, 2, 3, 0, 8, 150])).to(DEVICE)
    group_ids = group_ids[torch.randperm(len(group_ids))]
    rewards = torch.randn(len(group_ids), device=DEVICE).to(dtype)
    rewards[torch.randperm(len(rewards))[:20]] = NAN
    order, offsets = grouped(group_ids)
    given = rewards[~rewards.isnan()].double().std().reshape(1) if scale == "batch" else None
    results = group_advantages_fwd(rewards, order, offsets, baseline=baseline, scale=scale, eps=1e-4, batch_std=given)
    low = torch.float64 if dtype == torch.float64 else torch.float32
    exact = expected(rewards, group_ids, baseline, scale, 1e-4, torch.float64)
    plain = expected(rewards, group_ids, baseline, scale, 1e-4, low)
    for name, result, right, eager in zip(("advantages", "mean", "std"), results, exact, plain, strict=False):
        assert result.dtype == low
        assert_as_accurate(name, result, right, eager)
    assert torch.equal(results[3], exact[3])
    assert bool((results[0][rewards.isnan()] == 0).all())


@pytest.mark.parametrize("value", [0.1, 1e-3, 1 / 3, 1e6 + 0.1, -0.7])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 300])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_rewards_are_exactly_zero(value: float, n: int, scale: str) -> None:
    """n times 0.1 has a float mean that is not 0.1; divided by eps it would be an advantage."""
    rewards = torch.full((n,), value, device=DEVICE)
    result, mean, std, count = group_advantages_fwd(
        rewards, torch.arange(n, device=DEVICE), torch.tensor([0, n], device=DEVICE), scale=scale, eps=0.0
    )
    assert bool((result == 0).all())
    assert float(std) == 0
    assert int(count) == n
    assert torch.allclose(mean, rewards[:1], rtol=3e-7)


def test_zero_batch_std_with_eps() -> None:
    rewards = torch.ones(4, device=DEVICE)
    order, offsets = torch.arange(4, device=DEVICE), torch.tensor([0, 2, 4], device=DEVICE)
    zero = torch.zeros(1, device=DEVICE)
    result, *_ = group_advantages_fwd(rewards, order, offsets, scale="batch", batch_std=zero)
    assert bool((result == 0).all())


def test_large_offset_keeps_the_spread() -> None:
    """Rewards around 1e6: the mean's own rounding must not enter mean or variance."""
    rewards = 1e6 + torch.tensor([0.0, 0.25, 0.5, 1.0, 0.75, 0.125, 0.0, 2.0], device=DEVICE)
    ids = torch.zeros(8, dtype=torch.int64, device=DEVICE)
    result, _, std, _ = group_advantages_fwd(rewards, *grouped(ids))
    exact, _, exact_std, _ = expected(rewards, ids, "group_mean", "group", 1e-4, torch.float64)
    assert torch.allclose(result.double(), exact, rtol=1e-6, atol=1e-6)
    assert torch.allclose(std.double(), exact_std, rtol=1e-6)


def test_missing_rewards() -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, NAN, NAN, 5.0, NAN], device=DEVICE)
    order, offsets = torch.arange(7, device=DEVICE), torch.tensor([0, 3, 5, 7], device=DEVICE)
    result, mean, std, count = group_advantages_fwd(rewards, order, offsets, eps=0.0)
    half = 0.5**0.5
    assert torch.allclose(result.cpu(), torch.tensor([-half, 0, half, 0, 0, 0, 0]))
    assert mean.tolist() == [2.0, 0.0, 5.0]
    assert torch.allclose(std.cpu(), torch.tensor([2.0**0.5, 0.0, 0.0]))
    assert count.tolist() == [2, 0, 1]


@pytest.mark.parametrize("values", [[INF, INF], [INF, 1.0], [-INF, INF], [-INF, -INF]], ids=str)
def test_infinite_rewards_stay_visible(values: list[float]) -> None:
    rewards = torch.tensor([*values, 1.0, 2.0], device=DEVICE)
    result, *_ = group_advantages_fwd(rewards, torch.arange(4, device=DEVICE), torch.tensor([0, 2, 4], device=DEVICE))
    assert bool(result[:2].isnan().any())
    assert bool(result[2:].isfinite().all())


def test_leave_one_out_is_the_mean_of_the_others() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 9.0], device=DEVICE)
    order, offsets = torch.arange(4, device=DEVICE), torch.tensor([0, 4], device=DEVICE)
    result, *_ = group_advantages_fwd(rewards, order, offsets, baseline="leave_one_out", scale="none")
    others = (rewards.sum() - rewards) / 3
    assert torch.allclose(result, rewards - others)


def test_strided_rewards_and_int32_indices(seed: int) -> None:
    rewards = torch.randn(12, 2, device=DEVICE)
    order, offsets = torch.randperm(12, device=DEVICE), torch.tensor([0, 5, 12], device=DEVICE)
    wanted = group_advantages_fwd(rewards[:, 1].contiguous(), order, offsets)
    result = group_advantages_fwd(rewards[:, 1], order.int(), offsets.int())
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


def test_a_group_depends_on_nothing_but_itself(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(module, "TILE", Tile(16, 1))
    rewards = torch.randn(100, device=DEVICE)
    order = torch.arange(100, device=DEVICE)
    result, mean, _, _ = group_advantages_fwd(rewards, order, torch.tensor([0, 37, 100], device=DEVICE))
    alone, alone_mean, _, _ = group_advantages_fwd(
        rewards[37:], torch.arange(63, device=DEVICE), torch.tensor([0, 63], device=DEVICE)
    )
    assert torch.equal(result[37:], alone)
    assert torch.equal(mean[1:], alone_mean)


def test_no_groups() -> None:
    empty = torch.zeros(0, device=DEVICE)
    results = group_advantages_fwd(empty, empty.long(), torch.zeros(1, dtype=torch.int64, device=DEVICE))
    assert [tuple(x.shape) for x in results] == [(0,)] * 4


def test_unknown_options_are_refused() -> None:
    arguments = (torch.zeros(2), torch.arange(2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="\"leave_one_out\", got 'loo'"):
        group_advantages_fwd(*arguments, baseline="loo")
    with pytest.raises(ValueError, match='"batch" or "none", got \'std\''):
        group_advantages_fwd(*arguments, scale="std")
    with pytest.raises(ValueError, match="batch_std must be given"):
        group_advantages_fwd(*arguments, scale="batch")
    with pytest.raises(ValueError, match="batch_std must be given"):
        group_advantages_fwd(*arguments, batch_std=torch.ones(1))
