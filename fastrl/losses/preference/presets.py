"""Preference losses of the field by name: each is a value of `PreferenceLoss`, with its paper and its trainers.

No other place states a preset's formula, source and defaults. `PreferenceLoss.preset` builds from them, `describe`
prints them, and `scripts/make_docs.py` writes the tables of docs/losses.md. An empty style means that the trainer
agrees with the preset.

In the formulas z = beta (u_w - u_l), z_w = beta u_w and z_l = beta u_l, with u = sum_t (logp - ref) of the chosen (w)
and the rejected (l) completion. logp is the sum over its tokens, |y| their number, e the label_smoothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastrl.losses.preference.terms import Term
from fastrl.losses.preset import Fields, Preset, described, shown

_SAME: Fields = {}
# Reference-free losses: mean or sum log-probs, with the NLL of the chosen completion if the paper has it.
_FREE: Fields = {"reference": False}
_NLL: Fields = {"sft_coef": 1.0, "sft_optional": True, "sft_normalise": "tokens"}
_TRL: Mapping[str, Fields] = {"trl": _SAME}
_TRL_LIGER: Mapping[str, Fields] = dict.fromkeys(("trl", "liger"), _SAME)
_SUMMED: Fields = {"score_normalise": None}
_EXPERIMENTAL = "experimental"
_CPO_TRAINER = "CPOTrainer adds CPO's NLL unless cpo_alpha=0.0"

PRESETS: Mapping[str, Preset] = {
    "sigmoid": Preset(
        {},
        "-log sigmoid(z); smoothed: -(1-e) log sigmoid(z) - e log sigmoid(-z)",
        "DPO, Rafailov et al. 2023, arXiv 2305.18290, eq. 7",
        {**dict.fromkeys(("trl", "openrlhf", "areal", "roll", "torchtune", "liger"), _SAME), "nemo": {"beta": 0.05}},
        {"openrlhf": "its label_smoothing is conservative DPO"},
    ),
    "sigmoid_norm": Preset(
        {"score_normalise": "length"},
        "-log sigmoid(beta (u_w / |y_w| - u_l / |y_l|))",
        "DPO of mean log-ratios",
        {"trl": _SAME, "nemo": {"beta": 0.05}},
        {"nemo": "preference_average_log_probs"},
    ),
    "ipo": Preset(
        {"terms": (Term("margin", "square"),), "smoothing": None, "score_normalise": "length"},
        "(u_w / |y_w| - u_l / |y_l| - 1/(2 beta))^2",
        "Azar et al. 2023, arXiv 2310.12036, eq. 17, which sums; the mean over the length is TRL's",
        {"trl": _SAME, "areal": _SAME, "openrlhf": _SUMMED, "roll": _SUMMED},
    ),
    "hinge": Preset(
        {"terms": (Term("margin", "hinge"),), "smoothing": None},
        "max(0, 1 - z)",
        "SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv 2309.06657",
        {**_TRL_LIGER, "torchtune": _SAME},
        {"torchtune": "its name there is RSO"},
    ),
    "robust": Preset(
        {"smoothing": "robust"},
        "(-(1-e) log sigmoid(z) + e log sigmoid(-z)) / (1 - 2e): unbiased under flipped labels",
        "Chowdhury et al. 2024, arXiv 2403.00409",
        _TRL_LIGER,
    ),
    "exo_pair": Preset(
        {"terms": (Term("margin", "exo"),), "smoothing": "target", "label_smoothing": 1e-3},
        "KL((q, 1-q) || (1-e, e)), q = sigmoid(z)",
        "EXO, Ji et al. 2024, arXiv 2402.00856, eq. 16",
        _TRL_LIGER,
    ),
    "nca_pair": Preset(
        {
            "terms": (
                Term("chosen", "logistic"),
                Term("chosen", "logistic", sign=-1.0, weight=0.5),
                Term("rejected", "logistic", sign=-1.0, weight=0.5),
            ),
            "smoothing": None,
        },
        "-log sigmoid(z_w) - 1/2 log sigmoid(-z_w) - 1/2 log sigmoid(-z_l)",
        "NCA, Chen et al. 2024, arXiv 2402.05369",
        _TRL_LIGER,
    ),
    "bco_pair": Preset(
        {"terms": (Term("chosen", "logistic"), Term("rejected", "logistic", sign=-1.0)), "smoothing": None},
        "-log sigmoid(z_w) - log sigmoid(-z_l)",
        "BCO, Jung et al. 2024, arXiv 2404.04656, on pairs and without its baseline",
        _TRL_LIGER,
    ),
    "sppo_hard": Preset(
        {"terms": (Term("chosen", "square"), Term("rejected", "square", sign=-1.0)), "smoothing": None},
        "(u_w - 1/(2 beta))^2 + (u_l + 1/(2 beta))^2",
        "SPPO, Wu et al. 2024, arXiv 2405.00675, eq. 4.7, hard probabilities",
        _TRL_LIGER,
    ),
    "aot": Preset(
        {"terms": (Term("sorted_margin", "logistic"),)},
        "-log sigmoid(beta (sort(logp_w - logp_l) - sort(ref_w - ref_l))), sorted over the batch",
        "AOT, Melnyk et al. 2024, arXiv 2406.05882, paired",
        _TRL,
    ),
    "aot_unpaired": Preset(
        {"terms": (Term("sorted_scores", "logistic"),)},
        "-log sigmoid(beta (sort(u_w) - sort(u_l))), sorted over the batch",
        "AOT, Melnyk et al. 2024, arXiv 2406.05882, unpaired",
        _TRL,
    ),
    "apo_zero": Preset(
        {"terms": (Term("chosen", "sigmoid"), Term("rejected", "sigmoid", sign=-1.0)), "smoothing": None},
        "1 - sigmoid(z_w) + sigmoid(z_l)",
        "APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7",
        _TRL_LIGER,
    ),
    "apo_down": Preset(
        {"terms": (Term("chosen", "sigmoid", sign=-1.0), Term("margin", "sigmoid")), "smoothing": None},
        "sigmoid(z_w) + 1 - sigmoid(z)",
        "APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8",
        _TRL_LIGER,
    ),
    "discopop": Preset(
        {"terms": (Term("margin", "discopop"),), "smoothing": None, "tau": 0.05},
        "-(1 - M) log sigmoid(z) + M exp(-z), M = sigmoid(z / tau)",
        "DiscoPOP, Lu et al. 2024, arXiv 2406.08414, eq. 5",
        _TRL_LIGER,
    ),
    "sft": Preset(
        {"terms": (), "smoothing": None, "sft_coef": 1.0, "sft_normalise": "tokens"},
        "-logp_w, mean over the chosen tokens",
        "maximum likelihood",
        _TRL,
    ),
    "cpo": Preset(
        {**_FREE, **_NLL},
        "-log sigmoid(beta (logp_w - logp_l)) - logp_w / tokens",
        "CPO, Xu et al. 2024, arXiv 2401.08417",
        _TRL_LIGER,
        {"trl": _EXPERIMENTAL},
    ),
    "simpo": Preset(
        {**_FREE, "reduce": "mean", "beta": 2.0, "margin": 0.5},
        "-log sigmoid(beta (logp_w / |y_w| - logp_l / |y_l|) - margin)",
        "SimPO, Meng et al. 2024, arXiv 2405.14734, eq. 6",
        {name: {"beta": 0.1, **_NLL} for name in ("trl", "liger")},
        {"trl": f"{_EXPERIMENTAL}; {_CPO_TRAINER}", "liger": "adds the NLL unless compute_nll_loss=False"},
    ),
    "alphapo": Preset(
        {**_FREE, "reduce": "mean", "beta": 2.0, "alpha": 0.25},
        "as simpo of (1 - p^-alpha) / alpha, p = exp(logp / |y|)",
        "AlphaPO, Gupta et al. 2025, arXiv 2501.03884",
        {"trl": {"beta": 0.1, **_NLL}},
        {"trl": f"{_EXPERIMENTAL}; {_CPO_TRAINER}; alpha=0.0, which is SimPO, until it is set"},
    ),
    "orpo": Preset(
        {
            **_FREE,
            "terms": (Term("margin", "scaled_logistic"),),
            "smoothing": None,
            "reduce": "mean",
            "odds": True,
            **_NLL,
        },
        "-beta log sigmoid(o_w - o_l) - logp_w / tokens, o = log(p / (1 - p)), p = exp(logp / |y|)",
        "ORPO, Hong et al. 2024, arXiv 2403.07691",
        _TRL_LIGER,
        {"trl": f"{_EXPERIMENTAL}; its NLL runs over prompt and completion"},
    ),
    "kto": Preset(
        {"terms": (Term("label", "sigmoid"),), "smoothing": None, "shift": "reference_point"},
        "weight (1 - sigmoid(+-(beta u - beta z0))), + where desirable; z0 = max(0, mean u of mismatched completions)",
        "KTO, Ethayarajh et al. 2024, arXiv 2402.01306",
        {**_TRL_LIGER, "openrlhf": {"shift": "paired_mean"}},
        {
            "liger": "the reference point is passed in",
            "openrlhf": "z0 is that of the rows with the other label, its gradient kept",
        },
    ),
    "apo_zero_unpaired": Preset(
        {"terms": (Term("label", "sigmoid"),), "smoothing": None},
        "weight (1 - sigmoid(+-beta u)): kto with z0 = 0",
        "APO, D'Oosterlinck et al. 2024, arXiv 2408.06266, on single rows",
        _TRL,
    ),
    "bco": Preset(
        {"terms": (Term("label", "logistic"),), "smoothing": None, "shift": "baseline"},
        "-weight log sigmoid(+-(beta u - delta)), delta a running mean of beta u",
        "BCO, Jung et al. 2024, arXiv 2404.04656",
        _TRL,
        {"trl": "up to version 1.10"},
    ),
}

# Names under which trainers know a field.
ALIASES = {
    "gamma": "margin",
    "simpo_gamma": "margin",
    "ld_alpha": "length_desensitisation",
    "nll_coef": "sft_coef",
    "discopop_tau": "tau",
}


def _found(name: str) -> Preset:
    if name not in PRESETS:
        raise ValueError(f"unknown preference loss {name!r}; known: {', '.join(PRESETS)}; DPO is 'sigmoid'")
    return PRESETS[name]


def preset_fields(name: str, style: str | None = None) -> dict[str, Any]:
    """Return the fields of a preset in a style.

    Raises:
        ValueError: unknown preset, or a style that the preset does not have, with the known ones.
    """
    preset = _found(name)
    if style is not None and style not in preset.styles:
        raise ValueError(f"style of {name!r} must be one of {', '.join(map(repr, preset.styles))}, got {style!r}")
    return {"name": name, **preset.fields, **(preset.styles[style] if style is not None else {})}


def shown_fields(fields: Fields) -> str:
    """Return fields as arguments in a call, without the terms, which the formula states."""
    return shown({key: value for key, value in fields.items() if key not in ("terms", "smoothing", "sft_optional")})


def describe(name: str) -> str:
    """Return a preset as text: formula, source, fields, and each trainer that has it with its differences.

    Raises:
        ValueError: unknown preset; the message lists the known ones.
    """
    return described(name, _found(name), "PreferenceLoss", shown_fields)
