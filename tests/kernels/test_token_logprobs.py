"""Triton row kernels against float64: forward and backward, in the interpreter where there is no device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE, LANE
from oracle import assert_as_accurate
from row_oracle import extended
from row_placements import placements
from torch import Tensor

from fastrl_kernels import rowmath, token_logprobs
from fastrl_kernels.launch import COMPILE_OPTIONS, Tile, interpreting, on_device_of, tile_for
from fastrl_kernels.token_logprobs import token_logprobs_bwd, token_logprobs_fwd

pytestmark = [*LANE, pytest.mark.usefixtures("poisoned")]
IGNORE = -100
NAN, INF = float("nan"), float("inf")
# One element, below, at and above a power of two, a prime, more than one block of the forward (2048) and the backward.
VOCABULARIES = [1, 2, 7, 31, 127, 128, 129, 1000, 1023, 1024, 1025, 4099]
# Options are (logit_scale, softcap).
OPTIONS = {"plain": (1.0, 0.0), "softcap": (1.0, 15.0), "scaled": (0.35, 0.0), "all": (-1.7, 20.0)}


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Walk rows in blocks of 32, so that short rows have many blocks and a tail."""
    table = {size: ((2**31, Tile(32, 1)),) for size in (2, 4, 8)}
    monkeypatch.setattr(token_logprobs, "FWD_TILES", table)
    monkeypatch.setattr(token_logprobs, "BWD_TILES", table)


def result_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def eager(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,), all in the vocabulary
    inverse: float | Tensor,
    upstream: tuple[Tensor | None, ...],
    dtype: torch.dtype,
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Return (logprobs, entropy, logsumexp, gradient) in plain PyTorch at `dtype`."""
    x = logits.detach().to(dtype).requires_grad_()
    z = x * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    z = z * (inverse.to(dtype).unsqueeze(-1) if isinstance(inverse, Tensor) else inverse)
    logps = z.log_softmax(-1)
    p = logps.exp()
    outputs = (
        logps.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1),
        -(p * torch.where(p > 0, logps, 0.0)).sum(-1),
        z.logsumexp(-1),
    )
    total = sum(((a * b.to(dtype)).sum() for a, b in zip(outputs, upstream, strict=True) if b is not None), x.sum() * 0)
    (gradient,) = torch.autograd.grad(total, x)
    return *(y.detach() for y in outputs), gradient.detach()


def kernel(
    logits: Tensor,
    labels: Tensor,
    inverse: float | Tensor,
    upstream: tuple[Tensor | None, ...],
    scale: float = 1.0,
    softcap: float = 0.0,
    out: Tensor | None = None,
    with_residual: bool = True,
) -> tuple[Tensor, ...]:
    """Return (logprobs, entropy, logsumexp, gradient) of the kernels; the gradient unrounded unless `out` is given."""
    options: dict[str, Any] = {"logit_scale": scale, "softcap": softcap, "ignore_index": IGNORE}
    options["residual"] = (
        torch.empty(len(labels), dtype=result_dtype(logits), device=logits.device) if with_residual else None
    )
    outputs = token_logprobs_fwd(logits, labels, inverse, **options)
    if out is None:
        out = torch.empty(logits.shape, dtype=result_dtype(logits), device=logits.device)
    gradient = token_logprobs_bwd(logits, labels, inverse, *outputs, *upstream, out=out, **options)
    return *outputs, gradient


def judge(
    logits: Tensor,
    labels: Tensor,
    inverse: float | Tensor,
    upstream: tuple[Tensor | None, ...],
    scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[Tensor, ...]:
    """Assert that the kernels are as accurate as eager code at their precision; returns the kernels' results."""
    results = kernel(logits, labels, inverse, upstream, scale, softcap)
    if logits.dtype == torch.float64:  # float64 cannot judge itself
        grads = tuple((torch.zeros(len(labels)) if g is None else g).cpu() for g in upstream)
        place = inverse.cpu() if isinstance(inverse, Tensor) else inverse
        outputs, gradient = extended(logits.cpu(), labels.long().cpu(), grads, (place, scale, softcap))
        exact = tuple(x.to(logits.device) for x in (*outputs, gradient))
    else:
        exact = eager(logits, labels, inverse, upstream, torch.float64, scale, softcap)
    plain = eager(logits, labels, inverse, upstream, result_dtype(logits), scale, softcap)
    names = ("logprobs", "entropy", "logsumexp", "gradient")
    for name, result, right, low in zip(names, results, exact, plain, strict=True):
        assert result.dtype == result_dtype(logits)
        assert_as_accurate(name, result, right, low)
    return results


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 `x` as a kernel stores it: to nearest, but Triton's interpreter cuts bfloat16 off."""
    if interpreting() and dtype == torch.bfloat16:
        return (x.view(torch.int32) & ~0xFFFF).view(torch.float32).to(dtype)
    return x.to(dtype)


