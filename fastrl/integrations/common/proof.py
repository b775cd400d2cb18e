"""The proof on first use: an adapter computes a small batch with the host's own code too and compares the numbers.

An adapter must know every operation that a model applies to its logits: scale, softcap, bias, temperature, precision. A
list of model families goes stale, so the proof measures. On a few tokens it compares the adapter's log-probs, and the
other quantities that the adapter replaces, with the host's. If they differ by more than the host's precision explains,
it raises before the first training step.

`prove` compares log-probs and other statistics of rows: for transformers, trl, verl, openrlhf and slime. `prove_loss`
compares a loss and its gradient: for verl, openrlhf, slime, nemo_rl, skyrl and prime_rl.

Legend: B sequences, T time, N tokens, K tokens or sequences that are compared, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

TOKENS = 32
"""Tokens of a proof. With a vocabulary of 151,936 their float32 logits take 19 MB."""

ROUNDINGS = 4
"""How often a host rounds a logit to its own precision: product or bias, scale, softcap, temperature."""


class AdapterMismatchError(RuntimeError):
    """An adapter's numbers differ from the host's by more than rounding."""


def sampled_tokens(n: int, device: torch.device | str, count: int = TOKENS) -> Tensor:
    """Return the indices (K,) of min(n, count) tokens spread evenly over n."""
    if n <= count:
        return torch.arange(n, device=device)
    return torch.linspace(0, n - 1, count, dtype=torch.float64).round().long().to(device)


def logit_error(largest: Tensor, dtype: torch.dtype, terms: int) -> Tensor:
    """Return the largest rounding error of a host's logits in each row, (K,).

    Args:
        largest: (K,) the largest absolute logit of each row, after scale, softcap and temperature.
        dtype: the precision in which the host forms its logits.
        terms: D, the number of products in the sum of a logit, which the host keeps in float32 at least.
    """
    # Each rounding errs by half a unit in the last place. The error of a sum grows with the root of its length.
    stored = ROUNDINGS * torch.finfo(dtype).eps / 2.0
    summed = math.sqrt(terms) * torch.finfo(torch.float32).eps
    return largest.clamp(min=1.0) * (stored + summed)


def allowances(error: Tensor, vocabulary: int) -> dict[str, Tensor]:
    """Return the largest difference of each quantity that logits wrong by `error` (K,) explain.

    For |dz_v| <= e the quantities move by at most:

        logsumexp       e
        log-prob        2 e
        entropy         2 log(V) e, from dH = -sum_v p_v (log p_v + H) dz_v
        log sum p^2     4 e, from log sum p^2 = logsumexp(2 z) - 2 logsumexp(z)
        mean of logits  e
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
    """Compare an adapter's numbers on a few tokens with the host's own; return whether a token could be compared.

    Args:
        adapter: its name, for the message.
        ours: the quantities that the adapter replaces, among "logprobs", "entropy", "logsumexp",
            "log_sum_squared_probs" and "mean_logits". None entries are left out.
        host: the same quantities of the same tokens from the host's own code, unpatched.
        largest_logit: the largest absolute logit of each row, after scale, softcap and temperature.
        dtype: the precision in which the host forms its logits.
        terms: D.
        vocabulary: V.
        undo: how the user switches the adapter off, for the message.

    Returns:
        False if there is no token, or if no number of the host is finite. Prove again at the next call.

    Raises:
        AdapterMismatchError: the host's precision does not explain a difference, or the adapter's number is not finite
            and the host's is. The message names the quantity, the token and both values.
        ValueError: a quantity without an allowance, or one that only one side has.
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
        # A token can only be compared if the host's own number is finite.
        known = theirs.isfinite()
        compared = compared or bool(known.any())
        difference = torch.where(known, (mine - theirs).abs(), 0.0).nan_to_num(nan=math.inf)
        excess = difference / limits[name]
        if excess.numel() and float(excess.max()) > 1.0:
            worst = int(excess.argmax())
            raise AdapterMismatchError(
                f"{adapter} does not reproduce the host: {name} of compared token {worst} is {float(mine[worst]):.7g}, "
                f"the host's own {float(theirs[worst]):.7g}; the difference {float(difference[worst]):.3g} exceeds "
                f"{float(limits[name][worst]):.3g}, the most that {dtype} logits explain. The model applies an "
                f"operation to its logits that the adapter does not know (scale, softcap, bias, temperature, an "
                f"adapter on the head); {undo}"
            )
    return compared


def _flat(value: Any) -> Tensor:
    return value.detach().to("cpu", torch.float64).reshape(-1)


LOSS_SEQUENCES = 4
"""Sequences in the proof of a loss."""

LOSS_PRECISION = 1e-5
"""Largest relative difference that the host's float32 arithmetic and its epsilons in denominators explain."""


def sampled_sequences(mask: Tensor, advantages: Tensor) -> Tensor:
    """Return the indices (K,) of the first sequences with a live token whose advantage is not 0, on the CPU.

    Args:
        mask: (B, T), live where it is not 0.
        advantages: (B, T).
    """
    return ((mask != 0) & (advantages != 0)).any(-1).nonzero().squeeze(-1)[:LOSS_SEQUENCES].cpu()


