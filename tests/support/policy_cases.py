"""Tokens, losses and the judge with which the fused token arithmetic is held against the reference.

Tokens come in groups of like magnitude, because the judge's budget goes with the largest value: ordinary tokens beside
those whose ratio is 1e31 would not be judged at all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from device import DEVICE
from oracle import assert_as_accurate
from torch import Tensor

from fastrl import reference
from fastrl.losses.policy import PolicyLoss
from fastrl.losses.policy.axes import KL_GRADIENTS, SURROGATES
from fastrl.ops.policy import fused_policy_terms

N_ORDINARY = 48
EDGES = {
    "equal": [0.0],
    "near": [2.0**-20, -(2.0**-20), 0.25, -0.25, 1.0, -1.0],
    "tangent": [63.0, 64.0, 65.0, 66.0],
    "limit": [9000.0, 9999.0, 1e4, 2e4],
    "down": [-63.0, -64.0, -65.0, -100.0, -9999.0, -1e4, -3e4],
}
"""Log-ratios, exact in every dtype, each with a positive, a negative and a zero advantage."""

KL_AXES = [None, *itertools.product(("k1", "k2", "k3", "abs"), KL_GRADIENTS)]
TERMS = Callable[[Any, Tensor, Tensor | None, reference.TokenColumns], reference.TokenTerms]


def interpreted(
    spec: PolicyLoss, logprobs: Tensor, entropy: Tensor | None, columns: reference.TokenColumns, **_: str
) -> reference.TokenTerms:
    """Return the kernel's terms of tensors on the CPU, from the device where the kernels run."""

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(DEVICE)

    on_device = reference.TokenColumns(*(there(x) for x in columns))
    terms = fused_policy_terms(spec, logprobs.to(DEVICE), there(entropy), on_device, backend="triton")
    return reference.TokenTerms(*(None if x is None else x.cpu() for x in terms))


def groups() -> dict[str, slice]:
    """Return name -> places of the groups of `tokens`."""
    found, start = {"ordinary": slice(0, N_ORDINARY)}, N_ORDINARY
    for name, ratios in EDGES.items():
        found[name] = slice(start, start + 3 * len(ratios))
        start += 3 * len(ratios)
    return found


