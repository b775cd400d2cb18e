"""Completions and the prompts that they answer, as one batch of tensors.

Prompts are padded on the left, completions on the right. No mask is ever read off the pad token, because it is the
end-of-sequence token in many models. Prompts have lengths, and a completion ends with its first stop token, which
belongs to it.

Shapes: P prompts, G completions of each, B = P * G completions, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.train.data.encoding import Example


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
        """Return the completions at `rows`, with only their own prompts. The padding stays as it is."""
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

    def examples(self) -> list[Example]:
        """Return each completion after its prompt, as a sequence whose completion is trained."""
        prompts = [ids[mask].tolist() for ids, mask in zip(self.prompt_ids, self.prompt_mask, strict=True)]
        completions = zip(self.completion_ids, self.completion_mask, strict=True)
        return [
            Example.of(prompts[index], ids[mask].tolist())
            for index, (ids, mask) in zip(self.prompt_index.tolist(), completions, strict=True)
        ]


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


def prompt_positions(prompt_mask: Tensor) -> Tensor:  # (P, T) bool
    """Return (P, T) positions that count from 0 at the first token that is not padding."""
    return (prompt_mask.long().cumsum(dim=1) - 1).clamp_min(0)
