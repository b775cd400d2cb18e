"""Interleaved times, peak memory, and the floors. Every time is also given as a multiple of its floor."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.cases import Case
from bench.oracle import shared

Action = Callable[[], Any]
# About a millisecond.
HEAD_START_CYCLES = 2_000_000
GEMM, COPY = "floor: one GEMM", "floor: one copy"


@dataclass(frozen=True)
class Plan:
    """How long to measure."""

    repeats: int = 5
    """Rounds after the warm-up. Each round runs every contender once."""
    warmups: int = 1
    """Rounds that are thrown away."""
    budget_s: float = 120.0
    """No new round is begun after this, once there are three."""


def quartiles(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) == 1:
        return {"median": values[0], "q25": values[0], "q75": values[0]}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def timed(action: Action, device: torch.device) -> float:
    """Return the seconds of one call, to the end of its work on the device."""
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        # The host gets a head start, as it has in training: without it a short kernel is timed with its launch.
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        action()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def measure(actions: dict[str, Action], device: torch.device, plan: Plan) -> dict[str, list[float]]:
    """Return seconds per round and action.

    The actions take turns, so that a change of the machine's speed hits all of them, and every other round runs
    backwards, so that none of them always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    begin = time.perf_counter()
    names = list(actions)
    for turn in range(plan.warmups + plan.repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            spent = timed(actions[name], device)
            if turn >= plan.warmups:
                seconds[name].append(spent)
        done = turn + 1 - plan.warmups
        if done >= min(3, plan.repeats) and time.perf_counter() - begin > plan.budget_s:
            break
    return seconds


def summary(seconds: list[float], floor: list[float]) -> dict[str, Any]:
    """Return the spread of the seconds and of their multiples of a floor measured in the same rounds."""
    return {
        "seconds": quartiles(seconds),
        "units": quartiles([a / b for a, b in zip(seconds, floor, strict=True)]),
        "repeats": len(seconds),
    }


def floors(case: Case, device: torch.device) -> dict[str, Action]:
    """Return the bare work of a case: one pass of the tokens through the head, or one copy of the logits.

    A copy is a read and a write, two V-units. The floors work on buffers of their own.
    """
    n, d, v = case.tokens, case.model.hidden, case.model.vocabulary
    logits = torch.empty((n, v), dtype=case.dtype, device=device)
    if case.from_logits:
        # Written before it is read: untouched zeros are one shared page, which reads faster than memory.
        source = torch.ones_like(logits)
        return {COPY: lambda: logits.copy_(source)}
    hidden = torch.randn((n, d), device=device).to(case.dtype)
    weight = torch.randn((v, d), device=device).to(case.dtype)
    return {GEMM: lambda: torch.mm(hidden, weight.t(), out=logits)}


def release(device: torch.device) -> None:
    """Give memory back between cases."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(action: Action, device: torch.device) -> int:
    """Return the peak of the bytes that one call adds, its results included."""
    release(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with shared("memory").MemoryWatch() as watch:
        action()
    return int(watch.peak)
