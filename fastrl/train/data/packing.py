"""Packing: sequences of different lengths in one stream of tokens, without padding and without seeing each other.

    batches = [collate([examples[i] for i in group]) for group in pack(lengths, budget)]
    hidden = packed_hidden(model, batch)           # (N, D), a row per predicted token

Attention keeps the sequences apart. FlashAttention has a variable-length kernel for this. The other implementations of
transformers make a block-diagonal causal mask from positions that begin again at 0. Some model families do not, for
example because a recurrent state runs on. So `prove_packing` measures it on the first batch: a sequence must have the
same log-probs as alone, and they must not change with its neighbours.

Shapes: S sequences, N tokens of all of them, D hidden, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.ops import linear_token_logprobs
from fastrl.train.data.encoding import Example
from fastrl.train.pretrained import LARGEST_DIFFERENCE, OutputHead, causal_lm, check_positions

# Largest change of a hidden state, relative to the largest hidden state, if tokens of the sequence before it change.
# A masked entry has weight exactly 0. Only rounding is left, from GEMMs of other shapes (mixtures of experts).
_LARGEST_LEAK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
# Size of the proof.
_PROOF_SEQUENCES, _PROOF_TOKENS = 4, 256


@dataclass(frozen=True)
class PackedBatch:
    """Sequences one after the other. The last token of each is only a label and the first only an input."""

    input_ids: Tensor  # (N,)
    labels: Tensor  # (N,) the token after each input
    mask: Tensor  # (N,) bool, trained labels
    position_ids: Tensor  # (N,) from 0 in each sequence
    cu_seqlens: Tensor  # (S+1,) int32, first index of each sequence, and N
    max_length: int
    """Number of inputs of the longest sequence."""


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return groups of indices such that the lengths of each add up to at most `budget`: first fit, longest first.

    It makes at most 11/9 of the fewest possible groups and 6/9 of one (Dosa 2007). Equal lengths keep their order, so
    the result is a function of the lengths. It takes O(n x groups) time.

    Raises:
        ValueError: a length is less than 1 or greater than the budget.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= budget:
            raise ValueError(f"lengths must be from 1 to the budget of {budget} tokens, got {length} at {index}")
    groups: list[list[int]] = []
    left: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((g for g, room in enumerate(left) if room >= lengths[index]), None)
        if place is None:
            place = len(groups)
            groups.append([])
            left.append(budget)
        groups[place].append(index)
        left[place] -= lengths[index]
    return groups


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> PackedBatch:
    """Return the examples, of at least two tokens each, as one packed batch."""
    for example in examples:
        if len(example.ids) < 2:
            raise ValueError(f"an example must have at least 2 tokens, got {len(example.ids)}")
    lengths = [len(example.ids) - 1 for example in examples]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return PackedBatch(
        input_ids=torch.tensor([token for e in examples for token in e.ids[:-1]], device=device),
        labels=torch.tensor([token for e in examples for token in e.ids[1:]], device=device),
        mask=torch.tensor([kept for e in examples for kept in e.trained[1:]], device=device),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).to(device),
        cu_seqlens=ends.to(device, torch.int32),
        max_length=max(lengths),
    )


def packed_batches(
    examples: Sequence[Example], budget: int | None, device: torch.device | str = "cpu"
) -> list[tuple[list[int], PackedBatch]]:
    """Return batches of at most `budget` inputs, or of one example if None, each with the indices of its examples."""
    lengths = [len(example.ids) - 1 for example in examples]
    groups = [[index] for index in range(len(examples))] if budget is None else pack(lengths, budget)
    return [(group, collate([examples[index] for index in group], device)) for group in groups]


def packed_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Return (N, D): the hidden state that predicts each label, differentiable."""
    inner = causal_lm(model)
    check_positions(model, batch.max_length)
    lengths: dict[str, Any] = {}
    if inner.config._attn_implementation.startswith("flash"):
        lengths = {
            "cu_seq_lens_q": batch.cu_seqlens,
            "cu_seq_lens_k": batch.cu_seqlens,
            "max_length_q": batch.max_length,
            "max_length_k": batch.max_length,
        }
    # No attention mask and no cache: with either, transformers does not look for several sequences in the positions.
    out = inner.base_model(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], use_cache=False, **lengths
    )
    return out.last_hidden_state[0]


