"""The record of a run: the few small files that are worth keeping when its folder, with the model in it, is not.

    fastrl report runs/sft --record reports/sft

writes the settings, the versions and the machine, every evaluation, the metrics of every step and the curves, and
`summary.json`: what each measure was before and after, and how long the steps took. Nothing is measured anew.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.train.run.checkpoint import write_json
from fastrl.train.run.report import gains, read_run, write_report

FILES = ("config.json", "environment.json", "evaluations.json", "metrics.jsonl", "curves.png")
SUMMARY = "summary.json"
MAX_BYTES = 300_000


def write_record(run_dir: str | Path, record_dir: str | Path) -> list[Path]:
    """Write the report of the run and its record, and return the record's files.

    A record that is in the folder already is replaced; other files there are left alone.

    Args:
        run_dir: the folder of a run; `report.html` and `curves.png` are written into it.
        record_dir: the folder of the record, made where there is none.

    Raises:
        FileNotFoundError: no such run, or a file of the record is missing in it.
        ValueError: the run cannot be read, the record would be the run's own folder, or its files are larger than
            300 kB together, which is not small enough for a repository.
    """
    run_dir, record_dir = Path(run_dir), Path(record_dir)
    if run_dir.resolve() == record_dir.resolve():
        raise ValueError(f"the record must have a folder of its own, got that of the run, {str(run_dir)!r}")
    write_report(run_dir)
    if missing := [name for name in FILES if not (run_dir / name).is_file()]:
        raise FileNotFoundError(f"{run_dir} has no {', '.join(missing)}; a record takes {', '.join(FILES)}")
    size = sum((run_dir / name).stat().st_size for name in FILES)
    if size > MAX_BYTES:
        raise ValueError(f"the files of the record must have at most {MAX_BYTES:,} bytes together, got {size:,}")
    record_dir.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        shutil.copyfile(run_dir / name, record_dir / name)
    write_json(record_dir / SUMMARY, summary(run_dir))
    return [record_dir / name for name in (*FILES, SUMMARY)]


def summary(run_dir: str | Path) -> dict[str, Any]:
    """Return what the run changed, as JSON values: every measure before and after, its steps and their seconds.

    A number that is not known is None. `training_seconds` is the sum over the steps, without loading the model and
    without evaluations.
    """
    run = read_run(run_dir)
    return {
        "steps": max((record["step"] for record in run.metrics), default=0),
        "training_seconds": _total(run.metrics, "time/step"),
        "gains": [
            {
                "split": gain.series.split,
                "mode": gain.series.mode,
                "measure": gain.series.measure.name,
                "better": gain.series.measure.better,
                "before": _finite(dataclasses.asdict(gain.before)),
                "after": _finite(dataclasses.asdict(gain.after)),
                **_finite({"difference": gain.difference, "in_standard_errors": gain.in_standard_errors}),
            }
            for gain in gains(run.evaluations)
        ],
    }


def _total(metrics: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [record[name] for record in metrics if isinstance(record.get(name), (int, float))]
    return float(sum(known)) if known else None


def _finite(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if abs(value) < float("inf") else None for name, value in values.items()}
