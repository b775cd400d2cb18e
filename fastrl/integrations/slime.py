"""fastrl inside slime: policy losses for its hook of custom losses, and its log-probs on one tensor-parallel rank.

    --loss-type custom_loss --custom-loss-function-path fastrl.integrations.slime.policy_loss

`policy_loss` is slime's own loss: ppo, gspo or cispo, by `args.advantage_estimator`. `custom_loss(loss)` makes a hook
of any `PolicyLoss`.

slime passes a closure, `sum_of_sample_mean`, which reduces per-token values to a weighted sum with one weight per
sample. The gradient of this closure gives the weights. The adapter multiplies the advantages by them. Every surrogate
is linear in the advantages, so the sum of the loss over tokens is slime's mean.

Legend: S samples of the micro-batch, N tokens of their responses one after the other, T rows of logits, V vocabulary.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.common.host import Host, Switch
from fastrl.integrations.common.proof import FirstUse, prove, prove_loss, sampled_tokens, uncompiled
from fastrl.losses.kl import kl_estimate
from fastrl.losses.policy.loss import PolicyLoss, loss_value
from fastrl.ops.token_logprobs import token_logprobs

HOST = Host("slime", "slime", "624b824a8", "fastrl.integrations.slime")

_proofs = FirstUse()
_loss_proofs = FirstUse()
_originals: list[Callable[..., Any]] = []  # slime's own log-prob function, while the switch is on

Reduction = Callable[[Tensor], Tensor]
Hook = Callable[[Any, Any, Tensor, Reduction], tuple[Tensor, dict[str, Tensor]]]

_UNDO = "undo with fastrl.integrations.slime.disable(), or switch the proof off with enable(prove=False)"
_UNDO_LOSS = "use --loss-type policy_loss, or set fastrl_prove: false in the file of --custom-config-path"
_LOSS_ARGUMENTS = ("args", "batch", "logits", "sum_of_sample_mean")
_SETTINGS = (
    "advantage_estimator", "eps_clip", "eps_clip_high", "eps_clip_c", "use_kl_loss", "kl_loss_coef", "kl_loss_type",
    "use_unbiased_kl", "entropy_coef", "use_rollout_logprobs", "calculate_per_token_loss",
)  # fmt: skip
_REFUSED = ("use_tis", "get_mismatch_metrics", "use_opsm", "custom_pg_loss_reducer_function_path")
_ROWS_ARGUMENTS = (
    "logits", "tokens", "tp_group", "with_entropy", "chunk_size", "log_prob_keep_mask", "with_entropy_grad",
)  # fmt: skip


def policy_loss(
    args: Any,
    batch: Any,
    logits: Tensor,  # (1, T, V / tensor-parallel ranks)
    sum_of_sample_mean: Reduction,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return slime's policy loss and its metrics, from slime's arguments (eps_clip, eps_clip_high, eps_clip_c, ...).

    The first call with a setting computes slime's own loss of the same log-probs too. To switch that off, put
    `fastrl_prove: false` into the file of --custom-config-path.

    Raises:
        AdapterMismatchError: in the first call, if slime's own loss or its gradient differs.
        ValueError: options that are not supported: use_tis, get_mismatch_metrics, use_opsm,
            custom_pg_loss_reducer_function_path, context parallelism.
    """
    return _computed(_loss_of(args), args, batch, logits, sum_of_sample_mean, getattr(args, "fastrl_prove", True))


def custom_loss(loss: PolicyLoss) -> Hook:
    """Return a hook for `--custom-loss-function-path` that computes `loss` under slime's reduction, KL and entropy.

    Raises:
        ValueError: the loss has a KL or an entropy bonus, which slime adds by use_kl_loss and entropy_coef, or a
            correction, or the ratio anchor "rollout". Or its aggregate is not "token_sum", although slime reduces.
    """
    if not isinstance(loss, PolicyLoss):
        raise TypeError(f"loss must be a PolicyLoss, got {type(loss).__name__}")
    if loss.aggregate != "token_sum":
        raise ValueError(f"loss.aggregate must be 'token_sum', slime's reduction being applied, got {loss.aggregate!r}")
    own = [
        name
        for name, there in (
            ("kl (slime: use_kl_loss)", loss.kl is not None),
            ("entropy_coef (slime: entropy_coef)", loss.uses_entropy),
            ("correction", loss.correction is not None),
            ("ratio_anchor='rollout' (slime: use_rollout_logprobs)", loss.ratio_anchor == "rollout"),
        )
        if there
    ]
    if own:
        raise ValueError(f"slime's hook for losses does not take {', '.join(own)}")

    def hook(args: Any, batch: Any, logits: Tensor, sum_of_sample_mean: Reduction) -> tuple[Tensor, dict[str, Tensor]]:
        return _computed(loss, args, batch, logits, sum_of_sample_mean, False)

    return hook


