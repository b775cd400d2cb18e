"""The curves of a run as one PNG, with a panel for each family of metrics and each evaluated measure."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastrl.train.run.measure import ACCURACY, Measure


class Series(NamedTuple):
    """The name of one curve of evaluations."""

    split: str
    mode: str
    measure: Measure = ACCURACY


Metrics = Sequence[Mapping[str, Any]]
# Series -> steps, values, standard errors
Evaluated = Mapping[Series, tuple[Sequence[int], Sequence[float], Sequence[float]]]

BLUE, AMBER, GREEN, RED, VIOLET, SLATE = "#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#64748b"
COLOURS = (BLUE, AMBER, GREEN, VIOLET, RED, SLATE)
# More than this many lines in a panel cannot be told apart.
MAX_LINES = 6
MAX_VALUE = 1e38
# Characters in a line of a title.
TITLE_WIDTH = 40


class Panel(NamedTuple):
    """A plot of every metric whose name matches, one line each."""

    title: str
    names: re.Pattern[str]
    """Pattern of the whole name. Its group `label`, if it matched, names the line."""
    percent: bool = False
    smooth: bool = True
    at_least: int = 1
    """Least number of lines: a single part of the reward would repeat the reward."""


PANELS = (
    Panel("Reward", re.compile(r"reward(?:/mean|_mean)?")),
    Panel("Parts of the reward", re.compile(r"rewards?/(?!mean|std)(?P<label>.+?)(?:/mean)?"), at_least=2),
    Panel("Loss", re.compile(r"loss")),
    Panel("KL divergence", re.compile(r"(?:mean_)?kl(?:/(?P<label>.+)|_mean)?|(?P<l2>approx_kl(?:_old)?)")),
    Panel("Entropy", re.compile(r"entropy(?:/(?P<label>mean)|_mean)?")),
    Panel("Clipped tokens", re.compile(r"clip(?:ped|_ratio|_fraction|frac)?(?:[/_](?P<label>.+))?"), percent=True),
    Panel("Gradient norm", re.compile(r"grad(?:ient)?_norm")),
    Panel("Critic", re.compile(r"value/(?P<label>loss|explained_variance)")),
    Panel("Values and returns", re.compile(r"value/(?P<label>values|returns)")),
    Panel("Completion length (tokens)", re.compile(r"completions?[/_](?:mean_)?length(?:s)?(?:[/_](?P<label>.+))?")),
    Panel(
        "Shares",
        re.compile(
            r"(?P<label>pass_rate|solved_prompts|kept_share|frac_reward_zero_std|truncated_fraction|completions?[/_](?:clipped|truncated)\w*)"
        ),
        percent=True,
    ),
    Panel("Tokens per second", re.compile(r"(?:.*[/_])?tokens_per_(?:s|sec|second)")),
    Panel("Learning rate", re.compile(r"learning_rate|lr"), smooth=False),
)
TIMES = re.compile(r"(?:time|seconds)[/_](?P<label>.+?)(?:_s|_seconds)?|(?P<l2>.+)_seconds")
# The other times are parts of these.
TOTALS = ("step", "total")


def draw_curves(metrics: Metrics, evaluated: Evaluated) -> bytes:
    """Return a PNG with a panel per evaluated measure, one per recorded family of metrics, and where the time went.

    Args:
        metrics: one record per step, with the key `step`. A missing or non-finite value is a gap.
        evaluated: series -> steps, values, standard errors.
    """
    return _png(np.asarray(_painted(_drawings(metrics, evaluated)).buffer_rgba()))


def _painted(drawn: Sequence[Callable[[Any], None]]) -> Any:
    """Return the canvas with a panel for each of `drawn`, three in a row."""
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError('the report needs matplotlib: pip install "fastrl[train]"') from error
    columns = min(3, max(1, len(drawn)))
    rows = max(1, math.ceil(len(drawn) / columns))
    style = {
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.edgecolor": "#cbd5e1",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#eef2f7",
        "xtick.color": SLATE,
        "ytick.color": SLATE,
        "text.color": "#0f172a",
        "legend.framealpha": 0.8,
        "legend.edgecolor": "none",
        "legend.fontsize": 8,
    }
    with rc_context(style):  # pyright: ignore[reportArgumentType]
        figure = Figure(figsize=(4.0 * columns, 2.7 * rows), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        engine: Any = figure.get_layout_engine()
        engine.set(h_pad=0.12, w_pad=0.08)  # inches
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, draw in zip(axes, drawn, strict=False):
            draw(axis)
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        canvas.draw()
    return canvas


def _png(pixels: np.ndarray) -> bytes:
    """Encode (H, W, 4) pixels with a palette of 128 colours, a third of the size of full colour."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _drawings(metrics: Metrics, evaluated: Evaluated) -> list[Callable[[Any], None]]:
    names = list(dict.fromkeys(name for record in metrics for name in record if name != "step"))
    series = {name: _series(metrics, name) for name in names}
    # A metric that a long run recorded once, for example in its first step, is no curve.
    series = {name: values for name, values in series.items() if len(values[0]) > (len(metrics) > 2)}
    drawings: list[Callable[[Any], None]] = []
    for panel in PANELS:
        lines = {_label(match): series[name] for name in series if (match := panel.names.fullmatch(name))}
        if len(lines) >= panel.at_least:
            drawings.append(lambda axis, panel=panel, lines=lines: _draw_lines(axis, panel, lines))
    place = min(1, len(drawings))
    for measure in reversed(dict.fromkeys(key.measure for key in evaluated)):
        curves = {key: columns for key, columns in evaluated.items() if key.measure == measure}
        if any(_is_number(value) for _, values, _ in curves.values() for value in values):
            drawings.insert(place, lambda axis, curves=curves: _draw_evaluations(axis, curves))
    matches = [match for name in series if (match := TIMES.fullmatch(name))]
    times = {_label(match): match.group() for match in matches if _label(match) not in TOTALS}
    if times:
        drawings.append(lambda axis: _draw_times(axis, metrics, times))
    return drawings


