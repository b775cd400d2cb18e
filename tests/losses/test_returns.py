"""Returns and advantages of token rewards: golden cases, slow recurrences, masks, packing, whitening."""

import math
from typing import Any

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.losses.advantages import estimators
from fastrl.losses.advantages.returns import (
    discounted_returns,
    gae,
    length_adaptive_lambda,
    masked_whiten,
    td_lambda_returns,
)

GOLDEN = [
    case
    for case in cases("advantage")
    if case.algorithm.startswith(("gae", "reinforce_pp", "remax")) and case.algorithm != "reinforce_pp_baseline"
]


def compute(case: Case, x: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    hyper = case.hyper
    if case.algorithm.startswith("gae"):
        names = ("gamma", "lam", "whiten", "carry_over_masked")
        options = {name: hyper[name] for name in names}
        if hyper["whiten_eps"] is not None:
            options["whiten_eps"] = hyper["whiten_eps"]
        mask = x.get("mask", torch.ones_like(x["values"]))
        return gae(x["token_rewards"], x["values"], mask, **options)
    if case.algorithm == "remax":
        return estimators.remax_advantages(x["token_rewards"], x["baseline_rewards"], x["mask"])
    masked = "reset" if case.algorithm == "reinforce_pp_unmasked_return" else "skip"
    return estimators.reinforce_plus_plus_advantages(
        x["token_rewards"], x["mask"], gamma=hyper["gamma"], masked=masked, whiten_eps=hyper["whiten_eps"]
    )


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.id)
def test_returns_match_trainer_in_float64(case: Case) -> None:
    assert len(GOLDEN) == 7
    advantages, returns = compute(case, case.leaves(torch.float64))
    case.check("advantages", advantages)
    case.check("returns", returns)


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case.id)
def test_returns_in_float32_are_rounded_once(case: Case) -> None:
    exact, result = compute(case, case.leaves(torch.float64)), compute(case, case.leaves(torch.float32))
    for name, got, want in zip(("advantages", "returns"), result, exact, strict=True):
        assert got.dtype == torch.float32
        assert_as_accurate(name, got, want, want.float())


def loop_gae(r: Tensor, v: Tensor, mask: Tensor, gamma: float, lam: Tensor, carry: bool) -> tuple[Tensor, Tensor]:
    """Return the advantages and returns by the recurrence, one column at a time."""
    result = torch.zeros_like(r)
    last, following = torch.zeros_like(r[:, 0]), torch.zeros_like(r[:, 0])
    for t in reversed(range(r.shape[1])):
        value = r[:, t] + gamma * following - v[:, t] + gamma * lam * last
        live = mask[:, t] if carry else torch.ones_like(mask[:, t])
        last, following = torch.where(live, value, last), torch.where(live, v[:, t], following)
        result[:, t] = last
    return result, result + v


