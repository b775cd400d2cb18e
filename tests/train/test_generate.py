"""Rollouts against `generate`, and the shared-prompt forward against plain full sequences."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import GenerationConfig

from fastrl.train import model as model_module
from fastrl.train.data.encoding import encode_prompts, pad_left
from fastrl.train.data.rollout import Rollout
from fastrl.train.model import Policy, completion_hidden
from fastrl.train.pretrained import head_of
from fastrl.train.rollouts.generate import decode, generate

TOKENIZER = tiny_tokenizer()
QUESTIONS = ["1+1=", "what is 23 - 60?", "7"]
# Several stop tokens, so that a random model stops at different lengths.
STOPS = [TOKENIZER.eos_token_id, *range(10, 20)]


def roll(model: Any, *, group_size: int = 3, max_new_tokens: int = 8, seed: int = 0, **options: Any) -> Rollout:
    return generate(
        model,
        encode_prompts(TOKENIZER, QUESTIONS),
        group_size=group_size,
        max_new_tokens=max_new_tokens,
        stop_ids=STOPS,
        pad_id=TOKENIZER.pad_token_id,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def plain_logprobs(model: Any, rollout: Rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probs (B, T) from the model's own logits, one unpadded sequence at a time, differentiable."""
    rows = []
    for row, mask in enumerate(rollout.completion_mask):
        prompt = int(rollout.prompt_index[row])
        start = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt]]
        end = rollout.completion_ids[row][mask]
        logits = model(input_ids=torch.cat([start, end])[None], use_cache=False).logits[0, len(start) - 1 : -1]
        logprobs = torch.log_softmax(logits / temperature, dim=-1).gather(1, end[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logprobs, (0, len(mask) - len(end))))
    return torch.stack(rows)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_greedy_rollout_equals_generate(family: str) -> None:
    model = tiny_model(TOKENIZER, family=family)
    prompts = encode_prompts(TOKENIZER, QUESTIONS)
    rollout = roll(model, group_size=2, max_new_tokens=20, greedy=True)
    config = GenerationConfig(
        max_new_tokens=20, do_sample=False, eos_token_id=STOPS, pad_token_id=TOKENIZER.pad_token_id
    )
    lengths = set()
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected = out[0, len(prompt) :].tolist()
        for row in (2 * i, 2 * i + 1):
            assert rollout.completion_ids[row][rollout.completion_mask[row]].tolist() == expected
            assert bool(rollout.truncated[row]) == (expected[-1] not in STOPS)
        lengths.add(len(expected))
    if family == "llama":  # the random gemma2 repeats one token
        assert len(lengths) > 1  # rows left the batch at different times


def test_mask_ends_with_the_first_stop_token_which_it_holds() -> None:
    rollout = roll(tiny_model(TOKENIZER), group_size=16)
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    seen_stop = False
    for ids, mask, truncated in zip(rollout.completion_ids, rollout.completion_mask, rollout.truncated, strict=True):
        length = int(mask.sum())
        assert mask[:length].all()
        assert not mask[length:].any()
        inside = [token in STOPS for token in ids[:length].tolist()]
        assert not any(inside[:-1])
        assert inside[-1] != bool(truncated)
        seen_stop |= inside[-1]
    assert seen_stop


def test_prompt_mask_comes_from_lengths_although_prompts_hold_the_pad_token() -> None:
    prompts = encode_prompts(TOKENIZER, QUESTIONS)
    assert TOKENIZER.pad_token_id in prompts[0]
    ids, mask = pad_left(prompts, TOKENIZER.pad_token_id, torch.device("cpu"))
    for row, prompt in enumerate(prompts):
        assert ids[row][mask[row]].tolist() == prompt
        assert mask[row, -len(prompt) :].all()


