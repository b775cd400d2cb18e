"""`fastrl verify`: is every operation right, here, on every backend that can run? And the rule that decides it.

float64 decides. A result passes when its error is at most twice that of PyTorch's float32 eager code on the same
numbers, plus a few roundings of the largest value (`budget`). Bitwise properties grant nothing. The test suite judges
by the same two functions. What is checked stands in `fastrl.verify_checks`.
"""

from __future__ import annotations

import math
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl.ops import dispatch

# Roundings granted beside the eager code's own error, relative to the largest magnitude of the exact result.
# A rounding is one unit in the last place of the dtype in which the result is returned.
ROUNDINGS = 4.0
# Numbers that are judged at a time, in float64: a gradient of real logits has 10^9.
PIECE = 1 << 26
PASS, FAIL, NOT_RUN = "pass", "fail", "not run"
BACKENDS = tuple(name for name in dispatch.BACKENDS if name != "auto")


# --- the rule ---------------------------------------------------------------------------------------------------------


class Disagreement(AssertionError):
    """A result that no error bound can forgive: another shape, or not finite where the exact one is."""


def max_error(result: Tensor, exact: Tensor) -> float:
    """Return max |result - exact| in float64; positions must agree on where they are not finite.

    Raises:
        Disagreement: the shapes differ, or the places and values that are not finite do.
    """
    if result.shape != exact.shape:
        raise Disagreement(f"expected shape {tuple(exact.shape)}, got {tuple(result.shape)}")
    largest, done = 0.0, 0
    for got, right in _pieces(result, exact):
        finite = torch.isfinite(right)
        same = torch.where(finite, torch.isfinite(got), got.eq(right) | (got.isnan() & right.isnan()))
        if not bool(same.all()):
            places = (~same).nonzero().squeeze(-1)[:8].cpu() + done
            places = torch.stack(torch.unravel_index(places, exact.shape), -1).tolist() if exact.dim() else [[]]
            raise Disagreement(f"non-finite values disagree at {places}")
        largest = max(largest, _largest_difference(got, right, finite))
        done += right.numel()
    return largest


def budget(exact: Tensor, eager: Tensor, dtype: torch.dtype) -> float:
    """Return the error granted: twice the eager code's error plus `ROUNDINGS` roundings of the largest value."""
    largest = eager_error = 0.0
    for usual, right in _pieces(eager, exact):
        finite = torch.isfinite(right)
        largest = max(largest, _largest_difference(right, torch.zeros_like(right), finite))
        eager_error = max(eager_error, _largest_difference(usual, right, finite & torch.isfinite(usual)))
    return 2.0 * eager_error + ROUNDINGS * torch.finfo(dtype).eps * max(largest, torch.finfo(dtype).tiny)


def _pieces(result: Tensor, exact: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield both in float64, flat and piece by piece, where `exact` is: a device judges its largest results itself."""
    place = exact.device if result.device == exact.device and exact.device.type == "cuda" else torch.device("cpu")
    pairs = zip(result.detach().reshape(-1).split(PIECE), exact.detach().reshape(-1).split(PIECE), strict=True)
    for got, right in pairs:
        yield got.to(place).double(), right.to(place).double()


def _largest_difference(a: Tensor, b: Tensor, where: Tensor) -> float:
    """Return max |a - b| over the places that count, 0 if there are none."""
    return float(torch.where(where, a - b, 0.0).abs().max()) if a.numel() else 0.0


class Verdict(NamedTuple):
    """The part of a result that came closest to its bound, or went furthest beyond it."""

    part: str
    error: float
    granted: float

    @property
    def share(self) -> float:
        """Error as a share of what is granted; above 1 it is too large."""
        if self.granted > 0.0:
            return self.error / self.granted
        return 0.0 if self.error == 0.0 else math.inf


Parts = Mapping[str, Tensor]


def judged(result: Parts, exact: Parts, eager: Parts) -> Verdict:
    """Return the worst verdict over the parts of a result."""
    if result.keys() != exact.keys():
        raise Disagreement(f"expected {', '.join(exact)}, got {', '.join(result)}")
    return worst(
        Verdict(name, max_error(value, exact[name]), budget(exact[name], eager[name], value.dtype))
        for name, value in result.items()
    )


def same_bits(result: Parts, other: Parts) -> Verdict:
    """Return the worst difference between results that must agree bit for bit."""
    return worst(
        Verdict(name, 0.0 if torch.equal(value, other[name]) else max_error(value, other[name]) or math.ulp(0.0), 0.0)
        for name, value in result.items()
    )


def worst(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict that comes closest to its bound, or goes furthest beyond it."""
    return max(verdicts, key=lambda verdict: verdict.share)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """Where a check runs, and the seed of its inputs."""

    device: torch.device
    backend: str
    seed: int = 0
    quick: bool = False

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter runs the kernels, a thousand times slower than a compiler's."""
        return self.backend == "triton" and self.device.type not in dispatch.GPU_TYPES

    def generator(self, name: str) -> torch.Generator:
        """Return a generator of its own for every check, so that checks do not depend on which others run."""
        return torch.Generator().manual_seed(zlib.crc32(name.encode()) + self.seed)


Look = Callable[[], Verdict]
Named = Iterator[tuple[str, Look]]


@dataclass(frozen=True)
class Check:
    """What became of one check."""

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
    """Why it was not run, or what it raised."""
    seconds: float = 0.0


def devices_here() -> list[str]:
    """Return the device types that this machine has and that backends exist for."""
    here = ["cpu"]
    here += ["cuda"] if torch.cuda.is_available() else []
    here += ["xpu"] if torch.xpu.is_available() else []
    return here


def verify(
    devices: Sequence[str] | None = None, backends: Sequence[str] = BACKENDS, *, seed: int = 0, quick: bool = False
) -> Iterator[Check]:
    """Yield the result of every check on every device and backend, one after another as they are done.

    Args:
        devices: "cpu", "cuda", "cuda:1", ...; None: all that are here.
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
    # The checks need every loss; whoever needs only the rule does not load them.
    from fastrl.verify_checks import OPERATIONS

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
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch has no one type for a missing device
        return f"device {setting.device} cannot be used: {str(error).strip().splitlines()[0]}"
    try:
        dispatch.choose(setting.backend, setting.device)
    except RuntimeError as error:
        return " ".join(str(error).split())
    return None


def result(check: Check, look: Look) -> Check:
    """Return the check with what looking found: the verdict, or what it raised, and the time it took."""
    start = time.perf_counter()
    try:
        verdict = look()
    except Exception as error:  # whatever a kernel raises is a failed check, with what it said
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return replace(check, status=FAIL, reason=reason, seconds=time.perf_counter() - start)
    seconds = time.perf_counter() - start
    status = PASS if verdict.error <= verdict.granted else FAIL
    return replace(check, status=status, seconds=seconds, **verdict._asdict())


# --- the report -------------------------------------------------------------------------------------------------------


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
    """Return whether something was checked and nothing failed."""
    return any(check.status == PASS for check in checks) and all(check.status != FAIL for check in checks)


def counts(checks: Sequence[Check]) -> dict[str, int]:
    """Return the number of checks by status."""
    return {status: sum(check.status == status for check in checks) for status in (PASS, FAIL, NOT_RUN)}


def summary(checks: Sequence[Check]) -> str:
    """Return the last line: how many passed, what failed, and which backends were not run."""
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
