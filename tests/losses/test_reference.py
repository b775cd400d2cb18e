"""The reference itself: gradcheck in float64, limits that must hold exactly, finiteness far out."""

import math

import pytest
import torch
from torch import Tensor

from fastrl import reference
from fastrl.losses.policy import PolicyLoss
from fastrl.losses.policy.axes import SURROGATES


def test_vocabulary_operation_gradcheck(seed: int) -> None:
    logits = torch.randn(3, 4, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (3, 4))
    labels[1, 2] = -100
    temperature = torch.rand(3, 4, dtype=torch.float64) + 0.5
    options = [{}, {"temperature": temperature, "softcap": 3.0, "logit_scale": 0.7}]
    for kwargs in options:
        assert torch.autograd.gradcheck(lambda x, kw=kwargs: reference.token_logprobs(x, labels, **kw), (logits,))


def test_linear_vocabulary_operation_gradcheck(seed: int) -> None:
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 6, (5,))
    assert torch.autograd.gradcheck(
        lambda h, w, b: reference.linear_token_logprobs(h, w, labels, b, temperature=0.7), (hidden, weight, bias)
    )


def test_entropy_of_uniform_is_log_v() -> None:
    _, entropy, logsumexp = reference.token_logprobs(torch.zeros(1, 8, dtype=torch.float64), torch.tensor([3]))
    assert entropy.item() == pytest.approx(math.log(8), rel=1e-15)
    assert logsumexp.item() == pytest.approx(math.log(8), rel=1e-15)


