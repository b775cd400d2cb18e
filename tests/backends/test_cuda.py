"""The CUDA row kernels: their arithmetic on a CPU against float64, what nvcc makes of them, and how they run.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import json
import math
import re
import stat
import sys
from pathlib import Path
from typing import Any

import cluster_rows
import pytest
import torch
from cluster_rows import Plan, cut, plan_of, run
from oracle import assert_as_accurate
from row_oracle import SETTINGS, assert_same_bits, extended, with_gradient
from torch import Tensor
from vocabulary_cases import patterns

import fastrl
from fastrl import PolicyLoss, checks, reference
from fastrl.backends import build, choice, cpu, cuda
from fastrl.ops import policy_logits

ON_CPU, WHY_NOT_ON_CPU = cpu.cpu_available()
needs_compiler = pytest.mark.skipif(not ON_CPU, reason=WHY_NOT_ON_CPU)
NO_NVCC = cuda.missing()
needs_nvcc = pytest.mark.skipif(NO_NVCC is not None, reason=str(NO_NVCC))

DTYPES = cpu.DTYPES
NAMES = ("logprobs", "entropy", "logsumexp", "gradient")
TABLE = Path(__file__).parents[1] / "data" / "cuda_resources.json"
RESIDENT_VOCABULARIES = (32_000, 50_257, 128_256, 151_936, 152_064, 248_320, 262_144)


def draw_grads(n: int, dtype: torch.dtype, weights: tuple[float, float, float] = (1.0, 0.5, 0.3)) -> Any:
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return tuple(w * torch.randn(n, dtype=real) for w in weights)


def judge(
    x: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.3),
    plan: Plan | None = None,
) -> None:
    """Assert that outputs and gradient are as accurate as eager code in the dtype of the results."""
    grads = draw_grads(x.shape[0], x.dtype, weights)
    found = run(x, labels, grads, inv_temperature, logit_scale=logit_scale, softcap=softcap, plan=plan)
    scaling = (inv_temperature, logit_scale, softcap)
    if x.dtype == torch.float64:
        exact = extended(x, labels, grads, scaling)
    else:
        exact = with_gradient(x.double(), labels, grads, torch.float64, scaling)
    plain = with_gradient(x, labels, grads, found[0].dtype, scaling)
    results = (*found[:3], found[4])
    for name, got, want, usual in zip(NAMES, results, (*exact[0], exact[1]), (*plain[0], plain[1]), strict=True):
        assert_as_accurate(f"{name} V={x.shape[1]} {plan}", got, want, usual)


# --- the arithmetic, on a CPU -----------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("temperature", "logit_scale", "softcap"), SETTINGS)
def test_as_accurate_as_eager(
    seed: int, dtype: torch.dtype, temperature: float, logit_scale: float, softcap: float
) -> None:
    for vocabulary in (1, 2, 7, 16, 65, 1000, 1025, 5003):
        for spread in (1.0, 8.0):
            x = (spread * torch.randn(16, vocabulary)).to(dtype)
            judge(x, torch.randint(0, vocabulary, (16,)), 1.0 / temperature, logit_scale, softcap)


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cluster", [1, 2, 3, 8])
def test_a_row_split_over_the_blocks_of_a_cluster(seed: int, dtype: torch.dtype, cluster: int) -> None:
    """Any number of blocks and threads, blocks without an entry among them; the label in each of the blocks."""
    for vocabulary in (3, 61, 1000):
        plan = cut(vocabulary, dtype, cluster, threads=64)
        labels = torch.arange(0, vocabulary, max(1, plan.slice // 3))
        x = (torch.randn(labels.numel(), vocabulary) * 4).to(dtype)
        judge(x, labels, 0.8, plan=plan)
        judge(x, labels, 0.8, 1.0, 6.0, plan=plan)


@needs_compiler
def test_a_whole_vocabulary(seed: int) -> None:
    """The plan of a real vocabulary: eight blocks of 256 threads, the last one with a ragged end."""
    for dtype in (torch.bfloat16, torch.float32):
        x = (torch.randn(2, 151_937) * 3).to(dtype)
        assert plan_of(151_937, dtype)[:2] == ((8, 256) if dtype == torch.bfloat16 else (8, 512))
        judge(x, torch.tensor([5, 151_936]))


@needs_compiler
@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_gradient_alone(seed: int, weights: tuple[float, float, float]) -> None:
    for spread in (0.1, 3.0, 20.0):
        x = spread * torch.randn(16, 2001)
        for labels in (torch.randint(0, 2001, (16,)), x.argmax(-1)):
            judge(x, labels, weights=weights)


@needs_compiler
def test_temperature_per_row(seed: int) -> None:
    inverse = torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0, 100.0])
    judge(torch.randn(6, 700), torch.randint(0, 700, (6,)), inverse)


@needs_compiler
@pytest.mark.parametrize("offset", [1e4, 1e6, -1e6])
def test_common_offset(seed: int, offset: float) -> None:
    judge(torch.randn(8, 3001) * 4 + offset, torch.randint(0, 3001, (8,)), plan=cut(3001, torch.float32, 4))


@needs_compiler
@pytest.mark.parametrize("gap", [10.0, 17.0, 25.0, 40.0, 80.0])
def test_probability_near_one_keeps_relative_precision(gap: float) -> None:
    for vocabulary, label in ((33, 0), (3000, 2999), (3000, 1)):
        x = torch.zeros(1, vocabulary)
        x[0, label] = gap
        labels, zero, one = torch.tensor([label]), torch.zeros(1), torch.ones(1)
        others = (vocabulary - 1) * math.exp(-gap)
        entropy = math.log1p(others) + gap * others / (1.0 + others)
        plan = cut(vocabulary, torch.float32, 4)
        found = run(x, labels, (one, zero, zero), plan=plan)
        assert found[0].item() == pytest.approx(-math.log1p(others), rel=1e-6)
        assert found[1].item() == pytest.approx(entropy, rel=1e-6)
        assert found[4][0, label].item() == pytest.approx(others / (1.0 + others), rel=1e-6)
        assert found[4].double().sum().item() == pytest.approx(0.0, abs=1e-6 * others)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tanh_and_its_slope(dtype: torch.dtype) -> None:
    a = torch.cat([torch.linspace(-12, 12, 4001), torch.logspace(-30, 0, 301), torch.tensor([math.inf, -math.inf])])
    a = a.to(dtype)
    tanh, slope = torch.empty_like(a), torch.empty_like(a)
    cluster_rows.module().tanh_and_slopes(a, tanh, slope)
    z = a.double()
    eps = torch.finfo(dtype).eps
    assert bool(((tanh.double() - z.tanh()).abs() <= 3 * eps * z.tanh().abs()).all())
    # cosh overflows only where the slope is below float64's smallest number.
    exact = torch.where(z.abs() < 300, 1 / z.cosh() ** 2, 0.0)
    assert bool(((slope.double() - exact).abs() <= 40 * eps * exact).all())


# --- inputs that hurt -------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("vocabulary", [4, 1030])
@pytest.mark.parametrize("name", patterns(4))
def test_hard_rows(seed: int, name: str, vocabulary: int) -> None:
    x, labels = patterns(vocabulary)[name]
    for dtype in (torch.float32, torch.bfloat16):
        for cluster in (1, 4):
            # Where log p = -inf, its own gradient is not judged.
            weights = (0.0, 0.5, 0.3) if name == "target_banned" else (1.0, 0.5, 0.3)
            judge(x.to(dtype), labels, weights=weights, plan=cut(vocabulary, dtype, cluster))
    found = run(x, labels, draw_grads(4, torch.float32))
    assert not found[4][x.isneginf() & (torch.arange(vocabulary) != labels[:, None])].any()


@needs_compiler
def test_nan_and_infinity_stay_visible(seed: int) -> None:
    for vocabulary, cluster in ((1, 1), (5, 2), (600, 4)):
        plan = cut(vocabulary, torch.float32, cluster)
        for value in (math.nan, math.inf):
            for place in {0, vocabulary // 2, vocabulary - 1}:
                for start in (0, vocabulary // 2, vocabulary):  # finite, -inf in the first half, -inf throughout
                    x = torch.randn(1, vocabulary)
                    x[0, :start] = -math.inf
                    x[0, place] = value
                    for result in run(x, torch.tensor([vocabulary - 1]), (torch.ones(1),) * 3, plan=plan):
                        assert result.isnan().all(), (vocabulary, value, place, start)
        banned = torch.full((1, vocabulary), -math.inf)
        for result in run(banned, torch.tensor([0]), (torch.ones(1),) * 3, plan=plan):
            assert result.isnan().all()


@needs_compiler
def test_infinite_logits_under_a_softcap(seed: int) -> None:
    x = torch.randn(4, 200) * 20
    x[0, 3], x[1, 5:90], x[2], x[3] = math.inf, -math.inf, -math.inf, math.inf
    judge(x, torch.tensor([3, 5, 7, 9]), softcap=20.0, plan=cut(200, torch.float32, 2))


@needs_compiler
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_cannot_matter(seed: int, poison: float) -> None:
    x, labels = torch.randn(9, 130), torch.randint(0, 130, (9,))
    labels[[0, 4, 8]] = -100
    ignored = labels == -100
    grads, inverse = draw_grads(9, torch.float32), torch.ones(9)
    clean = run(x, labels, grads, inverse)
    x[ignored] = poison
    for column in (*grads, inverse):
        column[ignored] = poison
    for before, after in zip(clean, run(x, labels, grads, inverse), strict=True):
        assert not after[ignored].any()
        assert_same_bits(before, after)


@needs_compiler
def test_rows_that_are_zero_or_nan(seed: int) -> None:
    x, ones = torch.randn(3, 50), torch.ones(3)
    poisoned = x.clone()
    poisoned[1, 7] = math.nan
    upstream = torch.tensor([1.0, 0.0, 0.0])
    gradient = run(poisoned, torch.tensor([1, 2, 3]), (upstream,) * 3)[4]
    assert gradient[0].all()
    assert not gradient[1:].any()  # selected, not multiplied by NaN
    good = run(x, torch.tensor([1, 2, 3]), (ones,) * 3)
    for label in (-1, -101, 50, 10**12):
        found = run(x, torch.tensor([1, label, 3]), (ones,) * 3)
        for want, got in zip(good, found, strict=True):
            assert got[1].isnan().all()
            assert_same_bits(got[[0, 2]], want[[0, 2]])
    for inverse in (0.0, -1.0, math.nan, math.inf):
        for result in run(x, torch.tensor([1, 2, 3]), (ones,) * 3, torch.tensor([inverse, 1.0, 1.0])):
            assert result[0].isnan().all()
            assert result[1:].isfinite().all()
    assert run(x, torch.tensor([3, 0, 3]), (ones,) * 3, ignore_index=3)[4].any(1).tolist() == [False, True, False]


# --- the row alone decides its bits, whatever its address -------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("vocabulary", "cluster"), [(1, 1), (3, 1), (61, 2), (1003, 4)])
def test_any_address_gives_the_same_bits(seed: int, dtype: torch.dtype, vocabulary: int, cluster: int) -> None:
    """Logits and gradient at every distance from a 16-byte boundary, NaN around every row, nothing written outside."""
    n, plan, per_vector = 3, cut(vocabulary, dtype, cluster), 16 // dtype.itemsize
    x, labels = (torch.randn(n, vocabulary) * 4).to(dtype), torch.randint(0, vocabulary, (n,))
    grads = draw_grads(n, dtype)
    options = {"softcap": 7.0, "plan": plan}
    wanted = run(x, labels, grads, 1.3, **options)
    width = -(-vocabulary // per_vector) * per_vector + 2 * per_vector
    for shift in range(per_vector):
        for out_shift in {0, 1 % per_vector, shift}:
            padded = torch.full((n, width), math.nan, dtype=dtype)
            room = torch.full((n, width), 7.0, dtype=dtype)
            padded[:, shift : shift + vocabulary] = x
            place = room[:, out_shift : out_shift + vocabulary]
            for want, got in zip(
                wanted,
                run(padded[:, shift : shift + vocabulary], labels, grads, 1.3, out=place, **options),
                strict=True,
            ):
                assert_same_bits(got, want)
            assert bool((room[:, :out_shift] == 7.0).all())
            assert bool((room[:, out_shift + vocabulary :] == 7.0).all())


@needs_compiler
def test_low_precision_conversions_match_torch() -> None:
    """Every 16-bit pattern reads as torch reads it; gradients round to the nearest, ties to even."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        zero, labels = torch.zeros(2**16), torch.zeros(2**16, dtype=torch.int64)
        logsumexp = run(x, labels, (zero, zero, zero), plan=cut(1, dtype, 1))[2]  # of one entry: the logit
        expected = x[:, 0].float()
        expected[expected.isinf()] = math.nan
        assert torch.equal(logsumexp.nan_to_num(7.0), expected.nan_to_num(7.0))
        upstream = torch.cat([torch.randn(400) * 10.0**k for k in range(-9, 5)])
        flat, zero = torch.zeros(upstream.numel(), 32, dtype=dtype), torch.zeros(upstream.numel())
        gradient = run(flat, torch.zeros(upstream.numel(), dtype=torch.int64), (zero, zero, upstream))[4]
        assert_same_bits(gradient[:, 1:], (upstream / 32).to(dtype)[:, None].expand(-1, 31))


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_hold_every_row(dtype: torch.dtype) -> None:
    for vocabulary in (1, 2, 7, 8, 9, 255, 1000, 24_576, 24_577, *RESIDENT_VOCABULARIES, 900_000, 2**21, 2**30):
        plan = plan_of(vocabulary, dtype)
        assert plan.cluster in (1, 2, 4, 8)
        assert plan.threads in (128, 256, 512)
        assert plan.slice * dtype.itemsize % 16 == 0
        # Every entry has a block, and no block begins more than a vector per rank behind the end.
        assert plan.slice * plan.cluster >= vocabulary
        assert plan.slice * (plan.cluster - 1) < vocabulary or vocabulary * dtype.itemsize < 128 * plan.cluster
        assert plan.shared_bytes == plan.slice * dtype.itemsize + 16
        assert bool(plan.resident) == (plan.shared_bytes <= 224 * 1024)
        if vocabulary in RESIDENT_VOCABULARIES and dtype != torch.float64:
            assert plan.resident
    assert not plan_of(2**21, torch.bfloat16).resident


