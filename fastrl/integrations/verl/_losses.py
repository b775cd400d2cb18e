"""verl's policy losses as values of `PolicyLoss`, with verl's signature.

In verl the loss itself contains the denominator and undoes the averaging of gradients over ranks. With the global
counts of `config.global_batch_info`:

    loss = sum over local tokens / global count * dp_size

Legend: B sequences of the micro-batch, T padded response length.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.common.proof import FirstUse, on_cpu, prove_loss, sampled_sequences
from fastrl.losses.masks import covariance_keep_mask
from fastrl.losses.output import LossOutput
from fastrl.losses.policy.loss import PolicyLoss

AGGREGATES: Mapping[str, str] = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "sequence_mean",
}
"""verl's loss_agg_mode -> `PolicyLoss.aggregate`."""

LossFunction = Callable[..., tuple[Tensor, dict[str, Tensor]]]

proofs = FirstUse()
"""The settings that have been compared with verl's own losses in this process."""


@dataclass(frozen=True)
class Form:
    """The rule that makes a `PolicyLoss` of verl's configuration."""

    preset: str
    style: str | None = "verl"
    bounds: str | None = None
    """The use of clip_ratio_low and clip_ratio_high: "clip" (widths of the clip), "weight" (widths around 1 of the
    bounded weight) or None (not read)."""
    cap: str | None = None
    """The field of `PolicyLoss` that clip_ratio_c sets."""
    mode: str | None = None
    """The only loss_agg_mode of this loss; None: any."""
    other_modes: str = "replaced"
    """The treatment of another loss_agg_mode than `mode`: "replaced", as verl does, or "refused"."""
    options: tuple[tuple[str, str, float | None], ...] = ()
    """(field, path in the configuration, default). An option with the default None is required."""
    metrics: tuple[str, ...] = ("pg_clipfrac", "ppo_kl", "pg_clipfrac_lower")


_MEAN = "seq-mean-token-mean"
FORMS: Mapping[str, Form] = {
    "vanilla": Form("ppo", bounds="clip", cap="dual_clip"),
    "dppo_tv": Form("dppo_tv", bounds="clip", cap="weight_high"),
    "dppo_kl": Form("dppo_kl", bounds="clip", cap="weight_high"),
    "gspo": Form("gspo", bounds="clip"),
    "sapo": Form("sapo", mode=_MEAN, options=(("tau_pos", "tau_pos", None), ("tau_neg", "tau_neg", None))),
    "gpg": Form("gpg", metrics=()),
    "clip_cov": Form("clip_cov", bounds="clip", metrics=("pg_clipfrac", "ppo_kl")),
    "kl_cov": Form(
        "kl_cov",
        options=(
            ("kl_fraction", "policy_loss.kl_cov_ratio", 2e-4),
            ("kl_coef", "policy_loss.ppo_kl_coef", 1.0),
        ),
        metrics=("ppo_kl",),
    ),
    "geo_mean": Form("gmpo", bounds="clip", mode=_MEAN),
    "dro": Form("opmd", options=(("kl_coef", "policy_loss.dro_beta", None),), metrics=("ppo_kl",)),
    "cispo": Form("cispo", bounds="weight"),
    "dapo": Form("dapo", None, bounds="clip", mode="token-mean", other_modes="refused"),
    "luspo": Form("luspo", None, bounds="clip", mode="seq-mean-token-sum", other_modes="refused"),
    "vespo": Form("vespo", None, mode="token-mean", other_modes="refused"),
    "topr": Form("topr", None, mode="token-mean", other_modes="refused"),
}
"""verl's own eleven losses, then dapo (PPO's clip without the dual clip), luspo, vespo and topr."""