def make(n: int, v: int, dtype: torch.dtype = torch.float32, spread: float = 4.0) -> tuple[Tensor, Tensor, Any]:
    """Return (logits (N, V), labels (N,), upstream (3 of (N,)))."""
    logits = (torch.randn(n, v, device=DEVICE) * spread).to(dtype)
    labels = torch.randint(0, v, (n,), device=DEVICE)
    upstream = tuple(torch.randn(3, n, device=DEVICE, dtype=result_dtype(logits)).unbind(0))
    return logits, labels, upstream


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("v", VOCABULARIES)
def test_float32_is_as_accurate_as_eager(v: int, option: str, seed: int) -> None:
    judge(*make(4, v)[:2], 1 / 0.7, make(4, v)[2], *OPTIONS[option])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("v", [1, 129, 2049])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes_are_as_accurate_as_eager(v: int, dtype: torch.dtype, option: str, seed: int) -> None:
    logits, labels, upstream = make(3, v, dtype)
    *_, gradient = judge(logits, labels, 1 / 1.3, upstream, *OPTIONS[option])
    *_, rounded = kernel(logits, labels, 1 / 1.3, upstream, *OPTIONS[option], out=torch.empty_like(logits))
    assert rounded.dtype == dtype
    assert torch.equal(rounded, stored(gradient, dtype))


