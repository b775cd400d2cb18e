"""Runs that are killed at random moments, and runs of many steps, in small; `make test-slow` has them in full."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"


def run(script: str, *arguments: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", str(SUPPORT / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_lose_no_step_and_end_in_the_same_bits(tmp_path: Path) -> None:
    said = run("killed_runs.py", "5", "1", str(tmp_path / "runs"))
    assert "5 kills in " in said
    assert "no completed step lost, all bits equal" in said


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_growth_would_be_found() -> None:
    sys.path.insert(0, str(SUPPORT))
    try:
        from long_runs import grown
    finally:
        sys.path.remove(str(SUPPORT))
    flat = {"memory, MB": (500.0, 505.0), "open files": (20.0, 20.0), "time of a step, ms": (10.0, 11.0)}
    assert grown(flat) == []
    assert grown({**flat, "open files": (20.0, 21.0)}) == ["open files: 20 -> 21"]
    assert len(grown({"memory, MB": (500.0, 520.0), "time of a step, ms": (10.0, 14.0)})) == 2
