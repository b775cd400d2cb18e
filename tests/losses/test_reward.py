"""Reward models: released trainers' numbers, formulas, masks, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from golden import Case, cases
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.losses.output import LossOutput
from fastrl.losses.reward import process_reward_loss, reward_model_loss

REWARD = cases("reward_model")


def run(case: Case, leaves: dict[str, Tensor]) -> LossOutput:
    return reward_model_loss(
        leaves["chosen_scores"], leaves["rejected_scores"], leaves.get("margin"), case.hyper["centering_coef"]
    )


@pytest.mark.parametrize("case", REWARD, ids=[case.id for case in REWARD])
def test_golden_float64(case: Case) -> None:
    leaves = case.leaves(torch.float64)
    output = run(case, leaves)
    case.check("loss", output.loss)
    output.loss.backward()
    case.check_gradients(leaves)
    names = {"score_mean": "rewards/mean", "accuracy": "rewards/accuracies", "score_margin_mean": "rewards/margins"}
    for name, value in case.metrics.items():
        total, count = output.metrics[names[name]]
        assert float(total / count) == pytest.approx(value, rel=1e-6), name


@pytest.mark.parametrize("case", REWARD, ids=[case.id for case in REWARD])
def test_golden_float32(case: Case) -> None:
    exact_leaves, leaves = case.leaves(torch.float64), case.leaves(torch.float32)
    exact, result = run(case, exact_leaves).loss, run(case, leaves).loss
    exact.backward()
    result.backward()
    assert_as_accurate("loss", result, exact, exact.float())
    for name in case.differentiated:
        want = exact_leaves[name].grad
        assert_as_accurate(f"grad_{name}", leaves[name].grad, want, want.float())


def test_formula_and_gradcheck() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x, margin = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(3))
    want = (torch.log1p(torch.exp(x - w + margin)) + 0.3 * (w + x) ** 2).mean()
    torch.testing.assert_close(reward_model_loss(w, x, margin, 0.3).loss, want, rtol=1e-12, atol=0)
    inputs = (w.requires_grad_(), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: reward_model_loss(a, b, margin, 0.3).loss, inputs)


def test_extremes_and_empty() -> None:
    w = torch.tensor([1e4, -1e4], requires_grad=True)
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = reward_model_loss(w, x).loss
    loss.backward()
    assert float(loss.detach()) == 1e4
    assert w.grad.tolist() == [0.0, -0.5]
    empty = torch.zeros(0, requires_grad=True)
    loss = reward_model_loss(empty, empty).loss
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert empty.grad.shape == (0,)


def test_split_invariance() -> None:
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(7, generator=generator), torch.randn(7, generator=generator)
    parts = sum(reward_model_loss(w[rows], x[rows], n_pairs=7).loss for rows in (slice(0, 2), slice(2, 7)))
    torch.testing.assert_close(parts, reward_model_loss(w, x).loss)


def test_refusals() -> None:
    w = torch.zeros(4)
    with pytest.raises(ValueError, match=r"rejected_scores must have shape \(4,\), got \(3,\)"):
        reward_model_loss(w, w[:3])
    with pytest.raises(ValueError, match=r"chosen_scores must be \(P,\).*got shape \(4, 1\)"):
        reward_model_loss(w[:, None], w[:, None])
    with pytest.raises(ValueError, match=r"margin must have shape"):
        reward_model_loss(w, w, w[:3])
    with pytest.raises(ValueError, match="centering_coef must be"):
        reward_model_loss(w, w, None, -0.1)
    with pytest.raises(TypeError, match=r"must be float32.*got torch.int64"):
        reward_model_loss(torch.arange(4), w)
    with pytest.raises(TypeError, match=r"chosen_scores must be a torch\.Tensor, got NoneType"):
        reward_model_loss(None, w)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"n_pairs.*got shape \(2,\)"):
        reward_model_loss(w, w, n_pairs=torch.ones(2))


def steps() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (3, 6), generator=generator)
    mask = torch.rand(3, 6, generator=generator) < 0.5
    mask[:, 0] = True
    return logits, labels, mask


def test_process_reward_is_cross_entropy() -> None:
    logits, labels, mask = steps()
    output = process_reward_loss(logits, torch.where(mask, labels, -100), mask)
    want = F.cross_entropy(logits.flatten(0, 1), torch.where(mask, labels, -100).flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, want, rtol=1e-12, atol=0)
    correct = (logits.argmax(-1) == labels)[mask]
    assert [float(x) for x in output.metrics["accuracy"]] == [float(correct.sum()), float(mask.sum())]
    soft = process_reward_loss(logits, labels.double(), mask).loss
    torch.testing.assert_close(soft, want, rtol=1e-12, atol=0)


def test_process_reward_soft_labels() -> None:
    logits, _, mask = steps()
    right = torch.rand(3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_probs = torch.log_softmax(logits, -1)
    losses = -(right * log_probs[..., 1] + (1 - right) * log_probs[..., 0])
    want = torch.stack([losses[i][mask[i]].mean() for i in range(3)]).mean()
    got = process_reward_loss(logits, right, mask, aggregate="sequence_mean").loss
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(lambda z: process_reward_loss(z, right, mask).loss, (logits.requires_grad_(),))


@pytest.mark.parametrize("soft", [False, True])
def test_process_reward_masked_data_cannot_matter(soft: bool) -> None:
    logits, labels, mask = steps()

    def run(dirty: bool) -> tuple[Tensor, Tensor]:
        z = (logits.masked_fill(~mask[..., None], math.nan) if dirty else logits.clone()).requires_grad_()
        y = labels.double().masked_fill(~mask, math.nan) if soft else labels.masked_fill(~mask, 10**6)
        clean = labels.double() if soft else labels
        loss = process_reward_loss(z, y if dirty else clean, mask).loss
        loss.backward()
        return loss.detach(), z.grad

    for clean, dirty in zip(run(False), run(True), strict=True):
        assert torch.equal(clean, dirty)


def test_process_reward_extremes_and_refusals() -> None:
    logits, labels, mask = steps()
    banned = logits.clone().float()
    banned[0, 0] = torch.tensor([-math.inf, 1.0])
    one = torch.ones_like(labels)
    z = banned.requires_grad_()
    process_reward_loss(z, one, mask).loss.backward()
    assert bool(z.grad.isfinite().all())
    with pytest.raises(ValueError, match=r"labels must be in \[0, V=2\)"):
        process_reward_loss(logits, labels + 2, mask)
    with pytest.raises(ValueError, match=r"probabilities in \[0, 1\]"):
        process_reward_loss(logits, labels.double() + 0.5, mask)
    with pytest.raises(ValueError, match="C=2, got C=3"):
        process_reward_loss(torch.zeros(3, 6, 3), labels.double(), mask)
    with pytest.raises(ValueError, match=r"labels must have shape \(3, 6\)"):
        process_reward_loss(logits, labels[:, :5], mask)
    with pytest.raises(ValueError, match="C >= 2"):
        process_reward_loss(logits[..., :1], torch.zeros_like(labels), mask)
    with pytest.raises(ValueError, match="labels must be on cpu, got meta"):
        process_reward_loss(logits, labels.to("meta"), mask)
    with pytest.raises(ValueError, match="aggregate must be one of"):
        process_reward_loss(logits, labels, mask, aggregate="constant")
