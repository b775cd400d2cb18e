"""A stand-in for one CUDA device, for machines without: tensors say that they are on `cuda`, and compute on the CPU.

Inside `stand_in()` every tensor names `cuda:0` as its device, so that the code takes its CUDA branches with real
numbers, the Triton kernels in the interpreter. `torch.mm` with `out_dtype`, pinned memory, streams and events are
those of the CPU, held to what CUDA accepts. What it cannot show: the compiled kernels, their speed, and a tensor left
on the host by mistake, but for those that our own code makes without naming a device (`Record.made_on_host`).
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastrl.ops import live_rows

ROOT = Path(__file__).resolve().parents[2]
OURS = (str(ROOT / "fastrl"), str(ROOT / "kernels"))
DEVICE = torch.device("cuda", 0)
FACTORIES = {
    getattr(torch, name)
    for name in ("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
                 "randperm", "scalar_tensor", "tensor", "zeros")
}  # fmt: skip
# What makes the host wait for a device: it asks for a value, for a number of elements, or sends memory of its own.
WAITING = {
    Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.nonzero,
    Tensor.masked_select, Tensor.cpu, Tensor.numpy, Tensor.unique, torch.nonzero, torch.masked_select, torch.unique,
    torch.unique_consecutive, torch.bincount, torch.repeat_interleave, torch.equal, torch.allclose,
}  # fmt: skip
# What `torch.use_deterministic_algorithms` refuses of floats on CUDA, among the functions that we might call.
SCANS = {Tensor.cumsum, torch.cumsum}
HALVES = (torch.float16, torch.bfloat16)


@dataclass
class Record:
    """What our own code did: file and line of each, in order."""

    waits: list[str] = field(default_factory=list)
    made_on_host: list[str] = field(default_factory=list)
    nondeterministic: list[str] = field(default_factory=list)
    products: list[tuple[torch.dtype, torch.dtype]] = field(default_factory=list)
    """(dtype of the operands, of the result) of the matrix products that named a result dtype."""


def _our_line() -> str | None:
    """Return "file:line function" of the innermost frame of our own code that is no kernel, if it asked for this."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_code.co_filename == __file__ or "torch" in frame.f_code.co_filename.split("/")
    ):
        frame = frame.f_back
    if frame is None or not frame.f_code.co_filename.startswith(OURS):
        return None
    return f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {frame.f_code.co_name}"


def _on_cpu(value: Any) -> Any:
    """Return an argument with the device replaced where it names one."""
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == "cuda" else value
    return "cpu" if isinstance(value, str) and value.partition(":")[0] == "cuda" else value


class _Mode(TorchFunctionMode):
    def __init__(self, record: Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if func(*args).type == "cpu" else func(*args)
        if func == Tensor.is_cuda.__get__:
            return True
        if func in (Tensor.backward, torch.autograd.grad):
            # The engine calls our backward functions, which must see the device too.
            with self:
                return _without_override(func, args, kwargs)
        self._note(func, args, kwargs)
        kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        kwargs.pop("pin_memory", None)
        if func in (Tensor.to, Tensor.new_empty, Tensor.new_zeros, Tensor.type):
            args = tuple(_on_cpu(value) for value in args)
        if func is Tensor.cuda:
            return args[0]
        if func in (torch.mm, Tensor.mm) and "out_dtype" in kwargs:
            return self._product(*args, **kwargs)
        return func(*args, **kwargs)

    def _note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        waits = func in WAITING
        if func in FACTORIES:
            device = kwargs.get("device")
            # Python numbers reach a device through a copy that the host waits for.
            waits = device is not None and func in (torch.tensor, torch.as_tensor)
            if device is None and not kwargs.get("pin_memory") and (line := _our_line()) is not None:
                self.record.made_on_host.append(line)
        if func in SCANS and args[0].is_floating_point() and (line := _our_line()) is not None:
            self.record.nondeterministic.append(line)
        if func is Tensor.__getitem__ and isinstance(args[1], Tensor) and args[1].dtype == torch.bool:
            waits = True
        if waits and (line := _our_line()) is not None:
            self.record.waits.append(line)

    def _product(self, a: Tensor, b: Tensor, *, out_dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return torch.mm(a, b, out_dtype=...) under CUDA's rules."""
        assert a.dim() == b.dim() == 2
        assert a.dtype == b.dtype, (a.dtype, b.dtype)
        assert out_dtype == a.dtype or (out_dtype == torch.float32 and a.dtype in HALVES), (a.dtype, out_dtype)
        assert out is None or (out.dtype == out_dtype and out.shape == (a.shape[0], b.shape[1]))
        self.record.products.append((a.dtype, out_dtype))
        product = a.to(out_dtype) @ b.to(out_dtype)
        return product if out is None else out.copy_(product)


def _without_override(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function that starts the backward pass with its own check for overrides turned off."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (torch._tensor, torch.autograd):
            for name in ("has_torch_function_unary", "has_torch_function"):
                if hasattr(module, name):
                    patch.setattr(module, name, lambda *_: False)
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """A generator of the CPU for any device."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, _on_cpu(device))


class _Event:
    """A CUDA event of a device that has always finished."""

    def __init__(self, enable_timing: bool = False) -> None:
        self._recorded = False

    def record(self, stream: Any = None) -> None:
        self._recorded = True

    def synchronize(self) -> None:
        assert self._recorded

    def elapsed_time(self, later: _Event) -> float:
        assert self._recorded
        assert later._recorded
        return 1.0


@contextlib.contextmanager
def stand_in() -> Iterator[Record]:
    """Make every tensor say that it is on a CUDA device; yields what our code asked of it."""
    record, mode = Record(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda _=None: None)
        patch.setattr(torch.cuda, "_sleep", lambda cycles: None, raising=False)
        patch.setattr(torch.cuda, "Event", _Event)
        patch.setattr(torch.cuda, "current_stream", lambda _=None: types.SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "get_device_capability", lambda _=None: (9, 0))
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _=None: None)
        patch.setattr(torch.cuda, "memory_allocated", lambda _=None: 0)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _=None: 1)
        properties = types.SimpleNamespace(name="Stand-in", total_memory=2**30, major=9, minor=0)
        patch.setattr(torch.cuda, "get_device_properties", lambda _=None: properties)
        patch.setattr(torch, "Generator", _Generator)
        assert live_rows.is_asynchronous(DEVICE)
        mode = _Mode(record)
        with _operations_inside(mode), mode:
            yield record


@contextlib.contextmanager
def _operations_inside(mode: _Mode) -> Iterator[None]:
    """Let the bodies of our custom operations see the device: PyTorch leaves the mode where it calls them."""
    from torch._library.custom_ops import OPDEFS

    kept: list[tuple[dict[Any, Any], Any, Any]] = []
    for op in list(OPDEFS.values()):
        if not str(getattr(op, "_qualname", "")).startswith("fastrl::"):
            continue
        for place, function in op._backend_fns.items():

            def inside(*args: Any, _function: Any = function, **kwargs: Any) -> Any:
                with mode:
                    return _function(*args, **kwargs)

            kept.append((op._backend_fns, place, function))
            op._backend_fns[place] = inside
    try:
        yield
    finally:
        for table, place, function in kept:
            table[place] = function
