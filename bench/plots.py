"""Charts of a record: time over the floor, peak memory, error beside time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.report import case_title, unit_name, worst_error

OURS, THEIRS = "#1f6feb", "#8c959f"


def _axes(n_panels: int, height: float) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(n_panels, 1, figsize=(8.5, height), squeeze=False, layout="constrained")


def _timed(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [record for record in result["contenders"] if "seconds" in record]


def _shown(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [result for result in record["results"] if _timed(result)]


def _color(name: str) -> str:
    return OURS if name.startswith("fastrl") else THEIRS


def _write(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _bars(record: dict[str, Any], path: Path, kind: str) -> Path:
    results = _shown(record)
    height = sum(1.1 + 0.32 * len(_timed(result)) for result in results)
    figure, axes = _axes(len(results), height)
    for axis, result in zip(axes[:, 0], results, strict=True):
        timed = _timed(result)[::-1]
        names, colors = [c["name"] for c in timed], [_color(c["name"]) for c in timed]
        if kind == "time":
            middle = [c["units"]["median"] for c in timed]
            spread = [[c["units"]["median"] - c["units"]["q25"] for c in timed],
                      [c["units"]["q75"] - c["units"]["median"] for c in timed]]  # fmt: skip
            axis.barh(names, middle, xerr=spread, color=colors)
            floor = 2.0 if unit_name(result) == "V-units" else 1.0
            axis.axvline(floor, color="black", linestyle="--", linewidth=1)
            axis.set_xlabel(f"{unit_name(result)} (dashed: {result['floor']['name'].removeprefix('floor: ')})")
        else:
            axis.barh(names, [c["peak_bytes"] / 1e9 for c in timed], color=colors)
            axis.set_xlabel("peak extra memory, GB")
        axis.set_title(case_title(result), fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
    return _write(figure, path)


def _error(result: dict[str, Any], record: dict[str, Any]) -> float | None:
    logprob, gradient = worst_error(record)
    return logprob if result["operation"].startswith("logprobs") else gradient


def _accuracy(record: dict[str, Any], path: Path) -> Path:
    results = _shown(record)
    figure, axes = _axes(len(results), 2.8 * len(results))
    for axis, result in zip(axes[:, 0], results, strict=True):
        for contender in _timed(result):
            error = _error(result, contender)
            if error is None or error <= 0:
                continue
            x = contender["units"]["median"]
            axis.scatter([x], [error], color=_color(contender["name"]))
            axis.annotate(contender["name"], (x, error), fontsize=7, xytext=(4, 4), textcoords="offset points")
        axis.axvline(2.0 if unit_name(result) == "V-units" else 1.0, color="black", linestyle="--", linewidth=1)
        axis.set_yscale("log")
        axis.margins(x=0.2, y=0.3)
        axis.set_xlabel(unit_name(result))
        axis.set_ylabel("error")
        axis.set_title(case_title(result), fontsize=9, loc="left")
    return _write(figure, path)


def write_charts(record: dict[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write the charts of a record as PNG files and return their paths (none without times)."""
    if not _shown(record):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _bars(record, folder / f"{stem}-time.png", "time"),
        _bars(record, folder / f"{stem}-memory.png", "memory"),
        _accuracy(record, folder / f"{stem}-error.png"),
    ]
