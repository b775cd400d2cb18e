"""The losses by name: presets of both families, and the functions beside them with formula, source and trainers.

`describe(name)` and the command `fastrl losses` print them. `scripts/make_docs.py` writes the tables of docs/losses.md
from the same entries. Every function is a public name of `fastrl`. Trainers in brackets reach the same numbers with the
options in the brackets.
"""

from __future__ import annotations

import difflib
import textwrap
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastrl.losses.policy.presets import PRESETS as POLICY
from fastrl.losses.policy.presets import describe as describe_policy
from fastrl.losses.preference.presets import PRESETS as PREFERENCE
from fastrl.losses.preference.presets import describe as describe_preference


class Entry(NamedTuple):
    """A function of `fastrl` with the options that give the formula."""

    function: str
    options: Mapping[str, Any]
    formula: str
    source: str
    trainers: str = ""

    def call(self) -> str:
        """Return the call as source code: `kl_estimate(..., estimator='k1')`."""
        given = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"{self.function}(...{given})"


_SCHULMAN = "Schulman 2020, Approximating KL divergence"
KL: tuple[Entry, ...] = (
    Entry(
        "kl_estimate", {"estimator": "k1"}, "x = logp - ref", _SCHULMAN, "verl, OpenRLHF, slime, NeMo-RL, SkyRL, ROLL"
    ),
    Entry("kl_estimate", {"estimator": "k2"}, "x^2 / 2", _SCHULMAN, "verl, OpenRLHF, slime, NeMo-RL, SkyRL, prime-rl"),
    Entry("kl_estimate", {"estimator": "k3"}, "exp(-x) - 1 + x", _SCHULMAN, "all that have a KL in the loss"),
    Entry("kl_estimate", {"estimator": "abs"}, "|x|", "verl", "verl, SkyRL, ROLL"),
    Entry(
        "kl_estimate",
        {"gradient": "ratio_weighted"},
        "r k, r = p / p_old not detached",
        "DeepSeek-V3.2",
        "TRL, slime, NeMo-RL, Liger",
    ),
    Entry("kl_estimate", {"gradient": "straight_through"}, "value of k, gradient of k2", "verl", "verl"),
    Entry(
        "kl_estimate",
        {"gradient": "straight_through_ratio"},
        "value of k, gradient of sg(min(r, ratio_max)) k2",
        "OpenRLHF",
        "OpenRLHF (ratio_max=10)",
    ),
    Entry("full_kl", {}, "sum_v p_v (log p_v - log q_v)", "the definition", "ROLL"),
    Entry(
        "kl_penalty_rewards",
        {"coef": 0.05},
        "r_t - coef k_t",
        "Ziegler et al. 2019, arXiv 1909.08593, eq. 2",
        "verl, OpenRLHF, slime, SkyRL, AReaL, TRL (RLOO)",
    ),
)

