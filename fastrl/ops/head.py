"""How hidden states and a head become logits: checked once, then passed on.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice
from fastrl.ops import sparse_rows
from fastrl.ops.live_rows import refuse_capture
from fastrl.ops.rows import head_scalars
from fastrl.ops.sampling import check_allowed, check_rounding

# Rows of a chunk. In GEMM units at N = 1024, D = 576, V = 49152 in float32 (one AVX-512 thread, its CPU time):
#         forward   training   frozen head   half the rows masked
#   256     1.06       2.97          2.02                   1.48
#   512     1.05       3.09          1.99                   1.45
#  1024     1.04       3.03          1.95                   1.92, the chunk being padded
CPU_CHUNK_TOKENS = 256


GPU_CHUNK_TOKENS = 2048


@dataclass(frozen=True)
class HeadOptions:
    """How logits become log-probs: everything of the vocabulary operation that is not a tensor."""

    logit_scale: float
    softcap: float
    ignore_index: int
    chunk_tokens: int
    backend: str
    tail_mass: float = 0.0
    observe: Callable[[Tensor, Tensor], None] | None = None
    """Called in the forward with (indices of rows, their logits), for what else is wanted of the logits while they are
    there; it must leave them as they are."""


def check_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors of the vocabulary operation in one dtype, or raise."""
    checks.vocabulary_tensor("hidden", hidden)
    checks.vocabulary_tensor("weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, shape {tuple(weight.shape)}: gather the sharded head first (ZeRO-3: GatheredParameters; "
            "FSDP: call through the wrapped module's forward)"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, D={hidden.shape[-1] if hidden.dim() else '?'}), got {tuple(weight.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    refuse_capture(hidden.device)
    if bias is not None:
        checks.vocabulary_tensor("bias", bias)
        checks.same_shape("bias", bias, weight.shape[:1])
        checks.same_device("bias", bias, hidden.device)
    labels = checks.labels("labels", labels, hidden.shape[:-1], hidden.device, weight.shape[0], ignore_index)
    trains = torch.is_grad_enabled() and hidden.requires_grad and not torch.compiler.is_compiling()
    if trains and torch.is_inference(weight):
        raise RuntimeError("weight is an inference tensor and cannot be saved for backward; pass weight.clone()")
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), labels, None if bias is None else as_added(bias, dtype)


def as_added(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of a head of `dtype`: widened to it, but not rounded, as the logits that it is added to are."""
    return bias.to(torch.promote_types(bias.dtype, dtype))


def make_head(
    hidden: Tensor,
    logit_scale: Any,
    softcap: Any,
    ignore_index: int,
    *,
    chunk_tokens: int | None,
    tail_mass: float,
    tp_group: Any,
    backend: str,
) -> HeadOptions:
    """Return the validated `HeadOptions`."""
    tail_mass = sparse_rows.check_tail_mass(tail_mass)
    if tp_group is not None:
        raise ValueError("tp_group is not supported here: gather the head first, or take the log-probs with tp_group")
    scale, cap = head_scalars(logit_scale, softcap)
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else GPU_CHUNK_TOKENS
    elif isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be an int >= 1 or None, got {chunk_tokens!r}")
    return HeadOptions(scale, cap, ignore_index, chunk_tokens, choice.choose(backend, hidden.device).backend, tail_mass)


def check_restrictions(
    allowed: Tensor | None, logits_rounding: str | None, labels: Tensor, vocabulary: int, head: HeadOptions
) -> tuple[Tensor | None, str]:
    """Return `allowed` and `logits_rounding` as the kernels take them, or raise."""
    if head.tail_mass > 0.0 and not (allowed is None and logits_rounding is None):
        raise ValueError(
            "tail_mass > 0 is not supported together with allowed= or logits_rounding=: expected tail_mass=0.0, "
            f"got {head.tail_mass}"
        )
    return check_allowed(allowed, labels, vocabulary), check_rounding(logits_rounding)


def inverse_temperature(temperature: Any, labels: Tensor, hidden: Tensor) -> Tensor:
    """Return 1/T per token, (N,), in the dtype of the row kernels."""
    temperature = checks.temperature(temperature, labels.shape, hidden.device)
    dtype = _wide(hidden.dtype)
    if isinstance(temperature, Tensor):
        return temperature.to(dtype).reciprocal().reshape(-1)
    return torch.full((labels.numel(),), 1.0 / temperature, dtype=dtype, device=hidden.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32
