"""Argument checks of the public functions, and the switch for the checks that would need a device to wait.

A public function validates once, and inner code trusts it. Checks of values (labels in range, masks of 0 and 1, finite
temperatures) cost nothing on a CPU and always run there. On other devices they would stop the host until the device has
caught up, so they run only inside `checked()`. Outside it a bad value gives NaN, never a plausible number.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_checked: ContextVar[bool] = ContextVar("fastrl_checked", default=False)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# The label of a masked token: the id of no token, and not the -100 that a collator may have left under a live mask.
MASKED_LABEL = -(2**31)


@contextmanager
def checked() -> Iterator[None]:
    """Check values on every device inside this context, at the price of waiting for the device."""
    token = _checked.set(True)
    try:
        yield
    finally:
        _checked.reset(token)


def is_checked() -> bool:
    """Return whether this runs inside `checked()`."""
    return not torch.compiler.is_compiling() and _checked.get()


def checks_values(*tensors: Tensor | None) -> bool:
    """Return whether the values of these tensors may be looked at: on a CPU, or inside `checked()`."""
    if torch.compiler.is_compiling():
        return False
    present = [t for t in tensors if t is not None]
    return _checked.get() or all(t.device.type == "cpu" for t in present)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of computation and results for inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> None:
    """Raise unless `value` is among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def plain_int(name: str, value: Any) -> int:
    """Return `value`, an integer of Python or NumPy, as an int, or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    return int(value)


def plain_float(
    name: str, value: Any, *, low: float = -math.inf, high: float = math.inf, open_low: bool = False
) -> float:
    """Return `value` as a finite float inside [low, high] (or above `low` when `open_low`), or raise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    # Finite by comparisons, which torch.compile traces also where it takes the number for one that changes.
    if not -math.inf < number < math.inf or number < low or number > high or (open_low and number <= low):
        bound = f"{'>' if open_low else '>='} {low:g}" if low > -math.inf else ""
        bound += f"{' and ' if bound else ''}<= {high:g}" if high < math.inf else ""
        raise ValueError(f"{name} must be finite{' and ' if bound else ''}{bound}, got {value!r}")
    return number


def float_tensor(name: str, value: Any) -> Tensor:
    """Return `value` if it is a dense floating-point tensor on a real device, or raise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor; pass {name}.full_tensor() or the local shard")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {value.layout}")
    if value.is_quantized or value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if value.device.type == "meta" and not torch.compiler.is_compiling():
        raise ValueError(f"{name} is on the meta device and holds no values")
    return value


def vocabulary_tensor(name: str, value: Any) -> Tensor:
    """Return `value` if it is a `float_tensor` without a forward-mode tangent, or raise.

    The vocabulary operations have no forward-mode derivative, and without `requires_grad` PyTorch would drop the
    tangent in silence, which reads as a derivative of zero.
    """
    float_tensor(name, value)
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} carries a forward-mode tangent (torch.func.jvp, forward_ad): fastrl operations are differentiable "
            "in reverse mode only; use fastrl.reference for forward mode"
        )
    return value


def labels(
    name: str, value: Any, shape: torch.Size, device: torch.device, vocabulary: int, ignore_index: int
) -> Tensor:
    """Return `value` as an integer tensor of `shape` whose entries are ids or `ignore_index`, or raise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32) or value.layout != torch.strided:
        raise TypeError(f"{name} must be dense int64 or int32, got {value.dtype}, layout {value.layout}")
    plain_int("ignore_index", ignore_index)
    _label_shape(name, value, shape)
    same_device(name, value, device)
    if checks_values(value) and value.numel():
        bad = ((value < 0) | (value >= vocabulary)) & (value != ignore_index)
        if bool(bad.any()):
            where = bad.nonzero()[:4].tolist()
            free = "where the mask is 1" if ignore_index == MASKED_LABEL else f"or ignore_index={ignore_index}"
            raise ValueError(
                f"{name} must be in [0, V={vocabulary}) {free}, got "
                f"{value[bad][:4].tolist()} at {where} ({int(bad.sum())} in all)"
            )
    return value


