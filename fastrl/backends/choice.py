"""Which backend runs the vocabulary operation, and why.

A named backend is used or refused. "auto" takes the fastest one that is known to be right on the device, and
`explain` says why.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")
logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cpu", "triton", "cuda")
GPU_TYPES = ("cuda", "xpu")


class Choice(NamedTuple):
    """A backend and the reason for it."""

    backend: str
    reason: str


def triton_available(device: torch.device) -> tuple[bool, str]:
    """Return whether the Triton kernels can run on `device`, and why not."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed (pip install triton)"
    if device.type in GPU_TYPES:
        return True, f"Triton compiles for {device.type}"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, "Triton interprets on this device (TRITON_INTERPRET=1), for tests only"
    return False, f"Triton has no {device.type} target; TRITON_INTERPRET=1 interprets the kernels, slowly"


def cpu_available() -> tuple[bool, str]:
    """Return whether the C++ row kernels can be used, and why not. Builds them if they are not built yet."""
    from fastrl.backends import cpu

    return cpu.cpu_available(build=True)


# torch.compile cannot look into the loader: the answer is a constant of the graph. This is the attribute that
# `torch.compiler.assume_constant_result` sets. The decorator itself would import the compiler with fastrl.
cpu_available._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def cuda_available(device: torch.device) -> tuple[bool, str]:
    """Return whether the CUDA row kernels can run on `device`, and why not. Builds them if they can."""
    from fastrl.backends import cuda

    return cuda.cuda_available(device, build=True)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def choose(backend: str, device: torch.device) -> Choice:
    """Return the backend to use on `device`, or raise if a named one cannot be used."""
    if torch.compiler.is_compiling():
        return Choice(_traced_choice(backend, device.type), "chosen when the graph was traced")
    return _choose(backend, device)


def _choose(backend: str, device: torch.device) -> Choice:
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "torch":
        return Choice("torch", "asked for by name; runs on every device")
    if backend == "triton":
        available, reason = triton_available(device)
        if not available:
            raise RuntimeError(f"backend 'triton' cannot run on {device}: {reason}")
        return Choice("triton", reason)
    if backend == "cpu":
        if device.type != "cpu":
            raise RuntimeError(f"backend 'cpu' needs tensors on the CPU, got {device}")
        available, reason = cpu_available()
        if not available:
            raise RuntimeError(f"backend 'cpu' cannot be used: {reason}")
        return Choice("cpu", reason)
    if backend == "cuda":
        available, reason = cuda_available(device)
        if not available:
            raise RuntimeError(f"backend 'cuda' cannot be used: {reason}")
        return Choice("cuda", reason)
    if device.type in GPU_TYPES:
        available, reason = triton_available(device)
        return Choice("triton", reason) if available else Choice("torch", reason)
    if device.type == "cpu":
        available, reason = cpu_available()
        if not available:
            _say_once(f"CPU tensors go through PyTorch's row kernels, not the faster C++ ones: {reason}")
        return Choice("cpu", reason) if available else Choice("torch", reason)
    return Choice("torch", f"no kernels for {device.type}")


def _traced_choice(backend: str, device_type: str) -> str:
    """Return the backend for a graph that is being traced, as a constant of it: building kernels is not traced."""
    return _choose(backend, torch.device(device_type)).backend


# As torch.compiler.assume_constant_result, whose call would import the compiler, and Triton, with fastrl.
_traced_choice._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]


def choose_row_statistics(backend: str, device: torch.device) -> Choice:
    """Return the backend of the row statistics, or raise as `choose`. The C++ and CUDA kernels have none."""
    if backend in ("cpu", "cuda"):
        language = "C++" if backend == "cpu" else "CUDA"
        raise RuntimeError(f"backend {backend!r} ({language}) has no row statistics; use 'auto', 'torch' or 'triton'")
    if backend == "auto" and device.type not in GPU_TYPES:
        return Choice("torch", "neither the C++ kernels nor Triton have them on this device")
    return choose(backend, device)


