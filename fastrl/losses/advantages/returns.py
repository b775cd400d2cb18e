"""Returns and advantages from token rewards: discounted sums, generalised advantage estimation, whitening.

Token tensors are (B, T) with a 0/1 `mask` (B, T), or packed (N,) with `cu_seqlens` (S+1,). A packed batch gives the
same numbers as a padded one. Nothing is differentiated. Sums are taken in float64, and results have the dtype of the
rewards, at least float32.

`fastrl.ops.segments.reverse_scan` solves the recurrences: a kernel on GPUs, elsewhere log2(T) steps over whole tensors,
without a host sync. It works in float64, because in float32 the powers of the discount err more than the plain loop
does (4e-4 against 1e-4 at T = 131072).

Values under the mask:

- NaN and inf there become 0 before anything is computed.
- If masked tokens are skipped ("skip", `carry_over_masked=True`), finite values there reach no live position.
- The plain recurrences of some trainers apply the mask only at the end. Finite rewards and values in a masked gap then
  take part, as the functions concerned state.

Legend: B batch, T time, N tokens, S sequences.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.losses.layout import Layout
from fastrl.ops.segments import reverse_scan

MASKED = ("skip", "through", "reset")


class TokenBatch:
    """Token values of one batch as flat (N,) tensors, read from and restored to the caller's shape."""

    def __init__(self, rewards: Any, mask: Any, cu_seqlens: Tensor | None) -> None:
        checks.float_tensor("token_rewards", rewards)
        self.layout = Layout.of(rewards.shape, rewards.device, cu_seqlens, "token_rewards")
        self.result_dtype = checks.wide(rewards.dtype)
        self.dtype = torch.float64 if rewards.device.type != "mps" else torch.float32
        keep, poison = checks.keep_mask("mask", mask, self.layout.shape, self.layout.device)
        self.mask = keep.reshape(-1)
        self.poison = poison
        self.rewards = self.flat("token_rewards", rewards)
        if poison is not None:
            self.rewards = self.rewards + poison
        segment = torch.arange(self.layout.n_sequences, device=self.layout.device)
        self.segment = self.layout.spread(segment)
        last = torch.ones_like(self.mask)
        last[:-1] = self.segment[1:] != self.segment[:-1]
        self.last = last

    def flat(self, name: str, values: Any) -> Tensor:
        """Return detached (N,) values of the working dtype, with 0 for NaN and inf under the mask."""
        checks.float_tensor(name, values)
        x = self.layout.tokens(name, values).detach().to(self.dtype)
        return torch.where(self.mask | x.isfinite(), x, 0.0)

    def restore(self, flat: Tensor) -> Tensor:
        """Return (N,) results in the caller's shape and dtype."""
        return self.layout.restore(flat.to(self.result_dtype))

    def next(self, x: Tensor) -> Tensor:
        """Return x_{t+1} within the sequence, 0 after its last token."""
        following = torch.zeros_like(x)
        following[:-1] = x[1:]
        return torch.where(self.last, 0.0, following)

    def reach(self) -> int:
        """Return an upper bound of the length of a sequence, without a host sync."""
        lengths = self.layout.lengths
        if not self.layout.packed:
            return self.layout.shape[1]
        return int(lengths.max()) if lengths.numel() and checks.checks_values(lengths) else self.layout.n_tokens

    def scan(self, b: Tensor, c: Tensor) -> Tensor:
        """Return x with x_t = b_t + c_t x_{t+1} inside each sequence, x = b at its last token."""
        return reverse_scan(b, torch.where(self.last, 0.0, c), self.layout.lengths, self.reach())


def masked_whiten(
    x: Tensor,  # (B, T) or any shape
    mask: Tensor,  # same shape, 0/1
    eps: float = 1e-8,
) -> Tensor:
    """Return (x - mean) / sqrt(var + eps) with the statistics of the live entries, 0 outside the mask.

    var is unbiased, as in verl, SkyRL and OpenRLHF. Fewer than two live entries give 0. Sums are taken in float64. For
    whitening over ranks, gather the live entries first.
    """
    checks.float_tensor("x", x)
    checks.plain_float("eps", eps, low=0.0)
    keep, poison = checks.keep_mask("mask", mask, x.shape, x.device)
    result = torch.where(keep, whitened(torch.where(keep, x.detach(), 0.0), keep, eps), 0.0)
    return result if poison is None else result + poison


