"""`fastrl verify`: right kernels pass, broken ones are found, and a check that did not run never passes."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import cli, verify
from fastrl.backends import choice, cpu, torch_rows
from fastrl.verify import Check, Setting, Verdict, judge
from fastrl.verify import checks as verify_checks

CPU = torch.device("cpu")
HERE = ["torch"] + (["cpu"] if cpu.cpu_available()[0] else [])
# A chunk whose number of live rows is not a multiple of 4 goes through a GEMM that sums the vocabulary carelessly.
FIELDS = {"device", "backend", "operation", "name", "status", "part", "error", "granted", "reason", "seconds"}


def look_at(operation: str, name: str, backend: str = "torch") -> Check:
    """Return the result of one check."""
    setting = Setting(CPU, backend, quick=True)
    (look,) = [look for found, look in verify_checks.OPERATIONS[operation](setting) if found == name]
    return verify.result(Check("cpu", backend, operation, name, verify.PASS), look)


@pytest.mark.parametrize("backend", HERE)
def test_quick_passes(backend: str) -> None:
    checks = list(verify.verify(["cpu"], [backend], quick=True))
    failed = [verify.line(c) for c in checks if c.status != verify.PASS]
    assert failed == []
    assert {c.operation for c in checks} == set(verify_checks.OPERATIONS) - (
        set() if backend == "torch" else {"group_advantages"}
    )
    names = [(c.operation, c.name) for c in checks]
    assert len(names) == len(set(names)) > 40


@pytest.mark.parametrize("backend", HERE)
def test_ragged_rows_of_a_real_vocabulary(backend: str) -> None:
    check = look_at("linear_token_logprobs", "vocabulary 151936, 3 live rows", backend)
    assert check.status == verify.PASS, verify.line(check)


def broken(kernel: Callable[..., Any], change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: change(kernel(*arguments, **options))


def _logprobs_off(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0] * (1 + 1e-5), *outputs[1:])


def _logprobs_far_off(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0] * (1 + 1e-4), *outputs[1:])


def _entropy_off(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs[0], outputs[1] + 1e-4 * (outputs[1] != 0), outputs[2])


def _gradient_off(gradient: Tensor) -> Tensor:
    return gradient.mul_(1 + 1e-4)


@pytest.mark.parametrize(
    ("kernel", "change", "operation", "name", "part"),
    [
        ("token_logprobs_fwd", _logprobs_off, "token_logprobs", "float32", "logprobs"),
        ("token_logprobs_fwd", _entropy_off, "token_logprobs", "half of the entries -inf", None),
        ("token_logprobs_fwd", _logprobs_far_off, "token_logprobs", "1 - p down to 1e-12, relative", None),
        ("token_logprobs_fwd", _logprobs_off, "linear_token_logprobs", "float16", "logprobs"),
        ("token_logprobs_bwd", _gradient_off, "token_logprobs", "offset 1e6 costs nothing", "dlogits"),
        ("token_logprobs_bwd", _gradient_off, "linear_token_logprobs", "float32, frozen head", "dhidden"),
        ("token_logprobs_bwd", _gradient_off, "policy_loss", "dapo, logits", "dlogits"),
        ("token_logprobs_bwd", _gradient_off, "policy_loss", "gspo, hidden", None),
    ],
)
def test_a_broken_kernel_is_found(
    kernel: str, change: Callable[..., Any], operation: str, name: str, part: str | None, monkeypatch: Any
) -> None:
    assert look_at(operation, name).status == verify.PASS
    monkeypatch.setattr(torch_rows, kernel, broken(getattr(torch_rows, kernel), change))
    check = look_at(operation, name)
    assert check.status == verify.FAIL, verify.line(check)
    assert part is None or check.part == part
    assert check.error is not None
    assert check.granted is not None
    assert check.error > check.granted


def test_bits_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def row_number(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (outputs[0], outputs[1] * (1 + 1e-6 * torch.arange(outputs[1].numel())), outputs[2])

    calls = []

    def call_number(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(0)
        return (outputs[0] + len(calls) * 1e-6, *outputs[1:])

    kernel = torch_rows.token_logprobs_fwd
    for operation in ("token_logprobs", "linear_token_logprobs"):
        monkeypatch.setattr(torch_rows, "token_logprobs_fwd", broken(kernel, row_number))
        assert look_at(operation, "bits: row order").status == verify.FAIL
        assert look_at(operation, "bits: repeat").status == verify.PASS
        monkeypatch.setattr(torch_rows, "token_logprobs_fwd", broken(kernel, call_number))
        assert look_at(operation, "bits: batch split").status == verify.FAIL
        assert look_at(operation, "bits: repeat").status == verify.FAIL


def test_masked_data_that_matters_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = torch_rows.token_logprobs_bwd

    def leaking(logits: Tensor, *arguments: Any, **options: Any) -> Tensor:
        gradient = kernel(logits, *arguments, **options)
        return gradient.add_(0.0 * logits)

    monkeypatch.setattr(torch_rows, "token_logprobs_bwd", leaking)
    check = look_at("token_logprobs", "bits: NaN under the mask")
    assert check.status == verify.FAIL
    assert "Disagreement: non-finite values disagree" in (check.reason or "")
    assert look_at("policy_loss", "grpo, logits").status == verify.FAIL


def test_a_kernel_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("the driver\nis gone")

    monkeypatch.setattr(torch_rows, "token_logprobs_fwd", raising)
    check = look_at("token_logprobs", "bfloat16")
    assert (check.status, check.reason, check.error) == (verify.FAIL, "RuntimeError: the driver is gone", None)
    assert "FAIL" in verify.line(check)
    assert verify.line(check).endswith("the driver is gone")


def test_the_worst_part_is_the_one_shown() -> None:
    one, two = Verdict("one", 1e-7, 1e-6), Verdict("two", 1e-9, 2e-9)
    assert verify.worst([one, two]) == two
    assert verify.worst([two, Verdict("bits", 1e-30, 0.0)]).part == "bits"
    assert verify.worst([Verdict("bits", 0.0, 0.0), one]) == one
    with pytest.raises(verify.Disagreement, match="expected a, got b"):
        verify.judged({"b": torch.ones(1)}, {"a": torch.ones(1)}, {"a": torch.ones(1)})
    with pytest.raises(AssertionError, match=r"expected shape \(2,\), got \(1,\)"):
        verify.max_error(torch.ones(1), torch.ones(2))
    zeros = {"x": torch.tensor([0.0])}
    assert verify.same_bits(zeros, {"x": torch.tensor([math.ulp(0.0)], dtype=torch.float64)}).error > 0


def test_large_results_are_judged_piece_by_piece(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    exact = torch.randn(7, 3, dtype=torch.float64)
    exact[2, 1] = math.inf
    result, eager = exact + 1e-3 * torch.randn(7, 3), exact + 1e-2 * torch.randn(7, 3)
    whole = verify.max_error(result, exact), verify.budget(exact, eager, torch.float32)
    monkeypatch.setattr(judge, "PIECE", 4)
    assert (verify.max_error(result, exact), verify.budget(exact, eager, torch.float32)) == whole
    result[5, 1] = math.nan
    with pytest.raises(verify.Disagreement, match=r"at \[\[5, 1\]\]"):
        verify.max_error(result, exact)
    with pytest.raises(verify.Disagreement, match=r"at \[\[\]\]"):
        verify.max_error(torch.tensor(math.nan), torch.tensor(1.0))


# --- the command ------------------------------------------------------------------------------------------------------


def few(operation: str = "token_logprobs", count: int = 3) -> dict[str, Any]:
    """Return the operations of a shorter run: the first checks of one."""
    named = verify_checks.OPERATIONS[operation]
    return {operation: lambda setting: list(named(setting))[:count]}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_checks, "OPERATIONS", few())


@pytest.mark.usefixtures("short")
def test_table_and_exit_code(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", "--device", "cpu", "--backend", "torch"]
    assert cli.main(arguments) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].split()[:4] == ["device", "backend", "operation", "check"]
    assert [line.split()[:3] for line in shown[1:-1]] == [["cpu", "torch", "token_logprobs"]] * 3
    assert all(" pass " in line for line in shown[1:-1])
    assert shown[-1].startswith("3 passed, 0 failed, 0 not run in ")
    monkeypatch.setattr(torch_rows, "token_logprobs_fwd", broken(torch_rows.token_logprobs_fwd, _logprobs_off))
    assert cli.main(arguments) == 1
    shown = capsys.readouterr().out.splitlines()
    assert any(re.search(r"^cpu +torch +token_logprobs +float32 +FAIL .*logprobs$", line) for line in shown)
    assert re.match(r"\d passed, [1-3] failed, 0 not run in ", shown[-1])


@pytest.mark.usefixtures("short")
def test_what_cannot_run_is_not_passed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(choice, "cpu_available", lambda: (False, "no C++ compiler was found"))
    assert cli.main(["verify", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    missing = {c["backend"]: c for c in found["checks"] if c["status"] == "not run"}
    assert set(missing) == set(verify.BACKENDS) - {"torch"}
    assert missing["cpu"]["reason"] == "backend 'cpu' cannot be used: no C++ compiler was found"
    assert "Triton has no cpu target" in missing["triton"]["reason"]
    assert all(c["error"] is None and c["seconds"] == 0 for c in missing.values())
    # A backend that was asked for by name and did not run is no success.
    assert cli.main(["verify", "--device", "cpu", "--backend", "cpu"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert " not run " in shown[1]
    assert shown[1].endswith("no C++ compiler was found")
    assert shown[-1].startswith("0 passed, 0 failed, 1 not run (cpu on cpu)")
    assert shown[-1].endswith(": nothing was checked")


@pytest.mark.usefixtures("short")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--device", "cuda", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False
    assert found["summary"] == {"pass": 0, "fail": 0, "not run": len(verify.BACKENDS)}
    assert all("device cuda cannot be used: " in c["reason"] for c in found["checks"])


@pytest.mark.usefixtures("short")
def test_json_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--device", "cpu", "--backend", "torch", "--json", "--seed", "3", "--quick"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"ok", "summary", "seed", "quick", "versions", "checks"}
    assert (found["ok"], found["seed"], found["quick"]) == (True, 3, True)
    assert found["summary"] == {"pass": 3, "fail": 0, "not run": 0}
    assert set(found["versions"]) == {"fastrl", "torch", "python"}
    for check in found["checks"]:
        assert set(check) == FIELDS
        assert 0 <= check["error"] <= check["granted"]
        assert check["seconds"] > 0


@pytest.mark.usefixtures("short")
def test_the_seed_decides_the_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    def errors(seed: int) -> list[float]:
        cli.main(["verify", "--device", "cpu", "--backend", "torch", "--json", "--seed", str(seed)])
        return [check["error"] for check in json.loads(capsys.readouterr().out)["checks"]]

    assert errors(1) == errors(1) != errors(2)


def test_triton_is_interpreted_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the kernels of this process are compiled")
    monkeypatch.setattr(verify_checks, "OPERATIONS", few("group_advantages", 5))
    monkeypatch.delenv("TRITON_INTERPRET")
    assert cli.main(["verify", "--device", "cpu", "--backend", "triton"]) == 0
    check = look_at_triton("token_logprobs", "temperature per token")
    assert check.status == verify.PASS, verify.line(check)


def look_at_triton(operation: str, name: str) -> Check:
    setting = Setting(CPU, "triton", quick=True)
    (look,) = [look for found, look in getattr(verify_checks, f"check_{operation}")(setting) if found == name]
    return verify.result(Check("cpu", "triton", operation, name, verify.PASS), look)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "mkl"], "--backend must be all, torch, "),
        (["--device", "gpu"], "device must be a device like cpu or cuda:0, got 'gpu'"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
    ],
)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.gpu
def test_the_gpu_passes() -> None:
    checks = list(verify.verify(["cuda"], ["torch", "triton"]))
    assert [verify.line(check) for check in checks if check.status != verify.PASS] == []
