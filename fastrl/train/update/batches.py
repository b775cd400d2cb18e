"""What the loops share that sample: prompts to scored completions, log-probs in micro-batches, the passes over a batch.

Shapes: P prompts, G completions of each, B = P * G completions, T time, D hidden.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastrl.losses.kl import kl_estimate
from fastrl.losses.output import LossOutput
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.train.config.sampling import BatchConfig
from fastrl.train.data.packing import prove_packing
from fastrl.train.model import Head
from fastrl.train.rollouts.generate import Forward, Rollout, completion_hidden, token_logprobs_of, verify_logprobs
from fastrl.train.rollouts.packed import packed_completion_hidden, rollout_examples
from fastrl.train.run.run import MetricSums, Run

logger = logging.getLogger(__name__)


Rows = Sequence[tuple[int, int]]  # (start, stop) of micro-batches


@dataclass(frozen=True)
class Batch:
    """A batch of rollouts with everything that the policy loss needs beside the policy."""

    rollout: Rollout
    advantages: Tensor  # (B,) or (B, T)
    mask: Tensor  # (B, T) tokens in the loss
    old_logprobs: Tensor | None  # (B, T), None where the policy still is the one that sampled
    ref_logprobs: Tensor | None  # (B, T)

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


def zero_advantages(batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `zero_advantage_fraction` as (sum, count): the share of the tokens in the loss whose advantage is 0.

    The policy's part of the loss has no gradient there, and without a KL or an entropy bonus the backward pass through
    the head leaves such rows out.
    """
    advantages = batch.advantages if batch.advantages.dim() == 2 else batch.advantages[:, None]
    return {"zero_advantage_fraction": (((advantages == 0) & batch.mask).sum(), batch.mask.sum())}


class Counts(NamedTuple):
    """What an optimiser step divides its losses by, so that the split into micro-batches changes nothing."""

    tokens: Tensor
    sequences: Tensor

    @classmethod
    def of(cls, mask: Tensor, rows: Rows) -> Counts:
        """Count over all micro-batches of a step; at least 1."""
        live = torch.cat([mask[start:stop].sum(dim=1) for start, stop in rows])
        return cls(live.sum().clamp_min(1), (live > 0).sum().clamp_min(1))


def policy_output(
    loss_function: PolicyLoss,
    head: Head,
    hidden: Tensor,  # (B, T, D)
    part: Batch,
    counts: Counts,
    temperature: float,
    selection: Tensor | None = None,  # (B, T) bool
) -> LossOutput:
    """Return the policy loss of a micro-batch from the hidden states that predict its tokens.

    Tokens outside `selection` are left out of the policy term; the denominator keeps them.
    """
    grouped = {"group_ids": part.rollout.prompt_index} if loss_function.aggregate == "prompt_mean" else {}
    return loss_function.from_hidden(
        hidden, head.weight, part.rollout.completion_ids, temperature=temperature, advantages=part.advantages,
        mask=part.mask, old_logprobs=part.old_logprobs, ref_logprobs=part.ref_logprobs,
        rollout_logprobs=part.rollout.logprobs, n_tokens=counts.tokens, n_sequences=counts.sequences,
        selection=selection, **grouped, **head.kwargs(),
    )  # fmt: skip


def named_loss(name: str, fields: Mapping[str, Any], config: BatchConfig) -> PolicyLoss:
    """Return the preset `name` with `fields`; raise `ValueError` for a loss that loops over rollouts cannot feed."""
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


def ratio_deviation(output: LossOutput, part: Batch) -> Tensor:
    """Return max |ratio - 1| over the live tokens, 0 where the old log-probs are not known."""
    assert output.logprobs is not None
    if part.old_logprobs is None:
        return torch.zeros((), device=output.logprobs.device)
    ratio = torch.exp(output.logprobs - part.old_logprobs)
    return torch.where(part.mask, (ratio - 1.0).abs(), 0.0).max()


