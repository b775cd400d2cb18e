"""Given preferences as the DPO loop trains on them: pairs or labelled rows, with the reference's log-probs.

records -> comparisons        a prompt with its chosen and its rejected completion, or, for a loss of single rows, a
                              completion with its label and a mismatched one
reference log-probs           of all completions, from the folder of the run or computed now
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastrl.losses.preference.loss import PreferenceLoss
from fastrl.train.config.dpo import DPOConfig
from fastrl.train.data.encoding import Encoder, preference_examples, unpaired_examples
from fastrl.train.data.records import Records
from fastrl.train.model import Policy
from fastrl.train.preferences.comparisons import Comparison
from fastrl.train.preferences.reference_logprobs import reference_logprobs
from fastrl.train.run.run import Run


@dataclass(frozen=True)
class Preferences:
    """Comparisons with their labels and their log-probs under the reference."""

    comparisons: list[Comparison]
    """Chosen and rejected, or, for losses of single rows, the completion and a mismatched one."""
    labels: list[bool] | None
    """Whether single rows are desirable. None for pairs."""
    ref: list[tuple[Tensor, ...]] | None = None
    """Per-token log-probs of the reference, None for a loss without one."""

    def __len__(self) -> int:
        return len(self.comparisons)


def preferences(
    records: Records, encoder: Encoder, config: DPOConfig, loss: PreferenceLoss, *, split: bool
) -> tuple[Preferences, tuple[int, int]]:
    """Return the examples of the records, and the numbers of those dropped and cut because of their length.

    Args:
        records: pairs, or completions with a label.
        encoder: the tokenizer and the template.
        config: the limits of the length.
        loss: of pairs or of single rows.
        split: make two labelled rows of each pair for a loss of single rows.

    Raises:
        ValueError: records of single rows for a loss of pairs, or records that cannot be read.
    """
    limits: dict[str, Any] = {"max_tokens": config.max_tokens, "overlong": config.overlong}
    if "label" in records[0]:
        if not loss.unpaired:
            raise ValueError(
                f"the loss {loss.name!r} needs pairs (prompt, chosen, rejected), got completions with a label in "
                f"{records.source}; losses for those are kto, apo_zero_unpaired, bco"
            )
        encoded = unpaired_examples(records, encoder, **limits)
        rows = [(example.prompt, example.completion, example.label) for example in encoded.examples]
        return labelled(rows, records.source), (encoded.dropped, encoded.cut)
    pairs = preference_examples(records, encoder, **limits)
    skipped = (pairs.dropped, pairs.cut)
    if not (loss.unpaired and split):
        return Preferences([Comparison.of_pair(pair) for pair in pairs.examples], None), skipped
    rows = [
        (pair.prompt, completion, label)
        for pair in pairs.examples
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    ]
    return labelled(rows, records.source), skipped


def labelled(rows: Sequence[tuple[list[int], list[int], bool]], source: str) -> Preferences:
    """Return labelled rows, each with the completion of the next row that has another prompt as its mismatched one."""
    comparisons = []
    n = len(rows)
    following: list[int] | None = None
    for index in range(2 * n - 1, -1, -1):  # backwards, twice around: the last rows find one at the beginning
        prompt, completion, _ = rows[index % n]
        if index + 1 < 2 * n and rows[(index + 1) % n][0] != prompt:
            following = rows[(index + 1) % n][1]
        if index < n:
            if following is None:
                raise ValueError(f"{source} must have at least two different prompts, got one")
            comparisons.append(Comparison(prompt, (completion, following)))
    return Preferences(comparisons[::-1], [label for _, _, label in rows])


def with_reference(
    run: Run[DPOConfig], policy: Policy, train: Preferences, held_out: Preferences | None
) -> tuple[Preferences, Preferences | None]:
    """Return both with log-probs of `policy`, the reference as yet, from the folder of the run or computed now."""
    config = run.config
    parts = [part for part in (train, held_out) if part is not None]
    found = []
    for name, part in zip(("train", "held_out"), parts, strict=False):
        folder = run.dir / "reference" / name
        folder.mkdir(parents=True, exist_ok=True)
        ref = reference_logprobs(
            folder, policy, part.comparisons, batch_size=config.micro_batch,
            settings={"dtype": config.dtype, "mixed_precision": config.mixed_precision},
        )  # fmt: skip
        found.append(dataclasses.replace(part, ref=ref))
    return found[0], found[1] if len(found) > 1 else None


def select(of: Preferences, indices: Sequence[int]) -> Preferences:
    """Return the examples at the indices."""
    return Preferences(
        [of.comparisons[index] for index in indices],
        None if of.labels is None else [of.labels[index] for index in indices],
        None if of.ref is None else [of.ref[index] for index in indices],
    )
