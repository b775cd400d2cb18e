"""The steps of an inference engine between logits and softmax: it may round a row, and ban tokens from it.

An engine's "processed" log-probs are over the tokens that a grammar, top-k or top-p left, from logits in the precision
in which its head writes them. We apply the engine's steps to a scratch copy of the logits: round, scale, softcap, set
disallowed entries to -inf. The row kernels of every backend go on from there: -inf has probability 0 and gradient 0.

Legend: N tokens, V vocabulary, R rows of a tile, W = ceil(V / 32) words of a bitmask, K ids of a set.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice, memory
from fastrl.ops.rows import LogitRows, backward_rows, forward_rows, row_blocks
from fastrl.ops.segments import running_sum

ROUNDINGS = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Rows whose sets are expanded to V booleans at once.
SET_ROWS = 32
# Rows of logits in a scratch copy.
TILE_ROWS = 64


def check_rounding(logits_rounding: Any) -> str:
    """Return the rounding as a string, "" for none, or raise."""
    checks.one_of("logits_rounding", logits_rounding, (None, *ROUNDINGS))
    return logits_rounding or ""


def check_allowed(allowed: Any, labels: Tensor, vocabulary: int) -> Tensor | None:
    """Return the sets as (N, V) bool, (N, W) int32 or (N, K) int64, or raise."""
    if allowed is None:
        return None
    if not isinstance(allowed, Tensor):
        raise TypeError(f"allowed must be a torch.Tensor or None, got {type(allowed).__name__}")
    widths = {torch.bool: vocabulary, torch.int32: -(-vocabulary // 32), torch.int64: None}
    if allowed.dtype not in widths:
        raise TypeError(
            "allowed must be a bool mask (..., V), an int32 bitmask (..., ceil(V / 32)) or int64 ids (..., K), "
            f"got {allowed.dtype}"
        )
    width = widths[allowed.dtype]
    if allowed.dim() < 1 or allowed.shape[:-1] != labels.shape or width not in (None, allowed.shape[-1]):
        what = {torch.bool: "a bool mask", torch.int32: "an int32 bitmask", torch.int64: "int64 ids"}[allowed.dtype]
        wanted = (*labels.shape, "K" if width is None else width)
        raise ValueError(f"allowed is {what} and must be {wanted}, got {tuple(allowed.shape)}")
    checks.same_device("allowed", allowed, labels.device)
    if allowed.dtype == torch.int64 and checks.checks_values(allowed) and allowed.numel():
        low, high = int(allowed.min()), int(allowed.max())
        if low < -1 or high >= vocabulary:
            raise ValueError(f"allowed must hold ids in [0, V={vocabulary}), padded with -1, got {low} to {high}")
    return allowed.reshape(-1, allowed.shape[-1])


def check_labels_are_allowed(logprobs: Tensor) -> None:
    """Raise inside `checked()` if a label is outside its set. Elsewhere its log-prob of -inf shows it."""
    if checks.is_checked() and bool(logprobs.isneginf().any()):
        where = logprobs.isneginf().nonzero()[:4].tolist()
        raise ValueError(f"labels must be in their allowed sets: the log-prob is -inf at {where}")


def disallowed(allowed: Tensor, vocabulary: int) -> Tensor:
    """Return the complement of sets (R, ...) as (R, V) bool. Ids outside the vocabulary are padding."""
    if allowed.dtype == torch.bool:
        return ~allowed
    if allowed.dtype == torch.int32:
        bits = torch.arange(32, dtype=torch.int32, device=allowed.device)
        clear = ((allowed.unsqueeze(-1) >> bits) & 1) == 0
        return clear.view(allowed.shape[0], -1)[:, :vocabulary]
    result = torch.ones((allowed.shape[0], vocabulary + 1), dtype=torch.bool, device=allowed.device)
    outside = (allowed < 0) | (allowed >= vocabulary)
    return result.scatter_(1, torch.where(outside, vocabulary, allowed), False)[:, :vocabulary]


def apply_sampling(
    tile: Tensor,  # (R, V), overwritten
    allowed: Tensor | None,  # (N, ...)
    index: Tensor,  # (R,) the rows among all N
    rounding: str,
    logit_scale: float,
    softcap: float,
) -> None:
    """Round the logits of a tile. If sets are given, also cap them and set disallowed entries to -inf."""
    for start in range(0, tile.shape[0], SET_ROWS):
        rows = tile[start : start + SET_ROWS]
        if rounding:
            rows.copy_(rows.to(ROUNDINGS[rounding]))
        if allowed is None:
            continue
        if softcap > 0.0:
            rows.mul_(logit_scale / softcap).tanh_().mul_(softcap)
        # The kernels still multiply by the scale: under a negative one +inf is the smallest.
        nothing = math.inf if softcap == 0.0 and logit_scale < 0.0 else -math.inf
        rows.masked_fill_(disallowed(allowed[index[start : start + SET_ROWS]], tile.shape[1]), nothing)


def kernel_scalars(allowed: Tensor | None, logit_scale: float, softcap: float, ignore_index: int) -> dict[str, Any]:
    """Return the scalars of the row kernels for prepared rows. Capped rows are scaled already."""
    if allowed is not None and softcap > 0.0:
        logit_scale, softcap = 1.0, 0.0
    return {"logit_scale": logit_scale, "softcap": softcap, "ignore_index": ignore_index}


def prepared_backward_rows(
    backend: str,
    tile: Tensor,  # (R, V) prepared, overwritten
    labels: Tensor,  # (R,)
    inv_temperature: float | Tensor,  # scalar or (R,)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    allowed: Tensor | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
) -> Tensor:
    """Turn prepared rows into the gradient of the original logits, in place.

    The gradient passes straight through the rounding. A label outside its set gets no gradient.
    """
    scalars = kernel_scalars(allowed, logit_scale, softcap, ignore_index)
    if allowed is not None and grads[0] is not None:
        grads = (torch.where(outputs[0].isneginf(), 0.0, grads[0]), *grads[1:])
    if allowed is None or softcap == 0.0:
        return backward_rows(backend, tile, labels, inv_temperature, outputs, grads, **scalars, out=tile)
    for start in range(0, tile.shape[0], SET_ROWS):
        at = slice(start, start + SET_ROWS)
        rows = tile[at]
        # 1 - tanh^2, which is 0 for a disallowed entry.
        slope = (rows / softcap).square_().neg_().add_(1.0).clamp_(min=0.0).mul_(logit_scale)
        residual = outputs[3][at] if outputs[3].numel() else outputs[3]
        of_rows = (outputs[0][at], outputs[1][at], outputs[2][at], residual)
        first, second, third = (None if g is None else g[at] for g in grads)
        factor = inv_temperature[at] if isinstance(inv_temperature, Tensor) else inv_temperature
        backward_rows(backend, rows, labels[at], factor, of_rows, (first, second, third), **scalars, out=rows)
        # Selected: the slope at a NaN under the mask is NaN, and must not reach the zeros of that row.
        rows.mul_(slope.masked_fill_(rows == 0, 0.0))
    return tile


def restricted_forward(
    logits: Tensor,  # (..., V)
    rows: LogitRows,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp, residual), (N,) each, of rows that are rounded or restricted to sets."""
    dtype = checks.wide(logits.dtype)
    labels, inv_temperature = _flat(rows)
    parts = [torch.empty((4, 0), dtype=dtype, device=logits.device)]
    scalars = kernel_scalars(rows.allowed, rows.logit_scale, rows.softcap, rows.ignore_index)
    has_residual = choice.needs_lse_residual(rows.backend)
    for index, tile in _tiles(logits, dtype):
        apply_sampling(tile, rows.allowed, index, rows.rounding, rows.logit_scale, rows.softcap)
        found = forward_rows(rows.backend, tile, labels[index], inv_temperature[index], **scalars)
        parts.append(torch.stack(found if has_residual else (*found[:3], found[0])))
    first, second, third, fourth = torch.cat(parts, 1).unbind(0)
    return first.clone(), second.clone(), third.clone(), fourth.clone() if has_residual else fourth.new_empty(0)


