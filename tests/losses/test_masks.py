"""The keep-masks over whole batches against brute force in Python."""

import math

import pytest
import torch
from torch import Tensor

from fastrl.losses.masks import (
    covariance_keep_mask,
    high_entropy_mask,
    off_policy_sequence_mask,
    rollout_divergence_mask,
    second_moment_mask,
)

B, T = 6, 9


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, other log-probs, mask), the mask with gaps and one sequence without live tokens."""
    mask = torch.rand(B, T) < 0.7
    mask[2] = False
    logprobs = -3 * torch.rand(B, T, dtype=torch.float64)
    return logprobs, logprobs + 0.6 * torch.randn(B, T, dtype=torch.float64), mask


def live_of(mask: Tensor, i: int) -> list[int]:
    return mask[i].nonzero().squeeze(-1).tolist()


def packed(mask: Tensor, *columns: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the columns and the mask flattened, and the offsets of their rows."""
    return [x.reshape(-1) for x in (*columns, mask)], torch.arange(0, B * T + 1, T)


def test_off_policy_sequences_with_negative_advantage_are_left_out(seed: int) -> None:
    logprobs, other, mask = batch()
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0, 0.0, -1.0])
    threshold = 0.05
    want = []
    for i in range(B):
        live = live_of(mask, i)
        drift = math.fsum((other[i, j] - logprobs[i, j]).item() for j in live) / len(live) if live else 0.0
        want.append(not (advantages[i] < 0 and drift > threshold))
    assert {True, False} == set(want)
    dirty = torch.where(mask, logprobs, math.nan)
    keep = off_policy_sequence_mask(dirty, other, advantages, mask, threshold=threshold)
    assert keep.tolist() == [[x] * T for x in want]
    (a, b, m), offsets = packed(mask, logprobs, other)
    flat = off_policy_sequence_mask(a, b, advantages, m, threshold=threshold, cu_seqlens=offsets)
    assert torch.equal(flat.view(B, T), keep)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_high_entropy_tokens_are_those_above_the_quantile(dtype: torch.dtype, fraction: float, seed: int) -> None:
    _, _, mask = batch()
    entropy = 0.1 + torch.rand(B, T, dtype=dtype)
    entropy[tuple(mask.nonzero()[0])] = 0.1  # the smallest: in float32 it is larger than in float64
    threshold = torch.quantile(entropy[mask], 1.0 - fraction)
    keep = high_entropy_mask(torch.where(mask, entropy, math.nan), mask, fraction=fraction)
    assert torch.equal(keep, mask & (entropy >= threshold))
    assert not bool(high_entropy_mask(entropy, torch.zeros(B, T), fraction=fraction).any())
    with pytest.raises(ValueError, match="fraction"):
        high_entropy_mask(entropy, mask, fraction=0.0)


def test_candidates_of_high_covariance_are_dropped_at_random(seed: int) -> None:
    logprobs, _, mask = batch()
    old = logprobs + 0.1 * torch.randn(B, T, dtype=torch.float64)
    advantages = torch.randn(B, T, dtype=torch.float64)
    live = [(i, j) for i in range(B) for j in live_of(mask, i)]
    mean_a = math.fsum(advantages[p].item() for p in live) / len(live)
    mean_l = math.fsum(logprobs[p].item() for p in live) / len(live)
    candidates = set()
    for p in live:
        covariance = (advantages[p].item() - mean_a) * (logprobs[p].item() - mean_l)
        ratio = math.exp((logprobs[p] - old[p]).item())
        clipped = (advantages[p] < 0 and ratio < 0.9) or (advantages[p] > 0 and ratio > 1.1)
        if 0.05 < covariance < 1.0 and not clipped:
            candidates.add(p)
    assert len(candidates) > 4
    options = {"low": 0.05, "high": 1.0, "clip_low": 0.1, "clip_high": 0.1}
    for fraction, wanted in ((1e-6, 1), (3.5 / len(live), 3), (1.0, len(candidates))):
        seen = set()
        for k in range(8):
            generator = torch.Generator().manual_seed(k)
            keep = covariance_keep_mask(
                logprobs, old, advantages, mask, fraction=fraction, generator=generator, **options
            )
            dropped = frozenset(map(tuple, (~keep).nonzero().tolist()))
            assert dropped <= candidates
            assert len(dropped) == wanted
            seen.add(dropped)
        assert len(seen) > 1 or wanted == len(candidates)


