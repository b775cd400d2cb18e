"""The row kernels of the vocabulary operation in plain PyTorch, for any device and float dtype.

Rows go in tiles of a fixed number, the last one padded, so that PyTorch's reductions see one shape and a row's result
does not depend on the rows around it. Nothing of the size of the input is made but the gradient.

Legend: N tokens, V vocabulary, R rows of a tile.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TILE_ROWS = 32


class _Tile(NamedTuple):
    """The softmax of a tile: shifted scaled logits d, e = exp(d), and their sums."""

    d: Tensor  # (R, V)
    e: Tensor  # (R, V)
    chain: Tensor | None  # (R, V) d z / d logits before 1/T, or None for the constant logit_scale
    e_target: Tensor  # (R, 1)
    d_target: Tensor  # (R, 1)
    others: Tensor  # (R, 1) sum of e without the target
    maximum: Tensor  # (R, 1)


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _inverse_temperature(value: float | Tensor, rows: slice, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(value, Tensor):
        return value
    inverse = value[rows].to(dtype)
    return torch.where((inverse > 0) & inverse.isfinite(), inverse, torch.nan).unsqueeze(-1)


def _softmax_tile(
    logits: Tensor, index: Tensor, inverse: float | Tensor, logit_scale: float, softcap: float, derivative: bool
) -> _Tile:
    x = logits.to(_compute_dtype(logits.dtype)) * logit_scale
    chain = None
    if softcap > 0.0:
        squashed = torch.tanh(x / softcap)
        x = softcap * squashed
        if derivative:
            chain = (1.0 - squashed.square()) * logit_scale
    maximum = x.amax(-1, keepdim=True)
    # The shift comes before 1/T: a common offset of 1e6 leaves exactly as it came.
    d = (x - maximum) * inverse
    e = d.exp()
    e_target, d_target = e.gather(-1, index), d.gather(-1, index)
    others = e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    return _Tile(d, e, chain, e_target, d_target, others, maximum)


def _log_sum(tile: _Tile) -> Tensor:
    """Return log sum e; from the others alone where the target is the maximum, which keeps small values."""
    return torch.where(tile.e_target == 1.0, torch.log1p(tile.others), torch.log(tile.others + tile.e_target))


def _padded(x: Tensor, rows: slice) -> Tensor:
    """Return rows of `x`, padded to a whole tile by repeating its last row."""
    part = x[rows]
    missing = TILE_ROWS - part.shape[0]
    return part if missing == 0 else torch.cat((part, part[-1:].expand(missing, *part.shape[1:])))


def _valid(labels: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    live = labels != ignore_index
    bad = live & ((labels < 0) | (labels >= vocabulary))
    return live, bad, torch.where(live & ~bad, labels, 0).long().unsqueeze(-1)


def token_logprobs_fwd(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    inv_temperature: float | Tensor,  # scalar or (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), each (N,): float32, or float64 for float64 logits; 0 where ignored."""
    n, vocabulary = logits.shape
    dtype = _compute_dtype(logits.dtype)
    outputs = tuple(torch.empty(n, dtype=dtype, device=logits.device) for _ in range(3))
    for start in range(0, n, TILE_ROWS):
        rows = slice(start, min(start + TILE_ROWS, n))
        count = rows.stop - rows.start
        live, bad, index = _valid(_padded(labels, rows), vocabulary, ignore_index)
        inverse = _inverse_temperature(inv_temperature, rows, dtype)
        if isinstance(inverse, Tensor):
            inverse = _padded(inverse, slice(0, count))
        tile = _softmax_tile(_padded(logits, rows), index, inverse, logit_scale, softcap, derivative=False)
        log_sum = _log_sum(tile)
        # log p = -log1p(others / target) keeps its relative precision as p -> 1; the difference is better below 1/2.
        near_one = -torch.log1p(tile.others / tile.e_target)
        logprobs = torch.where(tile.e_target > tile.others, near_one, tile.d_target - log_sum)
        weighted = (tile.e * torch.where(tile.d.isneginf(), 0.0, tile.d)).sum(-1, keepdim=True)
        entropy = log_sum - weighted / (tile.others + tile.e_target)
        logsumexp = tile.maximum * inverse + log_sum
        for out, value in zip(outputs, (logprobs, entropy, logsumexp), strict=True):
            value = torch.where(bad, torch.nan, value.squeeze(-1))
            out[rows] = torch.where(live, value, 0.0)[:count]
    return outputs[0], outputs[1], outputs[2]


def token_logprobs_bwd(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    inv_temperature: float | Tensor,
    logprobs: Tensor,  # (N,)
    entropy: Tensor,  # (N,)
    logsumexp: Tensor,  # (N,)
    grad_logprobs: Tensor | None,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    grad_logsumexp: Tensor | None,  # (N,)
    *,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
    out: Tensor | None = None,
) -> Tensor:
    """Return d/dlogits (N, V) = [g (onehot - p) - h p (log p + H) + l p] dz/dlogits, written to `out` if given."""
    n, vocabulary = logits.shape
    dtype = _compute_dtype(logits.dtype)
    if out is None:
        out = torch.empty((n, vocabulary), dtype=logits.dtype, device=logits.device)
    for start in range(0, n, TILE_ROWS):
        rows = slice(start, min(start + TILE_ROWS, n))
        live, bad, index = _valid(labels[rows], vocabulary, ignore_index)
        inverse = _inverse_temperature(inv_temperature, rows, dtype)
        tile = _softmax_tile(logits[rows], index, inverse, logit_scale, softcap, derivative=True)
        p = tile.e / (tile.others + tile.e_target)
        dz = torch.zeros_like(p)
        if grad_logsumexp is not None:
            dz += grad_logsumexp[rows].to(dtype).unsqueeze(-1) * p
        if grad_entropy is not None:
            log_p = tile.d - _log_sum(tile)
            term = p * (torch.where(p == 0, 0.0, log_p) + entropy[rows].to(dtype).unsqueeze(-1))
            dz -= grad_entropy[rows].to(dtype).unsqueeze(-1) * term
        if grad_logprobs is not None:
            g = grad_logprobs[rows].to(dtype).unsqueeze(-1)
            one_minus_p = -torch.expm1(logprobs[rows].to(dtype)).unsqueeze(-1)
            target = dz.gather(-1, index) + g * one_minus_p
            dz -= g * p
            dz = torch.where(tile.d.isneginf(), 0.0, dz)
            # A label whose own logit is -inf keeps its gradient g, as log_softmax has it.
            dz.scatter_(-1, index, target)
        dz = dz * (logit_scale if tile.chain is None else tile.chain) * inverse
        # Selected, not multiplied: NaN logits under a zero gradient do not matter.
        given = torch.stack([g[rows] != 0 for g in (grad_logprobs, grad_entropy, grad_logsumexp) if g is not None])
        dz = torch.where(given.any(0).unsqueeze(-1), dz, 0.0)
        dz = torch.where(bad.unsqueeze(-1), torch.nan, dz)
        out[rows] = torch.where(live.unsqueeze(-1), dz, 0.0).to(out.dtype)
    return out
