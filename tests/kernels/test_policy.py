"""The fused token arithmetic against the reference: values, gradients, flags, ties, bounds and what is not finite."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from device import DEVICE, LANE
from policy_cases import BOUNDS, evaluate, interpreted, judge, judge_terms, product_of_axes, tokens
from torch import Tensor

from fastrl import reference
from fastrl.losses.policy import PolicyLoss
from fastrl.losses.policy.axes import SURROGATES
from fastrl.ops import policy as op
from fastrl_kernels import policy as kernels
from fastrl_kernels import policy_parts
from fastrl_kernels.launch import COMPILE_OPTIONS, on_device_of

pytestmark = LANE
DTYPES = [torch.float32, torch.float64]


@triton.jit
def _exp_terms_kernel(x_ptr, exp_ptr, expm1_ptr, tail_ptr, N, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    exp, expm1, tail = policy_parts._exp_terms(tl.load(x_ptr + offs, mask=mask, other=0.0))
    tl.store(exp_ptr + offs, exp, mask=mask)
    tl.store(expm1_ptr + offs, expm1, mask=mask)
    tl.store(tail_ptr + offs, tail, mask=mask)


def exp_terms(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.to(DEVICE)
    exp, expm1, tail = (torch.full_like(x, math.nan) for _ in range(3))
    with on_device_of(x):
        grid = (triton.cdiv(x.numel(), 4096),)
        _exp_terms_kernel[grid](x, exp, expm1, tail, x.numel(), BLOCK=4096, **COMPILE_OPTIONS)
    return exp.cpu(), expm1.cpu(), tail.cpu()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponentials_are_accurate_relative_to_themselves(dtype: torch.dtype) -> None:
    """e^x and e^x - 1 are within four roundings of themselves, e^x - 1 - x within eight, near 0 too."""
    small = torch.logspace(-6, 0, 700, dtype=torch.float64)
    x = torch.cat([torch.linspace(-80, 64, 2000, dtype=torch.float64), small, -small]).to(dtype)
    exp, expm1, tail = (y.double().numpy() for y in exp_terms(x))
    wide = x.numpy().astype(np.longdouble)
    series = sum(wide**k / math.factorial(k) for k in range(2, 30))
    exact_tail = np.where(np.abs(wide) < 1, series, np.expm1(wide) - wide)
    eps = torch.finfo(dtype).eps
    judged = {"exp": (exp, np.exp(wide), 4), "expm1": (expm1, np.expm1(wide), 4), "tail": (tail, exact_tail, 8)}
    for name, (got, exact, granted) in judged.items():
        worst = np.max(np.abs((got - exact) / exact))
        assert worst <= granted * eps, f"{name}: relative error {worst / eps:.2f} roundings"


@pytest.mark.parametrize("dtype", DTYPES)
def test_exponential_at_its_ends(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, -0.0, -math.inf, -1e4, 1e4, math.inf, math.nan, -750.0], dtype=dtype)
    exp, expm1, tail = exp_terms(x)
    assert exp[:7].tolist()[:6] == [1.0, 1.0, 0.0, 0.0, math.inf, math.inf]
    assert exp[6].isnan()
    assert exp[7] == 0.0
    assert expm1[:4].tolist() == [0.0, 0.0, -1.0, -1.0]
    assert tail[:2].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_terms_over_surrogate_kl_and_gradient(surrogate: str, dtype: torch.dtype) -> None:
    """Every surrogate with every KL estimate and gradient: values, gradients and flags, also far out."""
    for spec in product_of_axes(surrogate):
        judge_terms(f"{surrogate} {spec.kl} {spec.kl_gradient} {dtype}", spec, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_on_the_bounds(dtype: torch.dtype) -> None:
    """Clamps pass gradients on their bounds, ties halve them and the sign of 0 is 0, as autograd has it."""
    for name, spec in BOUNDS.items():
        judge_terms(name, spec, dtype)


def test_divergence_on_its_bounds() -> None:
    """p - q exactly at the bound keeps the token."""
    half, quarter = math.log(0.5), math.log(0.25)
    p, q = torch.tensor([half, quarter], dtype=torch.float64), torch.tensor([quarter, half], dtype=torch.float64)
    gap = float((p.exp() - q.exp()).abs()[0])
    for surrogate in ("divergence_tv", "divergence_tv_symmetric"):
        spec = PolicyLoss(surrogate=surrogate, clip_low=gap, clip_high=gap, carrier="ratio")
        columns = reference.TokenColumns(
            *(torch.ones(2, dtype=torch.float64) for _ in range(2)), None, None, q, *[None] * 4
        )
        exact = evaluate(reference.token_terms, spec, p, p, columns, torch.float64)
        result = evaluate(interpreted, spec, p, p, columns, torch.float64)
        assert not exact["clipped_high"].any()
        assert torch.equal(result["clipped_high"], exact["clipped_high"])
        assert torch.equal(result["clipped_low"], exact["clipped_low"])


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_what_is_not_finite_propagates_as_in_the_reference(surrogate: str) -> None:
    """NaN and infinities in each column give the reference's values, and its gradients, NaN for NaN and 0 for 0."""
    junk = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    spec = next(s for s in product_of_axes(surrogate) if s.kl == "k3" and s.kl_gradient == "ratio_weighted")
    logprobs, entropy, columns = tokens(spec)
    one = torch.ones_like(logprobs)
    columns = columns._replace(weights=one.clone(), kl_weights=one, entropy_weights=one)
    for i, column in enumerate(
        (logprobs, columns.advantages, columns.anchor, columns.kl_anchor, entropy, columns.weights)
    ):
        if column is not None:
            column[3 * i : 3 * i + 3] = junk
    exact = evaluate(reference.token_terms, spec, logprobs, entropy, columns, torch.float64)
    eager = evaluate(reference.token_terms, spec, logprobs, entropy, columns, torch.float32)
    result = evaluate(interpreted, spec, logprobs, entropy, columns, torch.float64)
    # The loss of a weight that is not finite is lost: its gradient may be NaN where the reference finds one.
    places = {"values": slice(0, 18)}, {"gradients": slice(0, 15)}
    for of_gradients in (False, True):
        exact_part, eager_part, part = (
            {name: value for name, value in x.items() if name.startswith("grad_") == of_gradients}
            for x in (exact, eager, result)
        )
        judge(surrogate, part, exact_part, eager_part, torch.float64, places[of_gradients])


