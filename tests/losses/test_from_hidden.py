"""The policy loss from hidden states: the gradients of its backward, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from memory import MemoryWatch
from oracle import budget
from torch import Tensor

import fastrl
from fastrl import PolicyLoss, PreferenceLoss, checks, linear_token_logprobs, reference
from fastrl.backends.choice import choose
from fastrl.backends.torch_rows import TILE_ROWS
from fastrl.ops import chunks as chunks_module
from fastrl.ops import gradients as gradients_module
from fastrl.ops.fused import ROUNDED_ROWS
from fastrl.ops.gradients import CPU_WIDEN_ROWS


@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_every_backward_of_from_hidden_gives_the_same_bits(name: str) -> None:
    """The first backward hands its buffers over. Later writes to them reach no other backward."""
    leaves = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=True)
    labels = torch.randint(0, 7, (2, 3))
    inputs = {"advantages": torch.ones(2), "mask": torch.ones(2, 3), "old_logprobs": torch.full((2, 3), -2.0)}
    spec = PolicyLoss.preset(name, entropy_coef=0.1)
    loss = spec.from_hidden(*leaves, labels, **inputs, chunk_tokens=2).loss
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    for g in first:
        g.zero_()
    for _ in range(3):
        loss.backward(retain_graph=True)
    for leaf, g in zip(leaves, kept, strict=True):
        assert g.any()
        assert torch.equal(leaf.grad, g + g + g)
    (loss * 0.5).backward()
    for leaf, g in zip(leaves, kept, strict=True):
        assert torch.equal(leaf.grad, g + g + g + 0.5 * g)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize("factor", [None, 2.0])
@pytest.mark.parametrize("zeros", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_from_hidden(dtype: torch.dtype, zeros: int, factor: float | None) -> None:
    """The formula of the docstring within 5 %: no second gradient of the head, for any upstream factor and
    however many tokens have no gradient.
    """
    n, dim, vocabulary, chunk, size = 512, 256, 10000, 128, dtype.itemsize
    leaves = torch.randn(4, n // 4, dim).to(dtype).requires_grad_(), (torch.randn(vocabulary, dim) / 16).to(dtype)
    leaves[1].requires_grad_()
    labels = torch.randint(0, vocabulary, (4, n // 4))
    advantages = (torch.arange(4) >= zeros).float()
    inputs = {"advantages": advantages, "mask": torch.ones(4, n // 4), "old_logprobs": torch.full((4, n // 4), -10.0)}
    with MemoryWatch() as watch:
        loss = PolicyLoss.preset("dapo").from_hidden(*leaves, labels, **inputs, chunk_tokens=chunk).loss
        (loss if factor is None else loss * factor).backward()
    tile, head, states = chunk * vocabulary * 4, vocabulary * dim * 4, n * dim * size
    # A half-precision head is widened for the CPU in blocks, one of which with its product is there beside the tile.
    widened = 0 if size == 4 else CPU_WIDEN_ROWS * (dim + chunk) * 4
    formula = max(tile + widened, 0 if size == 4 else vocabulary * dim * size) + head + states
    # The row kernels in PyTorch, where there is no C++ compiler, take ten tiles of their own rows.
    rows = 0 if choose("auto", leaves[0].device).backend == "cpu" else 10 * TILE_ROWS * vocabulary * 4
    assert tile + head <= watch.peak <= 1.05 * formula + rows


def half_batch(n: int = 24, dim: int = 16, vocabulary: int = 300) -> tuple[list[Tensor], Tensor, dict[str, Any]]:
    """Return hidden states, head and bias in float16, labels, and inputs that make gradients of 1e-9."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(n, dim, generator=generator), 0.25 * torch.randn(vocabulary, dim, generator=generator)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    given = {"advantages": torch.randn(n, generator=generator), "mask": torch.ones(n), "n_tokens": 1e6}
    return [x.half() for x in (hidden, weight, 0.1 * weight[:, 0])], labels, given | {"n_sequences": 1e6}


