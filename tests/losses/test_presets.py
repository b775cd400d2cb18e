"""Presets in the styles of the trainers, built by name and judged by what the trainers' own code returns."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from golden import Case, cases
from golden_policy import call

from fastrl import PolicyLoss
from fastrl.losses.policy.presets import PRESETS, TRAINER_KL, TRAINERS, describe, preset_fields

STYLE_OF = {
    "TRL": "trl", "verl": "verl", "OpenRLHF": "openrlhf", "slime": "slime", "NeMo-RL": "nemo", "SkyRL": "skyrl",
    "prime-rl": "prime", "AReaL": "areal", "ROLL": "roll", "torchtune": "torchtune", "Liger-Kernel": "liger",
}  # fmt: skip
NUMBERS = (
    "clip_low", "clip_high", "weight_low", "weight_high", "dual_clip", "max_ratio", "tau_pos", "tau_neg", "k_pos",
    "k_neg", "lambda_pos", "lambda_neg", "entropy_coef", "constant",
)  # fmt: skip
ESTIMATOR = ("kl", "kl_gradient", "kl_log_ratio_clamp", "kl_value_clamp")

# Trainer, its name of the setting, the preset, and the switches of the trainer that the setting turns: fields that are
# passed beside the numbers. "KL" stands for the trainer's own form of the KL term.
NAMED: list[tuple[str, str, str, tuple[str, ...]]] = [
    ("areal", "ppo|dual|tis|icepop", "ppo", ()),
    ("areal", "gspo|sapo", "=", ()),
    ("liger", "grpo", "grpo", ("kl_gradient",)),
    ("liger", "bnpo|dr_grpo|dapo", "=", ("KL", "kl_gradient")),
    ("liger", "dapo plain", "dapo", ("KL",)),
    ("liger", "cispo|sapo|vespo|luspo|gspo", "=", ()),
    ("nemo", "grpo token", "dapo", ()),
    ("nemo", "grpo seq", "ppo", ("aggregate",)),
    ("nemo", "on policy", "ppo", ("ratio_anchor",)),
    ("nemo", "dual|tis|icepop|seq mask tis|vapo", "ppo", ()),
    ("nemo", "kl", "grpo", ()),
    ("nemo", "reinforce|gspo|cispo", "=", ()),
    ("openrlhf", "gspo", "gspo", ()),
    ("openrlhf", "gspo rollout anchor", "gspo", ("ratio_anchor",)),
    ("openrlhf", "ppo (global )?sequence", "ppo", ("aggregate",)),
    ("openrlhf", "ppo (global )?token|dual clip|token advantages|tis|icepop|seq mask tis", "ppo", ()),
    ("openrlhf", "(token|seq) (binary kl|tv)", "ppo", ()),
    ("prime", "default", "dppo_tv", ()),
    ("prime", "ipo", "dppo_tv", ("surrogate",)),
    ("prime", "ref_kl", "dppo_tv", ("clip_high",)),
    ("prime", "ce", "sft", ()),
    ("roll", "ppo dual", "ppo", ("aggregate",)),
    ("roll", "vanilla", "reinforce", ()),
    ("roll", "tis pg|cispo", "cispo", ()),
    ("roll", "topr", "topr", ()),
    ("roll", "kimi15", "opmd", ()),
    ("skyrl", "regular|dual|tis token|tis sequence", "ppo", ()),
    ("skyrl", "gspo|cispo|sapo|kl_cov|clip_cov|dppo_kl", "=", ()),
    ("skyrl", "dppo", "dppo_tv", ()),
    ("skyrl", "dppo kl", "dppo_kl", ()),
    ("skyrl", "cross entropy", "sft", ()),
    ("skyrl", "reduction token_mean_legacy", "bnpo", ()),
    ("skyrl", "reduction seq_mean_token_sum_norm", "dr_grpo", ()),
    ("skyrl", "reduction (token_mean|sequence_mean|prompt_mean)", "ppo", ("aggregate",)),
    ("slime", "ppo|opsm", "ppo", ()),
    ("slime", "dual", "dapo", ()),
    ("slime", "cispo|gspo", "=", ()),
    ("torchtune", "grpo", "grpo", ()),
    ("trl", "grpo|bnpo|dr_grpo|dapo|gspo|cispo|sapo|vespo|gmpo|rloo", "=", ()),
    ("trl", "luspo_sequence", "luspo", ()),
    ("trl", r"(grpo|bnpo|dapo|vespo)\+(delta|opsm_\w+|top_entropy|entropy_bonus|tis|mis)", "=", ()),
    ("trl", r"(grpo|dapo)\+\w+_(truncate|mask)", "=", ()),
    ("trl", r"(dapo|grpo|gspo)_(token_advantages|global_tokens|gas|tool_mask)", "=", ()),
    ("trl", r"(grpo|bnpo|dr_grpo|dapo|cispo|luspo)(_sequence)?\+k3_ratio_weighted", "=", ("KL",)),
    ("trl", r"grpo\+token_truncate\+k3", "=", ("KL",)),
    ("trl", r"(dapo|gspo|gmpo)\+k3(_plain)?", "=", ("KL", "kl_gradient")),
    ("trl", "grpo_on_policy", "grpo", ("ratio_anchor",)),
    ("trl", r"dapo_on_policy\+k3", "dapo", ("ratio_anchor", "KL")),
    ("trl", "gspo_token_mean", "gspo", ("aggregate",)),
    ("trl", r"gspo_bnpo\+k3_ratio_weighted", "gspo", ("aggregate", "KL")),
    ("trl", "(cispo|sapo)_sequence", "=", ("ratio_level",)),
    ("trl", "luspo_token", "luspo", ("ratio_level",)),
    ("verl", "dual_clip (local )?(token|seq-).*(mean|sum|norm)", "ppo", ("aggregate",)),
    ("verl", "dual_clip (token advantages|tis|icepop|sequence tis)|bypass ppo_clip", "ppo", ()),
    ("verl", "dual_clip reject .*", "ppo", ("aggregate",)),
    ("verl", r"dual_clip\+kl low_var_kl", "ppo", ("KL", "aggregate")),
    ("verl", r"dual_clip\+kl .*", "ppo", ("aggregate", *ESTIMATOR)),
    ("verl", "gspo|gspo token advantages", "gspo", ()),
    ("verl", "gpg", "gpg", ("aggregate",)),
    ("verl", "sapo|cispo|dppo_tv|dppo_kl|kl_cov|clip_cov", "=", ()),
    ("verl", "geo_mean", "gmpo", ()),
    ("verl", "dro", "opmd", ()),
    ("verl", "bypass reinforce", "reinforce", ()),
]  # fmt: skip
UNNAMED = {
    "policy__skyrl__importance__0": "-A r has no name of its own: surrogate='importance'",
    "policy__skyrl__rollout_is__0": "surrogate='masked_weight', ratio_anchor='rollout'",
    "policy__torchtune__grpo_simple__0": "surrogate='importance', ratio_anchor='self'",
}


def entry(case: Case) -> tuple[str, tuple[str, ...]]:
    """Return the preset and the switches of a case: the first entry that matches."""
    style = STYLE_OF[case.peer]
    for owner, pattern, preset, switches in NAMED:
        if owner == style and re.fullmatch(pattern, case.variant):
            own = max((name for name in PRESETS if case.variant.startswith(name)), key=len, default="")
            return (own if preset == "=" else preset), switches
    raise LookupError(f"{case.id}: no preset is named for {style} {case.variant!r}")


def built(case: Case) -> PolicyLoss:
    """Return the preset in the trainer's style with the case's numbers, and only the switches that `NAMED` states."""
    style, (name, switches) = STYLE_OF[case.peer], entry(case)
    fields: dict[str, Any] = {}
    if "KL" in switches:
        fields |= TRAINER_KL[style]
    fields |= {field: case.hyper[field] for field in NUMBERS if case.hyper[field] is not None}
    fields |= {field: case.hyper[field] for field in switches if field != "KL"}
    if fields.get("aggregate") == "sequence_mean" and case.hyper["denominator_eps"]:
        fields["denominator_eps"] = case.hyper["denominator_eps"]
    if fields.get("aggregate") == "microbatch_token_mean":
        fields["aggregate"] = "token_mean"
    if case.hyper["kl_coef"]:
        fields["kl_coef"] = case.hyper["kl_coef"]
    if case.hyper.get("kl_tokens"):
        fields["kl_fraction"] = case.hyper["kl_tokens"]["fraction"]
    if case.hyper["correction"]:
        known = ("level", "op", "statistic", "low", "high", "log_weight_clamp", "batch_normalize")
        fields["correction"] = {k: v for k, v in case.hyper["correction"].items() if k in known}
    return PolicyLoss.preset(name, style=style, **fields)


NAMED_CASES = [case for case in cases("policy") if case.id not in UNNAMED]


@pytest.mark.parametrize("case", NAMED_CASES, ids=lambda case: case.id)
def test_a_style_is_the_trainers_loss(case: Case) -> None:
    inputs = case.leaves(torch.float64)
    loss = call(case, built(case), inputs)
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(inputs)


@pytest.mark.parametrize("case", cases("supervised"), ids=lambda case: case.id)
def test_supervised_styles(case: Case) -> None:
    name = "dft" if case.hyper["loss"] == "dft" else "sft"
    fields = {"aggregate": "sequence_mean", "denominator_eps": 1e-8} if case.variant == "sft False" else {}
    inputs = case.leaves(torch.float64)
    loss = PolicyLoss.preset(name, style=STYLE_OF[case.peer], **fields)(n_tokens=case.hyper["n_tokens"], **inputs).loss
    case.check("loss", loss)
    loss.backward()
    case.check_gradients(inputs)


def test_every_style_with_a_golden_case_is_tested() -> None:
    """Each entry of the table is used, every case is named or listed as nameless, and every trainer has a style."""
    assert set(UNNAMED) <= {case.id for case in cases("policy")}
    reached = {(STYLE_OF[case.peer], entry(case)[0]) for case in NAMED_CASES}
    assert {style for style, _ in reached} == set(TRAINERS)
    for style, name in reached:
        assert style in PRESETS[name].styles, (style, name)


@pytest.mark.parametrize("name", PolicyLoss.presets())
def test_every_trainer_is_accepted_or_said_not_to_have_the_loss(name: str) -> None:
    for style, version in TRAINERS.items():
        if style in PRESETS[name].styles:
            assert isinstance(PolicyLoss.preset(name, style=style), PolicyLoss)
        else:
            with pytest.raises(ValueError, match=f"{version.split()[0]} has no '{name}' loss.*has the styles of "):
                PolicyLoss.preset(name, style=style)
    assert set(PRESETS[name].notes) <= set(PRESETS[name].styles)


def test_styles_follow_the_feature_table() -> None:
    """Who has which loss, as read from the trainers' code."""
    owners = {
        "dft": "trl", "gpg": "verl", "gmpo": "trl verl", "vespo": "trl liger", "luspo": "trl liger", "topr": "roll",
        "cispo": "trl verl slime nemo skyrl roll liger", "sapo": "trl verl skyrl areal liger",
        "dppo_tv": "verl skyrl prime", "clip_cov": "verl skyrl", "kl_cov": "verl skyrl", "opmd": "verl roll",
        "dr_grpo": "trl verl skyrl roll liger", "bnpo": "trl skyrl areal torchtune liger",
        "ppo": "trl verl openrlhf slime nemo skyrl areal roll torchtune liger",
    }  # fmt: skip
    for name, styles in owners.items():
        assert set(PRESETS[name].styles) == set(styles.split()), name