@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_zero_selects(dtype: torch.dtype) -> None:
    """Whatever a token of weight 0 holds, it adds exactly 0 and has gradient exactly 0."""
    junk = torch.tensor([math.nan, math.inf, -math.inf, 1e30], dtype=torch.float64)
    for surrogate in SURROGATES:
        spec = next(s for s in product_of_axes(surrogate) if s.kl == "k3" and s.kl_gradient == "ratio_weighted")
        logprobs, entropy, columns = tokens(spec)
        zero = torch.zeros_like(logprobs)
        given = {
            "logprobs": logprobs,
            "advantages": columns.advantages,
            "anchor": columns.anchor,
            "kl": columns.kl_anchor,
        }
        for i, column in enumerate(given.values()):
            if column is not None:
                column[4 * i : 4 * i + 4] = junk
        entropy[16:20] = junk
        columns = columns._replace(weights=zero, kl_weights=zero, entropy_weights=zero)
        result = evaluate(interpreted, spec, logprobs, entropy, columns, dtype)
        for name in (
            "contribution",
            "grad_logprobs",
            "grad_entropy",
            *(["grad_sequence"] if "grad_sequence" in result else []),
        ):
            assert bool((result[name] == 0).all()), f"{surrogate} {name}: {result[name].ne(0).nonzero()[:8].tolist()}"


def test_ratio_is_one_where_policies_agree() -> None:
    spec = PolicyLoss.preset("grpo")
    logprobs, entropy, columns = tokens(spec)
    for dtype in DTYPES:
        same = columns._replace(anchor=logprobs, kl_anchor=logprobs)
        result = evaluate(interpreted, spec, logprobs, entropy, same, dtype)
        assert torch.equal(result["ratio"], torch.ones_like(result["ratio"]))
        assert torch.equal(result["kl"], torch.zeros_like(result["kl"]))


def test_more_tokens_than_one_program() -> None:
    """Programs beyond the first see their own tokens; the last may be partly empty."""
    spec = PolicyLoss.preset("grpo", dual_clip=3.0)
    n = 2 * kernels.TILE.block + 7
    logprobs, _, columns = tokens(spec)
    index = torch.arange(n) % logprobs.numel()
    many = reference.TokenColumns(*(None if x is None else x[index] for x in columns))
    few = spec_results(spec, logprobs, columns)
    for got, want in zip(spec_results(spec, logprobs[index], many), few, strict=True):
        assert torch.equal(got, want[index])


def spec_results(spec: PolicyLoss, logprobs: Tensor, columns: reference.TokenColumns) -> list[Tensor]:
    leaf = logprobs.clone().requires_grad_()
    terms = interpreted(spec, leaf, None, columns)
    return [*(x.detach() for x in terms if x is not None), torch.autograd.grad(terms.contribution.sum(), leaf)[0]]


def test_no_tokens() -> None:
    spec = PolicyLoss.preset("grpo")
    empty = torch.zeros(0, requires_grad=True)
    columns = reference.TokenColumns(
        *(torch.zeros(0) for _ in range(3)), None, *(torch.zeros(0) for _ in range(2)), *[None] * 3
    )
    terms = interpreted(spec, empty, None, columns)
    assert terms.contribution.shape == (0,)
    assert torch.autograd.grad(terms.contribution.sum(), empty)[0].shape == (0,)


