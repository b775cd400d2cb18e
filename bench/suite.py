"""A case from inputs to results: judged first, timed only if right."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterable
from typing import Any

import torch

from bench.baselines import EAGER, Contender, Missing, Runner, contenders
from bench.cases import Case, make_inputs
from bench.measure import COPY, GEMM, Plan, floors, measure, peak_bytes, quartiles, release, summary
from bench.oracle import Judge


def say(text: str) -> None:
    """Write progress to stderr, so that stdout holds the tables."""
    print(text, file=sys.stderr, flush=True)


def _last_line(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip().splitlines()[0][:300]


def _judged(contender: Contender, judge: Judge) -> tuple[dict[str, Any], Runner | None]:
    """Return the record of a contender and its run, None if it is missing, failed or refused."""
    record: dict[str, Any] = {"name": contender.name}
    try:
        run = contender.prepare(judge.inputs)
        verdict = judge(run(), contender.declared_error)
    except Missing as reason:
        return {**record, "status": "missing", "reason": str(reason)}, None
    except Exception as error:  # a peer may raise anything, and the record names it
        return {**record, "status": "failed", "reason": _last_line(error)}, None
    record["errors"] = verdict.errors
    if verdict.complaint is not None:
        return {**record, "status": "refused: wrong", "reason": verdict.complaint}, None
    return {**record, "status": "ok"}, run


def run_case(
    case: Case, device: torch.device | str, plan: Plan, everyone: Iterable[Contender] | None = None
) -> dict[str, Any]:
    """Return the record of one case: floor, and per contender errors, times and peak memory.

    Args:
        case: the case to measure.
        device: the device to run on.
        plan: rounds and budget.
        everyone: the contenders (default: all).
    """
    device = torch.device(device)
    inputs = make_inputs(case, device)
    invited = [c for c in (contenders() if everyone is None else everyone) if case.operation in c.operations]
    judge = Judge.of(inputs, EAGER.prepare(inputs)())
    records, runs = [], {}
    for contender in invited:
        record, run = _judged(contender, judge)
        records.append(record)
        if run is not None:
            runs[contender.name] = run
        release(device)
    del judge
    bare = floors(case, device)
    (floor_name,) = bare
    seconds = measure({**bare, **runs}, device, plan)
    bare.clear()
    for record in records:
        run = runs.get(record["name"])
        if run is not None:
            record.update(summary(seconds[record["name"]], seconds[floor_name]))
            record["peak_bytes"] = peak_bytes(run, device)
    floor = {"name": floor_name, **quartiles(seconds[floor_name]), "repeats": len(seconds[floor_name])}
    work = case.gemm_flop if floor_name == GEMM else 2 * case.tokens * case.model.vocabulary * case.dtype.itemsize
    floor["per_second"] = work / floor["median"]
    description = {**case.describe(), "mean_entropy": inputs.mean_entropy, "live_tokens": int(inputs.mask.sum())}
    if floor_name == COPY:
        # A copy is two V-units, and times of operations on given logits are counted in V-units.
        for record in records:
            if "units" in record:
                record["units"] = {key: 2.0 * value for key, value in record["units"].items()}
    return {**description, "floor": floor, "contenders": records}


def run_cases(
    cases: Iterable[Case], device: torch.device, plan: Plan, skipped: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return the records of several cases. A case whose needs are missing here goes to `skipped`."""
    results = []
    for case in cases:
        say(f"{case.operation} {case.model.name} N={case.tokens} D={case.model.hidden} V={case.model.vocabulary}")
        try:
            results.append(run_case(case, device, plan))
        except Missing as reason:
            say(f"skipped: {reason}")
            skipped.append({**case.describe(), "reason": str(reason)})
        release(torch.device(device))
    return results