def on_cpu(value: Any, rows: Tensor | None = None) -> Any:
    """Return a detached copy of a tensor, or of its `rows`, on the CPU, floats in float64; other values as given."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    picked = value if rows is None else value[rows.to(value.device)]
    return picked.to("cpu", torch.float64 if value.is_floating_point() else value.dtype, copy=True)


def moved_apart(
    logprobs: Tensor,  # (B, T) or (N,)
) -> Tensor:
    """Return log-probs up to 0.75 nats away, at most -1e-3."""
    # In the first step both policies are equal, every ratio is 1, and no clip would be tested.
    n, width = logprobs.numel(), logprobs.shape[-1] if logprobs.numel() else 1
    steps = torch.arange(n, dtype=logprobs.dtype, device=logprobs.device)
    apart = 0.5 * (1.7 * steps).cos() + 0.25 * (1.0 + 2.3 * steps.div(width, rounding_mode="floor")).cos()
    return (logprobs + apart.view(logprobs.shape)).clamp(max=-1e-3)


def prove_loss(
    adapter: str,
    ours: Callable[[Tensor], Tensor],
    host: Callable[[Tensor], Tensor],
    logprobs: Tensor,  # (B, T) or (N,)
    *,
    undo: str,
) -> bool:
    """Compare a loss and its gradient with the host's own loss and gradient; return whether there was a gradient.

    Both sides get the same log-probs in float64, moved away from the old ones so that some ratios reach the clip, and
    the same seed for random numbers on the CPU.

    Args:
        adapter: its name, for the message.
        ours: the adapter's loss of log-probs, a scalar.
        host: the host's own loss, unpatched.
        logprobs: log-probs of a few sequences. Under the mask they can be any finite numbers.
        undo: how the user switches the adapter off, for the message.

    Returns:
        False if the host's loss is not finite or its gradient is 0 everywhere. Prove again at the next call.

    Raises:
        AdapterMismatchError: the loss or the gradient of a token differs by more than `LOSS_PRECISION`.
    """
    point = moved_apart(logprobs.detach().double())
    theirs, their_gradient = _value_and_gradient(host, point)
    if not (theirs.isfinite() and their_gradient.isfinite().all() and bool(their_gradient.any())):
        return False
    mine, gradient = _value_and_gradient(ours, point)
    # The terms of a loss have both signs and may cancel, so its error is relative to the size of the terms.
    size = float(theirs.abs() + (their_gradient.abs() * point.abs().clamp(min=1.0)).sum())
    pairs = [("the loss", mine, theirs, LOSS_PRECISION * size)]
    allowed = LOSS_PRECISION * float(their_gradient.abs().max())
    difference = (gradient - their_gradient).abs().nan_to_num(nan=math.inf).reshape(-1)
    worst = int(difference.argmax())
    name = f"the gradient of compared log-prob {worst}"
    pairs.append((name, gradient.reshape(-1)[worst], their_gradient.reshape(-1)[worst], allowed))
    for what, mine, theirs, granted in pairs:
        off = abs(float(mine) - float(theirs))
        if not off <= granted:
            raise AdapterMismatchError(
                f"{adapter} does not reproduce the host: {what} is {float(mine):.7g}, the host's own "
                f"{float(theirs):.7g}; the difference {off:.3g} exceeds {granted:.3g}. This version or setting of the "
                f"host computes another loss than the adapter knows; {undo}"
            )
    return True


def _value_and_gradient(loss: Callable[[Tensor], Tensor], point: Tensor) -> tuple[Tensor, Tensor]:
    plain = torch.autocast(point.device.type, enabled=False)
    with torch.enable_grad(), plain, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaf = point.clone().requires_grad_()
        value = loss(leaf)
        (gradient,) = torch.autograd.grad(value, leaf, allow_unused=True)
    return value.detach().double(), torch.zeros_like(point) if gradient is None else gradient.detach()


def uncompiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function under `torch.compile`, or the function itself: a few rows are not worth a compilation."""
    return getattr(function, "_torchdynamo_orig_callable", function)


class FirstUse:
    """Remembers the settings that have been proved, so that each is proved once per process."""

    def __init__(self) -> None:
        self._proved: set[Hashable] = set()
        self._lock = threading.Lock()
        self.wanted = True
        """Whether to prove at all."""

    @contextmanager
    def asked(self, wanted: bool) -> Iterator[None]:
        """Set `wanted` inside this context."""
        before, self.wanted = self.wanted, wanted
        try:
            yield
        finally:
            self.wanted = before

    def once(self, key: Hashable, attempt: Callable[[], bool]) -> None:
        """Run `attempt` unless `key` is proved. If it returns True `key` is proved, else the next call repeats it."""
        if not self.wanted or key in self._proved:
            return
        if attempt():
            with self._lock:
                self._proved.add(key)

    def forget(self) -> None:
        """Forget all proofs, so that every setting is proved again."""
        with self._lock:
            self._proved.clear()
