"""fastrl inside SkyRL: its policy losses by name, through its registry.

    from fastrl.integrations import skyrl

    skyrl.register()                                  # in the driver, before training
    trainer.algorithm.policy_loss_type=fastrl_gspo

`fastrl_NAME` is SkyRL's loss NAME: the same options of SkyRL's algorithm config, the same value, gradient and metrics.
`register_loss(name, loss)` adds any `PolicyLoss`. SkyRL's losses are sums over tokens: SkyRL puts its reduction
(`loss_reduction`) into the advantages, and adds its KL and entropy terms outside.

Legend: B sequences of the micro-batch, T padded response length.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.common.host import Host
from fastrl.integrations.common.metrics import as_floats
from fastrl.integrations.common.proof import FirstUse, on_cpu, prove_loss, sampled_sequences
from fastrl.losses.masks import covariance_keep_mask
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss, loss_value

HOST = Host("SkyRL", "skyrl", "a9564572e", "fastrl.integrations.skyrl")

CLAMP = 20.0
"""SkyRL clamps log-ratios to this bound before it takes their exponential."""

_MODULE = "skyrl.backends.skyrl_train.utils.ppo_utils"
_ARGUMENTS = ("log_probs", "old_log_probs", "advantages", "config", "loss_mask", "rollout_logprobs")
_CORRECTION_OPTIONS = (
    "tis_ratio_type", "token_tis_ratio_clip_high", "sequence_tis_ratio_clip_high", "sequence_mask_metric",
    "geo_mask_high", "geo_mask_low", "product_mask_high", "product_mask_low", "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high", "token_mask_is_threshold_low", "token_mask_is_threshold_high",
)  # fmt: skip
_WITHOUT_CORRECTION = ("clip_cov", "kl_cov", "importance_sampling")

_proofs = FirstUse()
_ours: dict[str, Any] = {}  # name -> our function in SkyRL's registry

Metrics = dict[str, Tensor]


@functools.lru_cache(maxsize=64)
def _preset(name: str, fields: tuple[tuple[str, Any], ...]) -> PolicyLoss:
    given = {key: float(value) if isinstance(value, int) else value for key, value in fields}
    return PolicyLoss.preset(name, style="skyrl", **given)


def _clip(config: Any) -> dict[str, Any]:
    # A width of 1 or more puts the lower bound at or below 0, where a ratio, being positive, never is.
    return {"clip_low": min(float(config.eps_clip_low), 1.0), "clip_high": float(config.eps_clip_high)}


def _regular(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "ppo", _clip(config)


def _dual_clip(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "ppo", {**_clip(config), "dual_clip": config.clip_ratio_c}


def _gspo(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "gspo", _clip(config)


def _sapo(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "sapo", {"tau_pos": config.sapo.tau_pos, "tau_neg": config.sapo.tau_neg}


def _cispo(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    anchor = config.cispo.cispo_anchor
    if anchor not in ("old", "rollout"):
        raise ValueError(f"cispo.cispo_anchor must be 'old' or 'rollout', got {anchor!r}")
    if anchor == "rollout":
        _needs_rollout("cispo with cispo_anchor='rollout'", rollout)
        if _option(config, "tis_ratio_type") is not None:
            raise ValueError("cispo.cispo_anchor='rollout' corrects by itself: set tis_ratio_type to None")
    low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
    return "cispo", {"ratio_anchor": anchor, "weight_low": max(1.0 - low, 0.0), "weight_high": 1.0 + high}


def _rollout_is(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    _needs_rollout("rollout_is", rollout)
    # SkyRL's interval is open. With a lower end below 0 every small ratio is inside.
    low = 1.0 - config.eps_clip_low
    return "cispo", {
        "surrogate": "masked_weight",
        "ratio_anchor": "rollout",
        "weight_low": low if low >= 0.0 else None,
        "weight_high": 1.0 + config.eps_clip_high,
    }


def _dppo(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    names = {"binary_tv": "dppo_tv", "binary_kl": "dppo_kl"}
    kind = config.dppo.dppo_type
    if kind not in names:
        raise ValueError(f"dppo.dppo_type must be 'binary_tv' or 'binary_kl', got {kind!r}")
    return names[kind], {
        "ratio_anchor": "rollout" if rollout else "old",
        "clip_low": config.dppo.delta_low,
        "clip_high": config.dppo.delta_high,
    }


def _clip_cov(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "clip_cov", _clip(config)


def _kl_cov(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "kl_cov", {"kl_fraction": config.kl_cov.kl_cov_frac, "kl_coef": config.kl_cov.ppo_kl_coef}


def _importance_sampling(config: Any, rollout: bool) -> tuple[str, dict[str, Any]]:
    return "ppo", {"surrogate": "importance", "log_ratio_clamp": None, "clip_low": None, "clip_high": None}


def _needs_rollout(name: str, there: bool) -> None:
    if not there:
        raise ValueError(f"fastrl_{name} needs rollout_logprobs, got None: set the generator to return log-probs")


FORMS: Mapping[str, Callable[[Any, bool], tuple[str, dict[str, Any]]]] = {
    "regular": _regular,
    "dual_clip": _dual_clip,
    "gspo": _gspo,
    "sapo": _sapo,
    "cispo": _cispo,
    "rollout_is": _rollout_is,
    "dppo": _dppo,
    "clip_cov": _clip_cov,
    "kl_cov": _kl_cov,
    "importance_sampling": _importance_sampling,
}
"""SkyRL's name of a loss -> function of (config, whether there are rollout log-probs) that returns (preset, fields)."""