# --- the whole path, with loops in place of the compiled module -------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_public_function(seed: int, dtype: torch.dtype) -> None:
    """Labels of two dimensions, a temperature per token, strides, and no gradient for one of the outputs."""
    x = torch.randn(3, 5, 701).to(dtype)[:, :-1]
    labels, temperature = torch.randint(0, 701, (3, 4), dtype=torch.int32), torch.rand(3, 4) + 0.5
    labels[1, 2] = -100

    def outputs_and_gradient(logits: Tensor, backend: str) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        outputs = fastrl.token_logprobs(leaf, labels, temperature=temperature, softcap=9.0, backend=backend)
        (outputs.logprobs.sum() - 0.3 * outputs.entropy.sum()).backward()
        assert leaf.grad is not None
        return (*(x.detach() for x in outputs), leaf.grad)

    with cluster_rows.on_the_host() as host:
        found = outputs_and_gradient(x, "cuda")
    # The rows of x are not one matrix, but three.
    assert host.calls == ["token_logprobs_fwd"] * 3 + ["token_logprobs_bwd"] * 3
    exact, plain = outputs_and_gradient(x.double(), "torch"), outputs_and_gradient(x, "torch")
    for name, got, want, usual in zip(NAMES, found, exact, plain, strict=True):
        assert_as_accurate(name, got, want, usual)
    assert not found[3][1, 2].any()


