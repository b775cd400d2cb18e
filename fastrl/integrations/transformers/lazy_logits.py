"""Lazy logits: they record the operations of a model's forward and are never formed.

The forward of a causal language model multiplies by the head, scales or caps the logits, and calls a cross-entropy.
`LazyLogits` passes through that code in place of the (..., V) tensor. It records scale, softcap and the chosen rows, so
that at the cross-entropy it has all inputs of the fused operation. The model's code itself thus tells which operations
it applies, and in which order. An operation that the fused one does not have raises an error with its name.

Legend: N rows of hidden states, N' rows of the logits, D hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One elementwise operation on the logits: multiply by `factor`, or tanh if it is None."""

    factor: float | None

    def apply(self, logits: Tensor) -> Tensor:
        """Apply the operation to real logits."""
        return torch.tanh(logits) if self.factor is None else logits * self.factor


def head_scalars_of(steps: tuple[Step, ...]) -> tuple[float, float | None]:
    """Return (logit_scale, softcap) of z = softcap tanh(logit_scale x / softcap), or of z = logit_scale x.

    Raises ValueError for steps that are neither.
    """
    before = after = 1.0
    capped = False
    for step in steps:
        if step.factor is None:
            if capped:
                raise ValueError(
                    "the model applies tanh to its logits twice, which is not a softcap; leave it unpatched"
                )
            capped = True
        elif capped:
            after *= step.factor
        else:
            before *= step.factor
    if not capped:
        return before, None
    if after <= 0.0:
        raise ValueError(f"the softcap that the model applies to its logits must be > 0, got {after}")
    return before * after, after


@dataclass(frozen=True)
class CrossEntropy:
    """The arguments of the model's call of cross_entropy, and the operations before it."""

    hidden: Tensor  # (..., D) as given to the head
    labels: Tensor  # (N,) label of every row of `hidden`, `ignore_index` for rows that the loss leaves out
    ignore_index: int
    reduction: str
    steps: tuple[Step, ...]
    rows: Tensor | None  # (N',) indices of the rows in the loss; None: all N, in order
    vocabulary: int  # entries of the head that count, from the first on; the others are padding


Compute = Callable[[CrossEntropy], Tensor]


