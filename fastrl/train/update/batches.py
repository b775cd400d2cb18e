"""Batches of scored completions: everything that a policy loss reads beside the policy, in minibatches and parts.

    for minibatch in batch.minibatches(config, generator):     one optimiser step each
        counts = StepCounts.of(minibatch)                      the denominators of the whole step
        for part in minibatch:                                 one forward and backward pass each
            loss.from_hidden(hidden, weight, part.labels, **part.inputs(counts), ...)

Every part is divided by the counts of the whole step. So the split into parts changes the memory and not the gradient.

Shapes: P prompts, G completions of each, B = P * G completions, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastrl.losses.kl import kl_estimate
from fastrl.losses.output import LossOutput
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.train.config.sampling import BatchConfig
from fastrl.train.data.rollout import Rollout


@dataclass(frozen=True)
class RolloutBatch:
    """Completions with advantages, mask, old and reference log-probs."""

    rollout: Rollout
    advantages: Tensor  # (B,) or (B, T)
    mask: Tensor  # (B, T) tokens in the loss
    old_logprobs: Tensor | None  # (B, T), None if the policy still is the one that sampled
    ref_logprobs: Tensor | None  # (B, T)

    @property
    def labels(self) -> Tensor:
        """The completion tokens, (B, T)."""
        return self.rollout.completion_ids

    def inputs(self, counts: StepCounts) -> dict[str, Any]:
        """Return the inputs of `PolicyLoss.from_hidden`, divided by the counts of the whole optimiser step."""
        return {
            "advantages": self.advantages,
            "mask": self.mask,
            "old_logprobs": self.old_logprobs,
            "ref_logprobs": self.ref_logprobs,
            "rollout_logprobs": self.rollout.logprobs,
            "group_ids": self.rollout.prompt_index,
            "n_tokens": counts.tokens,
            "n_sequences": counts.sequences,
        }

    def rows(self, start: int, stop: int) -> Self:
        """Return completions `start` to `stop`, no longer than they need."""
        rollout = self.rollout.rows(start, stop)
        width = rollout.completion_ids.shape[1]

        def cut(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            return values[start:stop, :width] if values.dim() == 2 else values[start:stop]

        names = [field.name for field in dataclasses.fields(self) if field.name != "rollout"]
        return dataclasses.replace(self, rollout=rollout, **{name: cut(getattr(self, name)) for name in names})

    def parts(self, config: BatchConfig) -> list[Self]:
        """Return all micro-batches, in order."""
        return [self.rows(start, stop) for start, stop in micro_batch_rows(config)]

    def minibatches(self, config: BatchConfig, generator: torch.Generator) -> Iterator[list[Self]]:
        """Yield the micro-batches of each optimiser step of a pass over the batch, in random order."""
        for rows in minibatch_rows(config, generator):
            yield [self.rows(start, stop) for start, stop in rows]


class StepCounts(NamedTuple):
    """The denominators of an optimiser step."""

    tokens: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, parts: Sequence[RolloutBatch]) -> StepCounts:
        """Count the tokens in the loss, and the sequences that have one, over all parts. Both are at least 1."""
        live = torch.cat([part.mask.sum(dim=1) for part in parts])
        return cls(live.sum().clamp_min(1), (live > 0).sum().clamp_min(1))


def micro_batch_rows(config: BatchConfig) -> list[tuple[int, int]]:
    """Return the (start, stop) rows of all micro-batches, in order."""
    return [(start, start + config.micro_batch) for start in range(0, config.batch_size, config.micro_batch)]


def minibatch_rows(config: BatchConfig, generator: torch.Generator) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each optimiser step of a pass, the (start, stop) rows of its micro-batches, in random order."""
    size = config.micro_batch
    starts = torch.arange(0, config.batch_size, size)
    # Micro-batches are shuffled whole: old log-probs were computed in the same ones, so the first ratio is exactly 1.
    if config.minibatches > 1:
        starts = starts[torch.randperm(len(starts), generator=generator, device=generator.device).cpu()]
    for chunk in starts.chunk(config.minibatches):
        yield [(start, start + size) for start in sorted(chunk.tolist())]


def named_loss(name: str, fields: Mapping[str, Any], config: BatchConfig) -> PolicyLoss:
    """Return the preset `name` with `fields`.

    Raises:
        ValueError: the loss ignores rewards, or it is computed over a minibatch that the configuration splits.
    """
    loss = PolicyLoss.preset(name, **fields)
    if loss.aggregate == "constant" and loss.constant is None:
        loss = PolicyLoss.preset(name, **fields, constant=float(config.max_new_tokens))
    if loss.surrogate in ("nll", "dft"):
        raise ValueError(f"loss {name!r} does not look at the rewards; it is for supervised data")
    per_batch = loss.aggregate == "prompt_mean" or loss.kl_fraction is not None or name == "clip_cov"
    if per_batch and config.micro_batch != config.batch_size // config.minibatches:
        raise ValueError(
            f"loss {name!r} is computed over a whole minibatch; expected micro_batch_size=None, "
            f"got {config.micro_batch_size}"
        )
    return loss


def zero_advantages(batch: RolloutBatch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `zero_advantage_fraction` as (sum, count): the share of the tokens in the loss whose advantage is 0.

    The policy term has no gradient there. Without a KL or an entropy bonus the backward pass skips these rows of the
    head.
    """
    advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
    return {"zero_advantage_fraction": (((advantages == 0) & batch.mask).sum(), batch.mask.sum())}


def ratio_deviation(output: LossOutput, part: RolloutBatch) -> Tensor:
    """Return max |ratio - 1| over the live tokens, 0 if the old log-probs are not known."""
    assert output.logprobs is not None
    if part.old_logprobs is None:
        return torch.zeros((), device=output.logprobs.device)
    ratio = torch.exp(output.logprobs - part.old_logprobs)
    return torch.where(part.mask, (ratio - 1.0).abs(), 0.0).max()


def sampled_kl(output: LossOutput, part: RolloutBatch) -> Tensor:
    """Return KL(old || new) summed over live tokens, estimated as r - 1 - log r on the old policy's samples."""
    assert output.logprobs is not None
    assert part.old_logprobs is not None
    return kl_estimate(part.old_logprobs, output.logprobs, "k3", mask=part.mask).sum()
