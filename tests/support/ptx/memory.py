"""The tensors of a launch, by address: global memory is host memory, and anything else is out of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ptx.text import UNSIGNED


class Buffer:
    """A tensor that a kernel may touch, as bytes; `start` and `stop` are addresses."""

    def __init__(self, start: int, stop: int, storage: np.ndarray, base: int, name: str) -> None:
        self.start, self.stop, self.base, self.name = start, stop, base, name
        self.views = {width: storage[: len(storage) // width * width].view(UNSIGNED[width]) for width in (1, 2, 4, 8)}
        self.shadow: Any = None  # the checker's record of accesses


class Memory:
    """The tensors that were passed to a launch."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(self, tensor: Tensor, name: str = "") -> None:
        """Declare a tensor. Views of one storage become one buffer, from the first to the last byte of any of them."""
        if tensor.numel() == 0:
            return
        extent = sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        start = tensor.data_ptr()
        stop = start + extent * tensor.element_size()
        storage = tensor.untyped_storage()
        for old in self.buffers:
            if old.base == storage.data_ptr():
                old.start, old.stop = min(old.start, start), max(old.stop, stop)
                old.name += "|" + name
                return
        flat = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        self.buffers.append(Buffer(start, stop, flat, storage.data_ptr(), name))

    def find(self, low: int, high: int) -> Buffer | None:
        """Return the tensor that holds all addresses of [low, high), if one does."""
        return next((buffer for buffer in self.buffers if buffer.start <= low and high <= buffer.stop), None)
