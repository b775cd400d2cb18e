"""The row kernels of the vocabulary operation in plain PyTorch, for any device and float dtype.

Rows go in tiles of a fixed number, the last one padded, so that PyTorch's reductions see one shape and a row's result
does not depend on the rows around it. Nothing of the size of the input is made but the gradient.

Legend: N tokens, V vocabulary, R rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastrl import checks

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


def _inverse_temperature(value: float | Tensor, rows: slice, dtype: torch.dtype) -> float | Tensor:
    if not isinstance(value, Tensor):
        return value
    inverse = value[rows].to(dtype)
    return torch.where((inverse > 0) & inverse.isfinite(), inverse, torch.nan).unsqueeze(-1)


def _softmax_tile(
    logits: Tensor, index: Tensor, inverse: float | Tensor, logit_scale: float, softcap: float, derivative: bool
) -> _Tile:
    x = logits.to(checks.wide(logits.dtype)) * logit_scale
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
    """Return log sum e, from the others alone if the target is the maximum, which keeps small values."""
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
    """Return (logprobs, entropy, logsumexp), each (N,): float32, or float64 for float64 logits. 0 if ignored."""
    n, vocabulary = logits.shape
    dtype = checks.wide(logits.dtype)
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
        # log p = -log1p(others / target) keeps its relative precision as p -> 1. The difference is better below 1/2.
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
    dtype = checks.wide(logits.dtype)
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


# Rows and entries that are gathered at once: this many times K D or D numbers are held beside a chunk.
GATHER_ROWS = 8


GATHER_ENTRIES = 8192


Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


Columns = tuple[Tensor, Tensor, Tensor, Tensor]


def list_entries(
    logits: Tensor,  # (N, V)
    labels: Tensor,  # (N,)
    inv_temperature: Tensor,  # (N,)
    outputs: Columns,  # (N,) each
    grads: Grads,  # (N,) each
    *,
    tail_mass: float,
    places: int,
    threshold: float,
    candidates: int,
    min_entries: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> Columns:
    """Return (counts (N,), indices (N, K), values (N, K), left (N,)) of the entries that matter: `sparse_rows.Lists`.

    The label's entry comes first, the others in falling order of size. Arguments as for the other backends. The whole
    row is searched for the largest entries, so `candidates` has no part.
    """
    del candidates
    scalars = {"logit_scale": logit_scale, "softcap": softcap, "ignore_index": ignore_index}
    parts = []
    for start in range(0, max(1, logits.shape[0]), TILE_ROWS):
        rows = slice(start, start + TILE_ROWS)
        upstream = tuple(None if g is None else g[rows] for g in grads)
        statistics = (x[rows] for x in outputs[:3])
        gradient = token_logprobs_bwd(
            logits[rows], labels[rows], inv_temperature[rows], *statistics, *upstream, **scalars
        )
        live = labels[rows] != ignore_index
        scale = torch.where(live, _scale(inv_temperature[rows], upstream, logit_scale), 0.0)
        parts.append(_list_tile(gradient, labels[rows], scale, tail_mass, places, threshold, min_entries))
    counts, indices, values, left = (torch.cat(column) for column in zip(*parts, strict=True))
    return counts, indices, values, left


def _scale(inverse: Tensor, grads: tuple[Tensor | None, ...], logit_scale: float) -> Tensor:
    """Return (|g| + |h| + |l|) |logit_scale| / T, (R,) float64."""
    total = torch.zeros(inverse.shape, dtype=torch.float64, device=inverse.device)
    for grad in grads:
        if grad is not None:
            total = total + grad.detach().double().abs()
    return total * abs(logit_scale) * inverse.double()


def _list_tile(
    gradient: Tensor,  # (R, V)
    labels: Tensor,  # (R,)
    scale: Tensor,  # (R,) float64
    tail_mass: float,
    places: int,
    threshold: float,
    min_entries: int,
) -> Columns:
    limit = tail_mass * scale.unsqueeze(-1)
    label = torch.where((labels >= 0) & (labels < gradient.shape[1]), labels, 0).long().unsqueeze(-1)
    others = gradient.abs().scatter_(-1, label, 0.0)
    top, index = others.topk(places - 1, dim=-1)
    rest = others.scatter_(-1, index, 0.0).sum(-1, keepdim=True, dtype=torch.float64)
    # left_after[:, j] is the sum left out when the j largest are kept beside the label.
    smaller = top.double().flip(-1).cumsum(-1).flip(-1)
    left_after = torch.cat((smaller, torch.zeros_like(rest)), -1) + rest
    needed = (left_after > limit).sum(-1, keepdim=True)
    above = (top > (threshold * limit).to(top.dtype)).sum(-1, keepdim=True)
    kept = torch.maximum(needed.clamp(max=places - 1), above.clamp(max=min_entries))
    left = left_after.gather(-1, kept)
    chosen = torch.arange(places, device=gradient.device) <= kept
    entries = torch.cat((gradient.gather(-1, label), gradient.gather(-1, index)), -1)
    # A comparison with NaN is false, which makes the row dense.
    sparse = (left <= limit) & entries.isfinite().all(-1, keepdim=True) & limit.isfinite()
    # A label outside the vocabulary, whose row is NaN, has a gradient: the row is dense.
    nothing = (scale == 0) & ~entries[:, 0].isnan()
    counts = torch.where(nothing, 0, torch.where(sparse.squeeze(-1), kept.squeeze(-1) + 1, -1))
    indices = torch.where(chosen, torch.cat((label, index), -1), 0)
    left = torch.where(counts > 0, left.squeeze(-1) / scale, 0.0)
    return counts.int(), indices.int(), torch.where(chosen, entries, 0.0), left


def times_matrix(
    counts: Tensor,  # (N,) int32
    indices: Tensor,  # (N, K) int32
    values: Tensor,  # (N, K)
    matrix: Tensor,  # (V, D)
) -> Tensor:  # (N, D)
    """Return the sums of value * matrix[index] over the entries of each row, 0 where a count is 0 or -1."""
    out = torch.zeros((counts.shape[0], matrix.shape[1]), dtype=values.dtype, device=matrix.device)
    for start in range(0, counts.shape[0], GATHER_ROWS):
        block = slice(start, start + GATHER_ROWS)
        width = int(counts[block].max())
        if width <= 0:
            continue
        listed = torch.arange(width, device=matrix.device) < counts[block].unsqueeze(-1)
        index = torch.where(listed, indices[block, :width], 0).long()
        factors = torch.where(listed, values[block, :width], 0.0)
        # Values at unlisted places are multiplied by 0, so they must be finite.
        entries = torch.where(listed.unsqueeze(-1), matrix[index].to(out.dtype), 0.0)
        out[block] = torch.bmm(factors.unsqueeze(1), entries).squeeze(1)
    return out


def accumulate(
    counts: Tensor,  # (N,) int32
    indices: Tensor,  # (N, K) int32
    values: Tensor,  # (N, K)
    states: Tensor,  # (N, D)
    total: Tensor | None,  # (V, D), added to
    sums: Tensor | None,  # (V,), added to
) -> None:
    """Add value * states[row] to total[index] and value to sums[index] per entry, in row order within an index."""
    for index, factors, row in _segments(counts, indices, values):
        unique, lengths = torch.unique_consecutive(index, return_counts=True)
        # Each index once: no two additions meet, so the result does not depend on their order.
        if total is not None:
            products = factors.unsqueeze(-1) * states[row].to(factors.dtype)
            total[unique] += torch.segment_reduce(products, "sum", lengths=lengths, axis=0)
        if sums is not None:
            sums[unique] += torch.segment_reduce(factors, "sum", lengths=lengths, axis=0)


def _segments(counts: Tensor, indices: Tensor, values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (index, value, row), (E,) each, of the listed entries, sorted by index, rows in order within an index."""
    places = torch.arange(indices.shape[1], device=counts.device)
    at = (places < counts.unsqueeze(-1)).flatten().nonzero().squeeze(-1)
    index, order = indices.flatten()[at].long().sort(stable=True)
    at = at[order]
    factors, row = values.flatten()[at], at // indices.shape[1]
    for start in range(0, at.numel(), GATHER_ENTRIES):
        block = slice(start, start + GATHER_ENTRIES)
        yield index[block], factors[block], row[block]
