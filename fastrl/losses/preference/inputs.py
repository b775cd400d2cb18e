"""The inputs of a preference loss beside its log-probs: their names and their checks.

Legend: P pairs, B rows, T time. A batch of pairs has 2P rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor


class PreferenceInputs(TypedDict, total=False):
    """The inputs of `PreferenceLoss.from_logits` and `from_hidden`. `from_logprobs` describes each at length."""

    desirable: Tensor | None
    """(B,) bool, for losses of single rows (kto, apo_zero_unpaired, bco)."""
    kl_logprobs: Tensor | None
    """(B', T') log-probs of mismatched completions, for kto's reference point."""
    kl_ref_logprobs: Tensor | None
    """(B', T') log-probs of the same under the reference."""
    kl_mask: Tensor | None
    """(B', T'), 1 on their tokens. None: the log-probs are 0 elsewhere."""
    reference_point: float | Tensor | None
    """kto's z0, in log-prob units."""
    baseline: float | Tensor | None
    """bco's delta, in units of the reward."""
    n_pairs: float | Tensor | None
    """Global number of pairs (or rows)."""
    n_tokens: float | Tensor | None
    """Global number of chosen tokens."""
    log_sum_squared_probs: Tensor | None
    """(2P, T) log sum_v p_v^2, for weighting="wpo". from_logits and from_hidden compute it themselves."""


# A constant, because torch.compile traces the check.
_NAMES = tuple(PreferenceInputs.__annotations__)


def check_names(inputs: Mapping[str, Any]) -> None:
    """Raise `TypeError` if a name is no input."""
    if unknown := sorted(set(inputs) - set(_NAMES)):
        raise TypeError(f"unexpected argument {', '.join(unknown)}; known: {', '.join(_NAMES)}")


def check_no_squares(inputs: Mapping[str, Any]) -> None:
    """Raise `TypeError` if the caller passes sum p^2 to an entrance that computes it."""
    if inputs.get("log_sum_squared_probs") is not None:
        raise TypeError("log_sum_squared_probs= is computed here from the logits; pass it only to from_logprobs")


def either_name(desirable: Tensor | None, labels: Tensor | None) -> Tensor | None:
    """Return the argument, given under its name or under its old name. Raise `ValueError` if both are given."""
    if desirable is not None and labels is not None:
        raise ValueError("labels= is the old name of desirable=, got both; pass desirable= alone")
    return labels if desirable is None else desirable
