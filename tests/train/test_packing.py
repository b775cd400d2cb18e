"""Packing: the groups, the batch, equality with sequences alone, and the refusal of models that mix them."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from tiny_model import tiny_model, tiny_tokenizer
from torch import Tensor, nn
from transformers import MambaConfig, MambaForCausalLM

from fastrl.train.data import packing
from fastrl.train.data.encoding import Example
from fastrl.train.data.packing import collate, pack, packed_batches, packed_hidden, prove_packing, use_flash_attention
from fastrl.train.pretrained import head_of

TOKENIZER = tiny_tokenizer()
FAMILIES = ["llama", "qwen2", "gemma2", "gpt2"]


def example(prompt: str, completion: str) -> Example:
    return Example.of(TOKENIZER(prompt).input_ids, [*TOKENIZER(completion).input_ids, TOKENIZER.eos_token_id])


# A sequence longer than gemma2's window of 16, one of a single input, and one that holds the stop token inside.
EXAMPLES = [
    example("what is seven and eight?", "15"),
    Example([5, 6], [False, True]),
    example("1+1=<|im_end|>", "2"),
    example("say it", "one two three four five"),
]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=60), st.integers(40, 100))
def test_groups_hold_every_sequence_once_within_the_budget(lengths: list[int], budget: int) -> None:
    groups = pack(lengths, budget)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= budget for group in groups)
    half_empty = [group for group in groups if 2 * sum(lengths[index] for index in group) <= budget]
    assert len(half_empty) <= 1  # the second would have gone into the first
    assert groups == pack(lengths, budget)


def test_first_fit_decreasing_by_hand() -> None:
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 4], [0, 3, 2, 5]]
    assert pack([5, 5, 5], 10) == [[0, 1], [2]]
    assert pack([], 10) == []
    for lengths in ([11], [3, 0]):
        with pytest.raises(ValueError, match=rf"from 1 to the budget of 10 tokens, got {lengths[-1]} at"):
            pack(lengths, 10)


def test_a_batch_is_shifted_sequence_by_sequence() -> None:
    batch = collate([Example([7, 8, 9], [False, True, False]), Example([4, 5], [False, True])])
    assert batch.input_ids.tolist() == [7, 8, 4]
    assert batch.labels.tolist() == [8, 9, 5]
    assert batch.mask.tolist() == [True, False, True]
    assert batch.position_ids.tolist() == [0, 1, 0]
    assert batch.cu_seqlens.tolist() == [0, 2, 3]
    assert batch.max_length == 2
    with pytest.raises(ValueError, match="at least 2 tokens, got 1"):
        collate([Example([7], [True])])


def test_without_a_budget_examples_stay_alone() -> None:
    assert [group for group, _ in packed_batches(EXAMPLES, None)] == [[0], [1], [2], [3]]
    lengths = [len(e.ids) - 1 for e in EXAMPLES]
    together = packed_batches(EXAMPLES, sum(lengths))
    assert [sorted(group) for group, _ in together] == [[0, 1, 2, 3]]
    assert together[0][1].labels.numel() == sum(lengths)


def alone(model: Any, example: Example) -> Tensor:
    ids = torch.tensor(example.ids[:-1])[None]
    return model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone_in_value_and_gradient(family: str) -> None:
    single, double = tiny_model(TOKENIZER, family=family), tiny_model(TOKENIZER, family=family).double()
    batch = collate(EXAMPLES)
    noise = torch.Generator().manual_seed(0)
    weights = torch.randn(batch.labels.numel(), 32, generator=noise)
    packed = packed_hidden(single, batch)
    (packed * weights).sum().backward()
    results = {name: p.grad.clone() for name, p in single.named_parameters() if p.grad is not None}
    references: list[tuple[Tensor, dict[str, Tensor]]] = []
    for model in (double, single):
        model.zero_grad()
        hidden = torch.cat([alone(model, e) for e in EXAMPLES])
        (hidden * weights).sum().backward()
        references.append((hidden.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (exact, exact_grads), (eager, eager_grads) = references
    assert_as_accurate("hidden", packed.detach(), exact, eager)
    for name, gradient in results.items():
        assert_as_accurate(name, gradient, exact_grads[name], eager_grads[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [1, 4])
def test_the_proof_accepts_models_that_keep_sequences_apart(family: str, count: int) -> None:
    model = tiny_model(TOKENIZER, family=family)
    for packed in (True, False):
        assert prove_packing(model, head_of(model), EXAMPLES[:count], packed=packed) < 1e-4


class RunsOn(nn.Module):
    """A backbone that carries a state from one token to the next, whatever the positions say."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        out = self.inner(**inputs)
        return SimpleNamespace(last_hidden_state=out.last_hidden_state + 0.01 * out.last_hidden_state.cumsum(dim=1))


