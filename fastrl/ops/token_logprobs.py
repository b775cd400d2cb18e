"""Per-token log-prob, entropy and logsumexp from logits: one read forward, one read and one write backward.

Legend: N tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice, memory
from fastrl.ops.rows import (
    LogitRows,
    TokenLogprobs,
    backward_rows,
    checked_rows,
    forward_rows,
    once_differentiable,
    row_blocks,
)
from fastrl.ops.sampling import (
    check_allowed,
    check_labels_are_allowed,
    check_rounding,
    restricted_backward,
    restricted_forward,
)


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
        logprobs = z_y - logsumexp(z)
        entropy  = -sum_v p_v log p_v, in nats

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, of any strides. -inf entries have probability 0.
        labels: (...) int64 or int32, already aligned with the logits: nothing is shifted here.
        temperature: a float or a tensor broadcastable to `labels`, finite and > 0. None means 1. The C++ rows are NaN
            in float32 where |logit_scale| / T (under a softcap softcap / T) is outside 1e-30 to 1e30.
        logit_scale: factor on the logits, before the softcap.
        softcap: bound c of c tanh(x / c), or None.
        ignore_index: label of rows to leave out. Their outputs and gradients are exactly 0 whatever the logits hold.
        backend: "auto", "torch", "cpu" (C++), "triton" or "cuda" (clusters of compute capability 9.0, not run on a
            device yet). A named backend is used or refused.
        allowed: the tokens that each row was sampled from, for log-probs that an engine reports over the tokens that
            top-k, top-p or a grammar left. A bool mask, a bitmask (bit i of word w is token 32 w + i, as grammar
            engines pack it) or ids padded with -1: the dtype says which. A label outside its set has log-prob -inf,
            without gradient, and raises inside `checked()`. A row without any allowed token is NaN.
            `fastrl.top_k_top_p_allowed` gives the mask of a sampler.
        logits_rounding: None, "bf16" or "fp16": round the logits first, as a head does that writes them in that
            precision. The gradient is straight through.

    Extra memory with either of the last two: a copy of 64 rows.

    Returns:
        `TokenLogprobs` of float32 tensors (float64 for float64 logits) of the shape of `labels`. The gradient is with
        respect to `logits`, through any of the three outputs, once (`create_graph=True` is refused). Autocast has no
        effect: the logits keep their dtype, and all arithmetic is in the dtype of the outputs.

    Raises:
        ValueError: shapes, devices, options, label values (on a CPU or inside `checked()`, elsewhere the row is NaN).
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
        rows = _restricted(rows, logits, temperature, allowed, logits_rounding)
    outputs = _token_logprobs(logits, *_arguments(rows))
    if rows.allowed is not None:
        check_labels_are_allowed(outputs[0])
    return TokenLogprobs(*outputs[:3])


def _restricted(rows: LogitRows, logits: Tensor, temperature: Any, allowed: Any, logits_rounding: Any) -> LogitRows:
    """Return the rows with checked sets and rounding, and with 1/T per row."""
    rounding = check_rounding(logits_rounding)
    sets = check_allowed(allowed, rows.labels, logits.shape[-1])
    dtype = checks.wide(logits.dtype)
    if rows.inv_temperature_rows is None:
        inv_temperature = torch.full(rows.labels.shape, rows.inv_temperature, dtype=dtype, device=logits.device)
    else:
        # Rounded before the reciprocal, as the chunks of `linear_token_logprobs` have it.
        value = checks.temperature(temperature, rows.labels.shape, logits.device)
        inv_temperature = torch.as_tensor(value).to(dtype).reciprocal()
    return replace(rows, inv_temperature_rows=inv_temperature, allowed=sets, rounding=rounding)


def _arguments(rows: LogitRows) -> tuple[Any, ...]:
    """Return the fields of the rows in the order of the custom op."""
    return (
        rows.labels,
        rows.inv_temperature_rows,
        rows.inv_temperature,
        rows.logit_scale,
        rows.softcap,
        rows.ignore_index,
        rows.backend,
        rows.allowed,
        rows.rounding,
    )


@torch.library.custom_op("fastrl::token_logprobs", mutates_args=())
def _token_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    inv_temperature_rows: Tensor | None,  # (...)
    inv_temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    backend: str,
    allowed: Tensor | None = None,  # (N, ...)
    rounding: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    scalars = (logit_scale, softcap, ignore_index, backend, allowed, rounding)
    rows = LogitRows(labels, inv_temperature, inv_temperature_rows, *scalars)
    with choice.autocast_disabled(logits.device):
        if allowed is not None or rounding:
            outputs = restricted_forward(logits, rows)
        else:
            outputs = _forward(logits, rows)
    logprobs, entropy, logsumexp = (x.view(labels.shape) for x in outputs[:3])
    return logprobs, entropy, logsumexp, outputs[3]


def _forward(logits: Tensor, rows: LogitRows) -> tuple[Tensor, ...]:
    """Return (logprobs, entropy, logsumexp, residual), (N,) each, block by block."""
    blocks = row_blocks(logits, rows.labels, rows.inv_temperature_rows)
    parts = [
        forward_rows(rows.backend, x, labels, rows.inv_temperature if own is None else own, **rows.scalars())
        for x, labels, own in blocks
    ]
    return parts[0] if len(parts) == 1 else tuple(torch.cat(column) for column in zip(*parts, strict=True))


@_token_logprobs.register_fake
def _(logits: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend = options[5]
    dtype = checks.wide(logits.dtype)
    first, second, third = (torch.empty(labels.shape, dtype=dtype, device=logits.device) for _ in range(3))
    return first, second, third, first.new_empty(labels.numel() if choice.needs_lse_residual(backend) else 0)


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
    allowed: Tensor | None = None,
    rounding: str = "",
) -> Tensor:
    scalars = (logit_scale, softcap, ignore_index, backend, allowed, rounding)
    rows = LogitRows(labels, inv_temperature, inv_temperature_rows, *scalars)
    gradient = memory.empty(logits.shape, logits.dtype, logits.device)
    # The output is viewed like the input: both split along the first dimension, or neither does.
    out = gradient.view(-1, logits.shape[-1])
    columns = (logprobs, entropy, logsumexp, residual, grad_logprobs, grad_entropy, grad_logsumexp)
    with choice.autocast_disabled(logits.device):
        if allowed is not None or rounding:
            first, second, third, fourth, g, h, ell = (None if x is None else x.reshape(-1) for x in columns)
            assert first is not None
            assert second is not None
            assert third is not None
            assert fourth is not None
            restricted_backward(logits, rows, (first, second, third, fourth), (g, h, ell), out)
        else:
            _backward_into(out, logits, rows, columns)
    return gradient


def _backward_into(out: Tensor, logits: Tensor, rows: LogitRows, columns: tuple[Tensor | None, ...]) -> None:
    """Write the gradient of the logits to `out` (N, V), block by block, from the outputs and their gradients."""
    *outputs, residual, g, h, ell = columns
    kept = residual if choice.needs_lse_residual(rows.backend) else None
    written = 0
    for x, labels, own, *rest in row_blocks(logits, rows.labels, rows.inv_temperature_rows, *outputs, kept, g, h, ell):
        backward_rows(
            rows.backend,
            x,
            labels,
            rows.inv_temperature if own is None else own,
            (rest[0], rest[1], rest[2], rest[3]),
            (rest[4], rest[5], rest[6]),
            **rows.scalars(),
            out=out[written : written + x.shape[0]],
        )
        written += x.shape[0]


@_token_logprobs_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, inv_temperature_rows, *ctx.scalars, allowed, ctx.rounding = inputs
    ctx.save_for_backward(logits, labels, inv_temperature_rows, allowed, *output)
    ctx.mark_non_differentiable(output[3])
    # None in place of zeros: the kernels skip the terms of an output without a gradient.
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    once_differentiable()
    none = (None,) * (4 + len(ctx.scalars))
    if not ctx.needs_input_grad[0] or all(g is None for g in grads):
        return (None, *none)
    logits, labels, inv_temperature_rows, allowed, *outputs = ctx.saved_tensors
    scalars = (*ctx.scalars, allowed, ctx.rounding)
    gradient = _token_logprobs_backward(logits, labels, inv_temperature_rows, *outputs, *grads[:3], *scalars)
    return (gradient, *none)


_token_logprobs.register_autograd(_backward, setup_context=_setup_context)