@pytest.mark.parametrize("tail_mass", [0.0, 1e-4])
@pytest.mark.parametrize("trained", ["all", "hidden"])
@pytest.mark.parametrize("name", ["grpo", "gspo", "kl_cov", "sigmoid"])
def test_float16_survives_the_loss_scale(name: str, trained: str, tail_mass: float) -> None:
    """A gradient below float16's smallest number is there once the loss scale has multiplied it, on every path."""
    inputs, labels, given = half_batch()

    def gradients(dtype: torch.dtype, factor: float, fused: bool) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_(trained == "all" or i == 0) for i, x in enumerate(inputs)]
        shaped, ids = leaves[0].view(4, 6, -1), labels.view(4, 6)
        numbers = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in given.items()}
        if name == "sigmoid":
            spec: Any = PreferenceLoss.preset(name, reference=False)
            numbers = {"mask": torch.ones(4, 6), "n_pairs": 1e6}
        else:
            spec = PolicyLoss.preset(name)
            numbers |= {"advantages": numbers["advantages"].view(4, 6), "mask": torch.ones(4, 6)}
            numbers["ref_logprobs"] = torch.full((4, 6), -6.0)
        if fused:
            options = {"chunk_tokens": 8, "tail_mass": tail_mass, "bias": leaves[2]}
            loss = spec.from_hidden(shaped, leaves[1], ids, **options, **numbers).loss
        else:
            logprobs, _, _ = reference.linear_token_logprobs(shaped, leaves[1], ids, leaves[2])
            call = spec.from_logprobs if name == "sigmoid" else spec
            loss = call(logprobs, **numbers).loss
        (factor * loss).backward()
        return [x.grad for x in leaves if x.grad is not None]

    scale = 2.0**20
    exact, eager = gradients(torch.float64, scale, False), gradients(torch.float32, scale, False)
    unscaled, scaled = gradients(torch.float16, 1.0, True), gradients(torch.float16, scale, True)
    for i, got in enumerate(scaled):
        assert got.dtype == torch.float16
        # What the short lists may leave out has tests of its own.
        allowance = tail_mass * float(exact[i].abs().max())
        error = float((got.double() - exact[i]).abs().max())
        assert error <= budget(exact[i], eager[i], torch.float16) + allowance
        assert float(unscaled[i].abs().max()) <= 2e-3 * float(got.abs().max())


