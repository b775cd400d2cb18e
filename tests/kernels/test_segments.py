"""The kernels over consecutive segments against float64, in the interpreter where there is no device."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from device import DEVICE, LANE
from oracle import assert_as_accurate
from policy_cases import interpreted
from torch import Tensor

from fastrl import reference
from fastrl.losses.advantages import returns
from fastrl.losses.advantages.returns import discounted_returns, gae, td_lambda_returns
from fastrl.losses.policy import PolicyLoss, RolloutCorrection
from fastrl.losses.policy import loss as policy_loss
from fastrl.ops.segments import reverse_scan, segment_sum
from fastrl_kernels import segments
from fastrl_kernels.launch import Tile

pytestmark = [*LANE, pytest.mark.usefixtures("poisoned")]
LENGTHS = {
    "ragged": [0, 1, 7, 1000, 0, 4097, 3],
    "all empty": [0, 0, 0],
    "none": [],
    "one": [130],
}


def kernel_sum(x: Tensor, lengths: Tensor) -> Tensor:
    """Return the kernel's sums, where `x` is."""
    return segment_sum(x.to(DEVICE), lengths.to(DEVICE), backend="triton").to(x.device)


def drawn(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (values with a wide spread, lengths)."""
    lengths = torch.tensor(LENGTHS[name], dtype=torch.int64, device=DEVICE)
    n = sum(LENGTHS[name])
    return (torch.randn(n, device=DEVICE) * torch.logspace(-3, 3, n, device=DEVICE)).to(dtype), lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_sums_and_their_gradient(name: str, dtype: torch.dtype, seed: int) -> None:
    x, lengths = drawn(name, dtype)
    leaf = x.clone().requires_grad_()
    sums = kernel_sum(leaf, lengths)
    parts = x.split(lengths.tolist()) if lengths.numel() else ()
    exact = torch.stack([part.double().sum() for part in parts]) if parts else x.new_zeros(0).double()
    eager = torch.stack([part.sum() for part in parts]) if parts else x.new_zeros(0)
    assert sums.dtype == dtype
    assert_as_accurate("sums", sums, exact, eager)
    upstream = torch.randn_like(sums)
    (grad,) = torch.autograd.grad(sums, leaf, upstream)
    assert torch.equal(grad, upstream.repeat_interleave(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounded_once(dtype: torch.dtype) -> None:
    """Sums of float32 values are the exact ones rounded: 1e8 and 1 cancel without a trace."""
    x = torch.tensor([1e8, 1.0, -1e8, 0.25], dtype=dtype, device=DEVICE)
    assert kernel_sum(x, torch.tensor([4], device=DEVICE)).item() == 1.25


@pytest.mark.parametrize("padding", [1, 63, 1024, 3000])
def test_zeros_behind_the_end_change_no_bit(padding: int, seed: int) -> None:
    rows = [torch.randn(n, device=DEVICE) for n in (0, 1, 900, 1024, 1025)]
    packed = kernel_sum(torch.cat(rows), torch.tensor([len(row) for row in rows], device=DEVICE))
    width = 1025 + padding
    padded = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows]).reshape(-1)
    assert torch.equal(packed, kernel_sum(padded, torch.full((5,), width, device=DEVICE)))


def test_a_segment_depends_on_nothing_but_itself(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(segments, "SUM_TILE", Tile(16, 1))
    x = torch.randn(100, device=DEVICE)
    x[37] = math.nan
    both = kernel_sum(x, torch.tensor([37, 63], device=DEVICE))
    assert torch.equal(both[:1], kernel_sum(x[:37], torch.tensor([37], device=DEVICE)))
    assert both.isnan().tolist() == [False, True]


def test_more_segments_than_a_second_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments are on the first grid axis, which holds 2^31 of them; the others end at 65,535."""
    grids: list[tuple[int, ...]] = []
    kernel = segments._segment_sum_fwd_kernel

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            grids.append(grid)
            return kernel[(3,)]

    monkeypatch.setattr(segments, "_segment_sum_fwd_kernel", Recorded())
    x, offsets = torch.ones(70_000, device=DEVICE), torch.arange(70_001, device=DEVICE)
    sums = segments.segment_sum_fwd(x, offsets)
    assert grids == [(70_000,)]
    assert sums[:3].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.gpu
def test_many_segments_on_a_device() -> None:
    lengths = torch.randint(0, 3, (100_000,), device="cuda")
    x = torch.ones(int(lengths.sum()), device="cuda")
    assert torch.equal(kernel_sum(x, lengths), lengths.float())


def test_offsets_beyond_the_tensor_reach_nothing() -> None:
    """Lengths of a device are not looked at: those that say too much read and write inside the tensors only."""
    x = torch.ones(5, device=DEVICE)
    offsets = torch.tensor([-3, 2, 4_000_000], device=DEVICE)
    assert segments.segment_sum_fwd(x, offsets).tolist() == [2.0, 3.0]
    spread = segments.segment_sum_bwd(torch.tensor([4.0, 9.0], device=DEVICE), offsets, 5)
    assert spread.tolist() == [4.0, 4.0, 9.0, 9.0, 9.0]


def test_strided_values_and_int32_offsets(seed: int) -> None:
    x, offsets = torch.randn(12, 2, device=DEVICE), torch.tensor([0, 5, 12], device=DEVICE)
    wanted = segments.segment_sum_fwd(x[:, 1].contiguous(), offsets)
    assert torch.equal(segments.segment_sum_fwd(x[:, 1], offsets.int()), wanted)


def test_gradients_of_gradients() -> None:
    x = torch.randn(9, dtype=torch.float64, device=DEVICE, requires_grad=True)
    lengths = torch.tensor([2, 0, 4, 3], device=DEVICE)
    assert torch.autograd.gradcheck(lambda y: kernel_sum(y, lengths).square(), x)
    assert torch.autograd.gradgradcheck(lambda y: kernel_sum(y, lengths).square(), x)


def test_ops_have_a_schema_a_fake_and_a_gradient() -> None:
    x = torch.randn(9, requires_grad=True, device=DEVICE)
    offsets = torch.tensor([0, 2, 2, 6, 9], device=DEVICE)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastrl.segment_sum, (x, offsets), test_utils=checks)
    values = torch.randn(4, requires_grad=True, device=DEVICE)
    torch.library.opcheck(torch.ops.fastrl.segment_spread, (values, offsets, 9), test_utils=checks)


