"""The gradient coefficients of docs/unified-view.md: closed forms against autograd on the losses."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastrl import PolicyLoss
from fastrl.losses.gradient_coefficients import gradient_coefficients
from fastrl.losses.preference import PreferenceLoss
from fastrl.losses.regression import sequence_square_loss

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "unified-view.md").read_text()
ROWS, TIME = 6, 5


class Batch:
    """Random tokens with every symbol of the table: s, A, r, x, p, q and the mask m, each (B, T) or (B, 1)."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.q = torch.sigmoid(draw(ROWS, TIME))
        self.old = self.q.log()
        self.logprobs = (self.old + 0.5 * draw(ROWS, TIME)).clamp(max=-0.01)
        self.ref = self.logprobs + 0.3 * draw(ROWS, TIME)
        self.advantages = torch.tensor([1.5, -0.7, 0.4, -2.0, 0.0, 0.9], dtype=torch.float64)
        self.mask = torch.arange(TIME) < torch.tensor([5, 3, 4, 5, 2, 1]).unsqueeze(1)
        self.m = self.mask.double()
        self.a = self.advantages.unsqueeze(1)
        self.p = self.logprobs.exp()
        self.x = self.logprobs - self.ref
        self.u = self.logprobs - self.old
        self.r = self.u.exp()
        self.token = self.m / self.m.sum()
        self.sequence = self.m / (ROWS * self.m.sum(1, keepdim=True))

    def mean(self, values: Tensor) -> Tensor:
        return (values * self.m).sum(1, keepdim=True) / self.m.sum(1, keepdim=True)

    def inside(self, ratio: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
        """Return [not clipped]: where PPO's minimum takes the unclipped branch."""
        return ~(((self.a > 0) & (ratio > 1.0 + high)) | ((self.a < 0) & (ratio < 1.0 - low)))


def gmpo(b: Batch) -> Tensor:
    inside = ~(((b.a > 0) & (b.u > 0.4)) | ((b.a <= 0) & (b.u < -0.4)))
    clipped = torch.where(b.a > 0, b.u.clamp(max=0.4), b.u.clamp(min=-0.4))
    return -b.sequence * b.a * b.mean(clipped).exp() * inside


def vespo(b: Batch) -> Tensor:
    log_w = (b.u * b.m).sum(1, keepdim=True)
    k, rate = torch.where(b.a >= 0, 2.0, 3.0), torch.where(b.a >= 0, 3.0, 2.0)
    return -b.token * b.a * (rate + k * log_w - rate * log_w.exp()).exp()


def sapo(b: Batch) -> Tensor:
    k = torch.sigmoid(torch.where(b.a > 0, 1.0, 1.05) * (b.r - 1.0))
    return -b.sequence * b.a * b.r * 4.0 * k * (1.0 - k)


def kl_cov(b: Batch) -> Tensor:
    a, lp = b.a.expand(ROWS, TIME)[b.mask], b.logprobs[b.mask]
    covariance = torch.full_like(b.p, -torch.inf)
    covariance[b.mask] = (a - a.mean()) * (lp - lp.mean())
    largest = covariance >= covariance.flatten().topk(4).values[-1]
    return b.token * (-b.a * b.r + b.u.sign() * largest)


def gspo(b: Batch, low: float = 0.03, high: float = 0.04) -> Tensor:
    w = b.mean(b.u).exp()
    return -b.sequence * b.a * w * b.inside(w, low, high)


def dppo(b: Batch) -> Tensor:
    gap = b.p - b.q
    return -b.token * b.a * b.r * torch.where(b.a > 0, gap <= 0.1, gap >= -0.1)


WIDE = {"clip_low": 0.03, "clip_high": 0.04}
# Preset, fields, closed form: every preset that the table names.
CLOSED: list[tuple[str, dict[str, float | str], Callable[[Batch], Tensor]]] = [
    ("sft", {}, lambda b: -b.token),
    ("rft", {}, lambda b: -b.token),
    ("dft", {}, lambda b: -b.token * b.p),
    ("reinforce", {}, lambda b: -b.token * b.a),
    ("gpg", {}, lambda b: -b.token * b.a),
    ("rloo", {}, lambda b: -b.m / ROWS * b.a),
    ("ppo", {}, lambda b: -b.token * b.a * b.r * b.inside(b.r)),
    ("ppo", {"dual_clip": 1.1}, lambda b: -b.token * b.a * b.r * (b.inside(b.r) & ~((b.a < 0) & (b.r > 1.1)))),
    ("grpo", {}, lambda b: b.sequence * (-b.a * b.r * b.inside(b.r) + 0.04 * (1.0 - (-b.x).exp()))),
    ("dr_grpo", {"constant": 7.0}, lambda b: -b.m / (ROWS * 7.0) * b.a * b.r * b.inside(b.r)),
    ("dapo", {}, lambda b: -b.token * b.a * b.r * b.inside(b.r, 0.2, 0.28)),
    ("gspo", WIDE, gspo),
    ("gspo_token", WIDE, gspo),
    ("gmpo", {}, gmpo),
    ("cispo", {"weight_high": 1.2}, lambda b: -b.token * b.a * b.r.clamp(max=1.2)),
    ("sapo", {}, sapo),
    ("vespo", {}, vespo),
    ("topr", {}, lambda b: -b.token * b.a * torch.where(b.a > 0, 1.0, b.r.clamp(max=1.0))),
    ("dppo_tv", {"clip_low": 0.1, "clip_high": 0.1}, dppo),
    ("kl_cov", {"kl_fraction": 0.2}, kl_cov),
    ("opmd", {}, lambda b: b.token * (-b.a + 0.1 * b.u)),
    ("opmd_sequence", {}, lambda b: b.m / ROWS * (0.1 * (b.u * b.m).sum(1, keepdim=True) - b.a)),
]


def coefficients(name: str, fields: dict[str, float | str], b: Batch, **more: Tensor) -> tuple[Tensor, Tensor]:
    loss = PolicyLoss.preset(name, **fields)
    inputs = {"advantages": b.advantages, "mask": b.mask, "old_logprobs": b.old, "ref_logprobs": b.ref}
    return gradient_coefficients(loss, b.logprobs, **inputs, **more)


@pytest.mark.parametrize(("name", "fields", "closed"), CLOSED)
def test_closed_forms(name: str, fields: dict[str, float | str], closed: Callable[[Batch], Tensor]) -> None:
    b = Batch()
    g, h = coefficients(name, fields, b)
    torch.testing.assert_close(g, closed(b))
    assert not h.any()
    assert not g[~b.mask].any()


def test_the_batch_reaches_every_branch() -> None:
    """Clips bite on both sides and leave tokens alone on both sides, or the closed forms would prove little."""
    b = Batch()
    for sign in (b.a > 0, b.a < 0):
        for values in (b.inside(b.r), b.inside(b.r, 0.2, 0.28), (b.p - b.q).abs() <= 0.1):
            assert {True, False} <= set(values[sign.expand(ROWS, TIME) & b.mask].tolist())
    w = b.mean(b.u).exp()
    assert {True, False} <= set(b.inside(w, 0.03, 0.04)[(b.a != 0)].tolist())


def test_every_preset_of_the_table_has_a_closed_form() -> None:
    rows = re.findall(r"^\| [^|]+ \| `(\w+)` \|", PAGE, flags=re.MULTILINE)
    assert len(rows) > 20
    assert set(rows) - {"sigmoid"} == {name for name, *_ in CLOSED}


def test_dpo() -> None:
    b = Batch()
    loss, half = PreferenceLoss.preset("sigmoid", beta=0.3), ROWS // 2
    g, h = gradient_coefficients(loss, b.logprobs, mask=b.mask, ref_logprobs=b.ref)
    u = (b.x * b.m).sum(1)
    weight = 0.3 * torch.sigmoid(-0.3 * (u[:half] - u[half:])) / half
    torch.testing.assert_close(g, torch.cat([-weight, weight]).unsqueeze(1) * b.m)
    assert not h.any()


def test_the_sequence_square() -> None:
    b = Batch()
    loss = functools.partial(sequence_square_loss, scale=0.2, weight=1 / 0.4)
    g, _ = gradient_coefficients(loss, b.logprobs, targets=b.advantages, mask=b.mask, anchor_logprobs=b.old)
    u = (b.u * b.m).sum(1, keepdim=True)
    torch.testing.assert_close(g, -(b.a - 0.2 * u) / ROWS * b.m)


@pytest.mark.parametrize("name", ["ppo", "grpo", "gspo", "sft"])
def test_entropy_bonus(name: str) -> None:
    b = Batch()
    without, _ = coefficients(name, {}, b)
    g, h = coefficients(name, {"entropy_coef": 0.02}, b, entropy=b.p)
    torch.testing.assert_close(h, -0.02 * b.token)
    assert torch.equal(g, without)


def test_on_policy_the_coefficients_are_one() -> None:
    """At r = 1 the clip, CISPO, SAPO, TOPR, DPPO and REINFORCE put the same weight on every token."""
    b = Batch()
    b.old = b.ref = b.logprobs
    expected = -b.token * b.a
    for name in ("reinforce", "ppo", "grpo", "dapo", "cispo", "sapo", "topr", "dppo_tv", "dppo_kl", "opmd"):
        g, _ = coefficients(name, {"aggregate": "token_mean"}, b)
        torch.testing.assert_close(g, expected)


def test_nothing_is_left_behind() -> None:
    """The point is not touched and grad mode does not matter. The result is detached, in the dtype of the point."""
    b = Batch()
    point = b.logprobs.float().requires_grad_()
    with torch.no_grad():
        g, h = gradient_coefficients(PolicyLoss(), point, advantages=b.advantages.float(), mask=b.mask, entropy=point)
    assert point.grad is None
    for result in (g, h):
        assert (result.dtype, result.shape, result.requires_grad) == (torch.float32, point.shape, False)
    packed = gradient_coefficients(
        PolicyLoss(), point[0], advantages=b.a[0].float(), mask=b.mask[0], cu_seqlens=torch.tensor([0, TIME])
    )
    assert packed.g.shape == (TIME,)


def test_bad_input_is_refused() -> None:
    b = Batch()
    with pytest.raises(TypeError, match=r"logprobs must be a torch.Tensor"):
        gradient_coefficients(PolicyLoss(), [0.0], mask=b.mask)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="entropy must have shape"):
        gradient_coefficients(PolicyLoss(), b.logprobs, mask=b.mask, entropy=b.p[:, :2])
    with pytest.raises(ValueError, match="needs advantages="):
        gradient_coefficients(PolicyLoss(), b.logprobs, mask=b.mask)
