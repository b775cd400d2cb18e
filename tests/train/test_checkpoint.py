"""Checkpoints: everything comes back to the bit, and no kill leaves a broken `latest`."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastrl.train.run import checkpoint as module
from fastrl.train.run.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    optimizer_from_tensors,
    optimizer_to_tensors,
    random_state,
    save_checkpoint,
    set_random_state,
    write_json,
)


def save(root: Path, step: int, keep: int = 2) -> Path:
    return save_checkpoint(root, step, {"weights": {"w": torch.full((3,), float(step))}}, {"note": step}, keep=keep)


def check(root: Path, step: int) -> None:
    newest = latest_checkpoint(root)
    assert newest is not None
    found = load_checkpoint(newest)
    assert found.state == {"note": step, "step": step}
    assert found.tensors["weights"]["w"].tolist() == [float(step)] * 3


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (2, 4, 6, 10):
        save(tmp_path, step, keep=2)
        check(tmp_path, step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000006", "step_00000010"]


def test_saving_the_latest_again_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="already there"):
        save(tmp_path, 1)


class Killed(BaseException):
    """Stands for a kill: no handler of the code under test may catch it."""


def test_a_kill_at_any_moment_of_the_write_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {"left": 10**6}

    def dying(original: Any) -> Any:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls["left"] -= 1
            if calls["left"] < 0:
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(module, "_sync", dying(module._sync))
    for name in ("mkdir", "write_text", "rename", "replace"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(module.shutil, "rmtree", dying(module.shutil.rmtree))

    outcomes = []
    for moment in range(1000):
        root = tmp_path / str(moment)
        calls["left"] = 10**6
        save(root, 2, keep=1)
        calls["left"] = moment
        try:
            save(root, 4, keep=1)
        except Killed:
            killed = True
        else:
            killed = False
        calls["left"] = 10**6
        newest = latest_checkpoint(root)
        assert newest is not None
        step = int(newest.name[-2:])
        check(root, step)
        outcomes.append((killed, step))
        if step == 2:  # what a resumed run does
            save(root, 4, keep=1)
            check(root, 4)
        save(root, 6, keep=1)
        check(root, 6)
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_00000006"]
        if not killed:
            break
    assert (True, 2) in outcomes
    assert (True, 4) in outcomes
    assert outcomes[-1] == (False, 4)
    assert len(outcomes) > 10


WRITER = """
import sys, torch
from fastrl.train.run.checkpoint import save_checkpoint
print("ready", flush=True)
step = 0
while True:
    step += 1
    weights = {f"w{i}": torch.full((20_000,), float(step)) for i in range(4)}
    save_checkpoint(sys.argv[1], step, {"weights": weights}, {"note": step}, keep=2)
"""


def test_sigkill_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while latest_checkpoint(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.137)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    newest = latest_checkpoint(tmp_path)
    assert newest is not None
    found = load_checkpoint(newest)
    for tensor in found.tensors["weights"].values():
        assert bool((tensor == found.state["note"]).all())
    save(tmp_path, found.state["step"] + 1)
    check(tmp_path, found.state["step"] + 1)


def test_a_pointer_to_nothing_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "latest").write_text("step_00000009")
    with pytest.raises(ValueError, match="step_00000009"):
        latest_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"expected a checkpoint folder with state\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}])
def test_the_optimiser_continues_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def build() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.01, **options)

    def step(layer: torch.nn.Linear, optimizer: torch.optim.AdamW, n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            (layer(torch.arange(4.0)) ** 2).sum().mul(i + 1.0).backward()
            optimizer.step()

    straight, optimizer = build()
    step(straight, optimizer, 2)
    tensors, groups = optimizer_to_tensors(optimizer)
    weights = {name: p.detach().clone() for name, p in straight.named_parameters()}
    path = save_checkpoint(tmp_path, 2, {"weights": weights, "optimizer": tensors}, {"groups": groups}, keep=1)
    step(straight, optimizer, 3)

    resumed, optimizer = build()
    saved = load_checkpoint(path)
    resumed.load_state_dict(saved.tensors["weights"])
    optimizer_from_tensors(optimizer, saved.tensors["optimizer"], saved.state["groups"])
    step(resumed, optimizer, 3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_random_generators_continue(tmp_path: Path) -> None:
    def draw(generator: torch.Generator) -> list[float]:
        numpy_value = float(np.random.rand())  # noqa: NPY002
        return [random.gauss(0, 1), numpy_value, float(torch.rand(())), float(torch.rand((), generator=generator))]

    generator = torch.Generator().manual_seed(5)
    draw(generator)
    tensors, values = random_state(generator)
    path = save_checkpoint(tmp_path, 1, {"random": tensors}, {"random": values}, keep=1)
    expected = [draw(generator) for _ in range(3)]
    other = torch.Generator().manual_seed(99)
    saved = load_checkpoint(path)
    set_random_state(other, saved.tensors["random"], saved.state["random"])
    assert [draw(other) for _ in range(3)] == expected


def test_write_json_replaces_the_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", [1])
    write_json(tmp_path / "a.json", [2])
    assert (tmp_path / "a.json").read_text() == "[\n 2\n]"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
