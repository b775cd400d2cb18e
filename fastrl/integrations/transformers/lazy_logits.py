"""Logits that are not there: what a model's own forward sees in place of the output of its head.

The forward of a causal language model multiplies by the head, scales or caps the result, and hands it to a
cross-entropy. `UnformedLogits` goes through that code in place of the (..., V) tensor: it remembers the scale, the cap
and which rows are meant, and at the cross-entropy it has everything that the fused operation needs. What a family does
to its logits is thus read from what its code does, in its own order; an operation that the fused one does not have
raises, by name.

Legend: N rows of hidden states, D hidden, V vocabulary.
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
    """One elementwise operation on the logits: `factor` is its multiplier, or None for tanh."""

    factor: float | None

    def apply(self, logits: Tensor) -> Tensor:
        """Return the operation on real logits."""
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
    """What the model's loss asks of the logits."""

    hidden: Tensor  # (..., D) as given to the head
    labels: Tensor  # (N,) label of every row of `hidden`, `ignore_index` where the loss asks for none
    ignore_index: int
    reduction: str
    steps: tuple[Step, ...]
    rows: Tensor | None  # which of the N rows the loss asks for; None: all, in order
    vocabulary: int  # the first entries of the head that count; the others are padding


Compute = Callable[[CrossEntropy], Tensor]


@dataclass(frozen=True)
class UnformedLogits:
    """The (..., V) logits of hidden states (..., D), as far as a forward may look at them."""

    hidden: Tensor  # (..., D)
    vocabulary: int
    compute: Compute
    dtype: torch.dtype
    steps: tuple[Step, ...] = ()
    rows: Tensor | None = None
    """Index among the N rows of `hidden` of every row of these logits; None: all, in the shape of `hidden`."""

    # --- what can be asked without the values ---

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

    # --- what leaves the values as they are ---

    def float(self) -> UnformedLogits:
        """Return the same: the logits are float32 where they are formed."""
        return self.to(torch.float32)

    def to(self, *args: Any, dtype: torch.dtype | None = None, device: Any = None, **unused: Any) -> UnformedLogits:
        """Return the same logits under another dtype; another device raises."""
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

    def contiguous(self) -> UnformedLogits:
        """Return the same logits, whose leading dimensions `view` may merge after a slice."""
        return self if self.rows is None else replace(self, rows=self.rows.contiguous())

    def view(self, *shape: Any) -> UnformedLogits:
        """Return the logits with other leading dimensions; the vocabulary stays the last one."""
        return replace(self, rows=self._rows().view(*self._leading(shape)))

    def reshape(self, *shape: Any) -> UnformedLogits:
        """Return what `view` returns, of logits that need not be contiguous."""
        return replace(self, rows=self._rows().reshape(*self._leading(shape)))

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> UnformedLogits:
        """Return the logits with leading dimensions merged into one."""
        first, last = start_dim % self.ndim, end_dim % self.ndim
        if last == self.ndim - 1:
            raise _refused("flatten of the vocabulary")
        return replace(self, rows=self._rows().flatten(first, last))

    def _leading(self, shape: tuple[Any, ...]) -> tuple[int, ...]:
        """Return the leading sizes that a view asks for, its last one being the vocabulary."""
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

    def __getitem__(self, index: Any) -> UnformedLogits:
        """Return some of the rows, chosen by slices, integers or a bool mask; every row at most once."""
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
        """Return how many entries of the vocabulary a slice keeps, from the first on."""
        if not isinstance(part, slice) or part.start not in (None, 0) or part.step not in (None, 1):
            raise _refused(f"choosing among the vocabulary with {part!r}")
        return len(range(self.vocabulary)[part])

    def _rows(self) -> Tensor:
        """Return the row index of every row, made on first need."""
        if self.rows is not None:
            return self.rows
        leading = self.hidden.shape[:-1]
        return torch.arange(leading.numel(), device=self.device).view(leading)

    # --- what a head does to them ---

    def __mul__(self, factor: Any) -> UnformedLogits:
        """Return the logits times a number."""
        return replace(self, steps=(*self.steps, Step(_number(factor, "a factor on its logits"))))

    __rmul__ = __imul__ = mul = mul_ = __mul__

    def __truediv__(self, divisor: Any) -> UnformedLogits:
        """Return the logits divided by a number."""
        return replace(self, steps=(*self.steps, Step(1.0 / _number(divisor, "a divisor of its logits"))))

    __itruediv__ = div = div_ = __truediv__

    def tanh(self) -> UnformedLogits:
        """Return tanh of the logits, the middle of a softcap."""
        return replace(self, steps=(*self.steps, Step(None)))

    tanh_ = tanh

    # --- where they are needed ---

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
        """Return `torch.nn.functional.cross_entropy` of the logits, (N', V), for targets (N',)."""
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
        """Answer the functions of torch that a forward calls on its logits; any other raises."""
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
        if not isinstance(first, cls):  # a number (or a tensor of one) times the logits
            if func not in _COMMUTES:
                raise _refused(getattr(func, "__name__", str(func)))
            first, rest = rest[0], [first]
        return getattr(first, method)(*rest, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        """Refuse everything else, saying what was asked for."""
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
    # An AttributeError, so that `hasattr` and `getattr(..., default)` keep their meaning.
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
