"""The operations inside `torch.compile`, activation checkpointing, `no_grad` and `inference_mode`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastrl import PolicyLoss, PreferenceLoss, linear_token_logprobs, token_logprobs

B, T, D, V = 3, 4, 8, 30
Leaves = tuple[Tensor, Tensor]


LABELS = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
LABELS[1, 2:] = -100


def leaves(trained: bool = True) -> Leaves:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(B, T, D, generator=generator), torch.randn(V, D, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(trained)


def from_states(hidden: Tensor, weight: Tensor) -> Tensor:
    outputs = linear_token_logprobs(hidden, weight, LABELS, chunk_tokens=5, temperature=0.7)
    return (outputs.logprobs + 0.1 * outputs.entropy).sum()


def from_states_logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
    return linear_token_logprobs(hidden, weight, LABELS, chunk_tokens=5).logprobs.sum()


def from_given_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    outputs = token_logprobs(hidden @ weight.t(), LABELS, softcap=5.0)
    return (outputs.logprobs + 0.1 * outputs.entropy).sum()


def restricted(hidden: Tensor, weight: Tensor) -> Tensor:
    ids = torch.arange(20).expand(B, T, 20)
    given = LABELS.clamp(max=19)
    outputs = linear_token_logprobs(hidden, weight, given, chunk_tokens=5, allowed=ids, logits_rounding="bf16")
    again = token_logprobs(hidden @ weight.t(), given, allowed=ids)
    return outputs.logprobs.sum() + again.entropy.sum()


def policy_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    return PolicyLoss.preset("dapo", entropy_coef=0.1).from_hidden(
        hidden, weight, LABELS, advantages=torch.tensor([1.0, -1.0, 2.0]), mask=LABELS >= 0,
        old_logprobs=torch.full((B, T), -3.0), chunk_tokens=5,
    ).loss  # fmt: skip


def preference_loss(hidden: Tensor, weight: Tensor) -> Tensor:
    rows = torch.cat((hidden, hidden.flip(1)))[:4]
    labels = torch.cat((LABELS, LABELS.flip(1)))[:4]
    return PreferenceLoss.preset("simpo").from_hidden(rows, weight, labels, labels >= 0, chunk_tokens=5).loss


OPERATIONS = (from_states, from_states_logprobs, from_given_logits, restricted)


def run(function: Callable[[Tensor, Tensor], Tensor], trained: bool = True) -> list[Tensor]:
    given = leaves(trained)
    result = function(*given)
    result.backward()
    return [result.detach(), *(x.grad for x in given if x.requires_grad)]  # type: ignore[misc]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("function", OPERATIONS)
def test_whole_graphs(function: Callable[[Tensor, Tensor], Tensor], trained: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert same(run(compiled, trained), run(function, trained))


@pytest.mark.parametrize("dynamic", [None, True])
def test_whole_graphs_take_temperatures_and_rows_that_change(dynamic: bool | None) -> None:
    torch._dynamo.reset()
    hidden, weight = leaves()
    rows, labels = hidden.detach().view(-1, D), LABELS.view(-1)

    def step(rows: Tensor, labels: Tensor, temperature: float) -> Tensor:
        from_states = linear_token_logprobs(rows, weight, labels, chunk_tokens=5, temperature=temperature)
        return from_states.logprobs.sum() + token_logprobs(rows @ weight.t(), labels, temperature=temperature)[1].sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n, temperature in ((12, 0.7), (12, 0.8), (9, 1.3), (5, 1.0)):
        given = (rows[:n], labels[:n], temperature)
        (got,), (want,) = (torch.autograd.grad(function(*given), weight) for function in (compiled, step))
        assert torch.equal(got, want)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_a_loss_of_logprobs_with_a_kl_is_one_graph(estimator: str) -> None:
    torch._dynamo.reset()
    loss = PolicyLoss.preset("grpo", kl=estimator)
    torch.manual_seed(0)
    other = -torch.rand(2, 6)
    given = other + 0.1 * torch.randn(2, 6)

    def step(logprobs: Tensor) -> Tensor:
        columns = {name: other.to(logprobs.dtype) for name in ("old_logprobs", "ref_logprobs")}
        return loss(logprobs, advantages=torch.tensor([1.0, -1.0]), mask=torch.ones(2, 6), **columns).loss

    def found(function: Callable[[Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = given.to(dtype).requires_grad_()
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    compiled = found(torch.compile(step, fullgraph=True, backend="aot_eager"), torch.float32)
    plain, exact = found(step, torch.float32), found(step, torch.float64)
    for name, *values in zip(("loss", "gradient"), compiled, exact, plain, strict=True):
        assert_as_accurate(name, *values)


# The compiler reads `.grad` of every tensor that crosses a graph break, non-leaves included.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("loss", [policy_loss, preference_loss])
def test_a_loss_from_hidden_states_is_a_graph_break(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch._dynamo.reset()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return 2.0 * loss(hidden, weight)

    assert same(run(torch.compile(step, backend="aot_eager")), run(step))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        run(torch.compile(step, backend="aot_eager", fullgraph=True))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("function", [*OPERATIONS, policy_loss, preference_loss])
def test_recomputed_under_activation_checkpointing(
    function: Callable[[Tensor, Tensor], Tensor], reentrant: bool
) -> None:
    def wrapped(hidden: Tensor, weight: Tensor) -> Tensor:
        return checkpoint(function, hidden * 1.0, weight, use_reentrant=reentrant)  # type: ignore[return-value]

    assert same(run(wrapped), run(function))


@pytest.mark.parametrize("function", [*OPERATIONS, policy_loss, preference_loss])
def test_without_gradients(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    want = function(*leaves()).detach()
    with torch.no_grad():
        quiet = function(*leaves())
    with torch.inference_mode():
        inferred = function(*leaves())
    assert not quiet.requires_grad
    assert torch.equal(quiet, want)
    assert torch.equal(inferred, want)


@pytest.mark.parametrize("function", [from_states, policy_loss])
def test_a_head_made_in_inference_mode_is_refused_in_training(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    hidden, _ = leaves()
    with torch.inference_mode():
        _, weight = leaves(trained=False)
    with pytest.raises(RuntimeError, match=r"inference tensor.*pass weight.clone\(\)"):
        function(hidden, weight)
