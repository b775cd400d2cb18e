"""The C++ row kernels: accuracy against float64, bad inputs, bits that depend on the row alone, and the build.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from oracle import assert_as_accurate
from row_oracle import SETTINGS, assert_same_bits, extended, with_gradient
from torch import Tensor

from fastrl.backends import build, cpu

# Skipped where the tools of a build are missing; where they are here, a build that fails is a failure.
AVAILABLE, REASON = cpu.cpu_available()
needs_module = pytest.mark.skipif(not AVAILABLE, reason=REASON)
SUPPORTED = [isa for i, isa in enumerate(cpu.ISAS) if AVAILABLE and cpu.cpu_module().supports_isa(i)]
LOW = (torch.bfloat16, torch.float16)

# One entry, a few lanes, around a register, around a step of four registers, around the blocks, several blocks.
VOCABULARIES = (1, 2, 7, 16, 17, 63, 64, 65, 512, 1000, 1025, 2047, 2048, 5003)


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in SUPPORTED:
        pytest.skip(f"{request.param}: {REASON if not AVAILABLE else 'not on this processor'}")
    monkeypatch.setenv("FASTRL_CPU_ISA", request.param)
    return request.param


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for each other cost more than these small tensors
    yield
    torch.set_num_threads(before)


def judge(
    x: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    weights: tuple[float, float, float] = (1.0, 0.5, 0.3),
) -> None:
    """Assert that outputs and gradient are as accurate as eager code in the dtype of the results."""
    options = {"logit_scale": logit_scale, "softcap": softcap}
    residual = torch.full((x.shape[0],), math.nan, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    outputs = cpu.token_logprobs_fwd(x, labels, inv_temperature, residual=residual, **options)
    grads = tuple(w * torch.randn(x.shape[0], dtype=outputs[0].dtype) for w in weights)
    arguments = (x, labels, inv_temperature, *outputs, *grads)
    gradient = cpu.token_logprobs_bwd(*arguments, **options)
    kept_gradient = cpu.token_logprobs_bwd(*arguments, residual=residual, **options)
    scaling = (inv_temperature, logit_scale, softcap)
    if x.dtype == torch.float64:
        exact, exact_gradient = extended(x, labels, grads, scaling)
    else:
        exact, exact_gradient = with_gradient(x.double(), labels, grads, torch.float64, scaling)
    plain, plain_gradient = with_gradient(x, labels, grads, outputs[0].dtype, scaling)
    for name, got, want, usual in zip(("logprobs", "entropy", "logsumexp"), outputs, exact, plain, strict=True):
        assert got.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
        assert_as_accurate(f"{name} V={x.shape[1]}", got, want, usual)
    assert gradient.dtype == x.dtype
    for name, got in (("gradient", gradient), ("gradient by residual", kept_gradient)):
        assert_as_accurate(f"{name} V={x.shape[1]}", got, exact_gradient, plain_gradient)


def both(x: Tensor, labels: Tensor, grads: tuple[Tensor, ...], inv_temperature: float | Tensor = 1.0) -> list[Tensor]:
    residual = torch.empty(x.shape[0], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    outputs = cpu.token_logprobs_fwd(x, labels, inv_temperature, residual=residual)
    arguments = (x, labels, inv_temperature, *outputs, *grads)
    gradients = (cpu.token_logprobs_bwd(*arguments, residual=kept) for kept in (None, residual))
    return [*outputs, *gradients, residual]


# --- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize(("temperature", "logit_scale", "softcap"), SETTINGS)
def test_as_accurate_as_eager(
    isa: str, seed: int, dtype: torch.dtype, temperature: float, logit_scale: float, softcap: float
) -> None:
    for vocabulary in VOCABULARIES:
        for spread in (1.0, 8.0):
            x = (spread * torch.randn(16, vocabulary)).to(dtype)
            judge(x, torch.randint(0, vocabulary, (16,)), 1.0 / temperature, logit_scale, softcap)


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_each_gradient_alone(isa: str, seed: int, weights: tuple[float, float, float]) -> None:
    for spread in (0.1, 3.0, 20.0):
        for labels in (torch.randint(0, 3001, (16,)), None):
            x = spread * torch.randn(16, 3001)
            judge(x, x.argmax(-1) if labels is None else labels, weights=weights)


def test_temperature_per_row(isa: str, seed: int) -> None:
    for dtype in (torch.float32, torch.float64):
        inverse = torch.tensor([0.1, 0.5, 1.0, 2.0, 10.0, 100.0], dtype=dtype)
        judge(torch.randn(6, 700).to(dtype), torch.randint(0, 700, (6,)), inverse)


@pytest.mark.parametrize("offset", [1e4, 1e6, -1e6])
def test_common_offset(isa: str, seed: int, offset: float) -> None:
    judge(torch.randn(8, 5003) * 4 + offset, torch.randint(0, 5003, (8,)))


def test_low_precision_conversions_match_torch(isa: str) -> None:
    """Every 16-bit pattern reads as torch reads it; gradients round to the nearest, ties to even, as torch rounds."""
    for dtype in LOW:
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        # With V = 1 the log-sum-exp of a row is its logit.
        _, _, logsumexp = cpu.token_logprobs_fwd(patterns[:, None], torch.zeros(2**16, dtype=torch.int64), 1.0)
        expected = patterns.float()
        expected[expected.isinf()] = math.nan
        assert torch.equal(logsumexp.nan_to_num(7.0), expected.nan_to_num(7.0))
        # A constant row of 32 equal entries has the gradient l / 32 everywhere but at the label.
        upstream = torch.cat([torch.randn(4000) * 10.0**k for k in range(-9, 7)])
        x, labels = torch.zeros(upstream.numel(), 32, dtype=dtype), torch.zeros(upstream.numel(), dtype=torch.int64)
        outputs = cpu.token_logprobs_fwd(x, labels, 1.0)
        gradient = cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, None, None, upstream)
        assert_same_bits(gradient[:, 1:], (upstream / 32).to(dtype)[:, None].expand(-1, 31))


@pytest.mark.parametrize("gap", [10.0, 17.0, 25.0, 40.0, 80.0])
def test_probability_near_one_keeps_relative_precision(isa: str, gap: float) -> None:
    for vocabulary, label in ((33, 0), (3000, 2999), (3000, 1)):
        x = torch.zeros(1, vocabulary)
        x[0, label] = gap
        labels = torch.tensor([label])
        outputs = cpu.token_logprobs_fwd(x, labels, 1.0)
        others = (vocabulary - 1) * math.exp(-gap)
        entropy = math.log1p(others) + gap * others / (1.0 + others)
        assert outputs[0].item() == pytest.approx(-math.log1p(others), rel=1e-6)
        assert outputs[1].item() == pytest.approx(entropy, rel=1e-6)
        one = torch.ones(1)
        gradient = cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, one, None, None)
        assert gradient[0, label].item() == pytest.approx(others / (1.0 + others), rel=1e-6)
        assert gradient.double().sum().item() == pytest.approx(0.0, abs=1e-6 * others)
        slope = cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, None, one, None)
        expected = -(entropy - math.log1p(others)) / (1.0 + others)
        assert slope[0, label].item() == pytest.approx(expected, rel=1e-6)


# --- inputs that hurt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["scattered", "first block", "last block", "all but the label", "the label"])
def test_minus_infinity(isa: str, seed: int, where: str) -> None:
    for dtype in cpu.DTYPES:
        x = (torch.randn(6, 7001) * 3).to(dtype)
        labels = torch.randint(4200, 4300, (6,))
        mask = torch.zeros(6, 7001, dtype=torch.bool)
        if where == "scattered":
            mask = torch.rand(6, 7001) < 0.3
        elif where == "first block":
            mask[:, :4097] = True
        elif where == "last block":
            mask[:, 4500:] = True
        elif where == "all but the label":
            mask[:] = True
        mask.scatter_(1, labels[:, None], where == "the label")
        x = x.masked_fill(mask, -math.inf)
        judge(x, labels)
        if where == "the label":
            continue
        for gradient in both(x, labels, (torch.randn(6, dtype=torch.float64).to(x.dtype),) * 3)[3:5]:
            assert not gradient[mask].any()


def test_nan_and_infinity_stay_visible(isa: str, seed: int) -> None:
    ones = (torch.ones(1), torch.ones(1), torch.ones(1))
    for vocabulary in (1, 5, 64, 5000):
        for value in (math.nan, math.inf):
            for position in {0, vocabulary // 2, vocabulary - 1}:
                # Finite throughout, finite after a first half of -inf, and -inf throughout.
                for start in (0, vocabulary // 2, vocabulary):
                    x = torch.randn(1, vocabulary)
                    x[0, :start] = -math.inf
                    x[0, position] = value
                    for result in both(x, torch.tensor([vocabulary - 1]), ones):
                        assert result.isnan().all(), (vocabulary, value, position)
        for result in both(torch.full((1, vocabulary), -math.inf), torch.tensor([0]), ones):
            assert result.isnan().all()


def test_infinite_logits_under_a_softcap(isa: str, seed: int) -> None:
    x = torch.randn(4, 200) * 20
    x[0, 3], x[1, 5:90], x[2], x[3] = math.inf, -math.inf, -math.inf, math.inf
    judge(x, torch.tensor([3, 5, 7, 9]), softcap=20.0)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_ignored_rows_cannot_matter(isa: str, seed: int, poison: float) -> None:
    x, labels = torch.randn(9, 130), torch.randint(0, 130, (9,))
    labels[[0, 4, 8]] = -100
    ignored = labels == -100
    grads = tuple(torch.randn(9) for _ in range(3))
    clean = both(x, labels, grads)
    x[ignored] = poison
    inverse = torch.ones(9)
    for g in (*grads, inverse):
        g[ignored] = poison
    for before, after in zip(clean, both(x, labels, grads, inverse), strict=True):
        assert not after[ignored].any()
        assert_same_bits(before, after)


def test_another_ignore_index(isa: str, seed: int) -> None:
    x, labels = torch.randn(3, 10), torch.tensor([3, 0, 3])
    outputs = cpu.token_logprobs_fwd(x, labels, 1.0, ignore_index=3)
    assert [bool(o) for o in outputs[0]] == [False, True, False]
    gradient = cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, torch.ones(3), None, None, ignore_index=3)
    assert gradient.any(1).tolist() == [False, True, False]


def test_rows_without_a_gradient_are_zero(isa: str, seed: int) -> None:
    """A zero upstream gradient selects zeros: it does not multiply the NaN under it."""
    x, labels = torch.randn(3, 50), torch.tensor([1, 2, 3])
    x[1, 7] = math.nan
    upstream = torch.tensor([1.0, 0.0, 0.0])
    for gradient in both(x, labels, (upstream, upstream, upstream))[3:5]:
        assert gradient[0].all()
        assert not gradient[1:].any()


@pytest.mark.parametrize("label", [-1, -101, 50, 51, 10**12, -(10**12)])
def test_label_outside_the_vocabulary(isa: str, seed: int, label: int) -> None:
    x, labels = torch.randn(3, 50), torch.tensor([1, label, 3])
    grads = (torch.ones(3),) * 3
    good = both(x, torch.tensor([1, 2, 3]), grads)
    for want, got in zip(good, both(x, labels, grads), strict=True):
        assert got[1].isnan().all()
        assert_same_bits(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("inverse", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_bad_temperature(isa: str, seed: int, inverse: float) -> None:
    x, labels, grads = torch.randn(2, 40), torch.tensor([1, 2]), (torch.ones(2),) * 3
    for result in both(x, labels, grads, inverse):
        assert result.isnan().all()
    for result in both(x, labels, grads, torch.tensor([inverse, 1.0])):
        assert result[0].isnan().all()
        assert result[1].isfinite().all()


def test_extreme_logits(isa: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([[largest, -largest, 0.0, 1.0], [-largest, -largest, 0.0, 1.0], [-largest] * 4])
    # Without the log-sum-exp's gradient: autograd's own is wrong in float64 where the log-sum-exp is 1e38.
    judge(x, torch.tensor([0, 3, 1]), weights=(1.0, 0.5, 0.0))
    judge(x / 1e3, torch.tensor([0, 3, 1]), 1e-6, weights=(1.0, 0.5, 0.0))


def test_no_rows(isa: str) -> None:
    empty = torch.empty(0)
    results = both(torch.empty(0, 12), torch.empty(0, dtype=torch.int64), (empty, empty, empty))
    assert [tuple(r.shape) for r in results] == [(0,), (0,), (0,), (0, 12), (0, 12), (0,)]


def test_offsets_beyond_32_bits(isa: str, seed: int) -> None:
    stride = 2**31 + 64
    storage = torch.empty(stride + 100, dtype=torch.bfloat16)  # untouched pages take no memory
    x = storage.as_strided((2, 100), (stride, 1))
    x.copy_(torch.randn(2, 100))
    labels, grads = torch.tensor([3, 4]), (torch.ones(2),) * 3
    for far, near in zip(both(x, labels, grads), both(x.contiguous(), labels, grads), strict=True):
        assert_same_bits(far, near)


# --- the row alone decides its bits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("vocabulary", [3, 61, 1000, 5003])
def test_bits_depend_on_the_row_alone(isa: str, seed: int, dtype: torch.dtype, vocabulary: int) -> None:
    n = 23
    x = (torch.randn(n, vocabulary) * 4).to(dtype)
    labels = torch.randint(0, vocabulary, (n,))
    labels[::2] = x.argmax(-1)[::2]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    grads = tuple(torch.randn(n, dtype=real) for _ in range(3))
    grads[1][::3] = 0.0
    inverse = torch.rand(n) + 0.5
    torch.set_num_threads(1)
    alone = both(x, labels, grads, inverse)

    def check(index: Tensor, logits: Tensor) -> None:
        given = (labels[index], tuple(g[index] for g in grads), inverse[index])
        for want, got in zip(alone, both(logits, *given), strict=True):
            assert_same_bits(got, want[index])

    everything = torch.arange(n)
    for count in (2, 3, 8):
        torch.set_num_threads(count)
        check(everything, x)
    order = torch.randperm(n)
    check(order, x[order])
    for part in everything.split([1, 4, 18]):
        check(part, x[part])
    for shift in (1, 3):  # rows at odd addresses, a padded row stride and NaN around every row
        padded = torch.full((n, vocabulary + 7), math.nan, dtype=dtype)
        padded[:, shift : shift + vocabulary] = x
        check(everything, padded[:, shift : shift + vocabulary])
    check(everything, x.t().contiguous().t())
    check(torch.zeros(5, dtype=torch.int64), x[:1].expand(5, vocabulary))


def test_padding_is_not_written(isa: str, seed: int) -> None:
    for dtype in cpu.DTYPES:
        for vocabulary in (1, 13, 64, 1003):
            buffer = torch.full((4, vocabulary + 9), 7.0, dtype=dtype)
            x, labels = torch.randn(4, vocabulary).to(dtype), torch.zeros(4, dtype=torch.int64)
            outputs = cpu.token_logprobs_fwd(x, labels, 1.0)
            out = buffer[:, 5 : 5 + vocabulary]
            upstream = torch.randn(4)
            given = cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, upstream, None, None, out=out)
            assert given is out
            assert_same_bits(out, cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, upstream, None, None))
            assert bool((buffer[:, :5] == 7.0).all())
            assert bool((buffer[:, 5 + vocabulary :] == 7.0).all())


def test_in_place(isa: str, seed: int) -> None:
    for dtype in cpu.DTYPES:
        for entropy in (torch.randn(6), None):
            x, labels = (torch.randn(6, 2500) * 3).to(dtype), torch.randint(0, 2500, (6,))
            labels[0], labels[1] = -100, 2500
            outputs = cpu.token_logprobs_fwd(x, labels, 1.3, softcap=9.0)
            arguments = (labels, 1.3, *outputs, torch.randn(6), entropy, None)
            apart = cpu.token_logprobs_bwd(x, *arguments, softcap=9.0)
            assert cpu.token_logprobs_bwd(x, *arguments, softcap=9.0, out=x) is x
            assert torch.equal(apart.nan_to_num(7.0), x.nan_to_num(7.0))


def test_inputs_are_left_alone(isa: str, seed: int) -> None:
    x, labels = torch.randn(4, 100).requires_grad_(), torch.randint(0, 100, (4,), dtype=torch.int32)
    grads = (torch.ones(1).expand(4), None, torch.randn(4, 2)[:, 0])
    before = x.detach().clone()
    outputs = cpu.token_logprobs_fwd(x, labels, 1.0)
    gradient = cpu.token_logprobs_bwd(x, labels, 1.0, *outputs, *grads)
    assert_same_bits(x.detach(), before)
    dense = [None if g is None else g.contiguous() for g in grads]
    assert_same_bits(gradient, cpu.token_logprobs_bwd(before, labels.long(), 1.0, *outputs, *dense))


# --- errors -----------------------------------------------------------------------------------------------------------


@needs_module
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logit_scale": 0.0}, "logit_scale"),
        ({"logit_scale": math.nan}, "logit_scale"),
        ({"logit_scale": 1e-35}, "logit_scale"),
        ({"softcap": -1.0}, "softcap"),
        ({"softcap": math.inf}, "softcap"),
    ],
)
def test_scales_out_of_range_are_refused(options: dict[str, float], message: str) -> None:
    """The one check of the wrappers: the public operation lets 1e-35 through, for the other backends."""
    x, labels, ones = torch.randn(3, 8), torch.tensor([0, 1, 2]), torch.ones(3)
    with pytest.raises(ValueError, match=message):
        cpu.token_logprobs_fwd(x, labels, 1.0, **options)
    with pytest.raises(ValueError, match=message):
        cpu.token_logprobs_bwd(x, labels, 1.0, ones, ones, ones, ones, None, None, **options)


def test_the_sources_are_found() -> None:
    assert (build.source_folder() / "cpu" / cpu.SOURCES[0]).is_file()


@needs_module
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTRL_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="baseline, avx2, avx512, got 'sse9'"):
        cpu.token_logprobs_fwd(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), 1.0)


# --- the build --------------------------------------------------------------------------------------------------------

USE = """
import torch
from fastrl.backends import cpu
print(cpu.cpu_available())
try:
    out = cpu.token_logprobs_fwd(torch.zeros(2, 4), torch.tensor([0, 1]), 1.0)
    print("result", out[0].tolist())
