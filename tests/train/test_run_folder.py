"""The folder of a run: its lock, the content of its inputs, the digests of its checkpoints, and which ones are kept."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastrl.train.run import folder as module
from fastrl.train.run.checkpoint import DIGESTS, LATEST, latest_checkpoint, load_checkpoint, save_checkpoint
from fastrl.train.run.folder import FolderLock, check_inputs, input_digests


def save(root: Path, step: int, keep: int = 9) -> Path:
    values = torch.arange(1000.0) + step
    return save_checkpoint(root, step, {"weights": {"w": values}, "optimizer": {"m": values}}, {"n": step}, keep=keep)


def test_any_flipped_bit_is_found_and_the_whole_checkpoint_before_it_is_named(tmp_path: Path) -> None:
    draw = random.Random(0)
    for trial in range(30):
        root = tmp_path / str(trial)
        save(root, 1)
        newest = save(root, 2)
        file = draw.choice(sorted(newest.iterdir()))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"step_00000002.*(step_00000001 is whole|no other whole)"):
            load_checkpoint(newest)
        assert load_checkpoint(root / "step_00000001").state == {"n": 1, "step": 1}


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "state.json", DIGESTS])
@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / name
    if damage == "missing":
        file.unlink()
        if name == DIGESTS:  # as of a checkpoint from before there were digests
            assert load_checkpoint(newest).state["n"] == 2
            return
    else:
        file.write_bytes(file.read_bytes()[:-3] if damage == "cut" else b"")
    with pytest.raises(ValueError, match=rf"({name}|step_00000002).*step_00000001 is whole") as caught:
        load_checkpoint(newest)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.json"])
def test_a_damaged_file_is_named_without_digests_too(tmp_path: Path, name: str) -> None:
    newest = save(tmp_path, 2)
    (newest / DIGESTS).unlink()
    (newest / name).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"is damaged: {name}"):
        load_checkpoint(newest)


def test_the_youngest_are_kept_whatever_their_numbers_are(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
        time.sleep(0.01)
    (tmp_path / LATEST).write_text("step_00000010")  # back to an earlier step
    assert save(tmp_path, 11, keep=2).is_dir()
    assert sorted(p.name for p in tmp_path.glob("step_*")) == ["step_00000011", "step_00000030"]
    assert save(tmp_path, 12, keep=1).is_dir()
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_00000012"]


def test_without_latest_the_youngest_is_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step)
        time.sleep(0.01)
    (tmp_path / LATEST).unlink()
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000002"


@pytest.mark.parametrize("content", ["", "../x", "step_1/..", "a\0b"])
def test_a_latest_that_names_nothing(tmp_path: Path, content: str) -> None:
    save(tmp_path, 1)
    (tmp_path / LATEST).write_text(content)
    with pytest.raises(ValueError, match="latest"):
        latest_checkpoint(tmp_path)


def test_a_latest_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / LATEST).mkdir()
    with pytest.raises(ValueError, match=r"expected the file .*latest.* got a folder"):
        latest_checkpoint(tmp_path)


HOLD = "import sys, time; from pathlib import Path; from fastrl.train.run.folder import FolderLock; "


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path)
    code = HOLD + "FolderLock(Path(sys.argv[1]))"
    second = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert f"is in use by another run (process {os.getpid()} on" in second.stderr
    lock.release()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_lock_of_a_killed_run_is_gone(tmp_path: Path) -> None:
    code = HOLD + "lock = FolderLock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    first = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"process {first.pid} on"):
        FolderLock(tmp_path)
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    FolderLock(tmp_path).release()


def test_inputs_are_known_by_their_content(tmp_path: Path) -> None:
    data, model = tmp_path / "data.jsonl", tmp_path / "model"
    model.mkdir()
    data.write_text("a")
    (model / "config.json").write_text("{}")
    settings = {
        "data": str(data),
        "model": str(model),
        "run_dir": str(tmp_path),
        "steps": 3,
        "prompt_template": "{prompt}",
    }
    before = input_digests(settings)
    assert sorted(before) == [f"data: {data}", f"model: {model / 'config.json'}"]
    check_inputs(before, input_digests(settings))
    os.utime(data, (0, 0))
    check_inputs(before, input_digests(settings))  # the time of a copy does not matter
    data.write_text("b")
    with pytest.raises(
        ValueError, match=rf"the file of data: {data} has changed since the checkpoint \(1 bytes, SHA-256"
    ):
        check_inputs(before, input_digests(settings))
    data.write_text("a")
    (model / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"the file of model: .*config.json has changed"):
        check_inputs(before, input_digests(settings))


def test_large_files_are_known_by_size_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_BYTES", 100)
    monkeypatch.setattr(module, "END_BYTES", 10)
    file = tmp_path / "x"
    file.write_bytes(bytes(200))
    first = module._content(file)
    for at in (0, 9, 190, 199):
        data = bytearray(200)
        data[at] = 1
        file.write_bytes(data)
        assert module._content(file) != first
