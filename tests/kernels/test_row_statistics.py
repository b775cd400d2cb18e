"""The Triton kernel of the row statistics, block by block; what it must compute is in test_row_statistics.py."""

from __future__ import annotations

import math

import pytest
import torch
from device import DEVICE, LANE
from oracle import assert_as_accurate
from row_placements import placements
from torch import Tensor

from fastrl_kernels import row_statistics
from fastrl_kernels.launch import Tile, tile_for
from fastrl_kernels.row_statistics import row_statistics_fwd

pytestmark = [*LANE, pytest.mark.usefixtures("poisoned")]
NAN, INF = float("nan"), float("inf")
BLOCK = 32
TILES = row_statistics.TILES


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk rows in blocks of 32, so that short rows have many blocks and a tail."""
    monkeypatch.setattr(row_statistics, "TILES", {size: ((2**31, Tile(BLOCK, 1)),) for size in (2, 4, 8)})


def judge(logits: Tensor, labels: Tensor, inverse: float | Tensor = 1.0, scale: float = 1.0, cap: float = 0.0) -> None:
    """Assert that the kernel is as accurate as eager code at its precision."""
    results = row_statistics_fwd(logits, labels, inverse, logit_scale=scale, softcap=cap)

    def eager(dtype: torch.dtype) -> tuple[Tensor, ...]:
        z = logits.to(dtype) * scale
        if cap:
            z = cap * torch.tanh(z / cap)
        z = z * (inverse.to(dtype).unsqueeze(-1) if isinstance(inverse, Tensor) else inverse)
        hit = z.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1) >= z.amax(-1)
        return hit, (2 * z.log_softmax(-1)).logsumexp(-1), z.argmax(-1), z.mean(-1)

    exact, plain = eager(torch.float64), eager(results[1].dtype)
    assert torch.equal(results[0], exact[0])
    assert torch.equal(results[2], exact[2])
    assert_as_accurate("log sum p^2", results[1], exact[1], plain[1])
    assert_as_accurate("mean", results[3], exact[3], plain[3])


@pytest.mark.parametrize("v", [1, 31, 32, 33, 64, 95, 97])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_many_blocks(v: int, dtype: torch.dtype, seed: int) -> None:
    logits = (torch.randn(5, v, device=DEVICE) * 4).to(dtype)
    # A rising row raises the running max in every block, a falling one only in the first.
    logits[0] = torch.linspace(-20, 20, v)
    logits[1] = torch.linspace(20, -20, v)
    logits[2] = 0.5
    labels = torch.tensor([v - 1, 0, v // 2, v // 3, v - 1], device=DEVICE)
    judge(logits, labels)
    judge(logits, labels.int(), 1 / 0.7, -0.5, 30.0)
    judge(logits, labels, torch.linspace(0.5, 2.0, 5, device=DEVICE), 0.35)


@pytest.mark.parametrize("v", [40, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_address_and_stride(
    dtype: torch.dtype, v: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_statistics, "TILES", TILES)
    logits = (torch.randn(2, v, device=DEVICE) * 4).to(dtype)
    labels = torch.tensor([v - 1, 3], device=DEVICE)
    wanted = row_statistics_fwd(logits, labels, 0.9)
    for place, moved in placements(logits):
        results = row_statistics_fwd(moved, labels, 0.9)
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True)), place


@pytest.mark.parametrize("gap", [0.25, 25.0])
def test_position_of_the_largest(gap: float, seed: int) -> None:
    """The block that raises the max keeps exactly the argmax out of the sums, wherever it stands."""
    v = 2 * BLOCK + 5
    labels = torch.tensor([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK - 1, 2 * BLOCK, v - 1], device=DEVICE)
    logits = torch.randn(1, v, device=DEVICE).clamp(-1, 1).repeat(len(labels), 1)
    logits[torch.arange(len(labels)), labels] = 1.0 + gap
    judge(logits, labels)
    top1, log_sum_squared, argmax, _ = row_statistics_fwd(logits, labels, 1.0)
    assert torch.equal(argmax, labels)
    assert bool(top1.all())
    others = logits.double().scatter(-1, labels.unsqueeze(-1), -INF) - (1.0 + gap)
    exact = (2 * others).exp().sum(-1).log1p() - 2 * others.exp().sum(-1).log1p()
    assert float(((log_sum_squared.double() - exact) / exact).abs().max()) < 1e-5


def test_ties_across_blocks() -> None:
    """The lowest id of equal entries is the argmax, the others stay in the sums."""
    logits = torch.full((3, 100), -3.0, device=DEVICE)
    logits[0, [40, 41, 70, 99]] = 2.0
    logits[1, [31, 32]] = 2.0
    logits[2] = torch.finfo(torch.float32).min
    labels = torch.tensor([99, 30, 77], device=DEVICE)
    top1, log_sum_squared, argmax, _ = row_statistics_fwd(logits, labels, 1.0)
    assert argmax.tolist() == [40, 31, 0]
    assert top1.tolist() == [True, False, True]
    exact = (2 * logits.double().log_softmax(-1)).logsumexp(-1)
    assert_as_accurate("log sum p^2", log_sum_squared, exact, exact.float())


def test_banned_blocks(seed: int) -> None:
    logits = torch.randn(4, 100, device=DEVICE)
    logits[0, :64] = -INF  # two whole blocks before the first entry
    logits[1, 64:] = -INF  # a block and the tail
    logits[2, torch.arange(100, device=DEVICE) != 98] = -INF  # all but one
    logits[3, ::2] = -INF
    judge(logits, torch.tensor([5, 7, 98, 51], device=DEVICE), 0.8)


@pytest.mark.parametrize("v", [1, 40])
@pytest.mark.parametrize("cap", [0.0, 5.0])
def test_rows_that_are_not_a_distribution(v: int, cap: float) -> None:
    """Under a softcap infinities are entries of plus or minus the cap; NaN is NaN, and so is a bad T or label."""
    logits = torch.zeros(7, v, device=DEVICE)
    logits[0, 0], logits[1, -1] = NAN, NAN
    logits[2] = -INF
    logits[3, -1] = INF
    labels = torch.tensor([0, 0, 0, 0, 0, v, -1], device=DEVICE)
    inverse = torch.tensor([1.0, 1.0, 1.0, 1.0, NAN, 1.0, 1.0], device=DEVICE)
    top1, log_sum_squared, argmax, mean = row_statistics_fwd(logits, labels, inverse, softcap=cap)
    finite = [False, False, cap > 0, cap > 0, False, False, False]
    assert log_sum_squared.isfinite().tolist() == finite
    assert mean.isfinite().tolist() == finite
    assert (argmax >= 0).tolist() == finite
    assert not bool(top1[[0, 1, 4, 5, 6]].any())
    if cap:
        assert argmax[2:4].tolist() == [0, v - 1]


def test_ignored_rows_are_not_read() -> None:
    logits = torch.full((2, 70), NAN, device=DEVICE)
    logits[1] = 0.0
    results = row_statistics_fwd(logits, torch.tensor([-1, 3], device=DEVICE), 1.0, ignore_index=-1)
    assert [x[0].item() for x in results] == [False, 0.0, -1, 0.0]
    assert results[0][1].item() is True
    assert results[2][1].item() == 0


def test_strides_and_empty_batches(seed: int) -> None:
    logits = torch.randn(4, 70, device=DEVICE)
    labels = torch.arange(4, device=DEVICE)
    wanted = row_statistics_fwd(logits, labels, 1.3)
    wide = torch.full((4, 150), NAN, device=DEVICE)
    wide[:, 3:143:2] = logits
    spread = labels.repeat_interleave(2)[::2]
    for view in (logits.t().contiguous().t(), wide[:, 3:143:2]):
        results = row_statistics_fwd(view, spread, torch.full((8,), 1.3, device=DEVICE)[::2])
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert [tuple(x.shape) for x in row_statistics_fwd(logits[:0], labels[:0], 1.0)] == [(0,)] * 4


def test_tiles_follow_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        blocks = [tile_for(row_statistics.TILES, dtype, v).block for v in (1, 1024, 1025, 8192, 8193, 262_144)]
        assert blocks == sorted(blocks)
        assert all(math.log2(block).is_integer() for block in blocks)
