"""All checks of `fastrl verify`, on all devices and backends, and their table.

Results are compared with float64. A result passes if its error is at most twice the error of PyTorch's float32 eager
code on the same numbers, plus a few roundings of the largest value (`budget`). Bitwise properties allow no error. The
test suite uses the same two functions. `fastrl.verify.checks` lists the checks.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from fastrl.backends import choice
from fastrl.verify.judge import Look, Setting

PASS, FAIL, NOT_RUN = "pass", "fail", "not run"


BACKENDS = tuple(name for name in choice.BACKENDS if name != "auto")


@dataclass(frozen=True)
class Check:
    """One check and its result."""

    device: str
    backend: str
    operation: str
    name: str
    status: str
    """"pass", "fail" or "not run"."""
    part: str | None = None
    """The output or gradient that came closest to its bound."""
    error: float | None = None
    granted: float | None = None
    reason: str | None = None
    """Reason why it was not run, or the exception that it raised."""
    seconds: float = 0.0


def devices_here() -> list[str]:
    """Return the device types of this machine for which there are backends."""
    here = ["cpu"]
    here += ["cuda"] if torch.cuda.is_available() else []
    here += ["xpu"] if torch.xpu.is_available() else []
    return here


def verify(
    devices: Sequence[str] | None = None, backends: Sequence[str] = BACKENDS, *, seed: int = 0, quick: bool = False
) -> Iterator[Check]:
    """Yield the result of every check on every device and backend, each as soon as it is done.

    Args:
        devices: "cpu", "cuda", "cuda:1", ... None takes all of this machine.
        backends: of the vocabulary operations, some of `BACKENDS`. One that cannot run on a device gives one `Check`
            with the status "not run" and the reason.
        seed: of the inputs.
        quick: fewer vocabularies and presets.

    Raises:
        ValueError: an unknown backend, or a device that is not one.
    """
    unknown = [name for name in backends if name not in BACKENDS]
    if unknown:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {unknown[0]!r}")
    places = [_device(name) for name in (devices_here() if devices is None else devices)]
    return _checks([Setting(place, name, seed, quick) for place in places for name in backends])


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be a device like cpu or cuda:0, got {name!r}") from error


def _checks(settings: Sequence[Setting]) -> Iterator[Check]:
    # Late, because the checks import every loss, and the test suite needs only the rule.
    from fastrl.verify.checks import OPERATIONS

    for setting in settings:
        obstacle = _obstacle(setting)
        if obstacle is not None:
            yield Check(str(setting.device), setting.backend, "all", "all", NOT_RUN, reason=obstacle)
            continue
        for operation, named in OPERATIONS.items():
            for name, look in named(setting):
                yield result(Check(str(setting.device), setting.backend, operation, name, PASS), look)


def _obstacle(setting: Setting) -> str | None:
    """Return why the backend cannot run on the device, or None."""
    try:
        torch.empty(1, device=setting.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has several types for a missing device
        return f"device {setting.device} cannot be used: {str(error).strip().splitlines()[0]}"
    try:
        choice.choose(setting.backend, setting.device)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None


def result(check: Check, look: Look) -> Check:
    """Run the check, and return it with its verdict or exception, and its time."""
    start = time.perf_counter()
    try:
        verdict = look()
    except Exception as error:  # any exception of a kernel is a failed check
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return replace(check, status=FAIL, reason=reason, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    status = PASS if verdict.error <= verdict.granted else FAIL
    return replace(check, status=status, seconds=seconds, **verdict._asdict())


COLUMNS = "{:<7} {:<7} {:<22} {:<46} {:<8} {:>9} {:>9}  {}"


def header() -> str:
    """Return the line above the table."""
    return COLUMNS.format(
        "device", "backend", "operation", "check", "result", "error", "granted", "worst part"
    ).rstrip()


def line(check: Check) -> str:
    """Return the line of one check."""
    status = "FAIL" if check.status == FAIL else check.status
    numbers = ["" if x is None else "0" if x == 0 else f"{x:.2e}" for x in (check.error, check.granted)]
    said = check.reason if check.reason is not None else check.part
    return COLUMNS.format(check.device, check.backend, check.operation, check.name, status, *numbers, said).rstrip()


def succeeded(checks: Sequence[Check]) -> bool:
    """Return whether at least one check passed and none failed."""
    return any(check.status == PASS for check in checks) and all(check.status != FAIL for check in checks)


def counts(checks: Sequence[Check]) -> dict[str, int]:
    """Return the number of checks by status."""
    return {status: sum(check.status == status for check in checks) for status in (PASS, FAIL, NOT_RUN)}


def summary(checks: Sequence[Check]) -> str:
    """Return the last line: the numbers of passed, failed and skipped checks, and the skipped backends."""
    number = counts(checks)
    skipped = [f"{check.backend} on {check.device}" for check in checks if check.status == NOT_RUN]
    said = f"{number[PASS]} passed, {number[FAIL]} failed, {number[NOT_RUN]} not run"
    said += f" ({', '.join(skipped)})" if skipped else ""
    said += f" in {sum(check.seconds for check in checks):.1f} s"
    return said if number[PASS] or number[FAIL] else f"{said}: nothing was checked"


def record(checks: Sequence[Check], *, seed: int, quick: bool) -> dict[str, Any]:
    """Return the results with the machine's versions, as JSON-able values.

    Returns:
        `ok`, `summary` (status -> number), `checks` (the fields of `Check`), `seed`, `quick` and `versions`.
    """
    import fastrl

    versions = {"fastrl": fastrl.__version__, "torch": torch.__version__, "python": platform.python_version()}
    listed = [asdict(check) for check in checks]
    return {
        "ok": succeeded(checks),
        "summary": counts(checks),
        "seed": seed,
        "quick": quick,
        "versions": versions,
        "checks": listed,
    }
