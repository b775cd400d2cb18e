"""Prompts to sampled completions.

The completions of a group have the same prompt. The prompt goes through the model once, and its key-value cache is
repeated for the group. `fastrl.train.model.completion_hidden` does the same in training, with gradients.

Shapes: P prompts, G completions of each, B = P * G completions, T time, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.train.data.encoding import pad_left
from fastrl.train.data.rollout import Rollout, prompt_positions
from fastrl.train.pretrained import cache_argument, cache_of, causal_lm, check_positions


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

    There is no top-k, top-p or penalty, because the loss divides by the probabilities of the whole distribution.
    `generator` lives on the model's device.
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
    check_positions(model, prompt_ids.shape[1] + max_new_tokens - 1)
    positions = prompt_positions(prompt_mask)
    out = inner(
        input_ids=prompt_ids,
        attention_mask=prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
        logits_to_keep=1,
    )
    cache = cache_of(model, out)
    cache.batch_select_indices(prompt_index)  # the prompt's keys and values, once for each of its completions
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
        # Taking rows out copies the cache, so finished rows stay until they are a quarter of the batch.
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
            use_cache=True,
            **cache_argument(inner, cache),
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


def decode(tokenizer: Any, rollout: Rollout) -> list[str]:
    """Return the text of each completion, without special tokens other than tags such as `</think>`.

    Rewards and readers need the tags, also where the tokenizer has made them special. Tokens with a role of their own
    (end, padding, ...) and those of chat templates (`<|im_end|>`) are left out.
    """
    hidden = set(tokenizer.all_special_ids)
    tags = {i for i in hidden if _TAG.fullmatch(tokenizer.convert_ids_to_tokens(i))} - _roles(tokenizer)
    rows = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    if not tags:
        return [tokenizer.decode(ids[mask].tolist(), skip_special_tokens=True) for ids, mask in rows]
    left_out = hidden - tags
    return [
        tokenizer.decode([i for i in ids[mask].tolist() if i not in left_out], skip_special_tokens=False)
        for ids, mask in rows
    ]


_TAG = re.compile(r"</?[A-Za-z][A-Za-z_-]*>")


def _roles(tokenizer: Any) -> set[int]:
    """Return the ids of tokens with a role of their own, such as the end of a text."""
    roles = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
    return {i for role in roles if (i := getattr(tokenizer, f"{role}_token_id", None)) is not None}


def _choose(
    logits: Tensor, temperature: float, greedy: bool, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return the next token and its log-prob, both (B,)."""
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    token = probs.argmax(dim=-1) if greedy else torch.multinomial(probs, 1, generator=generator)[:, 0]
    return token, probs.gather(1, token[:, None])[:, 0].log()
