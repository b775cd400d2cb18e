"""Row statistics: argmax, its hit, log sum p^2 and the mean logit, of logits and of hidden states."""

from __future__ import annotations

import math
from typing import Any

import golden
import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor
from vocabulary_cases import VOCABULARIES, draw, patterns

from fastrl import reference
from fastrl.checks import checked
from fastrl.ops.row_statistics import RowStatistics, linear_row_statistics, round_logits, row_statistics

BACKENDS = ["torch", "triton"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "everything": {"temperature": 0.7, "logit_scale": -1.3, "softcap": 9.0},
    "cold": {"temperature": 0.05},
}
IGNORED = RowStatistics(torch.tensor(False), torch.tensor(0.0), torch.tensor(-1), torch.tensor(0.0))


def eager(logits: Tensor, labels: Tensor, dtype: torch.dtype, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics in plain PyTorch at `dtype`, of rows that all count."""
    options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    z = reference.scaled_logits(logits.to(dtype), **options)
    target = z.gather(-1, labels.long().unsqueeze(-1)).squeeze(-1)
    return target >= z.amax(-1), (2 * z.log_softmax(-1)).logsumexp(-1), z.argmax(-1), z.mean(-1)


def judge(result: RowStatistics, logits: Tensor, labels: Tensor, **options: Any) -> None:
    """Assert that live rows are as accurate as eager code, and ignored ones exactly what they must be."""
    live = labels != -100
    for value, wanted in zip(result, IGNORED, strict=True):
        assert value.shape == labels.shape
        assert bool((value[~live] == wanted).all())
    options = {k: v[live] if isinstance(v, Tensor) and v.dim() else v for k, v in options.items()}
    exact = eager(logits[live], labels[live], torch.float64, **options)
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    plain = eager(logits[live], labels[live], wide, **options)
    assert result.is_top1.dtype == torch.bool
    assert result.argmax.dtype == torch.int64
    assert torch.equal(result.is_top1[live], exact[0])
    assert torch.equal(result.argmax[live], exact[2])
    for name, value, i in (("log sum p^2", result[1], 1), ("mean", result[3], 3)):
        assert value.dtype == wide
        assert_as_accurate(name, value[live], exact[i], plain[i])


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_as_accurate_as_eager(backend: str, vocabulary: int, option: str) -> None:
    logits, labels = draw(5, vocabulary)
    sign = -1.0 if option == "everything" else 1.0
    labels[0] = (sign * logits[0]).argmax()
    judge(row_statistics(logits, labels, backend=backend, **OPTIONS[option]), logits, labels, **OPTIONS[option])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    logits, labels = draw(5, 1025, dtype)
    judge(row_statistics(logits, labels, backend=backend), logits, labels)


@pytest.mark.parametrize("vocabulary", [2, 129, 1100])
@pytest.mark.parametrize("backend", BACKENDS)
def test_hard_rows(backend: str, vocabulary: int) -> None:
    for name, (logits, labels) in patterns(vocabulary).items():
        result = row_statistics(logits, labels, backend=backend)
        exact, plain = (eager(logits, labels, dtype) for dtype in (torch.float64, torch.float32))
        assert torch.equal(result.is_top1, exact[0]), name
        assert torch.equal(result.argmax, exact[2]), name
        assert_as_accurate(f"{name}: log sum p^2", result.log_sum_squared_probs, exact[1], plain[1])
        assert_as_accurate(f"{name}: mean", result.mean_logits, exact[3], plain[3])


@pytest.mark.parametrize("position", [0, 31, 63])
@pytest.mark.parametrize("backend", BACKENDS)
def test_relative_precision_near_one(backend: str, position: int) -> None:
    """log sum p^2 = log1p(63 e^-2g) - 2 log1p(63 e^-g) of itself, also where every p is 0 or 1 in float32."""
    gaps = torch.tensor([1.0, 8.0, 16.125, 30.0, 60.0])
    for offset in (0.0, 1e6):
        logits = torch.full((5, 64), offset)
        logits[:, position] += gaps
        gap = (logits.double()[:, position] - offset).neg()
        exact = (63 * (2 * gap).exp()).log1p() - 2 * (63 * gap.exp()).log1p()
        result = row_statistics(logits, torch.full((5,), position), backend=backend).log_sum_squared_probs
        assert float(((result.double() - exact) / exact).abs().max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_offset_of_a_million(backend: str) -> None:
    logits, labels = draw(5, 300)
    logits = (logits * 8).round() / 8
    for offset in (1e6, -1e6):
        moved = row_statistics(logits + offset, labels, backend=backend)
        still = row_statistics(logits, labels, backend=backend)
        assert torch.equal(moved.argmax, still.argmax)
        assert torch.equal(moved.log_sum_squared_probs, still.log_sum_squared_probs)
        live = labels != -100
        assert_as_accurate("mean", moved.mean_logits[live], still.mean_logits[live].double() + offset, still[3][live])


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties(backend: str) -> None:
    logits = torch.zeros(4, 1500)
    logits[0, [3, 700, 1400]] = 2.0
    logits[1, [1200, 1499]] = 2.0
    logits[2] = torch.finfo(torch.float32).min
    logits[3, :1499] = -math.inf
    labels = torch.tensor([1400, 1499, 8, 0])
    result = row_statistics(logits, labels, backend=backend)
    assert result.argmax.tolist() == [3, 1200, 0, 1499]
    assert result.is_top1.tolist() == [True, True, True, False]
    exact = (2 * logits.double().log_softmax(-1)).logsumexp(-1)
    assert_as_accurate("log sum p^2", result.log_sum_squared_probs, exact, exact.float())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_softcap_does_not_move_the_argmax(backend: str) -> None:
    """Both entries round to the softcap; the larger one is still the larger one."""
    logits = torch.zeros(2, 9)
    logits[0, [2, 5]] = torch.tensor([500.0, 501.0])
    logits[1] = -math.inf
    result = row_statistics(logits, torch.tensor([2, 4]), softcap=10.0, backend=backend)
    assert result.argmax.tolist() == [5, 0]
    assert result.is_top1.tolist() == [False, True]
    # Under a softcap -inf is the finite number -c, and a row of it is flat.
    assert torch.allclose(result.log_sum_squared_probs[1], -torch.tensor(9.0).log())


@pytest.mark.parametrize("vocabulary", [1, 40])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_a_distribution_are_visible(backend: str, vocabulary: int) -> None:
    logits, labels = torch.zeros(5, vocabulary), torch.zeros(5, dtype=torch.int64)
    logits[0, -1], logits[1, -1], logits[2] = math.nan, math.inf, -math.inf
    inverse = torch.ones(5)
    result = row_statistics(logits, labels, temperature=inverse, backend=backend)
    assert result.log_sum_squared_probs.isnan().tolist() == [True] * 3 + [False] * 2
    assert result.mean_logits.isnan().tolist() == [True] * 3 + [False] * 2
    assert result.argmax.tolist() == [-1, -1, -1, 0, 0]
    assert result.is_top1.tolist() == [False] * 3 + [True] * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_do_not_matter(backend: str) -> None:
    logits, labels = draw(6, 200)
    labels[4] = -100
    dirty = logits.clone()
    dirty[1], dirty[4] = math.nan, math.inf
    clean, same = (row_statistics(x, labels, backend=backend) for x in (logits, dirty))
    assert all(torch.equal(a, b) for a, b in zip(clean, same, strict=True))
    judge(same, logits, labels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_depends_on_nothing_but_itself(backend: str) -> None:
    logits, labels = draw(40, 130)
    whole = row_statistics(logits, labels, backend=backend)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    permuted = row_statistics(logits[order], labels[order], backend=backend)
    assert all(torch.equal(a, b[order]) for a, b in zip(permuted, whole, strict=True))
    for rows in (slice(0, 1), slice(5, 38)):
        part = row_statistics(logits[rows], labels[rows], backend=backend)
        assert all(torch.equal(a, b[rows]) for a, b in zip(part, whole, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_strides_and_a_temperature_per_token(backend: str) -> None:
    logits, labels = draw(12, 60)
    logits, labels = logits.view(3, 4, 60), labels.view(3, 4)
    heat = torch.linspace(0.5, 2.0, 12).view(3, 4)
    wanted = row_statistics(logits, labels, temperature=heat, backend=backend)
    judge(wanted, logits, labels, temperature=heat)
    padded = torch.full((3, 5, 61), math.nan)
    padded[:, :4, :60] = logits
    transposed = logits.transpose(1, 2).contiguous().transpose(1, 2)
    for view in (padded[:, :4, :60], transposed):
        result = row_statistics(view, labels.int(), temperature=heat, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    none = row_statistics(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), backend=backend)
    assert [x.shape for x in none] == [(0,)] * 4
    one = row_statistics(logits[0, 0], labels[0, 0], temperature=float(heat[0, 0]), backend=backend)
    assert [x.shape for x in one] == [()] * 4
    assert one.argmax == wanted.argmax[0, 0]


@pytest.mark.parametrize("source", ["logits", "hidden", "weight", "bias"])
def test_a_backward_pass_raises(source: str) -> None:
    """Alone or beside something differentiable: the gradient is refused, never zero."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"logits": (3, 8), "hidden": (3, 4), "weight": (8, 4), "bias": (8,)}
    leaves = {name: torch.randn(shape, generator=generator) for name, shape in tensors.items()}
    leaf = leaves[source].requires_grad_()
    labels = torch.arange(3)

    def run() -> RowStatistics:
        if source == "logits":
            return row_statistics(leaf * 1.0, labels)
        return linear_row_statistics(leaves["hidden"], leaves["weight"], labels, bias=leaves["bias"])

    result = run()
    assert not result.is_top1.requires_grad
    assert not result.argmax.requires_grad
    for value in (result.log_sum_squared_probs, result.mean_logits):
        with pytest.raises(RuntimeError, match=r"not differentiable.*detach"):
            (value.sum() + leaf.sum()).backward()
    (run().log_sum_squared_probs.detach().sum() + leaf.sum()).backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))
    with torch.no_grad():
        assert not any(x.requires_grad for x in run())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_linear_equals_logits(dtype: torch.dtype, backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    hidden, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 5, 8), (90, 8), (90,)))
    bias[7] = -math.inf
    labels = torch.randint(0, 90, (2, 5), generator=generator)
    labels[0, 2] = -100
    hidden[0, 2] = math.nan
    options: dict[str, Any] = {"temperature": 0.8, "logit_scale": 0.7}
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = hidden.to(wide) @ weight.to(wide).t() + bias.to(wide)
    for chunk_tokens in (4, 64):
        result = linear_row_statistics(
            hidden, weight, labels, bias=bias, chunk_tokens=chunk_tokens, backend=backend, **options
        )
        judge(result, logits, labels, **options)
    empty = linear_row_statistics(hidden, weight, torch.full_like(labels, -100), backend=backend)
    judge(empty, logits, torch.full_like(labels, -100))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", golden.cases("token_logprob") + golden.cases("linear_logprob"), ids=lambda c: c.id)
