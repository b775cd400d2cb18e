"""fastrl inside OpenRLHF: its policy loss, and the log-probs and entropies of its actor.

    from fastrl.integrations import openrlhf

    openrlhf.enable()                  # in the process of the actor; or: with openrlhf.patched(): ...

The adapter replaces `PolicyLoss.forward`, `log_probs_from_logits` and `compute_entropy`, because OpenRLHF has no hook
for them. It also takes effect in objects that exist already.

Legend: B sequences, A actions (padded), V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.common.host import Host, Switch
from fastrl.integrations.common.proof import (
    FirstUse,
    on_cpu,
    prove,
    prove_loss,
    sampled_sequences,
    sampled_tokens,
    uncompiled,
)
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops.token_logprobs import token_logprobs

HOST = Host("OpenRLHF", "openrlhf", "0.11.2", "fastrl.integrations.openrlhf")

_LOSS_ARGUMENTS = (
    "self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", "dp_size",
    "batch_num_tokens", "global_batch_size",
)  # fmt: skip
_OPTIONS = (
    "clip_eps_low", "clip_eps_high", "dual_clip", "token_level_loss", "policy_loss_type", "is_correction_level",
    "is_correction_mode", "is_correction_gating", "is_correction_threshold",
)  # fmt: skip
_INIT_ARGUMENTS = ("self", *_OPTIONS)
_UNDO = "undo with fastrl.integrations.openrlhf.disable(), or switch the proof off with enable(prove=False)"

_proofs = FirstUse()
_originals: dict[str, Callable[..., Any]] = {}  # OpenRLHF's own functions, while the switch is on


@functools.lru_cache(maxsize=32)
def policy_loss(
    *,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    dual_clip: float | None = None,
    token_level_loss: bool = True,
    policy_loss_type: str = "ppo",
    is_correction_level: str = "off",
    is_correction_mode: str = "mask",
    is_correction_gating: str = "ratio",
    is_correction_threshold: tuple[float, float] = (0.5, 5.0),
) -> PolicyLoss:
    """Return the `PolicyLoss` that OpenRLHF's options describe, with the names and defaults of its constructor.

    With "gspo" and a correction OpenRLHF uses no weights: its ratio is the one to the rollout's log-probs.

    Raises:
        ValueError: a value that OpenRLHF does not know.
    """
    if policy_loss_type not in ("ppo", "gspo"):
        raise ValueError(f"policy_loss_type must be 'ppo' or 'gspo', got {policy_loss_type!r}")
    if is_correction_level not in ("off", "token", "seq"):
        raise ValueError(f"is_correction_level must be 'off', 'token' or 'seq', got {is_correction_level!r}")
    if is_correction_mode not in ("mask", "clip"):
        raise ValueError(f"is_correction_mode must be 'mask' or 'clip', got {is_correction_mode!r}")
    corrected = is_correction_level != "off"
    fields: dict[str, Any] = {"clip_low": clip_eps_low, "clip_high": clip_eps_high, "dual_clip": dual_clip}
    fields["aggregate"] = "token_mean" if token_level_loss and policy_loss_type == "ppo" else "sequence_mean"
    if policy_loss_type == "gspo":
        return PolicyLoss.preset("gspo", style="openrlhf", ratio_anchor="rollout" if corrected else "old", **fields)
    if corrected:
        low, high = is_correction_threshold
        fields["correction"] = RolloutCorrection(
            level="sequence" if is_correction_level == "seq" else "token",
            op="truncate" if is_correction_mode == "clip" else "gate",
            statistic=is_correction_gating,
            low=low,
            high=high,
        )
    return PolicyLoss.preset("ppo", style="openrlhf", **fields)


def _forward(
    self: Any,
    log_probs: Tensor,  # (B, A)
    old_log_probs: Tensor,  # (B, A)
    advantages: Tensor,  # (B, A)
    action_mask: Tensor | None = None,  # (B, A)
    rollout_log_probs: Tensor | None = None,  # (B, A)
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Replace OpenRLHF's `PolicyLoss.forward`: return (loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)."""
    options = {name: getattr(self, name) for name in _OPTIONS}
    options["is_correction_threshold"] = tuple(options["is_correction_threshold"])
    loss = policy_loss(**options)
    mask = torch.ones_like(log_probs, dtype=torch.bool) if action_mask is None else action_mask
    counts = (dp_size, batch_num_tokens, global_batch_size)
    key = (*options.items(), rollout_log_probs is None, *(count is None for count in counts))
    columns = (log_probs, old_log_probs, advantages, mask, rollout_log_probs)
    _proofs.once(key, lambda: _loss_proved(self, loss, columns, counts))
    return _computed(loss, *columns, *counts)