@pytest.mark.parametrize("v", [31, 32, 33, 95, 97])
@pytest.mark.parametrize("position", ["first", "last", "middle"])
@pytest.mark.usefixtures("small_blocks")
def test_many_blocks(v: int, position: str, seed: int) -> None:
    logits, labels, upstream = make(3, v)
    labels.fill_({"first": 0, "last": v - 1, "middle": v // 2}[position])
    # A rising row raises the running max in every block.
    logits[0] = torch.linspace(-20, 20, v)
    logits[1] = torch.linspace(20, -20, v)
    judge(logits, labels, 1.0, upstream, 1.0, 0.0)
    judge(logits, labels, 1.0, upstream, -0.5, 30.0)


def test_int32_labels(seed: int) -> None:
    logits, labels, upstream = make(3, 50)
    assert all(
        torch.equal(a, b)
        for a, b in zip(kernel(logits, labels, 1.0, upstream), kernel(logits, labels.int(), 1.0, upstream), strict=True)
    )


@pytest.mark.usefixtures("small_blocks")
def test_minus_infinity_entries(seed: int) -> None:
    v = 100
    logits, labels, upstream = make(6, v)
    labels[:] = 70
    logits[0, :40] = -INF  # the first block
    logits[1, 80:] = -INF  # the last block and the tail
    logits[2, torch.arange(v, device=DEVICE) != 70] = -INF  # everything but the label
    logits[3, ::2] = -INF
    logits[3, 70] = 1.0
    logits[4, 70] = -INF  # the label itself
    logits[5, :64] = -INF  # two whole blocks
    results = kernel(logits, labels, 0.8, upstream)
    logps = (logits.double() * 0.8).log_softmax(-1)
    p = logps.exp()
    finite = torch.where(p > 0, logps, 0.0)
    entropy = -(p * finite).sum(-1)
    g, h, k = (x.double().unsqueeze(-1) for x in upstream)
    onehot = torch.nn.functional.one_hot(labels, v)
    gradient = (g * (onehot - p) - h * p * (finite + entropy.unsqueeze(-1)) + k * p) * 0.8
    exact = (logps[:, 70], entropy, (logits.double() * 0.8).logsumexp(-1), gradient)
    plain = tuple(x.float() for x in exact)
    for name, result, right, low in zip(("logp", "entropy", "lse", "gradient"), results, exact, plain, strict=True):
        assert_as_accurate(name, result, right, low)
    assert bool((results[3][logits.isneginf() & (onehot == 0)] == 0).all())
    assert results[0][4] == -INF
    assert results[0][2] == 0
    assert results[1][2] == 0


def test_rows_that_are_not_a_distribution(seed: int) -> None:
    logits, labels, upstream = make(6, 60)
    labels[:] = 7
    logits[0] = -INF
    logits[1, 3] = INF
    logits[2, 7] = INF
    logits[3, 50] = NAN
    logits[4, 7] = NAN
    results = kernel(logits, labels, 1.0, upstream)
    for result in results:
        assert bool(result[:5].isnan().all())
        assert bool(result[5].isfinite().all())


def test_row_of_the_lowest_finite_number() -> None:
    """Masking with finfo.min instead of -inf leaves a uniform row, as in eager code."""
    logits = torch.full((1, 40), torch.finfo(torch.float32).min, device=DEVICE)
    labels = torch.tensor([5], device=DEVICE)
    logp, entropy, _ = token_logprobs_fwd(logits, labels, 1.0)
    assert torch.allclose(logp.cpu(), -torch.tensor([40.0]).log())
    assert torch.allclose(entropy.cpu(), torch.tensor([40.0]).log())


@pytest.mark.parametrize("offset", [1e4, 1e6, -1e6, 1e7])
@pytest.mark.parametrize("with_residual", [True, False])
def test_common_offset(offset: float, with_residual: bool, seed: int) -> None:
    logits, labels, upstream = make(3, 300)
    logits = (logits * 8).round() / 8 + offset  # what is left after rounding at the offset is the input
    judge(logits, labels, 1.0, upstream)
    exact = eager(logits, labels, 1 / 0.7, upstream, torch.float64)
    plain = eager(logits - offset, labels, 1 / 0.7, upstream, torch.float32)
    results = kernel(logits, labels, 1 / 0.7, upstream, with_residual=with_residual)
    for index, name in ((0, "logprobs"), (1, "entropy"), (3, "gradient")):
        # The eager code is granted the offset taken away: the kernel has to take it away itself.
        granted = 2 * (plain[index].double() - exact[index]).abs().max() + 1e-6 * exact[index].abs().max()
        assert (results[index].double() - exact[index]).abs().max() <= granted, name


@pytest.mark.parametrize("gap", [10.0, 12.0, 16.125, 20.25, 30.0, 60.0])
@pytest.mark.parametrize("with_residual", [True, False])
def test_probability_near_one(gap: float, with_residual: bool) -> None:
    """1 - p keeps its relative precision where p rounds to 1; the gap of 20.25 is 1 - p = 1e-7."""
    logits = torch.zeros(2, 64, device=DEVICE)
    logits[0, 3], logits[1, 40] = gap, 1000.0 + gap
    logits[1] += torch.where(torch.arange(64, device=DEVICE) == 40, 0.0, 1000.0)
    labels = torch.tensor([3, 40], device=DEVICE)
    ones = torch.ones(2, device=DEVICE)
    logp, entropy, _, gradient = kernel(logits, labels, 1.0, (ones, None, None), with_residual=with_residual)
    # In float64, relative to the label: S others of e^(-gap) each.
    odds = 63 * torch.tensor([gap, gap], device=DEVICE).double().neg().exp()
    others = odds / (1 + odds)
    exact_entropy = odds.log1p() + gap * others

    def relative(a: Tensor, b: Tensor) -> float:
        return float(((a.double() - b) / b).abs().max())

    assert relative(logp, -odds.log1p()) < 1e-5
    assert relative(entropy, exact_entropy) < 1e-5
    assert relative(gradient.gather(-1, labels.unsqueeze(-1)).squeeze(-1), others) < 1e-5


def test_gradient_where_another_entry_takes_all() -> None:
    """With both |logp| and |logsumexp| large, only the residual keeps p as accurate as a fresh softmax."""
    logits = torch.randn(8, 200, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    logits[:, 10] = torch.linspace(30.0, 60.0, 8)
    labels = torch.full((8,), 20, device=DEVICE)
    judge(logits, labels, 1.0, (torch.ones(8, device=DEVICE), None, None))


def layouts(logits: Tensor) -> dict[str, Tensor]:
    """Return tensors of the same values with other strides."""
    n, v = logits.shape
    wide = torch.full((n, v + 13), NAN, device=logits.device)
    wide[:, 5 : v + 5] = logits
    sparse = torch.full((n, 2 * v), NAN, device=logits.device)
    sparse[:, ::2] = logits
    every_other = torch.full((2 * n, v), NAN, device=logits.device)
    every_other[::2] = logits
    return {
        "transposed": logits.t().contiguous().t(),
        "columns of a wider tensor": wide[:, 5 : v + 5],
        "vocabulary stride 2": sparse[:, ::2],
        "every other row": every_other[::2],
    }


@pytest.mark.parametrize(
    "layout", ["transposed", "columns of a wider tensor", "vocabulary stride 2", "every other row"]
)
def test_strides(layout: str, seed: int) -> None:
    logits, labels, upstream = make(3, 150)
    strided = layouts(logits)[layout]
    wanted = kernel(logits, labels, 0.9, upstream)
    labels2 = torch.stack((labels, labels + 1), -1)[:, 0]
    assert all(torch.equal(a, b) for a, b in zip(kernel(strided, labels2, 0.9, upstream), wanted, strict=True))
    # The same layout for the result, next to memory that must stay as it is.
    out = layouts(torch.zeros_like(logits))[layout]
    kernel(logits, labels, 0.9, upstream, out=out)
    assert torch.equal(out, wanted[3])
    if layout == "vocabulary stride 2":
        whole = out.as_strided((3, 300), (300, 1))
        assert bool(whole[:, 1::2].isnan().all())


@pytest.mark.parametrize("v", [40, 1000, 5003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_bits_do_not_depend_on_address_and_stride(dtype: torch.dtype, v: int, seed: int) -> None:
    """The ratio of a policy to itself is 1 also where one side's logits are padded and the other side's are not."""
    logits, labels, upstream = make(2, v, dtype)
    wanted = kernel(logits, labels, 0.9, upstream)
    for place, moved in placements(logits):
        results = kernel(moved, labels, 0.9, upstream)
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True)), place


def test_expanded_rows_and_inputs(seed: int) -> None:
    logits, labels, _ = make(4, 40)
    one = logits[:1].expand(4, 40)
    number = torch.tensor(0.3, device=DEVICE)
    expanded = (number.expand(4), number.expand(4), number.expand(4))
    inverse = torch.tensor(0.6, device=DEVICE).expand(4)
    result = kernel(one, labels, inverse, expanded)
    wanted = kernel(one.contiguous(), labels, inverse.contiguous(), tuple(x.contiguous() for x in expanded))
    assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1), (1, 2), ()], ids=str)
