"""Sparse rows of the logits' gradient: which entries matter, and the products of the head and the states with them.

A row's list holds the label's entry and the entries of largest |gradient|. The sum of the other entries' |gradient| is
at most `tail_mass` times the row's scale, or the row is dense. Three kernels:

- Listing: one program per row reads the row once, lists the entries above a threshold and sums the rest. Then it drops
  the smallest entries of its list.
- Product with the head: one program per row and tile of D gathers rows of the head.
- Product with the states: programs walk the listed vocabulary indices and add up the states of one index at a time.
  One program owns an index and adds its entries in row order: no atomics.

Legend: N tokens (rows), V vocabulary entries, M candidates of a row, K places of a row, E = N K places, D hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastrl_kernels.launch import (
    Tile,
    TileTable,
    launch_options,
    matrix_arguments,
    on_device_of,
    row_arguments,
    slope_and_factor,
    tile_for,
    upstream_arguments,
)
from fastrl_kernels.rowmath import LOG2E, row_factor, row_frame
from fastrl_kernels.token_logprobs import grad_block, row_gradient, upstream

# Bytes per entry -> (largest length, tile). 16-byte loads and no spills on any target: with 8 entries per thread, or
# with 8 warps, there were some. Not yet tuned on a device.
LIST_TILES: TileTable = {4: ((2**31, Tile(512, 4)),), 8: ((2**31, Tile(256, 4)),)}
PRODUCT_TILES: TileTable = {
    2: ((2**31, Tile(256, 4)),),
    4: ((2**31, Tile(256, 4)),),
    8: ((2**31, Tile(128, 4)),),
}
# Entries that a program gathers at once: their loads are in flight together.
GATHER = 8
# Programs per tile of D that share the listed indices.
WALKERS = 1024

_LIST_RUNTIME = [
    "stride_labels",
    "stride_inv_temperature",
    "stride_grad_logprobs",
    "stride_grad_entropy",
    "stride_grad_logsumexp",
    "V",
    "K",
    "min_entries",
    "ignore_index",
]
_LIST_UNALIGNED = [
    "labels_ptr",
    "inv_temperature_ptr",
    "logprobs_ptr",
    "entropy_ptr",
    "logsumexp_ptr",
    "residual_ptr",
    "grad_logprobs_ptr",
    "grad_entropy_ptr",
    "grad_logsumexp_ptr",
]


@triton.jit
def _magnitude(size):
    """Return integers of the order of non-negative numbers: exponent and 7 bits of the significand, steps below 1 %."""
    if size.dtype == tl.float64:
        return (size.to(tl.int64, bitcast=True) >> 45).to(tl.int32)
    else:
        return size.to(tl.int32, bitcast=True) >> 16


@triton.jit
def _largest_cut(magnitudes, sizes, listed, rest, limit, min_entries):
    """Return the largest cut: entries of this magnitude and below may all be dropped. Unlisted entries count as 0.

    Dropping leaves out at most `limit`, `rest` included, and keeps `min_entries`. A bisection finds the cut: it takes a
    dozen sums and no sort.
    """
    low = tl.min(tl.where(listed, magnitudes, 2**30), 0) - 1
    high = tl.max(tl.where(listed, magnitudes, 0), 0)
    while high - low > 1:
        middle = (low + high) // 2
        dropped = listed & (magnitudes <= middle)
        left = rest + tl.sum(tl.where(dropped, sizes, 0.0).to(tl.float64), 0)
        kept = tl.sum((listed & (magnitudes > middle)).to(tl.int32), 0)
        if (left <= limit) & (kept >= min_entries):
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _list_block(
    dx,
    other,
    index,
    threshold,
    rest,
    count,
    found_indices_ptr,
    found_values_ptr,
    BLOCK_M: tl.constexpr,
):
    """List a block's entries above the threshold. Return the sums of the others, lane by lane, and the count."""
    size = tl.abs(dx)
    above = other & (size > threshold)
    # NaN is not above and stays in the sum, which makes the row dense.
    rest += tl.where(other & (above == 0), size, 0.0)
    found = tl.sum(above.to(tl.int32), 0)
    if found > 0:
        place = count + tl.cumsum(above.to(tl.int32), 0) - 1
        fits = above & (place < BLOCK_M)
        tl.store(found_indices_ptr + place.to(tl.int64), index, mask=fits)
        tl.store(found_values_ptr + place.to(tl.int64), dx, mask=fits)
    return rest, count + found


