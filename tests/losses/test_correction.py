"""Train-inference correction and the supervised losses against trainers and brute force, and on very long sequences."""

import math
from typing import Any

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.losses.policy import PolicyLoss, RolloutCorrection

FIELDS = ("level", "op", "low", "high", "log_weight_clamp")


def weights_of(case: Case, x: dict[str, Tensor]) -> Tensor:
    correction = RolloutCorrection(**{name: case.hyper[name] for name in FIELDS if case.hyper[name] is not None})
    weights = correction.weights(x["old_logprobs"], x["rollout_logprobs"], x["mask"])
    live = x["mask"] != 0
    if case.hyper["zero_outside_mask"]:
        weights = torch.where(live, weights, 0.0)
    if case.outputs["weight"].shape[1] == 1:
        first = live.to(torch.int64).argmax(1, keepdim=True)
        weights = weights.gather(1, first)
    return weights


@pytest.mark.parametrize("case", cases("correction_weight"), ids=lambda case: case.id)
def test_weights_match_trainer(case: Case) -> None:
    exact = weights_of(case, case.leaves(torch.float64))
    case.check("weight", exact)
    single = case.leaves(torch.float32)
    result = weights_of(case, single)
    assert_as_accurate("weight", result, exact, eager_weights(case, single))


def eager_weights(case: Case, x: dict[str, Tensor]) -> Tensor:
    """Return the weights by the formula of the case, at the precision of the inputs."""
    delta = torch.where(x["mask"] != 0, x["old_logprobs"] - x["rollout_logprobs"], 0.0)
    if case.hyper["level"] == "sequence_sum":
        delta = delta.sum(1, keepdim=True)
    weights = delta.exp()
    low, high = case.hyper["low"] or 0.0, case.hyper["high"]
    if case.hyper["op"] == "truncate":
        weights = weights.clamp(low, high)
    else:
        weights = torch.where((weights >= low) & (weights <= high), weights, 0.0)
    weights = weights.expand(case.outputs["weight"].shape)
    return torch.where(x["mask"] != 0, weights, 0.0) if case.hyper["zero_outside_mask"] else weights


@pytest.mark.parametrize("case", cases("supervised"), ids=lambda case: case.id)
def test_supervised_losses_match_trainer(case: Case) -> None:
    options: dict[str, Any] = {"aggregate": case.hyper["aggregate"]}
    if case.hyper["denominator_eps"] is not None:
        options["denominator_eps"] = case.hyper["denominator_eps"]
    counts = {name: case.hyper[name] for name in ("n_tokens", "n_sequences") if case.hyper[name] is not None}
    loss = PolicyLoss.preset("dft" if case.hyper["loss"] == "dft" else "sft", **options)
    results = []
    for dtype in (torch.float64, torch.float32):
        inputs = case.leaves(dtype)
        value = loss(inputs["logprobs"], mask=inputs["mask"], **counts).loss
        value.backward()
        results.append((value, inputs["logprobs"].grad))
        if dtype == torch.float64:
            case.check("loss", value)
            case.check_gradients(inputs)
    for exact, got in zip(*results, strict=True):
        assert_as_accurate("loss or gradient", got, exact, exact.float(), torch.float32)


def statistic(name: str, old: float, rollout: float) -> float:
    delta, p, q = old - rollout, math.exp(old), math.exp(rollout)
    return {
        "ratio": math.exp(delta),
        "tv": abs(p - q),
        "k1": -delta,
        "k2": delta * delta / 2,
        "k3": math.exp(delta) - 1 - delta,
        "binary_kl": q * (rollout - old) + (1 - q) * (math.log1p(-q) - math.log1p(-p)),
    }[name]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("name", ["ratio", "tv", "binary_kl", "k1", "k2", "k3"])