@dataclass(frozen=True)
class PolicyLossFunction:
    """A policy loss with SkyRL's signature.

    The first call with a setting computes the loss of up to 4 sequences with SkyRL's own function too. It raises if the
    loss or its gradient differs.
    """

    # A class of this module and not a closure, so that Ray ships its objects by name.

    name: str
    """SkyRL's name of the loss, or the name under which a `PolicyLoss` was registered."""
    loss: PolicyLoss | None = None
    """The registered loss; None for one of SkyRL's own."""
    prove: bool = True
    """Whether to compare the first call with SkyRL's own loss of that name."""

    def __call__(
        self,
        log_probs: Tensor,  # (B, T)
        old_log_probs: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        config: Any,
        loss_mask: Tensor | None = None,  # (B, T)
        rollout_logprobs: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, dict[str, float]]:
        """Return (sum of the loss over tokens, metrics), as SkyRL's policy losses do.

        Raises:
            ValueError: options of `config` that are not supported, with their names, or missing rollout log-probs.
            AdapterMismatchError: in the first call, if SkyRL's own loss or its gradient differs.
        """
        mask = torch.ones_like(log_probs) if loss_mask is None else loss_mask
        loss = self._built(config, rollout_logprobs is not None)
        if self.prove and self.loss is None:
            key = (self.name, repr(loss), repr(_correction_options(config)), rollout_logprobs is not None)
            call = (log_probs, old_log_probs, advantages, mask, rollout_logprobs)
            _proofs.once(key, lambda: self._proved(config, *call))
        value, metrics = self._computed(loss, log_probs, old_log_probs, advantages, config, mask, rollout_logprobs)
        return value, as_floats(metrics)

    def _built(self, config: Any, rollout: bool) -> PolicyLoss:
        if self.loss is not None:
            return self.loss
        if self.name in _WITHOUT_CORRECTION and _corrects(config):
            raise ValueError(
                f"off_policy_correction has no effect in SkyRL's {self.name!r}: leave tis_ratio_type, "
                "sequence_mask_metric and the thresholds at None"
            )
        preset, fields = FORMS[self.name](config, rollout)
        return _preset(preset, tuple(fields.items()))

    def _computed(
        self,
        loss: PolicyLoss,
        logprobs: Tensor,
        old: Tensor,
        advantages: Tensor,
        config: Any,
        mask: Tensor,
        rollout: Tensor | None,
    ) -> tuple[Tensor, Metrics]:
        live = mask != 0
        metrics = {}
        selection, weighted = None, advantages
        if rollout is not None and self.loss is None and _corrects(config):
            keep, weights, metrics = _corrected(config, old, rollout, live)
            selection = keep
            weighted = advantages if weights is None else advantages * weights
        if self.name == "clip_cov" and self.loss is None:
            selection = covariance_keep_mask(
                logprobs.detach(), old, advantages, mask, fraction=config.clip_cov.clip_ratio,
                low=config.clip_cov.clip_cov_lb, high=config.clip_cov.clip_cov_ub, **_clip(config),
            )  # fmt: skip
        columns: dict[str, Any] = {
            "advantages": weighted, "mask": mask, "old_logprobs": old, "rollout_logprobs": rollout,
            "selection": selection,
        }  # fmt: skip
        if self.loss is not None:
            output = loss(logprobs, **columns)
            clipped, count = output.metrics["clip_fraction"]
            return output.loss, {"clip_ratio": clipped / count}
        with torch.no_grad():
            own = _metrics(self.name, loss, logprobs.detach(), old, advantages, live, rollout, selection)
        return loss_value(loss, logprobs, **columns), {**own, **metrics}

    def _proved(
        self, config: Any, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, rollout: Tensor | None
    ) -> bool:
        rows = sampled_sequences(mask, advantages)
        if rows.numel() == 0:
            return False
        live = on_cpu(mask, rows) != 0
        point, few_old, few_advantages, few_rollout = (
            None if x is None else torch.where(live, on_cpu(x, rows), 0.0) for x in (logprobs, old, advantages, rollout)
        )
        assert point is not None
        assert few_old is not None
        assert few_advantages is not None
        # The configuration has our name of the loss. SkyRL's function gets its own.
        known = copy.copy(config)
        known.policy_loss_type = self.name
        original = _registry().get(self.name)
        loss, few_mask = self._built(config, rollout is not None), live.double()
        return prove_loss(
            f"{HOST.adapter} (fastrl_{self.name})",
            lambda leaf: self._computed(loss, leaf, few_old, few_advantages, config, few_mask, few_rollout)[0],
            lambda leaf: original(leaf, few_old, few_advantages, known, few_mask, few_rollout)[0],
            point,
            undo=f"use policy_loss_type={self.name!r}, or register(prove=False)",
        )


