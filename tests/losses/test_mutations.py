"""Every fault of `mutations.py` is noticed: by released trainers' numbers, or where the two realisations meet."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from golden import cases
from golden_policy import build, call
from mutations import KERNEL, LOGITS_KERNEL, REFERENCE, Mutation, load, mutated_source
from policy_cases import BOUNDS, judge_terms, product_of_axes
from policy_logits_cases import check_parts

import fastrl_kernels
from fastrl import reference
from fastrl.losses.policy import PolicyLoss, RolloutCorrection
from fastrl.losses.policy.axes import SURROGATES
from fastrl.reference import columns, correction, kl, numerics, terms
from fastrl_kernels import policy as kernel
from fastrl_kernels import policy_logits as logits_kernel
from fastrl_kernels import policy_parts as kernel_parts

REFERENCE_MODULES = (terms, columns, kl, correction, numerics)


def agrees_with_trainers() -> None:
    """Assert loss and gradients of the golden cases, in an order that brings unlike cases first."""
    every = cases("policy")
    for case in (case for start in range(8) for case in every[start::8]):
        inputs = case.leaves(torch.float64)
        loss = call(case, build(case), inputs)
        case.check("loss", loss)
        loss.backward()
        case.check_gradients(inputs)


def realisations_agree() -> None:
    """Assert that the kernel gives what the reference gives, for losses of every surrogate and on every bound."""
    for name, spec in BOUNDS.items():
        judge_terms(name, spec, torch.float64)
    for surrogate in SURROGATES:
        for spec in list(product_of_axes(surrogate))[:: 5 if surrogate == "clip" else 8]:
            judge_terms(f"{surrogate} {spec.kl} {spec.kl_gradient}", spec, torch.float64)


def one_token(spec: PolicyLoss, logprob: float, **others: float) -> tuple[float, float]:
    """Return (loss, gradient) of a single token of advantage 1."""
    leaf = torch.tensor([[logprob]], dtype=torch.float64, requires_grad=True)
    given = {name: torch.tensor([[value]], dtype=torch.float64) for name, value in others.items()}
    loss = spec(leaf, advantages=torch.ones(1, dtype=torch.float64), mask=torch.ones(1, 1), **given).loss
    loss.backward()
    return loss.item(), leaf.grad.item()


def close(found: tuple[float, float], loss: float, gradient: float) -> None:
    assert found == pytest.approx((loss, gradient), rel=1e-12, abs=1e-15)


def by_hand() -> None:
    """Assert what no trainer's numbers pin down: bounds that do not bite there, denominators under their tolerance."""
    bare = PolicyLoss.preset("reinforce")

    def with_kl(kl: str, **fields: object) -> PolicyLoss:
        return dataclasses.replace(bare, kl=kl, kl_coef=1.0, **fields)

    # -A logp alone is 2 with gradient -1; log-ratios are 1.5 to the reference and 1 to the old policy.
    ref, old = {"ref_logprobs": -3.5}, {"old_logprobs": -3.0}
    close(one_token(with_kl("k2", kl_log_ratio_clamp=1.0), -2.0, **ref), 2.0 + 0.5, -1.0)
    close(one_token(with_kl("k2", kl_value_clamp=0.25), -2.0, **ref), 2.0 + 0.25, -1.0)
    capped = with_kl("k2", kl_gradient="straight_through_ratio", kl_ratio_max=2.0, kl_ratio_anchor="old")
    close(one_token(capped, -2.0, **ref, **old), 2.0 + 1.125, -1.0 + 2.0 * 1.5)
    # k2 is 1.125, times the ratio e it is 3.06: between the two stands the bound.
    bounded = {"kl_gradient": "ratio_weighted", "kl_ratio_anchor": "old", "kl_value_clamp": 2.0}
    product = 1.125 * math.e
    close(one_token(with_kl("k2", **bounded), -2.0, **ref, **old), 2.0 + product, -1.0 + 1.5 * math.e + product)
    close(one_token(with_kl("k2", **bounded, kl_value_clamp_order="after"), -2.0, **ref, **old), 2.0 + 2.0, -1.0)
    close(one_token(PolicyLoss.preset("dft"), -2.0), 2.0 * math.exp(-2.0), -math.exp(-2.0))
    loose = PolicyLoss(surrogate="importance", clip_low=None, clip_high=None)
    close(one_token(loose, -2.0, **old), -math.e, -math.e)
    close(one_token(dataclasses.replace(loose, log_ratio_clamp=0.5), -2.0, **old), -math.exp(0.5), 0.0)
    square = dataclasses.replace(loose, surrogate="square", square_tau=0.5)
    close(one_token(square, -2.0, **old), (1.0 - 0.5) ** 2 / (2.0 * 0.5), -(1.0 - 0.5))
    pooled = dataclasses.replace(loose, ratio_level="sequence", sequence_log_ratio_max=0.5)
    close(one_token(pooled, -2.0, **old), -math.exp(0.5), 0.0)


