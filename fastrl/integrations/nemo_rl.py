"""fastrl inside NeMo-RL: its clipped policy-gradient loss.

    from fastrl.integrations import nemo_rl

    nemo_rl.enable()                                   # in the driver, before setup(); or: with nemo_rl.patched(): ...
    loss_fn = nemo_rl.ClippedPGLoss(master_config.loss_fn)       # or by hand, in place of ClippedPGLossFn

NeMo-RL has no registry. `grpo.setup` and `ppo.setup` build `ClippedPGLossFn(cfg)` and send it to the policy workers, so
the adapter replaces that class. Options, denominators and metrics are NeMo-RL's.

Legend: B sequences, S padded length. Log-probs (B, S - 1) belong to the tokens 1 .. S - 1.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from fastrl.integrations.common.host import Host, Switch
from fastrl.integrations.common.metrics import as_floats
from fastrl.integrations.common.proof import FirstUse, on_cpu, prove_loss, sampled_sequences
from fastrl.losses.kl import kl_estimate
from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss, loss_value

HOST = Host("NeMo-RL", "nemo-rl", "7ea279abf", "fastrl.integrations.nemo_rl")

OPTIONS: Mapping[str, Any] = {
    "disable_ppo_ratio": False,
    "token_level_loss": True,
    "sequence_level_importance_ratios": False,
    "ratio_clip_min": 0.2,
    "ratio_clip_max": 0.2,
    "ratio_clip_c": None,
    "reference_policy_kl_penalty": 0.01,
    "reference_policy_kl_type": "k3",
    "kl_input_clamp_value": 20.0,
    "kl_output_clamp_value": 10.0,
    "use_kl_in_reward": False,
    "use_importance_sampling_correction": False,
    "truncated_importance_sampling_type": None,
    "truncated_importance_sampling_ratio": None,
    "truncated_importance_sampling_ratio_min": None,
    "use_on_policy_kl_approximation": False,
    "force_on_policy_ratio": False,
    "use_cispo": False,
    "positive_example_nll_weight": 0.0,
}
"""The options of NeMo-RL's `loss_fn` section and their defaults."""

_MODULE = "nemo_rl.algorithms.loss.loss_functions"
_CLASS = "ClippedPGLossFn"
_INIT_ARGUMENTS = ("self", "cfg", "use_fused_linear_logprobs")
_CALL_ARGUMENTS = ("self", "next_token_logprobs", "data", "global_valid_seqs", "global_valid_toks")
_UNDO = "undo with fastrl.integrations.nemo_rl.disable(), or switch the proof off with ClippedPGLoss(cfg, prove=False)"
_EPS = 1e-8  # added to every denominator, as in NeMo-RL

_proofs = FirstUse()


def options_of(cfg: Any) -> dict[str, Any]:
    """Return the value of every option of `OPTIONS` in `cfg`: NeMo-RL's pydantic model, another object or a mapping.

    Raises:
        ValueError: an option that is not among `OPTIONS`, unless its value is None or False.
    """
    if isinstance(cfg, Mapping):
        given = dict(cfg)
    else:
        given = cfg.model_dump() if hasattr(cfg, "model_dump") else dict(vars(cfg))
    unknown = [
        name for name, value in given.items() if name not in OPTIONS and value is not None and value is not False
    ]
    if unknown:
        raise ValueError(
            f"fastrl.integrations.nemo_rl does not support the loss_fn option {', '.join(sorted(unknown))}; known: "
            f"{', '.join(OPTIONS)}"
        )
    return {**OPTIONS, **{name: given[name] for name in OPTIONS if name in given}}