@triton.jit(do_not_specialize=_LIST_RUNTIME, do_not_specialize_on_alignment=_LIST_UNALIGNED)
def _list_entries_fwd_kernel(
    logits_ptr,  # (N, V)
    stride_row,
    stride_v,
    labels_ptr,  # (N,)
    stride_labels,
    inv_temperature_ptr,  # (N,) or None
    stride_inv_temperature,
    inv_temperature: tl.float64,
    logprobs_ptr,  # (N,)
    entropy_ptr,  # (N,)
    logsumexp_ptr,  # (N,)
    residual_ptr,  # (N,)
    grad_logprobs_ptr,  # (N,) or None
    stride_grad_logprobs,
    grad_entropy_ptr,  # (N,) or None
    stride_grad_entropy,
    grad_logsumexp_ptr,  # (N,) or None
    stride_grad_logsumexp,
    found_indices_ptr,  # (N, M), scratch
    found_values_ptr,  # (N, M), scratch
    counts_ptr,  # (N,), written
    indices_ptr,  # (N, K), written
    values_ptr,  # (N, K), written
    left_ptr,  # (N,) float64, written
    V,
    K,
    min_entries,
    slope: tl.float64,
    factor: tl.float64,
    tail_mass: tl.float64,
    share: tl.float64,
    ignore_index: tl.int64,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    ACC: tl.constexpr = logprobs_ptr.dtype.element_ty
    HAS_ENTROPY: tl.constexpr = grad_entropy_ptr is not None
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row * stride_labels).to(tl.int64)
    g = upstream(grad_logprobs_ptr, row, stride_grad_logprobs, ACC)
    h = upstream(grad_entropy_ptr, row, stride_grad_entropy, ACC)
    l = upstream(grad_logsumexp_ptr, row, stride_grad_logsumexp, ACC)
    in_vocab = (label >= 0) & (label < V)
    c = row_factor(row, inv_temperature_ptr, stride_inv_temperature, inv_temperature, factor, ACC)
    if (label == ignore_index) | (in_vocab & (c > 0) & (g == 0) & (h == 0) & (l == 0)):
        tl.store(counts_ptr + row, 0)
        tl.store(left_ptr + row, tl.zeros((), tl.float64))
        return

    label = tl.where(in_vocab, label, -1).to(tl.int32)
    k = c * LOG2E
    slope = tl.full((), slope, ACC)
    logp = tl.load(logprobs_ptr + row)
    frame = row_frame(tl.load(logsumexp_ptr + row), c)
    bias = -LOG2E * tl.load(residual_ptr + row)
    entropy = tl.zeros((), ACC)
    if HAS_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
    gradient = row_gradient(logp, entropy, frame, bias, g, h, l, slope, c, k, in_vocab, HAS_ENTROPY)
    size = tl.abs(g).to(tl.float64) + tl.abs(h).to(tl.float64) + tl.abs(l).to(tl.float64)
    size *= tl.abs(gradient.scale).to(tl.float64)
    limit = tl.full((), tail_mass, tl.float64) * size
    threshold = (limit * tl.full((), share, tl.float64)).to(ACC)

    block_ptr = logits_ptr + row * stride_row
    x_label = tl.load(block_ptr + label.to(tl.int64) * stride_v, mask=in_vocab, other=0.0).to(ACC)
    at_label = grad_block(x_label, in_vocab, gradient, HAS_ENTROPY, HAS_SOFTCAP)
    found_indices_ptr += row * BLOCK_M
    found_values_ptr += row * BLOCK_M
    offs_v = tl.arange(0, BLOCK_V)
    offsets = offs_v.to(tl.int64) * stride_v
    step = tl.full((), BLOCK_V, tl.int64) * stride_v
    whole = V // BLOCK_V * BLOCK_V
    rest = tl.zeros((BLOCK_V,), ACC)
    count = tl.zeros((), tl.int32)
    start = tl.zeros((), tl.int32)
    # A flat row has many entries above the threshold, and its scan ends early.
    while (start < whole) & (count <= BLOCK_M):
        index = start + offs_v
        x = tl.load(block_ptr + offsets).to(ACC)
        dx = grad_block(x, index < 0, gradient, HAS_ENTROPY, HAS_SOFTCAP)
        rest, count = _list_block(
            dx, index != label, index, threshold, rest, count, found_indices_ptr, found_values_ptr, BLOCK_M
        )
        start += BLOCK_V
        block_ptr += step
    if (start < V) & (count <= BLOCK_M):
        index = start + offs_v
        x = tl.load(block_ptr + offsets, mask=index < V, other=0.0).to(ACC)
        dx = grad_block(x, index < 0, gradient, HAS_ENTROPY, HAS_SOFTCAP)
        other = (index < V) & (index != label)
        rest, count = _list_block(
            dx, other, index, threshold, rest, count, found_indices_ptr, found_values_ptr, BLOCK_M
        )
    # Threads read candidates that other threads wrote.
    tl.debug_barrier()
    offs_m = tl.arange(0, BLOCK_M)
    listed = offs_m < count
    value = tl.load(found_values_ptr + offs_m.to(tl.int64), mask=listed, other=0.0)
    index = tl.load(found_indices_ptr + offs_m.to(tl.int64), mask=listed, other=0)
    sizes = tl.abs(value)
    magnitudes = _magnitude(sizes)
    left = tl.sum(rest.to(tl.float64), 0)
    cut = _largest_cut(magnitudes, sizes, listed, left, limit, min_entries)
    kept = listed & (magnitudes > cut)
    left += tl.sum(tl.where(listed & (magnitudes <= cut), sizes, 0.0).to(tl.float64), 0)
    n_kept = tl.sum(kept.to(tl.int32), 0)
    # Comparisons with NaN are false, which makes the row dense. An infinite gradient or limit does too.
    largest = tl.maximum(tl.max(sizes, 0), tl.abs(at_label))
    sparse = (left <= limit) & (count <= BLOCK_M) & (n_kept < K) & (largest < float("inf")) & (limit < float("inf"))
    if sparse:
        out = row * K
        place = tl.cumsum(kept.to(tl.int32), 0)
        tl.store(indices_ptr + (out + place), index, mask=kept)
        tl.store(values_ptr + (out + place), value, mask=kept)
        tl.store(indices_ptr + out, label)
        tl.store(values_ptr + out, at_label)
        tl.store(counts_ptr + row, n_kept + 1)
        tl.store(left_ptr + row, left / size)
    else:
        tl.store(counts_ptr + row, -1)
        tl.store(left_ptr + row, tl.zeros((), tl.float64))


