"""Inputs that the vocabulary operation must survive, shared by the tests of its two forms and all backends."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastrl import reference
from fastrl.backends import cpu

BACKENDS = ["torch", "triton"] + (["cpu"] if cpu.cpu_available()[0] else [])

VOCABULARIES = [1, 2, 3, 7, 31, 127, 128, 129, 1000, 1023, 1024, 1025, 5003]


def draw(n: int, vocabulary: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return random logits (n, V) and labels (n,), one label ignored where there are more than two rows."""
    generator = torch.Generator().manual_seed(vocabulary * 1000 + n)
    logits = (torch.randn(n, vocabulary, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    if n > 2:
        labels[1] = -100
    return logits, labels


def draw_head(
    n: int, dim: int, vocabulary: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden states (n, D), a head (V, D), its bias (V,) and labels (n,); every fifth label is ignored."""
    generator = torch.Generator().manual_seed(n * vocabulary + dim)
    hidden = torch.randn(n, dim, generator=generator).to(dtype)
    weight = (torch.randn(vocabulary, dim, generator=generator) * 2 / math.sqrt(dim)).to(dtype)
    bias = torch.randn(vocabulary, generator=generator).to(dtype)
    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    labels[::5] = -100
    return hidden, weight, bias, labels


def weighted_sum(outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], dtype: torch.dtype) -> Tensor:
    """Return the sum of grads_i . outputs_i, whose gradient backpropagates `grads`."""
    return sum((g.to(dtype) * x).sum() for g, x in zip(grads, outputs, strict=True) if g is not None)  # type: ignore[return-value]


def upstream(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three gradients (n,) for log-prob, entropy and logsumexp."""
    generator = torch.Generator().manual_seed(n)
    first, second, third = (torch.randn(n, generator=generator) for _ in range(3))
    return first, second, third


def exact(logits: Tensor, labels: Tensor, grads: tuple[Tensor | None, ...], dtype: torch.dtype, **options) -> tuple:  # type: ignore[no-untyped-def]
    """Return (logprobs, entropy, logsumexp, gradient) of the reference at `dtype` on the same numbers."""
    leaf = logits.detach().to(dtype).requires_grad_()
    converted = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    outputs = reference.token_logprobs(leaf, labels, **converted)
    total = sum((g.to(dtype) * x).sum() for g, x in zip(grads, outputs, strict=True) if g is not None)
    (gradient,) = torch.autograd.grad(total, leaf)
    return (*(x.detach() for x in outputs), gradient)


def patterns(vocabulary: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (logits (n, V), labels (n,)) of hard rows."""
    generator = torch.Generator().manual_seed(vocabulary)
    base = torch.randn(4, vocabulary, generator=generator) * 2
    labels = torch.full((4,), vocabulary - 1)
    first = base.clone()
    first[:, : vocabulary - 2] = -math.inf
    last = base.clone()
    last[:, 2:] = -math.inf
    scattered = torch.where(torch.rand(4, vocabulary, generator=generator) < 0.5, -math.inf, base)
    scattered[:, -1] = 1.0
    only = torch.full_like(base, -math.inf)
    only[:, -1] = 0.3
    peaked = base.clone()
    peaked[:, -1] = 14.0 + base.logsumexp(-1)
    target_banned = base.clone()
    target_banned[:, -1] = -math.inf
    return {
        "first_blocks_banned": (first, labels),
        "last_blocks_banned": (last, torch.zeros(4, dtype=torch.int64)),
        "half_banned": (scattered, labels),
        "all_but_target_banned": (only, labels),
        "peaked_on_target": (peaked, labels),
        "target_banned": (target_banned, labels),
        "offset_1e4": (base + 1e4, labels),
        "offset_minus_1e6": (base - 1e6, labels),
        "flat": (torch.zeros_like(base), labels),
    }