@needs_compiler
def test_one_kernel_gives_the_bits_of_two(seed: int) -> None:
    x, labels, grads = torch.randn(6, 900) * 3, torch.randint(0, 900, (6,)), draw_grads(6, torch.float32)
    labels[0], labels[1] = -100, 900
    with cluster_rows.on_the_host() as host:
        for upstream in (grads, (grads[0], None, None), (None, grads[1], None)):
            joined, split = on_device(x, labels, upstream, 0.8, softcap=11.0)
            for one, other in zip(joined, split, strict=True):
                assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0))
        assert "token_logprobs_fwd_bwd" in host.calls
        host.calls.clear()
        # A row that no cluster holds goes through both.
        cuda.token_logprobs_fwd_bwd(torch.randn(1, 2**20).bfloat16(), torch.tensor([7]), 1.0, torch.ones(1))
        assert host.calls == ["row_is_resident", "token_logprobs_fwd", "token_logprobs_bwd"]
        in_place = x.clone()
        _, gradient = cuda.token_logprobs_fwd_bwd(in_place, labels, 0.8, *grads, out=in_place)
        assert gradient is in_place
        wanted = cuda.token_logprobs_fwd_bwd(x, labels, 0.8, *grads)[1]
        assert torch.equal(gradient.nan_to_num(7.0), wanted.nan_to_num(7.0))