# D is left to specialise: 16-byte loads need to know that it is a multiple of 16.
@triton.jit(do_not_specialize=["K", "tiles"])
def _times_matrix_fwd_kernel(
    counts_ptr,  # (N,)
    indices_ptr,  # (N, K)
    values_ptr,  # (N, K)
    matrix_ptr,  # (V, D)
    stride_row,
    stride_d,
    out_ptr,  # (N, D), written
    D,
    K,
    tiles,
    BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr,
):
    ACC: tl.constexpr = out_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = program // tiles
    offs_d = program % tiles * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, GATHER)
    mask_d = offs_d < D
    acc = tl.zeros((BLOCK_D,), ACC)
    count = tl.load(counts_ptr + row)
    for first in range(0, count, GATHER):
        mask_k = first + offs_k < count
        place = row * K + first + offs_k
        index = tl.load(indices_ptr + place, mask=mask_k, other=0).to(tl.int64)
        value = tl.load(values_ptr + place, mask=mask_k, other=0.0)
        # Only listed rows are read: 0 times a NaN of the matrix would be NaN.
        entries = tl.load(
            matrix_ptr + (index * stride_row)[:, None] + (offs_d * stride_d)[None, :],
            mask=mask_k[:, None] & mask_d[None, :],
            other=0.0,
        ).to(ACC)
        acc += tl.sum(value[:, None] * entries, 0)
    tl.store(out_ptr + row * D + offs_d, acc, mask=mask_d)


