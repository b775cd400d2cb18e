"""The critic's loss: released trainers' numbers, aggregations, masks, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.losses.output import LossOutput
from fastrl.losses.value import AGGREGATES, explained_variance, value_loss

VALUE = cases("value")
TENSORS = ("values", "old_values", "returns", "mask")


def run(case: Case, leaves: dict[str, Tensor]) -> tuple[Tensor, LossOutput]:
    h = case.hyper
    output = value_loss(
        *(leaves[name] for name in TENSORS),
        clip=h["clip"],
        coefficient=h["coefficient"],
        aggregate=h["aggregate"],
        n_tokens=h["n_tokens"],
        n_sequences=h["n_sequences"],
        constant=h["constant"],
    )
    return h["scale"] * output.loss, output


@pytest.mark.parametrize("case", VALUE, ids=[case.id for case in VALUE])
def test_golden_float64(case: Case) -> None:
    # The peer adds its epsilon to lengths of at least 1: that much of a relative difference is its own.
    case = dataclasses.replace(case, rtol=case.rtol + (case.hyper["denominator_eps"] or 0.0))
    leaves = case.leaves(torch.float64)
    loss, output = run(case, leaves)
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(leaves)
    if "clip_fraction" in case.metrics:
        total, count = output.metrics["clip_fraction"]
        assert float(total / count) == pytest.approx(case.metrics["clip_fraction"], rel=1e-6)


@pytest.mark.parametrize("case", VALUE, ids=[case.id for case in VALUE])
def test_golden_float32(case: Case) -> None:
    exact_leaves, leaves = case.leaves(torch.float64), case.leaves(torch.float32)
    exact, result = run(case, exact_leaves)[0], run(case, leaves)[0]
    assert result.dtype == torch.float32
    exact.backward()
    result.backward()
    assert_as_accurate("loss", result, exact, exact.float())
    want = exact_leaves["values"].grad
    assert_as_accurate("grad_values", leaves["values"].grad, want, want.float())


def test_golden_value_part_of_a_joint_loss() -> None:
    (case,) = cases("policy_value")
    leaves = case.leaves(torch.float64)
    output = value_loss(*(leaves[name] for name in TENSORS), clip=case.hyper["value_clip"])
    case.check("value_loss", output.loss)
    (case.hyper["value_coef"] * output.loss).backward()
    case.check("grad_values", leaves["values"].grad)


def batch(dtype: torch.dtype = torch.float64, b: int = 4, t: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(b, t, generator=generator, dtype=dtype) for _ in range(3))
    mask = torch.rand(b, t, generator=generator) < 0.6
    mask[:, 0] = True
    return [values, old, returns, mask]


def options(aggregate: str) -> dict:
    return {
        "constant": {"constant": 6.0},
        "prompt_mean": {"group_ids": torch.tensor([0, 0, 1, 1])},
    }.get(aggregate, {})


@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_formula(aggregate: str, clip: float | None) -> None:
    """Written out sequence by sequence."""
    values, old, returns, mask = batch()
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    sums, counts = (error * mask).sum(1), mask.sum(1)
    want = {
        "token_mean": sums.sum() / counts.sum(),
        "sequence_mean": (sums / counts).mean(),
        "sequence_sum": sums.mean(),
        "constant": sums.mean() / 6.0,
        "token_sum": sums.sum(),
        "prompt_mean": 0.5 * (sums[:2].sum() / counts[:2].sum() + sums[2:].sum() / counts[2:].sum()),
    }[aggregate]
    got = value_loss(values, old, returns, mask, clip=clip, coefficient=0.7, aggregate=aggregate, **options(aggregate))
    torch.testing.assert_close(got.loss, 0.7 * want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_packed_is_padded(aggregate: str) -> None:
    values, old, returns, mask = batch()
    lengths = [6, 3, 4, 1]
    padded = mask & (torch.arange(6) < torch.tensor(lengths)[:, None])
    packed = [torch.cat([x[i, :n] for i, n in enumerate(lengths)]) for x in (values, old, returns, padded)]
    cu_seqlens = torch.tensor([0, 6, 9, 13, 14])
    one = value_loss(values, old, returns, padded, aggregate=aggregate, **options(aggregate))
    other = value_loss(*packed, aggregate=aggregate, cu_seqlens=cu_seqlens, **options(aggregate))
    torch.testing.assert_close(other.loss, one.loss, rtol=1e-13, atol=0)


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum"])
def test_split_invariance(aggregate: str) -> None:
    tensors = batch()
    counts = {"n_tokens": int(tensors[3].sum()), "n_sequences": 4}
    whole = value_loss(*tensors, aggregate=aggregate, **options(aggregate)).loss
    parts = [
        value_loss(*(x[rows] for x in tensors), aggregate=aggregate, **counts, **options(aggregate)).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_masked_data_cannot_matter(poison: float) -> None:
    *tensors, mask = batch(torch.float32)

    def grads(dirty: bool) -> tuple[Tensor, Tensor, dict]:
        inputs = [x.masked_fill(~mask, poison) if dirty else x.clone() for x in tensors]
        inputs[0].requires_grad_()
        output = value_loss(*inputs, mask)
        output.loss.backward()
        return output.loss.detach(), inputs[0].grad, output.metrics

    clean, dirty = grads(False), grads(True)
    assert torch.equal(clean[0], dirty[0])
    assert torch.equal(clean[1], dirty[1])
    assert all(torch.equal(total, dirty[2][name][0]) for name, (total, _) in clean[2].items())


def test_gradcheck() -> None:
    values, old, returns, mask = batch()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, returns, mask).loss, (values.requires_grad_(),))


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (3, 5)])
def test_nothing_to_learn_from(shape: tuple[int, int]) -> None:
    values = torch.full(shape, math.nan, requires_grad=True)
    empty = torch.full(shape, math.nan)
    loss = value_loss(values, empty, empty, torch.zeros(shape)).loss
    loss.backward()
    assert torch.equal(loss.detach(), torch.tensor(0.0))
    assert torch.equal(values.grad, torch.zeros(shape))


def test_explained_variance() -> None:
    values, old, returns, mask = batch()
    live, error = returns[mask], (returns - values)[mask]
    metrics = value_loss(values, old, returns, mask).metrics
    want = 1 - error.var(correction=0) / live.var(correction=0)
    torch.testing.assert_close(explained_variance(metrics), want, rtol=1e-10, atol=1e-12)
    constant = value_loss(values, old, torch.ones_like(returns), mask).metrics
    assert float(explained_variance(constant)) == 0.0


def test_half_precision_is_upcast() -> None:
    tensors = [x.bfloat16() if x.is_floating_point() else x for x in batch()]
    loss = value_loss(*tensors).loss
    assert loss.dtype == torch.float32
    exact = value_loss(*(x.double() if x.is_floating_point() else x for x in tensors)).loss
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_refusals() -> None:
    values, old, returns, mask = batch()
    refusals = [
        (r"returns must have shape \(4, 6\), got \(4, 5\)", (values, old, returns[:, :5], mask), {}),
        (r"old_values must have shape", (values, old[:3], returns, mask), {}),
        ("clip=0.2 needs old_values", (values, None, returns, mask), {}),
        ("clip must be", (values, old, returns, mask), {"clip": -0.1}),
        ("coefficient must be", (values, old, returns, mask), {"coefficient": -1.0}),
        ("aggregate must be one of 'token_mean'", (values, old, returns, mask), {"aggregate": "mean"}),
        ("constant goes with", (values, old, returns, mask), {"aggregate": "constant"}),
        ("constant goes with", (values, old, returns, mask), {"constant": 5.0}),
        ("group_ids go with", (values, old, returns, mask), {"aggregate": "prompt_mean"}),
        ("n_tokens must be", (values, old, returns, mask), {"n_tokens": 0}),
        (r"n_tokens must be.*got shape \(2,\)", (values, old, returns, mask), {"n_tokens": torch.ones(2)}),
        ("mask must hold only 0 and 1", (values, old, returns, 0.5 * mask), {}),
        (r"values must be \(B, T\)", (values[0], old[0], returns[0], mask[0]), {}),
    ]
    for message, arguments, keywords in refusals:
        with pytest.raises(ValueError, match=message):
            value_loss(*arguments, **keywords)
    assert bool(value_loss(values, None, returns, mask, clip=None).loss.isfinite())


@pytest.mark.parametrize("zero", [0, torch.tensor(0)])
def test_a_count_of_zero_goes_with_a_batch_without_live_tokens(zero: int | Tensor) -> None:
    values, old, returns, mask = batch()
    result = value_loss(values, old, returns, torch.zeros_like(mask), n_tokens=zero, n_sequences=zero)
    assert float(result.loss) == 0.0
    for name in ("n_tokens", "n_sequences"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            value_loss(values, old, returns, mask, **{name: zero})


def test_an_old_value_that_is_not_a_number_stays_visible() -> None:
    values, old, returns, _ = batch()
    old = old.clone()
    old[0, 0] = torch.nan
    mask = torch.ones_like(values)
    assert bool(value_loss(values, old, returns, mask).loss.isnan())
    mask[0, 0] = 0.0
    assert bool(value_loss(values, old, returns, mask).loss.isfinite())