def test_named_backends() -> None:
    x, lengths = torch.randn(6), torch.tensor([2, 4])
    for backend in ("auto", "torch"):
        assert torch.equal(segment_sum(x, lengths, backend=backend), reference.segment_sum(x, lengths))
    with pytest.raises(ValueError, match="'auto', 'torch', 'triton', got 'cpu'"):
        segment_sum(x, lengths, backend="cpu")


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "gmpo", "vespo", "luspo", "rloo", "grpo"])
def test_losses_over_sequences_sum_with_the_kernel(name: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With the kernels in place of PyTorch's sums: the same losses, and packed is padded to the bit."""
    correction = RolloutCorrection(level="sequence", high=1.1)
    spec = PolicyLoss.preset(name, style="trl" if name == "rloo" else None, correction=correction, entropy_coef=0.1)
    lengths = [0, 1, 7, 40]
    inside = torch.arange(50) < torch.tensor(lengths).unsqueeze(1)
    logprobs = -torch.rand(4, 50)
    tokens = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + 0.1 * torch.randn(4, 50),
        "ref_logprobs": logprobs + 0.1 * torch.randn(4, 50),
        "rollout_logprobs": logprobs + 0.1 * torch.randn(4, 50),
        "entropy": torch.rand(4, 50),
        "mask": inside & (torch.rand(4, 50) < 0.8),
    }
    advantages = torch.randn(4)

    def evaluate(inputs: dict[str, Tensor], **more: Tensor) -> tuple[Tensor, Tensor]:
        inputs = dict(inputs)
        leaf = inputs.pop("logprobs").clone().requires_grad_()
        loss = spec(leaf, advantages=advantages.to(leaf.dtype), **inputs, **more).loss
        (grad,) = torch.autograd.grad(loss, leaf)
        return loss.detach().reshape(1), grad

    exact = evaluate({k: v.double() if v.is_floating_point() else v for k, v in tokens.items()})
    eager = evaluate(tokens)
    monkeypatch.setattr(policy_loss, "segment_sum_for", lambda _: kernel_sum)
    monkeypatch.setattr(policy_loss, "fused_policy_terms", interpreted)
    padded = evaluate(tokens)
    for part, a, b, c in zip(("loss", "gradient"), padded, exact, eager, strict=True):
        assert_as_accurate(part, a, b, c)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    packed = evaluate({k: v[inside] for k, v in tokens.items()}, cu_seqlens=offsets)
    assert torch.equal(packed[0], padded[0])
    assert torch.equal(packed[1], padded[1][inside])


# --- recurrences ------------------------------------------------------------------------------------------------------


def kernel_scan(b: Tensor, c: Tensor, lengths: Tensor, reach: int = 0) -> Tensor:
    there = (x.to(DEVICE) for x in (b, c, lengths))
    return reverse_scan(*there, reach, backend="triton").to(b.device)