def _series(metrics: Metrics, name: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(record["step"], record[name]) for record in metrics if _is_number(record.get(name))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps, dtype=float), np.asarray(values, dtype=float)


def _is_number(value: Any) -> bool:
    # matplotlib cannot label an axis beyond the range of float32, so such a value is a gap, like infinity.
    return isinstance(value, (int, float)) and abs(value) < MAX_VALUE


def _label(match: re.Match[str]) -> str:
    found = next((group for group in match.groupdict().values() if group), match.group())
    return found.replace("_", " ").replace("/", " ")


def _draw_lines(axis: Any, panel: Panel, lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    for (label, (steps, values)), colour in zip(list(lines.items())[:MAX_LINES], COLOURS, strict=False):
        smooth = smoothed(values) if panel.smooth else values
        if panel.smooth and len(values) > 1:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        axis.plot(steps, smooth, color=colour, linewidth=1.8, label=label, marker="o" if len(values) == 1 else None)
    _finish(axis, panel.title, percent=panel.percent, legend=len(lines) > 1)


def _draw_evaluations(axis: Any, curves: Evaluated) -> None:
    """Draw the curves of one measure with their standard errors."""
    for (key, (steps, values, errors)), colour in zip(curves.items(), COLOURS, strict=False):
        label = f"{key.split.replace('_', '-')}{', ' + key.mode if key.mode else ''}"
        bars = [error if _is_number(error) else 0.0 for error in errors]
        axis.errorbar(
            steps, values, yerr=bars, color=colour, marker="o", markersize=4, capsize=3, linewidth=1.8, label=label
        )
    first = next(iter(curves))
    title = first.measure.name[:1].upper() + first.measure.name[1:]
    if len(curves) == 1:
        title += f", {first.split.replace('_', '-')} (±\u00a0standard\u00a0error)"  # not broken in two
    _finish(axis, title, percent=first.measure.share, legend=len(curves) > 1)


def _draw_times(axis: Any, metrics: Metrics, times: Mapping[str, str]) -> None:
    """Stack the seconds of each step. A missing part counts as 0."""
    steps = [record["step"] for record in metrics]
    parts = [[r[name] if _is_number(r.get(name)) else 0.0 for r in metrics] for name in times.values()]
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(parts))]
    if len(steps) > 1:
        axis.stackplot(steps, parts, labels=list(times), colors=colours, alpha=0.75, linewidth=0)
    else:
        floors = np.cumsum([0.0, *(part[0] for part in parts[:-1])])
        for part, floor, colour, label in zip(parts, floors, colours, times, strict=True):
            axis.bar(steps, part, bottom=floor, color=colour, alpha=0.75, label=label)
    _finish(axis, "Seconds per step", legend=True)


def _finish(axis: Any, title: str, *, percent: bool = False, legend: bool = False) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # The name of a measure is the user's, and may be longer than the panel is wide.
    axis.set_title(textwrap.fill(title, TITLE_WIDTH))
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axis.tick_params(length=0)
    axis.margins(x=0.02)
    axis.set_xlabel("step", color=SLATE, fontsize=8, loc="right", labelpad=1)
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%" if percent else _tick(value)))
    lowest, highest = axis.dataLim.intervaly
    if lowest >= 0 and (percent or lowest < 0.5 * highest):
        axis.set_ylim(bottom=0)
    if legend:
        axis.legend(loc="best", handlelength=1.4)


def _tick(value: float) -> str:
    return f"{value:,.10g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.3g}"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return the exponential moving average over about a tenth of the run, without the start's bias towards 0."""
    keep = 1.0 - 1.0 / max(1.0, len(values) / 10)
    out, total, weight = np.empty_like(values), 0.0, 0.0
    for index, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1.0
        out[index] = total / weight
    return out
