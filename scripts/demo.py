"""Train a small real model on arithmetic with GRPO and print the path of the report. `make demo` runs this.

The script resumes an unfinished run in runs/demo. It renames a finished one to runs/demo-1, runs/demo-2, ... and starts
a fresh run.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = Path("examples/demo.yaml")
RUN = Path("runs/demo")
REPORT = RUN / "report.html"


def set_aside(run: Path) -> Path:
    """Rename `run` to the first free numbered name beside it, and return that name."""
    target = next(name for n in itertools.count(1) if not (name := run.with_name(f"{run.name}-{n}")).exists())
    return run.rename(target)


def held_out(evaluations: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the held-out evaluations of the first evaluated mode, in the order of their steps."""
    rows = sorted((row for row in evaluations if row["split"] == "held_out"), key=lambda row: row["step"])
    return [row for row in rows if row["mode"] == rows[0]["mode"]]


def headline(evaluations: list[dict[str, Any]]) -> str:
    """Return held-out accuracy before and after, and the gain in standard errors of the difference."""
    rows = held_out(evaluations)
    if len(rows) < 2:
        return "no two held-out evaluations to compare"
    before, after = rows[0], rows[-1]
    error = math.hypot(before["standard_error"], after["standard_error"])
    gain = after["accuracy"] - before["accuracy"]
    in_errors = f" = {gain / error:.1f} standard errors" if error > 0 else ""
    return (
        f"held-out accuracy ({after['mode']}, {after['n']} problems): "
        f"{before['accuracy']:.1%} +- {before['standard_error']:.1%} before, "
        f"{after['accuracy']:.1%} +- {after['standard_error']:.1%} after {after['step']} steps; "
        f"gain {gain:+.1%}{in_errors}"
    )


def main() -> int:
    """Train, print the headline, and return the exit status of the training command."""
    run, report = ROOT / RUN, ROOT / REPORT
    if report.exists():
        print(f"==> the last run is finished; it is now {set_aside(run).relative_to(ROOT)}", flush=True)
    resume = run.exists()
    arguments = ["train", "grpo", "--config", str(CONFIG), "--run-dir", str(RUN), *(["--resume"] if resume else [])]
    print(f"==> {'resume' if resume else 'start'}: fastrl {' '.join(arguments)}", flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(
            [Path(sys.executable).with_name("fastrl"), *arguments], cwd=ROOT, check=False
        ).returncode
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    if status != 0:
        print(f"==> the run stopped with status {status}; `make demo` resumes it", flush=True)
        return status
    print(f"==> trained in {(time.monotonic() - start) / 60:.1f} minutes")
    print(f"==> {headline(json.loads((run / 'evaluations.json').read_text(encoding='utf-8')))}")
    print(f"==> report: {REPORT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
