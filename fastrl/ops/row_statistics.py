"""Statistics of a row of logits for metrics and weights: argmax, whether the label hits it, log sum p^2, mean logit.

One read of the logits. No statistic has a gradient: a backward pass that reaches `log_sum_squared_probs` or
`mean_logits` raises instead of adding zeros. `round_logits` is here too. Its gradient is straight through.

Legend: N tokens, D hidden, V vocabulary, R rows of a tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice
from fastrl.ops.chunks import Chunks
from fastrl.ops.head import LinearRows
from fastrl.ops.rows import head_scalars, row_blocks

# Rows of a tile of the PyTorch rows: one shape for every reduction, so that a row's bits do not depend on its batch.
TILE_ROWS = 32


class RowStatistics(NamedTuple):
    """Statistics of rows of logits z, each of the shape of the labels, none differentiable."""

    is_top1: Tensor
    """bool: no entry is larger than the label's. False if ignored. `argmax == labels` also breaks ties."""
    log_sum_squared_probs: Tensor
    """log sum_v p_v^2, in nats. 0 if ignored."""
    argmax: Tensor
    """int64: the largest entry, the lowest id among equals. -1 if ignored or if the row is NaN."""
    mean_logits: Tensor
    """Mean of z over the vocabulary. 0 if ignored."""


