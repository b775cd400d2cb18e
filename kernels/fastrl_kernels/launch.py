"""Helpers of every kernel launch: device, tiles, arguments and compile options."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from torch import Tensor

# With the compiler free to fuse multiplications into additions, one helper could round differently in two kernels, and
# an on-policy ratio would no longer be 1 bit for bit. Triton's own default changes from on to off in 3.10.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter (`TRITON_INTERPRET=1`), where tensors may be on the CPU."""
    return triton.knobs.runtime.interpret


@contextlib.contextmanager
def on_device_of(tensor: Tensor) -> Iterator[None]:
    """Make the device of `tensor` current, because Triton launches on the current device.

    Interpreted kernels compute in NumPy, which warns about inf - inf or log(0). A GPU gives NaN or -inf quietly, so
    these warnings are off here.
    """
    with contextlib.ExitStack() as stack:
        if tensor.device.type != "cpu":
            stack.enter_context(torch.get_device_module(tensor.device).device(tensor.device))
        if interpreting():
            stack.enter_context(np.errstate(all="ignore"))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore", RuntimeWarning)
        yield


@dataclass(frozen=True)
class Tile:
    """How one program walks a row."""

    block: int
    """Entries per step."""
    num_warps: int
    """Warps per program."""


TileTable = dict[int, tuple[tuple[int, Tile], ...]]
"""Bytes per element -> (largest row length, tile) in rising order. The last band takes every longer row."""


def tile_for(table: TileTable, dtype: torch.dtype, length: int) -> Tile:
    """Return the tile of the first band of `dtype` that holds rows of `length` entries."""
    bands = table[dtype.itemsize]
    return next((tile for largest, tile in bands if length <= largest), bands[-1][1])


def slope_and_factor(logit_scale: float, softcap: float) -> tuple[float, float]:
    """Return (slope, factor) with z * T = factor * tanh(slope * x) under a softcap, else factor * slope * x."""
    if softcap:
        return logit_scale / softcap, softcap
    return math.copysign(1.0, logit_scale), abs(logit_scale)


def matrix_arguments(x: Tensor) -> tuple[Tensor, int, int]:
    """Return the kernel's (pointer, row stride, column stride) of a matrix."""
    return x, x.stride(0), x.stride(1)


def row_arguments(labels: Tensor, inv_temperature: float | Tensor) -> tuple[Tensor, int, Tensor | None, int, float]:
    """Return the labels' (pointer, stride) and the temperature's (pointer, stride, scalar), per row or for all rows."""
    if isinstance(inv_temperature, Tensor):
        return labels, labels.stride(0), inv_temperature, inv_temperature.stride(0), 1.0
    return labels, labels.stride(0), None, 0, float(inv_temperature)


def upstream_arguments(*grads: Tensor | None) -> list[Tensor | int | None]:
    """Return the kernel's (pointer, stride) of each upstream gradient, (None, 0) for a missing one."""
    return [argument for x in grads for argument in ((None, 0) if x is None else (x, x.stride(0)))]


def launch_options(tile: Tile) -> dict[str, Any]:
    """Return the options of a launch with this tile."""
    return {"num_warps": tile.num_warps, **COMPILE_OPTIONS}


def result_dtype(logits: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic of rows and of their results."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
