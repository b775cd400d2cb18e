"""fastrl's log-probs in place of verl's fused kernels: the switch replaces `FusedLinearForPPO.forward`.

With use_fused_kernels=True and impl_backend torch or liger, verl's models call it with the hidden states, the head's
weight, ids that are shifted already, and one temperature.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.common.autocast import as_autocast
from fastrl.integrations.common.host import Switch
from fastrl.integrations.common.proof import TOKENS, FirstUse, prove, sampled_tokens
from fastrl.integrations.verl._registry import HOST
from fastrl.ops.linear_token_logprobs import linear_token_logprobs
from fastrl.ops.row_statistics import linear_row_statistics

_ARGUMENTS = ("self", "hidden_states", "vocab_weights", "input_ids", "temperature")
_proofs = FirstUse()


def fused_logprobs(
    hidden_states: Tensor,  # (..., D)
    vocab_weights: Tensor,  # (V, D)
    input_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (log_probs, entropy) of `input_ids`, both float32 and differentiable, without forming the logits.

    Under autocast, hidden states and head are cast to its dtype, as in verl's own matrix product.

    Args:
        hidden_states: (..., D).
        vocab_weights: (V, D).
        input_ids: (...) ids aligned with the hidden states.
        temperature: one number, or a tensor that broadcasts to `input_ids`.
    """
    hidden, weight, _ = as_autocast(hidden_states, vocab_weights)
    result = linear_token_logprobs(hidden, weight, input_ids.to(torch.int64), temperature=temperature)
    return result.logprobs, result.entropy


def sum_pi_squared(
    hidden_states: Tensor,  # (..., D)
    vocab_weights: Tensor,  # (V, D)
    input_ids: Tensor,  # (...)
    temperature: float | Tensor = 1.0,
) -> Tensor:
    """Return sum_v p_v^2, detached, in the shape of `input_ids`, for verl's optimal token baseline.

    verl itself needs the logits for it, and so refuses calculate_sum_pi_squared=True with use_fused_kernels=True.
    """
    with torch.no_grad():
        hidden, weight, _ = as_autocast(hidden_states, vocab_weights)
        ids = input_ids.to(torch.int64)
        return linear_row_statistics(hidden, weight, ids, temperature=temperature).log_sum_squared_probs.exp()


def _forward(
    self: Any,
    hidden_states: Tensor,
    vocab_weights: Tensor,
    input_ids: Tensor,
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    """Replace verl's `FusedLinearForPPO.forward`. The first call with a setting is compared with verl's own."""
    key = (hidden_states.dtype, vocab_weights.dtype, tuple(vocab_weights.shape), hidden_states.device.type)
    _proofs.once(key, lambda: _prove(self, hidden_states, vocab_weights, input_ids, temperature))
    return fused_logprobs(hidden_states, vocab_weights, input_ids, temperature)


def _prove(module: Any, hidden: Tensor, weight: Tensor, ids: Tensor, temperature: Any) -> bool:
    """Compare a few tokens with verl's own function; return whether there were any."""
    flat, labels = hidden.detach().reshape(-1, hidden.shape[-1]), ids.reshape(-1).to(torch.int64)
    chosen = sampled_tokens(labels.numel(), labels.device, TOKENS)
    rows, picked, head = flat[chosen], labels[chosen], weight.detach()
    scale = temperature
    if isinstance(temperature, Tensor):
        temperature = temperature.detach().expand(ids.shape).reshape(-1)[chosen]
        scale = temperature.unsqueeze(-1)  # verl divides logits (N, V) by it
    with torch.no_grad():
        logprobs, entropy = _original()(module, rows, head, picked, scale)
        ours = fused_logprobs(rows, head, picked, temperature)
        left, right, _ = as_autocast(rows, head)
        logits = (left @ right.to(left.dtype).t()).float() / scale
    return prove(
        f"{HOST.adapter} (log-probs of FusedLinearForPPO)",
        {"logprobs": ours[0], "entropy": ours[1]},
        {"logprobs": logprobs, "entropy": entropy},
        largest_logit=logits.abs().amax(-1),
        dtype=left.dtype,
        terms=weight.shape[1],
        vocabulary=weight.shape[0],
        undo="undo with fastrl.integrations.verl.disable()",
    )


_originals: list[Callable[..., Any]] = []


def _original() -> Callable[..., Any]:
    return _originals[-1]


def _find() -> list[tuple[Any, str, Any]]:
    module = HOST.module("verl.utils.experimental.torch_functional")
    owner = HOST.attribute(module, "FusedLinearForPPO")
    _originals[:] = [HOST.function(owner, "forward", _ARGUMENTS)]
    _proofs.forget()  # they compared with another original
    return [(owner, "forward", _forward)]


_switch = Switch(HOST, _find)


def patched() -> AbstractContextManager[None]:
    """Run verl's fused log-probs (impl_backend torch or liger) on fastrl inside this context, process-wide.

    Raises:
        ImportError: verl cannot be imported.
        RuntimeError: this verl's `FusedLinearForPPO.forward` takes other arguments.
        AdapterMismatchError in the first call: its log-probs differ from verl's own.
    """
    return _switch.patched()


def enable() -> None:
    """Run verl's fused log-probs on fastrl from here on, as inside `patched()`. Call it in every worker process."""
    _switch.enable()


def disable() -> None:
    """Undo `enable()` and restore verl's own function."""
    _switch.disable()


def enabled() -> bool:
    """Return whether verl's fused log-probs come from fastrl now."""
    return _switch.on