def policy_loss(loss: PolicyLoss) -> LossFunction:
    """Return a function with verl's signature that computes `loss`.

    Of verl's configuration it reads the counts and dp_size only.

    Raises:
        ValueError: the loss needs reference or rollout log-probs, the entropy or groups, which verl does not pass to
            policy losses. For the first three verl has its own terms: use_kl_loss, rollout_correction, entropy_coeff.
            In a call: `loss_agg_mode` differs from the loss's own `aggregate`.
    """
    if not isinstance(loss, PolicyLoss):
        raise TypeError(f"loss must be a PolicyLoss, got {type(loss).__name__}")
    needs = {
        "kl_to='ref'": loss.kl is not None and loss.kl_to == "ref",
        "rollout log-probs": "rollout" in (loss.ratio_anchor, loss.kl_ratio_anchor)
        or (loss.kl is not None and loss.kl_to == "rollout")
        or loss.correction is not None,
        "entropy_coef": loss.uses_entropy,
        "aggregate='prompt_mean'": loss.aggregate == "prompt_mean",
    }
    unmet = [name for name, needed in needs.items() if needed]
    if unmet:
        raise ValueError(
            f"verl hands its policy losses log_prob, old_log_prob, advantages, response_mask and rollout_is_weights; "
            f"this loss needs more: {', '.join(unmet)} (verl's own: use_kl_loss, rollout_correction, entropy_coeff)"
        )
    mode = {aggregate: mode for mode, aggregate in AGGREGATES.items()}[loss.aggregate]

    def build(asked: str, config: Any) -> PolicyLoss:
        del config
        if asked != mode:
            raise ValueError(f"loss_agg_mode must be {mode!r}, the aggregate of this loss, got {asked!r}")
        return loss

    return _function("policy_loss", build, Form("ppo"))