def test_absent_gradients(given: tuple[int, ...], seed: int) -> None:
    logits, labels, upstream = make(3, 70)
    some = tuple(x if i in given else None for i, x in enumerate(upstream))
    *_, gradient = judge(logits, labels, 1.1, some, 1.0, 25.0)
    if not given:
        assert bool((gradient == 0).all())


def test_temperature_per_row(seed: int) -> None:
    logits, labels, upstream = make(6, 90)
    inverse = 1 / torch.tensor([0.1, 0.5, 1.0, 1.7, 3.0, 10.0], device=DEVICE)
    together = judge(logits, labels, inverse, upstream, 1.0, 12.0)
    for i in range(6):
        rows = slice(i, i + 1)
        alone = kernel(logits[rows], labels[rows], float(inverse[i]), tuple(x[rows] for x in upstream), 1.0, 12.0)
        assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize("bad", [0.0, -1.0, NAN, INF, -INF])
def test_bad_temperature(bad: float, seed: int) -> None:
    logits, labels, upstream = make(3, 40)
    inverse = torch.tensor([1.0, bad, 2.0], device=DEVICE)
    good = torch.tensor([1.0, 1.5, 2.0], device=DEVICE)
    wanted = kernel(logits, labels, good, upstream)
    for result, right in zip(kernel(logits, labels, inverse, upstream), wanted, strict=True):
        assert bool(result[1].isnan().all())
        assert torch.equal(result[::2], right[::2])
    for result in kernel(logits, labels, bad, upstream):
        assert bool(result.isnan().all())


@pytest.mark.parametrize("with_residual", [True, False])
def test_ignored_rows_cannot_matter(with_residual: bool, seed: int) -> None:
    logits, labels, upstream = make(5, 130)
    ignored = torch.tensor([False, True, False, True, True], device=DEVICE)
    marked = labels.masked_fill(ignored, IGNORE)
    spoilt = logits.clone()
    spoilt[1], spoilt[3], spoilt[4] = NAN, INF, -INF
    dirty = tuple(x.masked_fill(ignored, NAN) for x in upstream)
    inverse = torch.full((5,), 0.8, device=DEVICE).masked_fill(ignored, NAN)
    wanted = kernel(logits, labels, 0.8, upstream, with_residual=with_residual)
    for values, grads, inv in ((logits, upstream, 0.8), (spoilt, dirty, inverse)):
        for result, right in zip(kernel(values, marked, inv, grads, with_residual=with_residual), wanted, strict=True):
            assert bool((result[ignored] == 0).all())
            assert torch.equal(result[~ignored], right[~ignored])


