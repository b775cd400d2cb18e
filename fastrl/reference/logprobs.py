"""Log-prob, entropy and logsumexp of rows, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# --- vocabulary operation ---------------------------------------------------------------------------------------------


def scaled_logits(
    logits: Tensor,  # (..., V)
    temperature: float | Tensor = 1.0,  # scalar or broadcastable to (...)
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return z = softcap tanh(logit_scale logits / softcap) / temperature, shape (..., V)."""
    z = logits * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    if isinstance(temperature, Tensor):
        temperature = temperature.to(z.dtype).expand(z.shape[:-1]).unsqueeze(-1)
    return z / temperature


def token_logprobs(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...) int
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    allowed: Tensor | None = None,  # (..., V) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logprobs, entropy, logsumexp), each of the shape of `labels`, 0 where ignored.

    logp = z_y - logsumexp(z) and H = logsumexp(z) - sum_v p_v z_v without the terms of z_v = -inf.
    With `allowed`, z_v = -inf outside it, and the log-prob of a label outside is the constant -inf.
    """
    z = scaled_logits(logits, temperature, logit_scale, softcap)
    live = labels != ignore_index
    if allowed is not None:
        z = torch.where(allowed, z, -math.inf)
    z = torch.where(live.unsqueeze(-1), z, torch.zeros((), dtype=z.dtype, device=z.device))
    logsumexp = torch.logsumexp(z, dim=-1)
    index = torch.where(live, labels, 0).long().unsqueeze(-1)
    logprobs = z.gather(-1, index).squeeze(-1) - logsumexp
    if allowed is not None:
        logprobs = torch.where(allowed.gather(-1, index).squeeze(-1), logprobs, -math.inf)
    shifted = z - logsumexp.unsqueeze(-1)
    entropy = -(shifted.exp() * torch.where(shifted.isneginf(), 0.0, shifted)).sum(-1)
    zero = torch.zeros((), dtype=z.dtype, device=z.device)
    return torch.where(live, logprobs, zero), torch.where(live, entropy, zero), torch.where(live, logsumexp, zero)


def linear_token_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...) int
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    allowed: Tensor | None = None,  # (..., V) bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return `token_logprobs(hidden weight^T + bias, labels, ...)` with all logits materialised."""
    logits = F.linear(hidden, weight, bias)
    return token_logprobs(logits, labels, temperature, logit_scale, softcap, ignore_index, allowed)
