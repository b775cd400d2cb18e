"""The live rows of a batch in chunks of a fixed number, and their logits.

Legend: N tokens, L live tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.backends import choice, memory
from fastrl.ops.head import HeadOptions, _wide
from fastrl.ops.live_rows import ActiveRows
from fastrl.ops.rows import forward_rows
from fastrl.ops.sampling import apply_sampling, kernel_scalars, prepared_backward_rows

# Chunks whose logits are held at once where a loss couples the tokens of a sequence.
BLOCK_CHUNKS = 4


# Logits are formed on a CPU in blocks of this many vocabulary rows, which stay in the cache: a chunk of 256 rows took
# 0.85 of the time of one GEMM over the vocabulary (D = 576 and V = 49152, D = 1536 and V = 151936; two threads). The
# gradients' GEMMs gain nothing from it.
CPU_LOGIT_ROWS = 1024


def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the logits of one chunk (C, D) to `out` (C, V), accumulated and kept in `out`'s dtype."""
    if hidden.dtype == out.dtype and hidden.device.type != "cpu":
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, weight.shape[0], CPU_LOGIT_ROWS):
            block = slice(start, start + CPU_LOGIT_ROWS)
            torch.mm(wide, weight[block].to(out.dtype).t(), out=out[:, block])
    if bias is not None:
        out += bias.to(out.dtype)
    return out


@dataclass
class Chunks:
    """The live rows of a batch, cut into chunks of a fixed number of rows; the last one is padded with zero rows."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    inv_temperature: Tensor  # (N,)
    head: HeadOptions
    live: Tensor  # (L,) indices of the rows to compute
    allowed: Tensor | None = None  # (N, ...) sets, as `check_allowed` returns them
    rounding: str = ""
    ahead: tuple[Tensor, Tensor] | None = None
    """States (C, D) and logits (C, V) of the first chunk, queued before the number of live rows was known."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        inv_temperature: Tensor,
        head: HeadOptions,
        *,
        live: Tensor | None = None,  # (L,)
        allowed: Tensor | None = None,
        rounding: str = "",
        keep: Tensor | None = None,  # (N,) bool
        ahead: bool = True,
    ) -> Chunks:
        """Return the chunks of the rows whose label is not ignored, and which `keep` marks where it is given.

        `live` gives these rows in the order in which to take them, where it is not their own.

        On an asynchronous device the logits of the first chunk are queued before the host waits for the number of
        rows, unless `ahead` is False: for callers that hold several chunks at once.
        """
        if live is not None:
            return cls(hidden, weight, bias, labels, inv_temperature, head, live, allowed, rounding)
        wanted = labels != head.ignore_index
        kept = ActiveRows(wanted if keep is None else wanted & keep)
        chunks = cls(hidden, weight, bias, labels, inv_temperature, head, kept.order, allowed, rounding)
        if ahead and kept.is_pending and labels.numel() and weight.numel():
            # Rows of `order` that turn out not to be kept are formed too, and never looked at.
            buffer = chunks.buffer(1)
            with choice.autocast_disabled(hidden.device):
                states, _ = chunks.logits(slice(0, min(head.chunk_tokens, labels.numel())), buffer)
            chunks.ahead = states, buffer
        chunks.live = kept.indices()
        return chunks

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (positions in `live`, their hidden states, their logits in a buffer that the next chunk overwrites)."""
        n, size = self.live.numel(), self.head.chunk_tokens
        buffer = self.buffer(1) if n else None
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            assert buffer is not None
            yield rows, *self.logits(rows, buffer)

    def buffer(self, chunks: int) -> Tensor:
        """Return room for the logits of some chunks."""
        if chunks == 1 and self.ahead is not None:
            return self.ahead[1]
        rows = chunks * self.head.chunk_tokens
        return memory.scratch((rows, self.weight.shape[0]), _wide(self.hidden.dtype), self.hidden.device)

    def logits(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return (hidden states, logits) of live rows, the logits written to `buffer` one GEMM of a chunk at a time."""
        size, count = self.head.chunk_tokens, rows.stop - rows.start
        if self.ahead is not None and rows.start == 0 and buffer is self.ahead[1]:
            states, self.ahead = self.ahead[0], None
            return states[:count], buffer[:count]
        states = self.hidden.index_select(0, self.live[rows])
        for start in range(0, count, size):
            part = self._padded(states[start : start + size])
            chunk_logits(part, self.weight, self.bias, buffer[start : start + size])
        if self.rounding or self.allowed is not None:
            scalars = (self.head.logit_scale, self.head.softcap)
            apply_sampling(buffer[:count], self.allowed, self.live[rows], self.rounding, *scalars)
        return states, buffer[:count]

    def _padded(self, states: Tensor) -> Tensor:
        """Return the states of a chunk with rows of zeros up to C."""
        missing = self.head.chunk_tokens - states.shape[0]
        return states if missing == 0 else torch.cat((states, states.new_zeros(missing, states.shape[1])))

    def scalars(self) -> dict[str, Any]:
        """Return the keyword arguments of the row kernels."""
        return kernel_scalars(self.allowed, self.head.logit_scale, self.head.softcap, self.head.ignore_index)

    def forward_rows(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (logprobs, entropy, logsumexp, residual) of one chunk."""
        index = self.live[rows]
        if self.head.observe is not None:
            self.head.observe(index, logits)
        return forward_rows(
            self.head.backend, logits, self.labels[index], self.inv_temperature[index], **self.scalars()
        )

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return room for what `forward_rows` returns of all live rows."""
        n, dtype, device = self.live.numel(), _wide(self.hidden.dtype), self.hidden.device
        sizes = (n, n, n, n if choice.needs_lse_residual(self.head.backend) else 0)
        first, second, third, fourth = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
        return first, second, third, fourth

    def backward_rows(
        self,
        rows: slice,
        logits: Tensor,
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """Turn the logits of one chunk into their gradient, in place."""
        index = self.live[rows]
        labels, inv_temperature, head = self.labels[index], self.inv_temperature[index], self.head
        scalars = (head.logit_scale, head.softcap, head.ignore_index)
        return prepared_backward_rows(
            head.backend, logits, labels, inv_temperature, outputs, grads, self.allowed, *scalars
        )

    def scattered(self, values: Tensor) -> Tensor:
        """Return values of the live rows (L, ...) at their places among all rows (N, ...), 0 elsewhere."""
        full = values.new_zeros((self.labels.numel(), *values.shape[1:]))
        return full.index_copy_(0, self.live, values)


def blocks(n: int, chunk_tokens: int, units: Sequence[int] | None) -> Iterator[slice]:
    """Yield consecutive ranges of the n live rows: chunks, or as many whole units as `BLOCK_CHUNKS` chunks hold.

    A unit (a sequence) is never split: one that is longer than that is a block of its own.
    """
    if units is None:
        for start in range(0, n, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, n))
        return
    start = stop = 0
    for length in units:
        if stop > start and stop + length - start > BLOCK_CHUNKS * chunk_tokens:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


def _keep(found: tuple[Tensor, ...], rows: slice, values: tuple[Tensor, ...]) -> None:
    """Write the outputs of some rows to their places among those of all live rows."""
    for out, value in zip(found, values, strict=True):
        if out.numel():
            out[rows] = value