def test_samples_follow_the_whole_distribution_at_the_temperature() -> None:
    model = tiny_model(TOKENIZER)
    prompt = encode_prompts(TOKENIZER, QUESTIONS[:1])
    draws = 20_000
    rollout = generate(
        model, prompt, group_size=draws, max_new_tokens=1, stop_ids=STOPS, pad_id=0, temperature=1.7,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    with torch.no_grad():
        expected = torch.softmax(model(torch.tensor(prompt)).logits[0, -1] / 1.7, dim=-1)
    counts = torch.bincount(rollout.completion_ids[:, 0], minlength=len(expected))
    deviation = (counts - draws * expected).abs() / (draws * expected * (1 - expected)).sqrt()
    assert float(deviation.max()) < 4.5  # standard deviations, over some ninety tokens
    assert int((counts > 0).sum()) > 55  # a top-k of 50 would show


def test_sampler_leaves_the_global_generator_alone_and_repeats() -> None:
    model = tiny_model(TOKENIZER)
    before = torch.get_rng_state()
    first, second = roll(model), roll(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.completion_ids, second.completion_ids)
    assert not torch.equal(first.completion_mask.sum(), roll(model, seed=1).completion_mask.sum())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_of_sampler_loss_and_plain_model_agree(family: str, temperature: float) -> None:
    model = tiny_model(TOKENIZER, family=family)
    rollout = roll(model, temperature=temperature)
    policy = Policy.of(model, temperature=temperature)
    assert policy.verify(rollout) < 1e-4
    ours = policy.logprobs(rollout)
    assert torch.allclose(ours, rollout.logprobs, atol=1e-4)
    assert not ours[~rollout.completion_mask].any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_shared_prompt_gradient_equals_that_of_full_sequences(family: str) -> None:
    model = tiny_model(TOKENIZER, family=family)
    rollout = roll(model)
    # In float64 transformers' eager attention overflows on the padding rows of gemma2: its softmax is in float32.
    dtype, granted = (torch.float64, 1e-5) if family != "gemma2" else (torch.float32, 1e-4)
    model = model.to(dtype)
    weights = torch.rand(rollout.completion_mask.shape, dtype=dtype) * rollout.completion_mask
    gradients = []
    for shared in (True, False):
        model.zero_grad()
        if shared:
            head = head_of(model)
            logits = completion_hidden(model, rollout) @ head.weight.T * head.logit_scale
            if head.softcap is not None:
                logits = head.softcap * torch.tanh(logits / head.softcap)
            logprobs = torch.log_softmax(logits, dim=-1).gather(2, rollout.completion_ids[..., None])[..., 0]
        else:
            logprobs = plain_logprobs(model, rollout)
        (logprobs * weights).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        # Rotary tables and norms are computed in float32 whatever the dtype of the model is.
        assert torch.allclose(gradients[0][name], gradient, rtol=0, atol=granted * float(gradient.abs().max())), name


def test_a_head_that_is_read_wrongly_is_refused() -> None:
    model = tiny_model(TOKENIZER, family="gemma2")
    right = head_of(model)
    assert right.softcap == 3.0
    for wrong in (dataclasses.replace(right, softcap=None), dataclasses.replace(right, logit_scale=0.5)):
        with pytest.raises(ValueError, match="differ from those of the model's own logits"):
            Policy(model, wrong).verify(roll(model))


def test_logprobs_that_are_not_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(TOKENIZER)

    def broken(model: Any, rollout: Rollout) -> Tensor:
        return completion_hidden(model, rollout) * math.nan

    monkeypatch.setattr(model_module, "completion_hidden", broken)
    with pytest.raises(ValueError, match="differ from those of the model's own logits by nan nats"):
        Policy.of(model).verify(roll(model))


def test_the_head_is_verified_under_autocast_too() -> None:
    model = tiny_model(TOKENIZER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Policy.of(model).verify(roll(model)) < 1e-4


def test_rows_hold_the_same_tokens_with_less_padding() -> None:
    model = tiny_model(TOKENIZER)
    rollout = roll(model)
    policy = Policy.of(model)
    whole = policy.logprobs(rollout)
    for start, stop in ((0, 2), (2, 7), (8, 9)):  # inside a group, across groups, one row
        part = rollout.rows(start, stop)
        width = part.completion_ids.shape[1]
        assert part.completion_mask.any(dim=0).all()
        assert part.prompt_mask.any(dim=0).all()
        assert part.prompt_ids.shape[0] == len(set(rollout.prompt_index[start:stop].tolist()))
        logprobs = policy.logprobs(part)
        assert torch.allclose(logprobs, whole[start:stop, :width], atol=1e-5)


def test_a_single_token_completion_needs_no_second_pass() -> None:
    model = tiny_model(TOKENIZER)
    rollout = roll(model, max_new_tokens=1)
    assert completion_hidden(model, rollout).shape == (9, 1, 32)
    assert Policy.of(model).verify(rollout) < 1e-4


def test_prompt_templates() -> None:
    chat = TOKENIZER.decode(encode_prompts(TOKENIZER, ["2+2="])[0])
    assert chat == "<|im_start|>user\n2+2=<|im_end|>\n<|im_start|>assistant\n"
    system = TOKENIZER.decode(encode_prompts(TOKENIZER, ["2+2="], system="be brief")[0])
    assert system.startswith("<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\n2+2=")
    assert TOKENIZER.decode(encode_prompts(TOKENIZER, ["2+2="], template="Q: {prompt}")[0]) == "Q: 2+2="
    with pytest.raises(ValueError, match="must be 'chat' or contain"):
        encode_prompts(TOKENIZER, ["2"], template="no place for it")
    with pytest.raises(ValueError, match="belongs to prompt_template 'chat'"):
        encode_prompts(TOKENIZER, ["2"], template="{prompt}", system="be brief")
    with pytest.raises(ValueError, match="at least one token"):
        encode_prompts(TOKENIZER, [""], template="{prompt}")


def test_decode_leaves_special_tokens_and_padding_out() -> None:
    rollout = roll(tiny_model(TOKENIZER))
    for text, mask in zip(decode(TOKENIZER, rollout), rollout.completion_mask, strict=True):
        assert "<|" not in text
        assert len(text) <= int(mask.sum())
