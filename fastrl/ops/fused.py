"""A loss from hidden states whose gradient is formed in the forward, chunk by chunk.

Legend: N tokens, L live tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.backends import choice, memory
from fastrl.ops import sparse_rows
from fastrl.ops.chunks import BLOCK_CHUNKS, Chunks, _keep, blocks
from fastrl.ops.gradients import Gradients
from fastrl.ops.head import HeadOptions
from fastrl.ops.live_rows import ActiveRows
from fastrl.ops.rows import row_blocks


class FusedFromHidden(torch.autograd.Function):
    """(hidden, weight, bias) -> loss, with the gradient formed in the forward; backward hands it over, scaled.

    The plan says how: `head`, `needs`, `units`, `live`, `allowed`, `rounding` and `coefficients` are those of
    `fused_gradient`, and `loss` maps (logprobs, entropy) of all tokens to the scalar.

    The first backward gives the buffers themselves away, scaled in place: a second copy of the head's gradient would
    be the largest tensor of the step. Those of float16 inputs wait in float32 and are rounded when they are scaled.
    Autograd may keep a buffer as `.grad` and add to it later, so nothing here reads it again: a further backward
    (`retain_graph=True`) forms the gradient anew from the coefficients, to the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        inv_temperature: Tensor,
        plan: Any,
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return (loss, logprobs (N,), entropy (N,), rows whose logits were formed twice)."""
        found: list[tuple[Tensor, Tensor | None]] = []

        def coefficients(*block: Any) -> tuple[Tensor, Tensor | None]:
            found.append(plan.coefficients(*block))
            return found[-1]

        logprobs, entropy, gradients, recomputed = fused_gradient(
            hidden,
            weight,
            bias,
            labels,
            inv_temperature,
            plan.head,
            plan.needs,
            coefficients,
            plan.units,
            plan.live,
            plan.allowed,
            plan.rounding,
            plan.stats,
        )
        loss = plan.loss(logprobs, entropy)
        if any(plan.needs):
            ctx.gradients = gradients
            ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
            ctx.how = (plan.head, plan.needs, plan.units, plan.live, plan.rounding)
            g, h = (_joined([block[i] for block in found]) for i in range(2))
            ctx.save_for_backward(hidden, weight, bias, labels, inv_temperature, plan.allowed, g, h)
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy, recomputed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward times the upstream factor."""
        if torch.is_grad_enabled():
            raise RuntimeError("from_hidden is differentiable once: create_graph=True is not supported")
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            gradients = _formed_again(*ctx.saved_tensors, *ctx.how)
        backend = ctx.how[0].backend
        handed = (release_gradient(*given, grads[0], backend) for given in zip(gradients, ctx.dtypes, strict=True))
        return (*handed, None, None, None)


def _joined(blocks: list[Any]) -> Tensor | None:
    """Return the coefficients of all live tokens from those of the blocks, or None where the loss has none."""
    return None if not blocks or blocks[0] is None else torch.cat(blocks)