def masked_labels(
    value: Any,
    mask: Any,
    source: Any,  # (..., V) or (..., D)
    name: str,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """Return (labels with `MASKED_LABEL` outside the mask, the mask as `keep_mask` returns it), or raise.

    A label of -100 at a live token is refused later. `source`, called `name`, are the logits or hidden states of the
    labels; their shape tells whether the labels or the mask is wrong.
    """
    float_tensor(name, source)
    if not isinstance(value, Tensor):
        raise TypeError(f"labels must be a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"labels must be a dense tensor, got layout {value.layout}")
    _label_shape("labels", value, source.shape[:-1])
    same_device("labels", value, source.device)
    keep, poison = keep_mask("mask", mask, value.shape, value.device)
    # Clamped, because a live label that happens to be the mark would pass for a masked token.
    return torch.where(keep, value.clamp(min=MASKED_LABEL + 1), MASKED_LABEL), (keep, poison)


def _label_shape(name: str, value: Tensor, shape: torch.Size) -> None:
    """Raise unless `value` has `shape`. Labels that are not aligned have one place more or less."""
    got = tuple(value.shape)
    if got == tuple(shape):
        return
    unaligned = len(got) == len(shape) > 0 and got[:-1] == tuple(shape[:-1]) and abs(got[-1] - shape[-1]) == 1
    hint = ": nothing is shifted here; logits[:, :-1] go with the ids [:, 1:]" if unaligned else ""
    raise ValueError(f"{name} must have shape {tuple(shape)}, got {got}{hint}")


def same_shape(name: str, value: Tensor, shape: Sequence[int]) -> None:
    """Raise unless `value` has exactly `shape`."""
    if tuple(value.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Raise unless `value` is on `device`."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")


def temperature(value: Any, shape: torch.Size, device: torch.device) -> float | Tensor:
    """Return the temperature as a float or as a tensor expanded to `shape`, or raise. None means 1."""
    if value is None:
        return 1.0
    if not isinstance(value, Tensor):
        return plain_float("temperature", value, low=0.0, open_low=True)
    if not value.is_floating_point():
        raise TypeError(f"temperature must be a float or a floating-point tensor, got {value.dtype}")
    if value.dim() and value.device != device:
        raise ValueError(f"temperature must be on {device}, got {value.device}")
    if value.requires_grad:
        raise ValueError("temperature must not require a gradient: none is computed for it; pass temperature.detach()")
    try:
        expanded = value.to(device).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"temperature must be broadcastable to the labels' shape {tuple(shape)}, got {tuple(value.shape)}"
        ) from None
    if checks_values(value) and not bool(((value > 0) & value.isfinite()).all()):
        raise ValueError("temperature must be finite and > 0 for every token")
    return expanded


def count(name: str, value: Any, mask: Tensor | None = None, *, zero: bool = False) -> None:
    """Raise unless `value` is None, a number or a tensor of one element, above 0.

    It may be 0 when `zero`, and where `mask` has no live token: nothing is divided by it then.
    """
    if value is None:
        return
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got shape {tuple(value.shape)}")
        if not checks_values(value):
            return
        value = value.item()
    if mask is not None and value == 0 and checks_values(mask):
        zero = not bool(mask.any())
    plain_float(name, value, low=0.0, open_low=not zero)


def keep_mask(name: str, value: Any, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return (bool mask, poison): `poison` is NaN if an unchecked mask holds more than 0 and 1, or None if checked."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_complex() or value.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor of bool, int or float, got {value.dtype}, layout {value.layout}"
        )
    same_shape(name, value, shape)
    same_device(name, value, device)
    if value.dtype == torch.bool:
        return value, None
    valid = (value == 0) | (value == 1)
    if checks_values(value):
        if not bool(valid.all()):
            raise ValueError(f"{name} must hold only 0 and 1, got {value[~valid][:4].tolist()}")
        return value != 0, None
    return value != 0, torch.where(valid.all(), 0.0, math.nan)
