"""The proof that every adapter gives of itself: on first use its numbers are compared with the host's own.

An adapter that reads a model's head must know everything that the model does to its logits: scale, softcap, bias,
temperature, precision. Lists of model families go stale, so what was read is measured: on a few tokens the adapter's
log-probs (and whatever else it replaces) stand beside those of the host's own code, and a difference beyond what the
host's precision explains raises before anything has been trained.

Legend: K tokens that are compared, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

TOKENS = 32
"""Tokens that a proof looks at: with a vocabulary of 151,936 their float32 logits take 19 MB."""

ROUNDINGS = 4
"""Times that a host rounds a logit to its own precision: product or bias, scale, softcap, temperature."""


class AdapterMismatchError(RuntimeError):
    """An adapter's numbers differ from the host's by more than rounding."""


def sampled_tokens(n: int, device: torch.device | str, count: int = TOKENS) -> Tensor:
    """Return the indices (K,) of min(n, count) tokens spread evenly over n."""
    if n <= count:
        return torch.arange(n, device=device)
    return torch.linspace(0, n - 1, count, dtype=torch.float64).round().long().to(device)


def logit_error(largest: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Return how far the logits of a host's rows may be from the exact ones, (K,).

    Args:
        largest: (K,) the largest absolute logit of each row, after scale, softcap and temperature.
        dtype: the precision in which the host forms its logits.
        terms: D, the products that a logit sums, in float32 at least.
    """
    stored = ROUNDINGS * torch.finfo(dtype).eps / 2.0
    summed = math.sqrt(terms) * torch.finfo(torch.float32).eps
    return largest.clamp(min=1.0) * (stored + summed)


def allowances(error: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Return the largest differences that rows of logits wrong by `error` (K,) explain, per quantity.

    With |dz_v| <= e: |d logsumexp| <= e, so a log-prob moves by at most 2 e; dH = -sum_v p_v (log p_v + H) dz_v, at
    most 2 log(V) e; log sum p^2 = logsumexp(2 z) - 2 logsumexp(z), at most 4 e; a mean of logits by e.
    """
    return {
        "logprobs": 2.0 * error,
        "logsumexp": error,
        "entropy": 2.0 * max(math.log(max(vocabulary, 2)), 1.0) * error,
        "log_sum_squared_probs": 4.0 * error,
        "mean_logits": error,
    }


def prove(
    adapter: str,
    ours: Mapping[str, Tensor | None],  # name -> (K,)
    host: Mapping[str, Tensor | None],  # name -> (K,)
    *,
    largest_logit: Tensor,  # (K,)
    dtype: torch.dtype,
    terms: int,
    vocabulary: int,
    undo: str,
) -> bool:
    """Compare an adapter's numbers on a few tokens with the host's own; return whether anything could be compared.

    Args:
        adapter: what is being proved, for the message.
        ours: "logprobs", and whichever of "entropy", "logsumexp", "log_sum_squared_probs", "mean_logits" the adapter
            replaces; None entries are left out.
        host: the same quantities of the same tokens from the host's own code, unpatched.
        largest_logit: the largest absolute logit of each row, after scale, softcap and temperature.
        dtype: the precision in which the host forms its logits.
        terms: D.
        vocabulary: V.
        undo: how the user switches the adapter off, for the message.

    Returns:
        False where no token could be compared (none is there, or the host's numbers are not finite): prove again at the
        next call.

    Raises:
        AdapterMismatchError: a difference that the host's precision does not explain, or a number of ours that is not
            finite where the host's is. The message names the quantity, the token and both values.
        ValueError: quantities without an allowance, or that only one side has.
    """
    present = {name for name, value in ours.items() if value is not None}
    if present != {name for name, value in host.items() if value is not None}:
        raise ValueError(f"{adapter}: both sides must have the same quantities, got {sorted(ours)} and {sorted(host)}")
    largest = _flat(largest_logit).nan_to_num(nan=1.0, posinf=1.0)
    limits = allowances(logit_error(largest, dtype, terms), vocabulary)
    unknown = sorted(present - set(limits))
    if unknown:
        raise ValueError(f"{adapter}: no allowance for {', '.join(unknown)}; known: {', '.join(limits)}")
    compared = False
    for name in sorted(present):
        mine, theirs = _flat(ours[name]), _flat(host[name])
        if mine.shape != theirs.shape or mine.shape != largest.shape:
            raise AdapterMismatchError(
                f"{adapter}: {name} has {mine.numel()} values where the host has {theirs.numel()}, for "
                f"{largest.numel()} tokens; {undo}"
            )
        known = theirs.isfinite()
        compared = compared or bool(known.any())
        difference = torch.where(known, (mine - theirs).abs(), 0.0).nan_to_num(nan=math.inf)
        excess = difference / limits[name]
        if excess.numel() and float(excess.max()) > 1.0:
            worst = int(excess.argmax())
            raise AdapterMismatchError(
                f"{adapter} does not reproduce the host: {name} of compared token {worst} is {float(mine[worst]):.7g}, "
                f"the host's own {float(theirs[worst]):.7g}; the difference {float(difference[worst]):.3g} exceeds "
                f"{float(limits[name][worst]):.3g}, what {dtype} logits explain. The model does something to its "
                f"logits that the adapter does not know (scale, softcap, bias, temperature, an adapter on the head); "
                f"{undo}"
            )
    return compared


def _flat(value: Any) -> Tensor:
    return value.detach().to("cpu", torch.float64).reshape(-1)


class FirstUse:
    """Remembers what has been proved, so that each setting pays for its proof once per process."""

    def __init__(self) -> None:
        self._proved: set[Hashable] = set()
        self._lock = threading.Lock()

    def once(self, key: Hashable, attempt: Callable[[], bool]) -> None:
        """Run `attempt` unless `key` is proved; it counts as proved when it returns True and is repeated otherwise."""
        if key in self._proved:
            return
        if attempt():
            with self._lock:
                self._proved.add(key)

    def forget(self) -> None:
        """Prove everything anew from here on."""
        with self._lock:
            self._proved.clear()
