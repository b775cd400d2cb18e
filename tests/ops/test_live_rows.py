"""Rows whose number the host learns late: the same bits, and nothing waited for before there is work behind it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastrl import PolicyLoss, linear_token_logprobs
from fastrl.ops import chunks, gradients, live_rows
from fastrl.ops.row_statistics import linear_row_statistics

B, T, D, V, C = 6, 11, 8, 30, 16


class Recorder:
    """Stands for a device that runs ahead of the host: says in which order work is queued and numbers are awaited."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        recorder = self

        class Number:
            def __init__(self, number: Tensor) -> None:
                self._number = number
                recorder.events.append("copy")

            def wait(self) -> int:
                recorder.events.append("wait")
                return int(self._number)

        def noted(module: Any, name: str) -> Any:
            function = getattr(module, name)

            def call(*arguments: Any, **options: Any) -> Any:
                recorder.events.append(name)
                return function(*arguments, **options)

            return call

        monkeypatch.setattr(live_rows, "is_asynchronous", lambda device: True)
        monkeypatch.setattr(live_rows, "PendingCount", Number)
        for name in ("chunk_logits", "forward_rows", "prepared_backward_rows"):
            monkeypatch.setattr(chunks, name, noted(chunks, name))
        for name in ("_times_weight", "_add_weight_gradient"):
            monkeypatch.setattr(gradients, name, noted(gradients, name))


def leaves() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    return hidden, weight, torch.randint(0, V, (B, T), generator=generator)


def policy(name: str, live: float, trained: bool, **fields: Any) -> list[Tensor]:
    """Return loss, log-probs and gradients; NaN stands under the mask, and two sequences have no advantage."""
    hidden, weight, labels = leaves()
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(4)) < live
    hidden[~mask] = torch.nan
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    output = PolicyLoss.preset(name, **fields).from_hidden(
        hidden, weight, labels, mask=mask, advantages=torch.tensor([0.0, 1.0, -1.0, 0.0, 2.0, 0.5]),
        old_logprobs=torch.full((B, T), -4.0), chunk_tokens=C,
    )  # fmt: skip
    output.loss.backward()
    gradients = [hidden.grad, weight.grad] if trained else [hidden.grad]
    return [output.loss.detach(), output.logprobs, output.entropy, *gradients]


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("live", [0.0, 0.2, 0.6, 1.0])
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_late_numbers_change_no_bit(monkeypatch: pytest.MonkeyPatch, name: str, live: float, trained: bool) -> None:
    want = policy(name, live, trained)
    recorder = Recorder(monkeypatch)
    got = policy(name, live, trained)
    assert "wait" in recorder.events
    for a, b in zip(want, got, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", [True, False])
def test_late_numbers_change_no_bit_of_the_operations(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    hidden, weight, labels = leaves()
    labels[:, ::3] = -100
    hidden[:, ::3] = torch.inf
    upstream = torch.linspace(-1.0, 1.0, T).clamp(min=0.0)

    def results() -> list[Tensor]:
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        outputs = linear_token_logprobs(states, head, labels, chunk_tokens=C)
        (outputs.logprobs * upstream).sum().backward()
        statistics = linear_row_statistics(hidden, weight, labels, chunk_tokens=C)
        gradients = [states.grad, head.grad] if trained else [states.grad]
        return [*(x.detach() for x in outputs), *gradients, *statistics]

    want = results()
    Recorder(monkeypatch)
    for a, b in zip(want, results(), strict=True):
        assert torch.equal(a, b)


def test_the_host_waits_only_with_work_queued_behind_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    policy("dapo", 1.0, trained=True)
    chunks = -(-B * T // C)
    assert recorder.events.count("wait") == recorder.events.count("copy") == 1 + chunks
    assert recorder.events[:3] == ["copy", "chunk_logits", "wait"]
    assert recorder.events.count("chunk_logits") == chunks
    waits = [i for i, event in enumerate(recorder.events) if event == "wait"]
    for i in waits[1:]:
        assert recorder.events[i - 2 : i] == ["copy", "prepared_backward_rows"]


def test_rows_without_an_upstream_gradient_are_not_formed_again() -> None:
    hidden, weight, labels = (x.detach() for x in leaves())
    hidden.requires_grad_()
    weight.requires_grad_()
    outputs = linear_token_logprobs(hidden, weight, labels, chunk_tokens=C)
    upstream = torch.zeros(B, T)
    upstream[2, 3] = upstream[4, 1] = 1.0
    with torch.profiler.profile(record_shapes=True) as profile:
        (outputs.logprobs * upstream).sum().backward()
    products = [e for e in profile.events() if e.name == "aten::mm"]
    assert len([e for e in products if e.input_shapes[0] == [C, D]]) == 1
    assert int((hidden.grad != 0).any(-1).sum()) == 2


@pytest.mark.parametrize("keep", [[], [True], [False], [False, True, True, False, True], [False] * 3], ids=str)
def test_kept_rows_come_first_in_rising_order(keep: list[bool]) -> None:
    mask = torch.tensor(keep, dtype=torch.bool)
    order = live_rows.kept_first(mask)
    assert order.tolist() == sorted(range(len(keep)), key=lambda i: not keep[i])
    assert torch.equal(order[: int(mask.sum())], live_rows.ActiveRows(mask).indices())