def test_the_proof_refuses_a_model_that_mixes_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(TOKENIZER)
    head = head_of(model)
    mixing = RunsOn(model.model)
    monkeypatch.setattr(type(model), "base_model", property(lambda _: mixing))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM cannot be trained on packed sequences .* changed by"):
        prove_packing(model, head, EXAMPLES)


def test_the_proof_is_made_under_autocast_too() -> None:
    model = tiny_model(TOKENIZER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prove_packing(model, head_of(model), EXAMPLES) < 1e-4


def test_the_proof_refuses_a_family_with_a_recurrent_state() -> None:
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=len(TOKENIZER), hidden_size=32, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(ValueError, match=r"MambaForCausalLM cannot be trained .*set packing to false"):
        prove_packing(model, head_of(model), EXAMPLES)
    assert prove_packing(model, head_of(model), EXAMPLES, packed=False) < 1e-4


def test_the_proof_refuses_positions_that_are_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(TOKENIZER, family="gpt2")
    original = packing.packed_hidden

    def shifted(model: Any, batch: Any) -> Tensor:
        return original(model, dataclasses.replace(batch, position_ids=batch.position_ids + 1))

    monkeypatch.setattr(packing, "packed_hidden", shifted)
    with pytest.raises(ValueError, match=r"differ by .* nats from those of the sequences alone"):
        prove_packing(model, head_of(model), EXAMPLES)


def test_the_proof_refuses_a_head_that_is_read_wrongly() -> None:
    model = tiny_model(TOKENIZER, family="gemma2")
    wrong = dataclasses.replace(head_of(model), softcap=None)
    for packed in (True, False):
        with pytest.raises(ValueError, match=r"differ by .* nats .* softcap=None"):
            prove_packing(model, wrong, EXAMPLES, packed=packed)


def test_flash_attention_is_for_sixteen_bits_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
    model = tiny_model(TOKENIZER)
    assert not use_flash_attention(model)
    chosen: list[str] = []

    def fake(dtype: torch.dtype, supported: bool = True) -> Any:
        parameter = SimpleNamespace(device=torch.device("cuda"), dtype=dtype)
        return SimpleNamespace(
            parameters=lambda: iter([parameter]),
            _supports_flash_attn=supported,
            set_attn_implementation=chosen.append,
        )

    assert not use_flash_attention(fake(torch.float32))
    assert not use_flash_attention(fake(torch.bfloat16, supported=False))
    assert chosen == []
    assert use_flash_attention(fake(torch.bfloat16))
    assert chosen == ["flash_attention_2"]


def test_flash_attention_is_told_the_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(EXAMPLES)
    seen: dict[str, Any] = {}

    def backbone(**inputs: Any) -> Any:
        seen.update(inputs)
        return SimpleNamespace(last_hidden_state=torch.zeros(1, batch.labels.numel(), 2))

    model = tiny_model(TOKENIZER)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flash_attention_2")
    monkeypatch.setattr(type(model), "base_model", property(lambda _: backbone))
    packed_hidden(model, batch)
    assert seen["cu_seq_lens_q"] is batch.cu_seqlens
    assert seen["max_length_k"] == max(len(e.ids) - 1 for e in EXAMPLES)
    assert "attention_mask" not in seen
