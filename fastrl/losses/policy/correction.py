"""Weights for the gap between the inference engine and the trainer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.layout import Layout
from fastrl.losses.output import shown
from fastrl.ops.segments import segment_sum


@dataclass(frozen=True, kw_only=True, repr=False)
class RolloutCorrection:
    """Weights that correct for the gap between the inference engine and the trainer, w = pi_old / pi_rollout, detached.

    The weight multiplies the policy term only. The denominator keeps every token. A NaN rollout log-prob counts as
    weight 1.

    | op | weight |
    |---|---|
    | "truncate" | clamped to [low, high] (TIS) |
    | "mask" | zero outside [low, high] (MIS, IcePop) |
    | "gate" | the token's weight if `statistic`, taken at `level`, lies inside [low, high], else zero |

    Levels: "token", the geometric mean over the sequence ("sequence"), the product over it ("sequence_sum").

    | statistic of a token, d = log pi_old - log pi_rollout | |
    |---|---|
    | "ratio" | e^d |
    | "tv" | abs(pi_old - pi_rollout) |
    | "binary_kl" | KL of the rollout to the trainer over (token, any other) |
    | "k1", "k2", "k3" | -d, d^2/2, e^d - 1 - d: estimates of the same KL |

    Over a sequence, d (for the ratio) or the statistic is averaged ("sequence") or summed ("sequence_sum").
    """

    level: str = "token"
    op: str = "truncate"
    statistic: str = "ratio"
    low: float | None = None
    high: float | None = None
    log_weight_clamp: float | None = None
    batch_normalize: bool = False

    def __post_init__(self) -> None:
        checks.one_of("correction.level", self.level, ("token", "sequence", "sequence_sum"))
        checks.one_of("correction.op", self.op, ("truncate", "mask", "gate"))
        checks.one_of("correction.statistic", self.statistic, ("ratio", "tv", "binary_kl", "k1", "k2", "k3"))
        for name in ("low", "high"):
            value = getattr(self, name)
            if value is not None:
                checks.plain_float(f"correction.{name}", value)
        # A ratio is positive: a cap below 0 would turn the sign of the policy term, a cap of 0 would remove it.
        if self.statistic == "ratio" and ((self.low or 0.0) < 0.0 or (self.high is not None and self.high <= 0.0)):
            raise ValueError(
                f"correction.low must be >= 0 and correction.high > 0 for the ratio, got {self.low} and {self.high}"
            )
        if self.low is None and self.high is None:
            raise ValueError("correction needs low, high or both: without a bound nothing is corrected")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"correction.low must be <= correction.high, got {self.low} > {self.high}")
        if self.op != "gate" and self.statistic != "ratio":
            raise ValueError(
                f"correction.statistic {self.statistic!r} needs op='gate'; {self.op!r} bounds the ratio itself"
            )
        if self.log_weight_clamp is not None:
            checks.plain_float("correction.log_weight_clamp", self.log_weight_clamp, low=0.0, open_low=True)

    def __repr__(self) -> str:
        return shown(self)

    def weights(
        self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return the detached weights, of the shape of `old_logprobs`, 1 outside the mask.

        Args:
            old_logprobs: (B, T), or (N,) with `cu_seqlens`: the trainer's own log-probs before the update.
            rollout_logprobs: same shape: the log-probs that the inference engine reported.
            mask: same shape, 0/1.
            cu_seqlens: (S+1,) offsets of packed sequences.
        """
        layout = Layout.of(old_logprobs.shape, old_logprobs.device, cu_seqlens, "old_logprobs")
        keep, _ = checks.keep_mask("mask", mask, layout.shape, layout.device)
        keep = keep.reshape(-1)
        old = torch.where(keep, layout.tokens("old_logprobs", old_logprobs), 0.0)
        rollout = torch.where(keep, layout.tokens("rollout_logprobs", rollout_logprobs).to(old.dtype), 0.0)
        return layout.restore(reference.correction_weights(self, old, rollout, keep, layout.lengths, segment_sum))
