"""The fields of `PreferenceLoss`, and the combinations that it refuses."""

from __future__ import annotations

from dataclasses import dataclass

from fastrl import checks
from fastrl.losses.output import shown
from fastrl.losses.preference.inputs import PreferenceInputs
from fastrl.losses.preference.terms import BATCH_FEATURES, F_DIVERGENCES, FEATURES, LINKS, MARGIN_FEATURES, Term

SMOOTHINGS = (None, "conservative", "robust", "target")
SHIFTS = (None, "reference_point", "baseline", "paired_mean")
SFT_NORMALISES = (None, "length", "tokens")


@dataclass(frozen=True, repr=False)
class PreferenceAxes:
    """The fields of `PreferenceLoss`; any invalid or contradictory combination raises `ValueError` at construction."""

    name: str = "sigmoid"
    """For messages. The other fields determine the loss."""
    terms: tuple[Term, ...] = (Term("margin", "logistic"),)
    """The summands, listed in `fastrl.losses.preference.terms`."""
    beta: float = 0.1
    """Scale of the features, > 0."""
    smoothing: str | None = "conservative"
    """The part of `label_smoothing` e: "conservative" (1-e) link(z) + e link(-z), "robust" ((1-e) link(z) - e
    link(-z)) / (1-2e), "target" (exo), None: none."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round."""
    margin: float = 0.0
    """Target margin (SimPO's gamma): z = beta feature - margin."""
    f_divergence: str = "reverse_kl"
    """"reverse_kl", "forward_kl", "js_divergence" or "alpha_divergence": the transform of the log-ratio."""
    alpha: float | None = None
    """Order of the alpha divergence (None: 0.5). With reference=False AlphaPO's alpha (None or 0.0: log-probs)."""
    tau: float | None = None
    """Modulation temperature of discopop."""
    reduce: str = "sum"
    """"sum" or "mean" over the tokens of a completion, before everything else."""
    odds: bool = False
    """Scores are log-odds of the mean log-prob."""
    reference: bool = True
    """Whether the reference's log-prob is subtracted."""
    score_normalise: str | None = None
    """"length": transformed scores are divided by the completion's length."""
    length_desensitisation: float | None = None
    """LD-DPO's alpha: weight of the tokens beyond the shorter completion's length (arXiv 2409.06411)."""
    weighting: str | None = None
    """"wpo": pairs are weighted by exp(mean_t(logp - log sum p^2)) of both rows, detached (arXiv 2406.11827, eq. 2)."""
    sft_coef: float = 0.0
    """Weight of the NLL of the chosen rows."""
    sft_normalise: str | None = None
    """NLL as the mean over pairs of the sum (None) or of the mean ("length") over tokens, or as one mean over all
    chosen tokens ("tokens")."""
    sft_optional: bool = False
    """Whether calls on sequence log-probs without lengths, where no NLL over tokens can be known, leave it out
    (cpo and orpo as presets) instead of raising."""
    desirable_weight: float = 1.0
    """Weight of desirable rows."""
    undesirable_weight: float = 1.0
    """Weight of the other rows."""
    shift: str | None = None
    """The number subtracted from the scores of single rows. "paired_mean": the positive part of the mean score of the
    rows on the other side, its gradient kept. "reference_point": the given one (kto), else as "paired_mean".
    "baseline": the given one (bco), else the mean reward of the rows."""
    components: tuple[tuple[PreferenceAxes, float], ...] = ()
    """A weighted sum of other losses, made by `mixture`."""

    def __post_init__(self) -> None:
        validate(self)

    def __repr__(self) -> str:
        return shown(self)

    @property
    def unpaired(self) -> bool:
        """Whether the loss is of single rows with a label."""
        return bool(self.terms) and self.terms[0].feature == "label"

    @property
    def reads_reference(self) -> bool:
        """Whether the loss needs the reference's log-probs."""
        if self.components:
            return any(loss.reads_reference for loss, _ in self.components)
        return self.reference and bool(self.terms)

    @property
    def couples_pairs(self) -> bool:
        """Whether a pair's gradient depends on the other pairs of the batch."""
        parts = [loss for loss, _ in self.components] or [self]
        return any(term.feature in BATCH_FEATURES for part in parts for term in part.terms)

    def couples(self, inputs: PreferenceInputs) -> bool:
        """Return whether the gradient of a pair (or row) depends on others, given the inputs of a call."""
        if self.couples_pairs or self.weighting is not None or self.shift == "paired_mean":
            return True
        own_point = inputs.get("reference_point") is None and inputs.get("kl_logprobs") is None
        own_baseline = inputs.get("baseline") is None
        return (self.shift == "reference_point" and own_point) or (self.shift == "baseline" and own_baseline)


def _refuse(spec: PreferenceAxes, field: str, why: str) -> None:
    raise ValueError(f"{field}={getattr(spec, field)!r} does not go with the loss {spec.name!r}: {why}")


def _terms(spec: PreferenceAxes) -> None:
    for term in spec.terms:
        if not isinstance(term, Term):
            raise TypeError(f"terms must hold Term objects, got {type(term).__name__}")
        checks.one_of("feature", term.feature, (*FEATURES, "label"))
        checks.one_of("link", term.link, tuple(LINKS))
        checks.one_of("sign", term.sign, (1.0, -1.0))
        checks.plain_float("weight", term.weight)
    if 0 < sum(term.feature == "label" for term in spec.terms) < len(spec.terms):
        _refuse(spec, "terms", "the feature 'label' is of single rows, the others are of pairs")


