"""What a preset is: the fields of a loss, its formula, its paper, and how each trainer differs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A loss of the field: fields of `PolicyLoss`, the formula in one line, the source, and the trainers that have it.

    `notes` says, per trainer, what a field cannot hold.
    """

    fields: Fields
    formula: str
    paper: str
    styles: Mapping[str, Fields] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def shown(fields: Fields) -> str:
    """Return fields as the arguments one would write: `clip_high=0.28, kl=None`."""
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())
