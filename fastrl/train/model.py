"""The policy of a loop: a causal language model, read as hidden states and an output head.

    policy = load_policy(config, device)
    hidden = policy.hidden(rollout)                       # (B, T, D), differentiable
    loss.from_hidden(hidden, policy.weight, labels, ..., **policy.options)
    policy.logprobs(rollout)                              # (B, T), no gradient

The losses take hidden states and the head, so that no logits of a whole batch are ever formed. Completions reach their
hidden states in one of two ways, which give the same numbers within rounding:

    shared    a prompt goes through the model once for all its completions, which are padded
    packed    each completion follows its prompt in a stream of sequences, without padding

With 8 completions of 8 tokens on a prompt of 32 tokens the shared way runs 96 tokens, the packed one 320. Packed
streams are shorter when prompts are short, completions differ much in length, or groups are small.

Shapes: P prompts, B completions, T time, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.checks import MASKED_LABEL
from fastrl.ops import linear_token_logprobs
from fastrl.train.config.run import RunConfig
from fastrl.train.config.sampling import BatchConfig, TaskConfig
from fastrl.train.data.packing import packed_batches, packed_hidden, prove_packing, use_flash_attention
from fastrl.train.data.rollout import Rollout, prompt_positions
from fastrl.train.pretrained import (
    LARGEST_DIFFERENCE,
    OutputHead,
    add_lora,
    cache_argument,
    cache_of,
    causal_lm,
    check_positions,
    head_of,
    load_model,
    stop_token_ids,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Policy:
    """A causal language model with its head, its tokenizer, and the way in which it is run."""

    model: Any
    """A transformers model, perhaps with PEFT adapters."""
    head: OutputHead
    tokenizer: Any = None
    temperature: float = 1.0
    """Divides the logits."""
    stream_tokens: int | None = None
    """Tokens of a packed stream of completions. None shares the prompts."""

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any = None, *, temperature: float = 1.0, stream_tokens: int | None = None
    ) -> Policy:
        """Return the policy of a model, its head read from the model.

        Raises:
            ValueError: the output head is no plain `torch.nn.Linear`.
        """
        return cls(model, head_of(model), tokenizer, temperature, stream_tokens)

    def with_model(self, model: Any) -> Policy:
        """Return this policy around another model, whose head is read anew."""
        return dataclasses.replace(self, model=model, head=head_of(model))

    def with_adapters(self, config: RunConfig) -> Policy:
        """Return the policy with the LoRA adapters of the configuration, or as it is if `lora_rank` is 0."""
        if config.lora_rank == 0:
            return self
        return self.with_model(
            add_lora(self.model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_modules)
        )

    @property
    def weight(self) -> Tensor:
        """The weight of the head, (V, D)."""
        return self.head.weight

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of a loss's `from_hidden` beside hidden states, weight and labels."""
        return {"temperature": self.temperature, **self.head.kwargs()}

    @property
    def device(self) -> torch.device:
        """The device of the head."""
        return self.head.weight.device

    @property
    def stop_ids(self) -> list[int]:
        """Every id that ends a completion."""
        return stop_token_ids(causal_lm(self.model), self.tokenizer)

    @property
    def pad_id(self) -> int:
        """The id of the padding token."""
        return self.tokenizer.pad_token_id

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters by name."""
        return dict(self.model.named_parameters())

    def hidden(self, rollout: Rollout) -> Tensor:
        """Return (B, T, D): the hidden state that predicts each completion token, differentiable."""
        return self.hidden_of(self.model, rollout)

    def hidden_of(self, model: Any, rollout: Rollout) -> Tensor:
        """Return the hidden states of another model, for example a critic's backbone, run in the same way."""
        if self.stream_tokens is None:
            return completion_hidden(model, rollout)
        return packed_completion_hidden(model, rollout, self.stream_tokens)

    @torch.no_grad()
    def logprobs_from(self, hidden: Tensor, rollout: Rollout) -> Tensor:
        """Return log-probs (B, T) of the completion tokens from `hidden(rollout)`, 0 where masked, without gradient."""
        labels = rollout.completion_ids.masked_fill(~rollout.completion_mask, MASKED_LABEL)
        return linear_token_logprobs(hidden, self.weight, labels, ignore_index=MASKED_LABEL, **self.options).logprobs

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, micro_batch: int | None = None) -> Tensor:
        """Return log-probs (B, T) of the completion tokens, 0 where masked, without gradient.

        `micro_batch` completions go through the model at once. Equal weights give equal bits in equal micro-batches.
        Old log-probs in the micro-batches of the loss make the first ratio exactly 1.
        """
        if micro_batch is None:
            return self.logprobs_from(self.hidden(rollout), rollout)
        result = torch.zeros_like(rollout.logprobs)
        for start in range(0, len(rollout.logprobs), micro_batch):
            part = rollout.rows(start, start + micro_batch)
            logprobs = self.logprobs_from(self.hidden(part), part)
            result[start : start + micro_batch, : logprobs.shape[1]] = logprobs
        return result

    @torch.no_grad()
    def verify(self, rollout: Rollout) -> float:
        """Return the largest |difference| in nats from log-probs of `model(...).logits`, and log it.

        The model computes its own logits from each sequence alone, without padding, cache or shared prompt. So one
        number covers everything that a model family may do differently: the head's bias, scale and softcap, positions,
        masks, the cache. It costs a forward pass per completion, so give it a few.

        Raises:
            ValueError: the difference is more than rounding, or packed sequences see each other.
        """
        if self.stream_tokens is not None:
            prove_packing(self.model, self.head, rollout.examples())
        # Under autocast the model's own head would round its logits to 16 bits.
        with torch.autocast(self.device.type, enabled=False):
            worst = self._largest_difference(rollout)
        granted = LARGEST_DIFFERENCE[self.weight.dtype]
        if not worst <= granted:  # a NaN is refused too
            raise ValueError(
                f"log-probs from the hidden states differ from those of the model's own logits by {worst:.3g} nats, "
                f"expected at most {granted} in {self.weight.dtype}; the head of "
                f"{type(causal_lm(self.model)).__name__} was read as logit_scale={self.head.logit_scale}, "
                f"softcap={self.head.softcap}, bias={'none' if self.head.bias is None else 'one'}"
            )
        logger.info("log-probs equal those of the model's own logits within %.2g nats", worst)
        return worst

    def _largest_difference(self, rollout: Rollout) -> float:
        ours = self.logprobs(rollout)
        inner = causal_lm(self.model)
        worst = torch.zeros((), dtype=torch.float64, device=ours.device)
        for row in range(rollout.completion_ids.shape[0]):
            prompt = int(rollout.prompt_index[row])
            start = rollout.prompt_ids[prompt][rollout.prompt_mask[prompt]]
            end = rollout.completion_ids[row][rollout.completion_mask[row]]
            logits = inner(input_ids=torch.cat([start, end])[None], use_cache=False).logits[0, len(start) - 1 : -1]
            theirs = torch.log_softmax(logits.double() / self.temperature, dim=-1).gather(1, end[:, None])[:, 0]
            # torch.maximum keeps a NaN, Python's max loses it.
            worst = torch.maximum(worst, (ours[row, : len(end)].double() - theirs).abs().max())
        return float(worst)