_GROUPS = {"group_size": 2}
ADVANTAGES: tuple[Entry, ...] = (
    Entry(
        "group_advantages",
        _GROUPS,
        "(R - mean) / (std + eps)",
        "GRPO, arXiv 2402.03300",
        "TRL (eps=1e-4), verl, NeMo-RL, slime, SkyRL (1e-6), OpenRLHF (1e-9)",
    ),
    Entry(
        "group_advantages",
        {**_GROUPS, "scale": "batch"},
        "(R - mean) / (std of the batch + eps)",
        "TRL",
        "TRL (scale_rewards='batch'), AReaL",
    ),
    Entry(
        "group_advantages",
        {**_GROUPS, "scale": "none"},
        "R - mean",
        "Dr. GRPO, arXiv 2503.20783",
        "TRL, verl, OpenRLHF, SkyRL, prime-rl",
    ),
    Entry(
        "group_advantages",
        {**_GROUPS, "scale": "none", "baseline": "leave_one_out"},
        "n/(n-1) (R - mean)",
        "RLOO, arXiv 2402.14740",
        "TRL, verl, OpenRLHF, SkyRL, NeMo-RL, AReaL",
    ),
    Entry(
        "group_advantages",
        {**_GROUPS, "scale": "leave_one_out", "baseline": "leave_one_out", "eps": 1e-6},
        "n/(n-1) (R - mean) / (std of the others + eps), undivided where that is 0",
        "NeMo-RL",
        "NeMo-RL",
    ),
    Entry("opo_advantages", _GROUPS, "R - sum L R / sum L", "OPO, arXiv 2505.23585", "verl"),
    Entry("maxrl_advantages", _GROUPS, "(R - mean) / (mean + eps)", "MaxRL, arXiv 2602.02710", "SkyRL, prime-rl"),
    Entry("gpg_advantages", _GROUPS, "B / nonzero (R - mean) / f_norm", "GPG, arXiv 2504.02546", "verl"),
    Entry(
        "pass_at_k_advantages",
        _GROUPS,
        "(best - second) / (std + eps) at the best completion, else 0",
        "arXiv 2503.19595",
        "verl (grpo_passk)",
    ),
    Entry(
        "gdpo_advantages",
        _GROUPS,
        "sum_k w_k (R_k - mean_k) / (std_k + eps), whitened",
        "GDPO, arXiv 2601.05242",
        "TRL, verl, NeMo-RL",
    ),
    Entry(
        "step_advantages",
        _GROUPS,
        "sum of the normalised rewards of the steps that end at or after t",
        "DeepSeekMath, arXiv 2402.03300, section 4.1.3",
    ),
    Entry(
        "reinforce_plus_plus_advantages",
        {},
        "discounted return of r - kl_coef kl, whitened over the tokens",
        "REINFORCE++, arXiv 2501.03262",
        "verl, OpenRLHF, slime, NeMo-RL, SkyRL (masked='reset')",
    ),
    Entry(
        "reinforce_plus_plus_baseline_advantages",
        _GROUPS,
        "R - mean, whitened over the tokens",
        "REINFORCE++, arXiv 2501.03262",
        "verl, OpenRLHF, slime, NeMo-RL",
    ),
    Entry("remax_advantages", {}, "return to go - R of the greedy completion", "ReMax, arXiv 2310.10505", "verl"),
    Entry(
        "otb_advantages",
        _GROUPS,
        "G_t - sum G_t W_t / sum W_t, W_t = cumsum(1 - 2 p + sum_v p_v^2)",
        "optimal token baseline",
        "verl",
    ),
    Entry(
        "gae",
        {"gamma": 1.0, "lam": 0.95},
        "delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t",
        "Schulman et al. 2015, arXiv 1506.02438, eq. 16",
        "verl, NeMo-RL, AReaL (carry_over_masked=True), OpenRLHF, SkyRL, slime",
    ),
    Entry(
        "td_lambda_returns",
        {"gamma": 1.0, "lam": 1.0},
        "r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1})",
        "the returns of gae; VAPO, arXiv 2504.05118",
        "verl, NeMo-RL",
    ),
    Entry(
        "discounted_returns", {"gamma": 1.0}, "r_t + gamma G_{t+1}", "the definition", "verl, SkyRL (masked='reset')"
    ),
    Entry(
        "sampled_distillation_advantages",
        {},
        "teacher logp - student logp",
        "on-policy distillation, arXiv 2306.13649, section 3",
        "verl, slime, ROLL, NeMo-RL, prime-rl, AReaL",
    ),
)

OTHERS: tuple[Entry, ...] = (
    Entry(
        "value_loss",
        {"clip": 0.2, "coefficient": 0.5},
        "coefficient max((v - R)^2, (clip(v, old +- clip) - R)^2)",
        "PPO, arXiv 1707.06347",
        "SkyRL, torchtune (coefficient=0.1), slime (1.0), verl, OpenRLHF (clip=0.5), AReaL",
    ),
    Entry("value_loss", {"clip": None, "coefficient": 1.0}, "coefficient (v - R)^2", "least squares", "NeMo-RL"),
    Entry(
        "reward_model_loss",
        {},
        "-log sigmoid(w - l - margin) + centering_coef (w + l)^2",
        "Bradley-Terry; margin: arXiv 2307.09288, eq. 2; centring: arXiv 2312.09244",
        "TRL (centering_coef=0.01), OpenRLHF, NeMo-RL",
    ),
    Entry("process_reward_loss", {}, "cross-entropy at the ends of steps", "arXiv 2312.08935", "TRL 1.10, OpenRLHF"),
    Entry("distillation_loss", {"beta": 0.0}, "KL(teacher || student)", "forward KL", "TRL, torchtune, OpenRLHF"),
    Entry("distillation_loss", {"beta": 1.0}, "KL(student || teacher)", "reverse KL", "TRL, torchtune"),
    Entry(
        "distillation_loss",
        {"beta": 0.5},
        "beta KL(T || M) + (1 - beta) KL(S || M), M = (1 - beta) S + beta T",
        "GKD, arXiv 2306.13649",
        "TRL, Liger",
    ),
    Entry(
        "sequence_square_loss",
        {"scale": 1e-3},
        "weight (scale u - target)^2, u = sum_t (logp - anchor), mean over sequences",
        "A*-PO, arXiv 2505.20686; Kimi k1.5, arXiv 2501.12599",
        "TRL (experimental)",
    ),
)