def denominators_by_hand() -> None:
    """Assert the denominators of a batch with an empty sequence, and the mean that normalises a correction."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -7.0, -9.0], [-4.0, -4.0, -4.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    spec = PolicyLoss.preset("sft", aggregate="sequence_mean", denominator_eps=1.0)
    assert spec(logprobs, mask=mask).loss.item() == pytest.approx((6.0 / 4.0 + 0.5 / 2.0) / 2.0, rel=1e-12)
    rollout = logprobs - torch.tensor([[0.1, -0.2, 0.3], [0.4, 5.0, 5.0], [5.0, 5.0, 5.0]], dtype=torch.float64)
    weights = (logprobs - rollout).exp()[mask != 0]
    spec = PolicyLoss.preset("sft", correction=RolloutCorrection(high=9.0, batch_normalize=True))
    loss = spec(logprobs, mask=mask, old_logprobs=logprobs, rollout_logprobs=rollout).loss
    exact = -(weights * logprobs[mask != 0]).sum() / weights.sum()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)


def notices(check: Callable[[], None]) -> bool:
    """Return whether the check fails."""
    try:
        check()
    except (AssertionError, RuntimeError):
        return True
    return False


def test_checks_pass_without_a_fault() -> None:
    agrees_with_trainers()
    by_hand()
    denominators_by_hand()
    realisations_agree()


@pytest.mark.parametrize("mutation", REFERENCE, ids=lambda mutation: mutation.name)
def test_fault_in_the_reference_is_noticed(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the kernel: what other trainers compute, and arithmetic by hand, must be enough."""
    module, source = mutated_source(mutation, REFERENCE_MODULES)
    faulty = load(source, "faulty_reference", tmp_path)
    for name, value in vars(faulty).items():
        if isinstance(value, types.FunctionType) and value.__module__ == faulty.__name__:
            # Every module that imported the function holds a name of its own for it.
            for importer in (reference, *REFERENCE_MODULES):
                if vars(importer).get(name) is vars(module)[name]:
                    monkeypatch.setattr(importer, name, value)
    assert notices(by_hand) or notices(denominators_by_hand) or notices(agrees_with_trainers)


@pytest.mark.parametrize("mutation", KERNEL, ids=lambda mutation: mutation.name)
def test_fault_in_the_kernel_is_noticed(mutation: Mutation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, source = mutated_source(mutation, (kernel, kernel_parts))
    faulty = load(source, "faulty_policy_kernel", tmp_path)
    if module is kernel_parts:
        monkeypatch.setitem(sys.modules, kernel_parts.__name__, faulty)
        faulty = load(inspect.getsource(kernel), "policy_kernel_on_faulty_parts", tmp_path)
    monkeypatch.setattr(fastrl_kernels, "policy", faulty)
    assert notices(realisations_agree)


@pytest.mark.parametrize("mutation", LOGITS_KERNEL, ids=lambda mutation: mutation.name)
def test_fault_in_the_logits_kernel_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    _, source = mutated_source(mutation, (logits_kernel,))
    faulty = load(source, "faulty_policy_logits_kernel", tmp_path)
    assert notices(lambda: check_parts(faulty))
