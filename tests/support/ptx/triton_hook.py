"""Run Triton's launches on CPU tensors, by interpreting the PTX that Triton compiles for a target.

`install` replaces `JITFunction.run` for the life of the process. A launch is specialised and compiled as a device's
would be, up to PTX: ptxas does not run. `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ptx.machine import Options, launch
from ptx.memory import Memory
from ptx.text import Kernel, parse


@dataclass(frozen=True)
class Launch:
    """A launch as it was made, to be made again with another kernel."""

    kernel: Kernel
    blocks: int
    threads: int
    shared_bytes: int
    arguments: list[Any]
    """Tensors stand for their addresses."""

    def run(self, kernel: Kernel, options: Options) -> list[torch.Tensor]:
        """Run a kernel over copies of the tensors; return the copies."""
        memory, values = Memory(), []
        copies = copied(self.arguments)
        for i, argument in enumerate(copies):
            if isinstance(argument, torch.Tensor):
                memory.add(argument, f"argument {i}")
                values.append(argument.data_ptr())
            else:
                values.append(argument)
        size = self.shared_bytes
        launch(kernel, self.blocks, self.threads, values, memory=memory, shared_bytes=size, options=options)
        return [x for x in copies if isinstance(x, torch.Tensor)]


@dataclass
class Session:
    """A target, the options of its launches, what is compiled, and counts for the summary."""

    target: GPUTarget
    options: Options
    compiled: dict[Any, tuple[Kernel, dict[str, str], int, int]] = field(default_factory=dict)
    binders: dict[Any, Any] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    recorded: list[Launch] | None = None
    """Launches are appended where this is a list."""

    def kernel_of(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return (kernel, signature, threads, shared bytes) of a launch, and its arguments by name."""
        kwargs = kwargs | {"debug": False}
        if function not in self.binders:
            backend = make_backend(self.target)
            binder = create_function_from_signature(function.signature, function.params, backend)
            self.binders[function] = backend, binder
        backend, binder = self.binders[function]
        bound, specialization, options = binder(*args, **kwargs)
        key = (function, str(specialization), str(options))
        if key not in self.compiled:
            started = time.perf_counter()
            options, signature, constexprs, attrs = function._pack_args(backend, kwargs, bound, specialization, None)
            source = ASTSource(function, signature, constexprs, attrs)
            text, metadata = ptx_of(source, self.target, options)
            kernel = parse(text)[metadata["name"]]
            self.compiled[key] = kernel, signature, 32 * metadata["num_warps"], metadata["shared"]
            self.seconds["compile"] += time.perf_counter() - started
        return self.compiled[key], bound

    def run(self, function: Any, args: tuple[Any, ...], grid: Any, kwargs: dict[str, Any]) -> None:
        """Launch a kernel."""
        (kernel, signature, threads, shared_bytes), bound = self.kernel_of(function, args, kwargs)
        grid = grid(bound) if callable(grid) else grid
        blocks, *others = tuple(grid)
        if any(count != 1 for count in others):
            raise ValueError(f"grids of one dimension only, got {tuple(grid)}")
        memory, arguments = Memory(), []
        for name, kind in signature.items():
            value = bound[name]
            if kind == "constexpr":
                continue
            if isinstance(value, torch.Tensor):
                memory.add(value, name)
                arguments.append(value)
            else:
                arguments.append(float(value) if kind in ("fp32", "fp64") else int(value))
        arguments += [0] * (len(kernel.params) - len(arguments))  # Triton's scratch pointers
        if self.recorded is not None:
            self.recorded.append(Launch(kernel, blocks, threads, shared_bytes, copied(arguments)))
        values = [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments]
        started = time.perf_counter()
        try:
            launch(kernel, blocks, threads, values, memory=memory, shared_bytes=shared_bytes, options=self.options)
        finally:
            self.launches[function.__name__] += 1
            self.seconds["run"] += time.perf_counter() - started


def copied(arguments: list[Any]) -> list[Any]:
    """Return arguments with copies of the tensors; one that is passed twice, as for work in place, stays one."""
    copies = {x.data_ptr(): x.clone() for x in arguments if isinstance(x, torch.Tensor)}
    return [copies[x.data_ptr()] if isinstance(x, torch.Tensor) else x for x in arguments]


def without_ptxas(*stage: Any) -> Any:
    """Leave the last stage of a compilation out; called without arguments, name this in the key of Triton's cache."""
    if not stage:
        return "without ptxas", "without ptxas"
    stages = stage[1]
    stages["cubin"] = lambda source, metadata: b""
    return None


def ptx_of(source: ASTSource, target: GPUTarget, options: Any) -> tuple[str, dict[str, Any]]:
    """Return the PTX of a kernel, and its name, warps and bytes of shared memory."""
    before = knobs.runtime.add_stages_inspection_hook
    knobs.runtime.add_stages_inspection_hook = without_ptxas
    try:
        result = triton.compile(source, target, options.__dict__)
    finally:
        knobs.runtime.add_stages_inspection_hook = before
    return result.asm["ptx"], {name: getattr(result.metadata, name) for name in ("name", "num_warps", "shared")}


def install(session: Session) -> None:
    """Send every launch of the process to a session."""

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        session.run(self, args, grid, kwargs)

    JITFunction.run = run  # pyright: ignore[reportAttributeAccessIssue]
