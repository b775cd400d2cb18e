"""Hidden states and labels of a real model's own samples. The more peaked a policy's rows, the more do lists save.

SmolLM2-135M-Instruct answers a fixed list of prompts. fastrl's cache folder keeps the states that predict the sampled
tokens, so sampling happens once per temperature.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MODEL = "smollm2"
PROMPTS = (
    "What is 17 + 26? Answer with the number.",
    "What is 8 times 7? Answer with the number.",
    "List the days of the week.",
    "Count from 1 to 20.",
    "Why is the sky blue?",
    "How is bread made?",
    "What happens when water freezes?",
    "Write a short story about a lighthouse keeper.",
)
GROUP = 4
NEW_TOKENS = 64


class Missing(Exception):
    """A need of a measurement is missing here. The message names it."""


@dataclass(frozen=True)
class Samples:
    """Tokens sampled at a temperature, in random order, with the states that predict them and the head."""

    hidden: Tensor  # (N, D) float32
    labels: Tensor  # (N,)
    weight: Tensor  # (V, D) float32
    temperature: float


def samples(temperature: float, tokens: int) -> Samples:
    """Return `tokens` sampled tokens, from the cache folder if it has them.

    Raises:
        Missing: the model, or the packages that load it, cannot be had here.
    """
    try:
        from fastrl.train.pretrained import cache_dir, load_model

        model, tokenizer = load_model(MODEL)
    except (ImportError, ValueError) as error:
        raise Missing(f"the samples need the model {MODEL!r}: {error}") from error
    path = cache_dir() / "bench" / f"{MODEL}-samples-1-T{temperature:g}-{tokens}.pt"
    if not path.is_file():
        _save(path, _sample(model, tokenizer, temperature, tokens))
    kept = torch.load(path, weights_only=True)
    return Samples(kept["hidden"], kept["labels"], model.get_output_embeddings().weight.detach(), temperature)


def _save(path: Path, kept: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.part")
    torch.save(kept, scratch)
    scratch.replace(path)


def _sample(model: Any, tokenizer: Any, temperature: float, tokens: int) -> dict[str, Tensor]:
    from fastrl.train.data.encoding import encode_prompts
    from fastrl.train.model import completion_hidden
    from fastrl.train.pretrained import stop_token_ids
    from fastrl.train.rollouts.generate import generate

    prompts = encode_prompts(tokenizer, PROMPTS)
    generator = torch.Generator().manual_seed(0)
    states, labels, found = [], [], 0
    while found < tokens:
        rollout = generate(
            model,
            prompts,
            group_size=GROUP,
            max_new_tokens=NEW_TOKENS,
            stop_ids=stop_token_ids(model, tokenizer),
            pad_id=tokenizer.pad_token_id,
            temperature=temperature,
            generator=generator,
        )
        with torch.no_grad():
            hidden = completion_hidden(model, rollout)
        states.append(hidden[rollout.completion_mask])
        labels.append(rollout.completion_ids[rollout.completion_mask])
        found += labels[-1].numel()
    order = torch.randperm(found, generator=generator)[:tokens]
    return {"hidden": torch.cat(states)[order].clone(), "labels": torch.cat(labels)[order].clone()}