def load_policy(config: RunConfig, device: torch.device | str, *, adapters: bool = True) -> Policy:
    """Return the policy that `config` names, on the device, in eval mode, with its LoRA adapters if it has any.

    Loops that sample (`TaskConfig`) train at the temperature at which they sample, the others at 1. Loops on batches of
    completions (`BatchConfig`) say whether they pack them.

    Args:
        config: of any loop on a language model.
        device: where the parameters go.
        adapters: False leaves the adapters to `Policy.with_adapters`, for loops that need the bare model first.

    Raises:
        ValueError: the model cannot be loaded, or its head cannot be read.
    """
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=device)
    stream_tokens = config.packing_tokens if isinstance(config, BatchConfig) and config.packing else None
    if stream_tokens is not None:
        use_flash_attention(model)
    temperature = config.temperature if isinstance(config, TaskConfig) else 1.0
    policy = Policy.of(model, tokenizer, temperature=temperature, stream_tokens=stream_tokens)
    return policy.with_adapters(config) if adapters else policy


def completion_hidden(model: Any, rollout: Rollout) -> Tensor:
    """Return (B, T, D): the hidden state that predicts each completion token, differentiable.

    The prompts go through the model once. Their cache, repeated for the completions, carries the gradient back.
    """
    backbone = causal_lm(model).base_model
    check_positions(model, rollout.prompt_ids.shape[1] + rollout.completion_ids.shape[1] - 1)
    positions = prompt_positions(rollout.prompt_mask)
    prompt = backbone(
        input_ids=rollout.prompt_ids,
        attention_mask=rollout.prompt_mask.long(),
        position_ids=positions,
        use_cache=True,
    )
    first = prompt.last_hidden_state[rollout.prompt_index, -1:]  # (B, 1, D)
    inputs = rollout.completion_ids[:, :-1]  # nothing is predicted from the last token
    if inputs.shape[1] == 0:
        return first
    cache = cache_of(model, prompt)
    cache.batch_select_indices(rollout.prompt_index)
    attention = torch.cat([rollout.prompt_mask[rollout.prompt_index], rollout.completion_mask[:, :-1]], dim=1)
    ahead = torch.arange(1, inputs.shape[1] + 1, device=inputs.device)
    rest = backbone(
        input_ids=inputs,
        attention_mask=attention.long(),
        position_ids=positions[rollout.prompt_index, -1:] + ahead,
        use_cache=True,
        **cache_argument(backbone, cache),
    )
    return torch.cat([first, rest.last_hidden_state], dim=1)


def packed_completion_hidden(model: Any, rollout: Rollout, stream_tokens: int) -> Tensor:
    """Return (B, T, D) as `completion_hidden` does, 0 where masked, from packed streams.

    Streams hold at most `stream_tokens` tokens, or the longest sequence if that is longer.
    """
    examples = rollout.examples()
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
