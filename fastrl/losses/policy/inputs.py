"""The inputs of a policy loss: their names, their checks, and the flat batch that travels.

Legend: B batch, T time, N tokens, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

_INPUTS = (
    "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs",
    "n_tokens", "n_sequences", "selection", "group_ids", "scores",
)  # fmt: skip


def _named_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: inputs.get(name) for name in _INPUTS}


def _check_names(inputs: dict[str, Any]) -> None:
    known = (*_INPUTS, "cu_seqlens")
    if unknown := sorted(set(inputs) - set(known)):
        raise TypeError(f"unexpected argument {', '.join(unknown)}; known: {', '.join(known)}")


def _check_inputs(inputs: dict[str, Any]) -> None:
    if "entropy" in inputs:
        raise TypeError("entropy= is computed here from the logits; pass it only to the loss on log-probs")
    _check_names(inputs)
    if inputs.get("mask") is None:
        raise TypeError("mask= is needed: 1 for tokens that count")


@dataclass(frozen=True)
class Batch:
    """The inputs of a call as flat tensors: (N,) per token, (S,) per sequence."""

    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    selection: Tensor | None
    positive: Tensor | None
    group_ids: Tensor | None
    n_tokens: float | Tensor | None
    n_sequences: float | Tensor | None