def whitened(x: Tensor, keep: Tensor, eps: float) -> Tensor:
    """Return all of `x` shifted and scaled by the statistics of its live entries (`keep`, bool), no checks."""
    dtype = checks.wide(x.dtype)
    if x.numel() == 0:
        return x.to(dtype)
    wide = x.to(torch.float64 if x.device.type != "mps" else torch.float32)
    n = keep.sum()
    centred = wide - torch.where(keep, wide, 0.0).sum() / n.clamp(min=1)
    variance = torch.where(keep, centred, 0.0).square().sum() / (n - 1).clamp(min=1)
    # Equal entries give exactly 0, also where their mean is rounded. A NaN or inf at a live one stays visible.
    spread = torch.where(keep, wide, -torch.inf).amax() - torch.where(keep, wide, torch.inf).amin()
    return torch.where((spread == 0) | (variance == 0), 0.0, centred * torch.rsqrt(variance + eps)).to(dtype)


def discounted_returns(
    token_rewards: Tensor,  # (B, T) or (N,)
    mask: Tensor,  # same shape, 0/1
    *,
    gamma: float,
    masked: str = "skip",
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> Tensor:
    """Return the discounted sums G_t = r_t + gamma G_{t+1} of each sequence, of the shape of the rewards.

    Args:
        token_rewards: reward of each token, typically all of it on the last one.
        mask: 1 for tokens of the policy, 0 for prompts, tool output and padding.
        gamma: discount in [0, 1].
        masked: the part of masked tokens.
            "skip": none, they neither discount nor pay, and their return is 0 (verl's REINFORCE++)
            "through": they discount, and their finite reward counts
            "reset": as "through", but a masked token passes nothing on to the tokens before it, so that a gap cuts the
                sequence (SkyRL's REINFORCE++)
        cu_seqlens: offsets of packed sequences.
    """
    checks.one_of("masked", masked, MASKED)
    checks.plain_float("gamma", gamma, low=0.0, high=1.0)
    tokens = TokenBatch(token_rewards, mask, cu_seqlens)
    return tokens.restore(returns_to_go(tokens, gamma, masked))


def returns_to_go(tokens: TokenBatch, gamma: float, masked: str) -> Tensor:
    """Return the discounted returns (N,) of flat tokens, as `discounted_returns` says."""
    discount = torch.full_like(tokens.rewards, gamma)
    if masked == "through":
        return tokens.scan(tokens.rewards, discount)
    if masked == "reset":
        # `c` of position t passes on x_{t+1}: a masked successor passes nothing.
        return tokens.scan(tokens.rewards, torch.where(_next_live(tokens), discount, 0.0))
    live = tokens.scan(torch.where(tokens.mask, tokens.rewards, 0.0), torch.where(tokens.mask, discount, 1.0))
    return torch.where(tokens.mask, live, 0.0)


def _next_live(tokens: TokenBatch) -> Tensor:
    return tokens.next(tokens.mask.to(tokens.dtype)) != 0


def gae(
    rewards: Tensor,  # (B, T) or (N,)
    values: Tensor,  # same shape
    mask: Tensor,  # same shape, 0/1
    *,
    gamma: float,
    lam: float | Tensor,
    whiten: bool = False,
    carry_over_masked: bool = False,
    whiten_eps: float = 1e-8,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> tuple[Tensor, Tensor]:
    """Return (advantages, returns) of generalised advantage estimation (arXiv 1506.02438, eq. 16).

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}
        returns = A + V

    V and A after the last position are 0. Returns are formed before whitening. Masked positions hold the value of the
    recurrence there, as in the trainers named below, so select with the mask before use.

    Args:
        rewards: token rewards.
        values: value estimates of the critic, no gradient.
        mask: 1 for tokens of the policy.
        gamma: discount in [0, 1].
        lam: in [0, 1], or one per sequence as (B,), (B, 1) or packed (S,), for example `length_adaptive_lambda`.
        whiten: whiten the advantages over the live tokens (unbiased variance), masked positions shifted alike.
        carry_over_masked: True skips masked tokens: V_{t+1} and A_{t+1} are taken at the next live token, and a masked
            position carries the advantage of the live one after it (verl, NeMo-RL, AReaL). Values and rewards under
            the mask then matter to no live position. False is the plain recurrence over all positions, in which finite
            rewards and values under the mask take part (slime, SkyRL, OpenRLHF). Zero them first if they should not.
        whiten_eps: added to the variance.
        cu_seqlens: offsets of packed sequences.

    Raises:
        ValueError, TypeError: shapes that differ, gamma or lam outside [0, 1].
    """
    checks.plain_float("gamma", gamma, low=0.0, high=1.0)
    checks.plain_float("whiten_eps", whiten_eps, low=0.0)
    tokens = TokenBatch(rewards, mask, cu_seqlens)
    v = tokens.flat("values", values)
    live, r = tokens.mask, tokens.rewards
    decay = gamma * _lam(tokens, lam)
    if carry_over_masked:
        # The value of the next live token, 0 where there is none: masked positions hand it on.
        held = tokens.scan(torch.where(live, v, 0.0), torch.where(live, 0.0, 1.0))
        delta = torch.where(live, r + gamma * tokens.next(held) - v, 0.0)
        advantages = tokens.scan(delta, torch.where(live, decay, 1.0))
    else:
        advantages = tokens.scan(r + gamma * tokens.next(v) - v, decay)
    returns = advantages + v
    if whiten:
        advantages = whitened(advantages, live, whiten_eps)
    return tokens.restore(advantages), tokens.restore(returns)


def _lam(tokens: TokenBatch, lam: float | Tensor) -> Tensor:
    """Return lambda per token (N,), or raise."""
    if not isinstance(lam, Tensor):
        return torch.full_like(tokens.rewards, checks.plain_float("lam", lam, low=0.0, high=1.0))
    lam = checks.float_tensor("lam", lam)
    if checks.checks_values(lam) and not bool(((lam >= 0) & (lam <= 1)).all()):
        raise ValueError(f"lam must be in [0, 1], got {lam[~((lam >= 0) & (lam <= 1))][:4].tolist()}")
    layout = tokens.layout
    checks.same_device("lam", lam, layout.device)
    if lam.dim() == 0:
        return lam.detach().to(tokens.dtype).expand(layout.n_tokens)
    allowed = {(layout.n_sequences,)} | (set() if layout.packed else {(layout.n_sequences, 1)})
    if tuple(lam.shape) not in allowed:
        wanted = " or ".join(map(str, sorted(allowed)))
        raise ValueError(f"lam must be a number or have shape {wanted}, got {tuple(lam.shape)}")
    return layout.spread(lam.detach().to(tokens.dtype).reshape(-1))


def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """Return lam = 1 - 1 / (alpha length), at least 0, per sequence (VAPO, arXiv 2504.05118, eq. 9).

    Args:
        lengths: (B,) tokens of each sequence.
        alpha: > 0. The paper uses 0.05, which gives lam > 0 above 20 tokens.

    Raises:
        ValueError, TypeError: lengths that are not (B,) numbers >= 0, alpha that is not above 0.
    """
    checks.plain_float("alpha", alpha, low=0.0, open_low=True)
    if not isinstance(lengths, Tensor) or lengths.dim() != 1:
        got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"lengths must be a tensor of shape (B,), got {got}")
    if lengths.is_complex() or lengths.layout != torch.strided:
        raise TypeError(f"lengths must be a dense tensor of numbers, got {lengths.dtype}, layout {lengths.layout}")
    if checks.checks_values(lengths) and not bool((lengths >= 0).all()):
        raise ValueError(f"lengths must be >= 0, got {lengths[~(lengths >= 0)][:4].tolist()}")
    wide = lengths.to(lengths.dtype if lengths.is_floating_point() else torch.float32)
    return (1.0 - 1.0 / (alpha * wide).clamp(min=1.0)).clamp(min=0.0)


def td_lambda_returns(
    rewards: Tensor,  # (B, T) or (N,)
    values: Tensor,  # same shape
    mask: Tensor,  # same shape, 0/1
    *,
    gamma: float,
    lam: float | Tensor,
    carry_over_masked: bool = False,
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> Tensor:
    """Return the lambda-returns G_t = r_t + gamma ((1 - lam) V_{t+1} + lam G_{t+1}), the targets of the critic.

    They are the returns of `gae`, with its arguments. VAPO's decoupled GAE (arXiv 2504.05118) takes them with
    lam = 1 for the critic, and the advantages of `gae` with a smaller lam for the policy.
    """
    return gae(rewards, values, mask, gamma=gamma, lam=lam, carry_over_masked=carry_over_masked, cu_seqlens=cu_seqlens)[
        1
    ]