def test_gate_matches_brute_force(level: str, name: str, seed: int) -> None:
    old, rollout = -3 * torch.rand(7, 6, dtype=torch.float64) - 0.05, -3 * torch.rand(7, 6, dtype=torch.float64) - 0.05
    mask = torch.rand(7, 6) < 0.7
    mask[2] = False
    pooled: dict[tuple[int, int], float] = {}
    for i in range(7):
        live = [j for j in range(6) if mask[i, j]]
        values = {j: statistic(name, old[i, j].item(), rollout[i, j].item()) for j in live}
        if name == "ratio":
            values = {j: math.log(x) for j, x in values.items()}
        for j in live:
            value = values[j]
            if level != "token":
                value = math.fsum(values.values()) / (len(live) if level == "sequence" else 1)
            pooled[i, j] = math.exp(value) if name == "ratio" else value
    low, high = sorted(pooled.values())[len(pooled) // 4] + 1e-9, sorted(pooled.values())[3 * len(pooled) // 4] + 1e-9
    if low >= high:
        low, high = min(pooled.values()) - 1.0, high
    gate = RolloutCorrection(level=level, op="gate", statistic=name, low=low, high=high)
    weights = gate.weights(old, rollout, mask)
    kept = 0
    for i in range(7):
        for j in range(6):
            want = 1.0
            if mask[i, j]:
                inside = low <= pooled[i, j] <= high
                kept += inside
                want = math.exp(old[i, j].item() - rollout[i, j].item()) if inside else 0.0
            assert weights[i, j].item() == pytest.approx(want, rel=1e-12)
    assert 0 < kept < len(pooled)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("op", ["truncate", "mask", "gate"])
def test_weights_of_128k_tokens_are_finite(level: str, op: str, seed: int) -> None:
    old = -torch.rand(131_072)
    mask, offsets = torch.ones(131_072), torch.tensor([0, 131_072])
    correction = RolloutCorrection(level=level, op=op, low=0.5, high=2.0)
    for drift in (-3.0, 0.0, 3.0):
        weights = correction.weights(old, old - drift, mask, offsets)
        assert bool(weights.isfinite().all())
        assert float(weights.min()) >= 0.0
        if op == "truncate":
            assert weights.unique().tolist() == [{-3.0: 0.5, 0.0: 1.0, 3.0: 2.0}[drift]]
        else:
            assert weights.unique().tolist() == [1.0 if drift == 0.0 else 0.0]


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("op", ["truncate", "mask", "gate"])
def test_packed_weights_equal_padded_ones(level: str, op: str, seed: int) -> None:
    old, rollout, mask = -torch.rand(5, 8), -torch.rand(5, 8), torch.rand(5, 8) < 0.7
    correction = RolloutCorrection(level=level, op=op, low=0.8, high=1.2)
    padded = correction.weights(old, rollout, mask)
    packed = correction.weights(old.view(-1), rollout.view(-1), mask.view(-1), torch.arange(0, 41, 8))
    assert torch.equal(packed.view(5, 8), padded)


@pytest.mark.parametrize("level", ["sequence", "sequence_sum"])
def test_the_sequence_ratio_of_128k_tokens_is_finite_forward_and_backward(level: str) -> None:
    t = 131_072
    for drift in (-2.0, 2.0):
        logprobs = torch.full((1, t), -2.5, requires_grad=True)
        loss = PolicyLoss(ratio_level=level, aggregate="sequence_mean")
        result = loss(
            logprobs, advantages=torch.tensor([1.0]), mask=torch.ones(1, t), old_logprobs=logprobs.detach() - drift
        )
        result.loss.backward()
        assert bool(result.loss.isfinite())
        assert logprobs.grad is not None
        assert bool(logprobs.grad.isfinite().all())


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("op", ["truncate", "mask", "gate"])
def test_unknown_rollout_logprobs_weigh_one_and_masked_ones_do_not_matter(level: str, op: str, seed: int) -> None:
    old, rollout = -torch.rand(3, 5), -torch.rand(3, 5)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]])
    correction = RolloutCorrection(level=level, op=op, low=0.1, high=10.0)
    clean = correction.weights(old, rollout, mask)
    for garbage in (math.nan, math.inf, -math.inf, 1e30):
        dirty = correction.weights(torch.where(mask != 0, old, garbage), torch.where(mask != 0, rollout, garbage), mask)
        assert torch.equal(clean, dirty)
    assert bool((clean[mask == 0] == 1).all())
    unknown = correction.weights(old, torch.full((3, 5), math.nan), mask)
    assert torch.equal(unknown, torch.ones(3, 5))


@pytest.mark.parametrize("level", ["token", "sequence_sum"])
def test_batch_normalised_weights_have_mean_one(level: str, seed: int) -> None:
    old, rollout, mask = -torch.rand(4, 6), -torch.rand(4, 6), torch.rand(4, 6) < 0.7
    mask[:, 0] = True
    correction = RolloutCorrection(level=level, high=1.5, batch_normalize=True)
    weights = correction.weights(old, rollout, mask)
    mean = weights[mask].mean() if level == "token" else weights[:, 0].mean()
    assert mean.item() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("op", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["sequence", "sequence_sum"])
def test_the_weight_of_a_sequence_enters_vespo_s_weight_once(level: str, op: str) -> None:
    """W = prod_t r_t times the one weight of the sequence, however many tokens it has (arXiv 2602.10693)."""
    generator = torch.Generator().manual_seed(4)
    logprobs, old, rollout = (
        -3.0 + 0.2 * torch.randn(5, 6, dtype=torch.float64, generator=generator) for _ in range(3)
    )
    lengths = torch.tensor([6, 1, 3, 4, 0])
    mask = torch.arange(6) < lengths[:, None]
    advantages = torch.tensor([1.0, -0.5, 2.0, -1.5, 1.0], dtype=torch.float64)
    correction = RolloutCorrection(level=level, op=op, low=0.8, high=1.3)
    leaf = logprobs.clone().requires_grad_()
    PolicyLoss.preset("vespo", correction=correction)(
        leaf, advantages=advantages, mask=mask, old_logprobs=old, rollout_logprobs=rollout
    ).loss.backward()

    weight = correction.weights(old, rollout, mask)[:, 0]
    log_w = ((logprobs - old) * mask).sum(1) + weight.log().clamp(math.log(1e-8), 20.0)
    log_w = log_w.clamp(math.log(1e-8), 20.0)
    k, rate = torch.where(advantages >= 0, 2.0, 3.0), torch.where(advantages >= 0, 3.0, 2.0)
    phi = (rate + k * log_w - rate * log_w.exp()).exp()
    assert bool((weight != 1.0)[:4].any())
    torch.testing.assert_close(leaf.grad, -(phi * advantages)[:, None] * mask / mask.sum())