def policy_loss(cfg: Any) -> PolicyLoss:
    """Return the `PolicyLoss` that NeMo-RL's `loss_fn` options describe, without the positive-example NLL.

    Raises:
        ValueError: unknown options or values, or combinations that NeMo-RL refuses. KL clamps with which the clamp of
            the log-ratio can act alone, without the clamp of the estimate: the gradient would differ from NeMo-RL's.
    """
    o = options_of(cfg)
    _check(o)
    fields: dict[str, Any] = {"aggregate": "token_mean" if o["token_level_loss"] else "sequence_mean", **_kl(o)}
    if o["use_importance_sampling_correction"]:
        fields["correction"] = _correction(o)
    # A width of 1 or more puts the lower bound at or below 0, where a ratio, being positive, never is.
    clip = {"clip_low": min(float(o["ratio_clip_min"]), 1.0), "clip_high": float(o["ratio_clip_max"])}
    if o["use_cispo"]:
        low, high = max(1.0 - o["ratio_clip_min"], 0.0), 1.0 + o["ratio_clip_max"]
        return PolicyLoss.preset("cispo", style="nemo", weight_low=low, weight_high=high, **fields)
    if o["force_on_policy_ratio"]:
        return PolicyLoss.preset("ppo", style="nemo", ratio_anchor="self", clip_low=None, clip_high=None, **fields)
    if o["disable_ppo_ratio"]:
        return PolicyLoss.preset("reinforce", style="nemo", **fields)
    name = "gspo" if o["sequence_level_importance_ratios"] else "ppo"
    dual = None if o["ratio_clip_c"] is None else float(o["ratio_clip_c"])
    return PolicyLoss.preset(name, style="nemo", dual_clip=dual, **clip, **fields)


def _check(o: Mapping[str, Any]) -> None:
    """Raise ValueError for the values and combinations that NeMo-RL refuses."""
    kind, sequences = o["truncated_importance_sampling_type"], o["sequence_level_importance_ratios"]
    high, low = o["truncated_importance_sampling_ratio"], o["truncated_importance_sampling_ratio_min"]
    if o["reference_policy_kl_type"] not in ("k1", "k2", "k3"):
        raise ValueError(f"reference_policy_kl_type must be 'k1', 'k2' or 'k3', got {o['reference_policy_kl_type']!r}")
    if kind not in (None, "tis", "icepop", "seq-mask-tis"):
        raise ValueError(
            f"truncated_importance_sampling_type must be None, 'tis', 'icepop' or 'seq-mask-tis', got {kind!r}"
        )
    contradictions = {
        "sequence_level_importance_ratios=True needs token_level_loss=False": sequences and o["token_level_loss"],
        "use_cispo=True needs token_level_loss=True and none of disable_ppo_ratio, force_on_policy_ratio, "
        "sequence_level_importance_ratios, ratio_clip_c": o["use_cispo"]
        and (
            not o["token_level_loss"]
            or o["disable_ppo_ratio"]
            or o["force_on_policy_ratio"]
            or sequences
            or o["ratio_clip_c"] is not None
        ),
        "ratio_clip_c must be > 1": o["ratio_clip_c"] is not None and not o["ratio_clip_c"] > 1,
        "truncated_importance_sampling_type needs use_importance_sampling_correction=True": kind is not None
        and not o["use_importance_sampling_correction"],
        "truncated_importance_sampling_type needs truncated_importance_sampling_ratio > 0": kind is not None
        and not (high is not None and high > 0),
        "truncated_importance_sampling_ratio needs truncated_importance_sampling_type": kind is None
        and high is not None,
        f"truncated_importance_sampling_type={kind!r} needs truncated_importance_sampling_ratio_min": low is None
        and kind in ("icepop", "seq-mask-tis"),
        "truncated_importance_sampling_type='seq-mask-tis' and sequence_level_importance_ratios=True exclude each "
        "other": kind == "seq-mask-tis" and sequences,
    }
    wrong = [message for message, is_wrong in contradictions.items() if is_wrong]
    if wrong:
        raise ValueError(f"NeMo-RL's loss_fn options contradict each other: {'; '.join(wrong)}")


def _penalty(o: Mapping[str, Any]) -> float:
    return 0.0 if o["use_kl_in_reward"] else float(o["reference_policy_kl_penalty"])


