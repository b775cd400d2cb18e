"""A batch of preferences as numbers per row: sums of log-probs, lengths, weights, and the checks of the inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastrl import checks
from fastrl.losses.scalars import choose, live


class PairRows(NamedTuple):
    """The sequence log-probs of P pairs, in the accumulation dtype."""

    chosen: Tensor  # (P,) summed over tokens; without lengths, reduced as the loss wants them
    rejected: Tensor  # (P,)
    ref_chosen: Tensor | None  # (P,)
    ref_rejected: Tensor | None  # (P,)
    chosen_lengths: Tensor | None = None  # (P,) at least 1
    rejected_lengths: Tensor | None = None  # (P,)
    chosen_total: Tensor | None = None  # (P,) sum over all tokens of the chosen rows, for the NLL
    chosen_tokens: Tensor | None = None  # () their number
    weights: Tensor | None = None  # (P,)

    def reduced(self, reduce: str) -> PairRows:
        """Return the rows with means in place of sums if `reduce` is "mean" and the lengths are known."""
        if reduce == "sum" or self.chosen_lengths is None or self.rejected_lengths is None:
            return self
        over_w, over_l = self.chosen_lengths, self.rejected_lengths
        return self._replace(
            chosen=self.chosen / over_w,
            rejected=self.rejected / over_l,
            ref_chosen=None if self.ref_chosen is None else self.ref_chosen / over_w,
            ref_rejected=None if self.ref_rejected is None else self.ref_rejected / over_l,
        )


class Counts(NamedTuple):
    """The divisors of the sums."""

    pairs: float | Tensor
    tokens: float | Tensor | None


def pair_rows(
    logprobs: Tensor,  # (2P, T)
    keep: Tensor,  # (2P, T) bool
    ref: Tensor | None,  # (2P, T)
    squared: Tensor | None,  # (2P, T) log sum_v p_v^2
    length_desensitisation: float | None,
) -> PairRows:
    """Return the sums over tokens of the rows, length-desensitised if wanted, and the WPO weights."""
    if logprobs.shape[0] % 2:
        raise ValueError(f"logprobs must have 2P rows, chosen first, got {logprobs.shape[0]} rows")
    n = logprobs.shape[0] // 2
    policy = live(logprobs, keep)
    reference = None if ref is None else live(ref, keep).detach()
    lengths = keep.sum(1)  # (2P,)
    totals = policy.sum(1)
    sums, ref_sums = totals, None if reference is None else reference.sum(1)
    if length_desensitisation is not None:
        shorter = torch.minimum(lengths[:n], lengths[n:]).repeat(2)
        shared = keep.cumsum(1) <= shorter[:, None]
        token_weights = choose(shared, 1.0, length_desensitisation, policy)
        sums = (policy * token_weights).sum(1)
        ref_sums = None if reference is None else (reference * token_weights).sum(1)
    counts = lengths.clamp(min=1).to(policy.dtype)
    weights = None
    if squared is not None:
        aligned = (policy.detach() - live(squared, keep).detach()).sum(1) / counts
        weights = torch.exp(aligned[:n] + aligned[n:])
    return PairRows(
        sums[:n],
        sums[n:],
        None if ref_sums is None else ref_sums[:n],
        None if ref_sums is None else ref_sums[n:],
        counts[:n],
        counts[n:],
        totals[:n],
        lengths[:n].sum().to(policy.dtype),
        weights,
    )


def kl_reference_point(logprobs: Tensor | None, ref: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return max(0, mean over rows of the summed log-ratio), KTO's z0."""
    if logprobs is None or ref is None:
        raise ValueError("kl_logprobs and kl_ref_logprobs go together, got only one of them")
    checks.float_tensor("kl_logprobs", logprobs)
    if logprobs.dim() != 2:
        raise ValueError(f"kl_logprobs must be (B', T'), got shape {tuple(logprobs.shape)}")
    check_like(logprobs, kl_ref_logprobs=ref)
    if mask is None:
        keep = torch.ones_like(logprobs, dtype=torch.bool)
    else:
        keep, _ = checks.keep_mask("kl_mask", mask, logprobs.shape, logprobs.device)
    ratios = (live(logprobs, keep) - live(ref, keep)).sum(1).detach()
    return (ratios.sum() / max(ratios.numel(), 1)).clamp(min=0.0)


def checked_lengths(
    chosen: Tensor | None, rejected: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Any]:
    """Return the lengths, at least 1, and the number of chosen tokens."""
    if (chosen is None) != (rejected is None):
        raise ValueError("chosen_lengths and rejected_lengths go together, got only one of them")
    if chosen is None or rejected is None:
        return None, None, None
    for name, value in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
        if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a dense tensor of numbers of tokens, got {got}")
        checks.same_shape(name, value, like.shape)
        checks.same_device(name, value, like.device)
        if checks.checks_values(value) and not bool((value >= 0).all()):
            raise ValueError(f"{name} must be >= 0, got {value[~(value >= 0)][:4].tolist()}")
    return chosen.clamp(min=1).to(like.dtype), rejected.clamp(min=1).to(like.dtype), chosen.sum().to(like.dtype)


def check_rows(tensors: dict[str, Tensor | None], *, same: bool) -> None:
    """Raise unless the tensors are 1-D on one device, each reference like its policy (and all alike when `same`)."""
    chosen = checks.float_tensor("chosen_logps", tensors["chosen_logps"])
    rejected = checks.float_tensor("rejected_logps", tensors["rejected_logps"])
    for name, value in tensors.items():
        if value is None:
            continue
        checks.float_tensor(name, value)
        if value.dim() != 1:
            raise ValueError(f"{name} must be 1-D, one number per completion, got shape {tuple(value.shape)}")
        like = rejected if "rejected" in name and not same else chosen
        checks.same_shape(name, value, like.shape)
        checks.same_device(name, value, chosen.device)


def check_like(logprobs: Tensor, **tensors: Tensor | None) -> None:
    """Raise unless the given tensors have the shape and the device of `logprobs`."""
    for name, value in tensors.items():
        if value is not None:
            checks.float_tensor(name, value)
            checks.same_shape(name, value, logprobs.shape)
            checks.same_device(name, value, logprobs.device)


def check_one_reference(ref_logprobs: Tensor | None, other: str) -> None:
    """Raise if the reference is given twice."""
    if ref_logprobs is not None:
        raise ValueError(f"the reference comes from ref_logprobs or from {other}, got both")


def halved(temperature: float | Tensor | None) -> float | Tensor:
    """Return the temperature at which the partition sum of p^2 is taken: log sum p^2 = lse(2z) - 2 lse(z)."""
    return 0.5 if temperature is None else temperature / 2.0
