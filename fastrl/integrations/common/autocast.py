"""The operands of an output head in the dtype in which autocast would multiply them. For transformers and verl."""

from __future__ import annotations

import torch
from torch import Tensor


def as_autocast(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the operands in the dtype in which autocast runs a Linear here, or unchanged."""
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