def _formed_again(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    inv_temperature: Tensor,  # (N,)
    allowed: Tensor | None,
    g: Tensor | None,  # (L,)
    h: Tensor | None,  # (L,)
    head: HeadOptions,
    needs: tuple[bool, bool, bool],
    units: Sequence[int] | None,
    live: Tensor | None,
    rounding: str,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias from dL/dlogprobs and dL/dentropy of the live tokens."""

    def known(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, Tensor | None]:
        assert g is not None
        return g[block], None if h is None else h[block]

    return fused_gradient(
        hidden, weight, bias, labels, inv_temperature, head, needs, known, units, live, allowed, rounding
    )[2]


Coefficients = Callable[[Tensor, Tensor, slice, Tensor], tuple[Tensor, Tensor | None]]


def fused_gradient(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    inv_temperature: Tensor,  # (N,)
    head: HeadOptions,
    needs: tuple[bool, bool, bool],
    coefficients: Coefficients,
    units: Sequence[int] | None = None,
    live: Tensor | None = None,  # (L,)
    allowed: Tensor | None = None,
    rounding: str = "",
    stats: sparse_rows.SparseStats | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], int]:
    """Return (logprobs (N,), entropy (N,), gradients, recomputed) of a loss, its gradient formed in the forward.

    Args:
        hidden, weight, bias, labels, inv_temperature, head: the vocabulary operation.
        needs: which of the gradients of hidden, weight and bias to compute.
        coefficients: maps (logprobs, entropy, block, indices), (M,) of the rows of a block, to (dL/dlogprobs,
            dL/dentropy or None). `block` are the rows' positions among the live rows, `indices` among all.
        units: live rows of each sequence, where the loss couples the tokens of a sequence; None: every token alone.
        live: the rows whose label is not ignored, in the order in which to take them; None: as they stand.
        allowed, rounding: as `check_allowed` and `check_rounding` return them.
        stats: receives how many rows were sparse and dense, and the largest mass left out, where `tail_mass` > 0.

    Returns:
        The gradients have the dtypes of their inputs, but for float16: theirs are float32, for the loss scale, which
        the caller is given only in the backward, to come before the rounding. The last is the number of rows whose
        logits were formed a second time, because their sequence is longer than `BLOCK_CHUNKS` chunks.
    """
    restricted = {"live": live, "allowed": allowed, "rounding": rounding}
    chunks = Chunks.of(hidden, weight, bias, labels, inv_temperature, head, **restricted, ahead=units is None)
    gradients = Gradients(chunks, needs, unscaled=True)
    if stats is not None and gradients.sparse is not None:
        gradients.sparse.stats = stats
    found = chunks.outputs()
    with choice.autocast_disabled(hidden.device):
        recomputed = _form(chunks, gradients, found, coefficients, units)
        gradients.flush()
    # Only here, where the logits are gone: a head's gradient of half precision is made beside the one it was summed in.
    return chunks.scattered(found[0]), chunks.scattered(found[1]), gradients.cast(), recomputed


def _form(
    chunks: Chunks,
    gradients: Gradients,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Coefficients,
    units: Sequence[int] | None,
) -> int:
    """Fill `found` and `gradients` block by block; return how many rows had their logits formed twice."""
    logprobs, entropy = found[:2]
    n, size = chunks.live.numel(), chunks.head.chunk_tokens
    plan = list(blocks(n, size, units))
    held = min(BLOCK_CHUNKS, max((-(-(b.stop - b.start) // size) for b in plan), default=0)) if units is not None else 1
    buffer = chunks.buffer(held) if n else None
    recomputed = 0
    for block in plan:
        assert buffer is not None
        fits = block.stop - block.start <= held * size
        parts = [block] if fits else [slice(a, min(a + size, block.stop)) for a in range(block.start, block.stop, size)]
        for rows in parts:
            states, logits = chunks.logits(rows, buffer)
            _keep(found, rows, chunks.forward_rows(rows, logits))
        if not gradients.wanted:
            continue
        g, h = coefficients(logprobs[block], entropy[block], block, chunks.live[block])
        for rows in parts:
            if not fits:
                states, logits = chunks.logits(rows, buffer)
                recomputed += rows.stop - rows.start
            within = slice(rows.start - block.start, rows.stop - block.start)
            grads = (g[within], None if h is None else h[within], None)
            # Before the row kernel: an asynchronous device runs it while the host learns how many rows contribute.
            contributes = ActiveRows(grads[0] != 0 if grads[1] is None else (grads[0] != 0) | (grads[1] != 0))
            outputs = (found[0][rows], found[1][rows], found[2][rows], found[3][rows])
            gradients.take(rows, states, logits, outputs, grads, contributes)
    return recomputed


# Rows scaled at a time where a half-precision gradient needs a float32 factor.
SCALE_ROWS = 32


# Rows rounded at a time, as PyTorch takes a copy of them on a CPU.
ROUNDED_ROWS = 1024


def graph_is_kept() -> bool:
    """Return whether the backward that is running leaves its graph for another one; True where PyTorch cannot tell."""
    query = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def scale_gradient(gradient: Tensor, factor: Tensor, backend: str, *, keep: bool) -> Tensor:
    """Return gradient * factor in the gradient's dtype; its own memory unless `keep`.

    Nothing is read where the factor is 1 and the memory may be used: on a CPU the host looks, under Triton the kernel
    does, so that the host does not wait.
    """
    out = memory.empty(gradient.shape, gradient.dtype, gradient.device) if keep else gradient
    if backend == "triton":
        from fastrl_kernels import policy_logits as kernels

        targets = out.view(-1, out.shape[-1]) if keep else None
        for rows, part in parts(row_blocks(gradient)):
            kernels.scale_rows(rows[0], factor, out=rows[0] if targets is None else targets[part])
        return out
    if gradient.device.type == "cpu":
        value = float(factor)
        return out if value == 1.0 and not keep else torch.mul(gradient, value, out=out)
    if gradient.dtype == factor.dtype:
        return torch.mul(gradient, factor, out=out)
    # A factor without dimensions would be rounded to the gradient's dtype first.
    for source, target in zip(gradient.split(SCALE_ROWS), out.split(SCALE_ROWS), strict=True):
        target.copy_(source.to(factor.dtype) * factor)
    return out


def release_gradient(
    gradient: Tensor | None, dtype: torch.dtype | None, factor: Tensor, backend: str, *, keep: bool = False
) -> Tensor | None:
    """Return gradient * factor in `dtype`: as `scale_gradient` where it has that dtype, else in new memory.

    Where the dtypes differ the gradient waited in float32 for the factor, and is rounded behind it: 1e-9 is nothing in
    float16, but not under a loss scale of 65536.
    """
    if gradient is None or dtype is None:
        return None
    if gradient.dtype == dtype:
        return scale_gradient(gradient, factor, backend, keep=keep)
    rounded = torch.empty_like(gradient, dtype=dtype)
    for source, target in zip(gradient.split(ROUNDED_ROWS), rounded.split(ROUNDED_ROWS), strict=True):
        torch.mul(source, factor, out=target)
    return rounded


def parts(blocks: Iterable[tuple[Any, ...]]) -> Iterator[tuple[tuple[Any, ...], slice]]:
    """Yield what `row_blocks` yields, each with the place of its rows among all rows."""
    done = 0
    for block in blocks:
        part = slice(done, done + block[0].shape[0])
        yield block, part
        done = part.stop
