"""Tables for the terminal and docs/benchmarks.md, written from the same records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.cases import OPERATIONS

FASTRL, EAGER = "fastrl", "PyTorch eager"


def seconds_text(value: float) -> str:
    """Return a time with a fitting unit."""
    if value >= 1.0:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def bytes_text(value: float) -> str:
    """Return a size in MB or GB (powers of ten)."""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def verdict_text(ours: float, theirs: float) -> str:
    """Say how fastrl compares with a contender, also if it loses."""
    ratio = theirs / ours
    if 0.97 < ratio < 1.03:
        return "equal"
    return f"{ratio:.2f}x faster" if ratio > 1 else f"{1 / ratio:.2f}x SLOWER"


def unit_name(result: dict[str, Any]) -> str:
    """Return the unit in which a case is counted."""
    return "V-units" if "copy" in result["floor"]["name"] else "GEMM units"


def worst_error(record: dict[str, Any]) -> tuple[float | None, float | None]:
    """Return the absolute error of the log-probs and the largest relative error of a gradient."""
    errors = record.get("errors", {})
    gradients = [value["relative"] for name, value in errors.items() if name.startswith("d")]
    return errors.get("logprobs", {}).get("error"), max(gradients, default=None)


def case_title(result: dict[str, Any]) -> str:
    """Return one line that names a case."""
    what = OPERATIONS[result["operation"]]
    shape = f"{result['model']}, N={result['n']}, D={result['d']}, V={result['v']}, {result['dtype']}"
    return f"{what} ({shape})"


def floor_text(result: dict[str, Any]) -> str:
    """Name the floor of a case and the speed of the machine on it."""
    floor = result["floor"]
    rate = floor["per_second"]
    speed = f"{rate / 1e9:.1f} GB/s" if "copy" in floor["name"] else f"{rate / 1e12:.3f} TFLOP/s"
    return f"{floor['name']}: {seconds_text(floor['median'])} ({speed})"


def _cells(result: dict[str, Any], record: dict[str, Any], ours: float | None) -> list[str]:
    if record["status"] != "ok" or "seconds" not in record:
        return [record["name"], f"{record['status']}: {record.get('reason', '')}".removesuffix(": "), *[""] * 5]
    seconds, units = record["seconds"], record["units"]
    logprob, gradient = worst_error(record)
    half_spread = (seconds["q75"] - seconds["q25"]) / 2
    compared = "" if ours is None or record["name"] == FASTRL else verdict_text(ours, seconds["median"])
    return [
        record["name"],
        f"{seconds_text(seconds['median'])} ± {half_spread / seconds['median']:.0%}",
        f"{units['median']:.2f}",
        compared,
        bytes_text(record["peak_bytes"]),
        "" if logprob is None else f"{logprob:.0e}",
        "" if gradient is None else f"{gradient:.0e}",
    ]


def _header(result: dict[str, Any]) -> list[str]:
    return ["", "time", unit_name(result), "fastrl is", "peak memory", "log-prob error", "gradient error"]


def case_rows(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of a case, the header first."""
    ours = next((c["seconds"]["median"] for c in result["contenders"] if c["name"] == FASTRL and "seconds" in c), None)
    return [_header(result), *(_cells(result, record, ours) for record in result["contenders"])]


def plain_table(rows: list[list[str]]) -> str:
    """Return rows as aligned text. A row with a remark in place of numbers does not widen the columns."""
    numbers = [row for row in rows if any(row[2:])]
    widths = [max((len(row[i]) for row in (rows if i == 0 else numbers)), default=0) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        if any(row[2:]):
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        else:
            lines.append(f"{row[0].ljust(widths[0])}  {row[1]}".rstrip())
    return "\n".join(lines)


def target_rows(targets: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of the targets."""
    rows = [["target", "wanted", "measured", "verdict"]]
    for target in targets:
        measured = "" if target["measured"] is None else f"{target['measured']:.3g}"
        verdict = target["status"] if target["reason"] is None else f"{target['status']} ({target['reason']})"
        rows.append([target["what"], target["wanted"], measured, verdict])
    return rows


def terminal(record: dict[str, Any]) -> str:
    """Return the whole record as text."""
    parts = [machine_text(record)]
    for result in record["results"]:
        parts += ["", case_title(result), floor_text(result), plain_table(case_rows(result))]
    for entry in record.get("skipped", []):
        parts += ["", f"{entry['operation']} ({entry['model']}): skipped: {entry['reason']}"]
    if record["targets"]:
        parts += ["", plain_table(target_rows(record["targets"]))]
    return "\n".join(parts)


def machine_text(record: dict[str, Any]) -> str:
    """Return one line: machine, versions and date of a record."""
    machine, versions = record["machine"], record["versions"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    software = ", ".join(
        f"{name} {versions[name]}" for name in ("torch", "triton", "trl", "liger-kernel") if versions.get(name)
    )
    return f"{where}; {software}; fastrl {versions['fastrl']}; {record['date'][:10]}"


def _markdown(rows: list[list[str]]) -> list[str]:
    header, *body = ([cell.replace("|", "/") for cell in row] for row in rows)
    lines = [" | ".join(row) for row in (header, ["---"] * len(header), *body)]
    return [f"| {line} |" for line in lines]


def markdown(record: dict[str, Any]) -> str:
    """Return the page's tables of one record: contenders that ran, one line naming the others, the targets."""
    lines = [f"Measured on {machine_text(record)}. Times are medians ± half the quartile range."]
    for result in record["results"]:
        rows = case_rows(result)
        shown = [rows[0], *(row for row in rows[1:] if any(row[2:]))]
        lines += ["", f"**{case_title(result)}**, {floor_text(result)}", "", *_markdown(shown)]
        wrong = [c["name"] for c in result["contenders"] if c["status"].startswith("refused")]
        failed = [c["name"] for c in result["contenders"] if c["status"] == "failed"]
        if wrong:
            lines += ["", f"Not timed because less accurate than eager PyTorch may be: {', '.join(wrong)}."]
        if failed:
            lines += ["", f"Failed: {', '.join(failed)}."]
    missing = sorted(
        {c["name"] for result in record["results"] for c in result["contenders"] if c["status"] == "missing"}
    )
    if missing:
        lines += ["", f"Could not run on this machine: {', '.join(missing)} (the result file says why)."]
    if record["targets"]:
        lines += ["", *_markdown(target_rows(record["targets"]))]
    return "\n".join(lines)


def fill_markers(text: str, kind: str, table: str) -> str:
    """Return `text` with a new table between the markers of a kind, or raise `ValueError`."""
    opening, closing = f"<!-- bench:{kind} -->", f"<!-- /bench:{kind} -->"
    if text.count(opening) != 1 or text.count(closing) != 1 or text.index(opening) > text.index(closing):
        raise ValueError(f"expected one {opening} and, after it, one {closing}")
    before, _, rest = text.partition(opening)
    _, _, after = rest.partition(closing)
    return f"{before}{opening}\n{table}\n{closing}{after}"


def write_tables(page: Path, records: dict[str, dict[str, Any]]) -> list[str]:
    """Write the table of every kind that the page has markers for, and return these kinds."""
    text = page.read_text()
    written = []
    for kind, record in sorted(records.items()):
        if f"<!-- bench:{kind} -->" in text:
            text = fill_markers(text, kind, markdown(record))
            written.append(kind)
    if not written:
        raise ValueError(f"{page} has no marker of {', '.join(sorted(records)) or 'any record'}")
    page.write_text(text)
    return written
