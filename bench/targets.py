"""The wanted numbers on each kind of machine, and the verdict on the measured ones."""

from __future__ import annotations

from typing import Any

from fastrl.ops.gradients import GPU_HEAD_ROWS
from fastrl.ops.head import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS

FASTRL, TAIL, EAGER, TRL = "fastrl", "fastrl, tail_mass=1e-4", "PyTorch eager", "TRL chunked log-prob"
# Beyond tiles and gradients: the live rows of a chunk, one number per token, tensors saved by autograd.
MEMORY_SLACK = 0.05


def _case(results: list[dict[str, Any]], operation: str) -> dict[str, Any] | None:
    return next((result for result in results if result["operation"] == operation), None)


def _timed(result: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Return the record of a contender that was timed."""
    if result is None:
        return None
    return next((c for c in result["contenders"] if c["name"] == name and c["status"] == "ok" and "seconds" in c), None)


def _why_not(result: dict[str, Any] | None, name: str) -> str:
    if result is None:
        return "the case did not run"
    record = next((c for c in result["contenders"] if c["name"] == name), None)
    return "no such contender" if record is None else f"{name}: {record['status']}: {record.get('reason', '')}"


def _verdict(what: str, wanted: str, measured: float | None, met: bool, reason: str | None = None) -> dict[str, Any]:
    status = "not measured" if measured is None else "met" if met else "missed"
    return {"what": what, "wanted": wanted, "measured": measured, "status": status, "reason": reason}


def _at_most(what: str, unit: str, limit: float, measured: float | None, reason: str | None) -> dict[str, Any]:
    met = measured is not None and measured <= limit
    return _verdict(what, f"<= {limit:g} {unit}", measured, met, reason if measured is None else None)


def _at_least(what: str, unit: str, limit: float, measured: float | None, reason: str | None) -> dict[str, Any]:
    met = measured is not None and measured >= limit
    return _verdict(what, f">= {limit:g} {unit}", measured, met, reason if measured is None else None)


def _units(
    results: list[dict[str, Any]], operation: str, limit: float, what: str, unit: str, name: str = FASTRL
) -> dict:
    result = _case(results, operation)
    record = _timed(result, name)
    measured = None if record is None else record["units"]["median"]
    return _at_most(what, unit, limit, measured, _why_not(result, name))


def _ratio(
    results: list[dict[str, Any]], operation: str, limit: float, what: str, peer: str, name: str = FASTRL
) -> dict:
    result = _case(results, operation)
    ours, theirs = _timed(result, name), _timed(result, peer)
    measured = None if ours is None or theirs is None else theirs["seconds"]["median"] / ours["seconds"]["median"]
    return _at_least(what, "x faster", limit, measured, _why_not(result, name if ours is None else peer))


def _best_peer(results: list[dict[str, Any]], operation: str, limit: float, what: str, name: str = FASTRL) -> dict:
    result = _case(results, operation)
    ours = _timed(result, name)
    others = [] if result is None else [
        c["seconds"]["median"]
        for c in result["contenders"]
        if "seconds" in c and not c["name"].startswith(FASTRL)
    ]  # fmt: skip
    measured = None if ours is None or not others else min(others) / ours["seconds"]["median"]
    return _at_least(what, "x the best peer", limit, measured, _why_not(result, name))


def _half(results: list[dict[str, Any]]) -> dict[str, Any]:
    whole, half = _case(results, "loss_hidden"), _case(results, "loss_hidden_half")
    full, masked = _timed(whole, FASTRL), _timed(half, FASTRL)
    # Units, not seconds: each case has its own floor, measured in the same minutes.
    measured = None if full is None or masked is None else masked["units"]["median"] / full["units"]["median"]
    return _at_most("half the rows masked", "of the unmasked time", 0.6, measured, _why_not(half, FASTRL))


def hidden_bytes(rows: int, n: int, d: int, v: int, size: int, *, on_gpu: bool) -> int:
    """Return the peak of the loss from hidden states: the larger of its time with a tile of logits and that without.

    Args:
        rows: of a tile of logits, which are float32.
        n: tokens.
        d: width.
        v: vocabulary.
        size: bytes of a number of the head.
        on_gpu: whether the GEMMs of a half-precision head take the logits' gradient as an operand of its precision.
    """
    tile, summed, states = rows * v * 4, v * d * 4, n * d * size
    if size == 4:
        return tile + summed + states
    if on_gpu:
        # The operand, and the product of a block of the head before it is added to the sum.
        tile += rows * v * size + min(GPU_HEAD_ROWS, v) * d * 4
    # A head's gradient is summed in float32 and cast once, when the logits are gone.
    return summed + states + max(tile, v * d * size)


def _memory(results: list[dict[str, Any]], chunk: int) -> list[dict[str, Any]]:
    """Return the targets of extra memory as multiples of their formula."""
    verdicts = []
    given = _case(results, "loss_logits")
    record = _timed(given, FASTRL)
    measured = None
    if given is not None and record is not None:
        size = 2 if given["dtype"] != "float32" else 4
        measured = record["peak_bytes"] / (given["n"] * given["v"] * size)
    verdicts.append(
        _at_most("logits in, peak memory", "x the gradient", 1 + MEMORY_SLACK, measured, _why_not(given, FASTRL))
    )
    hidden = _case(results, "loss_hidden")
    record, measured = _timed(hidden, FASTRL), None
    if hidden is not None and record is not None:
        size = 2 if hidden["dtype"] != "float32" else 4
        n, d, v = hidden["n"], hidden["d"], hidden["v"]
        measured = record["peak_bytes"] / hidden_bytes(min(chunk, n), n, d, v, size, on_gpu=chunk == GPU_CHUNK_TOKENS)
    verdicts.append(
        _at_most("hidden in, peak memory", "x (tile + gradients)", 1 + MEMORY_SLACK, measured, _why_not(hidden, FASTRL))
    )
    return verdicts


def _tail_error(results: list[dict[str, Any]], operation: str) -> dict[str, Any]:
    result = _case(results, operation)
    record = _timed(result, TAIL)
    errors = [] if record is None else [e["relative"] for name, e in record["errors"].items() if name.startswith("d")]
    return _at_most(
        "tail_mass=1e-4, relative gradient error", "", 1e-4, max(errors, default=None), _why_not(result, TAIL)
    )


def cpu_targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets of the CPU run beside the measured numbers."""
    unit = "GEMM units"
    return [
        _units(results, "loss_hidden", 3.15, "hidden in, training, trainable head", unit),
        _ratio(results, "loss_hidden", 2.5, "the same, against TRL's chunked log-prob", TRL),
        _units(results, "loss_hidden_frozen", 2.15, "hidden in, training, frozen head", unit),
        _units(results, "loss_hidden_sampled", 1.4, "hidden in, training, tail_mass=1e-4", unit, TAIL),
        _ratio(results, "loss_hidden_sampled", 5.0, "the same, against TRL's chunked log-prob", TRL, TAIL),
        _tail_error(results, "loss_hidden_sampled"),
        _units(results, "logprobs_hidden", 1.1, "hidden in, forward", unit),
        _half(results),
        _ratio(results, "loss_logits", 4.0, "logits in, loss + gradient, against eager", EAGER),
        *_memory(results, CPU_CHUNK_TOKENS),
    ]


def gpu_targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the targets of the GPU run beside the measured numbers."""
    unit = "GEMM units"
    return [
        _units(results, "loss_hidden", 3.3, "hidden in, training, trainable head", unit),
        _best_peer(results, "loss_hidden", 1.25, "the same, against the best peer"),
        _units(results, "loss_hidden_frozen", 2.2, "hidden in, training, frozen head", unit),
        _units(results, "loss_hidden_peaked", 1.5, "hidden in, training, tail_mass=1e-4", unit, TAIL),
        _best_peer(results, "loss_hidden_peaked", 2.5, "the same, against the best peer", TAIL),
        _units(results, "logprobs_hidden", 1.12, "hidden in, forward", unit),
        _half(results),
        _units(results, "loss_logits", 2.4, "logits in, loss + gradient", "V-units"),
        _ratio(results, "loss_logits", 8.0, "the same, against eager", EAGER),
        *_memory(results, GPU_CHUNK_TOKENS),
    ]
