"""Rollouts without padding: each completion with its prompt is a sequence of its own in a packed stream.

The other way to the same hidden states is `fastrl.train.rollouts.generate.completion_hidden`, which runs a prompt once
for all its completions and pads these. A stream repeats the prompt and pads nothing: it is the shorter one where
prompts are short, completions differ much in length, or groups are small.

Shapes: B completions, T time, N tokens of a stream, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl.train.data.encoding import Example
from fastrl.train.data.packing import packed_batches, packed_hidden
from fastrl.train.rollouts.generate import Rollout


def rollout_examples(rollout: Rollout) -> list[Example]:
    """Return each completion after its prompt, as a sequence whose completion is trained."""
    prompts = [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)]
    completions = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
    return [
        Example.of(prompts[index], ids[mask].tolist())
        for index, (ids, mask) in zip(rollout.prompt_index.tolist(), completions, strict=True)
    ]


def packed_completion_hidden(model: Any, rollout: Rollout, stream_tokens: int) -> Tensor:
    """Return (B, T, D): the hidden state that predicts each completion token, differentiable; 0 where masked.

    Streams hold at most `stream_tokens` tokens, or the longest sequence where that is longer.
    """
    examples = rollout_examples(rollout)
    budget = max(stream_tokens, *(len(example.ids) - 1 for example in examples))
    width, device = rollout.completion_ids.shape[1], rollout.completion_ids.device
    rows: list[Tensor] = []
    places: list[Tensor] = []
    for group, batch in packed_batches(examples, budget, device):
        rows.append(packed_hidden(model, batch)[batch.mask])
        places += [torch.arange(examples[index].n_trained) + index * width for index in group]
    found = torch.cat(rows)
    padded = found.new_zeros(len(examples) * width, found.shape[1])
    return padded.index_copy(0, torch.cat(places).to(device), found).unflatten(0, (len(examples), width))