def _option(config: Any, name: str) -> Any:
    return getattr(config.off_policy_correction, name, None)


def _correction_options(config: Any) -> dict[str, Any]:
    return {name: _option(config, name) for name in _CORRECTION_OPTIONS}


def _corrects(config: Any) -> bool:
    """Return whether SkyRL corrects for the rollout's log-probs."""
    # The token mask acts only if both of its bounds are set.
    both = [_option(config, f"token_mask_is_threshold_{side}") is not None for side in ("low", "high")]
    names = ("tis_ratio_type", "sequence_mask_metric", "outlier_token_is_threshold_low",
             "outlier_token_is_threshold_high")  # fmt: skip
    return all(both) or any(_option(config, name) is not None for name in names)


def _corrected(config: Any, old: Tensor, rollout: Tensor, live: Tensor) -> tuple[Tensor, Tensor | None, Metrics]:
    """Return (keep-mask, weights or None, metrics) of SkyRL's off-policy correction.

    SkyRL's order: the outlier mask and the token mask remove tokens, then weights and the sequence mask are computed
    from the rest.
    """
    delta = torch.where(live, old - rollout, 0.0).detach()
    ratio = delta.clamp(-CLAMP, CLAMP).exp()
    present = ratio * live
    metrics = {
        "is_ratio_mean": present.sum() / live.sum().clamp(min=1),
        "is_ratio_std": present.std(),
        "is_ratio_max": present.max(),
        "is_ratio_min": present.min(),
    }
    keep = live
    low, high = (_option(config, f"outlier_token_is_threshold_{side}") for side in ("low", "high"))
    if low is not None or high is not None:
        over = keep & (ratio > (torch.inf if high is None else high))
        under = keep & (ratio < (-torch.inf if low is None else low))
        metrics["outlier_seq_masked_ratio"] = (over | under).any(-1).double().mean()
        metrics["outlier_seq_over_high_ratio"] = over.any(-1).double().mean()
        metrics["outlier_seq_under_low_ratio"] = under.any(-1).double().mean()
        keep = keep & ~(over | under).any(-1, keepdim=True)
    low, high = (_option(config, f"token_mask_is_threshold_{side}") for side in ("low", "high"))
    if low is not None and high is not None:
        outside = (ratio < low) | (ratio > high)
        metrics["token_mask_ratio"] = (outside & keep).sum() / keep.sum().clamp(min=1)
        keep = keep & ~outside
    weights, added = _weights(config, old, rollout, keep, ratio)
    kept, more = _sequence_mask(config, torch.where(keep, delta, 0.0), keep)
    return kept, weights, {**metrics, **added, **more}