# Width of the first column of the table, and of the labels of `describe`.
_NAME, _LABEL = 26, 14


def names() -> list[str]:
    """Return the names that `describe` knows: presets of both families, then functions."""
    functions = (entry.function for entry in (*KL, *ADVANTAGES, *OTHERS))
    return list(dict.fromkeys((*POLICY, *PREFERENCE, *functions)))


def close_names(name: str) -> list[str]:
    """Return known names that look like `name`, the closest first."""
    return difflib.get_close_matches(name.lower().replace("-", "_"), names(), n=4, cutoff=0.6)


def describe(name: str) -> str:
    """Return a loss as text: formula, source, fields, and each trainer that has it with its differences.

    Args:
        name: a preset of `PolicyLoss`, of `PreferenceLoss`, or of both, which are then shown one after the other, or a
            function of `fastrl` with an entry in the catalogue.

    Raises:
        ValueError: unknown name. The message gives the close ones, or all.
    """
    parts = []
    both = name in POLICY and name in PREFERENCE
    if both:
        parts.append(f"{name!r} names a preset of PolicyLoss and one of PreferenceLoss.")
    if name in POLICY:
        parts.append((f"PolicyLoss.preset({name!r})\n" if both else "") + describe_policy(name))
    if name in PREFERENCE:
        parts.append((f"PreferenceLoss.preset({name!r})\n" if both else "") + describe_preference(name))
    parts += [_described(entry) for entry in (*KL, *ADVANTAGES, *OTHERS) if entry.function == name]
    if not parts:
        close = close_names(name)
        raise ValueError(f"unknown loss {name!r}; {'close' if close else 'known'}: {', '.join(close or names())}")
    return "\n\n".join(parts)


def _described(entry: Entry) -> str:
    lines = [entry.call(), f"    formula   {entry.formula}", f"    source    {entry.source}"]
    return "\n".join([*lines, f"    trainers  {entry.trainers}"] if entry.trainers else lines)


def wrapped(text: str, width: int) -> str:
    """Return the text of `describe` in lines of at most `width`, continued below the values."""
    indent = " " * _LABEL
    return "\n".join(
        textwrap.fill(line, max(width, 2 * _LABEL), subsequent_indent=indent, break_on_hyphens=False)
        for line in text.splitlines()
    )


def table(width: int) -> str:
    """Return every loss with its formula, in lines of at most `width`, as text for a terminal."""
    groups = (
        ("PolicyLoss.preset(NAME)", [(name, preset.formula) for name, preset in POLICY.items()]),
        ("PreferenceLoss.preset(NAME)", [(name, preset.formula) for name, preset in PREFERENCE.items()]),
        ("KL", [(entry.call(), entry.formula) for entry in KL]),
        ("Advantages and returns", [(entry.call(), entry.formula) for entry in ADVANTAGES]),
        ("Other losses", [(entry.call(), entry.formula) for entry in OTHERS]),
    )
    blocks = [
        "\n".join([title, *(line for name, formula in rows for line in _row(name, formula, width))])
        for title, rows in groups
    ]
    return "\n\n".join(blocks)


def _row(name: str, formula: str, width: int) -> list[str]:
    indent = " " * _NAME
    lines = textwrap.wrap(formula, max(width - _NAME, 20), break_on_hyphens=False)
    if len(name) + 4 <= _NAME:
        return [f"  {name}".ljust(_NAME) + lines[0], *(indent + line for line in lines[1:])]
    # A long call stands on lines of its own, above its formula.
    return [
        *textwrap.wrap(name, max(width, 40), initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False),
        *(indent + line for line in lines),
    ]
