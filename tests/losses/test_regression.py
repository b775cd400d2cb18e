"""Squared regression of sequence log-ratios: formula, gradient, accuracy, masks, packing, splitting, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.losses.policy import PolicyLoss
from fastrl.losses.regression import optimal_values, sequence_square_loss

LENGTHS = [4, 0, 6, 1]


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return a padded batch with an empty row and a gap."""
    generator = torch.Generator().manual_seed(3)
    logprobs = -torch.rand(4, 6, generator=generator, dtype=torch.float64) - 0.1
    mask = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    mask[0, 1] = False
    return {
        "logprobs": logprobs.to(dtype),
        "anchor_logprobs": (logprobs + 0.3 * torch.randn(4, 6, generator=generator, dtype=torch.float64)).to(dtype),
        "targets": torch.tensor([0.5, math.nan, -1.0, 0.25], dtype=dtype),
        "mask": mask,
    }


def by_hand(inputs: dict[str, Tensor], scale: float, weight: float) -> Tensor:
    """Return the loss from its formula, sequence by sequence."""
    terms = []
    for row in (0, 2, 3):
        live = inputs["mask"][row]
        u = (inputs["logprobs"][row][live] - inputs["anchor_logprobs"][row][live]).sum()
        terms.append((scale * u - inputs["targets"][row]) ** 2)
    return weight * torch.stack(terms).mean()


def evaluate(inputs: dict[str, Tensor], **options: object) -> tuple[Tensor, Tensor]:
    leaf = inputs["logprobs"].clone().requires_grad_()
    loss = sequence_square_loss(leaf, **{k: v for k, v in inputs.items() if k != "logprobs"}, **options).loss  # type: ignore[arg-type]
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize(("scale", "weight"), [(0.1, 5.0), (1e-3, 1.0)])
def test_formula(scale: float, weight: float) -> None:
    inputs = batch()
    loss, grad = evaluate(inputs, scale=scale, weight=weight)
    leaf = inputs["logprobs"].clone().requires_grad_()
    expected = by_hand({**inputs, "logprobs": leaf}, scale, weight)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, leaf.grad)


def test_the_gradient_is_kimis_ascent_direction() -> None:
    """arXiv 2501.12599, eq. 3: the direction A dlogp(y) - tau/2 d(log-ratio of the sequence)^2, averaged."""
    inputs, tau = batch(), 0.3
    _, grad = evaluate(inputs, scale=tau, weight=1 / (2 * tau))
    leaf = inputs["logprobs"].clone().requires_grad_()
    ascent = leaf.sum() * 0.0
    for row in (0, 2, 3):
        live = inputs["mask"][row]
        total = leaf[row][live].sum()
        u = total - inputs["anchor_logprobs"][row][live].sum()
        ascent = ascent + (inputs["targets"][row] * total - 0.5 * tau * u.square()) / 3
    ascent.backward()
    torch.testing.assert_close(grad, -leaf.grad)


def test_float32_is_as_accurate_as_eager() -> None:
    inputs, options = batch(torch.float32), {"scale": 0.1, "weight": 5.0}
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    leaf = inputs["logprobs"].clone().requires_grad_()
    eager = by_hand({**inputs, "logprobs": leaf}, **options)
    eager.backward()
    loss, grad = evaluate(inputs, **options)
    exact, exact_grad = evaluate(exact_inputs, **options)
    assert (loss.dtype, exact.dtype) == (torch.float32, torch.float64)
    assert_as_accurate("loss", loss, exact, eager.detach())
    assert_as_accurate("gradient", grad, exact_grad, leaf.grad)


def test_the_preset_is_the_function() -> None:
    """`PolicyLoss.preset("opmd_sequence")` is Kimi k1.5's weight, also through the kernel's arithmetic."""
    inputs, tau = batch(), 0.3
    expected = evaluate(inputs, scale=tau, weight=1 / (2 * tau))
    spec = PolicyLoss.preset("opmd_sequence", square_tau=tau)
    names = {"advantages": "targets", "mask": "mask", "old_logprobs": "anchor_logprobs"}
    leaf = inputs["logprobs"].clone().requires_grad_()
    loss = spec(leaf, **{name: inputs[theirs] for name, theirs in names.items()}).loss
    loss.backward()
    torch.testing.assert_close((loss.detach(), leaf.grad), expected)