def _kl(o: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the KL term: the estimate times a ratio that carries a gradient, then clamped."""
    if _penalty(o) == 0.0:
        return {}
    kind, inner, outer = o["reference_policy_kl_type"], o["kl_input_clamp_value"], o["kl_output_clamp_value"]
    if inner is not None:
        # Where the estimate at the edge of the inner clamp reaches the outer one, the outer always acts with the inner.
        edge = torch.tensor([-float(inner), float(inner)], dtype=torch.float64)
        reached = float(kl_estimate(edge, torch.zeros_like(edge), kind).abs().min())
        if outer is None or reached < outer:
            raise ValueError(
                f"kl_input_clamp_value={inner} acts where kl_output_clamp_value={outer} does not, and NeMo-RL then "
                "drops the gradient of the KL's weight, which is not supported: set kl_input_clamp_value to None, or "
                f"kl_output_clamp_value to at most {reached:.6g}"
            )
    return {
        "kl": kind,
        "kl_coef": _penalty(o),
        "kl_gradient": "ratio_weighted",
        "kl_ratio_anchor": "rollout" if o["use_on_policy_kl_approximation"] else "self",
        "kl_log_ratio_clamp": None if inner is None else float(inner),
        "kl_value_clamp": None if outer is None else float(outer),
    }


def _correction(o: Mapping[str, Any]) -> RolloutCorrection:
    level = "sequence_sum" if o["sequence_level_importance_ratios"] else "token"
    kind, high = o["truncated_importance_sampling_type"], o["truncated_importance_sampling_ratio"]
    low = o["truncated_importance_sampling_ratio_min"]
    if kind in (None, "tis"):
        return RolloutCorrection(level=level, op="truncate", low=0.0 if low is None or kind is None else low, high=high)
    if kind == "icepop":
        return RolloutCorrection(level=level, op="mask", low=low, high=high)
    return RolloutCorrection(level="sequence", op="gate", statistic="ratio", low=low, high=high)


class ClippedPGLoss:
    """NeMo-RL's `ClippedPGLossFn`, computed by fastrl: the same protocol, options, value, gradient and metrics.

    The first call in a process computes the loss of up to 4 sequences with NeMo-RL's own class too. It raises if the
    loss or its gradient differs. A call waits for the device once, for the metrics.

    Args:
        cfg: NeMo-RL's `loss_fn` options (`ClippedPGLossConfig`).
        use_fused_linear_logprobs: as in NeMo-RL: the log-probs come from its fused head.
        prove: whether to compare the first call with NeMo-RL's own loss.

    Raises:
        ValueError: options that are not supported (see `policy_loss`).
        ImportError: NeMo-RL cannot be imported.
        RuntimeError: NeMo-RL's class or its signatures are not the expected ones.
    """

    def __init__(self, cfg: Any, use_fused_linear_logprobs: bool = False, *, prove: bool = True) -> None:
        self.loss = policy_loss(cfg)
        self.options = options_of(cfg)
        self.prove = prove
        self.host = _checked_class()(cfg, use_fused_linear_logprobs)
        self.input_type = self.host.input_type
        self.loss_type = self.host.loss_type
        self.metric_normalizations = self.host.metric_normalizations
        self.use_fused_linear_logprobs = use_fused_linear_logprobs
        # NeMo-RL reads this attribute to decide whether it needs reference log-probs without top-k and top-p.
        self.reference_policy_kl_penalty = _penalty(self.options)

    def __call__(
        self,
        next_token_logprobs: Tensor,  # (B, S - 1)
        data: Any,
        global_valid_seqs: Tensor,
        global_valid_toks: Tensor,
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return (loss, metrics) of a micro-batch, divided by the global counts so that micro-batches add up.

        Args:
            next_token_logprobs: (B, S - 1) log-probs of the tokens 1 .. S - 1.
            data: token_mask, advantages, generation_logprobs, prev_logprobs (unless force_on_policy_ratio),
                reference_policy_logprobs (with a KL): (B, S); sample_mask, rewards: (B,).
            global_valid_seqs: sequences of the global batch.
            global_valid_toks: tokens of the global batch.

        Raises:
            ValueError: a KL penalty with log-probs from top-k or top-p sampling (`data` has curr_logprobs_unfiltered).
            AdapterMismatchError: in the first call, if NeMo-RL's own loss or its gradient differs.
        """
        if self.reference_policy_kl_penalty != 0 and "curr_logprobs_unfiltered" in data:
            raise ValueError(
                "fastrl.integrations.nemo_rl does not support a KL penalty together with top-k or top-p in training "
                "(curr_logprobs_unfiltered): set policy.generation.top_k=null and top_p=1.0, or "
                "reference_policy_kl_penalty=0"
            )
        counts = (global_valid_seqs, global_valid_toks)
        if self.prove:
            _proofs.once(repr(self.loss), lambda: self._proved(next_token_logprobs, data, counts))
        loss = self._loss(next_token_logprobs, data, counts)
        with torch.no_grad():
            metrics = _metrics(self.options, self.loss, next_token_logprobs.detach(), data, counts)
            metrics |= {"loss": loss.detach(), "positive_nll_loss": self._nll(next_token_logprobs.detach(), data)}
        return loss, as_floats(metrics)

    def _loss(self, logprobs: Tensor, data: Any, counts: tuple[Any, Any]) -> Tensor:
        mask = _mask(data)
        generation = data["generation_logprobs"][:, 1:]
        inputs: dict[str, Any] = {"n_tokens": counts[1] + _EPS, "n_sequences": counts[0] + _EPS}
        if not self.options["force_on_policy_ratio"]:
            inputs["old_logprobs"] = data["prev_logprobs"][:, 1:]
        if self.reference_policy_kl_penalty != 0:
            inputs["ref_logprobs"] = data["reference_policy_logprobs"][:, 1:]
        if self.loss.correction is not None:
            # NeMo-RL gives the weight 0 to a token whose rollout log-prob is not finite.
            known = generation.isfinite() | (mask == 0)
            inputs["selection"] = known.all(-1, keepdim=True).expand_as(known) if self._whole_sequences else known
        value = loss_value(
            self.loss, logprobs, advantages=data["advantages"][:, 1:], mask=mask, rollout_logprobs=generation, **inputs
        )
        weight = self.options["positive_example_nll_weight"]
        return value + weight * self._nll(logprobs, data) if weight > 0 else value

    @property
    def _whole_sequences(self) -> bool:
        return bool(self.options["sequence_level_importance_ratios"])

    def _nll(self, logprobs: Tensor, data: Any) -> Tensor:
        """Return the mean NLL over the tokens of samples with a positive reward; 0 without such samples."""
        if self.options["positive_example_nll_weight"] <= 0 or "rewards" not in data:
            return logprobs.new_zeros(())
        correct = _mask(data) * (data["rewards"] > 0).unsqueeze(-1)
        picked = torch.where(correct != 0, logprobs, 0.0)
        return -picked.sum() / (correct.sum() + _EPS)

    def _proved(self, logprobs: Tensor, data: Any, counts: tuple[Any, Any]) -> bool:
        rows = sampled_sequences(_mask(data), data["advantages"][:, 1:])
        if rows.numel() == 0:
            return False
        few = {name: on_cpu(data[name], rows) for name in _columns(self.options, data)}
        live = _mask(few) != 0
        for name in ("advantages", "generation_logprobs", "prev_logprobs", "reference_policy_logprobs"):
            if name in few:
                few[name][:, 1:] = torch.where(live, few[name][:, 1:], 0.0)
        point = torch.where(live, on_cpu(logprobs, rows), 0.0)
        small = tuple(on_cpu(torch.as_tensor(count)) for count in counts)
        return prove_loss(
            f"{HOST.adapter} (ClippedPGLoss)",
            lambda leaf: self._loss(leaf, few, (small[0], small[1])),
            lambda leaf: self.host(leaf, dict(few), *small)[0],
            point,
            undo=_UNDO,
        )


def _columns(o: Mapping[str, Any], data: Any) -> list[str]:
    names = ["token_mask", "sample_mask", "advantages", "generation_logprobs"]
    names += [] if o["force_on_policy_ratio"] else ["prev_logprobs"]
    names += ["reference_policy_logprobs"] if _penalty(o) != 0 else []
    return names + (["rewards"] if "rewards" in data else [])


def _mask(data: Any) -> Tensor:
    """Return the mask (B, S - 1), not 0 for the tokens that count."""
    return data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)


