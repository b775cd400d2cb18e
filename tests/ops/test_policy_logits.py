"""`PolicyLoss.from_logits`, its gradient formed in the forward: against float64, and bit for bit against its parts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory import MemoryWatch
from oracle import assert_as_accurate
from policy_cases import interpreted
from torch import Tensor
from vocabulary_cases import BACKENDS

import fastrl
from fastrl import PolicyLoss, RolloutCorrection, reference
from fastrl.backends import choice
from fastrl.losses.policy import loss as policy_loss
from fastrl.ops import policy as token_arithmetic
from fastrl.ops import policy_logits as op
from fastrl.ops import segments
from fastrl.ops.policy import NUMBERS

SEPARABLE = [
    name
    for name in PolicyLoss.presets()
    if not PolicyLoss.preset(name).couples_sequences and PolicyLoss.preset(name).ratio_level in ("token", "none")
]
COUPLED = [name for name in PolicyLoss.presets() if name not in SEPARABLE]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = (torch.float64, torch.float32)
CONVERSIONS = {"plain": {}, "softcap": {"softcap": 8.0, "logit_scale": -0.7}, "per token": {"temperature": "per token"}}


def batch(vocabulary: int = 37, rows: int = 3, time: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return logits (rows, time + 1, V) with banned entries, labels (rows, time) and the inputs of the loss."""
    generator = torch.Generator().manual_seed(1000 * vocabulary + seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    logits = 2.0 * draw(rows, time + 1, vocabulary)
    labels = torch.randint(0, vocabulary, (rows, time), generator=generator)
    if vocabulary > 4:
        banned = torch.rand(logits.shape, generator=generator) < 0.2
        banned[:, :-1].scatter_(-1, labels[..., None], False)
        logits = logits.masked_fill(banned, -math.inf)
    own = logits[:, :-1].log_softmax(-1).gather(-1, labels[..., None]).squeeze(-1)
    mask = torch.arange(time) < torch.tensor([time, 2, time - 1])[:rows, None]
    given = {
        "advantages": draw(rows),
        "mask": mask,
        "old_logprobs": own + 0.4 * draw(rows, time),
        "ref_logprobs": own + 0.4 * draw(rows, time),
        "rollout_logprobs": own + 0.3 * draw(rows, time),
        "group_ids": torch.arange(rows) // 2,
    }
    return logits, labels, given


def evaluate(
    spec: PolicyLoss, logits: Tensor, labels: Tensor, given: dict[str, Any], factor: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient at the whole logits) of the slice that `labels` belong to."""
    leaf = logits.clone().requires_grad_()
    loss = spec.from_logits(leaf[:, :-1], labels, **given, **options).loss
    (factor * loss).backward()
    return loss.detach(), leaf.grad


def plain(
    spec: PolicyLoss, logits: Tensor, labels: Tensor, given: dict[str, Any], dtype: torch.dtype, factor: float = 1.0,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return what `evaluate` returns from plain PyTorch at `dtype`."""
    leaf = logits.detach().clone().to(dtype).requires_grad_()
    options = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in options.items()}
    logprobs, entropy, _ = reference.token_logprobs(leaf[:, :-1], labels, **options)
    numbers = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    loss = spec(logprobs, entropy=entropy, **numbers).loss
    (factor * loss).backward()
    return loss.detach(), leaf.grad


def judge(
    name: str, spec: PolicyLoss, logits: Tensor, labels: Tensor, given: dict[str, Any], backend: str, factor: float,
    **options: Any,
) -> None:  # fmt: skip
    if spec.surrogate == "topr":
        given = {**given, "scores": given["advantages"].roll(1)}
    got = evaluate(spec, logits, labels, given, factor, backend=backend, **options)
    exact = plain(spec, logits, labels, given, torch.float64, factor, **options)
    eager = plain(spec, logits, labels, given, torch.float32, factor, **options)
    assert got[1].dtype == logits.dtype
    assert_as_accurate(f"{name} loss", got[0], exact[0], eager[0])
    assert_as_accurate(f"{name} gradient", got[1], exact[1], eager[1], dtype=logits.dtype)
    assert not got[1][:, :-1][~given["mask"]].any()
    assert not got[1][:, -1].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SEPARABLE)