def batch(b: int = 4, t: int = 37, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.rand(b, t) < 0.7
    mask[1], mask[2, 5:] = False, False
    return torch.randn(b, t).to(dtype), torch.randn(b, t).to(dtype), mask


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_is_the_recurrence(carry: bool, gamma: float, seed: int) -> None:
    r, v, mask = batch()
    for lam in (0.0, 0.95, 1.0, torch.tensor([0.1, 0.5, 0.9, 1.0], dtype=torch.float64)):
        each = lam if isinstance(lam, Tensor) else torch.full((4,), lam, dtype=torch.float64)
        want = loop_gae(r, v, mask, gamma, each, carry)
        got = gae(r, v, mask, gamma=gamma, lam=lam, carry_over_masked=carry)
        for name, a, b in zip(("advantages", "returns"), got, want, strict=True):
            assert torch.allclose(a, b, rtol=1e-12, atol=1e-12), name
        eager = loop_gae(r.float(), v.float(), mask, gamma, each.float(), carry)
        exact = loop_gae(r.float().double(), v.float().double(), mask, gamma, each.float().double(), carry)
        in_float32 = gae(r.float(), v.float(), mask, gamma=gamma, lam=each.float(), carry_over_masked=carry)
        for name, a, b, c in zip(("advantages", "returns"), in_float32, exact, eager, strict=True):
            assert_as_accurate(name, a, b, c)


@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("whiten", [False, True])
def test_packed_gae_equals_padded(carry: bool, whiten: bool, seed: int) -> None:
    lengths = [5, 0, 1, 9, 3]
    r, v, mask = batch(len(lengths), 9, torch.float32)
    inside = torch.arange(9) < torch.tensor(lengths).unsqueeze(1)
    mask = mask & inside
    # Behind the end of a padded sequence the plain recurrence sees what stands there: nothing, as in the packed one.
    r, v = torch.where(inside, r, 0.0), torch.where(inside, v, 0.0)
    lam = torch.tensor([0.5, 0.9, 1.0, 0.0, 0.7])
    options: dict[str, Any] = {"gamma": 0.9, "lam": lam, "whiten": whiten, "carry_over_masked": carry}
    padded = gae(r, v, mask, **options)
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    packed = gae(r[inside], v[inside], mask[inside], cu_seqlens=offsets, **options)
    for a, b in zip(padded, packed, strict=True):
        assert torch.allclose(a[inside], b, rtol=1e-6, atol=1e-6)


def test_what_stands_under_the_mask_reaches_no_live_token(seed: int) -> None:
    r, v, mask = batch(dtype=torch.float32)
    for garbage in (math.nan, math.inf, -math.inf, 1e30, -100.0):
        dirty_r, dirty_v = torch.where(mask, r, garbage), torch.where(mask, v, garbage)
        clean_r, clean_v = torch.where(mask, r, 0.0), torch.where(mask, v, 0.0)
        for whiten in (False, True):
            options: dict[str, Any] = {"gamma": 0.9, "lam": 0.8, "whiten": whiten}
            clean = gae(clean_r, clean_v, mask, carry_over_masked=True, **options)
            dirty = gae(dirty_r, dirty_v, mask, carry_over_masked=True, **options)
            for a, b in zip(clean, dirty, strict=True):
                assert torch.equal(a[mask], b[mask])
                assert bool(b.isfinite().all())
            if not math.isfinite(garbage):
                plain = gae(dirty_r, dirty_v, mask, **options)
                for a, b in zip(gae(clean_r, clean_v, mask, **options), plain, strict=True):
                    assert torch.equal(a, b)
        assert torch.equal(discounted_returns(clean_r, mask, gamma=0.9), discounted_returns(dirty_r, mask, gamma=0.9))
        assert torch.equal(masked_whiten(clean_v, mask), masked_whiten(dirty_v, mask))


def test_a_nan_at_a_live_token_stays_visible_and_in_its_sequence(seed: int) -> None:
    r, v, _ = batch(dtype=torch.float32)
    mask = torch.ones_like(r)
    r[2, 7] = math.nan
    offsets = torch.arange(0, 4 * 37 + 1, 37)
    for advantages in (
        gae(r, v, mask, gamma=0.9, lam=0.8)[0],
        gae(r.view(-1), v.view(-1), mask.view(-1), gamma=0.9, lam=0.8, cu_seqlens=offsets)[0].view(4, 37),
    ):
        bad = advantages.isnan()
        assert bool(bad[2, :8].all())
        assert int(bad.sum()) == 8
    assert bool(masked_whiten(r, mask).isnan().all())


@pytest.mark.parametrize("masked", ["skip", "through", "reset"])
def test_discounted_returns_are_the_recurrence(masked: str, seed: int) -> None:
    r, _, mask = batch()
    want, running = torch.zeros_like(r), torch.zeros_like(r[:, 0])
    for t in reversed(range(r.shape[1])):
        live, value = mask[:, t], r[:, t] + 0.9 * running
        running = torch.where(live, value, running) if masked == "skip" else value
        want[:, t] = torch.where(live, running, 0.0) if masked == "skip" else running
        if masked == "reset":
            running = torch.where(live, running, 0.0)
    got = discounted_returns(r, mask, gamma=0.9, masked=masked)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
    flat = discounted_returns(
        r.view(-1), mask.view(-1), gamma=0.9, masked=masked, cu_seqlens=torch.arange(0, 4 * 37 + 1, 37)
    )
    assert torch.allclose(flat.view(4, 37), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (1, 1)])
def test_degenerate_shapes(shape: tuple[int, int]) -> None:
    ones = torch.ones(shape)
    advantages, returns = gae(ones, ones, ones, gamma=1.0, lam=1.0, whiten=True)
    assert advantages.shape == returns.shape == torch.Size(shape)
    assert not bool(advantages.any())
    assert discounted_returns(
        torch.zeros(0), torch.zeros(0), gamma=1.0, cu_seqlens=torch.zeros(3, dtype=torch.int64)
    ).shape == (0,)


def test_td_lambda_returns_lie_between_one_step_and_monte_carlo(seed: int) -> None:
    r, v, _ = batch()
    mask = torch.ones_like(r)
    following = torch.cat([v[:, 1:], torch.zeros(4, 1, dtype=torch.float64)], 1)
    one_step = td_lambda_returns(r, v, mask, gamma=0.9, lam=0.0)
    assert torch.allclose(one_step, r + 0.9 * following)
    monte_carlo = td_lambda_returns(r, v, mask, gamma=0.9, lam=1.0)
    assert torch.allclose(monte_carlo, discounted_returns(r, mask, gamma=0.9))


