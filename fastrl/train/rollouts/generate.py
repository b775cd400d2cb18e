"""Rollouts: prompts to sampled completions, and completions to the hidden states that predict their tokens.

Both directions share one idea. The completions of a group have the same prompt, so the prompt goes through the
model once, and its key-value cache is repeated for the group, in generation and, with gradients, in training.
With 8 completions of 8 tokens on a prompt of 32 tokens the training pass sees 96 tokens in place of 320.

Prompts are padded on the left, completions on the right. No mask is ever read off the pad token (it is the
end-of-sequence token in many models): prompts have lengths, and a completion ends with its first stop token,
which belongs to it.

Shapes: P prompts, G completions of each, B = P * G completions, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.checks import MASKED_LABEL
from fastrl.ops import TokenLogprobs, linear_token_logprobs
from fastrl.train.data.encoding import pad_left
from fastrl.train.model import LARGEST_DIFFERENCE, Head, causal_lm


@dataclass(frozen=True)
class Rollout:
    """Completions and the prompts that they answer."""

    prompt_ids: Tensor  # (P, T_prompt) padded on the left
    prompt_mask: Tensor  # (P, T_prompt) bool
    prompt_index: Tensor  # (B,) the row of prompt_ids that each completion answers
    completion_ids: Tensor  # (B, T) padded on the right
    completion_mask: Tensor  # (B, T) bool, true up to and with the first stop token
    logprobs: Tensor  # (B, T) float32, of the sampled tokens as the sampler saw them, 0 where masked
    truncated: Tensor  # (B,) bool, no stop token within the limit

    def rows(self, start: int, stop: int) -> Rollout:
        """Return completions `start` to `stop`, with only their own prompts and no more padding than they need."""
        used, index = torch.unique(self.prompt_index[start:stop], return_inverse=True)
        prompt_mask = self.prompt_mask[used]
        first = int(prompt_mask.int().argmax(dim=1).min())
        mask = self.completion_mask[start:stop]
        length = max(1, int(mask.sum(dim=1).max()))
        return Rollout(
            prompt_ids=self.prompt_ids[used, first:],
            prompt_mask=prompt_mask[:, first:],
            prompt_index=index,
            completion_ids=self.completion_ids[start:stop, :length],
            completion_mask=mask[:, :length],
            logprobs=self.logprobs[start:stop, :length],
            truncated=self.truncated[start:stop],
        )

    def select(self, rows: Tensor) -> Rollout:  # (R,) int64, ascending
        """Return the completions at `rows`, with only their own prompts; the padding stays as it is."""
        used, index = torch.unique(self.prompt_index[rows], return_inverse=True)
        return Rollout(
            prompt_ids=self.prompt_ids[used],
            prompt_mask=self.prompt_mask[used],
            prompt_index=index,
            completion_ids=self.completion_ids[rows],
            completion_mask=self.completion_mask[rows],
            logprobs=self.logprobs[rows],
            truncated=self.truncated[rows],
        )


def concatenate(parts: Sequence[Rollout], pad_id: int) -> Rollout:
    """Return the completions of all parts, in order, padded to the longest prompt and the longest completion."""
    prompt_width = max(part.prompt_ids.shape[1] for part in parts)
    width = max(part.completion_ids.shape[1] for part in parts)

    def joined(name: str, value: float, *, prompts: bool = False) -> Tensor:
        tensors = [getattr(part, name) for part in parts]
        missing = [(prompt_width if prompts else width) - tensor.shape[1] for tensor in tensors]
        return torch.cat(
            [
                torch.nn.functional.pad(tensor, (count, 0) if prompts else (0, count), value=value)
                for tensor, count in zip(tensors, missing, strict=True)
            ]
        )

    indices, first = [], 0
    for part in parts:
        indices.append(part.prompt_index + first)
        first += part.prompt_ids.shape[0]
    return Rollout(
        prompt_ids=joined("prompt_ids", pad_id, prompts=True),
        prompt_mask=joined("prompt_mask", False, prompts=True),
        prompt_index=torch.cat(indices),
        completion_ids=joined("completion_ids", pad_id),
        completion_mask=joined("completion_mask", False),
        logprobs=joined("logprobs", 0.0),
        truncated=torch.cat([part.truncated for part in parts]),
    )


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    group_size: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Sample `group_size` completions of each prompt, group by group, from softmax(logits / temperature).

    No top-k, top-p or penalty: the loss divides by the probabilities of the whole distribution. Rows that have
    finished leave the batch once they are a quarter of it. `generator` lives on the model's device.
    """
    device = next(model.parameters()).device
    prompt_ids, prompt_mask = pad_left(prompts, pad_id, device)
    prompt_index = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    count = prompt_index.numel()
    stops = torch.tensor(list(stop_ids), device=device)
    completion_ids = torch.full((count, max_new_tokens), pad_id, device=device)
    completion_mask = torch.zeros(count, max_new_tokens, dtype=torch.bool, device=device)
    logprobs = torch.zeros(count, max_new_tokens, device=device)
    truncated = torch.ones(count, dtype=torch.bool, device=device)

    inner = causal_lm(model)
    positions = _positions(prompt_mask)
    out = inner(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = out.past_key_values
    cache.batch_select_indices(prompt_index)
    logits = out.logits[prompt_index, -1]  # (B, V)
    attention = prompt_mask[prompt_index]  # (B, T_prompt + tokens so far)
    position = positions[prompt_index, -1]
    live = torch.arange(count, device=device)  # rows of the outputs that the batch still holds
    open_rows = torch.ones(count, dtype=torch.bool, device=device)

    for step in range(max_new_tokens):
        token, logprob = _choose(logits, temperature, greedy, generator)
        rows = live[open_rows]
        completion_ids[rows, step] = token[open_rows]
        completion_mask[rows, step] = True
        logprobs[rows, step] = logprob[open_rows]
        ended = open_rows & torch.isin(token, stops)
        truncated[live[ended]] = False
        open_rows = open_rows & ~ended
        left = int(open_rows.sum())
        if left == 0 or step + 1 == max_new_tokens:
            break
        if left <= 0.75 * open_rows.numel():
            keep = open_rows.nonzero()[:, 0]
            cache.batch_select_indices(keep)
            live, token, attention, position = live[keep], token[keep], attention[keep], position[keep]
            open_rows = open_rows[keep]
        attention = torch.cat([attention, attention.new_ones(attention.shape[0], 1)], dim=1)
        position = position + 1
        out = inner(
            input_ids=token[:, None],
            attention_mask=attention.long(),
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = out.logits[:, -1]

    used = max(1, int(completion_mask.sum(dim=1).max()))
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=prompt_index,
        completion_ids=completion_ids[:, :used],
        completion_mask=completion_mask[:, :used],
        logprobs=logprobs[:, :used],
        truncated=truncated,
    )


def completion_hidden(model: Any, rollout: Rollout) -> Tensor:
    """Return (B, T, D): the hidden state that predicts each completion token, differentiable.

    The prompts go through the model once; their cache, repeated for the completions, carries the gradient back.
    """
    backbone = causal_lm(model).base_model
    positions = _positions(rollout.prompt_mask)
    prompt = backbone(
        input_ids=rollout.prompt_ids,
        attention_mask=rollout.prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
    )
    first = prompt.last_hidden_state[rollout.prompt_index, -1:]  # (B, 1, D)
    inputs = rollout.completion_ids[:, :-1]
    if inputs.shape[1] == 0:
        return first
    cache = prompt.past_key_values
    cache.batch_select_indices(rollout.prompt_index)
    attention = torch.cat([rollout.prompt_mask[rollout.prompt_index], rollout.completion_mask[:, :-1]], dim=1)
    ahead = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
    rest = backbone(
        input_ids=inputs,
        attention_mask=attention.long(),
        position_ids=positions[rollout.prompt_index, -1:] + ahead,
        past_key_values=cache,
        use_cache=True,
    )
    return torch.cat([first, rest.last_hidden_state], dim=1)


def decode(tokenizer: Any, rollout: Rollout) -> list[str]:
    """Return the text of each completion, without special tokens."""
    return [
        tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True)
        for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    ]