def row_statistics(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    temperature: float | Tensor | None = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> RowStatistics:
    """Return argmax, whether the label hits it, log sum p^2 and the mean logit of every row, in one read.

        z = softcap tanh(logit_scale logits / softcap) / temperature
        p = softmax(z)

    Args:
        logits: (..., V) float32, bfloat16, float16 or float64, of any strides. -inf entries have probability 0.
        labels: (...) int64 or int32, already aligned with the logits: nothing is shifted here.
        temperature: a float or a tensor broadcastable to `labels`, finite and > 0. None means 1.
        logit_scale: factor on the logits, before the softcap.
        softcap: bound c of c tanh(x / c), or None.
        ignore_index: label of rows to leave out, whatever their logits hold.
        backend: "auto", "torch" or "triton". A named backend is used or refused.

    Returns:
        `RowStatistics`, its floats in float32 (float64 for float64 logits). The largest entry is found among the
        logits as given, times the sign of `logit_scale`: scale, softcap and temperature keep their order, but the
        rounding of these steps need not. A row that holds NaN, or whose sum of exponentials is not positive and
        finite, is NaN in the floats, -1 in `argmax` and False in `is_top1`. No gradient: a backward pass that reaches
        a float output raises RuntimeError. Detach it, or pass detached logits, as `torch.compile` needs.

    Raises:
        ValueError: shapes, devices, options, label values (on a CPU or inside `checked()`, elsewhere the row is NaN).
        TypeError: dtypes and tensor kinds that cannot be used.
        RuntimeError: a named backend that cannot run here, with the reason.
    """
    checks.vocabulary_tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    labels = checks.labels("labels", labels, logits.shape[:-1], logits.device, logits.shape[-1], ignore_index)
    scale, cap = head_scalars(logit_scale, softcap)
    temperature = checks.temperature(temperature, labels.shape, logits.device)
    chosen = choice.choose_row_statistics(backend, logits.device).backend
    wide = checks.wide(logits.dtype)
    inv_temperature_rows = temperature.to(wide).reciprocal() if isinstance(temperature, Tensor) else None
    inv_temperature = 1.0 if isinstance(temperature, Tensor) else 1.0 / temperature
    return RowStatistics(
        *_row_statistics(logits, labels, inv_temperature_rows, inv_temperature, scale, cap, ignore_index, chosen)
    )


def linear_row_statistics(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor | None = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> RowStatistics:
    """Return `row_statistics` of `hidden @ weight.T + bias` without forming all logits.

    Args:
        hidden: (..., D) hidden states, float32, bfloat16, float16 or float64.
        weight: (V, D) LM head. `hidden` and `weight` are promoted to the wider dtype, as PyTorch promotes.
        labels: (...) int64 or int32, aligned with the hidden states: nothing is shifted here.
        bias: (V,) or None. An entry of -inf bans a token.
        temperature, logit_scale, softcap, ignore_index, backend: as `row_statistics`.
        chunk_tokens: rows of a chunk. Default: 256 on a CPU, 2048 elsewhere.

    Returns:
        `RowStatistics`, without gradient as there. One GEMM of the live rows, in chunks of a fixed number of
        rows. Extra memory: one chunk of float32 logits (float64 for float64 inputs).

    Raises:
        ValueError, TypeError, RuntimeError: as `row_statistics`, and for heads that hold no values or are sharded.
    """
    rows = LinearRows.checked(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        backend="torch",
    )
    chosen = choice.choose_row_statistics(backend, rows.hidden.device).backend
    rows = replace(rows, options=replace(rows.options, backend=chosen))
    with torch.no_grad(), choice.autocast_disabled(rows.hidden.device):
        results = _linear_rows(Chunks.of(rows))
    sources = [x for x in (rows.hidden, rows.weight, rows.bias) if x is not None and x.requires_grad]
    top1, log_sum_squared, argmax, mean = (rows.restored(x) for x in results)
    if sources and torch.is_grad_enabled():
        log_sum_squared, mean = _NoGradient.apply(log_sum_squared, mean, *sources)
    return RowStatistics(top1, log_sum_squared, argmax, mean)


def _linear_rows(chunks: Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics of all rows (N,), their logits formed chunk by chunk."""
    rows = chunks.rows
    results = _ignored_rows(rows.labels.numel(), chunks.dtype, rows.hidden.device)
    for part, _, logits in chunks:
        index = chunks.live[part]
        labels, inv_temperature = rows.labels[index], rows.inv_temperature[index]
        values = _forward_rows(rows.options.backend, logits, labels, inv_temperature, **chunks.scalars())
        for result, value in zip(results, values, strict=True):
            result[index] = value
    return results


def _ignored_rows(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics of n ignored rows."""
    return (
        torch.zeros(n, dtype=torch.bool, device=device),
        torch.zeros(n, dtype=dtype, device=device),
        torch.full((n,), -1, dtype=torch.int64, device=device),
        torch.zeros(n, dtype=dtype, device=device),
    )


def _forward_rows(
    backend: str, logits: Tensor, labels: Tensor, inv_temperature: float | Tensor, **scalars: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics of rows, (N,) each, from a chosen backend."""
    if backend == "triton":
        from fastrl_kernels.row_statistics import row_statistics_fwd

        return row_statistics_fwd(logits, labels, inv_temperature, **scalars)
    return row_statistics_rows(logits, labels, inv_temperature, **scalars)


def row_statistics_rows(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    inv_temperature: float | Tensor,  # scalar or (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (is_top1, log_sum_squared_probs, argmax, mean_logits), each (N,), in plain PyTorch."""
    n, vocabulary = logits.shape
    results = _ignored_rows(n, checks.wide(logits.dtype), logits.device)
    for start in range(0, n, TILE_ROWS):
        rows = slice(start, min(start + TILE_ROWS, n))
        count = rows.stop - rows.start
        # A whole tile whatever is left: its last row is repeated.
        index = torch.arange(start, start + TILE_ROWS, device=logits.device).clamp_(max=n - 1)
        tile_labels = labels[index]
        inverse = inv_temperature[index] if isinstance(inv_temperature, Tensor) else inv_temperature
        live = tile_labels != ignore_index
        in_vocabulary = (tile_labels >= 0) & (tile_labels < vocabulary)
        target = torch.where(in_vocabulary, tile_labels, 0).long().unsqueeze(-1)
        values = _tile_statistics(logits[index], target, inverse, logit_scale, softcap)
        invalid = live & (~in_vocabulary | values[1].isnan())
        marks = (False, torch.nan, -1, torch.nan)
        for result, value, mark in zip(results, values, marks, strict=True):
            ignored = result[rows]
            value = torch.where(invalid, mark, value)[:count]
            result[rows] = torch.where(live[:count], value, ignored)
    return results


def _tile_statistics(
    logits: Tensor,  # (R, V)
    target: Tensor,  # (R, 1)
    inv_temperature: float | Tensor,  # scalar or (R,)
    logit_scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics of a tile, (R,) each, NaN in the floats where a row is no distribution."""
    x = logits.to(checks.wide(logits.dtype))
    ordered = x if logit_scale > 0 else -x
    # PyTorch gives the first of equal entries, and NaN where there is one.
    largest, argmax = ordered.max(-1, keepdim=True)
    is_top1 = ordered.gather(-1, target) >= largest
    x = x * logit_scale
    if softcap > 0.0:
        x = softcap * torch.tanh(x / softcap)
    if isinstance(inv_temperature, Tensor):
        inverse = inv_temperature.to(x.dtype).unsqueeze(-1)
    else:
        inverse = torch.full((1, 1), inv_temperature, dtype=x.dtype, device=x.device)
    inverse = torch.where((inverse > 0) & inverse.isfinite(), inverse, torch.nan)
    maximum = x.gather(-1, argmax)
    valid = maximum.isfinite() & inverse.isfinite()

    mean = x.mean(-1, keepdim=True) * inverse
    # The largest entry is 1 and stays out of both sums: log sum p^2 keeps its relative precision as p -> 1.
    e = ((x - maximum) * inverse).exp().scatter(-1, argmax, 0.0)
    log_sum_squared = torch.log1p(e.square().sum(-1, keepdim=True)) - 2.0 * torch.log1p(e.sum(-1, keepdim=True))
    log_sum_squared = torch.where(valid, log_sum_squared, torch.nan)
    return tuple(column.squeeze(-1) for column in (is_top1, log_sum_squared, argmax, mean))  # type: ignore[return-value]


@torch.library.custom_op("fastrl::row_statistics", mutates_args=())
def _row_statistics(
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
            _forward_rows(
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
    first, second, third, fourth = (x.view(labels.shape) for x in outputs)
    return first, second, third, fourth


@_row_statistics.register_fake
def _(logits: Tensor, labels: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(dtype: torch.dtype) -> Tensor:
        return torch.empty(labels.shape, dtype=dtype, device=logits.device)

    dtype = checks.wide(logits.dtype)
    return like(torch.bool), like(dtype), like(torch.int64), like(dtype)


def _refuse(ctx: Any, *grads: Tensor | None) -> Any:
    raise RuntimeError(
        "row statistics (log_sum_squared_probs, mean_logits) are not differentiable: "
        "detach() them, or compute them from detached inputs"
    )


_row_statistics.register_autograd(_refuse)


class _NoGradient(torch.autograd.Function):
    """Tie statistics to the tensors that they came from, so that a backward pass through them raises."""

    @staticmethod
    def forward(ctx: Any, log_sum_squared: Tensor, mean: Tensor, *sources: Tensor) -> tuple[Tensor, Tensor]:
        return log_sum_squared.view_as(log_sum_squared), mean.view_as(mean)

    backward = staticmethod(_refuse)


class _RoundToBfloat16(torch.autograd.Function):
    """Rounding to bfloat16 whose gradient is the identity, unrounded."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.to(torch.bfloat16).to(logits.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def round_logits(
    logits: Tensor,  # any shape
    rounding: str,
) -> Tensor:
    """Return logits rounded as an inference engine that stores them in bfloat16 rounds them, in their own dtype.

    An engine whose head writes bfloat16 logits samples from the rounded logits. Its log-probs differ from log-probs of
    float32 logits by up to 2^-8 of a logit, 0.06 at a logit of 16. Equal rounding takes that difference out of the
    importance ratio. Pass the result to `token_logprobs`. The temperature comes after the rounding.

    Args:
        logits: float32, bfloat16, float16 or float64, of any shape, as the head writes them.
        rounding: "none" returns `logits` themselves. "bf16" rounds to nearest, ties to even.

    Returns:
        A tensor of the shape and dtype of `logits`. The gradient passes straight through, unrounded. Rounding
        makes a copy of the logits.

    Raises:
        ValueError: another `rounding`.
        TypeError: dtypes and tensor kinds that cannot be used.
    """
    checks.float_tensor("logits", logits)
    checks.one_of("rounding", rounding, ("none", "bf16"))
    return logits if rounding == "none" else _RoundToBfloat16.apply(logits)