def _loss_proved(
    module: Any, loss: PolicyLoss, columns: tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None], counts: Any
) -> bool:
    """Compare the loss of a few sequences with OpenRLHF's own."""
    log_probs, old, advantages, mask, rollout = columns
    rows = sampled_sequences(mask, advantages)
    if rows.numel() == 0:
        return False
    keep = on_cpu(mask, rows)
    point, few_old, few_advantages, few_rollout = (
        None if x is None else torch.where(keep != 0, on_cpu(x, rows), 0.0)
        for x in (log_probs, old, advantages, rollout)
    )
    assert point is not None
    assert few_old is not None
    assert few_advantages is not None
    few = (few_old, few_advantages, keep, few_rollout, *(on_cpu(count) for count in counts))
    return prove_loss(
        f"{HOST.adapter} (PolicyLoss)",
        lambda leaf: _computed(loss, leaf, *few)[0],
        lambda leaf: _originals["forward"](module, leaf, *few)[0],
        point,
        undo=_UNDO,
    )


def _computed(
    loss: PolicyLoss,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    rollout_log_probs: Tensor | None,
    dp_size: int,
    batch_num_tokens: float | Tensor | None,
    global_batch_size: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    by_token = loss.aggregate == "token_mean"
    count = batch_num_tokens if by_token else global_batch_size
    counts: dict[str, Any] = {} if count is None else {"n_tokens" if by_token else "n_sequences": count}
    output = loss(
        log_probs,
        advantages=advantages,
        mask=mask,
        old_logprobs=old_log_probs,
        rollout_logprobs=rollout_log_probs,
        **counts,
    )
    scale = 1 if count is None else dp_size
    clipped, live = output.metrics["clip_fraction"]
    keep = mask != 0
    ppo_kl = torch.where(keep, old_log_probs - log_probs.detach(), 0.0).sum() / live
    vllm_kl = filtered = None
    if loss.correction is not None and rollout_log_probs is not None:
        vllm_kl = torch.where(keep, rollout_log_probs - old_log_probs, 0.0).sum() / live
        filtered = _filtered(loss.correction, old_log_probs, rollout_log_probs, keep)
    return output.loss * scale, (clipped / live).to(log_probs.dtype), ppo_kl, vllm_kl, filtered


def _filtered(correction: RolloutCorrection, old: Tensor, rollout: Tensor, keep: Tensor) -> Tensor:
    """Return the share of tokens, or of sequences, outside the bounds; a sequence without tokens counts as outside."""
    if correction.op == "truncate":
        assert correction.low is not None  # OpenRLHF has both bounds
        assert correction.high is not None
        ratio = torch.where(keep, old - rollout, 0.0).exp()
        outside = keep & ((ratio < correction.low) | (ratio > correction.high))
        return outside.sum() / keep.sum()
    inside = keep & (correction.weights(old, rollout, keep) != 0)
    if correction.level == "sequence":
        return (~inside.any(-1)).float().mean()
    return (keep & ~inside).sum() / keep.sum()


def log_probs_from_logits(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    temperature: float = 1.0,
) -> Tensor:
    """Return the log-probs of `labels`, (...) float32. Unlike OpenRLHF's own function it does not change `logits`."""
    _proofs.once(
        ("logprobs", logits.dtype, logits.shape[-1], logits.device.type, temperature == 1.0),
        lambda: _rows_proved("log_probs_from_logits", logits, labels, temperature),
    )
    return token_logprobs(logits, labels, temperature=temperature).logprobs


def compute_entropy(
    logits: Tensor,  # (..., V)
) -> Tensor:
    """Return the entropy of every row, (...) float32, differentiable."""
    _proofs.once(
        ("entropy", logits.dtype, logits.shape[-1], logits.device.type),
        lambda: _rows_proved("compute_entropy", logits, None, 1.0),
    )
    return _entropy(logits)


def _entropy(logits: Tensor) -> Tensor:
    # Any labels serve, as only the entropy is read.
    labels = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_logprobs(logits, labels).entropy


def _rows_proved(name: str, logits: Tensor, labels: Tensor | None, temperature: float) -> bool:
    """Compare a few rows with OpenRLHF's own function of that name."""
    if name not in _originals:
        return False
    # By index and not after a reshape, which would copy all logits if they are not contiguous.
    chosen = torch.unravel_index(sampled_tokens(logits.shape[:-1].numel(), logits.device), logits.shape[:-1])
    rows = logits.detach()[chosen]
    with torch.no_grad():
        if labels is None:
            # Clones, because OpenRLHF's functions may overwrite their logits.
            quantity, ours = "entropy", _entropy(rows)
            theirs = uncompiled(_originals[name])(rows.clone()[None])
        else:
            picked = labels[chosen]
            quantity, ours = "logprobs", token_logprobs(rows, picked, temperature=temperature).logprobs
            theirs = _originals[name](rows.clone()[None], picked[None], temperature)
    return prove(
        f"{HOST.adapter} ({name})",
        {quantity: ours},
        {quantity: theirs},
        largest_logit=(rows.float() / temperature).abs().amax(-1),
        dtype=logits.dtype,
        terms=1,
        vocabulary=rows.shape[-1],
        undo=_UNDO,
    )


def _find() -> list[tuple[Any, str, Any]]:
    owner = HOST.attribute(HOST.module("openrlhf.models.loss"), "PolicyLoss")
    HOST.function(owner, "__init__", _INIT_ARGUMENTS)
    originals = {"forward": HOST.function(owner, "forward", _LOSS_ARGUMENTS)}
    found: list[tuple[Any, str, Any]] = [(owner, "forward", _forward)]
    for path in ("openrlhf.models.utils", "openrlhf.models.actor"):
        module = HOST.module(path)
        for name, arguments in (("log_probs_from_logits", ("logits", "labels", "temperature")),
                                ("compute_entropy", ("logits",))):  # fmt: skip
            originals[name] = HOST.function(module, name, arguments)
        found += [
            (module, "log_probs_from_logits", log_probs_from_logits),
            (module, "compute_entropy", compute_entropy),
        ]
    _originals.update(originals)
    _proofs.forget()  # they compared with other originals
    return found


_switch = Switch(HOST, _find)


@contextmanager
def patched(*, prove: bool = True) -> Iterator[None]:
    """Run OpenRLHF's policy loss, log-probs and entropies on fastrl inside this context, process-wide.

    Args:
        prove: whether to compare the first use of each setting with OpenRLHF's own code: log-probs and entropies on 32
            rows of the logits, the loss and its gradient on 4 sequences.

    Raises:
        ImportError: OpenRLHF cannot be imported.
        RuntimeError: this OpenRLHF's signatures are not the expected ones.
        AdapterMismatchError in a call: OpenRLHF's own numbers differ.
    """
    with _proofs.asked(prove), _switch.patched():
        yield


def enable(*, prove: bool = True) -> None:
    """Run OpenRLHF's policy loss, log-probs and entropies on fastrl from here on, as inside `patched()`."""
    _switch.enable()
    _proofs.wanted = prove


def disable() -> None:
    """Undo `enable()` and restore OpenRLHF's own functions."""
    _switch.disable()


def enabled() -> bool:
    """Return whether OpenRLHF runs on fastrl now."""
    return _switch.on
