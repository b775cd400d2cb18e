"""A loss from hidden states whose gradient is formed in the forward, chunk by chunk.

Legend: N tokens, L live tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.backends import choice, memory
from fastrl.ops import sparse_rows
from fastrl.ops.chunks import BLOCK_CHUNKS, Chunks, _keep, blocks
from fastrl.ops.gradients import Gradients
from fastrl.ops.head import HeadOptions, LinearRows
from fastrl.ops.live_rows import ActiveRows
from fastrl.ops.rows import row_blocks

Coefficients = Callable[[Tensor, Tensor, slice, Tensor], tuple[Tensor, Tensor | None]]
"""Maps (logprobs, entropy, block, index), (M,) of the rows of a block, to (dL/dlogprobs, dL/dentropy or None).

`block` is the range of the rows among the live rows, `index` their places among all rows.
"""


class FusedPlan(Protocol):
    """A loss for `FusedFromHidden`: its rows, and their loss and coefficients."""

    @property
    def rows(self) -> LinearRows:
        """The vocabulary operation."""
        ...

    @property
    def needs(self) -> tuple[bool, bool, bool]:
        """Which of the gradients of hidden, weight and bias to compute."""
        ...

    @property
    def group_sizes(self) -> Sequence[int] | None:
        """Live rows of each sequence or pair, if the loss couples its tokens."""
        ...

    @property
    def order(self) -> Tensor | None:
        """The live rows (L,) in the order in which to take them, ascending if None."""
        ...

    @property
    def stats(self) -> sparse_rows.SparseStats | None:
        """Receives the numbers of sparse and dense rows."""
        ...

    def coefficients(
        self, logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Return the `Coefficients` of a block."""
        ...

    def loss(self, logprobs: Tensor, entropy: Tensor) -> Tensor:
        """Return the loss of all tokens, a scalar."""
        ...


@dataclass(frozen=True)
class _Again:
    """The part of a plan that a second backward needs, without its tensors."""

    options: HeadOptions
    rounding: str
    needs: tuple[bool, bool, bool]
    group_sizes: Sequence[int] | None
    order: Tensor | None


class FusedFromHidden(torch.autograd.Function):
    """(hidden, weight, bias) -> loss. The forward forms the gradient, the backward scales it and hands it over.

    The arguments repeat tensors of `plan.rows`, because autograd follows arguments only.

    The first backward gives the buffers themselves away, scaled in place: a second copy of the head's gradient would
    be the largest tensor of the step. Gradients of float16 inputs are kept in float32 until they are scaled, and then
    rounded. Autograd may keep a buffer as `.grad` and add to it later, so nothing here reads it again: a further
    backward (`retain_graph=True`) forms the gradient anew from the coefficients, to the same bits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: FusedPlan
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Return (loss, logprobs (N,), entropy (N,), rows whose logits were formed twice)."""
        rows = replace(plan.rows, hidden=hidden, weight=weight, bias=bias)
        found: list[tuple[Tensor, Tensor | None]] = []

        def coefficients(*block: Any) -> tuple[Tensor, Tensor | None]:
            found.append(plan.coefficients(*block))
            return found[-1]

        logprobs, entropy, gradients, recomputed = fused_gradient(
            rows, plan.needs, coefficients, plan.group_sizes, plan.stats, plan.order
        )
        loss = plan.loss(logprobs, entropy)
        if any(plan.needs):
            ctx.gradients = gradients
            ctx.dtypes = tuple(None if x is None else x.dtype for x in (hidden, weight, bias))
            ctx.again = _Again(rows.options, rows.rounding, plan.needs, plan.group_sizes, plan.order)
            g, h = (_joined([block[i] for block in found]) for i in range(2))
            # The rows themselves are not kept: their tensors must be visible to autograd's hooks and version checks.
            ctx.save_for_backward(hidden, weight, bias, rows.labels, rows.inv_temperature, rows.allowed, g, h)
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy, recomputed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        """Return the gradients of the forward times the upstream factor."""
        if torch.is_grad_enabled():
            raise RuntimeError("from_hidden is differentiable once: create_graph=True is not supported")
        gradients, ctx.gradients = ctx.gradients, None
        again: _Again = ctx.again
        if gradients is None:
            hidden, weight, bias, labels, inv_temperature, allowed, g, h = ctx.saved_tensors
            given = (hidden, weight, bias, labels, inv_temperature)
            gradients = _formed_again(LinearRows(*given, again.options, allowed, again.rounding), again, g, h)
        backend = again.options.backend
        released = (release_gradient(*pair, grads[0], backend) for pair in zip(gradients, ctx.dtypes, strict=True))
        return (*released, None)


