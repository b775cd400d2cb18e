"""The kernel that reads logits and writes the loss's gradient: bit for bit what the kernels that it joins give."""

from __future__ import annotations

import math

import pytest
import torch
from device import DEVICE, LANE
from policy_logits_cases import AXES, check_parts, problem

from fastrl_kernels import policy, policy_logits, token_logprobs

pytestmark = LANE


def test_bits_are_those_of_the_three_kernels() -> None:
    check_parts(policy_logits)


def test_no_rows() -> None:
    _, _, columns = problem(torch.float32, 4)
    none = policy.PolicyColumns(*(None if x is None else x[:0] for x in columns))
    empty, labels = torch.empty(0, 4, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    results = policy_logits.policy_logits_fwd(AXES["clip"], policy.PolicyNumbers(), empty, labels, 1.0, none, out=empty)
    assert results[0].shape == results[1].shape == results[2].contribution.shape == (0,)
    assert policy_logits.scale_rows(empty, torch.ones((), device=DEVICE)).shape == (0, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_on_a_device(dtype: torch.dtype) -> None:
    """The compiled kernels too: a vocabulary of a real model, more rows than processors."""
    n, vocabulary = 300, 151_936
    generator = torch.Generator(device="cuda").manual_seed(0)
    logits = torch.randn(n, vocabulary, generator=generator, device="cuda").mul_(3.0).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=generator, device="cuda")
    ones = torch.ones(n, device="cuda")
    residual = torch.empty(n, device="cuda")
    rows = token_logprobs.token_logprobs_fwd(logits, labels, 1.0, residual=residual)
    columns = policy.PolicyColumns(ones, ones / n, anchor=rows[0] + 0.05 * torch.randn(n, device="cuda"))
    axes, numbers = policy.PolicyAxes("clip"), policy.PolicyNumbers()
    terms = policy.policy_terms(axes, numbers, rows[0], rows[1], None, columns)
    want = token_logprobs.token_logprobs_bwd(
        logits, labels, 1.0, *rows, terms.grad_logprobs, None, None, residual=residual
    )
    out = torch.full_like(logits, math.nan)
    logprobs, entropy, results = policy_logits.policy_logits_fwd(axes, numbers, logits, labels, 1.0, columns, out=out)
    pairs = ((logprobs, rows[0]), (entropy, rows[1]), (results.ratio, terms.ratio), (out, want))
    for got, right in pairs:
        assert torch.equal(got, right)