def _metrics(
    o: Mapping[str, Any], loss: PolicyLoss, logprobs: Tensor, data: Any, counts: tuple[Any, Any]
) -> dict[str, Tensor]:
    """Return NeMo-RL's metrics by NeMo-RL's definitions, as scalars on the device."""
    mask = _mask(data)
    live = mask != 0
    current, gen = torch.where(live, logprobs, 0.0), torch.where(live, data["generation_logprobs"][:, 1:], 0.0)
    previous = current if o["force_on_policy_ratio"] else torch.where(live, data["prev_logprobs"][:, 1:], 0.0)
    kind = o["reference_policy_kl_type"]

    def mean(values: Tensor) -> Tensor:
        return (values * live).sum() / (counts[1] + _EPS)

    mixture = torch.logaddexp(previous, gen) - math.log(2.0)
    divergence = 0.5 * (_estimate(mixture - previous, "k3") + _estimate(mixture - gen, "k3"))
    values = {
        "token_mult_prob_error": mean((gen - previous).abs().exp()),
        "gen_kl_error": mean(_estimate(gen - previous, kind)),
        "policy_kl_error": mean(_estimate(previous - gen, kind)),
        "js_divergence_error": mean(divergence),
        "approx_entropy": -mean((current - gen).exp() * current),
        "num_valid_samples": data["sample_mask"].sum(),
    }
    values |= _ratio_metrics(o, loss, current, previous, live, mean)
    values |= _weight_metrics(o, previous, gen, live, data, counts)
    if _penalty(o) != 0:
        reference = torch.where(live, data["reference_policy_logprobs"][:, 1:], 0.0)
        inner, bound = o["kl_input_clamp_value"], o["kl_output_clamp_value"]
        log_ratio = current - reference
        kl = _estimate(log_ratio if inner is None else log_ratio.clamp(-inner, inner), kind)
        if o["use_on_policy_kl_approximation"]:
            kl = kl * (current - gen).exp().nan_to_num(nan=0.0, posinf=0.0)
        kl = kl if bound is None else kl.clamp(-bound, bound)
        values["kl_penalty"] = mean(kl) if o["token_level_loss"] else _sequence_mean(kl, live, data, counts)
    else:
        values["kl_penalty"] = current.new_zeros(())
    return values