LOSSES = {
    "nll": PolicyLoss(surrogate="nll"),
    "reinforce, entropy": PolicyLoss(surrogate="reinforce", entropy_coef=0.1),
    "clip": PolicyLoss(dual_clip=3.0),
    "importance, in place": PolicyLoss(surrogate="importance"),
    "cispo": PolicyLoss.preset("cispo"),
    "sapo": PolicyLoss(surrogate="sapo"),
    "square": PolicyLoss(surrogate="square"),
}


@needs_compiler
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("on_policy", [True, False])
def test_losses_whose_gradient_is_known_take_one_kernel(seed: int, name: str, on_policy: bool) -> None:
    x, labels = torch.randn(3, 7, 300) * 2, torch.randint(0, 300, (3, 7))
    mask = torch.rand(3, 7) < 0.8
    inputs: dict[str, Any] = {"advantages": torch.randn(3), "mask": mask}
    old = fastrl.token_logprobs(x, labels).logprobs + 0.3 * torch.randn(3, 7)

    def outputs_and_gradient(logits: Tensor, backend: str) -> tuple[Tensor, ...]:
        leaf = logits.detach().requires_grad_()
        given = inputs if on_policy else inputs | {"old_logprobs": old.to(logits.dtype)}
        given = given | {"advantages": given["advantages"].to(logits.dtype)}
        # The output of an operation: its memory may be written over.
        output = LOSSES[name].from_logits(leaf * 1.0, labels, backend=backend, inplace="place" in name, **given)
        output.loss.backward()
        assert leaf.grad is not None
        assert output.entropy is not None
        return output.loss.detach(), output.logprobs, output.entropy, leaf.grad

    with cluster_rows.on_the_host() as host:
        found = outputs_and_gradient(x, "cuda")
    known = on_policy or LOSSES[name].surrogate in ("nll", "reinforce")
    one, two = ["row_is_resident", "token_logprobs_fwd_bwd"], ["token_logprobs_fwd", "token_logprobs_bwd"]
    assert host.calls == (one if known else two)
    exact, plain = outputs_and_gradient(x.double(), "torch"), outputs_and_gradient(x, "torch")
    names = ("logprobs", "entropy", "gradient")
    for part, got, want, usual in zip(names, found[1:], exact[1:], plain[1:], strict=True):
        assert_as_accurate(part, got, want, usual)
    # The loss is one number, whose rounding may cancel by luck: it is judged on the log-probs that were found.
    losses = []
    for dtype in (torch.float64, torch.float32):
        columns = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
        if not on_policy:
            columns["old_logprobs"] = old.to(dtype)
        losses.append(LOSSES[name](found[1].to(dtype), entropy=found[2].to(dtype), **columns).loss)
    assert_as_accurate("loss", found[0], *losses)