def test_masked_data_cannot_matter() -> None:
    inputs = batch()
    dirty = {k: v.clone() for k, v in inputs.items()}
    dirty["logprobs"][~inputs["mask"]] = math.nan
    dirty["anchor_logprobs"][~inputs["mask"]] = -math.inf
    for clean, poisoned in zip(evaluate(inputs, scale=0.1), evaluate(dirty, scale=0.1), strict=True):
        assert torch.equal(clean, poisoned)


def test_packed_is_padded_bit_by_bit() -> None:
    inputs = batch(torch.float32)
    rows = torch.arange(6) < torch.tensor(LENGTHS).unsqueeze(1)
    packed = {k: v[rows] if v.dim() == 2 else v for k, v in inputs.items()}
    offsets = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])
    loss, grad = evaluate(inputs, scale=0.1)
    packed_loss, packed_grad = evaluate(packed, scale=0.1, cu_seqlens=offsets)
    assert torch.equal(loss, packed_loss)
    assert torch.equal(grad[rows], packed_grad)


def test_micro_batches_add_up() -> None:
    inputs = batch()
    whole = evaluate(inputs, scale=0.1)
    parts = [
        evaluate({k: v[i : i + 1] for k, v in inputs.items()}, scale=0.1, n_sequences=torch.tensor(3)) for i in range(4)
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), whole[0])
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), whole[1])


def test_an_empty_batch_has_a_zero_loss_with_a_gradient() -> None:
    inputs = batch()
    loss, grad = evaluate({**inputs, "mask": torch.zeros_like(inputs["mask"])}, scale=0.1)
    assert loss.item() == 0.0
    assert not grad.any()


def test_metrics_are_sums_and_counts() -> None:
    inputs = batch()
    output = sequence_square_loss(**inputs, scale=0.1)
    total, count = output.metrics["square_error"]
    assert count.item() == 3
    torch.testing.assert_close(total / count, output.loss)
    assert output.logprobs is not None
    assert torch.equal(output.logprobs[inputs["mask"]], inputs["logprobs"][inputs["mask"]])
    assert not output.logprobs[~inputs["mask"]].any()


def test_optimal_values() -> None:
    """Between the mean and the largest reward: arXiv 2505.20686's beta_1 log mean exp(R / beta_1)."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([0.5 * math.log(0.5 + 0.5 * math.exp(2.0)), 1.0])
    torch.testing.assert_close(optimal_values(rewards, 0.5), expected)
    torch.testing.assert_close(optimal_values(rewards, 1e-4), torch.tensor([1.0, 1.0]), atol=1e-4, rtol=0.0)
    torch.testing.assert_close(optimal_values(rewards, 1e4), torch.tensor([0.5, 1.0]), atol=1e-4, rtol=0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.zeros(3, dtype=torch.float64)}, "targets must have shape"),
        ({"targets": torch.zeros(4, 6, dtype=torch.float64)}, "targets must have shape"),
        ({"anchor_logprobs": torch.zeros(4, 5)}, "anchor_logprobs must have shape"),
        ({"scale": 0.0}, "scale must be finite and > 0"),
        ({"weight": -1.0}, "weight must be finite and > 0"),
        ({"n_sequences": 0}, "n_sequences must be finite and > 0"),
        ({"n_sequences": torch.ones(2)}, r"n_sequences must be a number or a tensor of one element, got shape \(2,\)"),
        ({"mask": torch.full((4, 6), 0.5)}, "mask must hold only 0 and 1"),
    ],
)
def test_bad_input_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sequence_square_loss(**{**batch(), "scale": 0.1, **changes})  # type: ignore[arg-type]


def test_bad_rewards_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards must be \(P, n\) with n >= 1, got shape \(4,\)"):
        optimal_values(torch.zeros(4), 0.5)
    with pytest.raises(ValueError, match="beta must be finite and > 0"):
        optimal_values(torch.zeros(4, 2), 0.0)
