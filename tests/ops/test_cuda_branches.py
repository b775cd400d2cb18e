"""What our code does on a CUDA device beside the kernels, on the stand-in: products, waiting, captures, the bench."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cuda_stand_in import DEVICE, Record, stand_in
from oracle import assert_as_accurate
from torch import Tensor

from bench import gpu, measure, report
from bench.baselines import EAGER, fastrl_contender
from bench.cases import MODELS, Case
from fastrl import PolicyLoss, PreferenceLoss, linear_token_logprobs, token_logprobs, verify
from fastrl.losses.advantages.estimators import otb_advantages
from fastrl.losses.masks import second_moment_mask
from fastrl.ops.row_statistics import linear_row_statistics
from fastrl.ops.sampling import top_k_top_p_allowed
from fastrl.ops.segments import running_sum
from fastrl.verify import checks as verify_checks

pytest.importorskip("triton")
B, T, D, V, C = 4, 6, 8, 50, 8
HALVES = (torch.float16, torch.bfloat16)
LATE = "fastrl/ops/live_rows.py wait"
"""The wait that has work queued behind it."""


@pytest.fixture
def record() -> Iterator[Record]:
    with stand_in() as found:
        yield found


def places(lines: list[str]) -> list[str]:
    """Return "file function" of "file:line function", in order."""
    return [f"{line.split(':')[0]} {line.split()[1]}" for line in lines]


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(B, T, D, generator=generator, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator, device=DEVICE).to(dtype).requires_grad_()
    labels = torch.randint(0, V, (B, T), generator=generator, device=DEVICE)
    mask = torch.rand(B, T, generator=generator, device=DEVICE) < 0.8
    tokens = {"mask": mask, "advantages": torch.randn(B, generator=generator, device=DEVICE)}
    return hidden, weight, labels, tokens | {"old_logprobs": torch.full((B, T), -4.0, device=DEVICE)}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
def test_products_of_a_device_are_as_accurate(record: Record, dtype: torch.dtype, backend: str) -> None:
    """Half-precision heads multiply in their own precision and add in float32, all others in their own."""
    for frozen in (False, True):
        drawn = verify_checks.hidden_inputs(torch.Generator().manual_seed(1), 12, 60, dtype)
        trains = ("hidden",) if frozen else drawn.trains
        upstream = {"logprobs": drawn.upstream["logprobs"]} if frozen else drawn.upstream
        setting = verify.Setting(DEVICE, backend)
        verdict = dataclasses.replace(drawn, trains=trains, upstream=upstream).judge(setting)
        assert verdict.error <= verdict.granted, verdict
    assert set(record.products) == ({(dtype, torch.float32)} if dtype in HALVES else set())


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("frozen", [False, True])
def test_where_the_loss_from_hidden_states_waits(record: Record, name: str, frozen: bool) -> None:
    """Once for the rows that take part and once per block, with work behind; where sequences couple, for lengths."""
    hidden, weight, labels, tokens = batch()
    weight.requires_grad_(not frozen)
    loss = PolicyLoss.preset(name)
    record.waits.clear()
    loss.from_hidden(hidden, weight, labels, chunk_tokens=C, **tokens).loss.backward()
    live = int(tokens["mask"].sum())
    chunks = -(-live // C)
    found = places(record.waits)
    if name == "dapo":
        assert found == [LATE] * (1 + chunks)
    elif frozen:  # the token gradients of the log-probs are kept
        assert found == [LATE]
    else:
        assert found == ["fastrl/losses/policy/fused.py of", LATE, LATE]


def test_where_nothing_waits(record: Record) -> None:
    hidden, weight, labels, tokens = batch()
    logits = (hidden @ weight.t()).detach().requires_grad_()
    record.waits.clear()
    record.made_on_host.clear()
    for name in ("dapo", "gspo", "grpo", "sft"):
        PolicyLoss.preset(name).from_logits(
            logits, labels, ref_logprobs=tokens["old_logprobs"], **tokens
        ).loss.backward()
    outputs = token_logprobs(logits, labels, temperature=0.7)
    (outputs.logprobs + outputs.entropy).sum().backward()
    assert record.waits == []
    assert record.made_on_host == []


def test_other_ways_to_the_head_wait_once(record: Record) -> None:
    hidden, weight, labels, tokens = batch()
    record.waits.clear()
    linear_row_statistics(hidden.detach(), weight.detach(), labels, chunk_tokens=C)
    assert places(record.waits) == [LATE]
    record.waits.clear()
    outputs = linear_token_logprobs(hidden, weight, labels, chunk_tokens=C)
    assert places(record.waits) == [LATE]
    outputs.logprobs.sum().backward()
    assert places(record.waits) == [LATE] * 2
    reference = torch.full((B, T), -4.0, device=DEVICE)
    record.made_on_host.clear()
    loss = PreferenceLoss.preset("sigmoid").from_hidden(
        hidden, weight, labels, tokens["mask"], ref_logprobs=reference, chunk_tokens=C
    )
    loss.loss.backward()
    assert record.made_on_host == []


def test_running_sums_are_deterministic(record: Record) -> None:
    """PyTorch refuses a cumulative sum of floats on CUDA under `use_deterministic_algorithms`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 700, generator=generator)
    for given in (x, x[0], x[:, :0], x.double()):
        exact = given.double().cumsum(-1)
        assert_as_accurate("running sum", running_sum(given), exact, given.cumsum(-1))
    logits = torch.randn(2, 90, generator=generator, device=DEVICE)
    kept = top_k_top_p_allowed(logits, top_k=40, top_p=0.7)
    falling, order = logits.topk(40, -1)
    mass = falling.double().softmax(-1).cumsum(-1)
    wanted = torch.zeros_like(kept).scatter(-1, order, mass - falling.double().softmax(-1) < 0.7)
    assert torch.equal(kept, wanted)
    rollout = -torch.rand(4, 9, generator=generator)
    mask = torch.ones(4, 9, dtype=torch.bool)
    second_moment_mask(rollout + 0.3, rollout, mask, threshold=0.04)
    otb_advantages(torch.ones(4, 9), rollout, torch.full((4, 9), 0.2), mask, group_size=4)
    assert record.nondeterministic == []