def _joined(blocks: list[Any]) -> Tensor | None:
    """Join the coefficients of the blocks, or return None if the loss has none."""
    return None if not blocks or blocks[0] is None else torch.cat(blocks)


def _formed_again(
    rows: LinearRows,
    again: _Again,
    g: Tensor | None,  # (L,)
    h: Tensor | None,  # (L,)
) -> tuple[Tensor | None, ...]:
    """Return the gradients of hidden, weight and bias from dL/dlogprobs and dL/dentropy of the live tokens."""

    def known(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, Tensor | None]:
        assert g is not None
        return g[block], None if h is None else h[block]

    return fused_gradient(rows, again.needs, known, again.group_sizes, order=again.order)[2]


def fused_gradient(
    rows: LinearRows,
    needs: tuple[bool, bool, bool],
    coefficients: Coefficients,
    group_sizes: Sequence[int] | None = None,
    stats: sparse_rows.SparseStats | None = None,
    order: Tensor | None = None,  # (L,)
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], int]:
    """Return (logprobs (N,), entropy (N,), gradients, recomputed) of a loss, its gradient formed in the forward.

    Args:
        rows: the vocabulary operation.
        needs: which of the gradients of hidden, weight and bias to compute.
        coefficients: the gradient of the loss, see `Coefficients`.
        group_sizes: live rows of each sequence or pair, if the loss couples its tokens. None: every token alone.
        stats: receives the numbers of sparse and dense rows and the largest mass left out, if `tail_mass` > 0.
        order: the rows whose label is not ignored, in the order in which to take them, ascending if None.

    Returns:
        The gradients have the dtypes of their inputs. Gradients of float16 inputs are float32: the loss scale is known
        only in the backward, and must come before the rounding. The last is the number of rows whose logits were
        formed a second time, because their group is longer than `BLOCK_CHUNKS` chunks.
    """
    chunks = Chunks.of(rows, order=order, ahead=group_sizes is None)
    gradients = Gradients(chunks, needs, unscaled=True)
    if stats is not None and gradients.sparse is not None:
        gradients.sparse.stats = stats
    found = chunks.outputs()
    with choice.autocast_disabled(rows.hidden.device):
        recomputed = _form(chunks, gradients, found, coefficients, group_sizes)
        gradients.flush()
    # Cast here, when the logits are gone: a half-precision head's gradient is a copy beside the float32 sum.
    return chunks.scattered(found[0]), chunks.scattered(found[1]), gradients.cast(), recomputed


def _form(
    chunks: Chunks,
    gradients: Gradients,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Coefficients,
    group_sizes: Sequence[int] | None,
) -> int:
    """Fill `found` and `gradients` block by block, and return how many rows had their logits formed twice."""
    logprobs, entropy = found[:2]
    n, size = chunks.live.numel(), chunks.size
    plan = list(blocks(n, size, group_sizes))
    longest = max((-(-(b.stop - b.start) // size) for b in plan), default=0)
    held = 1 if group_sizes is None else min(BLOCK_CHUNKS, longest)
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


# Rows scaled at a time if a half-precision gradient needs a float32 factor.
SCALE_ROWS = 32


# Rows rounded at a time, as PyTorch takes a copy of them on a CPU.
ROUNDED_ROWS = 1024


def graph_is_kept() -> bool:
    """Return whether the backward that is running keeps its graph for another one. True if PyTorch cannot tell."""
    query = getattr(getattr(torch._C, "_autograd", None), "_get_current_graph_task_keep_graph", None)
    return True if query is None else bool(query())


def scale_gradient(gradient: Tensor, factor: Tensor, backend: str, *, keep: bool) -> Tensor:
    """Return gradient * factor in the gradient's dtype, in the gradient's memory unless `keep`.

    A factor of 1 reads nothing if the memory may be used. On a CPU the host looks at the factor. Under Triton the
    kernel does, so that the host does not wait.
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
    """Return gradient * factor in `dtype`: by `scale_gradient` if it has that dtype, else in new memory.

    If the gradient is float32 and the input float16, multiply first and round last: 1e-9 underflows in float16,
    1e-9 x 65536 does not.
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
    """Yield the blocks of `row_blocks`, each with the place of its rows among all rows."""
    done = 0
    for block in blocks:
        part = slice(done, done + block[0].shape[0])
        yield block, part
        done = part.stop
