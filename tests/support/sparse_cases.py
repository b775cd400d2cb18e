"""Rows of logits from flat to peaked, their lists, and what every list must hold to; shared by the tests of lists."""

from __future__ import annotations

import torch
from device import DEVICE
from oracle import ROUNDINGS, assert_as_accurate
from torch import Tensor

from fastrl import reference
from fastrl.ops import sparse_rows
from fastrl.ops.rows import backward_rows, forward_rows

TAIL_MASS = 1e-3
# (upstream of log-prob, entropy, logsumexp), each a factor or None
UPSTREAM = {"logprob": (1.0, None, None), "entropy": (1.0, -0.3, None), "all": (-1.0, 0.2, 0.5), "lse": (None, None, 1)}
OPTIONS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"logit_scale": -0.5, "temperature": 0.6},
    "softcap": {"softcap": 30.0, "temperature": 0.7},
}


def draw_logits(kind: str, n: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return logits (n, V) and labels: forty tokens with most of the mass, none, or one kind after the other."""
    generator = torch.Generator().manual_seed(n + vocabulary)
    logits = torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) * 2
    heavy = torch.randint(0, vocabulary, (n, 40), generator=generator)
    height = {"peaked": torch.full((n,), 20.0), "flat": torch.zeros(n), "mixed": torch.linspace(0, 25, n)}[kind]
    logits.scatter_add_(1, heavy, height.double().unsqueeze(-1) * torch.linspace(1.0, 0.5, 40, dtype=torch.float64))
    labels = heavy[:, 0].clone()
    labels[1::3] = torch.randint(0, vocabulary, (labels[1::3].numel(),), generator=generator)
    return logits.to(dtype), labels


def exact_gradient(  # type: ignore[no-untyped-def]
    logits: Tensor, labels: Tensor, grads: tuple[Tensor | None, ...], dtype: torch.dtype = torch.float64, **options
) -> Tensor:
    """Return the whole gradient (n, V) of the reference, computed in `dtype`."""
    leaf = logits.to(dtype).requires_grad_()
    outputs = reference.token_logprobs(leaf, labels, **options)
    total = sum((g.to(dtype) * x).sum() for g, x in zip(grads, outputs, strict=True) if g is not None)
    return torch.autograd.grad(total, leaf)[0]


def find(
    backend: str,
    logits: Tensor,
    labels: Tensor,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    tail_mass: float = TAIL_MASS,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> tuple[sparse_rows.Lists, Tensor]:
    """Return (lists, the whole gradient of every row)."""
    place = DEVICE if backend == "triton" else "cpu"
    tile, labels = logits.to(place, copy=True), labels.to(place)
    first, second, third = (None if g is None else g.to(place) for g in grads)
    grads = (first, second, third)
    heat = torch.as_tensor(temperature, dtype=logits.dtype)
    inverse = heat.reciprocal().expand(logits.shape[0]).contiguous().to(place)
    scalars = {"logit_scale": logit_scale, "softcap": softcap, "ignore_index": -100}
    outputs = forward_rows(backend, tile, labels, inverse, **scalars)
    rule = sparse_rows.rule_for(tail_mass, logits.shape[1], tile.device)
    problem = sparse_rows.RowInputs(labels, inverse, outputs, grads)
    lists = sparse_rows.find(backend, tile, problem, rule, **scalars)
    assert torch.equal(tile.cpu().nan_to_num(), logits.nan_to_num())
    gradient = backward_rows(backend, tile, labels, inverse, outputs, grads, **scalars)
    return sparse_rows.Lists(*(x.cpu() for x in lists)), gradient.cpu()


def row_scale(inverse: Tensor, grads: tuple[Tensor | None, ...], logit_scale: float) -> Tensor:
    """Return (|g| + |h| + |l|) |logit_scale| / T, (n,) float64."""
    return sum(g.double().abs() for g in grads if g is not None) * abs(logit_scale) * inverse.double()  # type: ignore[return-value]


def upstream(name: str, n: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of log-prob, entropy and logsumexp, (n,) each or None."""
    # Small, so that a limit that forgot the row's scale would be too large.
    spread = torch.linspace(0.3, 0.1, n)
    first, second, third = (None if factor is None else factor * spread for factor in UPSTREAM[name])
    return first, second, third


def dense_of(rows: sparse_rows.Lists, tile: Tensor) -> Tensor:
    """Return the gradient (C, V) that the lists and the dense rows stand for."""
    full = tile.clone()
    for i, count in enumerate(rows.counts.tolist()):
        if count >= 0:
            full[i] = 0.0
            full[i, rows.indices[i, :count].long()] = rows.values[i, :count]
    return full


def assert_bound(backend: str, which: str, options: dict[str, float]) -> None:
    """Assert of rows from flat to peaked that the lists are exact, and of what they leave out that it is measured.

    The budget of rounding is that of the judge: twice the error of PyTorch's float32 gradient, plus a few roundings.
    """
    n, vocabulary = 20, 1500
    logits, labels = draw_logits("mixed", n, vocabulary)
    if "logit_scale" in options:
        logits = logits * -1.5
    grads = upstream(which, n)
    lists, gradient = find(backend, logits, labels, grads, **options)
    exact = exact_gradient(logits, labels, grads, **options)
    eager = exact_gradient(logits, labels, grads, torch.float32, **options)
    inverse = torch.full((n,), 1.0 / options.get("temperature", 1.0))
    scale = row_scale(inverse, grads, options.get("logit_scale", 1.0))
    sparse, eps = lists.counts > 0, torch.finfo(torch.float32).eps
    assert int(sparse.sum()) > 0
    assert bool((~sparse).any()) or which == "lse"
    taken = dense_of(lists, gradient)
    listed = torch.zeros_like(taken, dtype=torch.bool)
    for i in sparse.nonzero().squeeze(-1).tolist():
        index = lists.indices[i, : lists.counts[i]].long()
        assert index.unique().numel() == index.numel()
        assert bool((index == labels[i]).any())
        listed[i, index] = True
    assert torch.equal(taken[listed], gradient[listed])
    assert bool((lists.left <= TAIL_MASS).all())
    outside = [torch.where(listed, 0.0, x.abs()).sum(-1, dtype=x.dtype)[sparse] for x in (exact, eager)]
    assert_as_accurate("left", (lists.left * scale)[sparse], outside[0], outside[1], torch.float32)
    error = (taken.double() - exact).abs().sum(-1)
    rounding = 2 * (eager.double() - exact).abs().sum(-1) + ROUNDINGS * eps * scale
    assert bool((error <= TAIL_MASS * scale + rounding).all())
