"""Policy losses of the field by name: each is a value of `PolicyLoss`, with its paper and the trainers that differ."""

from __future__ import annotations

from typing import Any, NamedTuple


class Preset(NamedTuple):
    """Fields of `PolicyLoss`, the formula in one line, the paper, and what trainers do differently under the name."""

    fields: dict[str, Any]
    formula: str
    paper: str
    styles: dict[str, dict[str, Any]] = {}


_OPEN: dict[str, Any] = {"clip_low": None, "clip_high": None}
_DUAL = {"dual_clip": 3.0, "log_ratio_clamp": 20.0}
_BAND = {"weight_low": 0.8, "weight_high": 1.2}
_K3_RATIO = {"kl": "k3", "kl_gradient": "ratio_weighted"}

PRESETS: dict[str, Preset] = {
    "sft": Preset(
        {"surrogate": "nll", "ratio_level": "none", **_OPEN},
        "-logp, mean over tokens",
        "maximum likelihood",
        {"openrlhf": {"aggregate": "sequence_mean"}},
    ),
    "rft": Preset(
        {"surrogate": "nll", "ratio_level": "none", **_OPEN},
        "-logp on accepted samples, mean over tokens",
        "Yuan et al. 2023, arXiv 2308.01825",
    ),
    "dft": Preset(
        {"surrogate": "dft", "ratio_level": "none", **_OPEN},
        "-sg(p) logp, mean over tokens",
        "Wu et al. 2025, arXiv 2508.05629",
    ),
    "reinforce": Preset(
        {"surrogate": "reinforce", "ratio_level": "none", **_OPEN},
        "-A logp, mean over tokens",
        "Williams 1992",
    ),
    "rloo": Preset(
        {"surrogate": "reinforce", "ratio_level": "none", "aggregate": "sequence_sum", **_OPEN},
        "-A sum_t logp, mean over sequences; A with leave-one-out baseline",
        "Ahmadian et al. 2024, arXiv 2402.14740",
        {
            "trl": {
                "surrogate": "clip",
                "ratio_level": "sequence_sum",
                "clip_low": 0.2,
                "clip_high": 0.2,
                "aggregate": "sequence_mean",
            }
        },
    ),
    "gpg": Preset(
        {"surrogate": "reinforce", "ratio_level": "none", **_OPEN},
        "-A logp, mean over tokens; A scaled by the share of informative samples",
        "Chu et al. 2025, arXiv 2504.02546",
    ),
    "ppo": Preset(
        {},
        "-min(r A, clip(r, 1-low, 1+high) A), mean over tokens",
        "Schulman et al. 2017, arXiv 1707.06347, eq. 7",
        {
            "verl": _DUAL,
            "openrlhf": {"log_ratio_clamp": 20.0},
            "skyrl": {"log_ratio_clamp": 20.0},
        },
    ),
    "grpo": Preset(
        {"aggregate": "sequence_mean", "kl": "k3", "kl_coef": 0.04},
        "-min(r A, clip(r) A) + beta k3, mean over sequences of token means",
        "Shao et al. 2024, arXiv 2402.03300, eq. 3",
        {
            "trl": {"kl": None, "kl_coef": 0.0},
            "liger": {"kl_gradient": "plain"},
            "verl": {**_DUAL, "aggregate": "token_mean", "kl_coef": 0.001, "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0},
            "slime": {"kl": None, "kl_coef": 0.0},
            "nemo": {"aggregate": "token_mean", "kl_coef": 0.01, **_K3_RATIO, "kl_ratio_anchor": "self",
                     "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0},
        },
    ),
    "dr_grpo": Preset(
        {"aggregate": "constant"},
        "-min(r A, clip(r) A), sum over tokens / (sequences x constant); A = R - mean",
        "Liu et al. 2025, arXiv 2503.20783",
    ),
    "dapo": Preset(
        {"clip_high": 0.28},
        "-min(r A, clip(r, 0.8, 1.28) A), mean over all tokens",
        "Yu et al. 2025, arXiv 2503.14476, eq. 8",
        {"trl": {"clip_high": 0.2}, "verl": {**_DUAL, "clip_high": 0.28}},
    ),
    "bnpo": Preset(
        {},
        "-min(r A, clip(r) A), mean over the tokens of the local micro-batch",
        "TRL loss_type='bnpo'",
    ),
    "gspo": Preset(
        {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"},
        "-min(s A, clip(s) A), s = exp(mean_t log r), mean over sequences",
        "Zheng et al. 2025, arXiv 2507.18071, eq. 5",
        {
            "trl": {"clip_low": 0.2, "clip_high": 0.2},
            "verl": {"ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0, "clip_low": 0.2, "clip_high": 0.2},
            "skyrl": {"ratio_level": "sequence_token", "sequence_log_ratio_max": 10.0, "clip_low": 0.2, "clip_high": 0.2},
            "areal": {"clip_low": 0.2, "clip_high": 0.2, "aggregate": "token_mean"},
        },
    ),
    "gspo_token": Preset(
        {"ratio_level": "sequence_token", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_mean"},
        "as gspo, value of s, gradient of the token's own log-prob",
        "Zheng et al. 2025, arXiv 2507.18071, eq. 13",
    ),
    "gmpo": Preset(
        {"surrogate": "geometric", "ratio_level": "none", "clip_low": 0.4, "clip_high": 0.4, "aggregate": "sequence_mean"},
        "-exp(mean_t onesided_clip(log r, -low, high)) A, mean over sequences",
        "Zhao et al. 2025, arXiv 2507.20673",
        {"verl": {"clip_low": 0.2, "clip_high": 0.2}},
    ),
    "cispo": Preset(
        {"surrogate": "clipped_weight", "weight_high": 5.0, **_OPEN},
        "-sg(min(r, weight_high)) A logp, mean over tokens",
        "MiniMax-M1 2025, arXiv 2506.13585, eq. 4",
        {"verl": {**_BAND, "log_ratio_clamp": 20.0}, "slime": _BAND, "nemo": _BAND, "roll": {"weight_low": 0.9, "weight_high": 1.1},
         "skyrl": {"weight_low": 0.0, "weight_high": 5.0, "log_ratio_clamp": 20.0}},
    ),
    "sapo": Preset(
        {"surrogate": "sapo", "aggregate": "sequence_mean", **_OPEN},
        "-(4/tau) sigmoid(tau (r - 1)) A, tau by the sign of A, mean over sequences of token means",
        "Gao et al. 2025, arXiv 2511.20347",
        {"verl": {"log_ratio_clamp": 20.0}, "skyrl": {"log_ratio_clamp": 20.0}, "areal": {"aggregate": "token_mean"}},
    ),
    "vespo": Preset(
        {"surrogate": "vespo", "ratio_level": "none", **_OPEN},
        "-sg(exp(lambda + k log w - lambda w)) A logp, w the sequence weight, mean over tokens",
        "arXiv 2602.10693",
    ),
    "luspo": Preset(
        {"ratio_level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregate": "sequence_sum"},
        "gspo's loss times the length of the sequence, mean over sequences",
        "arXiv 2602.05261",
        {"trl": {"clip_low": 0.2, "clip_high": 0.2}},
    ),
    "opmd": Preset(
        {"surrogate": "reinforce", "ratio_level": "none", "kl": "k2", "kl_coef": 0.1, "kl_to": "old", **_OPEN},
        "-A logp + tau/2 (logp - old)^2, mean over tokens",
        "Kimi k1.5 2025, arXiv 2501.12599, eq. 3 (per token, as trainers do)",
    ),
    "topr": Preset(
        {"surrogate": "topr", "weight_low": 0.0, "weight_high": 1.0, **_OPEN},
        "positive: -A logp; negative: -sg(clip(r, 0, 1)) A logp; mean over tokens",
        "Le Roux et al. 2025, arXiv 2503.14286",
    ),
    "dppo_tv": Preset(
        {"surrogate": "divergence_tv", "carrier": "ratio"},
        "-A r keep, keep: p - q <= high for A > 0, >= -low for A <= 0; mean over tokens",
        "arXiv 2602.04879",
        {"verl": {"carrier": "logprob", "weight_high": 3.0, "log_ratio_clamp": 20.0},
         "prime": {"ratio_anchor": "rollout", "kl": "k2", "kl_to": "rollout", "kl_coef": 2e-3, "aggregate": "token_sum"},
         "skyrl": {"ratio_anchor": "rollout", "log_ratio_clamp": 20.0}},
    ),
    "dppo_kl": Preset(
        {"surrogate": "divergence_kl", "carrier": "ratio", "clip_low": 0.05, "clip_high": 0.05},
        "-A r keep, keep: binary KL(q || p) within the bound unless the move goes on; mean over tokens",
        "arXiv 2602.04879",
        {"verl": {"carrier": "logprob", "weight_high": 3.0, "log_ratio_clamp": 20.0},
         "skyrl": {"ratio_anchor": "rollout", "log_ratio_clamp": 20.0}},
    ),
    "clip_cov": Preset(
        {},
        "PPO-clip; pass selection=covariance_keep_mask(...) to detach tokens of high covariance; mean over tokens",
        "Cui et al. 2025, arXiv 2505.22617",
    ),
    "kl_cov": Preset(
        {"surrogate": "importance", "kl": "abs", "kl_to": "old", "kl_coef": 1.0, "kl_fraction": 2e-4, **_OPEN},
        "-A r + c |logp - old| on the tokens of largest covariance; mean over tokens",
        "Cui et al. 2025, arXiv 2505.22617",
        {"verl": {"kl_coef": 0.1}, "skyrl": {"kl_fraction": 0.2}},
    ),
}  # fmt: skip


def preset_fields(name: str, style: str | None) -> dict[str, Any]:
    """Return the fields of a preset in a style, or raise with the known names."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    preset = PRESETS[name]
    if style is None:
        return dict(preset.fields)
    if style not in preset.styles:
        known = ", ".join(preset.styles) or "none"
        raise ValueError(f"preset {name!r} has no style {style!r}; styles that differ from the paper: {known}")
    return {**preset.fields, **preset.styles[style]}
