# ruff: noqa: E402  # a script: its folders come first
"""Kill runs of four loops at random moments, resume them, and compare them to the bit with runs that nobody killed.

    python tests/support/killed_runs.py [KILLS] [SEED] [FOLDER]        # 200 kills take a few minutes

A run is a fork of this process, which has imported everything, so that a kill costs a second and not ten. A kill comes
at a random moment of the run's expected time: during the start, a step, a checkpoint, or the end.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT), str(ROOT / "kernels")]

import torch
from tiny_model import save_tiny_model
from tqdm import tqdm

from fastrl.train.config import DPOConfig, GRPOConfig, PPOConfig, SFTConfig
from fastrl.train.dpo import run_dpo
from fastrl.train.grpo import run_grpo
from fastrl.train.ppo import run_ppo
from fastrl.train.run.checkpoint import latest_checkpoint, load_checkpoint
from fastrl.train.sft import run_sft

# tqdm's own lock is shared by forks: a run that is killed while it draws a bar would keep it for all later ones.
tqdm.set_lock(threading.RLock())

STEPS = 8
LOOPS = ("sft", "dpo", "grpo", "ppo")


@dataclass
class Count:
    """What happened over all runs."""

    kills: int = 0
    runs: int = 0
    before_the_first_checkpoint: int = 0


def settings(loop: str, folder: Path, run_dir: Path, *, resume: bool) -> tuple[Any, Any]:
    """Return the function of a loop and its configuration."""
    common: dict[str, Any] = {
        "model": str(folder / "model"), "run_dir": str(run_dir), "device": "cpu", "steps": STEPS, "resume": resume,
        "checkpoint_every": 1, "keep_checkpoints": 2, "learning_rate": 1e-3, "prompt_template": "{prompt}", "seed": 3,
    }  # fmt: skip
    given = {"data": str(folder / f"{loop}.jsonl"), "eval_share": 0.0}
    sampled = {
        "task": "chain_sum", "prompts_per_step": 2, "max_new_tokens": 6, "eval_problems": 0, "reward_timeout_s": None,
        "rewards": {"tiny_model:digit_share": 1.0},
    }  # fmt: skip
    if loop == "sft":
        return run_sft, SFTConfig(**common, **given, examples_per_step=2)
    if loop == "dpo":
        return run_dpo, DPOConfig(**common, **given, examples_per_step=2)
    if loop == "grpo":
        return run_grpo, GRPOConfig(**common, **sampled, group_size=4)
    return run_ppo, PPOConfig(**common, **sampled)


def prepare(folder: Path) -> None:
    """Write the model and the data."""
    save_tiny_model(folder / "model")
    rows = [(f"{a}+{b}=", str(a + b), str(a + b + 1)) for a in range(1, 5) for b in range(1, 5)]
    sft = [{"prompt": prompt, "completion": right} for prompt, right, _ in rows]
    dpo = [{"prompt": prompt, "chosen": right, "rejected": wrong} for prompt, right, wrong in rows]
    for name, records in (("sft", sft), ("dpo", dpo)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def start(loop: str, folder: Path, run_dir: Path, *, resume: bool) -> int:
    """Fork a run and return its process."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(os.open(run_dir.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            function, config = settings(loop, folder, run_dir, resume=resume)
            function(config)
            code = 0
        except BaseException:
            logging.exception("the run failed")
        finally:
            os._exit(code)
    return child


def whole_run(loop: str, folder: Path, run_dir: Path) -> float:
    """Run a loop without a kill and return its seconds."""
    begun = time.monotonic()
    _, status = os.waitpid(start(loop, folder, run_dir, resume=False), 0)
    if status != 0:
        raise RuntimeError(f"{loop} failed without a kill: {run_dir.with_suffix('.log').read_text()[-3000:]}")
    return time.monotonic() - begun


def killed_run(
    loop: str, folder: Path, run_dir: Path, draw: random.Random, seconds: float, count: Count, most: int
) -> None:
    """Run a loop to its end with kills at random moments, checking after each that no completed step is lost."""
    done = 0
    kills = 0
    while True:
        child = start(loop, folder, run_dir, resume=True)
        deadline = time.monotonic() + draw.random() * seconds * (1.0 - 0.8 * done / STEPS)
        killing = kills < most
        while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if killing and time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                break
            time.sleep(0.002)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            kills += 1
            count.kills += 1
        elif status != 0:
            raise RuntimeError(f"{loop} could not be resumed: {run_dir.with_suffix('.log').read_text()[-3000:]}")
        newest = latest_checkpoint(run_dir / "checkpoints") if (run_dir / "checkpoints").is_dir() else None
        step = 0 if newest is None else int(load_checkpoint(newest).state["step"])
        count.before_the_first_checkpoint += newest is None
        if step < done:
            raise AssertionError(
                f"{loop}: step {done} was completed, after a kill the newest checkpoint is of step {step}"
            )
        done = step
        if status == 0:
            return


def compare(loop: str, wanted: Path, got: Path) -> None:
    """Raise unless two finished runs have the same weights to the bit and the same steps in their metrics."""
    for name in ("model/model.safetensors",):
        if (wanted / name).read_bytes() != (got / name).read_bytes():
            raise AssertionError(f"{loop}: {name} differs from the run that nobody killed")
    steps = [json.loads(line)["step"] for line in (got / "metrics.jsonl").read_text().splitlines()]
    if steps != list(range(1, STEPS + 1)):
        raise AssertionError(f"{loop}: metrics.jsonl holds the steps {steps}")


def kill_runs(kills: int, seed: int, folder: Path) -> Count:
    """Kill runs until `kills` kills have happened, and return the counts. Raises at the first difference."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder)
    draw, count = random.Random(seed), Count()
    seconds = {loop: whole_run(loop, folder, folder / f"{loop}-whole") for loop in LOOPS}
    while count.kills < kills:
        for loop in LOOPS:
            run_dir = folder / f"{loop}-{count.runs}"
            killed_run(loop, folder, run_dir, draw, seconds[loop], count, min(8, kills - count.kills))
            compare(loop, folder / f"{loop}-whole", run_dir)
            shutil.rmtree(run_dir)
            count.runs += 1
    return count


def main() -> None:
    """Kill runs and print the counts."""
    arguments = sys.argv[1:]
    kills, seed = (int(x) for x in (*arguments[:2], *("200", "0")[len(arguments[:2]) :]))
    with tempfile.TemporaryDirectory() as scratch:
        count = kill_runs(kills, seed, Path(arguments[2]) if len(arguments) > 2 else Path(scratch))
    print(
        f"{count.kills} kills in {count.runs} runs ({', '.join(LOOPS)}), {count.before_the_first_checkpoint} of them "
        "before the first checkpoint: no completed step lost, all bits equal to the runs that nobody killed"
    )


if __name__ == "__main__":
    main()
