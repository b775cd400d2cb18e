"""The GPU run: correctness first, then the cases, then experiments that settle block and chunk sizes.

The record is written after every step, so that a run that is cut short still says what it found. `dry_run` goes through
the same steps on the CPU at tiny shapes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import record as records
from bench.baselines import fastrl_contender
from bench.cases import MODELS, Case, gpu_cases, make_inputs, tiny_cases
from bench.measure import Plan, measure, quartiles, release
from bench.suite import run_case, say
from bench.targets import gpu_targets

TEST_LIMIT_S = 200
# One run should end before 8 minutes; cases and experiments share what the tests leave.
RUN_LIMIT_S = 440
EXPERIMENT_SHARE_S = 70


@dataclasses.dataclass
class Clock:
    """How much of the run's time is left."""

    limit_s: float
    begin: float = dataclasses.field(default_factory=time.monotonic)

    def left(self) -> float:
        """Return the seconds left."""
        return self.limit_s - (time.monotonic() - self.begin)


def gpu_tests(limit_s: float = TEST_LIMIT_S) -> dict[str, Any]:
    """Return how the gpu lane of the test suite went."""
    if importlib.util.find_spec("pytest") is None:
        return {"status": "missing", "reason": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--tb=line", "tests"]
    if importlib.util.find_spec("pytest_timeout") is None:
        # Its option in pyproject.toml is unknown then, which strict settings turn into an error.
        command += ["-o", "addopts=-ra -p no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=records.ROOT, env=environment, capture_output=True, text=True, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else (late.stdout or "")
        return {"status": "out of time", "limit_s": limit_s, "tail": output.splitlines()[-30:]}
    tail = (done.stdout + done.stderr).splitlines()[-40:]
    # 5: no test of the lane was collected, which is no success.
    return {"status": "passed" if done.returncode == 0 else "failed", "returncode": done.returncode, "tail": tail}


def _times(actions: dict[str, Callable[[], Any]], device: torch.device, repeats: int) -> dict[str, dict[str, float]]:
    """Return the spread of the seconds of each action; one that raises says so instead."""
    working, results = {}, {}
    for name, action in actions.items():
        try:
            action()
        except (RuntimeError, ValueError, TypeError) as error:
            results[name] = {"failed": str(error).splitlines()[0][:200]}
        else:
            working[name] = action
    seconds = measure(working, device, Plan(repeats=repeats, warmups=2, budget_s=10.0))
    return {**results, **{name: quartiles(values) for name, values in seconds.items()}}


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
        found.append({"rows": rows, "d": d, "v": v, "flop": 2 * rows * d * v, "seconds": _times(actions, device, 10)})
        del hidden, weight, wide, narrow, gradient_of_head, actions
        release(device)
    return found


@contextmanager
def tiles(module: Any, tile: Any) -> Iterator[None]:
    """Make the row kernels take one tile for every dtype and row length, and put their tables back."""
    names = ("FWD_TILES", "BWD_TILES")
    kept = {name: getattr(module, name) for name in names}
    for name in names:
        setattr(module, name, dict.fromkeys((2, 4, 8), ((2**31, tile),)))
    try:
        yield
    finally:
        for name, table in kept.items():
            setattr(module, name, table)


def tile_experiment(device: torch.device, dry_run: bool) -> list[dict[str, Any]]:
    """Time the Triton row kernels at several tiles: entries per step and warps per program."""
    if importlib.util.find_spec("triton") is None:
        return [{"missing": "triton is not installed"}]
    from fastrl_kernels import launch, token_logprobs

    blocks = (64,) if dry_run else (1024, 2048, 4096, 8192, 16384)
    shapes = [(4, 300, torch.float32)] if dry_run else [(2048, 151936, torch.float32), (8192, 151936, torch.bfloat16)]
    if dry_run and not launch.interpreting():
        return [{"missing": "a dry run needs TRITON_INTERPRET=1 for the Triton kernels"}]
    found = []
    for n, v, dtype in shapes:
        logits = torch.randn(n, v, device=device).mul_(3.0).to(dtype)
        labels = torch.randint(0, v, (n,), device=device)
        out = torch.empty_like(logits)
        logprobs, entropy, logsumexp = token_logprobs.token_logprobs_fwd(logits, labels, 1.0)
        # The row kernels take what the forward returned, and the gradients of the three outputs.
        rest = (logprobs, entropy, logsumexp, torch.ones_like(logprobs), None, None)
        actions: dict[str, Callable[[], Any]] = {"copy": lambda a=logits, b=out: b.copy_(a)}

        def with_tile(tile: Any, action: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                with tiles(token_logprobs, tile):
                    return action()

            return run

        def forward(x: torch.Tensor = logits, y: torch.Tensor = labels) -> Any:
            return token_logprobs.token_logprobs_fwd(x, y, 1.0)

        def backward(x: torch.Tensor = logits, y: torch.Tensor = labels, o: torch.Tensor = out, r: Any = rest) -> Any:
            return token_logprobs.token_logprobs_bwd(x, y, 1.0, *r, out=o)

        for block in blocks:
            for warps in (4,) if dry_run else (4, 8, 16):
                tile = launch.Tile(block, warps)
                actions[f"forward {block}x{warps}"] = with_tile(tile, forward)
                actions[f"backward {block}x{warps}"] = with_tile(tile, backward)
        actions["forward as shipped"], actions["backward as shipped"] = forward, backward
        spread = _times(actions, device, 10)
        found.append({"n": n, "v": v, "dtype": str(dtype).removeprefix("torch."), "seconds": spread})
        del logits, labels, out, logprobs, entropy, logsumexp, rest, actions, forward, backward
        release(device)
    return found


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
        found.append({**case.describe(), "seconds_by_chunk": _times(actions, device, 10)})
        del inputs, actions
        release(device)
    return found


EXPERIMENTS = {"gemm": gemm_experiment, "tiles": tile_experiment, "chunks": chunk_experiment}


def _run_experiments(record: dict[str, Any], device: torch.device, dry_run: bool, keep: Callable[[], None]) -> None:
    for name, experiment in EXPERIMENTS.items():
        say(f"experiment: {name}")
        try:
            record["experiments"][name] = experiment(device, dry_run)
        except Exception as error:  # an experiment must not cost the rest of the run; the record says what happened
            record["experiments"][name] = [{"failed": f"{type(error).__name__}: {error}"[:500]}]
        release(device)
        keep()


def _run_cases(
    record: dict[str, Any], device: torch.device, cases: list[Case], plan: Plan, clock: Clock, keep: Callable[[], None]
) -> None:
    slowest = 0.0
    for case in cases:
        # The later cases are no larger than the first: what the slowest took is what the next may take.
        if clock.left() < slowest:
            record["skipped"].append({**case.describe(), "reason": "out of time"})
            continue
        begin = time.monotonic()
        say(f"{case.operation} {case.model.name} N={case.tokens}, {clock.left():.0f} s left")
        try:
            record["results"].append(run_case(case, device, plan))
        except Exception as error:  # for example out of memory; the record says what happened
            record["skipped"].append({**case.describe(), "reason": f"{type(error).__name__}: {error}"[:500]})
        release(device)
        slowest = max(slowest, time.monotonic() - begin)
        record["targets"] = gpu_targets(record["results"])
        keep()


def run_gpu(out: Path, *, dry_run: bool = False, tests: bool = True) -> dict[str, Any]:
    """Return the record of the GPU run, written to `out` after every step.

    Args:
        out: folder of the result file.
        dry_run: go through the steps on the CPU at tiny shapes.
        tests: run the gpu lane of the test suite first.
    """
    if not dry_run and not torch.cuda.is_available():
        raise RuntimeError("no GPU: torch.cuda.is_available() is False; --dry-run goes through the steps on the CPU")
    device = torch.device("cpu" if dry_run else "cuda")
    plan = Plan(repeats=2) if dry_run else Plan(repeats=10, warmups=3, budget_s=15.0)
    record = records.new_record("gpu", device, {**dataclasses.asdict(plan), "dry_run": dry_run})
    record.update(experiments={}, skipped=[], tests={"status": "not asked for"})

    def keep() -> None:
        records.save(record, out)

    clock = Clock(RUN_LIMIT_S)
    keep()
    if tests:
        say("the gpu lane of the tests")
        record["tests"] = gpu_tests()
        keep()
    main, rest = (tiny_cases(), []) if dry_run else (gpu_cases()[:8], gpu_cases()[8:])
    _run_cases(record, device, main, plan, Clock(clock.left() - EXPERIMENT_SHARE_S), keep)
    _run_experiments(record, device, dry_run, keep)
    _run_cases(record, device, rest, plan, clock, keep)
    return record
