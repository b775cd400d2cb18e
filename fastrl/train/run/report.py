"""The report of a run: one self-contained HTML file, and its curves as a PNG.

It reads `metrics.jsonl`, `evaluations.json`, `samples.json`, `config.json` and `environment.json` in the run's
directory. The report names missing files and leaves out their parts. A value that is not a number is a gap in a curve.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastrl.train.run.curves import MAX_VALUE, Series, draw_curves
from fastrl.train.run.measure import ACCURACY, Measure
from fastrl.train.run.tracking import METRICS_FILE, read_metrics

MAX_SAMPLES = 12
MAX_TEXT = 600


@dataclasses.dataclass(frozen=True)
class EvaluationPoint:
    """The value of one series at one step."""

    step: int
    value: float
    standard_error: float
    """NaN if it was not recorded and cannot be computed."""
    n: int
    """Number of examples, 0 if it was not recorded."""


@dataclasses.dataclass(frozen=True)
class Gain:
    """The first and the last evaluation of one series."""

    series: Series
    before: EvaluationPoint
    after: EvaluationPoint

    @property
    def difference(self) -> float:
        """The value after training minus the value before."""
        return self.after.value - self.before.value

    @property
    def standard_error(self) -> float:
        """Standard error of the difference, if the two evaluations are independent."""
        return math.hypot(self.before.standard_error, self.after.standard_error)

    @property
    def in_standard_errors(self) -> float:
        """The difference divided by its standard error, NaN without one."""
        return self.difference / self.standard_error if self.standard_error > 0 else math.nan


Evaluations = dict[Series, list[EvaluationPoint]]


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """The content of a run directory. The field of a missing file is empty."""

    name: str
    metrics: list[dict[str, Any]]
    evaluations: Evaluations
    """Series (split, mode, measure) -> its values in the order of steps."""
    samples: list[dict[str, Any]]
    config: dict[str, Any]
    environment: dict[str, Any]


def write_report(run_dir: str | Path) -> Path:
    """Write `curves.png` and `report.html` into the run directory and return the path of `report.html`.

    Raises:
        FileNotFoundError: no such directory.
        ValueError: the directory holds neither metrics nor evaluations, or a file has the wrong form.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    image = draw_curves(run.metrics, {key: _columns(points) for key, points in run.evaluations.items()})
    (run_dir / "curves.png").write_bytes(image)
    path = run_dir / "report.html"
    path.write_text(_page(run, image), encoding="utf-8")
    return path


