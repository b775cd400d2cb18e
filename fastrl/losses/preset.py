"""A preset: the fields of a loss, its formula, its paper, and the differences of each trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Fields = Mapping[str, Any]


@dataclass(frozen=True)
class Preset:
    """A loss of the field: its fields, the formula in one line, the source, and the trainers that have it.

    `notes` holds, per trainer, the differences that no field expresses.
    """

    fields: Fields
    formula: str
    paper: str
    styles: Mapping[str, Fields] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


def shown(fields: Fields) -> str:
    """Return fields as arguments in a call: `clip_high=0.28, kl=None`."""
    return ", ".join(f"{key}={value!r}" for key, value in fields.items())


def described(name: str, preset: Preset, family: str, fields_of: Callable[[Fields], str] = shown) -> str:
    """Return a preset as text: formula, source, fields, and each trainer that has it with its differences.

    Args:
        name: of the preset.
        preset: its entry.
        family: the class that builds it, "PolicyLoss" or "PreferenceLoss".
        fields_of: how fields are shown.
    """
    lines = [
        name,
        f"    loss      {preset.formula}",
        f"    source    {preset.paper}",
        f"    fields    {fields_of(preset.fields) or f'the defaults of {family}'}",
    ]
    for style, fields in preset.styles.items():
        note = f"  ({preset.notes[style]})" if style in preset.notes else ""
        lines.append(f"    {style:<10}{fields_of(fields) or 'the same'}{note}")
    return "\n".join(lines)