def _loss_of(args: Any) -> PolicyLoss:
    """Return the `PolicyLoss` that slime's arguments describe."""
    low, high = float(args.eps_clip), float(args.eps_clip_high)
    cap = getattr(args, "eps_clip_c", None)
    if args.advantage_estimator == "cispo":
        return PolicyLoss.preset(
            "cispo", style="slime", weight_low=max(1.0 - low, 0.0), weight_high=1.0 + high, aggregate="token_sum"
        )
    name = "gspo" if args.advantage_estimator == "gspo" else "ppo"
    dual = None if cap is None else float(cap)
    return PolicyLoss.preset(name, style="slime", clip_low=low, clip_high=high, dual_clip=dual, aggregate="token_sum")


def _computed(
    loss: PolicyLoss, args: Any, batch: Any, logits: Tensor, reduction: Reduction, prove: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    module = _checked_host(args)
    _, rows = module.get_log_probs_and_entropy(
        logits,
        args=args,
        unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"],
        with_entropy=True,
        **module.get_rollout_top_p_logprob_kwargs(args, batch),
    )
    logprobs, entropy = torch.cat(rows["log_probs"]), torch.cat(rows["entropy"])
    if logprobs.numel() == 0:
        # The micro-batch has no response token. A zero with a graph lets the backward reach every parameter.
        zero = 0.0 * logits.sum()
        names = ("loss", "pg_loss", "entropy_loss", "pg_clipfrac", "ppo_kl")
        return zero, {name: zero.detach() for name in names}
    if prove:
        key = (*(getattr(args, name, None) for name in _SETTINGS), bool(batch.get("log_probs")))
        _loss_proofs.once(key, lambda: _loss_proved(loss, module, args, batch, logprobs, entropy, reduction))
    return _terms(loss, args, batch, logprobs, entropy, reduction)


def _terms(
    loss: PolicyLoss, args: Any, batch: Any, logprobs: Tensor, entropy: Tensor, reduction: Reduction
) -> tuple[Tensor, dict[str, Tensor]]:
    old = _old_logprobs(args, batch, logprobs)
    total, metrics = _policy_term(loss, batch, logprobs, old, reduction)
    entropy_loss = reduction(entropy)
    metrics["entropy_loss"] = entropy_loss.detach()
    if args.entropy_coef != 0.0:
        total = total - args.entropy_coef * entropy_loss
    if args.use_kl_loss:
        kl = reduction(_kl(args, batch, logprobs, old))
        total = total + args.kl_loss_coef * kl
        metrics["kl_loss"] = kl.detach()
    if batch.get("rollout_log_probs"):
        compared = logprobs.detach() if args.use_rollout_logprobs else old
        gap = (compared - torch.cat(batch["rollout_log_probs"])).abs()
        metrics["train_rollout_logprob_abs_diff"] = reduction(gap)
    return total, {"loss": total.detach(), **metrics}


def _loss_proved(
    loss: PolicyLoss, module: Any, args: Any, batch: Any, logprobs: Tensor, entropy: Tensor, reduction: Reduction
) -> bool:
    """Compare the loss of the micro-batch's log-probs with slime's own."""
    original = HOST.function(module, "policy_loss_function", _LOSS_ARGUMENTS)
    mask = torch.cat(list(batch["loss_masks"])) != 0
    point = torch.where(mask, logprobs.detach(), 0.0)
    fixed = entropy.detach().double()

    def host(leaf: Tensor) -> Tensor:
        rows = {
            "log_probs": list(leaf.split(batch["response_lengths"])),
            "entropy": list(fixed.split(batch["response_lengths"])),
        }
        # A copy of slime's function that takes the log-probs as given: in its globals we replace the functions that
        # compute or record them.
        names = {name: uncompiled(value) for name, value in original.__globals__.items()}
        names["get_log_probs_and_entropy"] = lambda *args, **kwargs: (None, rows)
        names["_maybe_capture_log_probs"] = lambda *args, **kwargs: None
        given = types.FunctionType(
            original.__code__, names, original.__name__, original.__defaults__, original.__closure__
        )
        return given(args, batch, leaf.view(1, -1, 1), reduction)[0]

    return prove_loss(
        f"{HOST.adapter} (policy_loss)",
        lambda leaf: _terms(loss, args, batch, leaf, fixed, reduction)[0],
        host,
        point,
        undo=_UNDO_LOSS,
    )


def _checked_host(args: Any) -> Any:
    asked = [name for name in _REFUSED if getattr(args, name, None)]
    if int(getattr(args, "context_parallel_size", 1) or 1) > 1:
        asked.append("context_parallel_size > 1")
    if asked:
        raise ValueError(f"fastrl.integrations.slime does not support {', '.join(asked)}; use --loss-type policy_loss")
    module = HOST.module("slime.backends.megatron_utils.loss")
    HOST.attribute(module, "get_log_probs_and_entropy")
    HOST.attribute(module, "get_rollout_top_p_logprob_kwargs")
    return module


def _old_logprobs(args: Any, batch: Any, logprobs: Tensor) -> Tensor:
    old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
    return torch.cat(old) if old else logprobs.detach()


def _policy_term(
    loss: PolicyLoss, batch: Any, logprobs: Tensor, old: Tensor, reduction: Reduction
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return slime's reduction of the per-token loss, and pg_loss, pg_clipfrac, ppo_kl."""
    weights = _weights(logprobs, reduction)
    mask = torch.cat(list(batch["loss_masks"])) != 0
    lengths = torch.tensor([m.numel() for m in batch["loss_masks"]], device=logprobs.device)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    advantages = torch.cat(list(batch["advantages"])) * weights
    value = loss_value(loss, logprobs, advantages=advantages, mask=mask, old_logprobs=old, cu_seqlens=offsets)
    log_ratio = torch.where(mask, logprobs.detach() - old, 0.0)
    if loss.ratio_level.startswith("sequence"):
        sums = torch.segment_reduce(log_ratio, "sum", lengths=lengths, unsafe=True)
        counts = torch.segment_reduce(mask.to(log_ratio.dtype), "sum", lengths=lengths, unsafe=True)
        log_ratio = (sums / counts.clamp(min=1.0)).repeat_interleave(lengths, output_size=mask.numel())
    metrics = {
        "pg_loss": value.detach(),
        "pg_clipfrac": reduction(_clipped(loss, log_ratio.exp(), advantages).to(log_ratio.dtype)),
        "ppo_kl": -reduction(log_ratio),
    }
    return value, metrics


def _clipped(loss: PolicyLoss, ratio: Tensor, advantages: Tensor) -> Tensor:
    infinity = float("inf")
    if loss.surrogate == "clipped_weight":
        high = infinity if loss.weight_high is None else loss.weight_high
        return (ratio < (loss.weight_low or 0.0)) | (ratio > high)
    low = -infinity if loss.clip_low is None else 1.0 - loss.clip_low
    high = infinity if loss.clip_high is None else 1.0 + loss.clip_high
    return ((advantages < 0) & (ratio < low)) | ((advantages > 0) & (ratio > high))


def _weights(logprobs: Tensor, reduction: Reduction) -> Tensor:
    """Return the weights w (N,) with reduction(x) = sum w x."""
    # The reduction is linear, so its gradient is w.
    with torch.enable_grad():
        probe = torch.zeros_like(logprobs, requires_grad=True)
        (weights,) = torch.autograd.grad(reduction(probe), probe)
    return weights


def _kl(args: Any, batch: Any, logprobs: Tensor, old: Tensor) -> Tensor:
    """Return slime's KL estimate of each token (N,)."""
    clamped = args.kl_loss_type == "low_var_kl"
    weighted = bool(getattr(args, "use_unbiased_kl", False))
    return kl_estimate(
        logprobs,
        torch.cat(batch["ref_log_probs"]),
        "k3" if clamped else args.kl_loss_type,
        gradient="ratio_weighted" if weighted else "plain",
        old_logprobs=old if weighted else None,
        value_clamp=10.0 if clamped else None,
    )


def calculate_log_probs_and_entropy(
    logits: Tensor,  # (T, V)
    tokens: Tensor,  # (T,)
    tp_group: Any,
    with_entropy: bool = False,
    chunk_size: int = -1,
    log_prob_keep_mask: Tensor | None = None,  # (T, V)
    with_entropy_grad: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Replace slime's function of this name: return log-probs (T, 1) and entropy (T,), in one pass without copies.

    `chunk_size` has no effect: the gradient of the logits is the only tensor of their size. With `log_prob_keep_mask`
    the log-probs are over the kept tokens and the entropy over all, as in slime.

    Raises:
        ValueError: the logits are split over tensor-parallel ranks.
    """
    del chunk_size
    ranks = tp_group.size() if tp_group is not None and hasattr(tp_group, "size") else 1
    if ranks > 1:
        raise ValueError(
            f"fastrl's log-probs take whole rows of logits, got a tensor-parallel group of {ranks} ranks; "
            "undo with fastrl.integrations.slime.disable()"
        )
    if logits.shape[0] == 0:
        empty = logits.new_zeros((0,))
        return empty, empty if with_entropy else None
    setting = (with_entropy, log_prob_keep_mask is None, with_entropy_grad)
    key = (logits.dtype, logits.shape[-1], logits.device.type, *setting)
    _proofs.once(key, lambda: _rows_proved(logits, tokens, tp_group, log_prob_keep_mask, with_entropy))
    logprobs, entropy = _rows(logits, tokens, log_prob_keep_mask, with_entropy, with_entropy_grad)
    return logprobs.unsqueeze(-1), entropy


def _rows(
    logits: Tensor, tokens: Tensor, keep: Tensor | None, with_entropy: bool, with_entropy_grad: bool
) -> tuple[Tensor, Tensor | None]:
    result = token_logprobs(logits, tokens, allowed=keep)
    if not with_entropy:
        return result.logprobs, None
    entropy = result.entropy
    if keep is not None:
        with torch.set_grad_enabled(with_entropy_grad and torch.is_grad_enabled()):
            entropy = token_logprobs(logits, tokens).entropy
    return result.logprobs, entropy if with_entropy_grad else entropy.detach()


def _rows_proved(logits: Tensor, tokens: Tensor, tp_group: Any, keep: Tensor | None, with_entropy: bool) -> bool:
    """Compare a few rows with slime's own function."""
    if not _originals:
        return False
    chosen = sampled_tokens(logits.shape[0], logits.device)
    rows, picked = logits.detach()[chosen], tokens[chosen]
    kept = None if keep is None else keep[chosen]
    with torch.no_grad():
        logprobs, entropy = _rows(rows, picked, kept, with_entropy, False)
        # A clone, because slime's function may overwrite its logits.
        theirs, their_entropy = _originals[-1](
            rows.clone(), picked, tp_group, with_entropy=with_entropy, log_prob_keep_mask=kept
        )
    return prove(
        f"{HOST.adapter} (calculate_log_probs_and_entropy)",
        {"logprobs": logprobs, "entropy": entropy},
        {"logprobs": theirs, "entropy": their_entropy},
        largest_logit=rows.float().abs().amax(-1),
        dtype=logits.dtype,
        terms=1,
        vocabulary=rows.shape[-1],
        undo=_UNDO,
    )


def _find() -> list[tuple[Any, str, Any]]:
    found = []
    for path in ("slime.utils.ppo_utils", "slime.backends.megatron_utils.loss"):
        module = HOST.module(path)
        original = HOST.function(module, "calculate_log_probs_and_entropy", _ROWS_ARGUMENTS)
        found.append((module, "calculate_log_probs_and_entropy", calculate_log_probs_and_entropy))
    _originals[:] = [original]
    _proofs.forget()  # they compared with other originals
    return found


_switch = Switch(HOST, _find)


@contextmanager
def patched(*, prove: bool = True) -> Iterator[None]:
    """Run slime's log-probs and entropies on fastrl inside this context, process-wide. For one tensor-parallel rank.

    Args:
        prove: whether to compare the first use of each setting with slime's own code, on 32 rows of the logits.

    Raises:
        ImportError: slime, or Megatron under it, cannot be imported.
        RuntimeError: this slime's function takes other arguments.
        AdapterMismatchError in a call: slime's own numbers differ.
    """
    with _proofs.asked(prove), _switch.patched():
        yield


def enable(*, prove: bool = True) -> None:
    """Run slime's log-probs and entropies on fastrl from here on, as inside `patched()`."""
    _switch.enable()
    _proofs.wanted = prove


def disable() -> None:
    """Undo `enable()` and restore slime's own function."""
    _switch.disable()


def enabled() -> bool:
    """Return whether slime's log-probs come from fastrl now."""
    return _switch.on
