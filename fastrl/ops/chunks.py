"""The live rows of a batch in chunks of a fixed number, and their logits.

Legend: N tokens, L live tokens, C rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice, memory
from fastrl.ops.head import LinearRows
from fastrl.ops.live_rows import ActiveRows
from fastrl.ops.rows import forward_rows
from fastrl.ops.sampling import apply_sampling, kernel_scalars, prepared_backward_rows

# Chunks whose logits are held at once if a loss couples the tokens of a sequence.
BLOCK_CHUNKS = 4


# Logits are formed on a CPU in blocks of this many vocabulary rows, which stay in the cache: a chunk of 256 rows took
# 0.85 of the time of one GEMM over the vocabulary (D = 576 and V = 49152, D = 1536 and V = 151936, two threads). The
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
    """The live rows of a batch, cut into chunks of a fixed number of rows. The last one is padded with zero rows."""

    rows: LinearRows
    live: Tensor  # (L,) indices of the rows to compute
    ahead: tuple[Tensor, Tensor] | None = None
    """States (C, D) and logits (C, V) of the first chunk, queued before the number of live rows was known."""

    @classmethod
    def of(
        cls,
        rows: LinearRows,
        *,
        keep: Tensor | None = None,  # (N,) bool
        order: Tensor | None = None,  # (L,)
        ahead: bool = True,
    ) -> Chunks:
        """Return the chunks of the rows whose label is not ignored, and which `keep` marks if it is given.

        `order` gives the indices of these rows in an order of its own. They ascend if it is None.

        On an asynchronous device the host queues the logits of the first chunk before it waits for the number of rows.
        Callers that hold several chunks at once pass `ahead=False`.
        """
        if order is not None:
            return cls(rows, order)
        wanted = rows.labels != rows.options.ignore_index
        active = ActiveRows(wanted if keep is None else wanted & keep)
        chunks = cls(rows, active.order)
        if ahead and active.is_pending and rows.labels.numel() and rows.weight.numel():
            # This chunk may also hold rows of `order` that turn out not to be active: nobody looks at their logits.
            buffer = chunks.buffer(1)
            with choice.autocast_disabled(rows.hidden.device):
                states, _ = chunks.logits(slice(0, min(chunks.size, rows.labels.numel())), buffer)
            chunks.ahead = states, buffer
        chunks.live = active.indices()
        return chunks

    @property
    def size(self) -> int:
        """C, the number of rows of a chunk."""
        return self.rows.options.chunk_tokens

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of logits and results."""
        return checks.wide(self.rows.hidden.dtype)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (positions in `live`, their hidden states, their logits in a buffer that the next chunk overwrites)."""
        n, size = self.live.numel(), self.size
        buffer = self.buffer(1) if n else None
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            assert buffer is not None
            yield rows, *self.logits(rows, buffer)

    def buffer(self, chunks: int) -> Tensor:
        """Return room for the logits of some chunks."""
        if chunks == 1 and self.ahead is not None:
            return self.ahead[1]
        return memory.scratch((chunks * self.size, self.rows.weight.shape[0]), self.dtype, self.rows.hidden.device)

    def logits(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return (hidden states, logits) of live rows, the logits written to `buffer` one GEMM of a chunk at a time."""
        size, count, given = self.size, rows.stop - rows.start, self.rows
        # The first chunk is in the buffer already, if nobody has written to it since.
        if self.ahead is not None and rows.start == 0 and buffer is self.ahead[1]:
            states, self.ahead = self.ahead[0], None
            return states[:count], buffer[:count]
        states = given.hidden.index_select(0, self.live[rows])
        for start in range(0, count, size):
            part = self._padded(states[start : start + size])
            chunk_logits(part, given.weight, given.bias, buffer[start : start + size])
        if given.rounding or given.allowed is not None:
            scalars = (given.options.logit_scale, given.options.softcap)
            apply_sampling(buffer[:count], given.allowed, self.live[rows], given.rounding, *scalars)
        return states, buffer[:count]

    def _padded(self, states: Tensor) -> Tensor:
        """Return the states of a chunk with rows of zeros up to C."""
        missing = self.size - states.shape[0]
        return states if missing == 0 else torch.cat((states, states.new_zeros(missing, states.shape[1])))

    def scalars(self) -> dict[str, Any]:
        """Return the keyword arguments of the row kernels."""
        options = self.rows.options
        return kernel_scalars(self.rows.allowed, options.logit_scale, options.softcap, options.ignore_index)

    def forward_rows(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (logprobs, entropy, logsumexp, residual) of one chunk."""
        index, given = self.live[rows], self.rows
        if given.options.observe is not None:
            given.options.observe(index, logits)
        labels, inv_temperature = given.labels[index], given.inv_temperature[index]
        return forward_rows(given.options.backend, logits, labels, inv_temperature, **self.scalars())

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return room for the outputs of `forward_rows` of all live rows."""
        n = self.live.numel()
        sizes = (n, n, n, n if choice.needs_lse_residual(self.rows.options.backend) else 0)
        first, second, third, fourth = (
            torch.empty(size, dtype=self.dtype, device=self.rows.hidden.device) for size in sizes
        )
        return first, second, third, fourth

    def backward_rows(
        self,
        rows: slice,
        logits: Tensor,
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """Turn the logits of one chunk into their gradient, in place."""
        index, given, options = self.live[rows], self.rows, self.rows.options
        labels, inv_temperature = given.labels[index], given.inv_temperature[index]
        scalars = (options.logit_scale, options.softcap, options.ignore_index)
        return prepared_backward_rows(
            options.backend, logits, labels, inv_temperature, outputs, grads, given.allowed, *scalars
        )

    def scattered(self, values: Tensor) -> Tensor:
        """Return values of the live rows (L, ...) at their places among all rows (N, ...), 0 elsewhere."""
        full = values.new_zeros((self.rows.labels.numel(), *values.shape[1:]))
        return full.index_copy_(0, self.live, values)


def blocks(n: int, chunk_tokens: int, group_sizes: Sequence[int] | None) -> Iterator[slice]:
    """Yield consecutive ranges of the n live rows: chunks, or as many whole groups as `BLOCK_CHUNKS` chunks hold.

    A group (a sequence or a pair) is never split: a longer one is a block of its own.
    """
    if group_sizes is None:
        for start in range(0, n, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, n))
        return
    start = stop = 0
    for length in group_sizes:
        if stop > start and stop + length - start > BLOCK_CHUNKS * chunk_tokens:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


def _keep(found: tuple[Tensor, ...], rows: slice, values: tuple[Tensor, ...]) -> None:
    """Write the outputs of some rows to their places among all live rows."""
    for out, value in zip(found, values, strict=True):
        if out.numel():
            out[rows] = value
