"""The likely mistakes of a first call: each error names the wrong argument and the value that came."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastrl

B, T, D, V = 4, 8, 16, 50
DAPO = fastrl.PolicyLoss.preset("dapo")
GRPO = fastrl.PolicyLoss.preset("grpo", kl_coef=0.0)
SIMPO = fastrl.PreferenceLoss.preset("simpo")


def batch(**changes: Any) -> dict[str, Any]:
    """Return arguments that are right, but for the changes."""
    generator = torch.Generator().manual_seed(0)
    values: dict[str, Any] = {
        "labels": torch.randint(0, V, (B, T), generator=generator),
        "mask": torch.ones(B, T, dtype=torch.bool),
        "advantages": torch.randn(B, generator=generator),
    }
    return {**values, **changes}


def sources() -> dict[str, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    return {
        "from_logits": (torch.randn(B, T, V, generator=generator),),
        "from_hidden": (torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator)),
    }


UNFINISHED = torch.where(torch.arange(T) < 2, -100, 1).expand(B, T)


@pytest.mark.parametrize("method", ["from_logits", "from_hidden"])
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"labels": torch.zeros(B, T - 1, dtype=torch.long)},
            ValueError,
            r"labels must have shape \(4, 8\), got \(4, 7\): nothing is shifted here; logits\[:, :-1\] go with",
        ),
        ({"labels": torch.zeros(B, dtype=torch.long)}, ValueError, r"labels must have shape \(4, 8\), got \(4,\)$"),
        ({"labels": torch.zeros(B, T, dtype=torch.long, device="meta")}, ValueError, "labels must be on cpu, got meta"),
        ({"labels": torch.zeros(B, T)}, TypeError, "labels must be int64 or int32, got torch.float32"),
        ({"labels": UNFINISHED}, ValueError, r"labels must be in \[0, V=50\) where the mask is 1, got \[-100, -100"),
        ({"mask": torch.ones(B, T - 1)}, ValueError, r"mask must have shape \(4, 8\), got \(4, 7\)"),
        ({"mask": torch.ones(B, T, device="meta")}, ValueError, "mask must be on cpu, got meta"),
        ({"mask": torch.full((B, T), 0.5)}, ValueError, "mask must hold only 0 and 1, got"),
        ({"mask": None}, TypeError, "mask= is needed"),
        ({"advantages": torch.ones(B, T, 1)}, ValueError, r"advantages must have shape .*\(4, 8\), got \(4, 8, 1\)"),
        ({"advantages": [1.0] * B}, TypeError, "advantages must be a torch.Tensor, got list"),
        ({"old_logprobs": torch.zeros(B, T - 1)}, ValueError, r"old_logprobs must have shape \(4, 8\), got \(4, 7\)"),
        ({"advantage": torch.ones(B)}, TypeError, "unexpected argument advantage; known: advantages"),
    ],
)
def test_the_argument_that_is_wrong_is_named(
    method: str, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = batch(**changes)
    labels = arguments.pop("labels")
    with pytest.raises(error, match=message):
        getattr(DAPO, method)(*sources()[method], labels, **arguments)


@pytest.mark.parametrize(
    "source", [torch.zeros(B, T, V, dtype=torch.long), torch.zeros(B, T, V, dtype=torch.float8_e4m3fn)]
)
def test_a_dtype_without_arithmetic_is_refused(source: torch.Tensor) -> None:
    arguments = batch()
    with pytest.raises(TypeError, match="logits must be float32, bfloat16, float16 or float64, got torch"):
        DAPO.from_logits(source, arguments.pop("labels"), **arguments)


def test_a_kl_without_a_reference_says_how_to_do_without() -> None:
    arguments = batch()
    arguments.pop("labels")
    with pytest.raises(ValueError, match=r"needs ref_logprobs=, also to measure it with kl_coef=0; kl=None leaves"):
        GRPO(torch.zeros(B, T), **arguments)
    assert torch.isfinite(fastrl.PolicyLoss.preset("grpo", kl=None)(torch.zeros(B, T), **arguments).loss)


def test_old_logprobs_are_constants() -> None:
    arguments = batch()
    arguments.pop("labels")
    logprobs, old = (torch.zeros(B, T, requires_grad=True) for _ in range(2))
    DAPO(logprobs, old_logprobs=old, **arguments).loss.backward()
    assert logprobs.grad is not None
    assert old.grad is None


@pytest.mark.parametrize("method", ["from_logits", "from_hidden"])
def test_a_preference_loss_refuses_what_a_collator_left_under_a_live_mask(method: str) -> None:
    call: Callable[..., Any] = getattr(SIMPO, method)
    source = sources()[method]
    live = torch.ones(B, T)
    with pytest.raises(ValueError, match=r"where the mask is 1, got \[-100, -100, -100, -100\]"):
        call(*source, UNFINISHED, live)
    masked = live * (torch.arange(T) >= 2)
    assert torch.equal(call(*source, UNFINISHED, masked).loss, call(*source, UNFINISHED.abs() % V, masked).loss)


def test_names_that_are_not_presets() -> None:
    with pytest.raises(ValueError, match=r"unknown preference loss 'dpo'; known: sigmoid, .*; DPO is 'sigmoid'"):
        fastrl.PreferenceLoss.preset("dpo")
    with pytest.raises(TypeError, match=r"cu_seqlens must be a 1-D int32 or int64 tensor .* got \[0, 8\]"):
        DAPO(torch.zeros(8), advantages=torch.ones(1), mask=torch.ones(8), cu_seqlens=[0, 8])  # pyright: ignore[reportArgumentType]


def test_a_loss_is_shown_as_one_would_write_it() -> None:
    correction = fastrl.RolloutCorrection(high=2.0)
    loss = fastrl.PolicyLoss.preset("dapo", correction=correction)
    assert repr(loss) == "PolicyLoss(clip_high=0.28, correction=RolloutCorrection(high=2.0))"
    assert eval(repr(loss), vars(fastrl)) == loss
    assert repr(fastrl.PolicyLoss()) == "PolicyLoss()"
    assert "beta=0.3" in repr(fastrl.PreferenceLoss.preset("ipo", beta=0.3))
    assert repr(fastrl.PreferenceLoss.preset("ipo")) != repr(fastrl.PreferenceLoss.preset("sigmoid"))