def test_known_gradients_do_not_depend_on_the_log_prob(seed: int) -> None:
    empty = dict.fromkeys(reference.TokenColumns._fields)
    given = {"advantages": torch.randn(50), "weights": torch.rand(50), "positive": torch.rand(50) < 0.5}
    columns = reference.TokenColumns(**{**empty, **given})
    for surrogate in (*policy_logits.LINEAR, *policy_logits.FUNCTIONS_OF_THE_RATIO):
        spec = PolicyLoss(surrogate=surrogate)
        assert policy_logits.gradient_is_known(spec, columns)
        found = [
            policy_logits._terms_and_coefficients(spec, logprobs, logprobs, columns)[1]
            for logprobs in (torch.zeros(50), -8.0 * torch.rand(50))
        ]
        assert torch.equal(*found), surrogate
    anchored = columns._replace(anchor=torch.zeros(50))
    assert policy_logits.gradient_is_known(PolicyLoss(surrogate="nll"), anchored)
    assert not policy_logits.gradient_is_known(PolicyLoss(), anchored)
    assert not policy_logits.gradient_is_known(PolicyLoss(surrogate="dft"), columns)
    assert not policy_logits.gradient_is_known(PolicyLoss(kl="k3", kl_coef=0.1), columns)


# --- the choice of the backend ----------------------------------------------------------------------------------------


def test_it_is_refused_where_it_cannot_run() -> None:
    cpu = torch.device("cpu")
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used: it needs tensors on a CUDA device, got cpu"):
        fastrl.token_logprobs(torch.randn(2, 5), torch.tensor([0, 1]), backend="cuda")
    with pytest.raises(RuntimeError, match="has no row statistics"):
        choice.choose_row_statistics("cuda", cpu)
    assert choice.explain("cpu", "cuda")["token_logprobs"].startswith("refused: backend 'cuda' cannot be used")