@dataclass(frozen=True)
class LazyLogits:
    """Stands for the (..., V) logits of hidden states (..., D), with their shape and dtype but without values."""

    hidden: Tensor  # (..., D)
    vocabulary: int
    compute: Compute
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()
    rows: Tensor | None = None
    """For every row of these logits its index among the N rows of `hidden`. None: all, in the shape of `hidden`."""

    # --- shape, dtype, device ---

    @property
    def shape(self) -> torch.Size:
        """Shape (..., V)."""
        leading = self.hidden.shape[:-1] if self.rows is None else self.rows.shape
        return torch.Size((*leading, self.vocabulary))

    @property
    def device(self) -> torch.device:
        """Device of the hidden states."""
        return self.hidden.device

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or one of its entries."""
        return self.shape if dim is None else self.shape[dim]

    # --- casts, views and slices ---

    def float(self) -> LazyLogits:
        """Return the same logits as float32."""
        # Only the recorded dtype changes: the fused operation computes its logits in float32 anyway.
        return self.to(torch.float32)

    def to(self, *args: Any, dtype: torch.dtype | None = None, device: Any = None, **unused: Any) -> LazyLogits:
        """Return the same logits with another dtype. Raise ValueError for another device."""
        del unused  # non_blocking, copy: nothing is moved
        for value in args:
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            elif isinstance(value, str | torch.device):
                device = value
        if device is not None and torch.empty(0, device=device).device != self.device:
            raise ValueError(f"the model moves its logits from {self.device} to {device}; leave it unpatched")
        return self if dtype is None else replace(self, dtype=dtype)

    def contiguous(self) -> LazyLogits:
        """Return the same logits, with leading dimensions that `view` can merge even after a slice."""
        return self if self.rows is None else replace(self, rows=self.rows.contiguous())

    def view(self, *shape: Any) -> LazyLogits:
        """Return the logits with other leading dimensions. The last one stays the vocabulary."""
        return replace(self, rows=self._rows().view(*self._leading(shape)))

    def reshape(self, *shape: Any) -> LazyLogits:
        """Return the logits with other leading dimensions, as `view` does, even if they are not contiguous."""
        return replace(self, rows=self._rows().reshape(*self._leading(shape)))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> LazyLogits:
        """Return the logits with leading dimensions merged into one."""
        first, last = start_dim % self.ndim, end_dim % self.ndim
        if last == self.ndim - 1:
            raise _refused("flatten of the vocabulary")
        return replace(self, rows=self._rows().flatten(first, last))

    def _leading(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the leading sizes of a view, or raise ValueError unless its last size is the vocabulary."""
        sizes = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list | torch.Size) else shape
        last = sizes[-1] if len(sizes) else None
        if last == -1 and len(sizes) > 1 and -1 not in sizes[:-1]:
            last = self.vocabulary
        if last != self.vocabulary:
            raise ValueError(
                f"the model views its logits, {tuple(self.shape)}, as {tuple(sizes)}; with a patched forward the last "
                f"dimension must stay the vocabulary, {self.vocabulary}"
            )
        return tuple(sizes[:-1])

    def __getitem__(self, index: Any) -> LazyLogits:
        """Return some of the rows, chosen by slices, integers or a bool mask."""
        # None of these takes a row twice, so every row of `hidden` has at most one label in `cross_entropy`.
        parts = index if isinstance(index, tuple) else (index,)
        for part in parts:
            if not (part is Ellipsis or isinstance(part, int | slice) or _is_mask(part)):
                raise _refused(f"indexing with {type(part).__name__}")
        leading = self.ndim - 1
        used = sum(part.ndim if isinstance(part, Tensor) else 1 for part in parts if part is not Ellipsis)
        after_ellipsis = any(part is Ellipsis for part in parts[:-1])
        if used <= leading and not after_ellipsis:
            return replace(self, rows=self._rows()[parts])
        *parts, of_vocabulary = parts
        kept = self._prefix(of_vocabulary)
        if all(part is Ellipsis or (isinstance(part, slice) and part == slice(None)) for part in parts):
            return replace(self, vocabulary=kept)
        return replace(self, rows=self._rows()[tuple(parts)], vocabulary=kept)

    def _prefix(self, part: Any) -> int:
        """Return the number of entries in a slice of the vocabulary, which must start at the first."""
        if not isinstance(part, slice) or part.start not in (None, 0) or part.step not in (None, 1):
            raise _refused(f"choosing among the vocabulary with {part!r}")
        return len(range(self.vocabulary)[part])

    def _rows(self) -> Tensor:
        """Return the index of every row, in the shape of the leading dimensions."""
        if self.rows is not None:
            return self.rows
        leading = self.hidden.shape[:-1]
        return torch.arange(leading.numel(), device=self.device).view(leading)

    # --- scale and softcap ---

    def __mul__(self, factor: Any) -> LazyLogits:
        """Return the logits multiplied by a number."""
        return replace(self, steps=(*self.steps, Step(_number(factor, "a factor on its logits"))))

    __rmul__ = __imul__ = mul = mul_ = __mul__

    def __truediv__(self, divisor: Any) -> LazyLogits:
        """Return the logits divided by a number."""
        return replace(self, steps=(*self.steps, Step(1.0 / _number(divisor, "a divisor of its logits"))))

    __itruediv__ = div = div_ = __truediv__

    def tanh(self) -> LazyLogits:
        """Return tanh of the logits, the middle of a softcap."""
        return replace(self, steps=(*self.steps, Step(None)))

    tanh_ = tanh

    # --- the loss ---

    def cross_entropy(
        self,
        target: Tensor,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Return `torch.nn.functional.cross_entropy` of the logits (N', V) and targets (N',)."""
        for name, value in (("weight", weight), ("size_average", size_average), ("reduce", reduce)):
            if value is not None:
                raise _refused(f"cross_entropy with {name}=")
        if label_smoothing != 0.0:
            raise _refused(f"cross_entropy with label_smoothing={label_smoothing}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if target.is_floating_point():
            raise _refused("cross_entropy with probabilities as targets")
        if self.ndim != 2 or target.shape != self.shape[:1]:
            raise ValueError(
                f"cross_entropy expected logits (N, V) and labels (N,), got {tuple(self.shape)} and "
                f"{tuple(target.shape)}: labels must have the tokens of the logits (logits_to_keep shortens those)"
            )
        labels = target
        if self.rows is not None:
            n_rows = self.hidden.shape[:-1].numel()
            labels = target.new_full((n_rows,), ignore_index).index_copy_(0, self.rows, target)
        asked = CrossEntropy(self.hidden, labels, ignore_index, reduction, self.steps, self.rows, self.vocabulary)
        return self.compute(asked)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function of `_FUNCTIONS` on the logits. Raise AttributeError for any other."""
        method = _FUNCTIONS.get(func)
        if method is None:
            raise _refused(getattr(func, "__name__", str(func)))
        if func is F.cross_entropy:
            bound = inspect.signature(F.cross_entropy).bind(*args, **(kwargs or {})).arguments
            logits = bound.pop("input")
            if not isinstance(logits, cls):
                raise _refused("cross_entropy with the logits as targets")
            return logits.cross_entropy(**bound)
        first, *rest = args
        if not isinstance(first, cls):  # number * logits
            if func not in _COMMUTES:
                raise _refused(getattr(func, "__name__", str(func)))
            first, rest = rest[0], [first]
        return getattr(first, method)(*rest, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Raise an error with the name of any other attribute."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise _refused(name)


_COMMUTES = (torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
_FUNCTIONS: dict[Any, str] = {
    F.cross_entropy: "cross_entropy",
    torch.tanh: "tanh",
    **dict.fromkeys(_COMMUTES, "mul"),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide), "div"),
}


def _refused(what: str) -> AttributeError:
    # AttributeError, because a model may ask with `hasattr` or `getattr(..., default)`.
    return AttributeError(
        f"the model's forward uses {what} on its logits, which are not formed under fastrl's patch; known are a "
        "factor, a softcap, views, slices, casts and cross_entropy. Call the model without labels, or undo the patch"
    )


def _is_mask(part: Any) -> bool:
    return isinstance(part, Tensor) and part.dtype == torch.bool


def _number(value: Any, what: str) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"the model uses {what} of shape {tuple(value.shape)}; one number is supported")
        if value.requires_grad:
            raise ValueError(
                f"the model uses {what} that is trained; its gradient needs the logits, leave it unpatched"
            )
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"the model uses {what} of type {type(value).__name__}; a number is supported")
    return float(value)