def test_strided_columns() -> None:
    """Columns of any stride are read by their elements."""
    spec = PolicyLoss.preset("grpo")
    logprobs, _, columns = tokens(spec)
    apart = reference.TokenColumns(*(None if x is None else torch.stack([x, x], -1)[:, 0] for x in columns))
    wide = torch.stack([logprobs, logprobs], -1)[:, 0]
    for got, want in zip(spec_results(spec, wide, apart), spec_results(spec, logprobs, columns), strict=True):
        assert torch.equal(got, want)


def test_gradient_is_formed_only_where_it_is_needed() -> None:
    spec = PolicyLoss.preset("grpo", entropy_coef=0.1)
    logprobs, entropy, columns = tokens(spec)
    assert not interpreted(spec, logprobs, entropy, columns).contribution.requires_grad
    with torch.no_grad():
        assert not interpreted(spec, logprobs.clone().requires_grad_(), entropy, columns).contribution.requires_grad
    leaf = entropy.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(interpreted(spec, logprobs, leaf, columns).contribution.sum(), leaf)
    assert torch.equal(gradient, -columns.entropy_weights)


def test_second_derivatives_are_refused() -> None:
    spec = PolicyLoss.preset("grpo")
    logprobs, _, columns = tokens(spec)
    leaf = logprobs.requires_grad_()
    contribution = interpreted(spec, leaf, None, columns).contribution.sum()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(contribution, leaf, create_graph=True)


def test_backward_twice_over_a_kept_graph() -> None:
    spec = PolicyLoss.preset("gspo")
    logprobs, _, columns = tokens(spec)
    leaf = logprobs.requires_grad_()
    columns = columns._replace(sequence_log_ratio=leaf * 0.1)
    loss = interpreted(spec, leaf, None, columns).contribution.sum()
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(4.0 * loss, leaf)[0], 4.0 * first)


def test_named_backends() -> None:
    """On a CPU, "auto" and "torch" are the reference bit for bit; an unknown name is refused."""
    spec = PolicyLoss.preset("grpo")
    logprobs, entropy, columns = tokens(spec)
    want = reference.token_terms(spec, logprobs, entropy, columns).contribution
    for backend in ("auto", "torch"):
        assert torch.equal(op.fused_policy_terms(spec, logprobs, entropy, columns, backend=backend).contribution, want)
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'torch', 'triton', got 'cpu'"):
        op.fused_policy_terms(spec, logprobs, entropy, columns, backend="cpu")


def test_entropy_is_asked_for() -> None:
    spec = PolicyLoss.preset("grpo", entropy_coef=0.1)
    logprobs, _, columns = tokens(spec)
    with pytest.raises(ValueError, match="need entropy="):
        interpreted(spec, logprobs, None, columns)


def test_numbers_and_columns_have_the_kernels_names() -> None:
    """The op passes numbers and columns in one order; numbers are never part of what is compiled."""
    assert kernels.PolicyNumbers._fields == op.NUMBERS
    assert kernels.PolicyColumns._fields == op.CONSTANTS
    assert set(op.CONSTANTS) <= set(reference.TokenColumns._fields)
    defaults = PolicyLoss()
    assert op.numbers_of(defaults) == list(kernels.PolicyNumbers())
    axes = dataclasses.replace(defaults, kl="k3", kl_gradient="ratio_weighted", kl_ratio_anchor="self")
    assert op.axes_of(axes) == ("clip", "", "k3", "ratio_weighted", "own", "before")


def test_op_has_a_schema_a_fake_and_a_gradient() -> None:
    for spec in (PolicyLoss.preset("grpo", dual_clip=3.0, entropy_coef=0.1), PolicyLoss.preset("gspo")):
        logprobs, entropy, columns = tokens(spec)
        shared = columns.sequence_log_ratio
        constants = {name: getattr(columns, name) for name in op.CONSTANTS if getattr(columns, name) is not None}
        arguments = (
            logprobs[:8].to(DEVICE).clone().requires_grad_(),
            entropy[:8].to(DEVICE).clone().requires_grad_() if spec.uses_entropy else None,
            None if shared is None else shared[:8].to(DEVICE).clone().requires_grad_(),
            [x[:8].to(DEVICE) for x in constants.values()],
            ",".join(constants),
            *op.axes_of(spec),
            op.numbers_of(spec),
            True,
        )
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(torch.ops.fastrl.policy_terms, arguments, test_utils=checks)


def test_compiles_without_a_graph_break() -> None:
    spec = PolicyLoss.preset("grpo", entropy_coef=0.1, dual_clip=3.0)
    logprobs, entropy, columns = tokens(spec)

    def loss(x: Tensor) -> Tensor:
        return interpreted(spec, x, entropy, columns).contribution.sum()

    eager, traced = (logprobs.clone().requires_grad_() for _ in range(2))
    loss(eager).backward()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(traced).backward()
    assert torch.equal(traced.grad, eager.grad)
