"""The record of a run: a summary and a picture, small enough for a repository. The model stays in the run's folder.

    fastrl report runs/sft --record reports/sft

writes `summary.json` and `curves.png`. The summary holds

    steps, training_seconds    seconds are summed over the steps, without loading and evaluations
    gains                      every measure before and after training
    evaluations                every evaluation
    curve                      the main metrics over the steps, at most 20 rows
    metrics                    first, last, smallest and largest value of every metric
    settings, environment      configuration, machine, versions, backends
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.train.run.report import RecordedRun, gains, read_json, read_run, write_report
from fastrl.train.run.tracking import METRICS_FILE, SHOWN

NEEDED = ("config.json", "environment.json", "evaluations.json", METRICS_FILE)
SUMMARY, CURVES = "summary.json", "curves.png"
MAX_BYTES = 300_000
MAX_ROWS = 20
LINE_WIDTH = 120


def write_record(run_dir: str | Path, record_dir: str | Path) -> list[Path]:
    """Write the report of the run and its record, and return the record's files.

    It replaces an earlier record in the folder, and leaves other files there alone.

    Args:
        run_dir: the folder of a run. `report.html` and `curves.png` are written into it.
        record_dir: the folder of the record, made if there is none.

    Raises:
        FileNotFoundError: no such run, or the run lacks a file that the summary is made of.
        ValueError: the run cannot be read, the record would be the run's own folder, or its files are larger than
            300 kB together, which is not small enough for a repository.
    """
    run_dir, record_dir = Path(run_dir), Path(record_dir)
    if run_dir.resolve() == record_dir.resolve():
        raise ValueError(f"the record must have a folder of its own, got that of the run, {str(run_dir)!r}")
    write_report(run_dir)
    if missing := [name for name in NEEDED if not (run_dir / name).is_file()]:
        raise FileNotFoundError(f"{run_dir} has no {', '.join(missing)}; a record takes {', '.join(NEEDED)}")
    text = _rendered(summary(run_dir)) + "\n"
    size = len(text.encode()) + (run_dir / CURVES).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"the files of the record must have at most {MAX_BYTES:,} bytes together, got {size:,}")
    record_dir.mkdir(parents=True, exist_ok=True)
    (record_dir / SUMMARY).write_text(text, encoding="utf-8")
    shutil.copyfile(run_dir / CURVES, record_dir / CURVES)
    return [record_dir / SUMMARY, record_dir / CURVES]


def summary(run_dir: str | Path) -> dict[str, Any]:
    """Return the content of `summary.json` as JSON values. An unknown number is None."""
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    content = {
        "steps": max((record["step"] for record in run.metrics), default=0),
        "training_seconds": _total(run.metrics, "time/step"),
        "gains": [
            {
                "split": gain.series.split,
                "mode": gain.series.mode,
                "measure": gain.series.measure.name,
                "better": gain.series.measure.better,
                "before": dataclasses.asdict(gain.before),
                "after": dataclasses.asdict(gain.after),
                "difference": gain.difference,
                "in_standard_errors": gain.in_standard_errors,
            }
            for gain in gains(run.evaluations)
        ],
        "evaluations": read_json(run_dir / "evaluations.json", list),
        "curve": _curve(run),
        "metrics": _ranges(run),
        "settings": run.config,
        "environment": run.environment,
    }
    return _finite(content)


def _curve(run: RecordedRun) -> dict[str, Any]:
    """Return the metrics that the progress bar shows as a table: `columns`, and `rows` in their order."""
    names = list(dict.fromkeys(name for record in run.metrics for name in record))
    shown = [name for _, pattern, _ in SHOWN for name in names if pattern.fullmatch(name)]
    columns = ["step", *dict.fromkeys(shown)]
    count = min(MAX_ROWS, len(run.metrics))
    # Evenly spaced, and always with the first and the last step.
    places = [round(i * (len(run.metrics) - 1) / max(1, count - 1)) for i in range(count)]
    return {"columns": columns, "rows": [[_short(run.metrics[i].get(name)) for name in columns] for i in places]}


def _ranges(run: RecordedRun) -> dict[str, dict[str, float | None]]:
    """Return the first, last, smallest and largest value of each metric. Unknown values do not count."""
    values: dict[str, list[float]] = {}
    for record in run.metrics:
        for name, value in record.items():
            known = _short(value)
            if name != "step" and known is not None:
                values.setdefault(name, []).append(known)
    return {name: {"first": v[0], "last": v[-1], "min": min(v), "max": max(v)} for name, v in values.items()}


def _short(value: Any) -> float | None:
    """Return a finite number with 6 significant digits, and None for anything else."""
    known = isinstance(value, (int, float)) and math.isfinite(value)
    return (value if isinstance(value, int) else float(f"{value:.6g}")) if known else None


def _total(metrics: Sequence[Mapping[str, Any]], name: str) -> float | None:
    known = [record[name] for record in metrics if isinstance(record.get(name), (int, float))]
    return float(sum(known)) if known else None


def _finite(value: Any) -> Any:
    """Return a JSON value with None for every number that is not finite."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rendered(value: Any, depth: int = 0, before: int = 0) -> str:
    """Return JSON in which a list or an object takes one line if it fits, so that a row of a table is a line."""
    line = json.dumps(value, allow_nan=False)
    if not isinstance(value, (dict, list)) or not value or before + depth + len(line) < LINE_WIDTH:
        return line
    names = [f"{json.dumps(name)}: " for name in value] if isinstance(value, dict) else [""] * len(value)
    items = list(value.values()) if isinstance(value, dict) else value
    margin = " " * (depth + 1)
    parts = [f"{margin}{n}{_rendered(item, depth + 1, len(n))}" for n, item in zip(names, items, strict=True)]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return f"{opening}\n" + ",\n".join(parts) + f"\n{' ' * depth}{closing}"