def graph_break(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function with a graph break around it under `torch.compile`: none of it is traced.

    As `torch.compiler.disable`, which as a decorator would import the compiler, and Triton, with fastrl.
    """

    @functools.wraps(function)
    def call(*arguments: P.args, **options: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            untraced: Callable[P, R] = torch.compiler.disable(function)  # pyright: ignore[reportAssignmentType]
            return untraced(*arguments, **options)
        return function(*arguments, **options)

    return call


def autocast_disabled(device: torch.device) -> torch.autocast:
    """Return a context without autocast. Every operation of fastrl computes in it.

    Autocast would round the operands of our matrix products to its dtype, gradients included. Here a tensor keeps its
    dtype: under autocast a trainer's bfloat16 hidden states meet a float32 head in float32.
    """
    return torch.autocast(device.type, enabled=False)


def kernel_runs(backend: str, device: torch.device) -> bool:
    """Return whether an operation that has a Triton kernel and a PyTorch form runs the kernel. "auto" never interprets.

    Raises:
        ValueError, RuntimeError: another backend than "auto", "torch", "triton", or one that cannot run here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be one of 'auto', 'torch', 'triton', got {backend!r}")
    if backend == "auto":
        return device.type in GPU_TYPES and triton_available(device)[0]
    return choose(backend, device).backend == "triton"


def companion_backend(backend: str) -> str:
    """Return the backend for the pointwise kernels next to row kernels of a chosen backend, for `kernel_runs`.

    "torch" if the user asked for "torch", as Triton may be broken here. Otherwise "auto".
    """
    return "torch" if backend == "torch" else "auto"


def needs_lse_residual(backend: str) -> bool:
    """Return whether the backend's backward takes the residual of the log-sum-exp, the part that rounding took.

    PyTorch's rows sum the row again instead.
    """
    return backend in ("triton", "cpu", "cuda")


def row_kernels(backend: str) -> ModuleType:
    """Return the module with `token_logprobs_fwd` and `token_logprobs_bwd` of a chosen backend."""
    if backend == "triton":
        from fastrl_kernels import token_logprobs

        return token_logprobs
    if backend == "cpu":
        from fastrl.backends import cpu

        return cpu
    if backend == "cuda":
        from fastrl.backends import cuda

        return cuda
    from fastrl.backends import torch_rows

    return torch_rows


def explain(device: str | torch.device = "cpu", backend: str = "auto") -> dict[str, str]:
    """Return, per operation, which backend runs on `device` and why.

    Args:
        device: the device of the tensors, for example "cuda" or "cpu".
        backend: the `backend` argument of the operations.

    Returns:
        A dictionary from operation to "backend: reason", or "refused: reason" for a named backend that cannot be used.
    """
    device = torch.device(device)
    vocabulary = _told(choose, backend, device)
    chosen = vocabulary.partition(":")[0] if not vocabulary.startswith("refused") else "torch"
    # On a GPU the token arithmetic goes through Triton whatever the rows go through.
    pointwise = "triton" if chosen == "triton" or (chosen == "cuda" and triton_available(device)[0]) else "torch"
    return {
        "token_logprobs": vocabulary,
        "linear_token_logprobs": vocabulary,
        "row_statistics": _told(choose_row_statistics, backend, device),
        "policy_loss": f"{pointwise}: token arithmetic beside the {chosen} row kernels",
        "group_advantages": f"{pointwise}: one number per completion",
        "segment_sum": f"{pointwise}: sums over sequences",
        "reverse_scan": f"{pointwise}: recurrences over sequences, of GAE and returns",
    }


def _told(chooser: Callable[[str, torch.device], Choice], backend: str, device: torch.device) -> str:
    """Return "backend: reason", or that the backend is refused and why."""
    try:
        return ": ".join(chooser(backend, device))
    except RuntimeError as error:
        return f"refused: {error}"
