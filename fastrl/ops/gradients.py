"""The gradients of hidden states, head and bias, summed over chunks.

Legend: N tokens, L live tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import memory
from fastrl.ops import sparse_rows
from fastrl.ops.chunks import Chunks
from fastrl.ops.live_rows import ActiveRows

# The rows of a chunk that have a gradient move to its front in this many steps, each with a copy of its share.
MOVE_STEPS = 32


# On a GPU the head's gradient grows in blocks of this many vocabulary rows, as each product needs room of its own.
GPU_HEAD_ROWS = 16384


# On a CPU the rows of a GEMM over the vocabulary come in multiples of this; see `_times_weight`.
CPU_GEMM_ROWS = 8


# A half-precision head on a CPU is widened for its gradients in blocks of this many vocabulary rows, to keep the copy
# small.
CPU_WIDEN_ROWS = 8192


def _for_products(gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (operand, factor): dlogits (C, V) as the operand of the GEMMs, and the factor of their products.

    On a GPU the operand has the head's dtype. It is cast once for both GEMMs.
    """
    if gradient.device.type != "cuda":
        return gradient, None
    return _as_float16(gradient) if weight.dtype == torch.float16 else (gradient.to(weight.dtype), None)


def _as_float16(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x, factor) with x * factor = gradient, x in float16 and |x| < 2^14, so that small entries do not vanish.

    The factor is a power of two, so that nothing is rounded twice. It does not help a gradient with non-finite entries.
    """
    largest = torch.linalg.vector_norm(gradient, math.inf).nan_to_num(nan=1.0, posinf=1.0).clamp(2.0**-100, 2.0**100)
    power = largest / torch.frexp(largest).mantissa
    return torch.mul(gradient, 2.0**14 / power, out=torch.empty_like(gradient, dtype=torch.float16)), power * 2.0**-14


def _times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return gradient (C, V) @ weight (V, D), at least in float32."""
    count = gradient.shape[0]
    whole = count - count % CPU_GEMM_ROWS
    if gradient.device.type == "cpu" and whole < count:
        # For other row counts the CPU's float32 GEMM may sum the vocabulary in one long chain: at 3 rows and V = 151936
        # its error was 4e-4, against 1e-6 with rows of zeros added.
        rest = gradient.new_zeros(CPU_GEMM_ROWS, gradient.shape[1])
        rest[: count - whole] = gradient[whole:]
        ragged = _times_weight(rest, weight)[: count - whole]
        return torch.cat((_times_weight(gradient[:whole], weight), ragged)) if whole else ragged
    wide = checks.wide(weight.dtype)
    if weight.dtype == wide:
        return gradient @ weight
    if weight.device.type == "cuda":
        operand, factor = (gradient, None) if gradient.dtype == weight.dtype else _for_products(gradient, weight)
        product = torch.mm(operand, weight, out_dtype=wide)
        return product if factor is None else product.mul_(factor)
    total = torch.zeros((gradient.shape[0], weight.shape[1]), dtype=wide, device=gradient.device)
    for start in range(0, weight.shape[0], CPU_WIDEN_ROWS):
        block = slice(start, start + CPU_WIDEN_ROWS)
        total.addmm_(gradient[:, block], weight[block].to(wide))
    return total


def _add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor, factor: Tensor | None = None) -> None:
    """Add gradient^T (V, C) @ hidden (C, D) to `total` (V, D), at least float32, from operands of `_for_products`."""
    # In place and with the vocabulary outermost: 0.89 of the time of the logits' GEMM at C = 256, D = 576, V = 49152.
    # In vocabulary blocks 0.90, as the transpose (D, V) 1.09.
    if hidden.dtype == total.dtype or hidden.device.type != "cuda":
        total.addmm_(gradient.t(), hidden.to(total.dtype))
        return
    for start in range(0, total.shape[0], GPU_HEAD_ROWS):
        block = slice(start, start + GPU_HEAD_ROWS)
        product = torch.mm(gradient[:, block].t(), hidden, out_dtype=total.dtype)
        total[block] += product if factor is None else product.mul_(factor)