def test_length_adaptive_lambda() -> None:
    assert length_adaptive_lambda(torch.tensor([0, 1, 20, 40, 2000])).tolist() == pytest.approx([0, 0, 0, 0.5, 0.99])
    with pytest.raises(ValueError, match="alpha"):
        length_adaptive_lambda(torch.tensor([3]), alpha=0.0)
    with pytest.raises(ValueError, match=r"\(B,\)"):
        length_adaptive_lambda(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"lengths must be >= 0, got \[-3\]"):
        length_adaptive_lambda(torch.tensor([5, -3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masked_whiten(dtype: torch.dtype, seed: int) -> None:
    x = (torch.randn(6, 7) * 3 + 1e4).to(dtype)
    mask = torch.rand(6, 7) < 0.6
    live = x.double()[mask]
    want = torch.where(mask, (x.double() - live.mean()) / (live.var() + 1e-8).sqrt(), 0.0)
    assert_as_accurate("whitened", masked_whiten(x, mask), want, want.to(dtype))
    assert not bool(masked_whiten(torch.full((3, 4), 0.1, dtype=dtype), torch.ones(3, 4)).any())
    assert not bool(masked_whiten(x, torch.zeros(6, 7)).any())


def test_reinforce_plus_plus_takes_the_kl_out_of_the_reward(seed: int) -> None:
    r, kl, mask = batch(dtype=torch.float32)
    dirty = torch.where(mask, kl, math.nan)
    advantages, returns = estimators.reinforce_plus_plus_advantages(r, mask, gamma=0.9, kl=dirty, kl_coef=0.1)
    want = discounted_returns(r - 0.1 * kl, mask, gamma=0.9)
    assert torch.allclose(returns, want, atol=1e-6)
    assert torch.allclose(advantages, masked_whiten(want, mask), atol=1e-5)
    with pytest.raises(ValueError, match="go together"):
        estimators.reinforce_plus_plus_advantages(r, mask, kl=kl)
    with pytest.raises(ValueError, match="go together"):
        estimators.reinforce_plus_plus_advantages(r, mask, kl_coef=0.1)


def test_a_long_sequence_is_finite_and_accurate(seed: int) -> None:
    t = 131_072
    r, v = torch.randn(t), torch.randn(t)
    mask, offsets = torch.ones(t), torch.tensor([0, t])
    result, _ = gae(r, v, mask, gamma=1.0, lam=0.999, cu_seqlens=offsets)
    exact, _ = gae(r.double(), v.double(), mask, gamma=1.0, lam=0.999, cu_seqlens=offsets)
    assert_as_accurate("advantages", result, exact, exact.float())
    assert_as_accurate("first", result[-1], (r - v)[-1].double(), (r - v)[-1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gamma": 1.5}, ValueError, "gamma"),
        ({"lam": -0.1}, ValueError, "lam"),
        ({"lam": torch.tensor([0.5, 2.0])}, ValueError, r"\[0, 1\]"),
        ({"lam": torch.ones(3)}, ValueError, r"\(2,\) or \(2, 1\), got \(3,\)"),
        ({"values": torch.zeros(2, 4)}, ValueError, r"values must have shape \(2, 3\)"),
        ({"mask": torch.full((2, 3), 0.5)}, ValueError, "only 0 and 1"),
        ({"mask": torch.ones(2, 1)}, ValueError, "mask"),
        ({"rewards": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "token_rewards"),
        ({"rewards": torch.zeros(2)}, ValueError, "cu_seqlens"),
        ({"whiten_eps": -1.0}, ValueError, "whiten_eps"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_gae_refuses_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {
        "rewards": torch.zeros(2, 3), "values": torch.zeros(2, 3), "mask": torch.ones(2, 3), "gamma": 1.0, "lam": 1.0
    }  # fmt: skip
    with pytest.raises(error, match=message):
        gae(**(given | change))


def test_discounted_returns_refuse_an_unknown_rule() -> None:
    with pytest.raises(ValueError, match="through"):
        discounted_returns(torch.zeros(1, 1), torch.ones(1, 1), gamma=1.0, masked="zero")


def test_otb_of_equal_energies_is_the_group_mean_and_zero_for_a_group_of_one() -> None:
    rewards = torch.tensor([[0.0, 1.0], [0.0, 3.0], [0.0, 5.0]])
    mask = torch.ones(3, 2)
    p = torch.full((3, 2), math.log(0.5))
    advantages, returns = estimators.otb_advantages(rewards, p, torch.full((3, 2), 0.5), mask, group_ids=[0, 0, 1])
    assert torch.allclose(advantages, torch.tensor([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(returns, torch.tensor([[1.0, 1.0], [3.0, 3.0], [5.0, 5.0]]))