# A model and a rollout to the hidden states (B, T, D) that predict the completion tokens.
Forward = Callable[[Any, Rollout], Tensor]


def token_logprobs_of(
    model: Any, head: Head, rollout: Rollout, temperature: float, forward: Forward = completion_hidden
) -> TokenLogprobs:
    """Return log-probs and entropies (B, T) of the completion tokens, 0 where masked, without gradients."""
    with torch.no_grad():
        return hidden_logprobs(forward(model, rollout), head, rollout, temperature)


@torch.no_grad()
def hidden_logprobs(hidden: Tensor, head: Head, rollout: Rollout, temperature: float) -> TokenLogprobs:
    """Return what `token_logprobs_of` does, from the hidden states (B, T, D) of `completion_hidden`."""
    labels = rollout.completion_ids.masked_fill(~rollout.completion_mask, MASKED_LABEL)
    return linear_token_logprobs(
        hidden, head.weight, labels, temperature=temperature, ignore_index=MASKED_LABEL, **head.kwargs()
    )


@torch.no_grad()
def verify_logprobs(
    model: Any, head: Head, rollout: Rollout, temperature: float, forward: Forward = completion_hidden
) -> float:
    """Return the largest |difference| in nats from the log-probs of `model(...).logits`; raise where it is too large.

    The model's own logits come from each sequence on its own, without padding, cache or shared prompt. So one number
    covers what a model family may do differently: the head's bias, scale and softcap, positions, masks, the cache.
    Autocast is switched off for it: the model's own head would round its logits to 16 bits.
    """
    with torch.autocast(head.weight.device.type, enabled=False):
        return _verify_logprobs(model, head, rollout, temperature, forward)


