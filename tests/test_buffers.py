"""Large buffers lie in huge pages where the system has them, and everything else is plain `torch.empty`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl.ops import buffers

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HAS_HUGE_PAGES = sys.platform == "linux" and THP.exists()
LARGE = (buffers.HUGE_PAGE_MIN_BYTES // 4,)


def flags_of(tensor: Tensor) -> set[str]:
    """Return the kernel's flags of the mapping that holds the middle of the tensor."""
    address = tensor.data_ptr() + tensor.numel() * tensor.element_size() // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return set(line.split()[1:])
    raise AssertionError("the tensor is in no mapping")


@pytest.mark.skipif(not HAS_HUGE_PAGES, reason="this system has no transparent huge pages")
def test_large_buffers_ask_for_huge_pages_and_small_ones_do_not() -> None:
    large = buffers.empty((64 << 20,), torch.uint8)
    assert "hg" in flags_of(large)
    assert "hg" not in flags_of(torch.empty(64 << 20, dtype=torch.uint8))
    assert not buffers.ask_for_huge_pages(torch.empty(16))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 7), (5,), LARGE, (3, *LARGE)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_buffers_are_those_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    want = torch.empty(shape, dtype=dtype)
    for got in (buffers.empty(shape, dtype), buffers.zeros(shape, dtype)):
        assert (got.shape, got.dtype, got.stride(), got.device) == (want.shape, dtype, want.stride(), want.device)
    assert not buffers.zeros(shape, dtype).any()


def test_what_is_not_plain_memory_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert buffers.empty(LARGE, torch.float32, "meta").device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert buffers.empty(LARGE, torch.float32).shape == LARGE
    monkeypatch.setattr(buffers.sys, "platform", "darwin")
    buffers._madvise.cache_clear()
    try:
        assert not buffers.ask_for_huge_pages(torch.empty(LARGE))
    finally:
        buffers._madvise.cache_clear()