except RuntimeError as error:
    print("refused:", error)
print(cpu.cpu_available())
"""


def python(script: str, **environment: str) -> subprocess.Popen[str]:
    env = {k: v for k, v in os.environ.items() if k not in ("CXX", "FASTRL_CPU_ISA")} | environment
    command = [sys.executable, "-c", script]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def output_of(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def wrapper(folder: Path, body: str) -> str:
    """Return the path of a compiler that logs its calls to `log` beside it."""
    path = folder / "cxx"
    path.write_text(f'#!/bin/sh\necho "$@" >> {folder / "log"}\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        ("import os; os.environ['CXX'] = 'no-such-c++'", "no C++ compiler: 'no-such-c++' is not on PATH"),
        ("import sys; sys.modules['tvm_ffi'] = None; import importlib.util as u; real = u.find_spec\n"
         "u.find_spec = lambda name, *a: None if name == 'tvm_ffi' else real(name, *a)",
         "apache-tvm-ffi is not installed (pip install 'fastrl[cpu]')"),
        ("import shutil; real = shutil.which\n"
         "shutil.which = lambda name, *a, **k: None if name == 'ninja' else real(name, *a, **k)",
         "ninja is not on PATH (pip install 'fastrl[cpu]')"),
    ],
    ids=["compiler", "tvm_ffi", "ninja"],
)  # fmt: skip
def test_what_is_missing_is_said_in_one_line(tmp_path: Path, prepare: str, message: str) -> None:
    lines = output_of(python(f"{prepare}\n{USE}", FASTRL_CACHE_DIR=str(tmp_path / "cache"))).splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("(False, ")
    assert lines[1].startswith("refused:")
    assert message in lines[1]
    assert message in lines[0].replace('\\"', '"')
    assert not (tmp_path / "cache").exists()


@needs_module
def test_a_failed_build_is_said_in_one_line(tmp_path: Path) -> None:
    compiler = wrapper(tmp_path, '[ "$1" = --version ] && exec c++ --version; echo "fatal error: out of luck"; exit 1')
    lines = output_of(python(USE, CXX=compiler, FASTRL_CACHE_DIR=str(tmp_path / "cache"))).splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("(True, ")
    assert "refused: building the C++ kernels with" in lines[1]
    assert "out of luck" in lines[1]
    assert lines[2].startswith("(False, ")


@needs_module
def test_unwritable_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    lines = output_of(python(USE, FASTRL_CACHE_DIR=str(tmp_path / "file" / "cache"))).splitlines()
    assert "refused: cannot write the C++ build" in lines[1]
    assert "FASTRL_CACHE_DIR" in lines[1]


@needs_module
@pytest.mark.slow
def test_two_processes_build_once_and_a_third_not_at_all(tmp_path: Path) -> None:
    compiler = wrapper(tmp_path, 'exec c++ "$@" -O0')
    environment = {"CXX": compiler, "XDG_CACHE_HOME": str(tmp_path / "cache"), "FASTRL_CACHE_DIR": ""}
    for text in [output_of(p) for p in [python(USE, **environment), python(USE, **environment)]]:
        assert f"result [{-math.log(4.0):.6f}"[:14] in text, text
    calls = (tmp_path / "log").read_text()
    assert calls.count("-shared") == 1
    assert [p.suffix for p in sorted((tmp_path / "cache" / "fastrl").iterdir())] == [".lock", ".sha256", ".so"]
    assert "result" in output_of(python(USE, **environment))
    assert (tmp_path / "log").read_text().count(" -c ") == calls.count(" -c ")


@needs_module
def test_nothing_is_written_into_the_package() -> None:
    folder = build.source_folder()
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".cc", ".h", ".cu", ".cuh", ".cpp"}
    assert build.cache_folder() not in (folder, *folder.parents)


@needs_module
def test_a_forked_child_can_use_the_kernels() -> None:
    """As with torch alone, the child of a threaded parent must run on one thread; it then gets the same bits."""
    script = """
import os, torch
from fastrl.backends import cpu
torch.set_num_threads(2)
x, y = torch.randn(512, 2000), torch.randint(0, 2000, (512,))
parent = cpu.token_logprobs_fwd(x, y, 1.0)[0] + torch.randn(1000, 1000).exp().sum() * 0
pid = os.fork()
if pid == 0:
    torch.set_num_threads(1)
    os._exit(0 if torch.equal(cpu.token_logprobs_fwd(x, y, 1.0)[0], parent) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert output_of(python(script)).splitlines()[-1] == "0"
