"""Memory for results of the size of the vocabulary.

On a CPU every page of a large fresh buffer costs a fault when it is first written: 201 MB in pages of 4 KiB took 67 ms,
in huge pages of 2 MiB 11 ms, as long as the row kernel that fills them. Linux gives huge pages to a process that asks
(`madvise`, where /sys/kernel/mm/transparent_hugepage/enabled says "madvise". Under "always" it gives them anyway).

The tile of logits that an operation works in is taken from `scratch`, which keeps its memory for the next operation:
on a GPU torch's allocator does that, on a CPU nothing does, and the faults of 50 MB cost 0.04 to 0.3 of the GEMM that
fills them.
"""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Below some huge pages there is nothing to gain, and the allocator may have the memory at hand already.
HUGE_PAGE_MIN_BYTES = 8 << 20
# `scratch` keeps no more than this.
SCRATCH_MAX_BYTES = 256 << 20
# References to a storage that nobody but `scratch` uses: the kept tensor's own and the one that asks.
_UNUSED = 2
_scratch_lock = threading.Lock()
_kept: list[Tensor] = []


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return `torch.empty(shape, dtype, device)`, in huge pages where it is large and the system has them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    ask_for_huge_pages(tensor)
    return tensor


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return `torch.zeros(shape, dtype, device)`, in huge pages where it is large and the system has them."""
    return empty(shape, dtype, device).zero_()


def scratch(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Return `empty(shape, dtype, device)`, on a CPU in memory that is kept for the next call.

    At most `SCRATCH_MAX_BYTES` stay with the process. `release` gives them back. Memory is handed out again only when
    no tensor, view or autograd node uses it any more, so that a result may live as long as any other tensor.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if torch.device(device).type != "cpu" or not 0 < size <= SCRATCH_MAX_BYTES or not _counts_users():
        return empty(shape, dtype, device)
    if type(torch.empty(0)) is not Tensor:  # a fake tensor's mode
        return empty(shape, dtype, device)
    with _scratch_lock:
        if not _kept or _kept[0].numel() < size or _users(_kept[0]) > _UNUSED:
            # An inference tensor could not be written to outside inference mode.
            with torch.inference_mode(False):
                fresh = empty((size,), torch.uint8)
            _kept[:] = [fresh]
        return _kept[0][:size].view(dtype).view(tuple(shape))


def _start_anew() -> None:
    """In a forked child: its other threads are gone, and with them the one that may have held the lock."""
    global _scratch_lock
    _scratch_lock = threading.Lock()
    _kept.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)


def release() -> None:
    """Give back the memory that `scratch` keeps."""
    with _scratch_lock:
        _kept.clear()


def _users(tensor: Tensor) -> int:
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # pyright: ignore[reportAttributeAccessIssue]


@functools.cache
def _counts_users() -> bool:
    """Return whether this torch tells who uses a storage, as far as can be seen from one that is known."""
    if not hasattr(torch._C, "_storage_Use_Count"):
        return False
    one = torch.empty(2)
    alone = _users(one)
    view = one[1:]
    return alone == _UNUSED and _users(view) == _UNUSED + 1


def ask_for_huge_pages(tensor: Tensor) -> bool:
    """Ask for huge pages under a large tensor on a Linux CPU, and return whether the system agreed. Never raises.

    Only pages that lie wholly inside the tensor are asked for, and only those not yet written profit. Anything that is
    not plain memory of this process (another device, a fake tensor) is left alone.
    """
    if tensor.device.type != "cpu" or type(tensor) is not Tensor or not tensor.is_contiguous():
        return False
    size = tensor.numel() * tensor.element_size()
    madvise = _madvise() if size >= HUGE_PAGE_MIN_BYTES else None
    if madvise is None:
        return False
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
    return madvise(start, stop - start, mmap.MADV_HUGEPAGE) == 0


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """Return the C library's `madvise`, or None where there is none that knows huge pages."""
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        function.restype = ctypes.c_int
    return function