@pytest.mark.parametrize("level", ["token", "sequence_sum", "sequence_mean", "sequence_max"])
@pytest.mark.parametrize("divergence", ["k1", "k2", "k3"])
def test_rollout_divergence_matches_brute_force(level: str, divergence: str, seed: int) -> None:
    logprobs, rollout, mask = batch()
    rollout[0, 0] -= 40.0
    values: dict[tuple[int, int], float] = {}
    for i in range(B):
        row = {}
        for j in live_of(mask, i):
            y = min(max((logprobs[i, j] - rollout[i, j]).item(), -20.0), 20.0)
            row[j] = {"k1": -y, "k2": y * y / 2, "k3": math.exp(y) - 1 - y}[divergence]
        for j, own in row.items():
            pooled = {
                "token": own,
                "sequence_sum": math.fsum(row.values()),
                "sequence_mean": math.fsum(row.values()) / len(row),
                "sequence_max": max(row.values()),
            }[level]
            values[i, j] = math.exp(pooled) if divergence == "k1" else pooled
    ordered = sorted(values.values())
    high = ordered[2 * len(ordered) // 3] * (1 + 1e-9)
    low = ordered[len(ordered) // 5] * (1 - 1e-9) if divergence == "k1" else None
    keep = rollout_divergence_mask(
        torch.where(mask, logprobs, math.nan), rollout, mask, level=level, divergence=divergence, low=low, high=high
    )
    want = {p for p, value in values.items() if (low is None or value >= low) and value <= high}
    assert 0 < len(want) < len(values)
    assert {tuple(p) for p in (keep & mask).nonzero().tolist()} == want
    (a, b, m), offsets = packed(mask, logprobs, rollout)
    flat = rollout_divergence_mask(a, b, m, level=level, divergence=divergence, low=low, high=high, cu_seqlens=offsets)
    assert torch.equal(flat.view(B, T), keep)


def test_rollout_divergence_refuses_what_has_no_effect() -> None:
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="k1"):
        rollout_divergence_mask(x, x, torch.ones(1, 2), divergence="k2", low=0.1, high=1.0)
    with pytest.raises(ValueError, match="sequence_max"):
        rollout_divergence_mask(x, x, torch.ones(1, 2), level="sequence", high=1.0)
    with pytest.raises(ValueError, match="low, high or both"):
        rollout_divergence_mask(x, x, torch.ones(1, 2))


def test_what_does_not_fit_is_refused_by_name() -> None:
    x, mask = torch.zeros(2, 3), torch.ones(2, 3)
    refusals = [
        (TypeError, "logprobs must be a torch.Tensor", lambda: second_moment_mask(None, x, mask, threshold=0.1)),
        (ValueError, "rollout_logprobs must have shape", lambda: second_moment_mask(x, x[:1], mask, threshold=0.1)),
        (TypeError, "entropy must be", lambda: high_entropy_mask(x.long(), mask, fraction=0.5)),
        (TypeError, "advantages must be", lambda: covariance_keep_mask(x, x, x[:, 0].long(), mask)),
        (TypeError, "rollout_logprobs must be", lambda: rollout_divergence_mask(x, x.bool(), mask, high=1.0)),
        (ValueError, "high must be finite", lambda: rollout_divergence_mask(x, x, mask, high=math.nan)),
        (ValueError, "threshold", lambda: off_policy_sequence_mask(x, x, x, mask, threshold=math.nan)),
        (TypeError, "mask must be a dense", lambda: off_policy_sequence_mask(x, x, x, mask.cfloat(), threshold=0.1)),
    ]
    for error, message, call in refusals:
        with pytest.raises(error, match=message):
            call()


def test_off_policy_sequences_that_are_not_numbers_stay_for_the_loss_to_show() -> None:
    x = torch.tensor([[math.nan, -1.0]])
    assert bool(off_policy_sequence_mask(x, x, torch.tensor([-1.0]), torch.ones(1, 2), threshold=0.1).all())


@pytest.mark.parametrize("threshold", [1e-6, 0.02, 0.1, 1e9])
def test_second_moment_drops_the_fewest_largest_tokens(threshold: float, seed: int) -> None:
    logprobs, rollout, mask = batch()
    keep = second_moment_mask(logprobs, torch.where(mask, rollout, math.nan), mask, threshold=threshold)
    squared = sorted(((logprobs[i, j] - rollout[i, j]).item() ** 2, i, j) for i in range(B) for j in live_of(mask, i))
    kept = len(squared)
    while kept and math.fsum(x for x, _, _ in squared[:kept]) / kept >= threshold:
        kept -= 1
    assert {tuple(p) for p in keep.nonzero().tolist()} == {(i, j) for _, i, j in squared[:kept]}
    assert not bool(second_moment_mask(logprobs, rollout, torch.zeros(B, T), threshold=threshold).any())


def test_a_nan_at_a_live_token_is_never_kept_silently(seed: int) -> None:
    logprobs, rollout, mask = batch()
    mask[0, 0] = True
    logprobs[0, 0] = math.nan
    keep = second_moment_mask(logprobs, rollout, mask, threshold=0.1)
    assert not bool(keep[0, 0])
    assert not bool(rollout_divergence_mask(logprobs, rollout, mask, divergence="k2", high=1.0)[0, 0])