def test_presets_against_float64(name: str, backend: str) -> None:
    """Every preset whose tokens stand alone, each with an entropy bonus or without, in each dtype and conversion."""
    logits, labels, given = batch()
    i = SEPARABLE.index(name)
    for j, dtype in enumerate(DTYPES):
        conversion = list(CONVERSIONS)[(i + j) % 3]
        options = dict(CONVERSIONS[conversion])
        if conversion == "per token":
            options["temperature"] = torch.linspace(0.5, 2.0, labels.numel()).view(labels.shape)
        spec = PolicyLoss.preset(name, entropy_coef=(0.0, 0.05)[(i + j) % 2])
        judge(f"{name} {dtype} {conversion}", spec, logits.to(dtype), labels, given, backend, 1.0, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [1, 2, 31, 1025])
def test_vocabulary_sizes_and_upstream_factors(vocabulary: int, backend: str) -> None:
    logits, labels, given = batch(vocabulary)
    spec = PolicyLoss.preset("grpo", entropy_coef=0.05, dual_clip=3.0)
    for dtype in DTYPES[:2]:
        for factor in (1.0 / 3.0, -40.0):
            judge(f"V={vocabulary} {dtype} {factor}", spec, logits.to(dtype), labels, given, backend, factor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [*SEPARABLE, "corrected"])