@pytest.mark.parametrize(
    ("hip", "capability", "message"),
    [
        (None, (8, 0), "it needs compute capability 9.0 (H100, H200), cuda:0 has 8.0"),
        (None, (10, 0), "cuda:0 has 10.0"),
        ("7.0", (9, 4), "this PyTorch is built for ROCm"),
    ],
)
def test_other_devices_are_refused(
    hip: str | None, capability: tuple[int, int], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    available, reason = cuda.cuda_available(torch.device("cuda:0"))
    assert not available
    assert message in reason
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot be used"):
        choice.choose("cuda", torch.device("cuda:0"))


def test_auto_never_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choice.choose("auto", torch.device("cuda:0")).backend == "triton"
    monkeypatch.setattr(choice, "triton_available", lambda device: (False, "not installed"))
    assert choice.choose("auto", torch.device("cuda:0")).backend == "torch"


# --- the build --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the cache folder of a process that has not tried to build yet."""
    monkeypatch.setattr(cuda, "MODULE", build.KernelModule(cuda.cuda_library))
    monkeypatch.setenv("FASTRL_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def nvcc_that(folder: Path, body: str) -> str:
    """Return a CUDA_HOME whose nvcc is a shell script."""
    path = folder / "bin" / "nvcc"
    path.parent.mkdir()
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(folder)


VERSION = 'if [ "$1" = --version ]; then echo "release {}, V"; exit 0; fi\n'


@pytest.mark.parametrize(
    ("nvcc", "message"),
    [
        (VERSION.format("11.8"), "is 11.8; CUDA 12.0 or later is needed"),
        ("exit 3", "does not run: "),
        (VERSION.format("13.0") + "echo 'x.cu(1): error: out of luck' >&2; exit 1", "failed: x.cu(1): error: out of"),
    ],
    ids=["old", "broken", "refuses the source"],
)
@needs_compiler
def test_a_failed_build_is_said_in_one_line(
    tmp_path: Path, cache: Path, nvcc: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", nvcc_that(tmp_path, nvcc))
    for _ in range(2):  # remembered
        with pytest.raises(RuntimeError) as raised:
            cuda.cuda_module()
        assert message in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not list(cache.glob("*.so"))


@needs_compiler
def test_what_is_missing_is_said_in_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "nvcc", lambda: None)
    with pytest.raises(RuntimeError, match=r"nvcc was not found \(install the CUDA toolkit, 12.0 or later, or set"):
        cuda.cuda_module()
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="apache-tvm-ffi is not installed"):
        cuda.cuda_library()
    monkeypatch.setattr(cuda.sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="the CUDA kernels are built on Linux only; use backend='triton'"):
        cuda.cuda_library()


@needs_nvcc
def test_unwritable_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTRL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=r"cannot write the CUDA build to .* \(set FASTRL_CACHE_DIR\)"):
        cuda.cuda_module()


KERNEL = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
    r"ptxas info +: Used (\d+) registers(?:.*?, (\d+) bytes smem)?",
    re.DOTALL,
)
DTYPE_OF_TYPE = {"f": "float32", "d": "float64", "NS0_8BFloat16E": "bfloat16", "NS0_7Float16E": "float16"}


def kernel_name(symbol: str) -> str:
    """Return the readable name of a mangled kernel: function, dtype and flags."""
    found = re.search(r"(row_kernel|gradient_kernel)I(f|d|NS0_8BFloat16E|NS0_7Float16E)Lb([01])E(?:Lb([01])E)?", symbol)
    assert found is not None, symbol
    function, kind, softcap, gradient = found.groups()
    flags = [" softcap"] * (softcap == "1") + [" gradient"] * (gradient == "1")
    return f"{function} {DTYPE_OF_TYPE[kind]}{''.join(flags)}"


def resources(report: str) -> dict[str, dict[str, int]]:
    """Return registers, spilled bytes and static shared bytes of each kernel, from ptxas's report."""
    found = {}
    for symbol, target, stack, stores, loads, registers, shared in KERNEL.findall(report):
        assert target == "sm_90a"
        found[kernel_name(symbol)] = {
            "registers": int(registers),
            "spills": int(stack) + int(stores) + int(loads),
            "shared": int(shared or 0),
        }
    return found


@pytest.fixture(scope="module")
def compiled() -> dict[str, Any]:
    """Compile for sm_90a, or take what was compiled before from the same sources with the same nvcc."""
    report = cuda.report_of(cuda.cuda_library()).read_text()
    version = re.search(r"release ([\d.]+)", cuda._version(str(cuda.nvcc())))
    assert version is not None
    return {"nvcc": version[1], "resources": resources(report)}


