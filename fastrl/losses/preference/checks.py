"""What a `PreferenceLoss` may be made of: contradictions are refused when the object is built."""

from __future__ import annotations

from typing import Any

from fastrl import checks
from fastrl.losses.preference.terms import F_DIVERGENCES, FEATURES, LINKS, MARGIN_FEATURES, Term

SMOOTHINGS = (None, "conservative", "robust", "target")
SHIFTS = (None, "reference_point", "baseline", "paired_mean")
SFT_NORMALISES = (None, "length", "tokens")


def _refuse(spec: Any, field: str, why: str) -> None:
    raise ValueError(f"{field}={getattr(spec, field)!r} does not go with the loss {spec.name!r}: {why}")


def _terms(spec: Any) -> None:
    for term in spec.terms:
        if not isinstance(term, Term):
            raise TypeError(f"terms must hold Term objects, got {type(term).__name__}")
        checks.one_of("feature", term.feature, (*FEATURES, "label"))
        checks.one_of("link", term.link, tuple(LINKS))
        checks.one_of("sign", term.sign, (1.0, -1.0))
        checks.plain_float("weight", term.weight)
    if 0 < sum(term.feature == "label" for term in spec.terms) < len(spec.terms):
        _refuse(spec, "terms", "the feature 'label' is of single rows, the others are of pairs")


def _smoothing(spec: Any) -> None:
    checks.one_of("smoothing", spec.smoothing, SMOOTHINGS)
    amount = checks.plain_float("label_smoothing", spec.label_smoothing, low=0.0, high=0.5)
    takers = "sigmoid, sigmoid_norm, robust, exo_pair, aot, aot_unpaired, cpo, simpo, alphapo"
    if spec.smoothing is None and amount != 0.0:
        _refuse(spec, "label_smoothing", f"it has no smoothed form; those that do: {takers}")
    if spec.smoothing == "robust" and amount == 0.5:
        _refuse(spec, "label_smoothing", "1 - 2 label_smoothing divides; it must be < 0.5")
    if spec.smoothing == "target" and amount == 0.0:
        _refuse(spec, "label_smoothing", "the target distribution is (1 - e, e); e must be > 0, for example 1e-3")


def _score(spec: Any, margin_only: bool) -> None:
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


def _rows(spec: Any, unpaired: bool) -> None:
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


def _extras(spec: Any) -> None:
    checks.one_of("weighting", spec.weighting, (None, "wpo"))
    checks.one_of("sft_normalise", spec.sft_normalise, SFT_NORMALISES)
    checks.plain_float("sft_coef", spec.sft_coef)
    if spec.weighting and (spec.sft_coef or not spec.terms) and not spec.components:
        _refuse(spec, "weighting", "the weights are of pairs, the NLL is of tokens; use weighting=None or sft_coef=0.0")
    if any(term.link == "discopop" for term in spec.terms):
        checks.plain_float("tau", spec.tau, low=0.0, open_low=True)
    elif spec.tau is not None:
        _refuse(spec, "tau", "tau is the modulation temperature of discopop; use None")


def _components(spec: Any) -> None:
    if spec.terms or spec.sft_coef:
        _refuse(spec, "components", "a mixture has no terms and no NLL of its own; make them components")
    for component, weight in spec.components:
        checks.plain_float("weight of a component", weight)
        if component.components or component.unpaired:
            raise ValueError(f"a mixture is made of plain losses of pairs, got {component.name!r}")
        for field in ("length_desensitisation", "weighting"):
            if getattr(component, field) != getattr(spec, field):
                _refuse(spec, field, f"the component {component.name!r} has {getattr(component, field)!r}")


def validate(spec: Any) -> None:
    """Raise where the fields of a `PreferenceLoss` contradict each other, naming the field and the alternatives."""
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