@pytest.mark.parametrize(
    ("name", "style", "expected"),
    [
        ("ppo", "verl", {"dual_clip": 3.0, "log_ratio_clamp": 20.0, "clip_low": 0.2, "clip_high": 0.2}),
        ("ppo", "openrlhf", {"dual_clip": None, "log_ratio_clamp": 20.0}),
        ("ppo", "torchtune", {"clip_low": 0.1, "clip_high": 0.1}),
        ("grpo", None, {"kl": "k3", "kl_coef": 0.04, "aggregate": "sequence_mean"}),
        ("grpo", "trl", {"kl": None, "kl_coef": 0.0, "aggregate": "sequence_mean"}),
        ("grpo", "nemo", {"kl_coef": 0.01, "aggregate": "token_mean"}),
        ("grpo", "torchtune", {"kl_coef": 0.1, "kl_gradient": "plain"}),
        ("grpo", "verl", {"kl_coef": 0.001, "kl_log_ratio_clamp": 20.0, "kl_value_clamp": 10.0}),
        ("dapo", None, {"clip_low": 0.2, "clip_high": 0.28}),
        ("dapo", "trl", {"clip_low": 0.2, "clip_high": 0.2}),
        ("gspo", None, {"clip_low": 3e-4, "clip_high": 4e-4}),
        ("gspo", "trl", {"clip_low": 0.2, "clip_high": 0.2}),
        ("luspo", None, {"clip_low": 2e-3, "clip_high": 2.5e-3}),
        ("gmpo", None, {"clip_low": 0.4, "clip_high": 0.4}),
        ("cispo", None, {"weight_low": None, "weight_high": 5.0}),
        ("cispo", "nemo", {"weight_low": 0.8, "weight_high": 1.2}),
        ("cispo", "skyrl", {"weight_low": 0.0, "weight_high": 5.0}),
        ("cispo", "roll", {"weight_low": 0.9, "weight_high": 1.1}),
        ("sapo", None, {"tau_pos": 1.0, "tau_neg": 1.05}),
        ("vespo", None, {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}),
        ("opmd", None, {"kl_coef": 0.1}),
        ("dppo_tv", "verl", {"weight_high": 3.0, "clip_low": 0.2, "clip_high": 0.2}),
        ("dppo_tv", "prime", {"kl_coef": 2e-3, "clip_low": 0.2, "clip_high": 0.2}),
        ("dppo_kl", "verl", {"weight_high": 3.0, "clip_low": 0.05, "clip_high": 0.05}),
        ("kl_cov", None, {"kl_coef": 1.0, "kl_fraction": 2e-4}),
        ("kl_cov", "verl", {"kl_coef": 0.1, "kl_fraction": 2e-4}),
        ("kl_cov", "skyrl", {"kl_coef": 1.0, "kl_fraction": 0.2}),
    ],
)
def test_default_numbers(name: str, style: str | None, expected: dict[str, Any]) -> None:
    """What golden cases do not hold, because each case brings its own numbers."""
    loss = PolicyLoss.preset(name, style=style)
    assert {field: getattr(loss, field) for field in expected} == expected


