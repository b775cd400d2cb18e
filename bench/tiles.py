"""The best tile for a device: every row kernel at several block sizes and warps, beside the shipped tile.

The tile decides the order of a row's sum. So tiles are tables in the kernels' files, and nothing is tuned at run time.
A person writes the winner of this sweep into a table, with the device, and measures again.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import Plan, measure, quartiles, release

BLOCKS = (512, 1024, 2048, 4096, 8192)
WARPS = (4, 8, 16)
# Llama 2, Llama 3, Qwen 2.5, Gemma. The benchmarks use the third.
VOCABULARIES = (32000, 128256, 151936, 262144)
DTYPES = (torch.bfloat16, torch.float32)
# No further kernel is begun after this: one command on a rented device may be cut after ten minutes.
LIMIT_S = 420.0
# Bytes of the logits: many times the cache of any GPU.
ROW_BYTES = 1 << 30
Action = Callable[[], Any]


class Kernel(NamedTuple):
    """A table of tiles, and how to run the kernel that reads it."""

    module: ModuleType
    table: str
    prepare: Callable[[Tensor, Tensor], Action]
    """Return the run for logits (N, V) and labels (N,)."""
    dtypes: tuple[torch.dtype, ...] = DTYPES


def kernels() -> dict[str, Kernel]:
    """Return name -> kernel. Imports Triton."""
    from fastrl_kernels import row_statistics, sparse_rows, token_logprobs

    def forward(logits: Tensor, labels: Tensor) -> Action:
        return lambda: token_logprobs.token_logprobs_fwd(logits, labels, 1.0)

    def backward(logits: Tensor, labels: Tensor) -> Action:
        residual = torch.empty(len(labels), device=logits.device)
        found = token_logprobs.token_logprobs_fwd(logits, labels, 1.0, residual=residual)
        grads, out = (torch.ones_like(found[0]), None, None), torch.empty_like(logits)
        return lambda: token_logprobs.token_logprobs_bwd(
            logits, labels, 1.0, *found, *grads, residual=residual, out=out
        )

    def statistics(logits: Tensor, labels: Tensor) -> Action:
        return lambda: row_statistics.row_statistics_fwd(logits, labels, 1.0)

    def lists(logits: Tensor, labels: Tensor) -> Action:
        residual = torch.empty(len(labels), device=logits.device)
        found = (*token_logprobs.token_logprobs_fwd(logits, labels, 1.0, residual=residual), residual)
        rule = {"tail_mass": 1e-4, "places": 128, "threshold": 2.0**-10, "candidates": 512, "min_entries": 16}
        grads = (torch.ones_like(residual), None, None)
        return lambda: sparse_rows.list_entries(logits, labels, 1.0, found, grads, **rule)

    return {
        "token_logprobs forward": Kernel(token_logprobs, "FWD_TILES", forward),
        "token_logprobs backward": Kernel(token_logprobs, "BWD_TILES", backward),
        "row_statistics": Kernel(row_statistics, "TILES", statistics),
        # A chunk's logits are float32.
        "sparse_rows lists": Kernel(sparse_rows, "LIST_TILES", lists, (torch.float32,)),
    }


@contextmanager
def one_tile(kernel: Kernel, tile: Any) -> Iterator[None]:
    """Make a kernel take one tile for every dtype and row length, and put its table back."""
    kept = getattr(kernel.module, kernel.table)
    setattr(kernel.module, kernel.table, dict.fromkeys(kept, ((2**31, tile),)))
    try:
        yield
    finally:
        setattr(kernel.module, kernel.table, kept)


def times(actions: dict[str, Action], device: torch.device, repeats: int) -> dict[str, dict[str, Any]]:
    """Return the spread of the seconds of each action, or its error."""
    working, results = {}, {}
    for name, action in actions.items():
        try:
            action()
        except Exception as error:  # a tile may exceed the compiler or the device, and the record says how
            results[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
        else:
            working[name] = action
    seconds = measure(working, device, Plan(repeats=repeats, warmups=2, budget_s=10.0))
    return {**results, **{name: quartiles(values) for name, values in seconds.items()}}


def logits_of(n: int, v: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return logits (N, V) as peaked as a policy's, and labels among their largest entries."""
    logits = torch.randn(n, v, device=device).to(dtype)
    labels = torch.randint(0, v, (n,), device=device)
    logits[torch.arange(n, device=device), labels] = 25.0
    return logits, labels