def read_run(run_dir: str | Path) -> RecordedRun:
    """Return the content of a run directory. It raises the errors of `write_report`."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"{run_dir} is not a directory; expected the directory of a run")
    metrics_path = run_dir / METRICS_FILE
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    evaluations = _evaluations(read_json(run_dir / "evaluations.json", list))
    if not metrics and not evaluations:
        raise ValueError(f"{run_dir} holds neither {METRICS_FILE} nor evaluations.json with an entry: no run to report")
    return RecordedRun(
        name=run_dir.resolve().name,
        metrics=metrics,
        evaluations=evaluations,
        samples=[sample for sample in read_json(run_dir / "samples.json", list) if isinstance(sample, dict)],
        config=read_json(run_dir / "config.json", dict),
        environment=read_json(run_dir / "environment.json", dict),
    )


def gains(evaluations: Evaluations) -> list[Gain]:
    """Return the gain of every series with evaluations at two steps or more, held-out splits first."""
    found = []
    for series, points in evaluations.items():
        known = [point for point in points if math.isfinite(point.value)]
        if len(known) > 1 and known[0].step < known[-1].step:
            found.append(Gain(series, known[0], known[-1]))
    return sorted(found, key=lambda gain: not gain.series.split.startswith("held"))


def read_json(path: Path, kind: type) -> Any:
    """Return the list or dict in a JSON file, an empty one if there is no file."""
    if not path.exists():
        return kind()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} must hold a {kind.__name__}, got {type(content).__name__}")
    return content


def _evaluations(entries: Iterable[Any]) -> Evaluations:
    # A resumed run may evaluate a step again. The later entry counts.
    by_series: dict[Series, dict[int, EvaluationPoint]] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        series = Series(str(entry.get("split", "held_out")), str(entry.get("mode", "")), Measure.of(entry))
        point = _evaluation(entry, share=series.measure.share)
        by_series.setdefault(series, {})[point.step] = point
    return {series: [points[step] for step in sorted(points)] for series, points in by_series.items()}


def _evaluation(entry: Mapping[str, Any], *, share: bool) -> EvaluationPoint:
    value, n = _float(entry.get("value", entry.get("accuracy"))), _float(entry.get("n"))
    error = _float(entry.get("standard_error"))
    highest = 1.0 if share else MAX_VALUE
    value = value if (0.0 if share else -highest) <= value <= highest else math.nan
    error = error if 0.0 <= error <= highest else math.nan
    if share and math.isnan(error) and n > 0:
        error = math.sqrt(value * (1.0 - value) / n)
    return EvaluationPoint(entry["step"], value, error, int(n) if n > 0 else 0)


def _columns(points: Sequence[EvaluationPoint]) -> tuple[list[int], list[float], list[float]]:
    return (
        [point.step for point in points],
        [point.value for point in points],
        [point.standard_error for point in points],
    )


def _float(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def _page(run: RecordedRun, image: bytes) -> str:
    picture = base64.b64encode(image).decode()
    title = html.escape(f"fastrl run {run.name}")
    sections = [
        _headline(run),
        f'<section><h2>Curves</h2><img alt="Training curves" src="data:image/png;base64,{picture}"></section>',
        _samples(run.samples),
        _table("Configuration", run.config, "config.json was not recorded."),
        _table("Versions and machine", run.environment, "environment.json was not recorded."),
    ]
    body = "\n".join(sections)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>\n</head>\n'
        f"<body>\n<main>\n<header><p>fastrl training report</p><h1>{html.escape(run.name)}</h1></header>\n{body}\n"
        "</main>\n</body>\n</html>\n"
    )


def _headline(run: RecordedRun) -> str:
    found = gains(run.evaluations)
    cards = [_gain_card(gain) for gain in found] or [
        _card("Evaluation", "no gain to report", "it takes evaluations at two steps or more")
    ]
    if run.metrics:
        cards.append(_card("Steps", f"{max(record['step'] for record in run.metrics):,}", _described(run)))
    return f'<section class="cards">{"".join(cards)}</section>'


def _gain_card(gain: Gain) -> str:
    before, after, series = gain.before, gain.after, gain.series
    measure = series.measure
    name = f"{series.split.replace('_', '-')} {measure.name}" + (f", {series.mode}" if series.mode else "")
    if measure.better == "lower":
        name += " (lower is better)"
    change = measure.text(gain.difference, signed=True)
    if math.isfinite(gain.in_standard_errors):
        change += f" = {gain.in_standard_errors:+.1f} standard errors"
    counts = f"step {before.step} &rarr; {after.step}"
    if before.n and after.n:
        noun = "problems" if measure == ACCURACY else "examples"
        counts += f", {after.n} {noun}" if before.n == after.n else f", {before.n} and {after.n} {noun}"
    numbers = (
        f"<span>{_value(measure, before)}</span> <span class='arrow'>&rarr;</span> "
        f"<span><strong>{_value(measure, after)}</strong></span>"
    )
    direction = {True: "up", False: "down", None: "same"}[measure.improved(gain.difference)]
    return (
        f'<div class="card wide"><h3>{html.escape(name)}</h3><p class="number">{numbers}</p>'
        f"<p class='change {direction}'>{change}</p><p>{counts}</p></div>"
    )


def _value(measure: Measure, point: EvaluationPoint) -> str:
    if not math.isfinite(point.standard_error):
        return measure.text(point.value)
    error = f"{100 * point.standard_error:.1f}" if measure.share else f"{point.standard_error:.2g}"
    return f"{measure.text(point.value)}<small> &plusmn; {error}</small>"


def _card(name: str, number: str, below: str) -> str:
    return (
        f'<div class="card"><h3>{html.escape(name)}</h3><p class="number">{html.escape(number)}</p>'
        f"<p>{html.escape(below)}</p></div>"
    )


def _described(run: RecordedRun) -> str:
    parts = [
        f"{key} {run.config[key]}" for key in ("model", "data", "task", "loss") if isinstance(run.config.get(key), str)
    ]
    return ", ".join(parts)


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    """Show the completions of the first and of the last step, prompt by prompt."""
    steps = sorted({sample["step"] for sample in samples if isinstance(sample.get("step"), int)})
    if not steps:
        return "<section><h2>Completions</h2><p>samples.json was not recorded.</p></section>"
    first, last = steps[0], steps[-1]
    by_prompt: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for sample in samples:
        if sample.get("step") in (first, last):
            by_prompt.setdefault(str(sample.get("prompt", "")), {}).setdefault(sample["step"], []).append(sample)
    # Prompts with completions of both steps come first.
    chosen = sorted(by_prompt.items(), key=lambda item: -len(item[1]))[:MAX_SAMPLES]
    wanted = (first,) if first == last else (first, last)
    rows = []
    for prompt, at_step in chosen:
        answer = next(iter(next(iter(at_step.values())))).get("answer")
        cells = "".join(f"<td>{''.join(_completion(s) for s in at_step.get(step, [])[:2])}</td>" for step in wanted)
        known = f"<p class='answer'>answer: {_text(answer)}</p>" if answer is not None else ""
        rows.append(f"<tr><td class='prompt'>{_text(prompt)}{known}</td>{cells}</tr>")
    heads = "".join(f"<th>step {step}</th>" for step in wanted)
    note = f"<p>{len(chosen)} of {len(by_prompt)} prompts.</p>" if len(chosen) < len(by_prompt) else ""
    return (
        f'<section><h2>Completions</h2><table class="samples"><thead><tr><th>prompt</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{note}</section>"
    )


def _completion(sample: Mapping[str, Any]) -> str:
    reward = _float(sample.get("reward"))
    kind = "good" if reward >= 1 else "none" if math.isnan(reward) else "bad" if reward <= 0 else "part"
    shown = "no reward" if math.isnan(reward) else f"{reward:.2f}"
    mode = f"<small>{_text(sample['mode'])}</small>" if sample.get("mode") else ""
    text = _text(str(sample.get("completion", "")).strip())
    return f"<div class='completion'><span class='{kind}'>{shown}</span>{mode}<pre>{text}</pre></div>"


def _text(value: Any) -> str:
    text = str(value).encode(errors="replace").decode()
    more = f" … ({len(text) - MAX_TEXT:,} more characters)" if len(text) > MAX_TEXT else ""
    return html.escape(text[:MAX_TEXT] + more)


def _table(title: str, content: Mapping[str, Any], missing: str) -> str:
    if not content:
        return f"<section><h2>{title}</h2><p>{missing}</p></section>"
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in _flat(content))
    return f'<section><h2>{title}</h2><table class="facts"><tbody>{rows}</tbody></table></section>'


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", "none" if value is None else value


_STYLE = """
:root { --ink: #0f172a; --soft: #64748b; --line: #e2e8f0; --panel: #fff; --ground: #f8fafc; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 64px; }
header p { margin: 0; color: var(--soft); }
h1 { margin: 0 0 20px; font-size: 28px; letter-spacing: -0.01em; }
h2 { margin: 0 0 14px; font-size: 18px; }
h3 { margin: 0; font-size: 13px; font-weight: 600; color: var(--soft); }
section, .card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; }
section { margin: 0 0 20px; padding: 20px 22px; }
section p { margin: 8px 0 0; color: var(--soft); }
section.cards { display: flex; flex-wrap: wrap; gap: 14px; padding: 0; background: none; border: 0; }
.card { flex: 1 1 220px; padding: 16px 20px; }
.card.wide { flex: 2 1 340px; }
.card p { margin: 2px 0 0; font-size: 13px; overflow-wrap: anywhere; }
.card .number { margin-top: 6px; font-size: 28px; line-height: 1.3; color: var(--ink); }
.number small { font-size: 15px; color: var(--soft); }
.number .arrow { color: var(--soft); padding: 0 6px; }
.number span { white-space: nowrap; }
.card .change { font-size: 15px; font-weight: 600; }
.card .up { color: #047857; } .card .down { color: #b91c1c; }
img { display: block; width: 100%; height: auto; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: 7px 10px; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
tr:last-child > td, tr:last-child > th { border-bottom: 0; }
thead th { font-size: 13px; color: var(--soft); font-weight: 600; }
.samples { table-layout: fixed; }
.samples td { overflow-wrap: anywhere; }
.answer { margin: 4px 0 0; font-size: 13px; }
.completion { display: flex; gap: 8px; align-items: baseline; }
.completion + .completion { margin-top: 6px; }
.completion span { flex: none; padding: 0 7px; border-radius: 9px; font-size: 12px; }
.completion small { flex: none; color: var(--soft); }
.good { background: #d1fae5; color: #065f46; } .bad { background: #fee2e2; color: #991b1b; }
.part { background: #fef3c7; color: #92400e; } .none { background: #e2e8f0; color: #334155; }
pre { margin: 0; font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", monospace; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.facts { font-size: 13px; }
.facts th { width: 34%; font-weight: 500; color: var(--soft); overflow-wrap: anywhere; }
.facts td { font-family: ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.facts tr { break-inside: avoid; }
@media print { body { background: none; } section, .card { break-inside: avoid; } }
"""
