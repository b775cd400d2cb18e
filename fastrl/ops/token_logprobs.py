"""Per-token log-prob, entropy and logsumexp from logits: one read forward, one read and one write backward.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice, memory
from fastrl.ops.rows import TokenLogprobs, backward_rows, checked_rows, forward_rows, once_differentiable, row_blocks


def token_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float | Tensor | None = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
    allowed: Tensor | None = None,  # (..., V) bool, (..., ceil(V/32)) int32 or (..., K) int64
    logits_rounding: str | None = None,
) -> TokenLogprobs:
    """Return log-prob of the label, entropy and logsumexp of every row of `logits`.

        z = softcap tanh(logit_scale logits / softcap) / temperature,   -inf outside `allowed`
        logprobs = z_y - logsumexp(z);  entropy = -sum_v p_v log p_v, in nats

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, of any strides. -inf entries have probability 0.
        labels: (...) int64 or int32, already aligned with the logits: nothing is shifted here.
        temperature: a float or a tensor broadcastable to `labels`, finite and > 0. None means 1. The C++ rows are NaN
            in float32 where |logit_scale| / T (under a softcap softcap / T) is outside 1e-30 to 1e30.
        logit_scale: factor on the logits, before the softcap.
        softcap: bound c of c tanh(x / c), or None.
        ignore_index: label of rows to leave out; their outputs and gradients are exactly 0 whatever the logits hold.
        backend: "auto", "torch", "cpu" (C++), "triton" or "cuda" (clusters of compute capability 9.0, not run on a
            device yet); a named backend is used or refused.
        allowed: the tokens that each row was sampled from, where an engine reports log-probs over what top-k, top-p or
            a grammar left: a bool mask, a bitmask (bit i of word w is token 32 w + i, as grammar engines pack it) or
            ids padded with -1; told apart by their dtype. A label outside its set has log-prob -inf, without gradient,
            and raises inside `checked()`; a row without any allowed token is NaN. `fastrl.top_k_top_p_allowed` gives
            the mask of a sampler.
        logits_rounding: None, or "bf16" or "fp16": round the logits, before anything else, as a head does that writes
            them in that precision. The gradient is straight through.

    With either of the last two, rows go through copies of 64 rows, which is their extra memory.

    Returns:
        `TokenLogprobs` of float32 tensors (float64 for float64 logits) of the shape of `labels`. The gradient is with
        respect to `logits`, through any of the three outputs, once (`create_graph=True` is refused). Autocast changes
        nothing: the logits are taken in the dtype they come in, and all arithmetic is that of the outputs' dtype.

    Raises:
        ValueError: shapes, devices, options, label values (on a CPU or inside `checked()`; elsewhere the row is NaN).
        TypeError: dtypes and tensor kinds that cannot be used.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    rows = checked_rows(
        logits,
        labels,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        backend=backend,
    )
    if allowed is not None or logits_rounding is not None:
        from fastrl.ops.sampling import restricted_token_logprobs

        temperature = checks.temperature(temperature, rows.labels.shape, logits.device)
        how = (rows.logit_scale, rows.softcap, rows.ignore_index, rows.backend)
        return TokenLogprobs(
            *restricted_token_logprobs(logits, rows.labels, temperature, allowed, logits_rounding, *how)
        )
    outputs = _token_logprobs(
        logits,
        rows.labels,
        rows.inv_temperature_rows,
        rows.inv_temperature,
        rows.logit_scale,
        rows.softcap,
        rows.ignore_index,
        rows.backend,
    )
    return TokenLogprobs(*outputs[:3])


@torch.library.custom_op("fastrl::token_logprobs", mutates_args=())
def _token_logprobs(
    logits: Tensor,
    labels: Tensor,
    inv_temperature_rows: Tensor | None,
    inv_temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with choice.autocast_disabled(logits.device):
        parts = [
            forward_rows(
                backend,
                rows,
                row_labels,
                inv_temperature if row_inv_temperature is None else row_inv_temperature,
                logit_scale=logit_scale,
                softcap=softcap,
                ignore_index=ignore_index,
            )
            for rows, row_labels, row_inv_temperature in row_blocks(logits, labels, inv_temperature_rows)
        ]
    outputs = parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))
    logprobs, entropy, logsumexp = (x.view(labels.shape) for x in outputs[:3])
    return logprobs, entropy, logsumexp, outputs[3]


@_token_logprobs.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    inv_temperature_rows: Tensor | None,
    inv_temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    outputs = tuple(torch.empty(labels.shape, dtype=dtype, device=logits.device) for _ in range(3))
    residual = torch.empty(
        labels.numel() if choice.needs_lse_residual(backend) else 0, dtype=dtype, device=logits.device
    )
    return outputs[0], outputs[1], outputs[2], residual


@torch.library.custom_op("fastrl::token_logprobs_backward", mutates_args=())
def _token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    inv_temperature_rows: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    residual: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    inv_temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    gradient = memory.empty(logits.shape, logits.dtype, logits.device)
    kept = residual if choice.needs_lse_residual(backend) else None
    given = (
        labels,
        inv_temperature_rows,
        logprobs,
        entropy,
        logsumexp,
        kept,
        grad_logprobs,
        grad_entropy,
        grad_logsumexp,
    )
    # The output is viewed like the input: both split along the first dimension, or neither does.
    written = 0
    out_rows = gradient.view(-1, logits.shape[-1])
    with choice.autocast_disabled(logits.device):
        for rows, row_labels, row_inv_temperature, *rest in row_blocks(logits, *given):
            backward_rows(
                backend,
                rows,
                row_labels,
                inv_temperature if row_inv_temperature is None else row_inv_temperature,
                (rest[0], rest[1], rest[2], rest[3]),
                (rest[4], rest[5], rest[6]),
                logit_scale=logit_scale,
                softcap=softcap,
                ignore_index=ignore_index,
                out=out_rows[written : written + rows.shape[0]],
            )
            written += rows.shape[0]
    return gradient


@_token_logprobs_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    inv_temperature_rows: Tensor | None,
    logprobs: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    residual: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    inv_temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, inv_temperature_rows, *ctx.scalars = inputs
    ctx.save_for_backward(logits, labels, inv_temperature_rows, *output)
    ctx.mark_non_differentiable(output[3])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    once_differentiable()
    none = (None,) * (2 + len(ctx.scalars))
    if not ctx.needs_input_grad[0] or all(g is None for g in grads):
        return (None, *none)
    logits, labels, inv_temperature_rows, *outputs = ctx.saved_tensors
    gradient = _token_logprobs_backward(logits, labels, inv_temperature_rows, *outputs, *grads[:3], *ctx.scalars)
    return (gradient, *none)


_token_logprobs.register_autograd(_backward, setup_context=_setup_context)