def _weights(config: Any, old: Tensor, rollout: Tensor, keep: Tensor, ratio: Tensor) -> tuple[Tensor | None, Metrics]:
    """Return the truncated weights (B, T) or None, and as a metric the truncated share."""
    kind = _option(config, "tis_ratio_type")
    if kind is None:
        return None, {}
    if kind not in ("token", "sequence"):
        raise ValueError(f"off_policy_correction.tis_ratio_type must be None, 'token' or 'sequence', got {kind!r}")
    cap = float(_option(config, f"{kind}_tis_ratio_clip_high"))
    level = "token" if kind == "token" else "sequence_sum"
    correction = RolloutCorrection(level=level, op="truncate", high=cap, log_weight_clamp=CLAMP)
    weights = correction.weights(old, rollout, keep)
    if kind == "token":
        return weights, {"tis_token_clip_high_ratio": ((ratio > cap) & keep).sum() / keep.sum().clamp(min=1)}
    product = torch.where(keep, old - rollout, 0.0).sum(-1).clamp(-CLAMP, CLAMP).exp()
    return weights, {"tis_seq_clip_high_ratio": (product > cap).double().mean()}


def _sequence_mask(config: Any, delta: Tensor, keep: Tensor) -> tuple[Tensor, Metrics]:
    """Return the keep-mask without the sequences whose ratio (geometric mean or product) is out of bounds."""
    kind = _option(config, "sequence_mask_metric")
    if kind is None:
        return keep, {}
    if kind not in ("geometric", "product"):
        raise ValueError(
            f"off_policy_correction.sequence_mask_metric must be None, 'geometric' or 'product', got {kind!r}"
        )
    prefix = "geo" if kind == "geometric" else "product"
    log_ratio = delta.sum(-1)
    if kind == "geometric":
        log_ratio = log_ratio / keep.sum(-1).clamp(min=1)
    ratio = log_ratio.clamp(-CLAMP, CLAMP).exp()
    over, under = ratio > _option(config, f"{prefix}_mask_high"), ratio < _option(config, f"{prefix}_mask_low")
    metrics = {
        f"{prefix}_sequence_mask_masked_ratio": (over | under).double().mean(),
        f"{prefix}_sequence_mask_over_high_ratio": over.double().mean(),
        f"{prefix}_sequence_mask_under_low_ratio": under.double().mean(),
    }
    return keep & ~(over | under).unsqueeze(-1), metrics


def _metrics(
    name: str,
    loss: PolicyLoss,
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    live: Tensor,
    rollout: Tensor | None,
    selection: Tensor | None,
) -> Metrics:
    """Return SkyRL's metrics of a loss by SkyRL's definitions."""
    count = live.sum().clamp(min=1)

    def share(tokens: Tensor) -> Tensor:
        return (tokens & live).sum() / count

    anchor = rollout if loss.ratio_anchor == "rollout" and rollout is not None else old
    log_ratio = torch.where(live, logprobs - anchor, 0.0)
    none = {"clip_ratio": log_ratio.new_zeros(())}
    if name == "importance_sampling":
        return {"importance_ratio": (log_ratio.exp() * live).sum() / live.sum()}
    if name == "clip_cov" and selection is not None:
        return {"clip_ratio": share(~selection)}
    if loss.ratio_level == "sequence_token":
        log_ratio = (log_ratio.sum(-1, keepdim=True) / live.sum(-1, keepdim=True).clamp(min=1)).clamp(max=10.0)
    ratio = log_ratio.clamp(-CLAMP, CLAMP).exp()
    low, high = 1.0 - (loss.clip_low or 0.0), 1.0 + (loss.clip_high or 0.0)
    if loss.surrogate == "clip":
        return {"clip_ratio": share(((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0)))}
    if loss.surrogate.startswith("divergence"):
        return {"clip_ratio": _removed(loss, logprobs, anchor, advantages, live) / count}
    low, high = loss.weight_low or 0.0, torch.inf if loss.weight_high is None else loss.weight_high
    if loss.surrogate == "masked_weight":
        inside = (ratio < high) if loss.weight_low is None else (ratio > low) & (ratio < high)
        return {"clip_ratio": share(~inside)}
    if loss.surrogate == "clipped_weight":
        return {
            "clip_ratio": share((ratio < low) | (ratio > high)),
            "cispo/ratio_mean": (ratio * live).sum() / count,
            "cispo/ratio_clamped_mean": (ratio.clamp(low, high) * live).sum() / count,
            "cispo/ratio_max": torch.where(live, ratio, -torch.inf).max(),
            "cispo/ratio_min": torch.where(live, ratio, torch.inf).min(),
        }
    return none