def _estimate(x: Tensor, kind: str) -> Tensor:
    """Return NeMo-RL's KL estimate of log-ratios, for metrics."""
    # Its error is a rounding of the log-ratio, enough for a mean. The loss takes `kl_estimate`, whose error is a
    # rounding of the estimate itself, at ten times the cost.
    if kind == "k1":
        return x
    return 0.5 * x.square() if kind == "k2" else torch.expm1(-x) + x


def _sequence_mean(values: Tensor, live: Tensor, data: Any, counts: tuple[Any, Any]) -> Tensor:
    lengths = data["token_mask"][:, 1:].sum(-1) + _EPS
    return ((values * live).sum(-1) / lengths).sum() / (counts[0] + _EPS)


def _ratio_metrics(
    o: Mapping[str, Any], loss: PolicyLoss, current: Tensor, previous: Tensor, live: Tensor, mean: Any
) -> dict[str, Tensor]:
    ratio = (current - previous).exp()
    if o["disable_ppo_ratio"] and not o["force_on_policy_ratio"]:
        ratio = current
    elif loss.ratio_level == "sequence":
        length = live.sum(-1, keepdim=True) + _EPS
        ratio = (((current - previous) * live).sum(-1, keepdim=True) / length).exp().expand_as(current)
    clamped = ratio
    if not (o["disable_ppo_ratio"] or o["force_on_policy_ratio"]):
        clamped = ratio.clamp(1.0 - o["ratio_clip_min"], 1.0 + o["ratio_clip_max"])
    values = {}
    for name, column in (("probs_ratio", ratio), ("probs_ratio_clamped", clamped)):
        values[name] = mean(column)
        values[f"{name}_min"] = torch.where(live, column, torch.inf).amin()
        values[f"{name}_max"] = torch.where(live, column, -torch.inf).amax()
    return values