def sweep(
    device: torch.device,
    vocabularies: tuple[int, ...] = VOCABULARIES,
    tiles: tuple[tuple[int, int], ...] = tuple((block, warps) for block in BLOCKS for warps in WARPS),
    *,
    row_bytes: int = ROW_BYTES,
    repeats: int = 10,
    limit_s: float = LIMIT_S,
    kept: Callable[[list[dict[str, Any]]], None] = lambda found: None,
) -> list[dict[str, Any]]:
    """Return one record per kernel, vocabulary and dtype: seconds of a copy, of the shipped tile and of each tile.

    Args:
        device: to run on. A CPU needs TRITON_INTERPRET=1 and only shows that the sweep runs.
        vocabularies: row lengths.
        tiles: (entries per step, warps per program).
        row_bytes: size of the logits.
        repeats: rounds per record.
        limit_s: seconds after which no further record is begun.
        kept: called after each record with all records so far.
    """
    from fastrl_kernels.launch import Tile, tile_for

    found: list[dict[str, Any]] = []
    begin = time.monotonic()
    for v in vocabularies:
        for dtype in DTYPES:
            n = max(1, row_bytes // (v * dtype.itemsize))
            logits, labels = logits_of(n, v, dtype, device)
            for name, kernel in kernels().items():
                if dtype not in kernel.dtypes or time.monotonic() - begin > limit_s:
                    continue
                run, out = kernel.prepare(logits, labels), torch.empty_like(logits)

                def at(tile: Any, kernel: Kernel = kernel, run: Action = run) -> Action:
                    def call() -> None:
                        with one_tile(kernel, tile):
                            run()

                    return call

                shipped = tile_for(getattr(kernel.module, kernel.table), dtype, v)
                actions: dict[str, Action] = {"copy": lambda a=logits, b=out: b.copy_(a), "shipped": run}
                actions |= {f"{block}x{warps}": at(Tile(block, warps)) for block, warps in tiles}
                facts = {"kernel": name, "n": n, "v": v, "dtype": str(dtype).removeprefix("torch.")}
                seconds = times(actions, device, repeats)
                found.append({**facts, "shipped": f"{shipped.block}x{shipped.num_warps}", "seconds": seconds})
                kept(found)
                del run, out, actions
            del logits, labels
            release(device)
    return found


def best(record: dict[str, Any]) -> tuple[str, float] | None:
    """Return the fastest tile of a record and its seconds, or None if none ran."""
    ran = {
        name: spread["median"]
        for name, spread in record["seconds"].items()
        if name not in ("copy", "shipped") and "median" in spread
    }
    return min(ran.items(), key=lambda item: item[1]) if ran else None


def table(found: list[dict[str, Any]]) -> list[list[str]]:
    """Return the cells of a table, the header first. Times are multiples of a copy of the logits."""
    rows = [["kernel", "V", "dtype", "shipped", "x copy", "best", "x copy", "shipped / best"]]
    for record in found:
        copy, shipped = (record["seconds"][name].get("median") for name in ("copy", "shipped"))
        fastest = best(record)
        if copy is None or shipped is None or fastest is None:
            rows.append([record["kernel"], str(record["v"]), record["dtype"], record["shipped"], *["failed"] * 4])
            continue
        name, seconds = fastest
        rows.append(
            [
                record["kernel"],
                str(record["v"]),
                record["dtype"],
                record["shipped"],
                f"{shipped / copy:.2f}",
                name,
                f"{seconds / copy:.2f}",
                f"{shipped / seconds:.2f}",
            ]
        )
    return rows
