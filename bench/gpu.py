"""The GPU run: correctness first, then the cases, then experiments that settle block and chunk sizes.

The run writes its record after every step, so an interrupted run keeps its results. `dry_run` goes through the same
steps on the CPU at tiny shapes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import record as records
from bench import tiles
from bench.baselines import fastrl_contender
from bench.cases import MODELS, Case, gpu_cases, make_inputs, tiny_cases
from bench.measure import Plan, release
from bench.suite import run_case, say
from bench.targets import gpu_targets

# One command on a rented device may be cut after ten minutes, and starting it takes some of them.
RUN_LIMIT_S = 460
# Seconds of it for the tests, and seconds held back for the experiments.
TEST_LIMIT_S = 200
EXPERIMENT_SHARE_S = 60
TEST_MARGIN_S = 20
PARTS = ("tests", "cases", "experiments")
# Shapes of the tile experiment of this run. `python -m bench tiles` has more.
TILES = ((1024, 4), (2048, 8), (4096, 8), (4096, 16), (8192, 16))


@dataclasses.dataclass
class Clock:
    """How much of the run's time is left."""

    limit_s: float
    begin: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds left."""
        return self.limit_s - (time.monotonic() - self.begin)


def gpu_test_files() -> list[str]:
    """Return the test files of the gpu lane: a rented device may lack packages that the other files import."""
    files = sorted((records.ROOT / "tests").rglob("test_*.py"))
    lane = re.compile(r"pytest\.mark\.gpu|^pytestmark = LANE|^@on_device", re.MULTILINE)
    return [str(file.relative_to(records.ROOT)) for file in files if lane.search(file.read_text())]


def gpu_tests(limit_s: float = TEST_LIMIT_S) -> dict[str, Any]:
    """Return the outcome of the gpu lane, test by test if it did not end in time."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": "missing", "reason": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", *gpu_test_files()]
    if importlib.util.find_spec("pytest_timeout") is None:
        # Its option in pyproject.toml is unknown then, which strict settings turn into an error.
        command += ["-o", "addopts=-ra -p no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    if importlib.util.find_spec("xdist") is not None:
        # Compiling the kernels is most of the work.
        command += ["-n", str(min(8, os.cpu_count() or 1)), "--dist", "worksteal"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=records.ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else (late.stdout or "")
        lines = output.splitlines()
        bad = [line for line in lines if "FAILED" in line or "ERROR" in line]
        return {"status": "out of time", "limit_s": limit_s, "failed": bad, "tail": lines[-30:]}
    lines = (done.stdout + done.stderr).splitlines()
    # 5: no test of the lane was collected, which is no success.
    status = "passed" if done.returncode == 0 else "failed"
    return {"status": status, "returncode": done.returncode, "tail": lines[-20 if status == "passed" else -400 :]}


def gemm_experiment(device: torch.device, dry_run: bool) -> list[dict[str, Any]]:
    """Time the forward GEMM of a chunk: half-precision output against float32 output, at several numbers of rows."""
    shapes = (
        [(8, 16, 64)] if dry_run else [(rows, d, 151936) for d in (1024, 2048, 4096) for rows in (1024, 2048, 4096)]
    )
    found = []
    for rows, d, v in shapes:
        hidden = torch.randn(rows, d, device=device).bfloat16()
        weight = torch.randn(v, d, device=device).bfloat16()
        wide = torch.empty(rows, v, device=device)
        narrow = torch.empty(rows, v, device=device, dtype=torch.bfloat16)
        gradient_of_head = torch.zeros(v, d, device=device)
        actions: dict[str, Callable[[], Any]] = {
            "bf16 out": lambda h=hidden, w=weight, o=narrow: torch.mm(h, w.t(), out=o),
            "f32 out": lambda h=hidden, w=weight, o=wide: torch.mm(h, w.t(), out_dtype=torch.float32, out=o),
            "dX, f32 out": lambda g=narrow, w=weight: torch.mm(g, w, out_dtype=torch.float32),
            "dW, mm f32 out, then add": lambda g=narrow, h=hidden, t=gradient_of_head: t.add_(
                torch.mm(g.t(), h, out_dtype=torch.float32)
            ),
            "dW, addmm f32 in place": lambda g=narrow, h=hidden, t=gradient_of_head: torch.addmm(
                t, g.t(), h, out_dtype=torch.float32, out=t
            ),
            "logits f32 -> bf16 copy": lambda a=wide, b=narrow: b.copy_(a),
        }
        narrow.zero_()
        found.append(
            {"rows": rows, "d": d, "v": v, "flop": 2 * rows * d * v, "seconds": tiles.times(actions, device, 10)}
        )
        del hidden, weight, wide, narrow, gradient_of_head, actions
        release(device)
    return found


def tile_experiment(device: torch.device, dry_run: bool) -> list[dict[str, Any]]:
    """Time the Triton row kernels at a few tiles of the vocabulary of the cases."""
    if importlib.util.find_spec("triton") is None:
        return [{"missing": "triton is not installed"}]
    if not dry_run:
        return tiles.sweep(device, (151936,), TILES)
    from fastrl_kernels import launch

    if not launch.interpreting():
        return [{"missing": "a dry run needs TRITON_INTERPRET=1 for the Triton kernels"}]
    return tiles.sweep(device, (300,), ((64, 4),), row_bytes=2400, repeats=2)


def chunk_experiment(device: torch.device, dry_run: bool) -> list[dict[str, Any]]:
    """Time fastrl's loss from hidden states at several chunk sizes."""
    if dry_run:
        cases, sizes = [Case("loss_hidden", MODELS["tiny"], 4, 16)], (16, 64)
    else:
        cases = [
            Case("loss_hidden", MODELS[name], 8, 1024, torch.bfloat16)
            for name in ("Qwen3-8B", "Qwen2.5-0.5B", "Llama-3.2-1B")
        ]
        sizes = (512, 1024, 2048, 4096, 8192)
    found = []
    for case in cases:
        inputs = make_inputs(case, device)
        actions: dict[str, Callable[[], Any]] = {
            str(size): fastrl_contender(chunk_tokens=size).prepare(inputs) for size in sizes
        }
        found.append({**case.describe(), "seconds_by_chunk": tiles.times(actions, device, 10)})
        del inputs, actions
        release(device)
    return found


EXPERIMENTS = {"gemm": gemm_experiment, "tiles": tile_experiment, "chunks": chunk_experiment}


def _run_experiments(record: dict[str, Any], device: torch.device, dry_run: bool, keep: Callable[[], None]) -> None:
    for name, experiment in EXPERIMENTS.items():
        say(f"experiment: {name}")
        try:
            record["experiments"][name] = experiment(device, dry_run)
        except Exception as error:  # an experiment must not cost the rest of the run: the record holds the error
            record["experiments"][name] = [{"failed": f"{type(error).__name__}: {error}"[:500]}]
        release(device)
        keep()


def _run_cases(
    record: dict[str, Any], device: torch.device, cases: list[Case], plan: Plan, clock: Clock, keep: Callable[[], None]
) -> None:
    slowest = 0.0
    for case in cases:
        # The later cases are no larger than the first, so the next takes at most as long as the slowest so far.
        if clock.left() < slowest:
            record["skipped"].append({**case.describe(), "reason": "out of time"})
            continue
        begin = time.monotonic()
        say(f"{case.operation} {case.model.name} N={case.tokens}, {clock.left():.0f} s left")
        try:
            record["results"].append(run_case(case, device, plan))
        except Exception as error:  # for example out of memory: the record holds the error
            record["skipped"].append({**case.describe(), "reason": f"{type(error).__name__}: {error}"[:500]})
        release(device)
        slowest = max(slowest, time.monotonic() - begin)
        record["targets"] = gpu_targets(record["results"])
        keep()


def run_gpu(
    out: Path, *, dry_run: bool = False, parts: Sequence[str] = PARTS, limit_s: float = RUN_LIMIT_S
) -> dict[str, Any]:
    """Return the record of the GPU run, written to `out` after every step.

    Args:
        out: folder of the result file.
        dry_run: go through the steps on the CPU at tiny shapes.
        parts: some of `PARTS`. If it is the tests alone, they may take the whole time.
        limit_s: seconds after which no further case is begun.
    """
    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError("no GPU: torch.cuda.is_available() is False; --dry-run goes through the steps on the CPU")
    device = torch.device("cpu" if dry_run else "cuda")
    plan = Plan(repeats=2) if dry_run else Plan(repeats=10, warmups=2, budget_s=8.0)
    record = records.new_record("gpu", device, {**dataclasses.asdict(plan), "dry_run": dry_run})
    record.update(experiments={}, skipped=[], tests={"status": "not asked for"})

    def keep() -> None:
        records.save(record, out)

    clock = Clock(limit_s)
    keep()
    if "tests" in parts:
        say("the gpu lane of the tests")
        record["tests"] = gpu_tests(limit_s - TEST_MARGIN_S if tuple(parts) == ("tests",) else TEST_LIMIT_S)
        keep()
    main, rest = (tiny_cases(), []) if dry_run else (gpu_cases()[:8], gpu_cases()[8:])
    if "cases" in parts:
        held = EXPERIMENT_SHARE_S if "experiments" in parts else 0
        _run_cases(record, device, main, plan, Clock(clock.left() - held), keep)
    if "experiments" in parts:
        _run_experiments(record, device, dry_run, keep)
    if "cases" in parts:
        _run_cases(record, device, rest, plan, clock, keep)
    return record