def use_flash_attention(model: Any) -> bool:
    """Switch the model to FlashAttention's variable-length kernels if they can run, and return whether they can.

    They need the package flash-attn, a GPU, 16-bit parameters and a model family that supports them.
    """
    from transformers.utils import is_flash_attn_2_available

    inner = causal_lm(model)
    parameter = next(inner.parameters())
    can = (
        parameter.device.type == "cuda"
        and parameter.dtype in (torch.float16, torch.bfloat16)
        and getattr(inner, "_supports_flash_attn", False)
        and is_flash_attn_2_available()
    )
    if can:
        inner.set_attn_implementation("flash_attention_2")
    return can


@torch.no_grad()
def prove_packing(model: Any, head: OutputHead, examples: Sequence[Example], *, packed: bool = True) -> float:
    """Return max |packed log-prob - log-prob of the sequence alone|, in nats, for a few shortened examples.

    The second log-prob comes from the logits of the model itself, so the difference also covers the reading of the head
    (bias, scale, softcap). A single example is packed with itself. Without `packed`, each batch holds one example, and
    the reading of the head is all that the number covers.

    Raises:
        ValueError: by more than rounding, the log-probs differ, or the hidden states change with the tokens of a
            neighbouring sequence. The model cannot be trained on packed sequences.
    """
    few = [_start_of(example) for example in examples[:_PROOF_SEQUENCES]]
    if packed and len(few) == 1:
        few = few * 2
    batches = [collate(few, head.weight.device)] if packed else [collate([e], head.weight.device) for e in few]
    # Under autocast the model's own head would round its logits to 16 bits.
    with torch.autocast(head.weight.device.type, enabled=False):
        if packed:
            _check_leak(model, batches[0])
        return max(_check_logprobs(model, head, batch) for batch in batches)


def _check_leak(model: Any, batch: PackedBatch) -> None:
    """Raise if the hidden states of later sequences change with the tokens of the first one."""
    first = int(batch.cu_seqlens[1])
    others = (batch.input_ids[:first] + 1) % causal_lm(model).get_input_embeddings().weight.shape[0]
    changed = torch.cat([others, batch.input_ids[first:]])
    hidden = packed_hidden(model, batch)[first:]
    leak = packed_hidden(model, dataclasses.replace(batch, input_ids=changed))[first:] - hidden
    relative = float(leak.abs().max() / hidden.abs().max())
    if not relative <= _LARGEST_LEAK[hidden.dtype]:
        raise ValueError(
            f"{type(causal_lm(model)).__name__} cannot be trained on packed sequences (set packing to false): the "
            f"hidden states of a sequence changed by {relative:.2g} of the largest with the tokens of the one before"
        )


def _check_logprobs(model: Any, head: OutputHead, batch: PackedBatch) -> float:
    """Return the largest difference from the model's own logits of each sequence alone, or raise."""
    inner = causal_lm(model)
    ours = linear_token_logprobs(packed_hidden(model, batch), head.weight, batch.labels, **head.kwargs()).logprobs
    worst = torch.zeros((), dtype=torch.float64, device=ours.device)  # torch.maximum keeps a NaN, Python's max loses it
    offsets = batch.cu_seqlens.tolist()
    for start, stop in itertools.pairwise(offsets):
        logits = inner(input_ids=batch.input_ids[None, start:stop], use_cache=False).logits[0]
        alone = torch.log_softmax(logits.double(), dim=-1).gather(1, batch.labels[start:stop, None])[:, 0]
        worst = torch.maximum(worst, (ours[start:stop].double() - alone).abs().max())
    granted = LARGEST_DIFFERENCE[head.weight.dtype]
    if not bool(worst <= granted):
        raise ValueError(
            f"log-probs of {type(inner).__name__} from packed hidden states differ by {float(worst):.3g} nats from "
            f"those of the sequences alone, expected at most {granted} in {head.weight.dtype}; the head was read as "
            f"logit_scale={head.logit_scale}, softcap={head.softcap}"
        )
    return float(worst)


def _start_of(example: Example) -> Example:
    return Example(example.ids[:_PROOF_TOKENS], example.trained[:_PROOF_TOKENS])