@needs_nvcc
@pytest.mark.slow
def test_nothing_spills(compiled: dict[str, Any]) -> None:
    # Forward and forward with gradient, and the gradient alone: four dtypes, with and without a softcap.
    assert len(compiled["resources"]) == 24
    assert not [name for name, value in compiled["resources"].items() if value["spills"]]


@needs_nvcc
@pytest.mark.slow
def test_blocks_fit_a_multiprocessor(compiled: dict[str, Any]) -> None:
    """What the plan counts on: 65,536 registers and 227 KiB of shared memory, at 256 threads and 48 KiB four blocks."""
    for name, value in compiled["resources"].items():
        most = 65_536 // (4 * 256) if "float64" not in name else 65_536 // 512
        assert value["registers"] <= most, name
        assert value["shared"] + 224 * 1024 <= 227 * 1024, name


@needs_nvcc
@pytest.mark.slow
def test_resources_are_those_of_the_table(compiled: dict[str, Any]) -> None:
    """Registers and shared memory change only together with the table: python -m tests.backends.test_cuda --write."""
    table = json.loads(TABLE.read_text())
    if table["nvcc"] != compiled["nvcc"]:
        pytest.skip(f"the table is of nvcc {table['nvcc']}, this is {compiled['nvcc']}")
    assert compiled["resources"] == table["resources"]


@needs_nvcc
@pytest.mark.slow
def test_the_library_loads_without_a_device() -> None:
    module = cuda.cuda_module()
    assert module.row_is_resident(151_936, 2)
    assert not module.row_is_resident(2**21, 2)
    assert {file.suffix for file in cuda._sources()} == {".cu", ".cuh", ".h"}


# --- on a device ------------------------------------------------------------------------------------------------------


@pytest.fixture
def device() -> torch.device:
    place = torch.device("cuda")
    available, reason = cuda.cuda_available(place, build=True)
    if not available:
        pytest.skip(reason)
    return place