def _function(name: str, build: Callable[[str, Any], PolicyLoss], form: Form) -> LossFunction:
    """Return a function with verl's signature that computes the loss which `build` makes of the configuration."""

    def compute(
        old_log_prob: Tensor,  # (B, T)
        log_prob: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        response_mask: Tensor,  # (B, T)
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # (B, T) or (B, 1)
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if config is None:
            raise ValueError(f"fastrl_{name} needs verl's actor config, got config=None")
        loss = build(loss_agg_mode, config)
        columns = (old_log_prob, log_prob, advantages, response_mask)
        original = _original(name)
        if original is not None:
            attempt = functools.partial(
                _proved, name, form, loss, original, loss_agg_mode, config, columns, rollout_is_weights
            )
            proofs.once((name, repr(loss), loss_agg_mode, rollout_is_weights is None), attempt)
        return _computed(name, form, loss, config, *columns, rollout_is_weights)

    compute.__name__ = compute.__qualname__ = f"fastrl_{name}"
    compute.__doc__ = f"Compute verl's {name!r} with fastrl; (loss, metrics) as verl's policy losses return them."
    return compute


def _computed(
    name: str,
    form: Form,
    loss: PolicyLoss,
    config: Any,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    weights: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    inputs: dict[str, Any]
    inputs, dp_size = _counts(loss, config, log_prob)
    selection = None
    if form.preset == "clip_cov":
        selection = _covariance(config, log_prob, old_log_prob, advantages, response_mask)
    if loss.surrogate == "geometric":
        # verl takes the geometric mean of the weights, and then the mean over all sequences of the micro-batch.
        if weights is not None:
            advantages = advantages * _sequence_weights(response_mask, weights)
        inputs, dp_size = {"n_sequences": float(log_prob.shape[0])}, 1
    elif weights is not None:
        advantages = _weighted(name, loss, advantages, weights)
    output = loss(
        log_prob,
        advantages=advantages,
        mask=response_mask,
        old_logprobs=old_log_prob,
        selection=selection,
        **inputs,
    )
    metrics = _metrics(form, loss, output, log_prob, old_log_prob, advantages, response_mask, selection)
    return output.loss * dp_size, metrics  # the trainer averages gradients over the ranks


def _original(name: str) -> LossFunction | None:
    """Return verl's own loss of this name, or None if verl has none or is not loaded (as in our tests)."""
    core = sys.modules.get("verl.trainer.ppo.core_algos")
    return None if core is None else getattr(core, "POLICY_LOSS_REGISTRY", {}).get(name)


def _proved(
    name: str,
    form: Form,
    loss: PolicyLoss,
    original: LossFunction,
    mode: str,
    config: Any,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    weights: Tensor | None,
) -> bool:
    """Compare the loss of a few sequences with verl's own."""
    old, log_prob, advantages, mask = columns
    rows = sampled_sequences(mask, advantages)
    if rows.numel() == 0:
        return False
    keep = on_cpu(mask, rows)
    few_old, point, few_advantages = (torch.where(keep != 0, on_cpu(x, rows), 0.0) for x in (old, log_prob, advantages))
    few_weights = None if weights is None else torch.where(keep != 0, on_cpu(weights, rows), 1.0)
    return prove_loss(
        f"fastrl.integrations.verl (fastrl_{name})",
        lambda leaf: _computed(name, form, loss, config, few_old, leaf, few_advantages, keep, few_weights)[0],
        lambda leaf: original(few_old, leaf, few_advantages, keep, mode, config, few_weights)[0],
        point,
        undo=f"use loss_mode={name!r}, or register(prove=False)",
    )


def _built(name: str, form: Form) -> Callable[[str, Any], PolicyLoss]:
    def build(mode: str, config: Any) -> PolicyLoss:
        if form.mode is not None and mode != form.mode:
            if form.other_modes == "refused":
                raise ValueError(f"loss_mode 'fastrl_{name}' needs loss_agg_mode {form.mode!r}, got {mode!r}")
            mode = form.mode
        if mode not in AGGREGATES:
            raise ValueError(f"loss_agg_mode must be one of {', '.join(AGGREGATES)}, got {mode!r}")
        fields: dict[str, Any] = {"aggregate": AGGREGATES[mode]}
        if mode == "seq-mean-token-sum-norm":
            fields["constant"] = _info(config).get("loss_scale_factor")
        if form.bounds is not None:
            low, high = (_clip_ratio(config, side) for side in ("low", "high"))
            if form.bounds == "clip":
                fields |= {"clip_low": low, "clip_high": high}
            else:
                fields |= {"weight_low": max(1.0 - low, 0.0), "weight_high": 1.0 + high}
        if form.cap is not None:
            fields[form.cap] = _option(config, "clip_ratio_c", 3.0 if form.cap == "dual_clip" else 20.0)
        for field, path, default in form.options:
            value = _option(config, path, default)
            if value is None:
                raise ValueError(f"loss_mode 'fastrl_{name}' needs {path} in verl's actor config, got None")
            fields[field] = value
        return _preset(form.preset, form.style, tuple(fields.items()))

    return build


# Cached, because verl calls the loss for every micro-batch and a new `PolicyLoss` checks all of its fields.
@functools.lru_cache(maxsize=64)
def _preset(preset: str, style: str | None, fields: tuple[tuple[str, Any], ...]) -> PolicyLoss:
    return PolicyLoss.preset(preset, style=style, **{name: _plain(value) for name, value in fields})


def _plain(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _option(config: Any, path: str, default: Any = None) -> Any:
    """Return an option of verl's config (an object or a mapping) by its path, or the default if it is None."""
    for name in path.split("."):
        if config is None:
            break
        config = config.get(name, None) if isinstance(config, Mapping) else getattr(config, name, None)
    return default if config is None else config


def _clip_ratio(config: Any, side: str) -> float:
    value = _option(config, f"clip_ratio_{side}", _option(config, "clip_ratio"))
    if value is None:
        raise ValueError(f"verl's actor config has neither clip_ratio_{side} nor clip_ratio")
    return float(value)


def _info(config: Any) -> Mapping[str, Any]:
    return _option(config, "global_batch_info", {})


def _counts(loss: PolicyLoss, config: Any, log_prob: Tensor) -> tuple[dict[str, Any], int]:
    """Return the global counts that the loss divides by, and dp_size. Raise ValueError for ranks without a count."""
    info = _info(config)
    dp_size = info.get("dp_size") or 1
    if loss.aggregate == "token_sum":
        return {}, dp_size
    ours, theirs = ("n_tokens", "batch_num_tokens")
    if loss.aggregate != "token_mean":
        ours, theirs = ("n_sequences", "global_batch_size")
    count = info.get(theirs)
    if count is None and dp_size > 1:
        raise ValueError(f"global_batch_info needs {theirs} when dp_size > 1, got None with dp_size={dp_size}")
    return ({} if count is None else {ours: count}), dp_size


def _weighted(name: str, loss: PolicyLoss, advantages: Tensor, weights: Tensor) -> Tensor:
    """Return the advantages times weights >= 0."""
    # This weighs the loss: with a fixed sign of the advantage every surrogate is linear in it.
    if loss.kl is not None and loss.kl_coef != 0.0:
        raise ValueError(
            f"rollout_is_weights with fastrl_{name}: verl weighs this loss's own penalty too, which is not supported; "
            "leave rollout_is out of algorithm.rollout_correction or use verl's own loss_mode"
        )
    return advantages * weights


def _sequence_weights(
    mask: Tensor,  # (B, T)
    weights: Tensor,  # (B, T)
) -> Tensor:
    """Return (B, 1): the geometric mean of the weights of each sequence, with verl's epsilons."""
    keep = mask != 0
    logs = torch.where(keep, (weights + 1e-10).log(), 0.0)
    return (logs.sum(-1, keepdim=True) / (keep.sum(-1, keepdim=True) + 1e-8)).exp()


def _covariance(config: Any, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return covariance_keep_mask(
        log_prob.detach(),
        old_log_prob,
        advantages,
        mask,
        fraction=float(_option(config, "policy_loss.clip_cov_ratio", 2e-4)),
        low=float(_option(config, "policy_loss.clip_cov_lb", 1.0)),
        high=float(_option(config, "policy_loss.clip_cov_ub", 5.0)),
        clip_low=_clip_ratio(config, "low"),
        clip_high=_clip_ratio(config, "high"),
    )


def _metrics(
    form: Form,
    loss: PolicyLoss,
    output: LossOutput,
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    selection: Tensor | None,
) -> dict[str, Tensor]:
    """Return verl's metrics by verl's definitions, as detached scalars, without a wait for the device."""
    keep = mask != 0
    count = keep.sum() + 1e-8
    log_ratio = torch.where(keep, log_prob.detach() - old_log_prob, 0.0)
    if loss.log_ratio_clamp is not None:
        log_ratio = log_ratio.clamp(-loss.log_ratio_clamp, loss.log_ratio_clamp)

    def share(tokens: Tensor) -> Tensor:
        return (tokens & keep).sum() / count

    def ours(name: str) -> Tensor:
        total, n = output.metrics.get(name, (log_ratio.new_zeros(()), count))
        return (total / (n + 1e-8)).to(log_ratio.dtype)

    values = {"ppo_kl": -log_ratio.sum() / count}
    if form.preset == "kl_cov":
        values["ppo_kl"] = log_ratio.abs().sum() / count
    values |= {"pg_clipfrac": ours("clip_fraction"), "pg_clipfrac_lower": ours("dual_clip_fraction")}
    if selection is not None:
        values["pg_clipfrac"] = share(selection == 0)
    elif loss.surrogate == "geometric":
        outside = (log_ratio < -_bound(loss.clip_low)) | (log_ratio > _bound(loss.clip_high))
        values |= {
            "pg_clipfrac": share(outside & (advantages > 0)),
            "pg_clipfrac_lower": share(outside & (advantages < 0)),
        }
    elif loss.surrogate == "clipped_weight":
        ratio = log_ratio.exp()
        values["pg_clipfrac"] = share((ratio < (loss.weight_low or 0.0)) | (ratio > _bound(loss.weight_high)))
    return {f"actor/{name}": values[name] for name in form.metrics}


def _bound(value: float | None) -> float:
    return float("inf") if value is None else value


LOSSES: Mapping[str, LossFunction] = {
    f"fastrl_{name}": _function(name, _built(name, form), form) for name, form in FORMS.items()
}
"""Name for verl's `policy_loss.loss_mode` -> loss."""
