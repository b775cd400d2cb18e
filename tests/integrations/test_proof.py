"""The proof of the adapters: it accepts differences that rounding explains, and refuses all others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastrl.integrations.common.proof import AdapterMismatchError, FirstUse, prove, sampled_tokens

K, D, V = 24, 64, 101
UNDO = "leave the context to undo"


def rows(logits: Tensor, labels: Tensor) -> dict[str, Tensor | None]:
    """Return the quantities that an adapter replaces, from logits (K, V), in the precision of the logits."""
    logp = logits.log_softmax(-1)
    return {
        "logprobs": logp.gather(-1, labels[:, None]).squeeze(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
        "logsumexp": logits.logsumexp(-1),
        "log_sum_squared_probs": (2.0 * logp).logsumexp(-1),
        "mean_logits": logits.mean(-1),
    }


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logits of float64, logits of the host in its dtype, labels)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(K, D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    exact = hidden.double() @ weight.double().T
    return exact, (hidden @ weight.T).float(), torch.randint(0, V, (K,), generator=generator)


def run(ours: dict[str, Tensor | None], host: dict[str, Tensor | None], exact: Tensor, dtype: torch.dtype) -> bool:
    return prove(
        "adapter", ours, host, largest_logit=exact.abs().amax(-1), dtype=dtype, terms=D, vocabulary=V, undo=UNDO
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_passes(dtype: torch.dtype) -> None:
    exact, hosts, labels = problem(dtype)
    assert run(rows(exact, labels), rows(hosts, labels), exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forgotten", ["softcap", "scale", "temperature", "bias", "shift"])
def test_a_forgotten_step_is_refused(forgotten: str, dtype: torch.dtype) -> None:
    exact, hosts, labels = problem(dtype)
    host_logits = {
        "softcap": 10.0 * torch.tanh(hosts / 10.0),
        "scale": hosts * 0.8,
        "temperature": hosts / 0.9,
        "bias": hosts + torch.linspace(-3.0, 3.0, V),
        "shift": hosts,
    }[forgotten]
    ours = rows(exact, labels.roll(1) if forgotten == "shift" else labels)
    with pytest.raises(AdapterMismatchError, match=UNDO):
        run(ours, rows(host_logits, labels), exact, dtype)


def test_one_wrong_entropy_is_named() -> None:
    exact, hosts, labels = problem(torch.float32)
    ours = rows(exact, labels)
    entropy = ours["entropy"]
    assert entropy is not None
    entropy[3] += 1e-2
    with pytest.raises(AdapterMismatchError, match=r"entropy of compared token 3 .* exceeds"):
        run(ours, rows(hosts, labels), exact, torch.float32)


def test_nan_of_ours_is_refused_and_of_the_host_is_not_compared() -> None:
    exact, hosts, labels = problem(torch.float32)
    broken = rows(exact, labels)
    assert broken["logprobs"] is not None
    broken["logprobs"][0] = torch.nan
    with pytest.raises(AdapterMismatchError, match="nan"):
        run(broken, rows(hosts, labels), exact, torch.float32)
    assert run(rows(exact, labels), broken, exact, torch.float32)
    nothing = {"logprobs": torch.full((K,), torch.nan)}
    assert not run({"logprobs": rows(exact, labels)["logprobs"]}, nothing, exact, torch.float32)


def test_no_tokens_prove_nothing() -> None:
    empty: dict[str, Tensor | None] = {"logprobs": torch.empty(0)}
    assert not run(empty, empty, torch.ones(0, V), torch.float32)


def test_quantities_must_match() -> None:
    one = {"logprobs": torch.zeros(2)}
    with pytest.raises(ValueError, match="same quantities"):
        run(one, {**one, "entropy": torch.zeros(2)}, torch.ones(2, V), torch.float32)
    with pytest.raises(ValueError, match="no allowance for colour"):
        run({"colour": torch.zeros(2)}, {"colour": torch.zeros(2)}, torch.ones(2, V), torch.float32)
    with pytest.raises(AdapterMismatchError, match="2 values where the host has 3"):
        run(one, {"logprobs": torch.zeros(3)}, torch.ones(2, V), torch.float32)


def test_sampled_tokens_are_spread() -> None:
    assert sampled_tokens(3, "cpu").tolist() == [0, 1, 2]
    picked = sampled_tokens(1000, "cpu", 5).tolist()
    assert picked == [0, 250, 500, 749, 999]
    assert sampled_tokens(0, "cpu").numel() == 0


def test_first_use_repeats_until_proved() -> None:
    calls: list[int] = []
    first = FirstUse()

    def attempt() -> bool:
        calls.append(1)
        return len(calls) > 1

    for _ in range(4):
        first.once("key", attempt)
    assert len(calls) == 2
    first.forget()
    first.once("key", attempt)
    assert len(calls) == 3
