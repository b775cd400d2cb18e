"""Sparse rows of the logits' gradient in plain PyTorch, for any device and float dtype: the slow, plain way.

Legend: N rows, V vocabulary, K places of a row, R rows of a tile, E listed entries, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastrl.ops.rows_torch import TILE_ROWS, token_logprobs_bwd

# Rows and entries that are gathered at once: what is held beside a chunk is this many times K D or D numbers.
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

    The label's entry comes first, the others in falling order of size. Arguments as for the other backends; the whole
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
    # left_after[:, j] is what is left out when the j largest are kept beside the label.
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
    # A label outside the vocabulary, whose row is NaN, is no row without a gradient.
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
        # What stands at unlisted places is multiplied by 0, so it must be finite.
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
