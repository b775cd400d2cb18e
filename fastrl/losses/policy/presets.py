"""Policy losses of the field by name: each is a value of `PolicyLoss`, with its paper and the trainers' variants.

No other place states a preset's formula, source and defaults. `PolicyLoss.preset` builds from them, `describe` prints
them, and `scripts/make_docs.py` writes the tables of docs/losses.md.

A style is a trainer's arithmetic and defaults under that name. `Preset.styles` lists every trainer that has the loss.
An empty entry means that the trainer agrees with the preset. Only grpo's styles hold a KL term. To add a trainer's KL
to another loss, pass its form: `PolicyLoss.preset("dapo", style="trl", **TRAINER_KL["trl"], kl_coef=0.04)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.losses.preset import Fields, Preset, described

# Style name -> the trainer and the version or commit whose code was read and run.
TRAINERS: Mapping[str, str] = {
    "trl": "TRL 1.16.0",
    "verl": "verl 0.9.1",
    "openrlhf": "OpenRLHF 0.11.2",
    "slime": "slime 624b824a8",
    "nemo": "NeMo-RL 7ea279abf",
    "skyrl": "SkyRL a9564572e",
    "prime": "prime-rl 559b44772",
    "areal": "AReaL 4aef98d8d",
    "roll": "ROLL 8eb27cc2",
    "torchtune": "torchtune bd2a0fc7c",
    "liger": "Liger-Kernel 0.8.5",
}


# The form of the KL term that a trainer adds to its policy loss once it is switched on, with its default coefficient
# (TRL's and slime's default is 0, which leaves the term out: they need kl_coef). AReaL puts its KL into the rewards.
TRAINER_KL: Mapping[str, Fields] = {
    "trl": {"kl": "k3", "kl_gradient": "ratio_weighted"},
    "verl": {"kl": "k3", "kl_coef": 0.001, "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0},
    "openrlhf": {"kl": "k3", "kl_coef": 0.01, "kl_value_clamp": 10.0},
    "slime": {"kl": "k3", "kl_value_clamp": 10.0},
    "nemo": {
        "kl": "k3",
        "kl_coef": 0.01,
        "kl_gradient": "ratio_weighted",
        "kl_ratio_anchor": "self",
        "kl_log_ratio_clamp": 20.0,
        "kl_value_clamp": 10.0,
    },
    "skyrl": {"kl": "k3", "kl_coef": 0.001, "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0},
    "prime": {"kl": "k2", "kl_to": "rollout", "kl_coef": 2e-3},
    "roll": {"kl": "k3"},
    "torchtune": {"kl": "k3", "kl_coef": 0.1},
    "liger": {"kl": "k3", "kl_coef": 0.04},
}


_OPEN: Fields = {"clip_low": None, "clip_high": None}


_FREE: Fields = {"ratio_level": "none", **_OPEN}


_NO_KL: Fields = {"kl": None, "kl_coef": 0.0}


_SAME: Fields = {}


_EVEN: Fields = {"clip_low": 0.2, "clip_high": 0.2}


_CLAMP: Fields = {"log_ratio_clamp": 20.0}


_DUAL: Fields = {"dual_clip": 3.0, **_CLAMP}


_SUM: Fields = {"aggregate": "token_sum"}


_EPS: Fields = {"aggregate": "sequence_mean", "denominator_eps": 1e-8}


_NLL: Mapping[str, Fields] = {
    **dict.fromkeys(("trl", "verl", "openrlhf", "nemo", "areal", "roll", "torchtune", "liger"), _SAME),
    "slime": {"aggregate": "sequence_mean"},
    "skyrl": _SUM,
    "prime": _SUM,
}


# PPO's clip in the trainers' one policy loss. RLOO and others reach the same function through advantages.
_CLIP: Mapping[str, Fields] = {
    "verl": _DUAL,
    "openrlhf": _CLAMP,
    "nemo": _SAME,
    "skyrl": {**_CLAMP, **_SUM},
    "areal": _SAME,
}


_AS_CLIP: Fields = {"surrogate": "clip", "ratio_level": "token", **_EVEN, "aggregate": "token_mean"}


_SKYRL_SUM = "a sum over tokens, the reduction being in the advantages"


_ROLL_CONSTANT = "divides by the length but not by the number of sequences: pass n_sequences=1"


_TOPR_SIGN = "the sign comes from the scores, not from the advantages: pass scores="


_LIGER_LUSPO = "0.8.5 does not mask token-level terms (the KL); the style does"


PRESETS: Mapping[str, Preset] = {
    "sft": Preset(
        {"surrogate": "nll", **_FREE},
        "-logp, mean over tokens",
        "maximum likelihood",
        _NLL,
    ),
    "rft": Preset(
        {"surrogate": "nll", **_FREE},
        "-logp on accepted samples, mean over tokens",
        "Yuan et al. 2023, arXiv 2308.01825",
        _NLL,
    ),
    "dft": Preset(
        {"surrogate": "dft", **_FREE},
        "-sg(p) logp, mean over tokens",
        "Wu et al. 2025, arXiv 2508.05629",
        {"trl": _SAME},
    ),
    "reinforce": Preset(
        {"surrogate": "reinforce", **_FREE},
        "-A logp, mean over tokens",
        "Williams 1992",
        {
            "verl": {"surrogate": "clipped_weight", "ratio_level": "token", "weight_high": 2.0, **_CLAMP},
            "nemo": _SAME,
            "roll": _SAME,
        },
        {"verl": "bypass mode with rollout_is: -sg(min(r, 2)) A logp, old_logprobs being those of the rollout"},
    ),
    "rloo": Preset(
        {"surrogate": "reinforce", "aggregate": "sequence_sum", **_FREE},
        "-A sum_t logp, mean over sequences; A with leave-one-out baseline",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        {
            "trl": {"surrogate": "clip", "ratio_level": "sequence_sum", **_EVEN, "aggregate": "sequence_mean"},
            **{name: {**_AS_CLIP, **fields} for name, fields in _CLIP.items()},
        },
        {
            "trl": "the KL (k1 summed over the sequence, 0.05) is in the rewards",
            **dict.fromkeys(_CLIP, "leave-one-out advantages into the trainer's PPO loss"),
        },
    ),
    "gpg": Preset(
        {"surrogate": "reinforce", **_FREE},
        "-A logp, mean over tokens; A scaled by the share of informative samples",
        "Chu et al. 2025, arXiv 2504.02546",
        {"verl": _SAME},
    ),
    "ppo": Preset(
        {},
        "-min(r A, clip(r, 1-low, 1+high) A), mean over tokens",
        "Schulman et al. 2017, arXiv 1707.06347, eq. 7",
        {
            "trl": _SAME,
            **_CLIP,
            "slime": {"aggregate": "sequence_mean"},
            "roll": {"aggregate": "sequence_mean"},
            "torchtune": {"clip_low": 0.1, "clip_high": 0.1},
            "liger": _SAME,
        },
        {
            "skyrl": _SKYRL_SUM,
            "roll": "dual_clip_loss adds dual_clip = 1 + 2 pg_clip",
            "trl": "without the critic: GRPOTrainer's clip (loss_type='bnpo')",
            "liger": "loss_type='bnpo'",
        },
    ),
    "grpo": Preset(
        {"aggregate": "sequence_mean", "kl": "k3", "kl_coef": 0.04},
        "-min(r A, clip(r) A) + beta k3, mean over sequences of token means",
        "Shao et al. 2024, arXiv 2402.03300, eq. 3",
        {
            "trl": _NO_KL,
            "verl": {**_DUAL, "aggregate": "token_mean", **TRAINER_KL["verl"]},
            "openrlhf": {**_CLAMP, "aggregate": "token_mean", **TRAINER_KL["openrlhf"]},
            "slime": _NO_KL,
            "nemo": {"aggregate": "token_mean", **TRAINER_KL["nemo"]},
            "skyrl": {**_CLAMP, **_SUM, **TRAINER_KL["skyrl"]},
            "areal": {"aggregate": "token_mean", **_NO_KL},
            "roll": _NO_KL,
            "torchtune": {"clip_low": 0.1, "clip_high": 0.1, "aggregate": "token_mean", **TRAINER_KL["torchtune"]},
            "liger": _SAME,
        },
        {
            "trl": "beta is 0 by default; with a beta the KL is multiplied by the ratio (`TRAINER_KL`)",
            "skyrl": _SKYRL_SUM,
            "slime": "use_kl_loss adds the KL of `TRAINER_KL`; use_unbiased_kl is kl_gradient='ratio_weighted', the "
            "bound then on the product",
            "areal": "the KL is in the rewards",
            "roll": "use_kl_loss adds the KL of `TRAINER_KL`",
        },
    ),
    "dr_grpo": Preset(
        {"aggregate": "constant"},
        "-min(r A, clip(r) A), sum over tokens / (sequences x constant); A = R - mean",
        "Liu et al. 2025, arXiv 2503.20783",
        {"trl": _SAME, "verl": _DUAL, "skyrl": _CLAMP, "roll": _SAME, "liger": _SAME},
        {
            "trl": "constant is max_completion_length",
            "verl": "constant is the padded length unless loss_scale_factor is set",
            "skyrl": "for advantages that are not scaled beforehand",
            "roll": _ROLL_CONSTANT,
        },
    ),
    "dapo": Preset(
        {"clip_high": 0.28},
        "-min(r A, clip(r, 0.8, 1.28) A), mean over all tokens",
        "Yu et al. 2025, arXiv 2503.14476, eq. 8",
        {
            "trl": {"clip_high": 0.2},
            **_CLIP,
            "slime": _SAME,
            "roll": _SAME,
            "liger": {"clip_high": 0.2},
        },
        {"skyrl": _SKYRL_SUM, "slime": "with calculate_per_token_loss"},
    ),
    "bnpo": Preset(
        {},
        "-min(r A, clip(r) A), mean over the tokens of the local micro-batch",
        "TRL loss_type='bnpo'",
        {
            "trl": _SAME,
            "skyrl": _CLAMP,
            "areal": _SAME,
            "torchtune": {"clip_low": 0.1, "clip_high": 0.1},
            "liger": _SAME,
        },
        {"skyrl": "token_mean_legacy, for advantages that are not scaled beforehand"},
    ),
    "gspo": Preset(
        {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"},
        "-min(s A, clip(s) A), s = exp(mean_t log r), mean over sequences",
        "Zheng et al. 2025, arXiv 2507.18071, eq. 5",
        {
            "trl": _EVEN,
            "verl": {"ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0, **_EVEN, **_EPS},
            "openrlhf": {**_EVEN, **_EPS},
            "slime": _EVEN,
            "nemo": {**_EVEN, **_EPS},
            "skyrl": {"ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0, **_EVEN, **_SUM},
            "areal": {**_EVEN, "aggregate": "token_mean"},
            "roll": _EVEN,
            "liger": _EVEN,
        },
        {
            "skyrl": _SKYRL_SUM,
            "areal": "advantages are averaged over the sequence first",
            "roll": "importance_sampling: seq",
        },
    ),
    "gspo_token": Preset(
        {"ratio_level": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"},
        "as gspo, value of s, gradient of the token's own log-prob",
        "Zheng et al. 2025, arXiv 2507.18071, eq. 13",
        {
            "verl": {"sequence_log_ratio_max": 10.0, **_EVEN, **_EPS},
            "skyrl": {"sequence_log_ratio_max": 10.0, **_EVEN, **_SUM},
        },
        {"verl": "its name there is gspo", "skyrl": f"its name there is gspo; {_SKYRL_SUM}"},
    ),
    "gmpo": Preset(
        {
            "surrogate": "geometric",
            "ratio_level": "none",
            "clip_low": 0.4,
            "clip_high": 0.4,
            "aggregate": "sequence_mean",
        },
        "-exp(mean_t onesided_clip(log r, -low, high)) A, mean over sequences",
        "Zhao et al. 2025, arXiv 2507.20673",
        {"trl": _SAME, "verl": {**_EVEN, **_EPS}},
        {"trl": "experimental", "verl": "its name there is geo_mean"},
    ),
    "cispo": Preset(
        {"surrogate": "clipped_weight", "weight_high": 5.0, **_OPEN},
        "-sg(min(r, weight_high)) A logp, mean over tokens",
        "MiniMax-M1 2025, arXiv 2506.13585, eq. 4; the bound 5 is TRL's, after ScaleRL",
        {
            "trl": _SAME,
            "verl": {"weight_low": 0.8, "weight_high": 1.2, **_CLAMP},
            "slime": {"weight_low": 0.8, "weight_high": 1.2},
            "nemo": {"weight_low": 0.8, "weight_high": 1.2},
            "skyrl": {"weight_low": 0.0, "weight_high": 5.0, **_CLAMP, **_SUM},
            "roll": {"weight_low": 0.9, "weight_high": 1.1},
            "liger": _SAME,
        },
        {
            **dict.fromkeys(("verl", "slime", "nemo", "roll"), "its widths are around 1: weight_high = 1 + eps_high"),
            "skyrl": _SKYRL_SUM,
        },
    ),
    "sapo": Preset(
        {"surrogate": "sapo", "aggregate": "sequence_mean", **_OPEN},
        "-(4/tau) sigmoid(tau (r - 1)) A, tau by the sign of A, mean over sequences of token means",
        "Gao et al. 2025, arXiv 2511.20347",
        {
            "trl": _SAME,
            "verl": {**_CLAMP, **_EPS},
            "skyrl": {**_CLAMP, **_SUM},
            "areal": {"aggregate": "token_mean"},
            "liger": _SAME,
        },
        {"skyrl": _SKYRL_SUM},
    ),
    "vespo": Preset(
        {"surrogate": "vespo", **_FREE},
        "-sg(exp(lambda + k log w - lambda w)) A logp, w the sequence weight, mean over tokens",
        "arXiv 2602.10693",
        {"trl": _SAME, "liger": _SAME},
    ),
    "luspo": Preset(
        {"ratio_level": "sequence", "clip_low": 2e-3, "clip_high": 2.5e-3, "aggregate": "sequence_sum"},
        "gspo's loss times the length of the sequence, mean over sequences",
        "arXiv 2602.05261",
        {"trl": _EVEN, "liger": _EVEN},
        {"liger": _LIGER_LUSPO},
    ),
    "opmd": Preset(
        {"surrogate": "reinforce", "kl": "k2", "kl_coef": 0.1, "kl_to": "old", **_FREE},
        "-A logp + tau/2 (logp - old)^2, mean over tokens",
        "Kimi k1.5 2025, arXiv 2501.12599, eq. 3, squared per token as trainers do",
        {"verl": _SAME, "roll": _SAME},
        {
            "verl": "its name there is dro; dro_beta, which is kl_coef, has no default",
            "roll": "its name there is kimi15",
        },
    ),
    "opmd_sequence": Preset(
        {"surrogate": "square", "ratio_level": "sequence_sum", "aggregate": "sequence_mean", **_OPEN},
        "(A - tau u)^2 / (2 tau), u = sum_t (logp - old), mean over sequences",
        "Kimi k1.5 2025, arXiv 2501.12599, eq. 3, as the paper has it",
    ),
    "topr": Preset(
        {"surrogate": "topr", "weight_low": 0.0, "weight_high": 1.0, **_OPEN},
        "positive: -A logp; negative: -sg(clip(r, 0, 1)) A logp; mean over tokens",
        "Le Roux et al. 2025, arXiv 2503.14286",
        {"roll": _SAME},
        {"roll": _TOPR_SIGN},
    ),
    "dppo_tv": Preset(
        {"surrogate": "divergence_tv", "carrier": "ratio"},
        "-A r keep, keep: p - q <= high for A > 0, >= -low for A <= 0; mean over tokens",
        "Qi et al. 2026, arXiv 2602.04879",
        {
            "verl": {"carrier": "logprob", "weight_high": 3.0, **_CLAMP},
            "prime": {"ratio_anchor": "rollout", **TRAINER_KL["prime"], **_SUM},
            "skyrl": {"ratio_anchor": "rollout", **_CLAMP, **_SUM},
        },
        {
            "verl": "clip_ratio_c, the dual clip's bound elsewhere, is weight_high here",
            "prime": "its default loss; its loss 'ipo' is surrogate='divergence_tv_symmetric' with clip_high=0.1",
            "skyrl": _SKYRL_SUM,
        },
    ),
    "dppo_kl": Preset(
        {"surrogate": "divergence_kl", "carrier": "ratio", "clip_low": 0.05, "clip_high": 0.05},
        "-A r keep, keep: binary KL(q || p) within the bound unless the move goes on; mean over tokens",
        "Qi et al. 2026, arXiv 2602.04879",
        {
            "verl": {"carrier": "logprob", "weight_high": 3.0, **_CLAMP},
            "skyrl": {"ratio_anchor": "rollout", **_CLAMP, **_SUM},
        },
        {"skyrl": _SKYRL_SUM},
    ),
    "clip_cov": Preset(
        {},
        "PPO-clip; pass selection=covariance_keep_mask(...) to detach tokens of high covariance; mean over tokens",
        "Cui et al. 2025, arXiv 2505.22617",
        {"verl": _SAME, "skyrl": _SUM},
        {"skyrl": _SKYRL_SUM},
    ),
    "kl_cov": Preset(
        {"surrogate": "importance", "kl": "abs", "kl_to": "old", "kl_coef": 1.0, "kl_fraction": 2e-4, **_OPEN},
        "-A r + c |logp - old| on the tokens of largest covariance; mean over tokens",
        "Cui et al. 2025, arXiv 2505.22617",
        {"verl": {"kl_coef": 0.1}, "skyrl": {"kl_fraction": 0.2, **_SUM}},
        {"skyrl": _SKYRL_SUM},
    ),
}


def _found(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_fields(name: str, style: str | None = None, given: Fields | None = None) -> dict[str, Any]:
    """Return the fields of a preset in a style, ready to be updated by the caller's own fields.

    Args:
        name: a preset.
        style: None for the preset itself, or a trainer of `TRAINERS` that has the loss.
        given: the fields that the caller sets. They are not merged here. They remove fields of the preset that qualify
            a replaced one: `aggregate="token_mean"` drops the `denominator_eps` of another aggregate, and
            `aggregate="sequence_mean"` gets the trainer's.

    Raises:
        ValueError: unknown preset, unknown trainer, or a trainer without the loss. The message lists the known ones.
    """
    preset = _found(name)
    fields = dict(preset.fields)
    if style is not None:
        if style not in TRAINERS:
            differing = ", ".join(key for key, value in preset.styles.items() if value) or "none"
            raise ValueError(
                f"preset {name!r} has no style {style!r}; styles that differ from the paper: {differing}; "
                f"known trainers: {', '.join(TRAINERS)}"
            )
        if style not in preset.styles:
            owners = ", ".join(preset.styles) or "no trainer"
            raise ValueError(
                f"{TRAINERS[style].split()[0]} has no {name!r} loss, so style={style!r} has no meaning here; "
                f"preset {name!r} has the styles of {owners}"
            )
        fields |= preset.styles[style]
    chosen = given or {}
    for owner, dependents in _QUALIFIERS.items():
        # One divergence in place of another keeps the fields that both have.
        related = all(str(f.get(owner)).startswith("divergence") for f in (fields, chosen))
        if owner in chosen and not related:
            for dependent in dependents:
                fields.pop(dependent, None)
    if style is not None and style in _LENGTH_EPS and chosen.get("aggregate") == "sequence_mean":
        fields["denominator_eps"] = _LENGTH_EPS[style]
    merged = {**fields, **chosen}
    if style in _CLAMPS_PRODUCT and merged.get("kl_gradient") == "ratio_weighted" and merged.get("kl_value_clamp"):
        fields["kl_value_clamp_order"] = "after"
    return fields


# What a trainer adds to each length in a mean over tokens of a sequence.
_LENGTH_EPS: Mapping[str, float] = dict.fromkeys(("verl", "openrlhf", "nemo"), 1e-8)


# Trainers that bound the KL estimate times its ratio, where others bound the estimate.
_CLAMPS_PRODUCT = ("slime", "nemo")


# Fields that mean something only for some values of another field.
_QUALIFIERS: Mapping[str, frozenset[str]] = {
    "aggregate": frozenset({"denominator_eps"}),
    "ratio_level": frozenset({"sequence_log_ratio_max"}),
    "kl": frozenset(
        {
            "kl_coef",
            "kl_gradient",
            "kl_ratio_anchor",
            "kl_log_ratio_clamp",
            "kl_value_clamp",
            "kl_value_clamp_order",
            "kl_fraction",
        }
    ),
    "surrogate": frozenset({"carrier", "weight_low", "weight_high", "dual_clip", "square_tau"}),
}


def describe(name: str) -> str:
    """Return a preset as text: formula, source, fields, and each trainer that has it with its differences.

    Raises:
        ValueError: unknown preset; the message lists the known ones.
    """
    return described(name, _found(name), "PolicyLoss")