@pytest.mark.parametrize("given", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("with_residual", [True, False])
def test_a_zero_upstream_gradient_selects_zeros(with_residual: bool, given: tuple[int, ...], seed: int) -> None:
    """It does not multiply what stands in the row; a label or a temperature that cannot be stays visible."""
    logits, labels, _ = make(7, 130)
    clean = torch.ones(7, device=DEVICE)
    clean[1:] = 0
    upstream = tuple(clean if i in given else None for i in range(3))
    spoilt = logits.clone()
    spoilt[1, 5], spoilt[2, 6], spoilt[3] = NAN, INF, -INF
    labels[5] = 130
    inverse = torch.ones(7, device=DEVICE)
    inverse[6] = NAN
    in_place = spoilt.clone()
    wanted = kernel(logits, labels, inverse, upstream, with_residual=with_residual)[3]
    for out in (None, in_place):
        values = spoilt if out is None else in_place
        gradient = kernel(values, labels, inverse, upstream, out=out, with_residual=with_residual)[3]
        assert torch.equal(gradient[0], wanted[0])
        assert not gradient[1:5].any()
        assert bool(gradient[5:].isnan().all())


@pytest.mark.parametrize("label", [-1, -99, 40, 41, 2**31 - 1, 2**31, 2**62, -(2**62)])
def test_bad_labels_are_nan_and_never_read(label: int, seed: int) -> None:
    # The logits stand between guards: an entry next to the row would give a finite log-prob.
    guarded = torch.zeros(4, 80, device=DEVICE)
    guarded[:, 20:60] = torch.randn(4, 40, device=DEVICE)
    logits = guarded[:, 20:60]
    labels = torch.tensor([3, label, 5, IGNORE], device=DEVICE)
    upstream = tuple(torch.ones(3, 4, device=DEVICE).unbind(0))
    out = torch.ones(4, 80, device=DEVICE)
    results = kernel(logits, labels, 1.0, upstream, out=out[:, 20:60])
    for result in results:
        assert bool(result[1].isnan().all())
        assert bool(result[[0, 2, 3]].isfinite().all())
    assert bool((out[:, :20] == 1).all())
    assert bool((out[:, 60:] == 1).all())


def test_custom_ignore_index(seed: int) -> None:
    logits, labels, upstream = make(3, 20)
    labels[1] = 11
    labels[0] = -100
    outputs = token_logprobs_fwd(logits, labels, 1.0, ignore_index=11)
    assert all(x[1] == 0 and x[0].isnan() and x[2].isfinite() for x in outputs)
    gradient = token_logprobs_bwd(logits, labels, 1.0, *outputs, *upstream, ignore_index=11)
    assert bool((gradient[1] == 0).all())


def test_empty_batch() -> None:
    logits, labels, upstream = make(0, 17)
    results = kernel(logits, labels, 1.0, upstream)
    assert [tuple(x.shape) for x in results] == [(0,), (0,), (0,), (0, 17)]


class RecordedLaunch:
    """Stands for a kernel and keeps what it was launched with."""

    def __init__(self) -> None:
        self.grid: tuple[int, ...] = ()
        self.arguments: tuple[Any, ...] = ()

    def __getitem__(self, grid: tuple[int, ...]) -> RecordedLaunch:
        self.grid = grid
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        self.arguments = arguments


def test_more_rows_than_the_second_grid_axis_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are on the first axis of the grid, which holds 2^31 - 1; the others hold 65,535."""
    forward, backward = RecordedLaunch(), RecordedLaunch()
    monkeypatch.setattr(token_logprobs, "_token_logprobs_fwd_kernel", forward)
    monkeypatch.setattr(token_logprobs, "_token_logprobs_bwd_kernel", backward)
    logits, labels, upstream = make(65_537, 2)
    kernel(logits, labels, 1.0, upstream)
    assert forward.grid == backward.grid == (65_537,)


@pytest.mark.gpu
def test_more_rows_and_elements_than_32_bits(seed: int) -> None:
    """65,537 rows of 32,769 bfloat16 logits: just above 2^31 elements. The last row is judged."""
    n, v = 65_537, 32_769
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device=DEVICE)
    logits[-2:] = torch.randn(2, v, device=DEVICE).to(torch.bfloat16)
    labels = torch.full((n,), IGNORE, device=DEVICE)
    labels[-2:] = torch.tensor([5, v - 1], device=DEVICE)
    upstream = tuple(torch.randn(3, n, device=DEVICE).unbind(0))
    results = kernel(logits, labels, 1.0, upstream, out=torch.empty_like(logits))
    wanted = kernel(logits[-2:].clone(), labels[-2:], 1.0, tuple(x[-2:] for x in upstream), out=logits[-2:].clone())
    assert all(torch.equal(a[-2:], b) for a, b in zip(results, wanted, strict=True))
    assert bool((results[3][:-2] == 0).all())


@pytest.mark.parametrize("with_residual", [True, False])
def test_in_place_equals_out_of_place(with_residual: bool, seed: int) -> None:
    logits, labels, upstream = make(4, 300, torch.bfloat16)
    *_, wanted = kernel(logits, labels, 0.9, upstream, out=torch.empty_like(logits), with_residual=with_residual)
    *_, result = kernel(logits, labels, 0.9, upstream, out=logits, with_residual=with_residual)
    assert result is logits
    assert torch.equal(result, wanted)


def test_default_result_has_the_layout_of_the_logits(seed: int) -> None:
    logits, labels, upstream = make(4, 30, torch.bfloat16)
    outputs = token_logprobs_fwd(logits.t().contiguous().t(), labels, 1.0)
    gradient = token_logprobs_bwd(logits.t().contiguous().t(), labels, 1.0, *outputs, *upstream)
    assert gradient.dtype == torch.bfloat16
    assert gradient.stride() == (1, 4)
    assert torch.equal(gradient, token_logprobs_bwd(logits, labels, 1.0, *outputs, *upstream))


@pytest.mark.usefixtures("small_blocks")
def test_a_row_depends_on_nothing_but_itself(seed: int) -> None:
    logits, labels, upstream = make(7, 200, torch.bfloat16)
    wanted = kernel(logits, labels, 0.7, upstream)
    assert all(torch.equal(a, b) for a, b in zip(kernel(logits, labels, 0.7, upstream), wanted, strict=True))
    order = torch.randperm(7)
    permuted = kernel(logits[order], labels[order], 0.7, tuple(x[order] for x in upstream))
    assert all(torch.equal(a, b[order]) for a, b in zip(permuted, wanted, strict=True))
    for rows in (slice(0, 1), slice(2, 5), slice(6, 7)):
        part = kernel(logits[rows], labels[rows], 0.7, tuple(x[rows] for x in upstream))
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, wanted, strict=True))


@triton.jit
def _row_functions_kernel(x_ptr, unit_ptr, out_ptr, N, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tanh, slope = rowmath.tanh_and_slope(tl.load(x_ptr + offs))
    unit = tl.load(unit_ptr + offs)
    tl.store(out_ptr + offs, tanh)
    tl.store(out_ptr + N + offs, slope)
    tl.store(out_ptr + 2 * N + offs, rowmath.log1p_unit(unit))
    tl.store(out_ptr + 3 * N + offs, rowmath.one_minus_exp(-2.0 * unit))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_row_functions_keep_relative_precision(dtype: torch.dtype) -> None:
    n = 8192
    x = torch.linspace(-12.0, 12.0, n, dtype=dtype, device=DEVICE)
    unit = torch.logspace(-30, 0, n, dtype=dtype, device=DEVICE)
    out = torch.empty(4, n, dtype=dtype, device=DEVICE)
    with on_device_of(x):
        _row_functions_kernel[(1,)](x, unit, out, n, BLOCK=n, **COMPILE_OPTIONS)
    x64, unit64 = x.double(), unit.double()
    exact = (x64.tanh(), x64.cosh() ** -2, unit64.log1p(), -torch.expm1(-2 * unit64))
    # Roundings granted. The slope's e^(-2|x|) has an exponent of up to 35, whose rounding is 2^4 of the result's.
    for name, result, right, roundings in zip(
        ("tanh", "slope", "log1p", "1 - exp"), out, exact, (2, 24, 4, 4), strict=True
    ):
        error = float(((result.double() - right) / right).abs().max())
        assert error <= roundings * torch.finfo(dtype).eps, f"{name}: {error:.2e}"


def test_tiles_follow_the_vocabulary() -> None:
    for table in (token_logprobs.FWD_TILES, token_logprobs.BWD_TILES):
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            tiles = [tile_for(table, dtype, v) for v in (1, 1024, 1025, 8192, 8193, 262_144)]
            assert all(tile.block & (tile.block - 1) == 0 for tile in tiles)
            assert [tile.block for tile in tiles] == sorted(tile.block for tile in tiles)
