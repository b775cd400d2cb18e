"""Rows of logits: their checked arguments, their blocks, and the row kernels forward and backward.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice


class TokenLogprobs(NamedTuple):
    """Results of the vocabulary operation, each of the shape of the labels, 0 where ignored, all differentiable."""

    logprobs: Tensor
    entropy: Tensor
    logsumexp: Tensor


@dataclass(frozen=True)
class LogitRows:
    """How rows of logits become log-probs: all arguments of the vocabulary operation but the logits, validated."""

    labels: Tensor  # (...)
    inv_temperature: float
    """1/T, where `inv_temperature_rows` is None."""
    inv_temperature_rows: Tensor | None  # (...)
    logit_scale: float
    softcap: float
    """0.0 for none."""
    ignore_index: int
    backend: str
    allowed: Tensor | None = None  # (N, ...) sets, as `check_allowed` returns them
    rounding: str = ""

    def scalars(self) -> dict[str, Any]:
        """Return the keyword arguments of the row kernels."""
        return {"logit_scale": self.logit_scale, "softcap": self.softcap, "ignore_index": self.ignore_index}


def checked_rows(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float | Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    backend: str,
) -> LogitRows:
    """Return the arguments of `token_logprobs` as `LogitRows`, or raise as it does."""
    checks.vocabulary_tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    labels = checks.labels("labels", labels, logits.shape[:-1], logits.device, logits.shape[-1], ignore_index)
    scale, cap = head_scalars(logit_scale, softcap)
    temperature = checks.temperature(temperature, labels.shape, logits.device)
    chosen = choice.choose(backend, logits.device).backend
    inv_temperature, inv_temperature_rows = _inverse(temperature, logits.dtype)
    return LogitRows(labels, inv_temperature, inv_temperature_rows, scale, cap, ignore_index, chosen)


def head_scalars(logit_scale: Any, softcap: Any) -> tuple[float, float]:
    """Return (logit_scale, softcap) as floats, or raise; 0.0 stands for no softcap."""
    scale = checks.plain_float("logit_scale", logit_scale)
    if scale == 0.0:
        raise ValueError("logit_scale must not be 0")
    return scale, 0.0 if softcap is None else checks.plain_float("softcap", softcap, low=0.0, open_low=True)


def _inverse(temperature: float | Tensor, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """Return 1/T as a float, or as a tensor beside the float 1, of float64 where the logits or T are."""
    if not isinstance(temperature, Tensor):
        return 1.0 / temperature, None
    wide = torch.float64 if torch.float64 in (dtype, temperature.dtype) else torch.float32
    return 1.0, temperature.to(wide).reciprocal()


def row_blocks(
    logits: Tensor,  # (..., V)
    *others: Tensor | None,  # (...)
) -> Iterator[tuple[Any, ...]]:
    """Yield views (N, V) of the logits with the matching (N,) rows of the others, without copying the logits.

    One block if the leading dimensions can be viewed as one. Otherwise one block per index of the first dimension, as
    for `logits[:, :-1]`.
    """
    vocabulary = logits.shape[-1]
    flat = tuple(None if x is None else x.reshape(-1) for x in others)
    # PyTorch tells whether strides allow a view only by trying.
    try:
        yield (logits.view(-1, vocabulary), *flat)
        return
    except RuntimeError:
        pass
    per_index = logits[0].numel() // vocabulary
    for i in range(logits.shape[0]):
        part = tuple(None if x is None else x[i * per_index : (i + 1) * per_index] for x in flat)
        yield from row_blocks(logits[i], *part)


def forward_rows(
    backend: str, logits: Tensor, labels: Tensor, inv_temperature: float | Tensor, **scalars: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp, residual) of rows, (N,) each. residual is (0,) if the backend has none."""
    kernels = choice.row_kernels(backend)
    dtype = checks.wide(logits.dtype)
    if not choice.needs_lse_residual(backend):
        outputs = kernels.token_logprobs_fwd(logits, labels, inv_temperature, **scalars)
        return (*outputs, torch.empty(0, dtype=dtype, device=logits.device))
    residual = torch.empty(logits.shape[0], dtype=dtype, device=logits.device)
    return (*kernels.token_logprobs_fwd(logits, labels, inv_temperature, residual=residual, **scalars), residual)


def backward_rows(
    backend: str,
    logits: Tensor,
    labels: Tensor,
    inv_temperature: float | Tensor,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    **scalars: Any,
) -> Tensor:
    """Return the gradient of rows from the outputs of `forward_rows`, in the memory of `out=` if it is given."""
    kernels = choice.row_kernels(backend)
    if choice.needs_lse_residual(backend):
        scalars["residual"] = outputs[3]
    return kernels.token_logprobs_bwd(logits, labels, inv_temperature, *outputs[:3], *grads, **scalars)


def once_differentiable() -> None:
    """Raise inside a backward pass that is itself recorded."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "fastrl operations are differentiable once: create_graph=True is not supported, "
            "use fastrl.reference for second derivatives"
        )