def _removed(loss: PolicyLoss, logprobs: Tensor, anchor: Tensor, advantages: Tensor, live: Tensor) -> Tensor:
    """Return the number of tokens that DPPO's trust region removes."""
    # The sign of the advantage chooses the bound, so a token with advantage 0 has none.
    counted = live & (advantages != 0)
    output = loss(logprobs, advantages=advantages, mask=counted, old_logprobs=anchor, rollout_logprobs=anchor)
    return output.metrics["clip_fraction"][0]


def _registry() -> Any:
    """Return SkyRL's registry, or raise RuntimeError if its loss signature or the registry is not as expected."""
    module = HOST.module(_MODULE)
    HOST.function(module, "ppo_policy_loss", _ARGUMENTS)
    registry = HOST.attribute(module, "PolicyLossRegistry")
    for name in ("register", "unregister", "get", "list_available"):
        HOST.attribute(registry, name)
    return registry


def register(names: Iterable[str] | None = None, *, prove: bool = True) -> tuple[str, ...]:
    """Put fastrl's losses into SkyRL's registry, and return the names of all that are in it.

    Call it in the driver. If Ray is running, SkyRL's registry passes the losses on to the workers, which need fastrl
    installed.

    Args:
        names: SkyRL's names, from `FORMS`; None: all of them.
        prove: whether to compare the first call of each loss with SkyRL's own.

    Raises:
        ValueError: an unknown name, or one that SkyRL has already.
        ImportError: SkyRL cannot be imported.
        RuntimeError: this SkyRL's losses take other arguments, or it has no registry.
    """
    wanted = list(FORMS) if names is None else list(names)
    unknown = [name for name in wanted if name not in FORMS]
    if unknown:
        raise ValueError(f"unknown name {', '.join(map(repr, unknown))}; known: {', '.join(FORMS)}")
    _put({f"fastrl_{name}": PolicyLossFunction(name, prove=prove) for name in wanted})
    return tuple(_ours)


def register_loss(name: str, loss: PolicyLoss) -> None:
    """Make any `PolicyLoss` available to SkyRL as `policy_loss_type=name`.

    Raises:
        ValueError: a name that SkyRL has already. An aggregate other than "token_sum", because SkyRL's reduction is in
            the advantages. A KL to the reference or an entropy bonus, because SkyRL adds them itself.
    """
    if not isinstance(loss, PolicyLoss):
        raise TypeError(f"loss must be a PolicyLoss, got {type(loss).__name__}")
    if loss.aggregate != "token_sum":
        raise ValueError(
            f"loss.aggregate must be 'token_sum', SkyRL's reduction being in the advantages, got {loss.aggregate!r}"
        )
    own = [
        what
        for what, there in (
            ("kl_to='ref' (SkyRL: use_kl_loss)", loss.kl is not None and loss.kl_to == "ref"),
            ("entropy_coef (SkyRL: use_entropy_loss)", loss.uses_entropy),
        )
        if there
    ]
    if own:
        raise ValueError(f"SkyRL's policy losses do not take {', '.join(own)}")
    _put({name: PolicyLossFunction(name, loss)})


def _put(functions: Mapping[str, PolicyLossFunction]) -> None:
    registry = _registry()
    there = {name: registry.get(name) for name in registry.list_available() if name in functions}
    # An equal function is ours, from an earlier call.
    clash = [name for name, function in there.items() if function != functions[name]]
    if clash:
        raise ValueError(f"SkyRL has a policy loss {', '.join(map(repr, clash))} already")
    for name, function in functions.items():
        if name not in there:
            registry.register(name, function)
            _ours[name] = function


def unregister() -> None:
    """Remove every name that `register` and `register_loss` have put in. SkyRL's own entries stay."""
    if not _ours:
        return
    registry = _registry()
    there = registry.list_available()
    while _ours:
        name, function = _ours.popitem()
        if name in there and registry.get(name) == function:
            registry.unregister(name)