class Gradients:
    """The gradients of hidden states, head and bias, gathered chunk by chunk, each only if it is asked for.

    With `per_live_row` the gradient of the hidden states is (L, D), of the live rows, and not rounded to their dtype.
    `unscaled` says that a loss scale will still multiply the gradients: those for float16 inputs stay in float32.
    """

    def __init__(
        self, chunks: Chunks, needs: tuple[bool, bool, bool], per_live_row: bool = False, *, unscaled: bool = False
    ) -> None:
        self.chunks = chunks
        rows, wide = chunks.rows, chunks.dtype
        self.wanted = any(needs)
        self.unrounded = unscaled and rows.hidden.dtype == torch.float16
        self.hidden = None
        if needs[0] and per_live_row:
            self.hidden = rows.hidden.new_empty((chunks.live.numel(), rows.hidden.shape[1]), dtype=wide)
        elif needs[0]:
            dtype = wide if self.unrounded else rows.hidden.dtype
            self.hidden = torch.zeros_like(rows.hidden, dtype=dtype, memory_format=torch.contiguous_format)
        self.weight = memory.zeros(rows.weight.shape, wide, rows.weight.device) if needs[1] else None
        self.bias = torch.zeros(rows.weight.shape[0], dtype=wide, device=rows.weight.device) if needs[2] else None
        self.per_live_row = per_live_row
        self.sparse = None
        if rows.options.tail_mass > 0.0:
            rule = sparse_rows.rule_for(rows.options.tail_mass, rows.weight.shape[0], rows.weight.device)
            self.sparse = sparse_rows.Collector(rule, rows.options.backend, chunks.size, rows.weight, chunks.scalars())

    def take(
        self,
        rows: slice,
        states: Tensor,  # (C, D)
        logits: Tensor,  # (C, V), overwritten
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        contributes: ActiveRows | None = None,
    ) -> None:
        """Add one chunk from its logits, the outputs of `forward_rows`, and the gradients of these outputs."""
        if self.sparse is None:
            self.add(rows, states, self.chunks.backward_rows(rows, logits, outputs, grads), contributes)
            return
        index = self.chunks.live[rows]
        given = self.chunks.rows
        inputs = sparse_rows.RowInputs(given.labels[index], given.inv_temperature[index], outputs, grads)
        self.sparse.take(self, self._places(rows), states, logits, inputs)

    def add(self, rows: slice, states: Tensor, dlogits: Tensor, contributes: ActiveRows | None = None) -> None:
        """Add one chunk, dlogits (C, V), which is overwritten. Rows outside `contributes` have no gradient."""
        index = self._places(rows)
        if contributes is not None:
            kept = contributes.indices()
            # Moving costs a read and a write of the rows that stay. Below this share the GEMMs saved pay for it.
            if kept.numel() <= 0.8 * dlogits.shape[0]:
                index, states, dlogits = index[kept], states[kept], _moved_up(dlogits, kept)
        self.add_rows(index, states, dlogits)

    def _places(self, rows: slice) -> Tensor:
        """Return where live rows stand in the gradient of the hidden states."""
        if not self.per_live_row:
            return self.chunks.live[rows]
        return torch.arange(rows.start, rows.stop, device=self.chunks.live.device)

    def add_rows(self, places: Tensor, states: Tensor, dlogits: Tensor) -> None:
        """Add rows dlogits (C, V), which may be followed by rows of zeros, at their places in `hidden`."""
        if places.numel() == 0:
            return
        operand, factor = _for_products(dlogits, self.chunks.rows.weight)
        if self.hidden is not None:
            product = _times_weight(operand, self.chunks.rows.weight)[: places.numel()]
            self.hidden[places] = (product if factor is None else product.mul_(factor)).to(self.hidden.dtype)
        if self.weight is not None:
            _add_weight_gradient(self.weight, operand, states, factor)
        if self.bias is not None:
            self.bias += dlogits.sum(0)

    def flush(self) -> None:
        """Add the rows that are held back for a later chunk."""
        if self.sparse is not None:
            self.sparse.flush(self)

    def cast(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dhidden, dweight, dbias) after the last `flush`, in their inputs' dtypes or, `unscaled`, float32."""
        if self.unrounded:
            return self.hidden, self.weight, self.bias
        weight = None if self.weight is None else self.weight.to(self.chunks.rows.weight.dtype)
        bias = None if self.bias is None or self.chunks.rows.bias is None else self.bias.to(self.chunks.rows.bias.dtype)
        return self.hidden, weight, bias


def _moved_up(rows: Tensor, kept: Tensor) -> Tensor:
    """Return the rows at rising indices `kept`, moved to the front of `rows`: one gather would need a second tile.

    Row i comes from kept[i] >= i, so that no move overwrites a row that a later one reads.
    """
    count, step = kept.numel(), max(1, rows.shape[0] // MOVE_STEPS)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows[part] = rows[kept[part]]
    return rows[:count]
