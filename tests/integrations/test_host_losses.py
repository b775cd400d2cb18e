"""The comparison of adapters with clones of their hosts: the importer and the judge, on made-up projects."""

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hosts import losses, prime_rl_losses
from hosts.checkouts import CHECKOUTS, Checkout, commit_of, opened

from fastrl.integrations import prime_rl as adapter
from fastrl.integrations.common.proof import AdapterMismatchError

ROOT = Path(__file__).parents[2]
TINY = Checkout("Tiny", ("src", "more"), ("tiny.loss", "tiny.sizes"), {"heavy.clock": {"ticks": lambda: 3}})


def written(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    loss = """
import heavy.engine
import torch
from heavy import clock
from tiny.actor import Actor, spread
from tiny.sizes import SIZE

class Loss(Actor):
    table: dict[str, Actor[int] | None]

@torch.compile(dynamic=True)
def loss(x):
    return SIZE * clock.ticks() * x

def wrong(x):
    return spread(x)
"""
    return written(
        tmp_path,
        {"src/tiny/__init__.py": "raise ImportError", "src/tiny/loss.py": loss, "more/tiny/sizes.py": "SIZE = 2",
         "src/tiny/actor.py": "raise ImportError"},
    )  # fmt: skip


def test_named_modules_run_and_the_rest_stands_in(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = ModuleType("tiny")
    monkeypatch.setitem(sys.modules, "tiny", installed)
    finders = list(sys.meta_path)
    monkeypatch.setattr(torch, "compile", lambda **options: lambda function: "compiled")
    with opened(TINY, tiny) as modules:
        assert set(modules) == {"tiny.loss", "tiny.sizes"}
        module = importlib.import_module("tiny.loss")
        assert modules["tiny.loss"] is module
        assert module.loss(5) == 30
        with pytest.raises(RuntimeError, match=r"called tiny\.actor\.spread, for which there is only a stand-in"):
            module.wrong(5)
        with pytest.raises(RuntimeError, match=r"called tiny\.loss\.Loss"):
            module.Loss()
    assert sys.modules["tiny"] is installed
    assert not {"tiny.loss", "tiny.sizes", "tiny.actor", "heavy"} & set(sys.modules)
    assert sys.meta_path == finders
    with opened(TINY, tiny, compiled=True) as modules:
        assert modules["tiny.loss"].loss == "compiled"


def test_a_folder_without_the_files_is_refused(tiny: Path) -> None:
    (tiny / "more/tiny/sizes.py").unlink()
    message = r"is not a clone of Tiny: it has no src/tiny/sizes\.py or more/tiny/sizes\.py$"
    with pytest.raises(FileNotFoundError, match=message), opened(TINY, tiny):
        raise AssertionError("the folder was taken")
    assert commit_of(tiny) == "of an unknown commit"


def script_named(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return script_named("host_losses", monkeypatch)


def prime_rl(folder: Path, scale: float) -> Path:
    """Write a project with prime-rl's layout and its cross-entropy."""
    loss = f"""
from dataclasses import dataclass
from typing import Any
from prime_rl.configs.trainer import LossConfig

@dataclass
class LossInputs:
    trainer_logprobs: Any
    inference_logprobs: Any
    ref_logprobs: Any
    advantages: Any
    loss_mask: Any
    loss_weights: Any = None

@dataclass
class LossOutputs:
    loss: Any
    metrics: dict[str, Any]

def ce_loss_fn(inputs):
    nll = -inputs.trainer_logprobs
    weighted = nll if inputs.loss_weights is None else nll * inputs.loss_weights
    mean = nll[inputs.loss_mask].sum() / inputs.loss_mask.sum()
    return LossOutputs({scale} * weighted[inputs.loss_mask].sum(), {{"nll": mean}})
"""
    names = ("utils/config.py", "configs/shared.py", "configs/monitors.py")
    configs = {f"packages/prime-rl-configs/src/prime_rl/{name}": "" for name in names}
    trainer = {"packages/prime-rl-configs/src/prime_rl/configs/trainer.py": "LossConfig = object"}
    return written(folder, {**configs, **trainer, "src/prime_rl/trainer/rl/loss.py": loss})


@pytest.mark.parametrize("scale", [1.0, 1.00001])
def test_the_script_exits_1_on_a_difference(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    scale: float,
) -> None:
    monkeypatch.setattr(prime_rl_losses, "SETTINGS", [("ce", {})])
    monkeypatch.setattr(adapter, "_proofs", type(adapter._proofs)())
    adapter._proofs.wanted = False
    monkeypatch.setattr(sys, "argv", ["host_losses.py", "prime_rl", str(prime_rl(tmp_path, scale))])
    assert script.main() == (0 if scale == 1.0 else 1)
    printed = capsys.readouterr().out
    assert "prime-rl of an unknown commit; tested with 559b44772" in printed
    assert "1 settings, 4 batches: 8 losses with their gradients and 8 metrics compared" in printed
    assert ("ce {}, weighted, spread 0.3, float64: gradient: error" in printed) == (scale != 1.0)
    assert printed.endswith("\n0 differ\n") == (scale == 1.0)


def test_the_script_refuses_another_folder(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["host_losses.py", "slime", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "is not a clone of slime: it has no slime/utils/ppo_utils.py, " in capsys.readouterr().err


def test_the_cost_of_a_host_is_measured_from_its_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script_named("host_cost", monkeypatch)
    for wrong, message in [
        ("verl=folder", "--checkout must be HOST=FOLDER with HOST among slime, nemo_rl, skyrl, prime_rl, got 'verl="),
        ("slime", "must be HOST=FOLDER"),
        (f"prime_rl={tmp_path}", "is not a clone of prime-rl"),
    ]:
        monkeypatch.setattr(sys, "argv", ["host_cost.py", "--checkout", wrong])
        with pytest.raises(SystemExit, match="2"):
            module.main()
        assert message in capsys.readouterr().err

    def ways(sizes: Any) -> dict[str, Any]:
        loss = importlib.import_module("prime_rl.trainer.rl.loss").ce_loss_fn
        columns = prime_rl_losses.sequence(tokens=sizes.length)
        return {"prime-rl": lambda: loss(SimpleNamespace(**columns))}

    monkeypatch.setitem(module.HOSTS, "prime_rl", {"cross-entropy": ways})
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    clone = prime_rl(tmp_path, 1.0)
    monkeypatch.setattr(sys, "argv", ["host_cost.py", "--checkout", f"prime_rl={clone}", "prime_rl", "--cpu-time"])
    module.main()
    assert "| prime_rl: cross-entropy | prime-rl | " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["host_cost.py", "prime_rl"])
    module.main()
    assert "| prime_rl: cross-entropy | not measured: No module named 'prime_rl" in capsys.readouterr().out


def comparison(ours: Any, **fields: Any) -> losses.Comparison:
    x = {"logprobs": torch.linspace(-2.0, -0.1, 7).double()}

    def host(leaf: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
        return leaf.exp().sum(), {"kept": 0.5, "rate": leaf.detach().float().mean()}

    return losses.Comparison(
        "a setting", "a batch", x, lambda x: losses.outcome(host, x["logprobs"]),
        lambda x: losses.outcome(lambda leaf: ours(leaf, *host(leaf)), x["logprobs"]), **fields,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "complaints"),
    [
        (lambda leaf, loss, metrics: (loss, metrics), []),
        (lambda leaf, loss, metrics: (loss + 1e-4, metrics), ["float32: loss: error", "float64: loss: error"]),
        (lambda leaf, loss, metrics: (loss + 1e-12, metrics), ["float64: loss: error"]),
        (
            lambda leaf, loss, metrics: (loss + 1e-4 * (leaf - leaf.detach()).sum(), metrics),
            ["float32: gradient: error", "float64: gradient: error"],
        ),
        (lambda leaf, loss, metrics: (loss, {**metrics, "rate": metrics["rate"] + 1e-8}), []),
        (lambda leaf, loss, metrics: (loss, {**metrics, "kept": 0.5 + 1e-12}), ["float64: kept: error"]),
        (lambda leaf, loss, metrics: (loss, {"kept": 0.5}), ["float32: metrics ['kept'], the", "float64: metrics"]),
        (lambda leaf, loss, metrics: (loss + torch.nan, metrics), ["float32: loss: non-f", "float64: loss: non-f"]),
    ],
)
def test_the_judge(ours: Any, complaints: list[str]) -> None:
    tally = losses.compare([comparison(ours)])
    assert (len(tally.settings), tally.batches, tally.losses) == (1, 1, 2)
    assert len(tally.complaints) == len(complaints)
    for found, expected in zip(tally.complaints, complaints, strict=True):
        assert found.startswith(f"a setting, a batch, {expected}")


def test_a_failed_proof_is_a_difference() -> None:
    def ours(leaf: Any, loss: Any, metrics: Any) -> Any:
        raise AdapterMismatchError("another loss")

    tally = losses.compare([comparison(ours)])
    assert tally.complaints == [f"a setting, a batch, {dtype}: another loss" for dtype in ("float32", "float64")]
    assert tally.losses == 0


def test_metrics_that_differ_on_purpose_are_left_out() -> None:
    def ours(leaf: Any, loss: Any, metrics: Any) -> Any:
        return loss, {**metrics, "kept": 9.0}

    assert len(losses.compare([comparison(ours)]).complaints) == 2
    tally = losses.compare([comparison(ours, unlike=frozenset({"kept"}))])
    assert tally.complaints == []
    assert tally.metrics == 2


def test_every_adapter_with_cases_has_a_layout() -> None:
    assert set(losses.NAMES) == set(CHECKOUTS)
    for name in losses.NAMES:
        assert losses.cases(name).adapter.HOST.name == CHECKOUTS[name].name
