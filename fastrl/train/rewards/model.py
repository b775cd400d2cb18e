"""Reward models: the protocol, and sequence classifiers of transformers.

Shapes: B completions, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.train.pretrained import DTYPES, check_folder


class RewardModel(Protocol):
    """A model that scores each completion of a prompt."""

    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return float32 scores (B,) of `completion_ids[i]`, stop token included, after `prompt_ids[i]`."""
        ...


class SequenceClassifier:
    """A reward model saved by transformers: a sequence classifier with one label, whose logit is the score."""

    def __init__(self, model: Any, *, batch_size: int = 16) -> None:
        """Wrap a model with one label, in eval mode.

        Raises:
            ValueError: more labels than one.
        """
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model must have num_labels=1, got {model.config.num_labels}")
        self.model = model
        # Without a padding token transformers cannot tell where the sequences of a batch end.
        self._batch_size = 1 if model.config.pad_token_id is None else batch_size

    @torch.no_grad()
    def score(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> Tensor:
        """Return the scores (B,). A score does not depend on the other sequences of the batch."""
        if len(prompt_ids) != len(completion_ids):
            raise ValueError(
                f"completion_ids must be as many as prompt_ids ({len(prompt_ids)}), got {len(completion_ids)}"
            )
        sequences = [[*prompt, *completion] for prompt, completion in zip(prompt_ids, completion_ids, strict=True)]
        scores = [
            sequence_scores(self.model, sequences[start : start + self._batch_size])
            for start in range(0, len(sequences), self._batch_size)
        ]
        return torch.cat(scores) if scores else torch.zeros(0)


def sequence_scores(model: Any, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Return the scores (B,), differentiable, that a sequence classifier with one label gives token sequences.

    transformers reads the score at the last token that is not the padding token of the model's config.
    """
    device = next(model.parameters()).device
    width = max(len(ids) for ids in sequences)
    pad = model.config.pad_token_id or 0
    ids = torch.tensor([[*sequence, *[pad] * (width - len(sequence))] for sequence in sequences], device=device)
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)
    mask = torch.arange(width, device=device) < lengths[:, None]
    return model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()


def load_reward_model(
    folder: str | Path, tokenizer: Any, *, dtype: str = "float32", device: str | torch.device = "cpu"
) -> SequenceClassifier:
    """Return the sequence classifier saved in `folder` (or with that name on the hub), in eval mode.

    It reads the token ids of the policy, so its tokenizer must be the policy's `tokenizer`.

    Raises:
        ValueError: no such model, a model without trained scores, more labels than one, or another vocabulary.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    check_folder("reward_model", str(folder))
    try:
        own_tokenizer = AutoTokenizer.from_pretrained(folder)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"reward_model must be a saved sequence classifier; {str(folder)!r} gave: {error}") from error
    if report["missing_keys"]:
        raise ValueError(
            f"reward_model {str(folder)!r} must hold a trained sequence classifier; it lacks "
            f"{', '.join(sorted(report['missing_keys'])[:4])}"
        )
    if own_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"reward_model {str(folder)!r} must have the policy's tokenizer ({len(tokenizer)} tokens), "
            f"got another vocabulary ({len(own_tokenizer)} tokens)"
        )
    return SequenceClassifier(model.eval().requires_grad_(False).to(device))