@triton.jit(do_not_specialize=["K", "tiles", "walkers"])
def _accumulate_fwd_kernel(
    index_ptr,  # (E,) sorted
    order_ptr,  # (E,) places in (N, K), in the order of `index`
    starts_ptr,  # (E + 1,) where each listed index begins, then where the last ends
    runs_ptr,  # (1,) number of listed indices
    values_ptr,  # (N, K)
    states_ptr,  # (N, D)
    total_ptr,  # (V, D) or None, added to
    sums_ptr,  # (V,) or None, added to
    D,
    K,
    tiles,
    walkers,
    BLOCK_D: tl.constexpr,
    GATHER: tl.constexpr,
):
    ACC: tl.constexpr = values_ptr.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    tile = program % tiles
    offs_d = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_k = tl.arange(0, GATHER)
    mask_d = offs_d < D
    runs = tl.load(runs_ptr)
    run = program // tiles
    while run < runs:
        begin = tl.load(starts_ptr + run)
        end = tl.load(starts_ptr + (run + 1))
        index = tl.load(index_ptr + begin).to(tl.int64)
        acc = tl.zeros((BLOCK_D,), ACC)
        added = tl.zeros((), ACC)
        while begin < end:
            mask_k = begin + offs_k < end
            place = tl.load(order_ptr + (begin + offs_k), mask=mask_k, other=0)
            value = tl.load(values_ptr + place, mask=mask_k, other=0.0)
            added += tl.sum(value, 0)
            if total_ptr is not None:
                states = tl.load(
                    states_ptr + (place // K * D)[:, None] + offs_d[None, :],
                    mask=mask_k[:, None] & mask_d[None, :],
                    other=0.0,
                ).to(ACC)
                acc += tl.sum(value[:, None] * states, 0)
            begin += GATHER
        if total_ptr is not None:
            out_ptr = total_ptr + index * D + offs_d
            tl.store(out_ptr, tl.load(out_ptr, mask=mask_d, other=0.0) + acc, mask=mask_d)
        # A condition on a pointer that may be None is resolved by the compiler only where it stands alone.
        if sums_ptr is not None:
            tl.store(sums_ptr + index, tl.load(sums_ptr + index, mask=tile == 0) + added, mask=tile == 0)
        run += walkers


def list_entries(
    logits: Tensor,  # (N, V) float32 or float64
    labels: Tensor,  # (N,) int32 or int64
    inv_temperature: float | Tensor,  # scalar or (N,)
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],  # (N,) each
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],  # (N,) each, any stride
    *,
    tail_mass: float,
    places: int,
    threshold: float,
    candidates: int,
    min_entries: int,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (counts (N,), indices (N, K), values (N, K), left (N,)) of the gradient that `token_logprobs_bwd` gives.

    The label's entry comes first, then the others, ascending by index. `left` is the sum of the absolute values of the
    unlisted entries relative to the row's scale (|g| + |h| + |l|) |logit_scale| inv_temperature, at most `tail_mass`.
    A row that needs more than K entries, or is not finite, has count -1. A row without a gradient has count 0. Places
    beyond the count hold anything.

    Args:
        logits: the logits, of any strides.
        labels, inv_temperature, logit_scale, softcap, ignore_index: as for `token_logprobs_fwd`.
        outputs: log-probs, entropy, log-sum-exp and residual of `token_logprobs_fwd`.
        grads: with respect to log-probs, entropy and log-sum-exp. None counts as 0.
        tail_mass: in (0, 1).
        places: K.
        threshold: entries below this share of tail_mass times the scale are left out at sight.
        candidates: a row with more entries than this, rounded up to a power of two, above the threshold has count -1.
        min_entries: the number of entries beside the label's down to which the smallest are dropped.
    """
    n, v = logits.shape
    dtype = outputs[0].dtype
    counts = torch.empty(n, dtype=torch.int32, device=logits.device)
    left = torch.empty(n, dtype=torch.float64, device=logits.device)
    indices = torch.empty((n, places), dtype=torch.int32, device=logits.device)
    values = torch.empty((n, places), dtype=dtype, device=logits.device)
    if n == 0:
        return counts, indices, values, left
    room = triton.next_power_of_2(candidates)
    found_indices = torch.empty((n, room), dtype=torch.int32, device=logits.device)
    found_values = torch.empty((n, room), dtype=dtype, device=logits.device)
    tile = tile_for(LIST_TILES, logits.dtype, v)
    with on_device_of(logits):
        _list_entries_fwd_kernel[(n,)](
            *matrix_arguments(logits),
            *row_arguments(labels, inv_temperature),
            *(x.contiguous() for x in outputs),
            *upstream_arguments(*grads),
            found_indices,
            found_values,
            counts,
            indices,
            values,
            left,
            v,
            places,
            min_entries,
            *slope_and_factor(logit_scale, softcap),
            tail_mass,
            threshold,
            ignore_index,
            HAS_SOFTCAP=bool(softcap),
            BLOCK_V=tile.block,
            BLOCK_M=room,
            **launch_options(tile),
        )
    return counts, indices, values, left


def times_matrix(
    counts: Tensor,  # (N,) int32
    indices: Tensor,  # (N, K) int32
    values: Tensor,  # (N, K)
    matrix: Tensor,  # (V, D)
) -> Tensor:  # (N, D)
    """Return the sums of value * matrix[index] over the entries of each row, 0 where a count is 0 or -1."""
    n, d = counts.shape[0], matrix.shape[1]
    out = torch.empty((n, d), dtype=values.dtype, device=matrix.device)
    if out.numel() == 0:
        return out
    tile = tile_for(PRODUCT_TILES, matrix.dtype, d)
    tiles = triton.cdiv(d, tile.block)
    with on_device_of(matrix):
        _times_matrix_fwd_kernel[(n * tiles,)](
            counts,
            indices,
            values,
            *matrix_arguments(matrix),
            out,
            d,
            indices.shape[1],
            tiles,
            BLOCK_D=tile.block,
            GATHER=GATHER,
            **launch_options(tile),
        )
    return out


def accumulate(
    counts: Tensor,  # (N,) int32
    indices: Tensor,  # (N, K) int32
    values: Tensor,  # (N, K)
    states: Tensor,  # (N, D)
    total: Tensor | None,  # (V, D) contiguous, the dtype of the values, added to
    sums: Tensor | None,  # (V,) contiguous, the dtype of the values, added to
) -> None:
    """Add value * states[row] to total[index] and value to sums[index] per entry, in row order within an index."""
    n, places = indices.shape
    given = total if total is not None else sums
    if given is None or n == 0:
        return
    keys, order, starts, runs = _runs(counts, indices, given.shape[0])
    d = states.shape[1]
    tile = tile_for(PRODUCT_TILES, states.dtype, d)
    tiles = triton.cdiv(d, tile.block) if total is not None else 1
    walkers = min(n * places, WALKERS)
    with on_device_of(states):
        _accumulate_fwd_kernel[(walkers * tiles,)](
            keys,
            order,
            starts,
            runs,
            values,
            states.contiguous(),
            total,
            sums,
            d,
            places,
            tiles,
            walkers,
            BLOCK_D=tile.block,
            GATHER=GATHER,
            **launch_options(tile),
        )


def _runs(counts: Tensor, indices: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (sorted indices (E,), their places (E,), where each index begins (E + 1,), number of indices (1,)).

    Places that hold nothing sort behind every index, so that no count is needed on the host.
    """
    n, places = indices.shape
    listed = torch.arange(places, device=counts.device) < counts.unsqueeze(-1)
    keys, order = torch.where(listed, indices, vocabulary).flatten().sort(stable=True)
    begins = torch.ones_like(keys, dtype=torch.bool)
    torch.ne(keys[1:], keys[:-1], out=begins[1:])
    run = begins.cumsum(0)
    # Every place of a run writes to a slot of its own, or to the last, which nobody reads.
    starts = torch.empty(n * places + 2, dtype=torch.int64, device=counts.device)
    position = torch.arange(n * places, device=counts.device)
    starts.index_fill_(0, run[-1:], n * places)
    starts[torch.where(begins, run - 1, n * places + 1)] = position
    runs = (begins & (keys < vocabulary)).sum().reshape(1)
    return keys, order, starts, runs