def tokens(spec: PolicyLoss, seed: int = 0) -> tuple[Tensor, Tensor, reference.TokenColumns]:
    """Return (logprobs, entropy, columns) in float64, with a sequence log-ratio where the loss takes one."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.tensor([x for ratios in EDGES.values() for x in ratios for _ in range(3)], dtype=torch.float64)
    n = N_ORDINARY + u.numel()

    def normal(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(n, generator=generator, dtype=torch.float64)

    # Steps of 1/256 in the edges: logp - anchor is then the log-ratio itself, bit for bit.
    logprobs = -normal().abs() - 0.05
    logprobs[N_ORDINARY:] = (logprobs[N_ORDINARY:] * 256).round() / 256
    advantages = normal()
    advantages[N_ORDINARY:] = torch.tensor([1.5, -0.75, 0.0], dtype=torch.float64).repeat(u.numel() // 3)

    def anchor(scale: float) -> Tensor:
        other = logprobs - normal(scale)
        other[N_ORDINARY:] = logprobs[N_ORDINARY:] - u
        return other

    weights, kl_weights, entropy_weights = (0.1 + normal().abs() for _ in range(3))
    weights[:N_ORDINARY:7] = 0.0
    kl_weights[:N_ORDINARY:5] = 0.0
    entropy_weights[:N_ORDINARY:3] = 0.0
    old, ref, rollout = anchor(0.3), anchor(0.4), anchor(0.5)
    columns = reference.TokenColumns(
        advantages=advantages,
        weights=weights,
        kl_weights=None if spec.kl is None else kl_weights,
        entropy_weights=entropy_weights if spec.entropy_coef else None,
        anchor=None if spec.ratio_anchor == "self" else old,
        kl_anchor=None if spec.kl is None else ref,
        kl_ratio_anchor=rollout if spec.kl_ratio_anchor == "rollout" else None,
        positive=normal() > 0,
        log_correction=None,
    )
    if spec.couples_sequences:
        shared = logprobs - old
        columns = columns._replace(
            sequence_log_ratio=shared.clamp(-18.0, 20.0) if spec.surrogate == "vespo" else shared
        )
    return logprobs, normal().abs(), columns


def evaluate(
    terms: TERMS,
    spec: PolicyLoss,
    logprobs: Tensor,
    entropy: Tensor,
    columns: reference.TokenColumns,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Return every result and gradient by name, at `dtype`; a gradient that does not exist is 0."""

    def cast(x: Tensor | None) -> Tensor | None:
        return None if x is None else x if x.dtype == torch.bool else x.to(dtype)

    cast_columns = reference.TokenColumns(*(cast(x) for x in columns))
    leaves = {"logprobs": logprobs.to(dtype).clone(), "entropy": entropy.to(dtype).clone()}
    if columns.sequence_log_ratio is not None:
        leaves["sequence"] = cast_columns.sequence_log_ratio.clone()
        cast_columns = cast_columns._replace(sequence_log_ratio=leaves["sequence"])
    for leaf in leaves.values():
        leaf.requires_grad_()
    result = terms(spec, leaves["logprobs"], leaves["entropy"], cast_columns)
    found = {name: value for name, value in result._asdict().items() if value is not None}
    contribution = found["contribution"]
    # A different factor per token: a gradient that went to another token, or ignored the upstream one, shows.
    upstream = torch.linspace(0.5, 2.0, contribution.numel(), dtype=torch.float64).to(dtype)
    if contribution.requires_grad:
        given = torch.autograd.grad(contribution, list(leaves.values()), upstream, allow_unused=True)
    else:
        given = [None] * len(leaves)
    for (name, leaf), gradient in zip(leaves.items(), given, strict=True):
        found[f"grad_{name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    assert all(not value.requires_grad for name, value in found.items() if name != "contribution")
    return found


def judge_terms(label: str, spec: PolicyLoss, dtype: torch.dtype) -> None:
    """Assert that the kernel is as accurate as the reference at `dtype`, group by group, and has the same flags.

    In float64 the reference is exact by decree; the error that PyTorch's code would have had is its float32 error,
    scaled to the finer rounding.
    """
    logprobs, entropy, columns = tokens(spec)
    rounded = [logprobs.float(), entropy.float(), reference.TokenColumns(*(_float(x) for x in columns))]
    inputs = rounded if dtype == torch.float32 else [logprobs, entropy, columns]
    exact = evaluate(reference.token_terms, spec, *inputs, torch.float64)
    eager = evaluate(reference.token_terms, spec, *rounded, torch.float32)
    result = evaluate(interpreted, spec, *inputs, dtype)
    judge(label, result, exact, eager, dtype, groups())


def _float(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.dtype == torch.bool else x.float()


def judge(
    label: str,
    result: dict[str, Tensor],
    exact: dict[str, Tensor],
    eager: dict[str, Tensor],
    dtype: torch.dtype,
    places: dict[str, slice],
) -> None:
    """Assert that `result` holds what `exact` holds, each part within the oracle's budget."""
    assert result.keys() == exact.keys(), f"{label}: expected {sorted(exact)}, got {sorted(result)}"
    for name, value in result.items():
        if value.dtype == torch.bool:
            assert torch.equal(value, exact[name]), f"{label} {name}: differs at {value.ne(exact[name]).nonzero()[:8]}"
            continue
        coarse = eager[name].double()
        if dtype == torch.float64:
            scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            coarse = exact[name] + (coarse - exact[name]) * scale
        for group, place in places.items():
            # Where float32 itself overflows, there is nothing to be as accurate as.
            judged = coarse[place].isfinite() | ~exact[name][place].isfinite()
            parts = (x[place][judged] for x in (value, exact[name], coarse))
            assert_as_accurate(f"{label} {name} ({group})", *parts, dtype=dtype)


def fields_of(surrogate: str, variant: int) -> dict[str, Any]:
    """Return the fields that the surrogate takes, in one of several variants."""
    even = variant % 2 == 0
    fields: dict[str, Any] = {"surrogate": surrogate, "clip_low": None, "clip_high": None}
    if surrogate in ("clip", "geometric") or surrogate.startswith("divergence"):
        fields |= [
            {"clip_low": 0.2, "clip_high": 0.28},
            {"clip_low": 0.1, "clip_high": None},
            {"clip_low": 0.15, "clip_high": 0.1},
            {"clip_low": None, "clip_high": 0.05},
        ][variant % 4]
    if surrogate == "clip":
        fields |= {"dual_clip": 1.1} if even else {"max_ratio": 1.5}
    if surrogate.startswith("divergence"):
        fields["carrier"] = "ratio" if variant % 3 == 0 else "logprob"
    if surrogate in ("clipped_weight", "masked_weight", "topr") or fields.get("carrier") == "logprob":
        fields |= {"weight_low": 0.9, "weight_high": 1.2} if even else {"weight_high": 1.1}
    if surrogate == "sapo":
        fields |= {"tau_pos": 1.3, "tau_neg": 0.7}
    if surrogate == "square":
        fields["square_tau"] = (0.3, 1.0, 2.5)[variant % 3]
    if surrogate == "vespo":
        fields |= {"k_pos": 1.5, "lambda_neg": 2.5}
    if surrogate in ("vespo", "geometric"):
        fields["ratio_level"] = "none"
    return fields


def kl_fields(axes: tuple[str, str] | None, variant: int) -> dict[str, Any]:
    """Return the KL fields of an estimator and a gradient, with and without clamps."""
    if axes is None:
        return {}
    kl, gradient = axes
    fields: dict[str, Any] = {"kl": kl, "kl_coef": 0.1, "kl_gradient": gradient}
    if variant % 2 == 1:
        fields |= {"kl_log_ratio_clamp": 0.5, "kl_value_clamp": 0.3}
        if gradient == "straight_through_ratio":
            fields["kl_ratio_max"] = 1.1
        if gradient == "ratio_weighted":
            fields["kl_value_clamp_order"] = ("before", "after")[variant // 2 % 2]
    if "ratio" in gradient:
        fields["kl_ratio_anchor"] = (None, "rollout", "self")[variant % 3]
    return fields


def product_of_axes(surrogate: str) -> Iterator[PolicyLoss]:
    """Yield losses that cover surrogate x KL estimate x KL gradient; the other axes take turns."""
    offset = SURROGATES.index(surrogate)
    for i, axes in enumerate(KL_AXES):
        variant = i + offset
        yield PolicyLoss(
            **fields_of(surrogate, variant),
            **kl_fields(axes, variant),
            entropy_coef=0.01 * (variant % 3),
            log_ratio_clamp=(None, 20.0, 0.25)[variant % 3],
        )


def pairwise(factors: dict[str, Sequence[Any]], valid: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Return rows, one value per factor, in which every pair of values that any valid row has occurs together.

    Greedy and deterministic: each row starts from an uncovered pair and takes, factor by factor, the value that covers
    the most uncovered pairs while a valid row remains reachable.
    """
    names = list(factors)

    def key(a: str, x: int, b: str, y: int) -> tuple[str, int, str, int]:
        return (a, x, b, y) if names.index(a) < names.index(b) else (b, y, a, x)

    uncovered = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }

    def complete(row: dict[str, int]) -> dict[str, int] | None:
        left = [name for name in names if name not in row]
        if not valid({name: factors[name][i] for name, i in row.items()}):
            return None
        if not left:
            return row
        name = left[0]

        def gain(i: int) -> int:
            return sum(key(name, i, other, j) in uncovered for other, j in row.items())

        for i in sorted(range(len(factors[name])), key=gain, reverse=True):
            found = complete({**row, name: i})
            if found is not None:
                return found
        return None

    rows = []
    for pair in sorted(uncovered):
        if pair not in uncovered:
            continue
        a, x, b, y = pair
        row = complete({a: x, b: y})
        if row is not None:
            rows.append({name: factors[name][row[name]] for name in names})
            uncovered -= {key(c, row[c], d, row[d]) for c, d in itertools.combinations(names, 2)}
        uncovered.discard(pair)
    return rows


def ratio_at(u: float) -> float:
    """Return the ratio of a log-ratio beyond the limit, where it is exact in every dtype that holds the tangent."""
    return math.exp(reference.EXP_LIMIT) * (u - (reference.EXP_LIMIT - 1.0))


def _open(**fields: object) -> PolicyLoss:
    return PolicyLoss(**{"clip_low": None, "clip_high": None, **fields})


# 65 and 70 lie where the ratio is its tangent, exact in both dtypes: a ratio is then on a bound, not beside it.
BOUNDS = {
    "clip low at 1": PolicyLoss(clip_low=0.0),
    "clip high at 1": PolicyLoss(clip_high=0.0),
    "clip both at 1": PolicyLoss(clip_low=0.0, clip_high=0.0),
    "clip low at 0": PolicyLoss(clip_low=1.0),
    "clip high at 65": PolicyLoss(clip_high=ratio_at(65.0)),
    "clip open": _open(),
    "dual clip at 65": _open(dual_clip=ratio_at(65.0)),
    "max_ratio at 65": _open(max_ratio=ratio_at(65.0)),
    "max_ratio at 65, clip high at 1": PolicyLoss(clip_high=0.0, max_ratio=ratio_at(65.0)),
    **{
        f"{name} {low} {high}": _open(surrogate=name, weight_low=low, weight_high=high)
        for name in ("clipped_weight", "masked_weight", "topr", "divergence_tv_symmetric")
        if name != "divergence_tv_symmetric"
        for low, high in ((1.0, ratio_at(65.0)), (0.0, 1.0), (1.0, 1.0))
    },
    "log_ratio_clamp at 1": PolicyLoss(surrogate="importance", log_ratio_clamp=1.0, clip_low=None, clip_high=None),
    "log_ratio_clamp at 64": PolicyLoss(surrogate="importance", log_ratio_clamp=64.0, clip_low=None, clip_high=None),
    "kl clamp at 1": PolicyLoss(kl="k3", kl_coef=1.0, kl_log_ratio_clamp=1.0),
    "kl value at k2(1)": PolicyLoss(kl="k2", kl_coef=1.0, kl_value_clamp=0.5),
    "kl value at k1(1)": PolicyLoss(kl="k1", kl_coef=1.0, kl_value_clamp=1.0),
    "kl product at 1": PolicyLoss(
        kl="k1", kl_coef=1.0, kl_gradient="ratio_weighted", kl_value_clamp=1.0, kl_value_clamp_order="after"
    ),
    "abs at 0": PolicyLoss(kl="abs", kl_coef=1.0),
    "kl ratio at 65": PolicyLoss(
        kl="k2", kl_coef=1.0, kl_gradient="straight_through_ratio", kl_ratio_max=ratio_at(65.0)
    ),
}