def test_golden(case: golden.Case, backend: str) -> None:
    inputs = {k: v for k, v in case.leaves(torch.float64).items() if not k.startswith("upstream")}
    inputs = {k: v.detach() for k, v in inputs.items()}
    options = {k: case.hyper[k] for k in ("temperature", "logit_scale", "softcap")}
    labels = inputs.pop("targets")
    if case.family == "token_logprob":
        result = row_statistics(inputs["logits"], labels, backend=backend, **options)
    else:
        result = linear_row_statistics(
            inputs["hidden"], inputs["weight"], labels, bias=inputs.get("bias"), backend=backend, **options
        )
        case.check("log_sum_squared_probs", result.log_sum_squared_probs)
        case.check("mean_logits", result.mean_logits)
        assert torch.equal(result.is_top1, case.outputs["is_top1"] != 0)
        assert torch.equal(result.argmax == labels, case.outputs["is_top1"] != 0)
    exact = case.outputs["exact_log_sum_squared_probs"]
    assert float((result.log_sum_squared_probs - exact).abs().max()) < 1e-12


def test_bad_input_says_expected_and_got() -> None:
    logits, labels = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"backend 'cpu' .* no row statistics"):
        row_statistics(logits, labels, backend="cpu")
    with pytest.raises(ValueError, match="backend must be one of"):
        row_statistics(logits, labels, backend="fast")
    with pytest.raises(ValueError, match=r"labels must have shape \(3,\), got \(2,\)"):
        row_statistics(logits, labels[:2])
    with pytest.raises(ValueError, match=r"labels must be in \[0, V=5\)"):
        row_statistics(logits, labels + 5)
    with pytest.raises(ValueError, match="temperature must be finite and > 0"):
        row_statistics(logits, labels, temperature=0.0)
    with pytest.raises(ValueError, match="V >= 1"):
        row_statistics(logits[:, :0], labels)
    with pytest.raises(TypeError, match="logits must be float32"):
        row_statistics(logits.int(), labels)
    with pytest.raises(ValueError, match=r"weight must be \(V, D=5\), got \(7, 4\)"):
        linear_row_statistics(logits, torch.zeros(7, 4), labels)
    with pytest.raises(ValueError, match="chunk_tokens must be an int >= 1"):
        linear_row_statistics(logits, torch.zeros(7, 5), labels, chunk_tokens=0)
    with checked(), pytest.raises(ValueError, match="labels must be in"):
        row_statistics(logits, labels - 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    logits, labels = draw(4, 30)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for leaf in (logits, logits.clone().requires_grad_()):
        arguments = (leaf, labels, None, 1.0, 1.0, 0.0, -100, backend)
        torch.library.opcheck(torch.ops.fastrl.row_statistics.default, arguments, test_utils=checks)


def test_compiles_into_one_graph() -> None:
    logits, labels = draw(4, 30)

    def step(x: Tensor, y: Tensor) -> Tensor:
        result = row_statistics(x * 2.0, y, backend="torch")
        return result.log_sum_squared_probs.sum() + result.is_top1.sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(logits, labels), step(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_rounded_logits_have_a_straight_through_gradient(dtype: torch.dtype) -> None:
    logits = draw(4, 50)[0].to(dtype)
    logits[0, 0], logits[1, 1], logits[2, 2] = -math.inf, math.nan, 3e4
    leaf = logits.clone().requires_grad_()
    rounded = round_logits(leaf, "bf16")
    assert rounded.dtype == dtype
    assert torch.equal(rounded.nan_to_num(), logits.bfloat16().to(dtype).nan_to_num())
    assert bool(rounded[1, 1].isnan())
    assert rounded[0, 0] == -math.inf
    upstream = torch.rand(4, 50, generator=torch.Generator().manual_seed(0)).to(dtype)
    rounded.backward(upstream)
    # Not rounded itself: a float32 gradient keeps bits that bfloat16 does not have.
    assert torch.equal(leaf.grad, upstream)
    assert round_logits(leaf, "none") is leaf
    with pytest.raises(ValueError, match="rounding must be one of 'none', 'bf16', got 'fp8'"):
        round_logits(leaf, "fp8")