def test_slime_and_nemo_rl_bound_the_product_of_ratio_and_estimate() -> None:
    kl = TRAINER_KL["slime"] | {"kl_coef": 0.01}
    assert PolicyLoss.preset("grpo", style="slime", **kl).kl_value_clamp_order == "before"
    unbiased = PolicyLoss.preset("grpo", style="slime", **kl, kl_gradient="ratio_weighted")
    assert unbiased.kl_value_clamp_order == "after"
    kl = TRAINER_KL["nemo"] | {"kl_coef": 0.01}
    assert PolicyLoss.preset("dapo", style="nemo", **kl).kl_value_clamp_order == "after"
    assert PolicyLoss.preset("grpo", style="nemo").kl_value_clamp_order == "after"
    assert PolicyLoss.preset("grpo", style="nemo", kl_value_clamp=None).kl_value_clamp_order == "before"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'GRPO'; known: sft, rft"):
        preset_fields("GRPO")
    with pytest.raises(ValueError, match=r"unknown preset 'GRPO'; known: sft, rft"):
        describe("GRPO")
    with pytest.raises(ValueError, match=r"no style 'TRL'.*known trainers: trl, verl"):
        preset_fields("grpo", "TRL")


@pytest.mark.parametrize(
    ("name", "style", "given"),
    [
        ("gspo", "verl", {"aggregate": "token_mean"}),
        ("gspo", "verl", {"ratio_level": "token"}),
        ("grpo", "nemo", {"kl": None}),
        ("cispo", "trl", {"surrogate": "reinforce"}),
    ],
)
def test_fields_that_only_qualify_a_replaced_one_are_left_out(name: str, style: str, given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has no effect here|needs an estimator"):
        PolicyLoss(**(preset_fields(name, style) | given))
    loss = PolicyLoss(**(preset_fields(name, style, given) | given))
    assert all(getattr(loss, field) == value for field, value in given.items())
    assert preset_fields(name, style, {"clip_high": 0.3}) == preset_fields(name, style)


@pytest.mark.parametrize("style", TRAINERS)
def test_a_mean_over_tokens_gets_the_trainers_epsilon(style: str) -> None:
    """Read off the golden cases: what each trainer adds to the length of a sequence."""
    added = {
        case.hyper["denominator_eps"]
        for case in cases("policy")
        if STYLE_OF[case.peer] == style and case.hyper["aggregate"] == "sequence_mean"
    }
    fields = preset_fields("sft", style, {"aggregate": "sequence_mean"})
    assert added <= {fields.get("denominator_eps", 0.0)}


def test_descriptions_hold_what_the_table_holds() -> None:
    for name, preset in PRESETS.items():
        text = describe(name)
        assert preset.formula in text
        assert preset.paper in text
        assert all(style in text for style in preset.styles)
        assert not re.search(r"arXiv (?!\d{4}\.\d{5})", preset.paper), preset.paper