def test_bits_are_those_of_the_parts(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss, log-probs, entropy, metrics and gradient are those of `token_logprobs` and the call, bit for bit."""
    if backend == "triton":
        monkeypatch.setattr(policy_loss, "fused_policy_terms", interpreted)
    logits, labels, given = batch()
    spec = PolicyLoss.preset("dapo", correction=RolloutCorrection(high=1.1)) if name == "corrected" else (
        PolicyLoss.preset(name, entropy_coef=0.03)
    )  # fmt: skip
    one, two = (logits.clone().requires_grad_() for _ in range(2))
    fused = spec.from_logits(one[:, :-1], labels, backend=backend, temperature=0.8, **given)
    masked = torch.where(given["mask"], labels, -100)
    rows = fastrl.token_logprobs(two[:, :-1], masked, backend=backend, temperature=0.8)
    parts = spec(rows.logprobs, entropy=rows.entropy, **given)
    fused.loss.backward()
    parts.loss.backward()
    for got, want in ((fused.loss, parts.loss), (fused.logprobs, parts.logprobs), (fused.entropy, parts.entropy)):
        assert torch.equal(got, want)
    assert torch.equal(one.grad, two.grad)
    assert fused.metrics.keys() == parts.metrics.keys()
    for key, (total, count) in parts.metrics.items():
        assert torch.equal(fused.metrics[key][0], total), key
        assert torch.equal(fused.metrics[key][1], count), key


def sets_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Return sets (rows, time, V) that hold the labels and about half of the other tokens."""
    generator = torch.Generator().manual_seed(5)
    sets = torch.rand(logits[:, :-1].shape, generator=generator) < 0.5
    return sets.scatter_(-1, labels[..., None], True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
@pytest.mark.parametrize("restricted", ["allowed", "logits_rounding", "allowed logits_rounding"])
def test_restricted_rows_are_those_of_token_logprobs(restricted: str, name: str, backend: str) -> None:
    """Sets and rounding: float64 judges the gradient, and the bits are those of `token_logprobs` and the call."""
    logits, labels, given = batch()
    sets = sets_of(logits, labels)
    how: dict[str, Any] = {"allowed": sets} if "allowed" in restricted else {}
    if "logits_rounding" in restricted:
        how["logits_rounding"] = "bf16"
    spec, options = PolicyLoss.preset(name, entropy_coef=0.05), {"temperature": 0.8, "softcap": 8.0}
    got = evaluate(spec, logits, labels, given, 3.0, backend=backend, **options, **how)
    leaf = logits.clone().requires_grad_()
    masked = torch.where(given["mask"], labels, -100)
    rows = fastrl.token_logprobs(leaf[:, :-1], masked, backend=backend, **options, **how)
    parts = spec(rows.logprobs, entropy=rows.entropy, **given)
    (3.0 * parts.loss).backward()
    assert torch.equal(got[0], parts.loss.detach())
    assert torch.equal(got[1], leaf.grad)
    if "logits_rounding" in restricted:
        # The gradient is straight through: that of the rounded logits.
        logits = logits.bfloat16().float()
    judged = {"allowed": sets} if "allowed" in restricted else {}
    exact, eager = (plain(spec, logits, labels, given, dtype, 3.0, **options, **judged) for dtype in WIDTHS)
    assert_as_accurate("loss", got[0], exact[0], eager[0])
    assert_as_accurate("gradient", got[1], exact[1], eager[1])
    if judged:
        assert not got[1][:, :-1][~sets].any()


def test_restricted_rows_in_place_are_refused_by_name() -> None:
    logits, labels, given = batch()
    spec, made = PolicyLoss.preset("dapo"), logits.requires_grad_() * 1.0
    for how in ({"allowed": sets_of(logits, labels)}, {"logits_rounding": "bf16"}):
        with pytest.raises(ValueError, match=f"inplace=True .* but for {next(iter(how))}= copies"):
            spec.from_logits(made[:, :-1], labels, inplace=True, **how, **given)
    with pytest.raises(ValueError, match="logits_rounding must be one of"):
        spec.from_logits(made[:, :-1], labels, logits_rounding="int8", **given)


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_ratio_is_bitwise_one(backend: str) -> None:
    logits, labels, given = batch(1500)
    given["old_logprobs"] = fastrl.token_logprobs(logits[:, :-1], labels, backend=backend).logprobs
    leaf = logits.clone().requires_grad_()
    output = PolicyLoss.preset("ppo").from_logits(leaf[:, :-1], labels, backend=backend, **given)
    total, count = output.metrics["ratio"]
    assert torch.equal(total, count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_cannot_matter(backend: str) -> None:
    logits, labels, given = batch()
    spec = PolicyLoss.preset("grpo", entropy_coef=0.05)
    clean = evaluate(spec, logits, labels, given, backend=backend)
    outside = ~given["mask"]
    dirty, wrong = logits.clone(), torch.where(outside, -77, labels)
    dirty[:, :-1][outside] = math.nan
    got = evaluate(spec, dirty, wrong, given, backend=backend)
    assert torch.equal(got[0], clean[0])
    assert torch.equal(got[1][:, :-1], clean[1][:, :-1])
    assert not got[1][:, :-1][outside].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_gradient_are_zero_and_nan_stays_visible(backend: str) -> None:
    logits, labels, given = batch()
    given["mask"] = torch.ones_like(given["mask"])
    selection = torch.ones_like(given["mask"])
    selection[0, 1] = False
    spec = PolicyLoss.preset("reinforce")
    logits[0, 1, 3] = logits[1, 2, 3] = math.nan
    loss, gradient = evaluate(spec, logits, labels, {**given, "selection": selection}, backend=backend)
    assert bool(loss.isnan())
    assert not gradient[0, 1].any()
    assert bool(gradient[1, 2].isnan().all())
    assert int(gradient.isnan().sum()) == logits.shape[-1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_kept_graphs_and_second_backwards(backend: str, inplace: bool, dtype: torch.dtype) -> None:
    """Backwards over a kept graph do not disturb each other, nor what they handed out before."""
    logits, labels, given = batch()
    start, spec = logits.to(dtype), PolicyLoss.preset("dapo")
    want = evaluate(spec, start, labels, given, backend=backend)[1]
    leaf = start.clone().requires_grad_()
    loss = spec.from_logits(leaf[:, :-1] * 1.0, labels, backend=backend, inplace=inplace, **given).loss
    loss.backward(retain_graph=True)
    (leaf.grad * 1.0).zero_()
    assert torch.equal(leaf.grad, want)
    loss.backward(retain_graph=True)
    assert torch.equal(leaf.grad, want + want)
    leaf.grad.zero_()
    (4.0 * loss).backward(retain_graph=True)
    assert torch.equal(leaf.grad, 4.0 * want)
    (alone,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(alone, want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused(backend: str) -> None:
    logits, labels, given = batch()
    leaf = logits.requires_grad_()
    loss = PolicyLoss.preset("dapo").from_logits(leaf[:, :-1], labels, backend=backend, **given).loss
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_half_precision_factors_are_not_rounded_first() -> None:
    """A factor of 1/3 in bfloat16 would be wrong by 1.3e-3, in the same direction everywhere."""
    gradient, factor = torch.linspace(1.0, 2.0, 129).bfloat16().view(43, 3), torch.tensor(1.0 / 3.0)
    exact = (gradient.double() / 3.0).bfloat16()
    for backend in ("torch", "cpu"):
        assert torch.equal(op.scale_gradient(gradient.clone(), factor, backend, keep=True), exact)
        assert torch.equal(op.scale_gradient(gradient.clone(), factor, backend, keep=False), exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)])
def test_no_live_token(shape: tuple[int, int], backend: str) -> None:
    leaf = torch.full((*shape, 7), math.nan, requires_grad=True)
    given = {"advantages": torch.ones(shape[0]), "mask": torch.zeros(shape), "old_logprobs": torch.zeros(shape)}
    labels = torch.zeros(shape, dtype=torch.int64)
    output = PolicyLoss.preset("dapo").from_logits(leaf, labels, backend=backend, **given)
    output.loss.backward()
    assert output.loss.item() == 0.0
    assert leaf.grad.shape == leaf.shape
    assert not leaf.grad.any()


def test_packed_rows_and_checkpointing() -> None:
    logits, labels, given = batch()
    flat = {k: v.reshape(-1) if v.shape == labels.shape else v for k, v in given.items()}
    offsets = torch.arange(0, labels.numel() + 1, labels.shape[1])
    spec = PolicyLoss.preset("dapo")

    def step(x: Tensor) -> Tensor:
        return spec.from_logits(x * 1.0, labels.reshape(-1), cu_seqlens=offsets, **flat).loss

    want = evaluate(spec, logits, labels, given)
    packed, again = (logits[:, :-1].reshape(-1, 37).clone().requires_grad_() for _ in range(2))
    loss = step(packed)
    (3.0 * loss).backward()
    (3.0 * torch.utils.checkpoint.checkpoint(step, again, use_reentrant=False)).backward()
    assert torch.equal(loss.detach(), want[0])
    assert torch.equal(packed.grad, again.grad)
    assert torch.equal(packed.grad.view(3, 5, 37), 3.0 * want[1][:, :-1])


# --- where the gradient is formed, and the memory that it takes -------------------------------------------------------

WIDE = 4096


def wide_batch() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return logits of 4 MB and what belongs to them."""
    torch.manual_seed(0)
    labels = torch.randint(0, WIDE, (4, 64))
    given = {"advantages": torch.randn(4), "mask": torch.ones(4, 64), "old_logprobs": torch.full((4, 64), -8.0)}
    return torch.randn(4, 64, WIDE), labels, given


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_the_gradient_is_the_only_memory_of_its_size(backend: str) -> None:
    """Forward and backward take the gradient once, and a tile of rows in PyTorch's; the backward takes nothing."""
    logits, labels, given = wide_batch()
    leaf, size = logits.requires_grad_(), logits.numel() * 4
    tiles = 12 * 32 * WIDE * 4 if backend == "torch" else 0
    spec = PolicyLoss.preset("dapo")
    with MemoryWatch() as forward:
        loss = spec.from_logits(leaf, labels, backend=backend, **given).loss
    with MemoryWatch() as backward:
        loss.backward()
    assert forward.peak <= size + tiles + 64 * 1024
    assert backward.largest <= 4096
    leaf.grad = None
    loss = spec.from_logits(leaf, labels, backend=backend, **given).loss
    with MemoryWatch() as backward:
        (0.3 * loss).backward()
    assert backward.largest <= 4096


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_in_place_takes_no_memory_of_the_logits_size(backend: str) -> None:
    logits, labels, given = wide_batch()
    tiles = 12 * 32 * WIDE * 4 if backend == "torch" else 0
    made = logits.requires_grad_() * 1.0
    with MemoryWatch() as watch:
        loss = PolicyLoss.preset("dapo").from_logits(made, labels, backend=backend, inplace=True, **given).loss
        (gradient,) = torch.autograd.grad(0.3 * loss, made)
    assert watch.peak <= tiles + 64 * 1024
    assert gradient.data_ptr() == made.data_ptr()


def test_no_gradient_is_formed_where_none_is_wanted() -> None:
    logits, labels, given = wide_batch()
    before = logits.clone()
    spec = PolicyLoss.preset("dapo")
    want = spec.from_logits(logits.clone().requires_grad_(), labels, **given)

    def look(x: Tensor) -> None:
        with MemoryWatch() as watch:
            output = spec.from_logits(x, labels, inplace=True, **given)
        assert watch.largest <= 64 * 1024
        assert not output.loss.requires_grad
        assert torch.equal(output.loss, want.loss)

    look(logits)
    with torch.no_grad():
        look(logits.requires_grad_())
    with torch.inference_mode():
        look(logits * 1.0)
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_raises_the_version(backend: str) -> None:
    """A backward that needs the old logits raises; one that does not gets the same gradient as ever."""
    logits, labels, given = batch()
    spec = PolicyLoss.preset("dapo")
    want = evaluate(spec, logits, labels, given, backend=backend)[1]
    leaf = logits.clone().requires_grad_()
    made = leaf * 1.0
    rows, squared = made[:, :-1], made.square().sum()
    version = made._version
    loss = spec.from_logits(rows, labels, backend=backend, inplace=True, **given).loss
    assert made._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(squared, leaf, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert torch.equal(gradient, want)
    made.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaf)


def test_in_place_is_refused_where_it_cannot_be() -> None:
    logits, labels, given = batch()
    spec, mask = PolicyLoss.preset("dapo"), given["mask"]
    leaf = logits.clone().requires_grad_()
    with torch.inference_mode():
        made = logits[:, :-1].clone()
    apart = torch.zeros(3, 5, 74, requires_grad=True) * 1.0
    one = torch.zeros(1, 1, 37, requires_grad=True) * 1.0
    for bad, message in (
        (leaf, "a leaf that requires grad"),
        (leaf[:, :-1], "a view of a leaf that requires grad"),
        (apart[..., ::2], "adjacent entries that do not overlap"),
        (one.expand(3, 5, 37), "adjacent entries that do not overlap"),
        ((apart * 1.0).as_strided((3, 5, 37), (74, 30, 1)), "adjacent entries that do not overlap"),
        (leaf[:, :-1].half() * 1, "float16 gradient must see the loss scale"),
    ):
        labelled = {**given, "mask": torch.ones(3, bad.shape[1]), "old_logprobs": torch.zeros(3, bad.shape[1])}
        labelled |= {"ref_logprobs": None, "rollout_logprobs": None}
        with pytest.raises(ValueError, match=message):
            spec.from_logits(bad, torch.zeros(bad.shape[:2], dtype=torch.int64), inplace=True, **labelled)
    with pytest.raises(ValueError, match="made outside inference mode"):
        op.check_inplace(made.view(3, 5, 37))
    for name in COUPLED:
        with pytest.raises(ValueError, match="couples the tokens"):
            PolicyLoss.preset(name).from_logits(leaf[:, :-1] * 1.0, labels, inplace=True, **given)
    without_old = {k: v for k, v in given.items() if k != "old_logprobs"}
    corrected = PolicyLoss.preset("dapo", correction=RolloutCorrection(high=1.1))
    with pytest.raises(ValueError, match="correction without old_logprobs="):
        corrected.from_logits(leaf[:, :-1] * 1.0, labels, inplace=True, **without_old)
    assert mask.any()


def test_float16_survives_the_loss_scale() -> None:
    """Gradients of 1e-9 vanish in float16 unless the loss scale comes before the rounding."""
    logits, labels, given = batch(300)
    given["n_tokens"] = 1e6
    spec = PolicyLoss.preset("dapo")
    scaled = evaluate(spec, logits.half(), labels, given, factor=2.0**24)[1].double()
    exact = plain(spec, logits.half(), labels, given, torch.float64)[1]
    assert float((scaled * 2.0**-24 - exact).abs().max()) <= 2e-3 * float(exact.abs().max())


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_a_graph_break(name: str, backend: str) -> None:
    torch._dynamo.reset()
    logits, labels, given = batch()
    spec = PolicyLoss.preset(name)
    chosen = "auto" if backend == "cpu" else backend

    def loss(x: Tensor) -> Tensor:
        return spec.from_logits(x[:, :-1] * 1.0, labels, backend=chosen, **given).loss

    eager, traced = (logits.clone().requires_grad_() for _ in range(2))
    (3.0 * loss(eager)).backward()
    (3.0 * torch.compile(loss, fullgraph=True, backend="aot_eager")(traced)).backward()
    error, largest = float((traced.grad - eager.grad).abs().max()), float(eager.grad.abs().max())
    assert error <= 4.0 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize(
    ("name", "dtype", "sliced"), [("dapo", torch.float32, False), ("grpo", torch.bfloat16, True)], ids=str
)
def test_in_place_goes_into_a_whole_graph(name: str, dtype: torch.dtype, sliced: bool) -> None:
    """The Triton kernel as an operator that writes over its logits: the bits are those outside the graph."""
    torch._dynamo.reset()
    logits, labels, given = batch()
    spec = PolicyLoss.preset(name, entropy_coef=0.05)
    heat = torch.linspace(0.5, 2.0, labels.numel()).view(labels.shape)

    def step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        made = (x if sliced else x[:, :-1]) * 1.0
        rows = made[:, :-1] if sliced else made
        options = {"backend": "triton", "inplace": True, "temperature": heat, "softcap": 8.0}
        output = spec.from_logits(rows, labels, **given, **options)
        return output.loss, output.logprobs, output.metrics["ratio"][0]

    found = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = logits.to(dtype).clone().requires_grad_()
        loss, *others = function(leaf)
        # A power of two, as Triton's interpreter breaks ties of bfloat16 in its own way.
        (-2.0 * loss).backward()
        found.append((loss.detach(), leaf.grad, *others))
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.equal(got, want)
    assert found[0][1].any()


def test_in_place_in_a_graph_is_refused_where_it_cannot_be() -> None:
    logits, labels, given = batch()
    spec, leaf = PolicyLoss.preset("dapo"), logits.requires_grad_()

    def step(x: Tensor, backend: str, sliced: bool) -> Tensor:
        rows = x[:, :-1] if sliced else (x * 1.0)[:, :-1]
        return spec.from_logits(rows, labels, backend=backend, inplace=True, **given).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for backend, sliced, message in (
        ("torch", False, "only the Triton kernel writes over the logits"),
        ("triton", True, "a view of a leaf that requires grad"),
    ):
        torch._dynamo.reset()
        with pytest.raises((ValueError, torch._dynamo.exc.Unsupported), match=message):
            compiled(leaf, backend, sliced)


@pytest.mark.parametrize("full", [False, True])
def test_opcheck(full: bool) -> None:
    """Schema, fake tensors and tracing of the operator that writes over its logits."""
    logits, labels, given = batch()
    n = labels.numel()
    columns = [given["advantages"].repeat_interleave(5), torch.full((n,), 1.0 / n), given["old_logprobs"].reshape(-1)]
    names, axes = "advantages,weights,anchor", "clip,,,plain,loss,before"
    numbers = dict.fromkeys(NUMBERS, math.inf) | {"low": 0.8, "high": 1.2, "tau_pos": 1.0, "tau_neg": 1.0}
    heat = None
    if full:
        names, axes = f"{names},entropy_weights,kl_weights,kl_anchor", "clip,,k3,plain,loss,before"
        columns += [columns[1], columns[1], given["ref_logprobs"].reshape(-1)]
        numbers["dual_clip"] = 3.0
        heat = torch.linspace(0.5, 2.0, n).view(labels.shape)
    for rows in (logits[:, :-1].clone(), logits.clone()[:, :-1]):
        arguments = (rows, labels, heat, columns, names, 0.8, -0.7, 8.0, -100, axes, list(numbers.values()))
        checks = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"]
        torch.library.opcheck(torch.ops.fastrl.policy_logits_.default, arguments, test_utils=checks)


@pytest.mark.parametrize("name", ["ppo", "gspo"])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_torch_backend_runs_no_triton_kernel_beside_its_rows(
    name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Triton does not work on a GPU, backend="torch" is the way out."""

    def refuse(*arguments: object) -> None:
        raise AssertionError("a Triton kernel ran")

    monkeypatch.setattr(choice, "GPU_TYPES", ("cpu",))
    monkeypatch.setattr(token_arithmetic, "_policy_terms", refuse)
    monkeypatch.setattr(segments, "_segment_sum", refuse)
    loss = PolicyLoss.preset(name)
    inputs = {"advantages": torch.randn(2), "mask": torch.ones(2, 3), "old_logprobs": -torch.rand(2, 3)}
    hidden, weight = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4, requires_grad=not frozen)
    labels = torch.randint(0, 7, (2, 3))
    with pytest.raises(AssertionError, match="a Triton kernel ran"):
        loss(torch.randn(2, 3), **inputs)
    for leaf in (hidden, hidden.detach()):
        outputs = [
            loss.from_logits(leaf @ weight.detach().t(), labels, backend="torch", **inputs),
            loss.from_hidden(leaf, weight, labels, backend="torch", **inputs),
        ]
        for output in outputs:
            if output.loss.requires_grad:
                output.loss.backward()