def test_hidden_states_are_refused_inside_a_capture(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels, tokens = batch()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        linear_token_logprobs(hidden, weight, labels)
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
        PolicyLoss.preset("dapo").from_hidden(hidden, weight, labels, **tokens)
    token_logprobs(hidden @ weight.t(), labels)


def test_torch_compile_leaves_what_waits_out_of_cuda_graphs() -> None:
    for op in ("linear_token_logprobs", "linear_token_logprobs_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.fastrl, op).default.tags
    assert torch.Tag.cudagraph_unsafe not in torch.ops.fastrl.token_logprobs.default.tags


def test_the_gpu_run_of_the_bench(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step but the tests of the device, and what is made of the results."""
    cases = [Case(name, MODELS["tiny"], 2, 4, torch.bfloat16) for name in ("loss_hidden", "loss_logits")]
    monkeypatch.setattr(gpu, "gpu_cases", lambda: cases)
    monkeypatch.setattr("bench.suite.contenders", lambda: [fastrl_contender(), EAGER])
    monkeypatch.setattr(gpu, "Plan", lambda **_: measure.Plan(repeats=1, warmups=0))
    # The others are the same on every device.
    monkeypatch.setattr(gpu, "EXPERIMENTS", {"gemm": lambda device, _: gpu.gemm_experiment(device, True)})
    made = gpu.run_gpu(tmp_path, parts=("cases", "experiments"), limit_s=1e4)
    assert made["skipped"] == []
    assert [c["status"] for result in made["results"] for c in result["contenders"]] == ["ok"] * 4
    assert not any("failed" in entry for entries in made["experiments"].values() for entry in entries)
    assert made["machine"]["gpu"] == "Stand-in"
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("stand-in-")
    assert "GEMM units" in report.markdown(made)
    assert "Stand-in" in report.terminal(made)


def test_the_tests_of_the_gpu_run_say_what_failed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(command: list[str], **options: Any) -> Any:
        assert command[3:5] == ["-m", "gpu"]
        assert "TRITON_INTERPRET" not in options["env"]
        raise gpu.subprocess.TimeoutExpired(command, 1.0, output=b"a PASSED\nb FAILED\n")

    monkeypatch.setattr(gpu.subprocess, "run", late)
    assert gpu.gpu_tests(1.0) == {"status": "out of time", "limit_s": 1.0, "failed": ["b FAILED"],
                                  "tail": ["a PASSED", "b FAILED"]}  # fmt: skip
    done = SimpleNamespace(returncode=5, stdout="no tests ran", stderr="")
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)
    assert gpu.gpu_tests()["status"] == "failed"
