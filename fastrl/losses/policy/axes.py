"""The axes of `PolicyLoss`: the names on each, and the combinations that are refused."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from fastrl import checks
from fastrl.losses.output import shown
from fastrl.losses.policy.correction import RolloutCorrection

RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum", "none")
SURROGATES = (
    "clip",
    "reinforce",
    "importance",
    "square",
    "nll",
    "dft",
    "clipped_weight",
    "masked_weight",
    "sapo",
    "vespo",
    "geometric",
    "divergence_tv",
    "divergence_tv_symmetric",
    "divergence_kl",
    "topr",
)
DIVERGENCES = ("divergence_tv", "divergence_tv_symmetric", "divergence_kl")
CLIPPED = ("clip", "geometric", *DIVERGENCES)
WEIGHTED = ("clipped_weight", "masked_weight", "topr", *DIVERGENCES)
RATIO_FREE = ("reinforce", "nll", "dft")
OWN_SEQUENCE_RATIO = ("vespo", "geometric")
AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum", "prompt_mean")
# Numbers of one surrogate.
OWNERS = {
    **dict.fromkeys(("tau_pos", "tau_neg"), "sapo"),
    **dict.fromkeys(("k_pos", "k_neg", "lambda_pos", "lambda_neg"), "vespo"),
    "square_tau": "square",
}
KL_GRADIENTS = ("plain", "ratio_weighted", "straight_through", "straight_through_ratio")
_NEEDS = {
    "dual_clip": "it needs surrogate='clip'",
    "max_ratio": "it needs surrogate='clip'",
    "carrier": f"it needs a surrogate among {DIVERGENCES}",
    "weight_low": f"it needs a surrogate among {WEIGHTED}, and carrier='logprob' for the divergences",
    "weight_high": f"it needs a surrogate among {WEIGHTED}, and carrier='logprob' for the divergences",
    "constant": "it needs aggregate='constant'",
    "kl_log_ratio_clamp": "it needs kl='k1', 'k2', 'k3' or 'abs'",
    "kl_value_clamp": "it needs kl='k1', 'k2', 'k3' or 'abs'",
    "kl_ratio_max": "it needs kl_gradient='straight_through_ratio'",
    "kl_ratio_anchor": "it needs kl_gradient='ratio_weighted' or 'straight_through_ratio'",
    "kl_fraction": "it needs kl='k1', 'k2', 'k3' or 'abs'",
    "sequence_log_ratio_max": "it needs ratio_level='sequence', 'sequence_token' or 'sequence_sum'",
}


@dataclass(frozen=True, kw_only=True, repr=False)
class PolicyAxes:
    """The fields of `PolicyLoss`; any invalid or contradictory combination raises `ValueError` at construction."""

    ratio_level: str = "token"
    """Where the importance ratio lives: "token", "sequence" (geometric mean, GSPO), "sequence_token" (the same value,
    gradient per token), "sequence_sum" (product over the sequence, RLOO), "none"."""
    ratio_anchor: str = "old"
    """Denominator of the ratio: "old", "rollout", or "self" (the detached log-prob: ratio 1 with a gradient)."""
    log_ratio_clamp: float | None = None
    """Bound c of token log-ratios, clamped to [-c, c] with zero gradient outside (VESPO: at most 20)."""
    sequence_log_ratio_max: float | None = None
    """Upper clamp of the sequence's log-ratio."""
    surrogate: str = "clip"
    """l(r, A). `fastrl.reference.token_terms` lists the formulas."""
    clip_low: float | None = 0.2
    """Width of the clip below 1 (clip), of the log-ratio (geometric), or bound of the divergence. None: open. With one
    bound alone, divergence_tv holds every token to it, for either sign of A."""
    clip_high: float | None = 0.2
    """The same above 1."""
    weight_low: float | None = None
    """Lower bound of the detached weight of clipped_weight, masked_weight, topr, divergence_* with logprob carrier."""
    weight_high: float | None = None
    """Upper bound of the same."""
    carrier: str | None = None
    """The factor of A in divergence_*: "logprob" (with a detached weight) or "ratio". None stands for "logprob"."""
    dual_clip: float | None = None
    """c > 1: for A < 0 the clip loss is at most -c A (arXiv 1912.09729)."""
    max_ratio: float | None = None
    """delta > 1 + clip_high: cap of the unclipped ratio (INTELLECT-2, arXiv 2505.07291)."""
    tau_pos: float = 1.0
    """SAPO temperature for A > 0."""
    tau_neg: float = 1.05
    """SAPO temperature for A <= 0."""
    k_pos: float = 2.0
    """VESPO exponent for A >= 0."""
    k_neg: float = 3.0
    """VESPO exponent for A < 0."""
    lambda_pos: float = 3.0
    """VESPO rate for A >= 0."""
    lambda_neg: float = 2.0
    """VESPO rate for A < 0."""
    square_tau: float = 0.1
    """tau of surrogate "square", which pulls tau times the log-ratio (of `ratio_level`) to A."""
    kl: str | None = None
    """KL estimate in the loss: None, "k1", "k2", "k3", "abs"."""
    kl_coef: float = 0.0
    """Coefficient of the KL. 0 with an estimator set only measures."""
    kl_to: str = "ref"
    """The other policy of the KL: "ref", "old", "rollout"."""
    kl_gradient: str = "plain"
    """"plain", "ratio_weighted", "straight_through", "straight_through_ratio", as in `fastrl.reference.kl_estimate`."""
    kl_log_ratio_clamp: float | None = None
    """Bound of logp - logp_other inside the estimate."""
    kl_value_clamp: float | None = None
    """Bound of the estimate's value."""
    kl_value_clamp_order: str = "before"
    """With "ratio_weighted": `kl_value_clamp` bounds the estimate "before" the product with the ratio, or the product,
    "after" (NeMo-RL, slime). A product at the bound has no gradient."""
    kl_ratio_max: float | None = None
    """Cap of the ratio in "straight_through_ratio"."""
    kl_ratio_anchor: str | None = None
    """Denominator of the token's ratio in the KL term: "old", "rollout", "self". None: the ratio of `ratio_level` to
    `ratio_anchor`; vespo and geometric take its token ratio."""
    kl_fraction: float | None = None
    """Share of the live tokens that carry the KL: the largest covariances of advantage and log-prob (KL-Cov)."""
    entropy_coef: float = 0.0
    """Coefficient c of the entropy bonus -c sum_t H_t / n_tokens, for every `aggregate`."""
    correction: RolloutCorrection | None = None
    """Train-inference correction of the policy term. VESPO multiplies its sequence weight by it, once a sequence."""
    aggregate: str = "token_mean"
    """"token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum", "prompt_mean". All but
    "prompt_mean" add up over micro-batches if `n_tokens` or `n_sequences` are the global counts."""
    constant: float | None = None
    """Length in the denominator of aggregate="constant" (Dr. GRPO): the longest completion allowed. None: the padded
    length T of the batch, as in verl, so that padding changes the loss. Packed tokens need a number."""
    denominator_eps: float = 0.0
    """Added to each length in aggregate="sequence_mean", as verl and OpenRLHF do (1e-8)."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for anything outside the axes."""
        # A trainer's settings say None where they leave a field alone.
        for field in ("kl_to", "kl_gradient", *OWNERS):
            if getattr(self, field) is None:
                object.__setattr__(self, field, _DEFAULTS[field])
        if self.carrier is None and self.surrogate in DIVERGENCES:
            object.__setattr__(self, "carrier", "logprob")
        self._check_choices()
        self._check_numbers()
        self._check_combinations()

    def __repr__(self) -> str:
        return shown(self)

    def _check_choices(self) -> None:
        checks.one_of("ratio_level", self.ratio_level, RATIO_LEVELS)
        checks.one_of("ratio_anchor", self.ratio_anchor, ("old", "rollout", "self"))
        checks.one_of("surrogate", self.surrogate, SURROGATES)
        checks.one_of("carrier", self.carrier, (None, "logprob", "ratio"))
        checks.one_of("kl", self.kl, (None, "k1", "k2", "k3", "abs"))
        checks.one_of("kl_to", self.kl_to, ("ref", "old", "rollout"))
        checks.one_of("kl_gradient", self.kl_gradient, KL_GRADIENTS)
        checks.one_of("kl_value_clamp_order", self.kl_value_clamp_order, ("before", "after"))
        checks.one_of("kl_ratio_anchor", self.kl_ratio_anchor, (None, "old", "rollout", "self"))
        checks.one_of("aggregate", self.aggregate, AGGREGATES)
        if self.correction is not None and not isinstance(self.correction, RolloutCorrection):
            raise TypeError(f"correction must be a RolloutCorrection or None, got {type(self.correction).__name__}")

    def _check_numbers(self) -> None:
        positive = ("log_ratio_clamp", "sequence_log_ratio_max", "kl_log_ratio_clamp", "kl_value_clamp", "kl_ratio_max")
        for name in (*positive, "constant", "tau_pos", "tau_neg", "square_tau"):
            if getattr(self, name) is not None:
                checks.plain_float(name, getattr(self, name), low=0.0, open_low=True)
        for name in (
            "clip_low",
            "clip_high",
            "weight_low",
            "weight_high",
            "k_pos",
            "k_neg",
            "lambda_pos",
            "lambda_neg",
        ):
            if getattr(self, name) is not None:
                checks.plain_float(name, getattr(self, name), low=0.0)
        checks.plain_float("kl_coef", self.kl_coef, low=0.0)
        checks.plain_float("entropy_coef", self.entropy_coef)
        checks.plain_float("denominator_eps", self.denominator_eps, low=0.0)
        if self.surrogate == "clip" and self.clip_low is not None and self.clip_low > 1.0:
            raise ValueError(
                f"clip_low must be in [0, 1] for surrogate 'clip' (the ratio is positive), got {self.clip_low}"
            )
        if self.dual_clip is not None:
            checks.plain_float("dual_clip", self.dual_clip, low=1.0, open_low=True)
        if self.max_ratio is not None:
            floor = 1.0 + (self.clip_high or 0.0)
            checks.plain_float("max_ratio", self.max_ratio, low=floor, open_low=True)
        if self.kl_fraction is not None:
            checks.plain_float("kl_fraction", self.kl_fraction, low=0.0, high=1.0, open_low=True)
        if self.weight_low is not None and self.weight_high is not None and self.weight_low > self.weight_high:
            raise ValueError(f"weight_low must be <= weight_high, got {self.weight_low} > {self.weight_high}")

    def _check_combinations(self) -> None:
        unused = {
            "dual_clip": self.surrogate == "clip",
            "max_ratio": self.surrogate == "clip",
            "carrier": self.surrogate in DIVERGENCES,
            "weight_low": self.surrogate in WEIGHTED and self.carrier != "ratio",
            "weight_high": self.surrogate in WEIGHTED and self.carrier != "ratio",
            "constant": self.aggregate == "constant",
            "kl_log_ratio_clamp": self.kl is not None,
            "kl_value_clamp": self.kl is not None,
            "kl_ratio_max": self.kl_gradient == "straight_through_ratio",
            "kl_ratio_anchor": self.kl is not None and "ratio" in self.kl_gradient,
            "kl_fraction": self.kl is not None,
            "sequence_log_ratio_max": self.ratio_level in ("sequence", "sequence_token", "sequence_sum"),
        }
        for name, used in unused.items():
            if getattr(self, name) is not None and not used:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: {_NEEDS[name]}")
        for name, owner in OWNERS.items():
            if getattr(self, name) != _DEFAULTS[name] and self.surrogate != owner:
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect here: it needs surrogate={owner!r}")
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) not in (None, _DEFAULTS[name]) and self.surrogate not in CLIPPED:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect here: it needs a surrogate among {CLIPPED}"
                )
        if self.kl is None and self.kl_coef != 0.0:
            raise ValueError(f"kl_coef={self.kl_coef} needs an estimator: kl='k1', 'k2', 'k3' or 'abs'")
        if self.kl is None and self.kl_gradient != "plain":
            raise ValueError(f"kl_gradient={self.kl_gradient!r} needs an estimator: kl='k1', 'k2', 'k3' or 'abs'")
        if self.kl_value_clamp_order == "after" and (
            self.kl_gradient != "ratio_weighted" or self.kl_value_clamp is None
        ):
            raise ValueError(
                "kl_value_clamp_order='after' has no effect here: it needs kl_gradient='ratio_weighted' and "
                "kl_value_clamp"
            )
        if self.denominator_eps != 0.0 and self.aggregate != "sequence_mean":
            raise ValueError(
                f"denominator_eps={self.denominator_eps} has no effect here: it needs aggregate='sequence_mean'"
            )
        ratio_free = (*RATIO_FREE, *OWN_SEQUENCE_RATIO)
        if self.ratio_level == "none" and self.surrogate not in ratio_free:
            raise ValueError(f"ratio_level='none' needs a surrogate among {ratio_free}, got {self.surrogate!r}")
        if (
            self.surrogate == "divergence_tv_symmetric"
            and (self.clip_high if self.clip_high is not None else self.clip_low) is None
        ):
            raise ValueError("surrogate='divergence_tv_symmetric' needs clip_high, the bound on |p - q|")
        weighted = "ratio" in self.kl_gradient and self.kl_ratio_anchor is None
        if self.surrogate in OWN_SEQUENCE_RATIO and weighted and self.ratio_level not in ("token", "none"):
            raise ValueError(
                f"surrogate={self.surrogate!r} with kl_gradient={self.kl_gradient!r} needs ratio_level='token' or "
                f"'none', or kl_ratio_anchor: it forms a sequence ratio of its own; got {self.ratio_level!r}"
            )
        if self.surrogate in DIVERGENCES and self.ratio_level != "token":
            raise ValueError(f"surrogate={self.surrogate!r} needs ratio_level='token', got {self.ratio_level!r}")

    @property
    def couples_sequences(self) -> bool:
        """Whether a token's gradient depends on the log-probs of other tokens."""
        return (
            self.surrogate in OWN_SEQUENCE_RATIO
            or self.kl_fraction is not None
            or (self.ratio_level in ("sequence", "sequence_token", "sequence_sum") and not self._ratio_unused)
        )

    @property
    def _ratio_unused(self) -> bool:
        return self.surrogate in RATIO_FREE and self.kl_gradient in ("plain", "straight_through")

    @property
    def uses_entropy(self) -> bool:
        """Whether the entropy enters the loss."""
        return self.entropy_coef != 0.0

    @property
    def uses_rollout(self) -> bool:
        """Whether the log-probs of the inference engine enter the loss."""
        return (
            self.ratio_anchor == "rollout"
            or self.kl_ratio_anchor == "rollout"
            or self.correction is not None
            or (self.kl is not None and self.kl_to == "rollout")
        )


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(PolicyAxes)}