def test_memory_of_float16() -> None:
    """Both gradients in float32 after the forward, and the returned ones beside them in the backward."""
    n, dim, vocabulary, chunk = 512, 256, 10000, 128
    leaves = torch.randn(4, n // 4, dim).half().requires_grad_(), (torch.randn(vocabulary, dim) / 16).half()
    leaves[1].requires_grad_()
    labels = torch.randint(0, vocabulary, (4, n // 4))
    inputs = {"advantages": torch.ones(4), "mask": torch.ones(4, n // 4)}
    with MemoryWatch() as watch:
        loss = PolicyLoss.preset("reinforce").from_hidden(*leaves, labels, **inputs, chunk_tokens=chunk).loss
    tile, sums = chunk * vocabulary * 4 + CPU_WIDEN_ROWS * (dim + chunk) * 4, (vocabulary + n) * dim * 4
    rows = 0 if choose("auto", leaves[0].device).backend == "cpu" else 10 * TILE_ROWS * vocabulary * 4
    assert watch.peak <= 1.05 * (tile + sums) + rows
    with MemoryWatch() as watch:
        (loss * 2.0).backward()
    assert watch.peak <= 1.05 * (vocabulary + n) * dim * 2 + ROUNDED_ROWS * dim * 4


def test_float16_operands_of_a_gpu_keep_small_gradients() -> None:
    """The scaling in front of the half-precision products: exact, and not thrown off by zeros, NaN or infinities."""
    torch.manual_seed(0)
    for size in (1e-30, 3e-12, 1.0, 1e5, 2.0**100):
        gradient = size * torch.randn(5, 70)
        operand, factor = gradients_module._as_float16(gradient)
        assert operand.dtype == torch.float16
        assert float(torch.log2(factor)).is_integer()
        largest = gradient.abs().max()
        assert float((operand.float() * factor - gradient).abs().max()) <= 2.0**-11 * float(largest)
    gradient = torch.randn(5, 70)
    gradient[1, 2], gradient[3] = torch.inf, torch.nan
    for given in (gradient, torch.zeros(5, 70)):
        operand, factor = gradients_module._as_float16(given)
        back = operand.float() * factor
        assert torch.equal(back.isfinite(), given.isfinite())
        clean = given.isfinite()
        assert float((back - given)[clean].abs().max()) <= 2.0**-9


@pytest.mark.parametrize("needs", ["", "hidden", "weight", "hidden weight"])
@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
@pytest.mark.parametrize("name", ["dapo", "gspo", "kl_cov"])
def test_reported_units_are_the_products_that_ran(
    monkeypatch: pytest.MonkeyPatch, name: str, entropy_coef: float, needs: str
) -> None:
    """Also of a frozen head with an entropy bonus: 2 units where the gradient is formed in the forward, else 3."""
    rows: list[int] = []

    def counted(function: Callable[..., Any], of: int) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            rows.append(arguments[of].shape[0])
            return function(*arguments)

        return call

    products = ((chunks_module, "chunk_logits", 0), (gradients_module, "_times_weight", 0))
    for module, function, of in (*products, (gradients_module, "_add_weight_gradient", 1)):
        monkeypatch.setattr(module, function, counted(getattr(module, function), of))
    hidden, weight = torch.randn(2, 8, 4), torch.randn(7, 4)
    hidden.requires_grad_("hidden" in needs)
    weight.requires_grad_("weight" in needs)
    inputs = {"advantages": torch.tensor([1.0, -1.0]), "mask": torch.ones(2, 8), "ref_logprobs": torch.zeros(2, 8)}
    spec = PolicyLoss.preset(name, entropy_coef=entropy_coef)
    with torch.set_grad_enabled(bool(needs)):
        output = spec.from_hidden(hidden, weight, torch.randint(0, 7, (2, 8)), chunk_tokens=8, **inputs)
    if needs:
        output.loss.backward()
    frozen = "weight" not in needs
    separate = name == "kl_cov" or (name == "gspo" and frozen and not entropy_coef)
    units = 1 + len(needs.split()) + (separate and bool(needs) and not (frozen and not entropy_coef))
    assert sum(rows) / 16 == units == output.metrics["path/gemm_units"][0].item()


def test_a_mask_of_numbers_is_scanned_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    keep_mask = checks.keep_mask

    def noted(name: str, value: Any, *rest: Any) -> Any:
        seen.append(value.dtype)
        return keep_mask(name, value, *rest)

    monkeypatch.setattr(checks, "keep_mask", noted)
    hidden, weight = torch.randn(2, 8, 4, requires_grad=True), torch.randn(7, 4)
    mask = torch.ones(2, 8)
    mask[1, 5:] = 0.0
    inputs = {"advantages": torch.tensor([1.0, -1.0]), "mask": mask}
    PolicyLoss.preset("dapo").from_hidden(hidden, weight, torch.randint(0, 7, (2, 8)), **inputs)
    assert seen.count(torch.float32) == 1
    assert inputs["mask"] is mask


def test_keep_token_grads_changes_the_path_and_not_the_gradient() -> None:
    hidden, weight, labels = torch.randn(20, 8), torch.randn(30, 8), torch.randint(0, 30, (20,))
    gradients = []
    for option in ({"keep_token_grads": True}, {"keep_token_grads": False}, {"keep_units": False}, {}):
        leaf = hidden.clone().requires_grad_()
        outputs = linear_token_logprobs(leaf, weight, labels, chunk_tokens=8, **option)
        (outputs.logprobs.sum() + 0.5 * outputs.entropy.sum()).backward()
        gradients.append(leaf.grad)
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    for name in ("keep_token_grads", "keep_units"):
        for bad in (1, "yes"):
            with pytest.raises(TypeError, match=f"{name} must be True or False"):
                linear_token_logprobs(hidden, weight, labels, **{name: bad})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="expected one of them, got both"):
        linear_token_logprobs(hidden, weight, labels, keep_token_grads=True, keep_units=True)


@pytest.mark.parametrize("rounding", [None, "bf16"])
@pytest.mark.parametrize("name", ["dapo", "gspo", "kl_cov"])
def test_restricted_loss_is_that_of_restricted_logprobs(name: str, rounding: str | None) -> None:
    """Every path, and a second backward, takes the sets and the rounding."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(3, 8, 4, generator=generator), torch.randn(40, 4, generator=generator)
    labels = torch.randint(0, 40, (3, 8), generator=generator)
    mask = torch.rand(3, 8, generator=generator) < 0.8
    sets = torch.rand(3, 8, 40, generator=generator) < 0.4
    sets.scatter_(-1, labels.unsqueeze(-1), True)
    inputs = {"advantages": torch.tensor([1.0, -1.0, 2.0]), "mask": mask, "ref_logprobs": torch.full((3, 8), -3.0)}
    spec = PolicyLoss.preset(name, entropy_coef=0.1)
    found = []
    for path in ("hidden", "log-probs"):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        how = {"allowed": sets, "logits_rounding": rounding, "temperature": 0.8, "softcap": 5.0, "chunk_tokens": 5}
        if path == "hidden":
            output = spec.from_hidden(*leaves, labels, **inputs, **how)
        else:
            result = linear_token_logprobs(*leaves, torch.where(mask, labels, -100), **how)
            output = spec(result.logprobs, entropy=result.entropy, **inputs)
        first = torch.autograd.grad(output.loss, leaves, retain_graph=True)
        second = torch.autograd.grad(output.loss, leaves)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        found.append((output.loss.detach(), *first))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    plain = spec.from_hidden(hidden, weight, labels, **inputs, temperature=0.8, softcap=5.0).loss
    assert not torch.allclose(plain, found[0][0], rtol=1e-2)
    sets.scatter_(-1, labels.unsqueeze(-1), False)
    with fastrl.checked(), pytest.raises(ValueError, match="labels must be in their allowed sets"):
        spec.from_hidden(hidden, weight, labels, **inputs, allowed=sets)
