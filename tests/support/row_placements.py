"""One matrix of logits at many places in memory: Triton compiles a kernel for each kind of address and stride."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def placements(logits: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, copy) with rows of every kind of stride and first addresses of every kind of alignment.

    Around the rows stands NaN, so that an entry read from there shows.
    """
    n, v = logits.shape

    def place(stride: int, offset: int) -> Tensor:
        storage = logits.new_full((offset + n * stride + v,), float("nan"))
        rows = storage.as_strided((n, v), (stride, 1), offset)
        rows.copy_(logits)
        return rows

    for name, stride in {
        "compact": v,
        "one more": v + 1,
        "padded to 16": -(-v // 16) * 16,
        "padded to 64": -(-v // 64) * 64,
        "padded to 128": -(-v // 128) * 128,
    }.items():
        for offset in (0, 1, 8):
            yield f"{name}, from entry {offset}", place(stride, offset)
    yield "vocabulary stride 2", logits.repeat_interleave(2, 1)[:, ::2]
    yield "transposed", logits.T.contiguous().T