def on_device(
    x: Tensor, labels: Tensor, grads: tuple[Tensor, ...], inverse: float | Tensor = 1.0, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Return (logprobs, entropy, logsumexp, residual, gradient) in one kernel, and in two."""
    n, dtype = x.shape[0], checks.wide(x.dtype)
    residuals = [torch.full((n,), math.nan, dtype=dtype, device=x.device) for _ in range(2)]
    results, gradient = cuda.token_logprobs_fwd_bwd(x, labels, inverse, *grads, residual=residuals[0], **options)
    outputs = cuda.token_logprobs_fwd(x, labels, inverse, residual=residuals[1], **options)
    later = cuda.token_logprobs_bwd(x, labels, inverse, *outputs, *grads, residual=residuals[1], **options)
    return [*results, residuals[0], gradient], [*outputs, residuals[1], later]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("temperature", "logit_scale", "softcap"), SETTINGS)
def test_the_device_is_as_accurate_as_eager(
    seed: int, device: torch.device, dtype: torch.dtype, temperature: float, logit_scale: float, softcap: float
) -> None:
    for vocabulary in (1, 2, 7, 65, 1000, 5003, 50_257, 151_936):
        x, labels = (4 * torch.randn(16, vocabulary)).to(dtype), torch.randint(0, vocabulary, (16,))
        grads, scaling = draw_grads(16, dtype), (1.0 / temperature, logit_scale, softcap)
        given = (x.to(device), labels.to(device), tuple(g.to(device) for g in grads), scaling[0])
        joined, split = on_device(*given, logit_scale=logit_scale, softcap=softcap)
        for one, other in zip(joined, split, strict=True):
            assert_same_bits(one.cpu(), other.cpu())
        if dtype == torch.float64:
            exact = extended(x, labels, grads, scaling)
        else:
            exact = with_gradient(x.double(), labels, grads, torch.float64, scaling)
        plain = with_gradient(x, labels, grads, joined[0].dtype, scaling)
        results = (*joined[:3], joined[4])
        for name, got, want, usual in zip(NAMES, results, (*exact[0], exact[1]), (*plain[0], plain[1]), strict=True):
            assert_as_accurate(f"{name} V={vocabulary}", got.cpu(), want, usual)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [4, 1030, 60_000])
@pytest.mark.parametrize("name", patterns(4))
def test_hard_rows_on_a_device(seed: int, device: torch.device, name: str, vocabulary: int) -> None:
    x, labels = patterns(vocabulary)[name]
    weights = (0.0, 0.5, 0.3) if name == "target_banned" else (1.0, 0.5, 0.3)
    grads = draw_grads(4, torch.float32, weights)
    joined, _ = on_device(x.to(device), labels.to(device), tuple(g.to(device) for g in grads))
    exact = with_gradient(x.double(), labels, grads, torch.float64, (1.0, 1.0, 0.0))
    plain = with_gradient(x, labels, grads, torch.float32, (1.0, 1.0, 0.0))
    results = (*joined[:3], joined[4])
    for part, got, want, usual in zip(NAMES, results, (*exact[0], exact[1]), (*plain[0], plain[1]), strict=True):
        assert_as_accurate(part, got.cpu(), want, usual)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bits_on_a_device(seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """A repeat, another order, every alignment, in place, ignored and invalid rows: the same bits for the same row."""
    n, vocabulary = 300, 50_257
    x = (torch.randn(n, vocabulary, device=device) * 3).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), device=device)
    labels[::7], labels[5], x[9, 11] = -100, vocabulary, math.nan
    grads = tuple(torch.randn(n, device=device) for _ in range(3))
    wanted, _ = on_device(x, labels, grads, 0.9)
    order = torch.randperm(n, device=device)
    for index in (torch.arange(n, device=device), order, torch.arange(5, 20, device=device)):
        for shift in range(0, 16 // dtype.itemsize):
            padded = torch.full((index.numel(), vocabulary + 23), math.nan, dtype=dtype, device=device)
            padded[:, shift : shift + vocabulary] = x[index]
            view = padded[:, shift : shift + vocabulary]
            given = (labels[index], tuple(g[index] for g in grads), 0.9)
            parts = [*on_device(view, *given)]
            cuda.token_logprobs_fwd_bwd(view, given[0], given[2], *given[1], out=view)
            parts.append([*parts[0][:4], view])
            for part in parts:
                for got, want in zip(part, wanted, strict=True):
                    assert torch.equal(got.nan_to_num(7.0), want[index].nan_to_num(7.0))
            assert bool(padded[:, :shift].isnan().all())
            assert bool(padded[:, shift + vocabulary :].isnan().all())


@pytest.mark.gpu
def test_through_the_public_function_on_a_device(seed: int, device: torch.device) -> None:
    x, labels = torch.randn(4, 9, 1003, device=device), torch.randint(0, 1003, (4, 9), device=device)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for leaf, backend in zip(leaves, ("cuda", "torch"), strict=True):
        outputs = fastrl.token_logprobs(leaf, labels, temperature=0.7, softcap=20.0, backend=backend)
        (outputs.logprobs.sum() + 0.1 * outputs.entropy.sum()).backward()
    exact = x.double().requires_grad_()
    outputs = fastrl.token_logprobs(exact, labels, temperature=0.7, softcap=20.0, backend="torch")
    (outputs.logprobs.sum() + 0.1 * outputs.entropy.sum()).backward()
    assert_as_accurate("gradient", *(leaf.grad.cpu() for leaf in (leaves[0], exact, leaves[1])))


@pytest.mark.gpu
def test_more_rows_and_elements_than_32_bits_on_a_device(seed: int, device: torch.device) -> None:
    n, v = 65_537, 32_769
    x = torch.zeros(n, v, dtype=torch.bfloat16, device=device)
    x[-2:] = torch.randn(2, v, device=device).to(torch.bfloat16)
    labels = torch.full((n,), -100, device=device)
    labels[-2:] = torch.tensor([5, v - 1], device=device)
    grads = tuple(torch.randn(3, n, device=device).unbind(0))
    for found in on_device(x, labels, grads):
        wanted, _ = on_device(x[-2:].clone(), labels[-2:], tuple(g[-2:] for g in grads))
        assert all(torch.equal(a[-2:], b) for a, b in zip(found, wanted, strict=True))
        assert not found[4][:-2].any()


def main() -> None:
    """Compile, and replace the table of resources."""
    assert sys.argv[1:] == ["--write"], "usage: python -m tests.backends.test_cuda --write"
    report = cuda.report_of(cuda.cuda_library()).read_text()
    version = re.search(r"release ([\d.]+)", cuda._version(str(cuda.nvcc())))
    assert version is not None
    lines = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(resources(report).items()))
    TABLE.write_text(f'{{\n  "nvcc": {json.dumps(version[1])},\n  "resources": {{\n{lines}\n  }}\n}}\n')


if __name__ == "__main__":
    main()
