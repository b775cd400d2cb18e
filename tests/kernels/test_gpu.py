"""What only a device can show beside the kernels' own tests: graphs, streams, waiting, determinism, real sizes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from sparse_cases import OPTIONS, UPSTREAM, assert_bound
from torch import Tensor

from fastrl import PolicyLoss, linear_token_logprobs, reference, token_logprobs
from fastrl.ops.head import GPU_CHUNK_TOKENS

pytestmark = pytest.mark.gpu
B, T, D, V = 4, 64, 256, 4096
# Of Qwen3-8B.
WIDTH, VOCABULARY = 4096, 151_936
ROOT = Path(__file__).resolve().parents[2]
HALVES = [torch.bfloat16, torch.float16]
MEMORY = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else 0
needs_memory = pytest.mark.skipif(MEMORY < 70e9, reason="needs a device of 80 GB")


@pytest.fixture
def nothing_waits() -> Iterator[None]:
    """Make PyTorch raise where the host would wait for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """Return hidden states (B, T, D), head (V, D), labels and what a loss takes, with half of the tokens masked."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    hidden, weight = normal(B, T, D).to(dtype), (normal(V, D) / 8).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=generator, device="cuda")
    mask = torch.rand(B, T, generator=generator, device="cuda") < 0.5
    old = torch.full((B, T), -math.log(V), device="cuda") + 0.1 * normal(B, T)
    return hidden, weight, labels, {"mask": mask, "advantages": normal(B), "old_logprobs": old}


def policy_from_logits(logits: Tensor, labels: Tensor, tokens: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return (loss, gradient) of the fused loss of logits."""
    leaf = logits.detach().requires_grad_()
    loss = PolicyLoss.preset("dapo").from_logits(leaf, labels, **tokens).loss
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def policy_from_hidden(hidden: Tensor, weight: Tensor, labels: Tensor, tokens: dict[str, Any]) -> tuple[Tensor, ...]:
    """Return (loss, gradients of hidden states and head) of the fused loss of hidden states."""
    leaves = (hidden.detach().requires_grad_(), weight.detach().requires_grad_())
    loss = PolicyLoss.preset("dapo").from_hidden(*leaves, labels, chunk_tokens=64, **tokens).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_logits_never_make_the_host_wait(nothing_waits: None) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = torch.randn(B, T, V, generator=generator, device="cuda", requires_grad=True)
    labels = torch.randint(0, V, (B, T), generator=generator, device="cuda")
    mask = torch.rand(B, T, generator=generator, device="cuda") < 0.5
    tokens = {"mask": mask, "advantages": torch.randn(B, generator=generator, device="cuda")}
    outputs = token_logprobs(logits, labels, temperature=0.7)
    (outputs.logprobs + outputs.entropy).sum().backward()
    old = outputs.logprobs.detach()
    for name in ("dapo", "gspo", "sft"):
        PolicyLoss.preset(name).from_logits(logits, labels, old_logprobs=old, **tokens).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_replays_the_loss(dtype: torch.dtype) -> None:
    hidden, weight, labels, tokens = batch(dtype)
    logits = (hidden @ weight.t()).detach()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = [policy_from_logits(logits, labels, tokens) for _ in range(2)][1]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = policy_from_logits(logits, labels, tokens)
    for scale in (1.0, 0.5):
        logits.mul_(scale)
        graph.replay()
        want = want if scale == 1.0 else policy_from_logits(logits, labels, tokens)
        for got, right in zip(captured, want, strict=True):
            assert torch.equal(got, right)


def test_hidden_states_are_refused_in_a_capture() -> None:
    hidden, weight, labels, _ = batch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        twice = 2.0 * hidden  # PyTorch warns about an empty graph
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
            linear_token_logprobs(twice, weight, labels)


def test_another_stream_gives_the_same_bits() -> None:
    """Everything is queued on the current stream: a long kernel before it there must have ended first."""
    hidden, weight, labels, tokens = batch(torch.bfloat16)
    want = policy_from_hidden(hidden, weight, labels, tokens)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.full_like(hidden, math.nan)
        torch.cuda._sleep(20_000_000)
        late.copy_(hidden)
        got = policy_from_hidden(late, weight, labels, tokens)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_a_device_that_is_not_the_current_one() -> None:
    hidden, weight, labels, tokens = batch()
    want = policy_from_hidden(hidden, weight, labels, tokens)
    there = [x.to("cuda:1") for x in (hidden, weight, labels)]
    got = policy_from_hidden(*there, {name: x.to("cuda:1") for name, x in tokens.items()})
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


