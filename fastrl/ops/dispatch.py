"""Which backend runs the vocabulary operation, and why.

A named backend is used or refused. "auto" takes the fastest one that is known to be right on the device, and
`explain` says why.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "cpu", "triton")
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
    """Return whether the C++ row kernels can be used, and why not; they are built here if they have not been."""
    from fastrl import csrc_loader

    return csrc_loader.cpu_available(build=True)


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def choose(backend: str, device: torch.device) -> Choice:
    """Return the backend to use on `device`; raise where a named one cannot be used."""
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
    if device.type in GPU_TYPES:
        available, reason = triton_available(device)
        return Choice("triton", reason) if available else Choice("torch", reason)
    if device.type == "cpu":
        available, reason = cpu_available()
        if not available:
            _say_once(f"CPU tensors go through PyTorch's row kernels, not the faster C++ ones: {reason}")
        return Choice("cpu", reason) if available else Choice("torch", reason)
    return Choice("torch", f"no kernels for {device.type}")


def kernel_runs(backend: str, device: torch.device) -> bool:
    """Return whether an operation that has a Triton kernel and a PyTorch form runs the kernel; "auto" never interprets.

    Raises:
        ValueError, RuntimeError: another backend than "auto", "torch", "triton", or one that cannot run here.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend must be one of 'auto', 'torch', 'triton', got {backend!r}")
    if backend == "auto":
        return device.type in GPU_TYPES and triton_available(device)[0]
    return choose(backend, device).backend == "triton"


def keeps_residual(backend: str) -> bool:
    """Return whether the backend's backward wants what rounding took from the log-sum-exp, beside the outputs.

    The others sum the row again where its log-prob does not give the normaliser well enough.
    """
    return backend == "triton"


def row_kernels(backend: str) -> ModuleType:
    """Return the module with `token_logprobs_fwd` and `token_logprobs_bwd` of a chosen backend."""
    if backend == "triton":
        from fastrl_kernels import token_logprobs

        return token_logprobs
    if backend == "cpu":
        from fastrl import csrc_loader

        return csrc_loader
    from fastrl.ops import rows_torch

    return rows_torch


def explain(device: str | torch.device = "cpu", backend: str = "auto") -> dict[str, str]:
    """Return, per operation, which backend runs on `device` and why.

    Args:
        device: the device of the tensors, for example "cuda" or "cpu".
        backend: what would be passed as `backend`.

    Returns:
        A dictionary from operation to "backend: reason"; a named backend that cannot be used says so.
    """
    device = torch.device(device)
    try:
        chosen, reason = choose(backend, device)
        vocabulary = f"{chosen}: {reason}"
    except RuntimeError as error:
        vocabulary = f"refused: {error}"
        chosen = "torch"
    pointwise = chosen if chosen == "triton" else "torch"
    return {
        "token_logprobs": vocabulary,
        "linear_token_logprobs": vocabulary,
        "policy_loss": f"{pointwise}: token arithmetic beside the {chosen} row kernels",
        "group_advantages": f"{pointwise}: one number per completion",
        "segment_sum": f"{pointwise}: one number per sequence",
        "reverse_scan": f"{pointwise}: the recurrences of gae and returns",
    }
