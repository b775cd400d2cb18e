"""TRL's configurations as losses of fastrl. An option that fastrl does not compute raises an error with its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastrl.losses.policy.correction import RolloutCorrection
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.losses.preference.loss import PreferenceLoss

if TYPE_CHECKING:
    from trl import DPOConfig, GRPOConfig, KTOConfig, RLOOConfig, SFTConfig

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
GRPO_LOSSES = (*CLIPPED, "cispo", "sapo", "vespo")
# TRL's losses that read label_smoothing.
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
# TRL's losses of the score margin, which f_divergence_type transforms.
OF_MARGIN = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
KTO_LOSSES = ("kto", "apo_zero_unpaired")
# TRL's lower bound of VESPO's rates lambda.
VESPO_RATE_MIN = 1e-4


def policy_loss_from_config(config: GRPOConfig | RLOOConfig | SFTConfig) -> PolicyLoss:
    """Return the loss that TRL's trainer computes under `config`.

    Pass the denominators that TRL takes from the whole batch (`num_items_in_batch`, gradient accumulation, sequences
    without a live token) to the call of the loss, as `n_tokens` and `n_sequences`. An option that TRL does not use with
    the chosen `loss_type` has no effect here either, for example `delta` with "cispo".

    Not part of the loss are the mixture-of-experts auxiliary loss, and the masks `top_entropy_quantile` and
    `off_policy_mask_threshold` (pass them as `selection=`).

    Args:
        config: a `GRPOConfig`, `RLOOConfig` or `SFTConfig`.

    Raises:
        ValueError: an option, or a combination of options, that fastrl does not compute. The message names it.
        TypeError: another configuration.
    """
    kind = type(config).__name__
    names = {base.__name__ for base in type(config).__mro__}
    _refuse_liger(config)
    try:
        if "GRPOConfig" in names:
            return _grpo(config)
        if "RLOOConfig" in names:
            return PolicyLoss.preset("rloo", style="trl", clip_low=config.epsilon, clip_high=_high(config))  # type: ignore[union-attr]
        if "SFTConfig" in names:
            return _sft(config)
    except ValueError as error:
        raise ValueError(f"fastrl cannot compute the loss of this {kind}: {error}") from error
    raise TypeError(f"config must be a GRPOConfig, RLOOConfig or SFTConfig, got {kind}")


def _refuse_liger(config: Any) -> None:
    if getattr(config, "use_liger_kernel", False):
        raise ValueError("use_liger_kernel=True does not go together with fastrl's losses: set use_liger_kernel=False")


def _high(config: Any) -> float:
    return config.epsilon if config.epsilon_high is None else config.epsilon_high


def _sft(config: Any) -> PolicyLoss:
    names = {"nll": "sft", "dft": "dft"}
    if config.loss_type not in names:
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, names))}, got {config.loss_type!r}")
    return PolicyLoss.preset(names[config.loss_type])


def _grpo(config: Any) -> PolicyLoss:
    kind = config.loss_type
    if kind not in GRPO_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, GRPO_LOSSES))}, got {kind!r}")
    levels = ("token", "sequence")
    level = config.importance_sampling_level
    if level not in levels:
        raise ValueError(f"importance_sampling_level must be 'token' or 'sequence', got {level!r}")
    fields: dict[str, Any] = {"ratio_level": level}
    if kind in CLIPPED:
        fields |= {"clip_low": config.epsilon, "clip_high": _high(config)}
        if config.delta is not None:
            if config.delta <= 1.0 + _high(config):
                raise ValueError(f"delta must be > 1 + epsilon_high = {1.0 + _high(config)}, got {config.delta}")
            fields["max_ratio"] = config.delta
    elif kind == "cispo":
        fields["weight_high"] = _high(config)
    elif kind == "sapo":
        fields |= {"tau_pos": config.sapo_temperature_pos, "tau_neg": config.sapo_temperature_neg}
    else:
        fields |= _vespo(config)
    if kind == "dr_grpo":
        if config.max_completion_length is None:
            raise ValueError("loss_type='dr_grpo' divides by max_completion_length, which is None")
        fields["constant"] = float(config.max_completion_length)
    if config.beta != 0.0:
        gradient = "ratio_weighted" if config.use_bias_correction_kl else "plain"
        fields |= {"kl": "k3", "kl_coef": config.beta, "kl_gradient": gradient}
    if config.use_vllm and config.vllm_importance_sampling_correction:
        fields["correction"] = _correction(config)
    return PolicyLoss.preset(kind, style="trl", entropy_coef=config.entropy_coef, **fields)


def _vespo(config: Any) -> dict[str, Any]:
    """Return VESPO's fields."""
    # VESPO's own weight is one per sequence. importance_sampling_level only sets the level of the KL's ratio.
    if config.importance_sampling_level == "sequence" and config.beta != 0.0 and config.use_bias_correction_kl:
        raise ValueError(
            "loss_type='vespo' with importance_sampling_level='sequence' weighs the KL (beta, use_bias_correction_kl) "
            "by another sequence ratio than its own; use importance_sampling_level='token', as VESPO means it"
        )
    return {
        "ratio_level": "none",
        "k_pos": config.vespo_k_pos,
        "k_neg": config.vespo_k_neg,
        "lambda_pos": max(config.vespo_lambda_pos, VESPO_RATE_MIN),
        "lambda_neg": max(config.vespo_lambda_neg, VESPO_RATE_MIN),
    }