def restricted_backward(
    logits: Tensor,  # (..., V)
    rows: LogitRows,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],  # (N,) each
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],  # (N,) each
    out: Tensor,  # (N, V), written
) -> None:
    """Write the gradient of the logits from the results of `restricted_forward` and their gradients."""
    labels, inv_temperature = _flat(rows)
    scalars = (rows.logit_scale, rows.softcap, rows.ignore_index)
    for index, tile in _tiles(logits, inv_temperature.dtype):
        apply_sampling(tile, rows.allowed, index, rows.rounding, rows.logit_scale, rows.softcap)
        logprobs, entropy, logsumexp, residual = (x[index] if x.numel() else x for x in outputs)
        g, h, ell = (None if grad is None else grad[index] for grad in grads)
        of_rows = (labels[index], inv_temperature[index], (logprobs, entropy, logsumexp, residual), (g, h, ell))
        out[index] = prepared_backward_rows(rows.backend, tile, *of_rows, rows.allowed, *scalars).to(out.dtype)


def _flat(rows: LogitRows) -> tuple[Tensor, Tensor]:
    """Return (labels, 1/T), (N,) each."""
    assert rows.inv_temperature_rows is not None
    return rows.labels.reshape(-1), rows.inv_temperature_rows.reshape(-1)


def _tiles(logits: Tensor, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (indices, copy in `dtype`) of consecutive rows. The next copy overwrites the last."""
    vocabulary = logits.shape[-1]
    n = logits.numel() // vocabulary
    room = memory.empty((min(n, TILE_ROWS), vocabulary), dtype, logits.device)
    for rows, index in row_blocks(logits, torch.arange(n, device=logits.device)) if n else ():
        for start in range(0, index.numel(), TILE_ROWS):
            part = index[start : start + TILE_ROWS]
            yield part, room[: part.numel()].copy_(rows[start : start + TILE_ROWS])


def top_k_top_p_allowed(
    logits: Tensor,  # (..., V)
    top_k: int | None = None,
    top_p: float | None = None,
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Return the tokens that top-k and then top-p sampling leave, a bool mask (..., V) for `allowed=`.

        kept by top-k:   z_v >= the k-th largest z
        kept by top-p:   z_v >= the largest t such that the probabilities of {v: z_v >= t} add up to at least p

    of z = logits / temperature and, for top-p, the softmax over the entries that top-k left. Equal entries are kept or
    left out together, so that the set does not depend on their order. Engines that sort break such ties somehow.

    Args:
        logits: (..., V) as the sampler sees them: scaled and capped. -inf entries are never kept.
        top_k: number of entries, at least 1. None keeps all.
        top_p: probability in (0, 1]. None, or 1, keeps all.
        temperature: a float, or a tensor broadcastable to the leading shape, > 0.

    Raises:
        ValueError, TypeError: numbers out of range, and tensors that cannot be used.
    """
    checks.float_tensor("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] < 1:
        raise ValueError(f"logits must be (..., V) with V >= 1, got {tuple(logits.shape)}")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"top_k must be an int >= 1 or None, got {top_k!r}")
    if top_p is not None:
        checks.plain_float("top_p", top_p, low=0.0, high=1.0, open_low=True)
    temperature = checks.temperature(temperature, logits.shape[:-1], logits.device)
    flat = logits.detach().reshape(-1, logits.shape[-1])
    dtype = checks.wide(logits.dtype)
    if isinstance(temperature, Tensor):
        temperatures = temperature.to(dtype).reshape(-1, 1)
    else:
        temperatures = torch.full((flat.shape[0], 1), temperature, dtype=dtype, device=logits.device)
    kept = torch.empty(flat.shape, dtype=torch.bool, device=logits.device)
    for start in range(0, flat.shape[0], SET_ROWS):
        rows = slice(start, start + SET_ROWS)
        kept[rows] = _kept(flat[rows].to(dtype) / temperatures[rows], top_k, top_p)
    return kept.view(logits.shape)


def _kept(z: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
    kept = z > -math.inf
    if top_k is not None and top_k < z.shape[-1]:
        kept &= z >= z.topk(top_k, -1).values[:, -1:]
    if top_p is not None and top_p < 1.0:
        falling = torch.where(kept, z, -math.inf).sort(-1, descending=True).values
        before = running_sum(falling.double().softmax(-1)).roll(1, -1)
        before[:, 0] = 0.0
        last = (before < top_p).sum(-1, keepdim=True) - 1
        kept &= z >= falling.gather(-1, last.clamp(min=0))
    return kept
