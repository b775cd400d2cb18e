# ruff: noqa: E402  # a script: its folders come first
"""Run two loops for many steps, and fail if memory, open files, threads, compilations or the time of a step grow.

    python tests/support/long_runs.py [STEPS]        # 2000 steps of SFT and of GRPO take about six minutes

The first quarter warms up caches and allocators. The second quarter is compared with the last one.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "support"), str(ROOT), str(ROOT / "kernels")]

import torch
from killed_runs import prepare, settings

from fastrl.train.run.run import Run

# Granted growth from the second quarter to the last: megabytes, and the share of the time of a step.
GRANTED_MB = 8.0
GRANTED_TIME = 0.25


@dataclass
class Watch:
    """Samples of one process, one a step."""

    memory_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    compiled: list[int] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Take a sample."""
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory_mb.append(pages * os.sysconf("SC_PAGE_SIZE") / 1e6)
        self.files.append(len(os.listdir("/proc/self/fd")))
        self.threads.append(threading.active_count())
        self.compiled.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
        self.ended.append(time.perf_counter())

    def quarters(self) -> dict[str, tuple[float, float]]:
        """Return the median of each quantity over the second and over the last quarter."""
        times = [1e3 * (b - a) for a, b in zip(self.ended, self.ended[1:], strict=False)]
        found = {
            "memory, MB": self.memory_mb, "open files": self.files, "threads": self.threads,
            "compilations": self.compiled, "time of a step, ms": times,
        }  # fmt: skip
        quarter = len(times) // 4
        return {
            name: (statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:]))
            for name, values in found.items()
        }


def long_run(loop: str, steps: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Run a loop and return the medians of its second and its last quarter."""
    import dataclasses

    watch = Watch()
    original = Run.finish_step

    def finish_step(self: Any, *arguments: Any) -> None:
        original(self, *arguments)
        watch.sample()

    Run.finish_step = finish_step  # pyright: ignore[reportAttributeAccessIssue]
    try:
        function, config = settings(loop, folder, folder / f"{loop}-long", resume=False)
        function(dataclasses.replace(config, steps=steps, checkpoint_every=50))
    finally:
        Run.finish_step = original
    return watch.quarters()


def grown(quarters: dict[str, tuple[float, float]]) -> list[str]:
    """Return the quantities that have grown by more than is granted."""
    found = []
    for name, (before, after) in quarters.items():
        granted = GRANTED_MB if "MB" in name else before * GRANTED_TIME if "ms" in name else 0.0
        if after > before + granted:
            found.append(f"{name}: {before:g} -> {after:g}")
    return found


def main() -> None:
    """Run both loops, print the medians, and exit with 1 if anything has grown."""
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
    torch.set_num_threads(1)
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        prepare(Path(scratch))
        for loop in ("sft", "grpo"):
            quarters = long_run(loop, steps, Path(scratch))
            print(f"{loop}, {steps} steps:", ", ".join(f"{k} {a:.5g} -> {b:.5g}" for k, (a, b) in quarters.items()))
            failed += [f"{loop}: {line}" for line in grown(quarters)]
    if failed:
        sys.exit("grown: " + "; ".join(failed))


if __name__ == "__main__":
    main()
