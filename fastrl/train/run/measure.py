"""The measures of evaluations, and their records in `evaluations.json`. A record without a measure is an accuracy.

    MARGIN = Measure("reward margin")
    run.log.add(Measurement(step, value=1.3, standard_error=0.2, n=100, measure=MARGIN).record())

The report and the curves take the name, the direction and the unit from the record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Direction = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Measure:
    """A kind of number. Measurements with equal measures can be compared."""

    name: str
    """Name in the report: `accuracy`, `perplexity`, `win rate`, ..."""
    better: Direction = "higher"
    """Direction of an improvement. `neither` is for numbers without one, for example a length."""
    share: bool = False
    """True for a share from 0 to 1, which the report shows in percent."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for an unknown direction or an empty name."""
        if self.better not in get_args(Direction):
            raise ValueError(f"better must be one of {', '.join(get_args(Direction))}, got {self.better!r}")
        if not self.name:
            raise ValueError("the name of a measure must not be empty")

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Measure:
        """Return the measure of a record of `evaluations.json`, accuracy if the record names none."""
        name = str(record.get("measure") or ACCURACY.name)
        known = ACCURACY if name == ACCURACY.name else cls(name)
        better = record.get("better", known.better)
        return cls(
            name, better if better in get_args(Direction) else known.better, bool(record.get("share", known.share))
        )

    def text(self, value: float, *, signed: bool = False) -> str:
        """Return a value as text: 41.5 % for a share, four significant digits for anything else."""
        if self.share:
            return f"{100 * value:+.1f} points" if signed else f"{100 * value:.1f} %"
        return f"{value:{'+' if signed else ''}.4g}"

    def improved(self, difference: float) -> bool | None:
        """Return whether a change is an improvement, None without a direction or a change."""
        if self.better == "neither" or not math.isfinite(difference) or difference == 0:
            return None
        return (difference > 0) == (self.better == "higher")


ACCURACY = Measure("accuracy", share=True)
PERPLEXITY = Measure("perplexity", better="lower")


@dataclass(frozen=True)
class Measurement:
    """The number that one evaluation found."""

    step: int
    value: float
    standard_error: float
    n: int
    """Number of held-out examples."""
    measure: Measure
    split: str = "held_out"
    mode: str = ""
    """Distinguishes evaluations of the same split and measure: `sampled`, `greedy`, ..."""

    def record(self) -> dict[str, Any]:
        """Return the record for `evaluations.json`."""
        return {
            "step": self.step,
            "split": self.split,
            "mode": self.mode,
            "measure": self.measure.name,
            "value": self.value,
            "standard_error": self.standard_error,
            "n": self.n,
            "better": self.measure.better,
            "share": self.measure.share,
        }