def sampled_kl(output: LossOutput, part: Batch) -> Tensor:
    """Return the sum over live tokens of r - 1 - log r: KL(old || new), estimated on what the old policy sampled."""
    assert output.logprobs is not None
    assert part.old_logprobs is not None
    return kl_estimate(part.old_logprobs, output.logprobs, "k3", mask=part.mask).sum()


Select = Callable[[Tensor, Head, Batch], Tensor]  # hidden states, head, batch -> (B, T) bool


class Passed(NamedTuple):
    """What a backward pass over the micro-batches of a step tells; scalars on the device."""

    loss: Tensor
    ratio_deviation: Tensor
    """max |ratio - 1|, 0 without old log-probs."""


def backward(
    run: Run[Any],
    model: Any,
    head: Head,
    loss_function: PolicyLoss,
    batch: Batch,
    rows: Rows,
    totals: MetricSums,
    select: Select | None = None,
) -> Passed:
    """Accumulate the gradient of the policy loss of one optimiser step over the micro-batches `rows`.

    Each micro-batch is divided by the token and sequence counts of all of them, so their gradients simply add up.
    `select` chooses the tokens that the policy term keeps.
    """
    counts = Counts.of(batch.mask, rows)
    zero, one = torch.zeros((), device=batch.mask.device), torch.ones((), device=batch.mask.device)
    loss = deviation = zero
    for start, stop in rows:
        part = batch.rows(start, stop)
        hidden = forward_of(run.config)(model, part.rollout)
        selection = None if select is None else select(hidden, head, part)
        if selection is not None:
            totals.add({"detached_fraction": ((part.mask & ~selection).sum(), part.mask.sum())})
        output = policy_output(loss_function, head, hidden, part, counts, run.config.temperature, selection)
        run.backward(output.loss)
        totals.add(output.metrics)
        totals.add({"loss": (output.loss.detach(), zero)})
        loss = loss + output.loss.detach()
        deviation = torch.maximum(deviation, ratio_deviation(output, part))
    totals.add({"loss": (zero, one)})
    return Passed(loss, deviation)


def forward_of(config: BatchConfig) -> Forward:
    """Return how the loop gets the hidden states of completions: prompts shared, or packed."""
    if not config.packing:
        return completion_hidden
    return functools.partial(packed_completion_hidden, stream_tokens=config.packing_tokens)


def verify_rollout(model: Any, head: Head, rollout: Rollout, config: BatchConfig) -> None:
    """Log by how much log-probs differ from those of the model's own logits.

    Raises ValueError where that is more than rounding, and where packed sequences see each other.
    """
    few = rollout.rows(0, min(4, config.batch_size))
    if config.packing:
        prove_packing(model, head, rollout_examples(few))
    difference = verify_logprobs(model, head, few, config.temperature, forward_of(config))
    logger.info("log-probs equal those of the model's own logits within %.2g nats", difference)


def logprobs_in_micro_batches(model: Any, head: Head, rollout: Rollout, config: BatchConfig) -> Tensor:
    """Return log-probs (B, T), computed in the micro-batches of the loss, so that equal weights give equal bits."""
    result = torch.zeros_like(rollout.logprobs)
    for start, stop in micro_batches(config):
        part = rollout.rows(start, stop)
        logprobs = token_logprobs_of(model, head, part, config.temperature, forward_of(config)).logprobs
        result[start:stop, : logprobs.shape[1]] = logprobs
    return result


def micro_batches(config: BatchConfig) -> list[tuple[int, int]]:
    """Return the (start, stop) rows of all micro-batches, in order."""
    return [(start, start + config.micro_batch) for start in range(0, config.batch_size, config.micro_batch)]


def minibatches(config: BatchConfig, generator: torch.Generator) -> Iterator[list[tuple[int, int]]]:
    """Yield, for each optimiser step of a pass, the (start, stop) rows of its micro-batches, in random order."""
    size = config.micro_batch
    starts = torch.arange(0, config.batch_size, size)
    if config.minibatches > 1:
        starts = starts[torch.randperm(len(starts), generator=generator, device=generator.device).cpu()]
    for chunk in starts.chunk(config.minibatches):
        yield [(start, start + size) for start in sorted(chunk.tolist())]
