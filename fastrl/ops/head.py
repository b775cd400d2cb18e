"""How hidden states and a head become logits: checked once, then passed on.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

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


IGNORED = -100
"""The label of rows to leave out, unless a caller names another."""


class HeadArguments(TypedDict, total=False):
    """Arguments of `linear_token_logprobs` that `head_options` turns into `HeadOptions`."""

    logit_scale: float
    softcap: float | None
    ignore_index: int
    chunk_tokens: int | None
    tail_mass: float
    tp_group: Any
    backend: str


@dataclass(frozen=True)
class HeadOptions:
    """How logits become log-probs: all options of the vocabulary operation that are not tensors."""

    logit_scale: float
    softcap: float
    ignore_index: int
    chunk_tokens: int
    backend: str
    tail_mass: float = 0.0
    observe: Callable[[Tensor, Tensor], None] | None = None
    """Called in the forward with (indices of rows, their logits), to read more from the logits of a chunk. It must not
    write to them."""


@dataclass(frozen=True)
class LinearRows:
    """Rows of hidden states, their head and its options: `checked` validates them, inner code trusts them.

    The tensors keep their autograd graph.
    """

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    inv_temperature: Tensor  # (N,)
    options: HeadOptions
    allowed: Tensor | None = None  # (N, ...) sets, as `check_allowed` returns them
    rounding: str = ""
    shape: torch.Size | None = None
    """The shape of the labels as the caller gave them, None for (N,)."""

    @classmethod
    def checked(
        cls,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (...)
        *,
        bias: Tensor | None = None,  # (V,)
        allowed: Tensor | None = None,
        logits_rounding: str | None = None,
        temperature: float | Tensor | None = 1.0,
        **arguments: Unpack[HeadArguments],
    ) -> LinearRows:
        """Return the arguments of `linear_token_logprobs` as rows, hidden states and head in one dtype, or raise."""
        _check_head(hidden, weight, bias)
        ignored = arguments.get("ignore_index", IGNORED)
        labels = checks.labels("labels", labels, hidden.shape[:-1], hidden.device, weight.shape[0], ignored)
        check_savable(hidden, weight)
        options = head_options(hidden.device, **arguments)
        if options.tail_mass > 0.0 and not (allowed is None and logits_rounding is None):
            raise ValueError(
                "tail_mass > 0 is not supported together with allowed= or logits_rounding=: expected tail_mass=0.0, "
                f"got {options.tail_mass}"
            )
        return cls.of(
            hidden,
            weight,
            labels,
            bias,
            temperature,
            options,
            allowed=check_allowed(allowed, labels, weight.shape[0]),
            rounding=check_rounding(logits_rounding),
        )

    @classmethod
    def of(
        cls,
        hidden: Tensor,  # (..., D)
        weight: Tensor,  # (V, D)
        labels: Tensor,  # (...)
        bias: Tensor | None,  # (V,)
        temperature: Any,
        options: HeadOptions,
        *,
        allowed: Tensor | None = None,
        rounding: str = "",
    ) -> LinearRows:
        """Return checked tensors as rows, in one dtype. Only the temperature is still to be checked."""
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        # The bias is widened to the head's dtype, but not rounded to it: it is added to logits that are not rounded.
        bias = None if bias is None else bias.to(torch.promote_types(bias.dtype, dtype))
        inv_temperature = _inv_temperature(temperature, labels, checks.wide(dtype))
        flat = hidden.reshape(-1, hidden.shape[-1])
        return cls(
            flat, weight, bias, labels.reshape(-1), inv_temperature, options, allowed, rounding, shape=labels.shape
        )

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Whether hidden states, head and bias require a gradient."""
        return self.hidden.requires_grad, self.weight.requires_grad, self.bias is not None and self.bias.requires_grad

    @property
    def trains_head(self) -> bool:
        """Whether the head or its bias requires a gradient."""
        return any(self.needs[1:])

    def restored(self, x: Tensor) -> Tensor:
        """Return a value per row (N,) in the shape of the labels."""
        return x if self.shape is None else x.view(self.shape)


def _check_head(hidden: Any, weight: Any, bias: Any) -> None:
    """Raise unless hidden states, head and bias fit each other."""
    checks.vocabulary_tensor("hidden", hidden)
    checks.vocabulary_tensor("weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, shape {tuple(weight.shape)}: gather the sharded head first (ZeRO-3: GatheredParameters, "
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


def check_savable(hidden: Tensor, weight: Tensor) -> None:
    """Raise where the backward would need a head that autograd cannot save."""
    trains = torch.is_grad_enabled() and hidden.requires_grad and not torch.compiler.is_compiling()
    if trains and torch.is_inference(weight):
        raise RuntimeError("weight is an inference tensor and cannot be saved for backward: pass weight.clone()")


def head_options(
    device: torch.device,
    *,
    logit_scale: Any = 1.0,
    softcap: Any = None,
    ignore_index: int = IGNORED,
    chunk_tokens: int | None = None,
    tail_mass: float = 0.0,
    tp_group: Any = None,
    backend: str = "auto",
) -> HeadOptions:
    """Return the validated `HeadOptions`, or raise."""
    tail_mass = sparse_rows.check_tail_mass(tail_mass)
    if tp_group is not None:
        raise ValueError("tp_group is not supported here: gather the head first, or take the log-probs with tp_group")
    scale, cap = head_scalars(logit_scale, softcap)
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS
    elif isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be an int >= 1 or None, got {chunk_tokens!r}")
    return HeadOptions(scale, cap, ignore_index, chunk_tokens, choice.choose(backend, device).backend, tail_mass)


def _inv_temperature(temperature: Any, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1/T per token, (N,), or raise."""
    value = checks.temperature(temperature, labels.shape, labels.device)
    if isinstance(value, Tensor):
        return value.to(dtype).reciprocal().reshape(-1)
    return torch.full((labels.numel(),), 1.0 / value, dtype=dtype, device=labels.device)
