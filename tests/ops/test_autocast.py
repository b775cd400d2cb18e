"""Autocast changes no bit of an operation of ours, wherever the region begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from fastrl import PolicyLoss, PreferenceLoss, linear_token_logprobs, token_logprobs
from fastrl.losses.distillation import distillation_loss, distillation_loss_from_logits
from fastrl.losses.value import value_loss
from fastrl.ops.row_statistics import linear_row_statistics, row_statistics

B, T, D, V = 4, 6, 16, 40


def autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


MASK = torch.arange(T) < torch.tensor([6, 4, 5, 2])[:, None]
Leaves = dict[str, Tensor]


def labels() -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))


def policy(name: str, entry: str, **fields: object) -> Callable[[Leaves], Tensor]:
    inputs = {"advantages": torch.linspace(-1, 2, B), "mask": MASK, "old_logprobs": torch.full((B, T), -3.7)}
    spec = PolicyLoss.preset(name, **fields)
    if entry == "logits":
        return lambda x: spec.from_logits(x["logits"], labels(), **inputs).loss
    return lambda x: spec.from_hidden(x["hidden"], x["weight"], labels(), chunk_tokens=5, **inputs).loss


def weighted(outputs: tuple[Tensor, ...]) -> Tensor:
    return sum(((i + 1) * x.float()).sum() for i, x in enumerate(outputs))  # type: ignore[return-value]


PREFERENCE = PreferenceLoss.preset("simpo")
OPERATIONS: dict[str, tuple[Callable[[Leaves], Tensor], str]] = {
    "token_logprobs": (lambda x: weighted(token_logprobs(x["logits"], labels())), "logits"),
    "token_logprobs torch": (
        lambda x: weighted(token_logprobs(x["logits"], labels(), softcap=4.0, backend="torch")),
        "logits",
    ),
    "linear_token_logprobs": (
        lambda x: weighted(linear_token_logprobs(x["hidden"], x["weight"], labels(), chunk_tokens=5)),
        "hidden weight",
    ),
    "linear_token_logprobs, frozen head": (
        lambda x: linear_token_logprobs(x["hidden"], x["weight"], labels(), chunk_tokens=5).logprobs.sum(),
        "hidden",
    ),
    "row_statistics": (lambda x: weighted(row_statistics(x["logits"], labels())), ""),
    "linear_row_statistics": (lambda x: weighted(linear_row_statistics(x["hidden"], x["weight"], labels())), ""),
    "dapo from logits": (policy("dapo", "logits", entropy_coef=0.1), "logits"),
    "dapo from hidden": (policy("dapo", "hidden", entropy_coef=0.1), "hidden weight"),
    "dapo from hidden, frozen head": (policy("dapo", "hidden"), "hidden"),
    "gspo from hidden": (policy("gspo", "hidden"), "hidden weight"),
    "preference from hidden": (
        lambda x: PREFERENCE.from_hidden(x["hidden"], x["weight"], labels(), MASK).loss,
        "hidden weight",
    ),
    "distillation": (
        lambda x: (
            distillation_loss(x["hidden"], x["weight"], x["hidden"].detach() * 0.5, x["weight"], MASK, beta=0.5).loss
        ),
        "hidden weight",
    ),
    "distillation from logits": (
        lambda x: distillation_loss_from_logits(x["logits"], x["logits"].detach() * 0.5, MASK, beta=0.5).loss,
        "logits",
    ),
    "value": (
        lambda x: (
            value_loss(
                x["hidden"][..., 0].float(), torch.zeros(B, T), torch.ones(B, T), MASK, clip=0.2, coefficient=0.5
            ).loss
        ),
        "hidden",
    ),
}
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "bfloat16 states, float32 head": (torch.bfloat16, torch.float32),
}


def run(
    name: str, dtypes: str, forward: AbstractContextManager[None], backward: AbstractContextManager[None]
) -> Leaves:
    """Return the result and the gradients of an operation in the two contexts."""
    operation, trained = OPERATIONS[name]
    generator = torch.Generator().manual_seed(0)
    states, head = DTYPES[dtypes]
    leaves = {
        "hidden": torch.randn(B, T, D, generator=generator).to(states),
        "weight": torch.randn(V, D, generator=generator).to(head),
        "logits": (3.0 * torch.randn(B, T, V, generator=generator)).to(states),
    }
    for leaf in trained.split():
        leaves[leaf].requires_grad_()
    with forward:
        result = operation(leaves)
    if trained:
        with backward:
            result.backward()
    return {"result": result.detach()} | {leaf: leaves[leaf].grad for leaf in trained.split()}  # type: ignore[dict-item]


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_autocast_changes_no_bit(name: str, dtypes: str) -> None:
    want = run(name, dtypes, nullcontext(), nullcontext())
    for forward, backward in ((autocast(), autocast()), (autocast(), nullcontext()), (nullcontext(), autocast())):
        got = run(name, dtypes, forward, backward)
        for key, value in want.items():
            assert value.dtype == got[key].dtype
            assert torch.equal(value, got[key]), key


def test_autocast_of_the_caller_goes_on_after_the_call() -> None:
    x = torch.randn(3, D)
    with autocast():
        linear_token_logprobs(x, torch.randn(V, D), torch.zeros(3, dtype=torch.int64))
        assert (x @ x.t()).dtype == torch.bfloat16
