"""Helpers of the loops' tests: settings, the metrics of a run, resuming to the bit, and golden loss curves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import tiny_tokenizer
from torch import Tensor

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.run import run as run_module
from fastrl.train.run.masters import MasterWeights

DATA = Path(__file__).parents[1] / "data"
EXAMPLES = Path(__file__).parents[2] / "examples"
TOKENIZER = tiny_tokenizer()
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
"""Parameters of the task `chain_sum`: sums of two numbers below 100."""


def grpo_settings(folder: Path, run_dir: Path, **changes: Any) -> GRPOConfig:
    """Return the settings of a GRPO run of two steps on the tiny model in `folder`."""
    values: dict[str, Any] = {
        "model": str(folder), "run_dir": str(run_dir), "device": "cpu", "task_parameters": SUMS,
        "rewards": {"tiny_model:digit_share": 1.0}, "steps": 2, "prompts_per_step": 2, "group_size": 4,
        "max_new_tokens": 6, "kl_coef": 0.0, "learning_rate": 1e-2, "eval_problems": 0, "save_model": False,
        "reward_timeout_s": None,
    }  # fmt: skip
    return GRPOConfig(**{**values, **changes})


@dataclass
class PlainRun:
    """The part of a Run that an optimiser step uses. The step leaves its gradient in the parameters."""

    config: Any
    device: str = "cpu"
    generator: torch.Generator = field(default_factory=torch.Generator)
    clock: Any = field(default_factory=lambda: SimpleNamespace(lap=lambda name: None))
    masters: MasterWeights = field(default_factory=lambda: MasterWeights({}))

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_and_step(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()  # pyright: ignore[reportAttributeAccessIssue]  # set by the test that needs it


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """Return the records of metrics.jsonl without the times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "tokens_per_second")
    return [{name: value for name, value in line.items() if not name.startswith(timed)} for line in lines]


def interrupt(train: Callable[[], Any], after: int) -> None:
    """Run `train` until the metrics of step `after` are written, and kill it there."""

    class Killed(BaseException):
        pass

    original = run_module.RunTracker.log

    def dying(self: Any, step: int, metrics: dict[str, float]) -> None:
        original(self, step, metrics)
        if step == after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.RunTracker, "log", dying)
        with pytest.raises(Killed):
            train()


def assert_resumes_to_the_bit(train: Callable[..., Any], folder: Path, *, steps: int, die_after: int) -> None:
    """Assert that a run killed after the metrics of a step, then resumed, ends as one that went straight through.

    Args:
        train: called with `run_dir` and, to go on, with `resume=True`; writes checkpoints before `die_after` and at
            the last step.
        folder: where both runs go.
        steps: the last step, whose checkpoints are compared.
        die_after: the step after whose metrics the run is killed, before its checkpoint.
    """
    straight, broken = folder / "straight", folder / "broken"
    train(run_dir=str(straight))
    interrupt(lambda: train(run_dir=str(broken)), die_after)
    train(run_dir=str(broken), resume=True)

    assert metrics_of(straight) == metrics_of(broken)
    assert (straight / "evaluations.json").read_text() == (broken / "evaluations.json").read_text()
    last = f"step_{steps:08d}"
    names = [path.name for path in (straight / "checkpoints" / last).glob("*.safetensors")]
    assert {"weights.safetensors", "optimizer.safetensors", "random.safetensors"} <= set(names)
    for name in names:
        a, b = (load_file(run_dir / "checkpoints" / last / name) for run_dir in (straight, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def assert_golden_curve(name: str, run_dir: Path) -> None:
    """Assert that the losses of a run are those stored in data/NAME.json, within the tolerance stored with them.

    The tolerance is 20 times the largest change of a loss when every weight is moved by one unit in the last place
    before the run (see `ulp_noise`): what another CPU's order of summation may do.
    """
    stored = json.loads((DATA / f"{name}.json").read_text())
    losses = [line["loss"] for line in metrics_of(run_dir)]
    assert losses == pytest.approx(stored["loss"], rel=0, abs=stored["tolerance"])


def golden_curve(train: Callable[[Path, Path], Any], model: Path, folder: Path, *, noises: int = 3) -> dict[str, Any]:
    """Return the content of a golden file: the losses of `train(model, run_dir)` and their tolerance.

    It is for writing a new file, on purpose and by hand, when a loop is meant to compute something else.
    """
    from transformers import AutoModelForCausalLM

    train(model, folder / "exact")
    losses = torch.tensor([line["loss"] for line in metrics_of(folder / "exact")], dtype=torch.float64)
    largest = 0.0
    for seed in range(noises):
        shutil.copytree(model, folder / f"model{seed}")
        noisy = AutoModelForCausalLM.from_pretrained(model)
        ulp_noise(noisy, seed)
        noisy.save_pretrained(folder / f"model{seed}")
        train(folder / f"model{seed}", folder / f"noisy{seed}")
        moved = torch.tensor([line["loss"] for line in metrics_of(folder / f"noisy{seed}")], dtype=torch.float64)
        largest = max(largest, float((moved - losses).abs().max()))
    return {"loss": losses.tolist(), "tolerance": 20.0 * largest}


def ulp_noise(model: Any, seed: int) -> None:
    """Move every weight up or down by one unit in the last place of its dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            up = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.copy_(torch.nextafter(parameter, torch.where(up, torch.inf, -torch.inf)))
