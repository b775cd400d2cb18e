"""The parts from which every preference loss is put together: score transforms, features, and links.

    score s   log-prob of a completion (sum or mean over its tokens), minus the reference's, through a transform
    feature   the number that a link takes: the margin s_w - s_l of a pair, one side of it, or a row with its label
    z         sign * (beta * feature - shift)
    link      the scalar function of z
    loss      mean over pairs (or rows) of the weighted sum of link(z)

Legend: P pairs, B rows with a label, w chosen, l rejected.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fastrl.reference import EXP_LIMIT, exp_linear

# log(1 - p) of a completion with p = 1: a mean log-prob above -ODDS_EPS is read as -ODDS_EPS, its gradient kept.
ODDS_EPS = 1e-30
# Exponents from which the exponentials of scores go on linearly. e^76 x 1e4 is 1e37, which float32 holds. A link that
# squares takes e^32, whose square is 6e35.
SCORE_EXP_LIMIT, SQUARED_EXP_LIMIT = 76.0, EXP_LIMIT


@dataclass(frozen=True)
class Term:
    """One weighted link of one feature."""

    feature: str
    """A key of `FEATURES`, or "label" for losses of single rows."""
    link: str
    """A key of `LINKS`."""
    sign: float = 1.0
    weight: float = 1.0


class Scores(NamedTuple):
    """Sequence scores of P pairs after reference and transform, and the untransformed log-probs for the batch sorts."""

    chosen: Tensor  # (P,)
    rejected: Tensor  # (P,)
    policy_margin: Tensor  # (P,) log pi(w) - log pi(l)
    ref_margin: Tensor  # (P,) the same of the reference, 0 without one


# --- transforms of a score --------------------------------------------------------------------------------------------


def forward_kl(s: Tensor, alpha: float, limit: float) -> Tensor:
    """Return 1 - e^{-s}: f'(u) = 1 - 1/u at u = e^s (f-DPO, arXiv 2309.16240)."""
    return 1.0 - exp_linear(-s, limit)


def js_divergence(s: Tensor, alpha: float, limit: float) -> Tensor:
    """Return log 2 + log sigmoid(s): f'(u) = log(2u / (u + 1)) (f-DPO, arXiv 2309.16240)."""
    return math.log(2.0) + F.logsigmoid(s)


def alpha_divergence(s: Tensor, alpha: float, limit: float) -> Tensor:
    """Return (e^{(a-1)s} - 1)/(a - 1), and its limit s at a = 1 (f-DPO, arXiv 2309.16240)."""
    if abs(alpha - 1.0) < 1e-6:
        return s
    return (exp_linear((alpha - 1.0) * s, limit) - 1.0) / (alpha - 1.0)


def identity(s: Tensor, alpha: float, limit: float) -> Tensor:
    """Return s: the reverse KL of DPO."""
    return s


F_DIVERGENCES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
    "reverse_kl": identity,
    "forward_kl": forward_kl,
    "js_divergence": js_divergence,
    "alpha_divergence": alpha_divergence,
}


def alphapo(s: Tensor, alpha: float, limit: float = SCORE_EXP_LIMIT) -> Tensor:
    """Return (1 - p^{-a})/a with p = e^s, and its limit s at a = 0 (AlphaPO, arXiv 2501.03884)."""
    return s if alpha == 0.0 else (1.0 - exp_linear(-alpha * s, limit)) / alpha


def log_odds(s: Tensor) -> Tensor:
    """Return log(p / (1 - p)) with p = e^s, s a mean log-prob, finite up to p = 1 (ORPO, arXiv 2403.07691)."""
    # At p = 1 hold the value just below and keep the slope: its product with the slope of the link has a finite limit.
    s = torch.where(s > -ODDS_EPS, s - s.detach() - ODDS_EPS, s)
    return s - torch.log(-torch.expm1(s))


# --- features of a pair -----------------------------------------------------------------------------------------------


def _sorted(x: Tensor) -> Tensor:
    return torch.sort(x, dim=0, stable=True).values


FEATURES: dict[str, Callable[[Scores], Tensor]] = {
    "margin": lambda s: s.chosen - s.rejected,
    "chosen": lambda s: s.chosen,
    "rejected": lambda s: s.rejected,
    # Distributional alignment: quantiles of the batch are compared (AOT, arXiv 2406.05882).
    "sorted_margin": lambda s: _sorted(s.policy_margin) - _sorted(s.ref_margin),
    "sorted_scores": lambda s: _sorted(s.chosen) - _sorted(s.rejected),
}
# Features of the transformed and normalised scores. The others are defined on plain log-ratios.
MARGIN_FEATURES = ("margin",)
# Features that depend on the whole batch.
BATCH_FEATURES = ("sorted_margin", "sorted_scores")


class LinkNumbers(Protocol):
    """The fields of a loss that links read."""

    @property
    def beta(self) -> float:
        """Scale of the features."""
        ...

    @property
    def label_smoothing(self) -> float:
        """Probability that a pair is labelled the wrong way round."""
        ...

    @property
    def tau(self) -> Any:
        """Modulation temperature: a float for discopop, else None."""
        ...


# --- links ------------------------------------------------------------------------------------------------------------


def logistic(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return -log sigmoid(z) (DPO, arXiv 2305.18290)."""
    return -F.logsigmoid(z)


def scaled_logistic(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return -beta log sigmoid(z / beta): beta weighs the term instead of sharpening it (ORPO, arXiv 2403.07691)."""
    return -spec.beta * F.logsigmoid(z / spec.beta)


def sigmoid(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return 1 - sigmoid(z) (KTO, arXiv 2402.01306; APO, arXiv 2408.06266)."""
    return torch.sigmoid(-z)


def hinge(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return max(0, 1 - z) (SLiC, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return torch.relu(1.0 - z)


def square(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return ((z - 1/2) / beta)^2, i.e. (feature - 1/(2 beta))^2 (IPO, arXiv 2310.12036, eq. 17)."""
    return torch.square((z - 0.5) / spec.beta)


def exo(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return KL((q, 1-q) || (1-e, e)) with q = sigmoid(z), e = label_smoothing (EXO, arXiv 2402.00856, eq. 16)."""
    log_chosen, log_rejected = math.log1p(-spec.label_smoothing), math.log(spec.label_smoothing)
    towards = torch.sigmoid(z) * (F.logsigmoid(z) - log_chosen)
    return towards + torch.sigmoid(-z) * (F.logsigmoid(-z) - log_rejected)


def discopop(z: Tensor, spec: LinkNumbers) -> Tensor:
    """Return (1 - M)(-log sigmoid(z)) + M e^{-z} with M = sigmoid(z / tau) (DiscoPOP, arXiv 2406.08414, eq. 5).

    M e^{-z} is one exponential, because e^{-z} alone overflows at z for which M is zero.
    """
    modulation = z / spec.tau
    exponential = exp_linear(F.logsigmoid(modulation) - z)
    return torch.sigmoid(-modulation) * -F.logsigmoid(z) + exponential


LINKS: dict[str, Callable[[Tensor, LinkNumbers], Tensor]] = {
    "logistic": logistic,
    "scaled_logistic": scaled_logistic,
    "sigmoid": sigmoid,
    "hinge": hinge,
    "square": square,
    "exo": exo,
    "discopop": discopop,
}
