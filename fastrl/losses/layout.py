"""Padded and packed token tensors brought to one form: flat tokens and the lengths of their sequences.

Legend: B batch, T time, N tokens, S sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import checks


@dataclass(frozen=True)
class Layout:
    """Shape of a batch of token values: (B, T) padded or (N,) packed."""

    shape: tuple[int, ...]
    lengths: Tensor  # (S,) int64, masked tokens included
    device: torch.device

    @classmethod
    def of(cls, shape: torch.Size, device: torch.device, cu_seqlens: Any, name: str = "logprobs") -> Layout:
        """Return the layout of values of `shape`, or raise if shape and `cu_seqlens` do not fit."""
        if cu_seqlens is None:
            if len(shape) != 2:
                raise ValueError(
                    f"{name} must be (B, T), or (N,) with cu_seqlens (S+1,); got shape {tuple(shape)} and no cu_seqlens"
                )
            lengths = torch.full((shape[0],), shape[1], dtype=torch.int64, device=device)
            return cls(tuple(shape), lengths, device)
        if len(shape) != 1:
            raise ValueError(f"{name} must be packed (N,) when cu_seqlens is given, got shape {tuple(shape)}")
        if (
            not isinstance(cu_seqlens, Tensor)
            or cu_seqlens.dtype not in (torch.int32, torch.int64)
            or cu_seqlens.dim() != 1
        ):
            got = f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}" if isinstance(cu_seqlens, Tensor) else cu_seqlens
            raise TypeError(f"cu_seqlens must be a 1-D int32 or int64 tensor of S+1 offsets, got {got}")
        if cu_seqlens.numel() < 1:
            raise ValueError("cu_seqlens must have S+1 >= 1 entries, got 0")
        checks.same_device("cu_seqlens", cu_seqlens, device)
        lengths = cu_seqlens.long().diff()
        if checks.checks_values(cu_seqlens):
            first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
            if first != 0 or last != shape[0] or bool((lengths < 0).any()):
                raise ValueError(f"cu_seqlens must rise from 0 to N={shape[0]}, got {cu_seqlens[:4].tolist()}...{last}")
        return cls(tuple(shape), lengths, device)

    @property
    def n_tokens(self) -> int:
        """Number of token places, masked ones included."""
        return math.prod(self.shape)

    @property
    def n_sequences(self) -> int:
        """Number of sequences, empty ones included."""
        return self.lengths.numel()

    @property
    def packed(self) -> bool:
        """Whether tokens are packed (N,)."""
        return len(self.shape) == 1

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Return per-sequence values (S,) repeated over their tokens (N,)."""
        return per_sequence.repeat_interleave(self.lengths, output_size=self.n_tokens)

    def tokens(self, name: str, value: Any) -> Tensor:
        """Return per-token values of exactly the layout's shape as (N,), or raise."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        checks.same_shape(name, value, self.shape)
        checks.same_device(name, value, self.device)
        return value.reshape(-1)

    def tokens_or_sequences(self, name: str, value: Any) -> Tensor:
        """Return values per token or per sequence as (N,): (B, T), (B, 1), (B,), or packed (N,), (S,); or raise."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        checks.same_device(name, value, self.device)
        shape, n = tuple(value.shape), self.n_sequences
        if shape == self.shape and (not self.packed or shape != (n,)):
            return value.reshape(-1)
        if shape == (n,):
            return self.spread(value)
        if not self.packed and shape == (n, 1):
            return self.spread(value.squeeze(-1))
        allowed = f"(N={self.shape[0]},) or (S={n},)" if self.packed else f"{(n,)}, {(n, 1)} or {self.shape}"
        raise ValueError(f"{name} must have shape {allowed}, got {shape}")

    def sequences(self, name: str, value: Any) -> Tensor:
        """Return per-sequence values (S,), or raise."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        checks.same_shape(name, value, (self.n_sequences,))
        checks.same_device(name, value, self.device)
        return value

    def restore(self, flat: Tensor) -> Tensor:
        """Return (N,) values in the layout's shape."""
        return flat.view(self.shape)
