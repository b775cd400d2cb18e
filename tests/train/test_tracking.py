"""The run's record: strict JSON, flushed, resumable, and never two runs in one file."""

import json
import math
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")

from fastrl.train.run.tracking import RunTracker, read_metrics


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_on_disk_when_log_returns(tmp_path):
    with RunTracker(tmp_path / "new" / "run", 3) as tracker:
        tracker.log(1, {"reward": 0.5, "kl": torch.tensor(0.25), "count": np.int64(3)})
        assert lines(tracker.run_dir) == [{"step": 1, "reward": 0.5, "kl": 0.25, "count": 3}]
        tracker.log(2, {"reward": 1})
        assert len(lines(tracker.run_dir)) == 2


def test_values_that_are_not_finite_stay_strict_json(tmp_path):
    with RunTracker(tmp_path, 1) as tracker:
        tracker.log(1, {"reward": math.nan, "loss": -math.inf, "kl": 0.0})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert lines(tmp_path) == [{"step": 1, "reward": None, "loss": None, "kl": 0.0}]
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(record["reward"])
    assert record["kl"] == 0.0


def test_resume_drops_later_lines_and_a_torn_one(tmp_path):
    with RunTracker(tmp_path, 6) as tracker:
        for step in range(1, 5):
            tracker.log(step, {"reward": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    with RunTracker(tmp_path, 6) as tracker:
        tracker.resume(2)
        assert [line["step"] for line in lines(tmp_path)] == [1, 2]
        for step in range(3, 7):
            tracker.log(step, {"reward": -step})
    assert [line["reward"] for line in lines(tmp_path)] == [1, 2, -3, -4, -5, -6]


def test_a_torn_line_is_not_glued_to_the_next_one(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2')
    with RunTracker(tmp_path, 3) as tracker:
        tracker.log(2, {"a": 2})
    assert lines(tmp_path) == [{"step": 1, "a": 1}, {"step": 2, "a": 2}]


def test_two_runs_do_not_share_a_file(tmp_path):
    with RunTracker(tmp_path, 2) as tracker:
        tracker.log(1, {})
        tracker.log(2, {})
    with RunTracker(tmp_path, 2) as tracker:
        with pytest.raises(ValueError, match=r"greater than 2, the last one in .*metrics\.jsonl, got 1: call resume"):
            tracker.log(1, {})
        tracker.resume(-1)
        tracker.log(1, {"fresh": 1})
    assert lines(tmp_path) == [{"step": 1, "fresh": 1}]


@pytest.mark.parametrize("broken", ["not json\n", "[1]\n", '{"a": 1}\n', '{"step": "1"}\n'])
def test_a_broken_line_is_named(tmp_path, broken):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + broken + '{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected"):
        RunTracker(tmp_path, 3)


def test_bad_metrics_are_refused_before_anything_is_written(tmp_path):
    with RunTracker(tmp_path, 3) as tracker:
        with pytest.raises(TypeError, match="metric 'a' must be a number, got str"):
            tracker.log(1, {"a": "1"})
        with pytest.raises(TypeError, match=r"metric 'a' must be one number, got shape \(2,\)"):
            tracker.log(1, {"a": torch.ones(2)})
        with pytest.raises(ValueError, match="name of a metric must be a string other than '' and 'step', got 'step'"):
            tracker.log(1, {"step": 3})
    assert lines(tmp_path) == []
    with pytest.raises(ValueError, match="total_steps must be at least 0, got -1"):
        RunTracker(tmp_path, -1)


def test_lines_without_a_terminal_are_few(tmp_path, capfd):
    with RunTracker(tmp_path, 200) as tracker:
        for step in range(1, 201):
            tracker.log(step, {"reward": 0.123, "kl": 0.01, "entropy": 1.0, "clip_ratio/region_mean": 0.02})
        tracker.print("[done]")
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == 51
    assert printed[-2] == "step 200/200  reward 0.123  kl 0.01  entropy 1.00  clip 2.0%"
    assert printed[-1] == "[done]"


def test_a_killed_run_keeps_its_lines(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from fastrl.train.run.tracking import RunTracker\n"
        "tracker = RunTracker(sys.argv[1], 9).__enter__()\n"
        "tracker.log(1, {'a': 1}); tracker.log(2, {'a': 2})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, check=False)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    with RunTracker(tmp_path, 2, tensorboard=True) as tracker:
        tracker.log(1, {"reward": 1.0})
        tracker.resume(1)
        tracker.log(2, {"reward": 2.0})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 1.0), (2, 2.0)]


def test_trackio_gets_every_step(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda metrics, step: calls.append((step, metrics)),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    with RunTracker(tmp_path / "run7", 1, trackio=True) as tracker:
        tracker.log(1, {"reward": 1.0, "kl": math.nan})
    assert calls == [("init", {"project": "fastrl", "name": "run7"}), (1, {"reward": 1.0}), "finish"]


@pytest.mark.parametrize(
    ("option", "module"), [("trackio", "trackio"), ("tensorboard", "torch.utils.tensorboard.writer")]
)
def test_a_missing_tracker_names_the_extra(tmp_path, monkeypatch, option, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{option}=True needs .*fastrl\[track\]"):
        RunTracker(tmp_path, 1, **{option: True})
