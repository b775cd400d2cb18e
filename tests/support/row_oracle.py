"""Log-probs of rows and their gradients in eager PyTorch and in long double: the judges of the backends' row kernels.

Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# (temperature, logit_scale, softcap)
SETTINGS = ((1.0, 1.0, 0.0), (0.7, 1.3, 0.0), (1.5, -0.4, 0.0), (0.6, 1.0, 30.0), (1.0, -2.0, 5.0))


def scaled(x: Tensor, inv_temperature: float | Tensor, logit_scale: float, softcap: float) -> Tensor:
    z = x * logit_scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    return z * (inv_temperature[:, None].to(z) if isinstance(inv_temperature, Tensor) else inv_temperature)


def eager(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp) as PyTorch users write them."""
    log_p = torch.log_softmax(z, -1)
    finite = torch.where(log_p.isneginf(), 0.0, log_p)
    return log_p.gather(1, labels[:, None]).squeeze(1), -(log_p.exp() * finite).sum(-1), torch.logsumexp(z, -1)


def with_gradient(
    x: Tensor,
    labels: Tensor,
    grads: tuple[Tensor, ...],
    dtype: torch.dtype,
    scaling: tuple[float | Tensor, float, float],
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return eager outputs and the gradient of sum_i grads_i . outputs_i, computed in `dtype`."""
    leaf = x.clone().requires_grad_()
    z = scaled(leaf.to(dtype), *scaling)
    outputs = eager(z, labels)
    total = torch.stack([(g.to(dtype) * o).sum() for g, o in zip(grads, outputs, strict=True)]).sum()
    return tuple(o.detach() for o in outputs), torch.autograd.grad(total, leaf)[0]


def extended(
    x: Tensor, labels: Tensor, grads: tuple[Tensor, ...], scaling: tuple[float | Tensor, float, float]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return what `with_gradient` returns, from the closed forms in NumPy's long double: the judge of float64."""
    inverse, logit_scale, softcap = scaling
    heat = np.asarray(inverse, dtype=np.longdouble).reshape(-1, 1)
    rows, y = np.arange(x.shape[0]), labels.numpy()
    z, slope = x.numpy().astype(np.longdouble) * np.longdouble(logit_scale), np.longdouble(logit_scale) * heat
    if softcap:
        squashed = np.tanh(z / softcap)
        z, slope = softcap * squashed, slope * (1 - squashed) * (1 + squashed)
    d = z * heat
    largest = d.max(-1, keepdims=True)
    d = d - largest
    e = np.exp(d)
    log_sum = np.log(e.sum(-1, keepdims=True))
    p, finite = e / e.sum(-1, keepdims=True), np.where(np.isneginf(d), 0, d)
    entropy = log_sum - (p * finite).sum(-1, keepdims=True)
    g, h, k = (grad.numpy().astype(np.longdouble)[:, None] for grad in grads)
    dz = (k - g) * p - h * p * (finite - log_sum + entropy)
    others = np.where(np.arange(x.shape[1]) == y[:, None], 0, p).sum(-1)
    dz[rows, y] += g[:, 0] * (others + p[rows, y])
    outputs = ((d - log_sum)[rows, y], entropy[:, 0], (largest + log_sum)[:, 0])
    return tuple(torch.from_numpy(o.astype(np.float64)) for o in outputs), torch.from_numpy(
        (dz * slope).astype(np.float64)
    )


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    assert torch.equal(bits(a), bits(b))