def test_banned_tokens_have_finite_entropy_and_zero_gradient() -> None:
    logits = torch.tensor([[-math.inf, -math.inf, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    logprobs, entropy, _ = reference.token_logprobs(logits, torch.tensor([3]))
    kept = torch.tensor([[1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    want_logprobs, want_entropy, _ = reference.token_logprobs(kept, torch.tensor([1]))
    assert torch.equal(logprobs, want_logprobs)
    assert torch.allclose(entropy, want_entropy, rtol=1e-15)
    (logprobs + entropy).sum().backward()
    assert torch.equal(logits.grad[0, :2], torch.zeros(2, dtype=torch.float64))
    assert bool(logits.grad.isfinite().all())


def test_exp_linear_continues_value_and_slope() -> None:
    limit = reference.EXP_LIMIT
    x = torch.tensor(
        [0.0, limit - 1e-9, limit + 1e-9, 1e4, math.inf, math.nan], dtype=torch.float64, requires_grad=True
    )
    y = reference.exp_linear(x)
    (slope,) = torch.autograd.grad(y[:4].sum(), x)
    assert y[0].item() == 1.0
    assert y[1].item() == pytest.approx(y[2].item(), rel=1e-8)
    assert slope[1].item() == pytest.approx(slope[2].item(), rel=1e-8)
    assert slope[3].item() == pytest.approx(math.exp(limit))
    assert math.isfinite(y[4].item())
    assert math.isnan(y[5].item())
    assert bool(reference.exp_linear(torch.tensor([1e4, 1e30])).isfinite().all())


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
@pytest.mark.parametrize("gradient", ["plain", "ratio_weighted", "straight_through", "straight_through_ratio"])
def test_kl_is_finite_far_out_and_zero_at_equality(estimator: str, gradient: str) -> None:
    logprobs = torch.tensor([-1e4, -100.0, -1.5, -0.1], requires_grad=True)
    for other in (torch.tensor([-0.1, -0.1, -1.5, -0.1]), torch.tensor([-0.1, -1e4, -1.5, -1e4])):
        ratio = reference.exp_linear(logprobs - logprobs.detach())
        value = reference.kl_estimate(logprobs, other, estimator, gradient, ratio, ratio_max=10.0)
        (slope,) = torch.autograd.grad(value.sum(), logprobs)
        assert bool(value.isfinite().all())
        assert bool(slope.isfinite().all())
        assert value[2].item() == 0.0
        if estimator != "k1" or gradient.startswith("straight"):
            assert slope[2].item() == 0.0


def _inputs(n: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)

    def draw(scale: float) -> Tensor:
        return torch.randn(n, dtype=torch.float64, generator=generator) * scale

    logprobs = -draw(1.0).abs() - 0.1
    return {
        "logprobs": logprobs,
        "old": logprobs + draw(0.3),
        "ref": logprobs + draw(0.3),
        "rollout": logprobs + draw(0.3),
        "advantages": draw(1.0),
        "entropy": draw(1.0).abs(),
        "mask": torch.arange(n) % 5 != 3,
        "lengths": torch.tensor([4, 0, 5, 3]),
    }


SMOOTH = ("clip", "reinforce", "importance", "nll", "sapo", "geometric")


@pytest.mark.parametrize("surrogate", SMOOTH)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
def test_policy_loss_gradcheck(surrogate: str, level: str) -> None:
    """Autograd against finite differences; the other surrogates stop a gradient, and golden cases judge them."""
    assert surrogate in SURROGATES
    x = _inputs()
    spec = PolicyLoss(
        surrogate=surrogate,
        ratio_level=level,
        clip_low=0.31 if surrogate in ("clip", "geometric") else None,
        clip_high=0.27 if surrogate in ("clip", "geometric") else None,
        kl="k3",
        kl_coef=0.3,
        kl_gradient="ratio_weighted",
        kl_ratio_anchor="old" if surrogate == "geometric" and level != "token" else None,
        entropy_coef=0.1,
        aggregate="sequence_mean",
    )

    def value(logprobs: Tensor, entropy: Tensor) -> Tensor:
        loss, _, _ = reference.policy_loss(
            spec,
            logprobs,
            advantages=x["advantages"],
            mask=x["mask"],
            lengths=x["lengths"],
            entropy=entropy,
            old_logprobs=x["old"],
            ref_logprobs=x["ref"],
            selection=torch.arange(12) % 4 != 1,
            positive=x["advantages"] > 0,
        )
        return loss

    leaves = (x["logprobs"].requires_grad_(), x["entropy"].requires_grad_())
    assert torch.autograd.gradcheck(value, leaves)


def test_segment_sum_takes_empty_segments_and_has_a_gradient() -> None:
    x = torch.arange(5, dtype=torch.float32, requires_grad=True)
    sums = reference.segment_sum(x, torch.tensor([0, 2, 0, 3]))
    assert sums.tolist() == [0.0, 1.0, 0.0, 9.0]
    (gradient,) = torch.autograd.grad((sums * torch.tensor([5.0, 2.0, 7.0, 3.0])).sum(), x)
    assert gradient.tolist() == [2.0, 2.0, 3.0, 3.0, 3.0]


@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages_against_numpy(baseline: str, scale: str, seed: int) -> None:
    rewards = torch.randn(11, dtype=torch.float64)
    group = torch.tensor([0, 1, 0, 2, 1, 0, 2, 1, 1, 0, 3])
    result = reference.group_advantages(rewards, group, 4, scale=scale, baseline=baseline, eps=1e-4)
    for i in range(11):
        mates = [rewards[j].item() for j in range(11) if group[j] == group[i]]
        if len(mates) == 1:
            assert result.advantages[i].item() == 0.0
            continue
        mean = sum(mates) / len(mates)
        want = rewards[i].item() - mean
        if baseline == "leave_one_out":
            want = rewards[i].item() - (sum(mates) - rewards[i].item()) / (len(mates) - 1)
        if scale == "group":
            want /= math.sqrt(sum((m - mean) ** 2 for m in mates) / (len(mates) - 1)) + 1e-4
        elif scale == "batch":
            want /= rewards.std().item() + 1e-4
        assert result.advantages[i].item() == pytest.approx(want, rel=1e-12)