def _weight_metrics(
    o: Mapping[str, Any], previous: Tensor, gen: Tensor, live: Tensor, data: Any, counts: tuple[Any, Any]
) -> dict[str, Tensor]:
    """Return as metrics the mean of the rollout weights after truncation, and the share out of bounds."""
    kind, high = o["truncated_importance_sampling_type"], o["truncated_importance_sampling_ratio"]
    low = o["truncated_importance_sampling_ratio_min"] or 0.0
    log_weights = torch.where(live, previous - gen, 0.0)
    by_sequence = o["sequence_level_importance_ratios"]
    if by_sequence:
        log_weights = log_weights.sum(-1, keepdim=True)
    weights = log_weights.exp().nan_to_num(nan=0.0, posinf=0.0)
    tokens, sequences = counts[1] + _EPS, counts[0] + _EPS
    values = {}
    if kind in ("tis", "icepop"):
        outside = (weights < low) | (weights > high)
        values["is_oob_ratio"] = (outside & live).sum() / tokens
        weights = weights.clamp(low, high) if kind == "tis" else torch.where(outside, 0.0, weights)
    elif kind == "seq-mask-tis":
        mean = (log_weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) * live).sum(-1) / (live.sum(-1) + _EPS)
        outside = (mean.exp() < low) | (mean.exp() > high)
        values["is_oob_ratio"] = (outside & (data["sample_mask"] != 0)).sum() / sequences
        weights = torch.where(outside.unsqueeze(-1), 0.0, weights)
    if by_sequence:
        values["sampling_importance_ratio"] = (weights.squeeze(-1) * data["sample_mask"]).sum() / sequences
    else:
        values["sampling_importance_ratio"] = (weights * live).sum() / tokens
    return values


def _checked_class() -> Any:
    owner = HOST.attribute(HOST.module(_MODULE), _CLASS)
    HOST.function(owner, "__init__", _INIT_ARGUMENTS)
    HOST.function(owner, "__call__", _CALL_ARGUMENTS)
    return owner


def _find() -> list[tuple[Any, str, Any]]:
    original = _checked_class()
    HOST.attribute(HOST.module("nemo_rl.algorithms.loss"), _CLASS)
    # Every module that imported the class by name has its own binding. The module that defines it stays as it is,
    # because `ClippedPGLoss` looks up the original there.
    loaded = [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("nemo_rl.") and name != _MODULE and getattr(module, "__dict__", {}).get(_CLASS) is original
    ]
    return [(module, _CLASS, ClippedPGLoss) for module in loaded]


_switch = Switch(HOST, _find)


def patched() -> AbstractContextManager[None]:
    """Let NeMo-RL build fastrl's loss in place of its own inside this context. Call `setup()` in it.

    Losses that exist already do not change. A loss built inside remains in the workers after the context.

    Raises:
        ImportError: NeMo-RL cannot be imported.
        RuntimeError: this NeMo-RL's signatures are not the expected ones.
    """
    return _switch.patched()


def enable() -> None:
    """Let NeMo-RL build fastrl's loss in place of its own from here on, as inside `patched()`."""
    _switch.enable()


def disable() -> None:
    """Undo `enable()`. NeMo-RL builds its own loss again."""
    _switch.disable()


def enabled() -> bool:
    """Return whether NeMo-RL builds fastrl's loss now."""
    return _switch.on
