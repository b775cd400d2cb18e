"""Metrics of a run as it goes: `metrics.jsonl`, a progress bar, and TensorBoard or Trackio if wanted.

`metrics.jsonl` has one line of strict JSON per step, in which null stands for a value that is not finite. `log` returns
after the file has the whole line. After a crash, opening the file again drops an incomplete last line.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

METRICS_FILE = "metrics.jsonl"

# The numbers beside the progress bar: label, pattern of the metric's name, format.
SHOWN: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("loss", re.compile(r"loss"), "{:.3f}"),
    ("reward", re.compile(r"reward(/mean|_mean)?"), "{:.3f}"),
    ("kl", re.compile(r"kl(/mean|_mean)?|approx_kl"), "{:.2g}"),
    ("entropy", re.compile(r"entropy(/mean|_mean)?"), "{:.2f}"),
    ("clip", re.compile(r"clip_(ratio|fraction)(/(region_)?mean)?"), "{:.1%}"),
    ("tok/s", re.compile(r"(.*/)?tokens_per_(s|sec|second)"), "{:,.0f}"),
)
# Number of lines, about, that a run prints without a terminal.
PLAIN_LINES = 50


class _Sink(Protocol):
    """Another tracker that receives the metrics."""

    def resume(self, step: int) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class RunTracker:
    """The metrics of one run. Use it as a context manager around the loop.

    with RunTracker(run_dir, total_steps) as tracker:
        tracker.resume(start)      # only if the run resumes
        for step in range(start + 1, total_steps + 1):
            ...
            tracker.log(step, {"reward": 0.5, "kl": 0.01})
    """

    def __init__(
        self, run_dir: str | Path, total_steps: int, *, tensorboard: bool = False, trackio: bool = False
    ) -> None:
        """Open the run directory, and create it if needed.

        Args:
            run_dir: folder of `metrics.jsonl` (and `tensorboard/`).
            total_steps: length of the run, for the bar and the remaining time.
            tensorboard: also write TensorBoard scalars.
            trackio: also log to Trackio, under the name of the directory.

        Raises:
            ImportError: a requested tracker is not installed. The message names the extra.
            ValueError: `metrics.jsonl` holds a line that is not a record of a step.
        """
        if total_steps < 0:
            raise ValueError(f"total_steps must be at least 0, got {total_steps}")
        self.run_dir = Path(run_dir)
        self.total_steps = total_steps
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._path = self.run_dir / METRICS_FILE
        self._last_step = _truncate(self._path, None)
        self._sinks: list[_Sink] = []
        if tensorboard:
            self._sinks.append(_Tensorboard(self.run_dir))
        if trackio:
            self._sinks.append(_Trackio(self.run_dir))
        self._file: IO[str] = self._path.open("a", encoding="utf-8")
        self._display = _Display(total_steps)

    def resume(self, step: int) -> None:
        """Continue after `step`. Drop the lines of later steps, which the run will write again. -1 drops all lines."""
        self._file.close()
        self._last_step = _truncate(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")
        self._display.start_at(max(step, 0))
        for sink in self._sinks:
            sink.resume(step)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record the metrics of one step.

        Args:
            step: greater than the last recorded step.
            metrics: name -> number, or a tensor with one element.

        Raises:
            ValueError: the step is not greater than the last one, or a name is empty or `step`.
            TypeError: a value is no number.
        """
        values = {name: _number(name, value) for name, value in metrics.items()}
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"step must be greater than {self._last_step}, the last one in {self._path}, got {step}: "
                f"call resume(step) to go on from a checkpoint, or use another run directory"
            )
        record = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **record}, allow_nan=False) + "\n")
        self._file.flush()
        self._last_step = step
        for sink in self._sinks:
            sink.log(step, values)
        self._display.update(step, values)

    def print(self, text: str) -> None:
        """Print a line above the progress bar."""
        self._display.print(text)

    def close(self) -> None:
        """Close the file, the bar and the other trackers."""
        self._display.stop()
        self._file.close()
        for sink in self._sinks:
            sink.close()
        self._sinks = []

    def __enter__(self) -> RunTracker:
        self._display.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl`, null as NaN, without an incomplete last line.

    Raises:
        ValueError: another line is not a record of a step. The message names the line.
    """
    records = []
    for _, record in _complete_lines(Path(path)):
        records.append({name: math.nan if value is None else value for name, value in record.items()})
    return records


def _complete_lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    lines = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), start=1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: expected JSON, got {line[:80]!r}") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: expected an object with an integer step, got {line[:80]!r}")
        lines.append((line, record))
    return lines


def _truncate(path: Path, last: int | None) -> int | None:
    """Drop an incomplete last line and, unless `last` is None, later steps. Return the last step that stays."""
    if not path.exists():
        return None
    kept = [(line, record) for line, record in _complete_lines(path) if last is None or record["step"] <= last]
    content = b"".join(line for line, _ in kept)
    if len(content) != path.stat().st_size:
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    return max((record["step"] for _, record in kept), default=None)


def _number(name: str, value: Any) -> float | int:
    if not isinstance(name, str) or not name or name == "step":
        raise ValueError(f"the name of a metric must be a string other than '' and 'step', got {name!r}")
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError) as error:  # torch's and numpy's for more than one element
            raise TypeError(f"metric {name!r} must be one number, got shape {tuple(value.shape)}") from error
    if not isinstance(value, numbers.Real):
        raise TypeError(f"metric {name!r} must be a number, got {type(value).__name__}")
    return int(value) if isinstance(value, numbers.Integral) else float(value)


class _Display:
    """A progress bar on a terminal, otherwise a line every few steps. Both go to stderr."""

    def __init__(self, total_steps: int) -> None:
        try:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TimeElapsedColumn,
                TimeRemainingColumn,
            )
        except ModuleNotFoundError as error:
            raise ImportError('the progress bar needs rich: pip install "fastrl[train]"') from error
        self._console = Console(stderr=True, soft_wrap=True, highlight=False)
        self._every = max(1, total_steps // PLAIN_LINES)
        self._total = total_steps
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("steps", total=total_steps, shown="")

    def start(self) -> None:
        self._progress.start()

    def start_at(self, step: int) -> None:
        # reset, not update: steps of the earlier process must not count towards the speed.
        self._progress.reset(self._task, total=self._total, completed=step, shown="")

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        shown = _shown(metrics)
        self._progress.update(self._task, completed=step, shown=shown)
        if self._progress.disable and (step % self._every == 0 or step >= self._total):
            self.print(f"step {step}/{self._total}  {shown}")

    def print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def stop(self) -> None:
        self._progress.stop()


def _shown(metrics: Mapping[str, float]) -> str:
    parts = []
    for label, pattern, form in SHOWN:
        found = next((value for name, value in metrics.items() if pattern.fullmatch(name)), None)
        if found is not None:
            parts.append(f"{label} {form.format(found)}")
    return "  ".join(parts)


class _Tensorboard:
    def __init__(self, run_dir: Path) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ModuleNotFoundError as error:
            raise ImportError('tensorboard=True needs TensorBoard: pip install "fastrl[track]"') from error
        self._folder = str(run_dir / "tensorboard")
        self._open = SummaryWriter
        self._writer = SummaryWriter(log_dir=self._folder)

    def resume(self, step: int) -> None:
        self._writer.close()
        self._writer = self._open(log_dir=self._folder, purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Trackio:
    def __init__(self, run_dir: Path) -> None:
        try:
            import trackio
        except ModuleNotFoundError as error:
            raise ImportError('trackio=True needs Trackio: pip install "fastrl[track]"') from error
        self._trackio: Any = trackio
        trackio.init(project="fastrl", name=run_dir.resolve().name)

    def resume(self, step: int) -> None:
        """Do nothing: Trackio cannot remove steps, so it shows repeated ones twice."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._trackio.log({name: value for name, value in metrics.items() if math.isfinite(value)}, step=step)

    def close(self) -> None:
        self._trackio.finish()