def test_deterministic_algorithms_can_be_asked_for() -> None:
    """In a process of its own: cuBLAS reads its workspace's size when it starts."""
    script = "\n".join(
        (
            "import torch, test_gpu",
            "torch.use_deterministic_algorithms(True)",
            "hidden, weight, labels, tokens = test_gpu.batch(torch.bfloat16)",
            "first, second = (test_gpu.policy_from_hidden(hidden, weight, labels, tokens) for _ in range(2))",
            "assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))",
            "test_gpu.policy_from_logits((hidden @ weight.t()).float(), labels, tokens)",
        )
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "tests" / "support")))
    environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore")  # of the compiler, about TF32 among others
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_graphs_are_as_accurate(mode: str) -> None:
    """With "reduce-overhead" PyTorch makes CUDA graphs, and must leave out what the host waits in."""
    hidden, weight, labels, _ = batch()

    def loss(x: Tensor, w: Tensor) -> Tensor:
        outputs = linear_token_logprobs(2.0 * x, w, labels, chunk_tokens=64)
        given = token_logprobs(2.0 * x @ w.t(), labels)
        return (outputs.logprobs + 0.1 * given.entropy).sum()

    def plain(x: Tensor, w: Tensor) -> Tensor:
        logprobs, entropy, _ = reference.linear_token_logprobs(2.0 * x, w, labels)
        return (logprobs + 0.1 * entropy).sum()

    def gradients(function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = (hidden.to(dtype, copy=True).requires_grad_(), weight.to(dtype, copy=True).requires_grad_())
        return torch.autograd.grad(function(*leaves), leaves)

    exact, eager = (gradients(plain, dtype) for dtype in (torch.float64, torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(loss, mode=mode)
    for _ in range(3):
        for name, got, right, usual in zip("xw", gradients(compiled, torch.float32), exact, eager, strict=True):
            assert_as_accurate(name, got, right, usual)


@needs_memory
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_from_hidden_states_has_the_same_bits_wherever_it_stands(dtype: torch.dtype) -> None:
    """At the width and the vocabulary of a real model, where the device's library may split a product in many ways."""
    n, d, v = GPU_CHUNK_TOKENS + 300, WIDTH // 2, VOCABULARY
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(v, d, generator=generator, device="cuda") / 16).to(dtype)
    labels = torch.randint(0, v, (n,), generator=generator, device="cuda")
    want = linear_token_logprobs(hidden, weight, labels)
    order = torch.randperm(n, generator=generator, device="cuda")
    shuffled = linear_token_logprobs(hidden[order], weight, labels[order])
    few = linear_token_logprobs(hidden[1000:1007], weight, labels[1000:1007])
    for whole, moved, part in zip(want, shuffled, few, strict=True):
        assert torch.equal(moved, whole[order])
        assert torch.equal(part, whole[1000:1007])


@needs_memory
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_log_probs_of_a_half_precision_head_at_a_real_size(dtype: torch.dtype) -> None:
    """Log-probs and gradients against float64, for a few rows through the whole head; memory as documented."""
    n, d, v = 512, WIDTH, VOCABULARY
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device="cuda").to(dtype)
    weight = (torch.randn(v, d, generator=generator, device="cuda") / 16).to(dtype)
    labels = torch.randint(0, v, (n,), generator=generator, device="cuda")
    upstream = torch.randn(n, generator=generator, device="cuda")

    def evaluate(function: Callable[..., Any], cast: torch.dtype, **options: Any) -> tuple[Tensor, ...]:
        leaves = (hidden.detach().to(cast).requires_grad_(), weight.detach().to(cast).requires_grad_())
        logprobs = function(*leaves, labels, **options)[0]
        return logprobs.detach(), *torch.autograd.grad((logprobs * upstream.to(logprobs.dtype)).sum(), leaves)

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = evaluate(linear_token_logprobs, dtype)
    extra = torch.cuda.max_memory_allocated() - before
    chunk, head = GPU_CHUNK_TOKENS * v, v * d
    assert extra <= 1.05 * (chunk * (4 + 2) + head * 4 + 16384 * d * 4), f"{extra / 1e9:.2f} GB"
    exact = evaluate(reference.linear_token_logprobs, torch.float64)
    eager = evaluate(reference.linear_token_logprobs, torch.float32)
    # Log-probs are held to PyTorch's own product of this precision: tensor cores round long sums their own way.
    logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    eager = (logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1), *eager[1:])
    for name, got, right, usual in zip(("logprobs", "dhidden", "dweight"), found, exact, eager, strict=True):
        assert_as_accurate(name, got, right, usual)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("which", UPSTREAM)
def test_sparse_rows_hold_their_bound(which: str, option: str) -> None:
    assert_bound("triton", which, OPTIONS[option])


@pytest.mark.parametrize("frozen", [False, True])
def test_sparse_rows_of_hidden_states(frozen: bool) -> None:
    """The products with lists: within the documented bound of the exact gradient."""
    hidden, weight, labels, _ = batch()
    # The label's own row of the head in every state, more or less of it: rows from flat to peaked.
    lead = torch.linspace(6.0, 14.0, B * T, device="cuda").view(B, T, 1)
    states = hidden + lead * torch.nn.functional.normalize(weight[labels], dim=-1)

    def gradients(tail_mass: float) -> tuple[Tensor, ...]:
        leaves = (states.clone().requires_grad_(), weight.clone().requires_grad_(not frozen))
        outputs = linear_token_logprobs(*leaves, labels, chunk_tokens=64, tail_mass=tail_mass)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return torch.autograd.grad(outputs.logprobs.sum(), wanted)

    exact, found = gradients(0.0), gradients(1e-3)
    longest = float(weight.norm(dim=-1).max())
    rounding = 1e-5 * float(exact[0].abs().max())
    assert float((found[0] - exact[0]).norm(dim=-1).max()) <= 1e-3 * longest + rounding * D**0.5
    if not frozen:
        assert float((found[1] - exact[1]).norm()) <= 1e-3 * float(states.norm(dim=-1).sum())
    assert all(torch.equal(a, b) for a, b in zip(gradients(1e-3), found, strict=True))
