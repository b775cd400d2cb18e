"""The kernel that reads logits and writes the loss's gradient, held against the three kernels that it joins.

The tests of the kernel run `check_parts` on it, the tests of planted faults on a copy with a fault.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch
from device import DEVICE
from torch import Tensor

from fastrl_kernels import policy, token_logprobs

IGNORE = -5
N = 7
AXES = {
    "clip": policy.PolicyAxes("clip"),
    "clip with KL": policy.PolicyAxes("clip", kl="k3", kl_gradient="ratio_weighted", kl_ratio="own"),
    "divergence": policy.PolicyAxes("divergence_kl", "ratio", "k2", "straight_through"),
    "topr": policy.PolicyAxes("topr", kl="abs", kl_gradient="straight_through_ratio", kl_ratio="anchor"),
}


def problem(dtype: torch.dtype, vocabulary: int) -> tuple[Tensor, Tensor, policy.PolicyColumns]:
    """Return logits, labels and columns: NaN in a masked row and one of weight 0, a label that no row has."""
    generator = torch.Generator().manual_seed(vocabulary)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def draw() -> Tensor:
        return torch.randn(N, generator=generator).to(DEVICE, wide)

    logits = (3.0 * torch.randn(N, vocabulary, generator=generator)).to(DEVICE, dtype)
    labels = torch.randint(0, vocabulary, (N,), generator=generator).to(DEVICE)
    labels[2], labels[5] = IGNORE, vocabulary
    logits[[2, 4]] = math.nan
    base = -draw().abs()
    columns = policy.PolicyColumns(
        draw(), draw().abs(), draw().abs(), draw().abs(), base, base + draw(), base + draw(), draw() > 0
    )
    for name in ("weights", "kl_weights", "entropy_weights"):
        getattr(columns, name)[torch.tensor([2, 4])] = 0.0
    return logits, labels, columns


def check_parts(kernels: ModuleType) -> None:
    """Assert that the joined kernel gives the bits of its parts, over axes, dtypes and lengths of a row."""
    cases = [("clip", torch.float32, 1), ("clip with KL", torch.float32, 2500), ("divergence", torch.bfloat16, 33)]
    for name, dtype, vocabulary in [*cases, ("topr", torch.float64, 600), ("clip with KL", torch.float16, 5000)]:
        logits, labels, columns = problem(dtype, vocabulary)
        if name == "clip":
            columns = columns._replace(kl_weights=None, entropy_weights=None, kl_anchor=None, kl_ratio_anchor=None)
        one_kernel(kernels, AXES[name], logits, labels, columns, softcap=20.0 if vocabulary % 2 else 0.0)
    scaling(kernels)


def one_kernel(
    kernels: ModuleType,
    axes: policy.PolicyAxes,
    logits: Tensor,
    labels: Tensor,
    columns: policy.PolicyColumns,
    **options: Any,
) -> None:
    """Assert that one launch gives what three give; rows of weight 0 are 0 whatever they hold."""
    options |= {"ignore_index": IGNORE, "logit_scale": 0.9}
    numbers = policy.PolicyNumbers(dual_clip=3.0)
    inverse = torch.linspace(0.6, 1.4, N, device=DEVICE)
    residual = torch.empty(N, dtype=columns.weights.dtype, device=DEVICE)
    rows = token_logprobs.token_logprobs_fwd(logits, labels, inverse, residual=residual, **options)
    terms = policy.policy_terms(axes, numbers, rows[0], rows[1], None, columns)
    upstream = (terms.grad_logprobs, None if columns.entropy_weights is None else -columns.entropy_weights, None)
    want = token_logprobs.token_logprobs_bwd(logits, labels, inverse, *rows, *upstream, residual=residual, **options)
    without = (upstream[0] == 0) if upstream[1] is None else (upstream[0] == 0) & (upstream[1] == 0)
    want[without] = 0.0
    wide = torch.full((N, logits.shape[1] + 3), math.nan, dtype=logits.dtype, device=DEVICE)
    apart, over = wide[:, 1:-2], logits.clone()
    for source, out in ((logits, apart), (over, over)):
        logprobs, entropy, results = kernels.policy_logits_fwd(
            axes, numbers, source, labels, inverse, columns, out=out, **options
        )
        for got, right in ((logprobs, rows[0]), (entropy, rows[1]), (out, want)):
            assert torch.equal(got.nan_to_num(7.0), right.nan_to_num(7.0))
        assert not out[[2, 4]].any()
        for field, got, right in zip(results._fields[:7], results, terms, strict=False):
            assert (got is None) == (right is None), field
            if got is not None:
                assert torch.equal(got.double().nan_to_num(7.0), right.double().nan_to_num(7.0)), field
    assert bool(wide[:, 0].isnan().all())
    assert bool(wide[:, -2:].isnan().all())


def scaling(kernels: ModuleType) -> None:
    """Assert that rows are scaled, apart or in place, and left alone in place where the factor is 1."""
    x = torch.randn(3, 2050, device=DEVICE)
    for factor in (1.0, -0.3):
        place = x.clone()
        number = torch.tensor(factor, device=DEVICE)
        assert torch.equal(kernels.scale_rows(x, number), x * factor)
        assert kernels.scale_rows(place, number, out=place) is place
        assert torch.equal(place, x * factor)
    halves = torch.full((2, 5), 0.5, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.scale_rows(halves, torch.tensor(3.0, device=DEVICE)).tolist() == [[1.5] * 5] * 2