def _correction(config: Any) -> RolloutCorrection:
    mode = config.vllm_importance_sampling_mode
    modes = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
    if mode not in modes:
        raise ValueError(f"vllm_importance_sampling_mode must be one of {', '.join(map(repr, modes))}, got {mode!r}")
    level, op = mode.split("_")
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is None and high is None:
        low = 0.0  # positive weights never reach it: no bound
    return RolloutCorrection(level="sequence_sum" if level == "sequence" else "token", op=op, low=low, high=high)


def preference_loss_from_config(config: DPOConfig | KTOConfig) -> PreferenceLoss:
    """Return the loss that TRL's `DPOTrainer` or `KTOTrainer` computes under `config`.

    As in TRL, `label_smoothing` has an effect on exo_pair, robust, aot and aot_unpaired only, and `f_divergence_type`
    on the losses of the score margin only. For "kto" pass the KL to the call of the loss: as `reference_point`, or as
    the log-probs of the mismatched completions, `kl_logprobs`.

    Args:
        config: a `DPOConfig` or `KTOConfig`.

    Raises:
        ValueError: an option, or a combination of options, that fastrl does not compute. The message names it.
        TypeError: another configuration.
    """
    kind = type(config).__name__
    names = {base.__name__ for base in type(config).__mro__}
    if not names & {"DPOConfig", "KTOConfig"}:
        raise TypeError(f"config must be a DPOConfig or KTOConfig, got {kind}")
    _refuse_liger(config)
    try:
        return _kto(config) if "KTOConfig" in names else _dpo(config)
    except ValueError as error:
        raise ValueError(f"fastrl cannot compute the loss of this {kind}: {error}") from error


def _kto(config: Any) -> PreferenceLoss:
    if config.loss_type not in KTO_LOSSES:
        raise ValueError(f"loss_type must be one of {', '.join(map(repr, KTO_LOSSES))}, got {config.loss_type!r}")
    return PreferenceLoss.preset(
        config.loss_type, style="trl", beta=config.beta, desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )  # fmt: skip


def _dpo(config: Any) -> PreferenceLoss:
    weights = config.loss_weights or [1.0] * len(config.loss_type)
    parts = [(_preference(name, config), weight) for name, weight in zip(config.loss_type, weights, strict=True)]
    if len(parts) == 1 and parts[0][1] == 1.0:
        return parts[0][0]
    return PreferenceLoss.mixture(parts, beta=config.beta, **_shared(config))


def _shared(config: Any) -> dict[str, Any]:
    shared: dict[str, Any] = {}
    if config.ld_alpha is not None:
        shared["length_desensitisation"] = config.ld_alpha
    if config.use_weighting:
        shared["weighting"] = "wpo"
    return shared


def _preference(name: str, config: Any) -> PreferenceLoss:
    fields: dict[str, Any] = {"beta": config.beta, **_shared(config)}
    if name in SMOOTHED:
        fields["label_smoothing"] = config.label_smoothing
    if name in OF_MARGIN and config.f_divergence_type != "reverse_kl":
        fields["f_divergence"] = config.f_divergence_type
        if config.f_divergence_type == "alpha_divergence":
            fields["alpha"] = config.f_alpha_divergence_coef
    if name == "discopop":
        fields["tau"] = config.discopop_tau
    return PreferenceLoss.preset(name, style="trl", **fields)