def loop_scan(b: Tensor, c: Tensor, lengths: Tensor) -> Tensor:
    """Return the recurrence element by element, at the dtype of `b`; of float64 at NumPy's widest, rounded."""
    wide = np.longdouble if b.dtype == torch.float64 else np.float32
    x, factors = b.cpu().numpy().astype(wide), c.cpu().numpy().astype(wide)
    begin = 0
    for length in lengths.tolist():
        for t in reversed(range(begin, begin + length - 1)):
            x[t] += factors[t] * x[t + 1]
        begin += length
    return torch.from_numpy(x.astype(np.float64)).to(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("name", LENGTHS)
def test_scan_is_the_recurrence(
    name: str, decay: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(segments, "SCAN_TILE", Tile(64, 4))
    lengths = torch.tensor([min(n, 300) for n in LENGTHS[name]], dtype=torch.int64, device=DEVICE)
    n = int(lengths.sum())
    b = torch.randn(n, device=DEVICE).to(dtype)
    c = torch.full((n,), decay, dtype=dtype, device=DEVICE)
    c[::7] = 0.0
    x = kernel_scan(b, c, lengths)
    assert x.dtype == dtype
    exact = loop_scan(b.double(), c.double(), lengths)
    error = loop_scan(b.float(), c.float(), lengths).double() - exact
    scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_as_accurate("x", x, exact, exact + scale * error)


def test_a_factor_of_zero_keeps_a_nan_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tile and across tiles; a NaN reaches the elements before it, in its segment, up to the zero."""
    monkeypatch.setattr(segments, "SCAN_TILE", Tile(16, 1))
    b, c = torch.ones(100, device=DEVICE), torch.ones(100, device=DEVICE)
    b[[20, 70]] = math.nan
    c[[17, 40]] = 0.0
    x = kernel_scan(b, c, torch.tensor([50, 50], device=DEVICE))
    assert x.isnan().nonzero().squeeze(1).tolist() == [18, 19, 20, *range(50, 71)]
    assert x[:18].tolist() == list(range(18, 0, -1))


@pytest.mark.parametrize("padding", [1, 15, 16, 70])
def test_scan_of_zeros_behind_the_end_changes_no_bit(padding: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(segments, "SCAN_TILE", Tile(32, 1))
    lengths, width = [0, 1, 31, 32, 65], 65 + padding
    inside = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    b = torch.where(inside, torch.randn(5, width), 0.0).to(DEVICE)
    c = torch.rand(5, width, device=DEVICE)
    padded = kernel_scan(b.reshape(-1), c.reshape(-1), torch.full((5,), width, device=DEVICE)).view(5, width)
    packed = kernel_scan(b[inside], c[inside], torch.tensor(lengths, device=DEVICE))
    assert torch.equal(packed, padded[inside])


def test_scan_beyond_the_tensor_reaches_nothing() -> None:
    one = torch.ones(5, device=DEVICE)
    x = segments.reverse_scan_fwd(one, one, torch.tensor([2, 4_000], device=DEVICE))
    assert x[2:].tolist() == [3.0, 2.0, 1.0]
    assert bool(x[:2].isnan().all())


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_advantages_and_returns_with_the_kernel(
    packed: bool, carry: bool, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """What `gae`, the lambda-returns and the discounted returns give with PyTorch's steps, at real and odd lengths."""
    lengths = torch.tensor([0, 1, 7, 1000, 4097] if packed else [70, 70, 70])
    shape = (int(lengths.sum()),) if packed else (3, 70)
    r, v, mask = torch.randn(shape), torch.randn(shape), torch.rand(shape) < 0.7
    lam = torch.rand(len(lengths))
    more = {"cu_seqlens": torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])} if packed else {}

    def evaluate(r: Tensor, v: Tensor, lam: Tensor) -> dict[str, Tensor]:
        options = {"gamma": 0.99, "lam": lam, "carry_over_masked": carry, **more}
        advantages, targets = gae(r, v, mask, whiten=True, **options)
        found = {"advantages": advantages, "returns": targets, "td": td_lambda_returns(r, v, mask, **options)}
        for rule in ("skip", "reset") if not carry else ("through",):
            found[rule] = discounted_returns(r, mask, gamma=0.99, masked=rule, **more)
        return found

    exact, eager = evaluate(r.double(), v.double(), lam.double()), evaluate(r, v, lam)
    monkeypatch.setattr(returns, "reverse_scan", kernel_scan)
    for name, got in evaluate(r, v, lam).items():
        assert_as_accurate(name, got, exact[name], eager[name])
