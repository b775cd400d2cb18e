"""Comparisons: completions of one prompt side by side, and the batches that the preference loops make of them.

A `Comparison` is a prompt with one or two completions. Its completions share the forward pass of the prompt, as the
completions of a group do. A batch of P comparisons with C completions has C P rows: the first completion of each, then
the second of each. This is the order of `fastrl.PreferenceLoss`.

Shapes: P comparisons, C completions of each, B = C * P rows, T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.train.config.preferences import ComparisonDataConfig
from fastrl.train.data.encoding import PreferenceExample, pad_left
from fastrl.train.data.records import Records, read_records, split_held_out
from fastrl.train.data.rollout import Rollout


@dataclass(frozen=True)
class Comparison:
    """A prompt and its completions, as token ids."""

    prompt: list[int]
    completions: tuple[list[int], ...]

    @classmethod
    def of_pair(cls, pair: PreferenceExample) -> Comparison:
        """Return the comparison of the chosen with the rejected completion."""
        return cls(pair.prompt, (pair.chosen, pair.rejected))

    @property
    def length(self) -> int:
        """Tokens of the prompt and the longest completion."""
        return len(self.prompt) + max(map(len, self.completions))


def comparison_records(config: ComparisonDataConfig) -> tuple[Records, Records | None]:
    """Return the records to train on and the held-out ones, None if the configuration wants none.

    Raises:
        ValueError: there is no `data`, or it cannot be read.
    """
    if config.data is None:
        raise ValueError("data must name the preference records (prompt, chosen, rejected), got none")
    records = read_records(config.data, split=config.data_split)
    if config.eval_data is not None:
        return records, read_records(config.eval_data)
    return split_held_out(records, config.eval_share) if config.eval_share else (records, None)


def rollout_of(comparisons: Sequence[Comparison], pad_id: int, device: torch.device | str) -> Rollout:
    """Return the comparisons, of equally many completions each, as rows that share their prompts."""
    where = torch.device(device)
    prompt_ids, prompt_mask = pad_left([comparison.prompt for comparison in comparisons], pad_id, where)
    count = len(comparisons[0].completions)
    rows = [comparison.completions[slot] for slot in range(count) for comparison in comparisons]
    lengths = torch.tensor([len(ids) for ids in rows])
    width = int(lengths.max())
    mask = (torch.arange(width) < lengths[:, None]).to(where)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        prompt_index=torch.arange(len(comparisons), device=where).repeat(count),
        completion_ids=torch.tensor([[*ids, *[pad_id] * (width - len(ids))] for ids in rows], device=where),
        completion_mask=mask,
        logprobs=torch.zeros(mask.shape, device=where),
        truncated=torch.zeros(len(rows), dtype=torch.bool, device=where),
    )


def padded_logprobs(rows: Sequence[Sequence[Tensor]], width: int, device: torch.device | str) -> Tensor:
    """Return per-token values `rows[p][c]` (T_pc,) as (B, width), in the order of `rollout_of`, 0 where masked."""
    ordered = [row[slot] for slot in range(len(rows[0])) for row in rows]
    padded = torch.zeros(len(ordered), width)
    for place, values in enumerate(ordered):
        padded[place, : len(values)] = values
    return padded.to(device)


def by_length(comparisons: Sequence[Comparison], size: int) -> Iterator[list[int]]:
    """Yield indices in micro-batches of at most `size`, similar lengths together, so that there is less padding."""
    order = sorted(range(len(comparisons)), key=lambda index: comparisons[index].length)
    for start in range(0, len(order), size):
        yield order[start : start + size]