def _verify_logprobs(model: Any, head: Head, rollout: Rollout, temperature: float, forward: Forward) -> float:
    ours = token_logprobs_of(model, head, rollout, temperature, forward).logprobs
    inner = causal_lm(model)
    worst = torch.zeros((), dtype=torch.float64, device=ours.device)  # torch.maximum keeps a NaN, Python's max loses it
    for row in range(rollout.completion_ids.shape[0]):
        prompt = int(rollout.prompt_index[row])
        start = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt]]
        end = rollout.completion_ids[row][rollout.completion_mask[row]]
        logits = inner(input_ids=torch.cat([start, end])[None], use_cache=False).logits[0, len(start) - 1 : -1]
        theirs = torch.log_softmax(logits.double() / temperature, dim=-1).gather(1, end[:, None])[:, 0]
        worst = torch.maximum(worst, (ours[row, : len(end)].double() - theirs).abs().max())
    granted = LARGEST_DIFFERENCE[head.weight.dtype]
    if not bool(worst <= granted):
        raise ValueError(
            f"log-probs from the hidden states differ from those of the model's own logits by {float(worst):.3g} nats, "
            f"expected at most {granted} in {head.weight.dtype}; the head of {type(inner).__name__} was read as "
            f"logit_scale={head.logit_scale}, softcap={head.softcap}, bias={'none' if head.bias is None else 'one'}"
        )
    return float(worst)


def _positions(prompt_mask: Tensor) -> Tensor:
    """Return (P, T) positions that count from 0 at the first token that is not padding."""
    return (prompt_mask.long().cumsum(dim=1) - 1).clamp_min(0)


def _choose(
    logits: Tensor, temperature: float, greedy: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the next token and its log-prob, both (B,)."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    token = probs.argmax(dim=-1) if greedy else torch.multinomial(probs, 1, generator=generator)[:, 0]
    return token, probs.gather(1, token[:, None])[:, 0].log()