def _smoothing(spec: PreferenceAxes) -> None:
    checks.one_of("smoothing", spec.smoothing, SMOOTHINGS)
    amount = checks.plain_float("label_smoothing", spec.label_smoothing, low=0.0, high=0.5)
    takers = "sigmoid, sigmoid_norm, robust, exo_pair, aot, aot_unpaired, cpo, simpo, alphapo"
    if spec.smoothing is None and amount != 0.0:
        _refuse(spec, "label_smoothing", f"it has no smoothed form; those that do: {takers}")
    if spec.smoothing == "robust" and amount == 0.5:
        _refuse(spec, "label_smoothing", "1 - 2 label_smoothing divides; it must be < 0.5")
    if spec.smoothing == "target" and amount == 0.0:
        _refuse(spec, "label_smoothing", "the target distribution is (1 - e, e); e must be > 0, for example 1e-3")


def _score(spec: PreferenceAxes, margin_only: bool) -> None:
    checks.one_of("f_divergence", spec.f_divergence, tuple(F_DIVERGENCES))
    checks.one_of("reduce", spec.reduce, ("sum", "mean"))
    checks.one_of("score_normalise", spec.score_normalise, (None, "length"))
    checks.plain_float("margin", spec.margin)
    if spec.f_divergence != "reverse_kl":
        if not spec.reference:
            _refuse(spec, "f_divergence", "it has no reference to diverge from; use 'reverse_kl'")
        if not margin_only:
            _refuse(spec, "f_divergence", "it is not a function of the score margin; use 'reverse_kl'")
    if spec.margin != 0.0 and not margin_only:
        _refuse(spec, "margin", "it is not a function of the score margin; use 0.0")
    if spec.score_normalise and not margin_only:
        _refuse(spec, "score_normalise", "it is not a function of the score margin; use None")
    if spec.score_normalise and spec.reduce == "mean":
        _refuse(spec, "score_normalise", "reduce='mean' has divided by the length already; use None")
    if spec.alpha:
        checks.plain_float("alpha", spec.alpha)
        if spec.f_divergence != "alpha_divergence" and (spec.reference or spec.odds or not margin_only):
            _refuse(spec, "alpha", "alpha belongs to f_divergence='alpha_divergence' and to reference-free scores")
    if spec.odds and (spec.reference or spec.reduce != "mean"):
        _refuse(spec, "odds", "odds need reference=False and reduce='mean'")
    if spec.length_desensitisation is not None:
        checks.plain_float("length_desensitisation", spec.length_desensitisation, low=0.0, high=1.0)
        if spec.reduce == "mean":
            _refuse(spec, "length_desensitisation", "it weighs the tokens of a sum; use None")


def _rows(spec: PreferenceAxes, unpaired: bool) -> None:
    checks.one_of("shift", spec.shift, SHIFTS)
    for field in ("desirable_weight", "undesirable_weight"):
        if checks.plain_float(field, getattr(spec, field), low=0.0) != 1.0 and not unpaired:
            _refuse(spec, field, "it weighs rows with a label; use 1.0, or kto, apo_zero_unpaired, bco")
    if spec.shift is not None and not unpaired:
        _refuse(spec, "shift", "it belongs to rows with a label; use None")
    if unpaired:
        for field, neutral in (("sft_coef", 0.0), ("length_desensitisation", None), ("weighting", None)):
            if getattr(spec, field) != neutral:
                _refuse(spec, field, f"it is defined on pairs; use {neutral!r}")
        if not spec.reference:
            _refuse(spec, "reference", "the score of a row is its log-ratio to the reference; use True")


def _extras(spec: PreferenceAxes) -> None:
    checks.one_of("weighting", spec.weighting, (None, "wpo"))
    checks.one_of("sft_normalise", spec.sft_normalise, SFT_NORMALISES)
    checks.plain_float("sft_coef", spec.sft_coef)
    if spec.weighting and (spec.sft_coef or not spec.terms) and not spec.components:
        _refuse(spec, "weighting", "the weights are of pairs, the NLL is of tokens; use weighting=None or sft_coef=0.0")
    if any(term.link == "discopop" for term in spec.terms):
        checks.plain_float("tau", spec.tau, low=0.0, open_low=True)
    elif spec.tau is not None:
        _refuse(spec, "tau", "tau is the modulation temperature of discopop; use None")


def _components(spec: PreferenceAxes) -> None:
    if spec.terms or spec.sft_coef:
        _refuse(spec, "components", "a mixture has no terms and no NLL of its own; make them components")
    for component, weight in spec.components:
        checks.plain_float("weight of a component", weight)
        if component.components or component.unpaired:
            raise ValueError(f"a mixture is made of plain losses of pairs, got {component.name!r}")
        for field in ("length_desensitisation", "weighting"):
            if getattr(component, field) != getattr(spec, field):
                _refuse(spec, field, f"the component {component.name!r} has {getattr(component, field)!r}")


def validate(spec: PreferenceAxes) -> None:
    """Raise if the fields of a `PreferenceLoss` contradict each other, naming the field and the alternatives."""
    checks.plain_float("beta", spec.beta, low=0.0, open_low=True)
    _terms(spec)
    _smoothing(spec)
    margin_only = bool(spec.terms) and all(term.feature in MARGIN_FEATURES for term in spec.terms)
    _score(spec, margin_only)
    _rows(spec, bool(spec.terms) and spec.terms[0].feature == "label")
    _extras(spec)
    if spec.components:
        _components(spec)
    elif not spec.terms and not spec.sft_coef:
        _refuse(spec, "terms", "a loss needs at least one term, or sft_coef")
