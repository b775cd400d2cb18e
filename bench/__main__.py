"""Command line of the benchmarks: `python -m bench cpu | gpu | tiles | sparse | table | plot`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from bench import plots, record, report, sparse, tiles
from bench.cases import cpu_cases, tiny_cases
from bench.gpu import PARTS, RUN_LIMIT_S, run_gpu
from bench.measure import Plan
from bench.samples import samples
from bench.suite import run_cases, say
from bench.targets import cpu_targets


def _finish(result: dict[str, Any], out: Path | None) -> None:
    print(report.terminal(result))
    if out is None:
        return
    path = record.save(result, out)
    say(f"wrote {path}")
    try:
        charts = plots.write_charts(result, out, path.stem)
    except ImportError as error:
        say(f"no charts: {error}")
        return
    for chart in charts:
        say(f"wrote {chart}")


def _cpu(arguments: argparse.Namespace) -> None:
    # No warm-ups: the judge has run each contender once. These budgets make five to six minutes on two cores.
    plan = Plan(repeats=3, warmups=0, budget_s=10.0) if arguments.quick else Plan(repeats=5, warmups=0, budget_s=30.0)
    cases = tiny_cases() if arguments.tiny else cpu_cases(arguments.quick)
    device = torch.device("cpu")
    parameters = {**dataclasses.asdict(plan), "quick": arguments.quick, "tiny": arguments.tiny}
    result = record.new_record("cpu", device, parameters)
    result["skipped"] = []
    result["results"] = run_cases(cases, device, plan, result["skipped"])
    result["targets"] = cpu_targets(result["results"])
    _finish(result, arguments.out)


def _gpu(arguments: argparse.Namespace) -> None:
    result = run_gpu(arguments.out, dry_run=arguments.dry_run, parts=arguments.only, limit_s=arguments.limit)
    _finish(result, arguments.out)
    outcome = result["tests"]
    if outcome["status"] in ("failed", "out of time"):
        say("\n".join([*outcome.get("failed", []), *outcome["tail"]]))
        say(f"the gpu lane of the tests: {outcome['status']}")
        sys.exit(1)


def _tiles(arguments: argparse.Namespace) -> None:
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no GPU: torch.cuda.is_available() is False; --device cpu needs TRITON_INTERPRET=1")
    result = record.new_record("tiles", device, {"vocabularies": list(arguments.vocabularies)})

    def keep(found: list[dict[str, Any]]) -> None:
        result["tiles"] = found
        say(" ".join(tiles.table(found[-1:])[1]))
        if arguments.out is not None:
            record.save(result, arguments.out, prefix="tiles-")

    found = tiles.sweep(device, tuple(arguments.vocabularies), kept=keep)
    print(report.plain_table(tiles.table(found)))


def _sparse(arguments: argparse.Namespace) -> None:
    plan = Plan(repeats=arguments.repeats, warmups=0, budget_s=180.0)
    result = record.new_record("sparse", torch.device("cpu"), {**dataclasses.asdict(plan), "tokens": arguments.tokens})
    result["sparse"] = []
    for temperature in sparse.TEMPERATURES:
        say(f"samples at T = {temperature:g}")
        settings = [(tail_mass, count) for count in sparse.PLACES for tail_mass in sparse.TAIL_MASSES]
        result["sparse"] += sparse.measure_samples(samples(temperature, arguments.tokens), settings, plan)
    print(report.plain_table(sparse.table(result["sparse"])))
    if arguments.out is None:
        return
    path = record.save(result, arguments.out, prefix="sparse-")
    say(f"wrote {path}")
    say(f"wrote {sparse.plot(result['sparse'], path.with_suffix('.png'))}")


def _table(arguments: argparse.Namespace) -> None:
    written = report.write_tables(arguments.page, record.newest(arguments.results))
    say(f"{arguments.page}: wrote {', '.join(written)}")


def _plot(arguments: argparse.Namespace) -> None:
    for kind, result in record.newest(arguments.results).items():
        stem = Path(record.file_name(result)).stem
        for chart in plots.write_charts(result, arguments.out or arguments.results, stem):
            say(f"{kind}: wrote {chart}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Time, memory and accuracy beside the peers.")
    commands = parser.add_subparsers(required=True)
    cpu = commands.add_parser("cpu", help="the CPU cases, five to ten minutes on two cores")
    cpu.add_argument("--out", type=Path, help="folder for the result file and the charts (default: print only)")
    cpu.add_argument("--quick", action="store_true", help="a quarter of the tokens, fewer rounds")
    cpu.add_argument("--tiny", action="store_true", help="shapes that prove nothing but that the harness runs")
    cpu.set_defaults(run=_cpu)
    gpu = commands.add_parser("gpu", help="tests, cases and experiments on one GPU, under eight minutes")
    gpu.add_argument("--out", type=Path, required=True, help="folder for the result file and the charts")
    gpu.add_argument("--dry-run", action="store_true", help="go through the steps on the CPU at tiny shapes")
    gpu.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="some of its parts")
    gpu.set_defaults(run=_gpu)
    gpu.add_argument("--limit", type=float, default=RUN_LIMIT_S, help="seconds after which no case is begun")
    sizes = commands.add_parser("tiles", help="block sizes and warps of the Triton row kernels, at most eight minutes")
    sizes.add_argument("--out", type=Path, help="folder for the result file, written after each kernel")
    sizes.add_argument("--device", default="cuda")
    sizes.add_argument("--vocabularies", type=int, nargs="+", default=tiles.VOCABULARIES)
    sizes.set_defaults(run=_tiles)
    lists = commands.add_parser(
        "sparse", help="cost and error of tail_mass on SmolLM2's own samples, about ten minutes"
    )
    lists.add_argument("--out", type=Path, help="folder for the result file and the chart (default: print only)")
    lists.add_argument("--tokens", type=int, default=1024)
    lists.add_argument("--repeats", type=int, default=3)
    lists.set_defaults(run=_sparse)
    table = commands.add_parser("table", help="write the tables of docs/benchmarks.md from the committed results")
    table.add_argument("--page", type=Path, default=record.ROOT / "docs" / "benchmarks.md")
    table.add_argument("--results", type=Path, default=record.RESULTS)
    table.set_defaults(run=_table)
    plot = commands.add_parser("plot", help="draw the charts of the committed results")
    plot.add_argument("--results", type=Path, default=record.RESULTS)
    plot.add_argument("--out", type=Path, help="folder of the charts (default: the folder of the results)")
    plot.set_defaults(run=_plot)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Run one command."""
    # Peers warn on import and about their options. No warning concerns the numbers.
    warnings.filterwarnings("ignore")
    parsed = _parser().parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    main()
