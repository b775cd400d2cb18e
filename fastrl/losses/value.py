"""The critic's loss: squared error of the value against the return, clipped around the old value.

Legend: B batch, T time, N tokens, S sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.losses.layout import Layout
from fastrl.losses.output import LossOutput
from fastrl.ops.segments import segment_sum

AGGREGATES = ("token_mean", "sequence_mean", "sequence_sum", "constant", "token_sum", "prompt_mean")


def value_loss(
    values: Tensor,  # (B, T), or (N,) packed
    old_values: Tensor | None,  # the same shape
    returns: Tensor,  # the same shape
    mask: Tensor,  # the same shape
    *,
    clip: float | None = 0.2,
    coefficient: float = 0.5,
    aggregate: str = "token_mean",
    n_tokens: float | Tensor | None = None,
    n_sequences: float | Tensor | None = None,
    constant: float | None = None,
    group_ids: Tensor | None = None,  # (S,)
    cu_seqlens: Tensor | None = None,  # (S+1,)
) -> LossOutput:
    """Return the value loss of PPO.

        l_t = max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2)          loss = coefficient * sum_t s_t l_t

    with s_t the weights of `aggregate`, zero at masked tokens. The gradient is with respect to `values`, and zero at
    tokens whose clipped error is the larger one. With the global counts, micro-batches add up to the whole batch.

    Args:
        values: predicted values. Half precision is computed in float32.
        old_values: values at the time of the rollout, detached. May be None if `clip` is None.
        returns: targets, detached.
        mask: 0/1 or bool. Values under a 0 have no effect.
        clip: half-width around the old value, > 0; None: plain squared error.
        coefficient: factor on the squared error, usually 0.5.
        aggregate: token_mean, sequence_mean, sequence_sum, constant, token_sum or prompt_mean.
        n_tokens, n_sequences: global counts in place of the mask's.
        constant: length that divides with aggregate="constant" (Dr. GRPO).
        group_ids: prompt of each sequence, for aggregate="prompt_mean".
        cu_seqlens: offsets of the sequences when the tensors are packed.

    Returns:
        LossOutput with metrics clip_fraction, values, returns, and the sums that `explained_variance` reads.

    Raises:
        ValueError, TypeError: shapes, devices or dtypes that do not fit, a missing old value, an unknown aggregate,
            bad numbers.
    """
    checks.float_tensor("values", values)
    layout = Layout.of(values.shape, values.device, cu_seqlens, "values")
    checks.one_of("aggregate", aggregate, AGGREGATES)
    _check_options(clip, coefficient, old_values, aggregate, constant, group_ids)
    dtype = checks.wide(values.dtype)
    keep, poison = checks.keep_mask("mask", mask, values.shape, values.device)
    checks.count("n_tokens", n_tokens, keep)
    checks.count("n_sequences", n_sequences, keep)
    live = keep.reshape(-1)

    def clean(name: str, value: Tensor) -> Tensor:
        return torch.where(live, layout.tokens(name, checks.float_tensor(name, value)).to(dtype), 0.0)

    v, target = clean("values", values), clean("returns", returns).detach()
    error = torch.square(v - target)
    clipped = torch.zeros_like(live)
    if clip is not None and old_values is not None:
        old = clean("old_values", old_values).detach()
        bounded = torch.square(torch.clamp(v, old - clip, old + clip) - target)
        clipped = ~(bounded <= error)  # an old value that is NaN stays visible
        error = torch.where(clipped, bounded, error)
    weights = reference.aggregate_weights(
        aggregate,
        live,
        layout.lengths,
        dtype=dtype,
        n_tokens=n_tokens,
        n_sequences=n_sequences,
        constant=constant,
        group_ids=None if group_ids is None else layout.sequences("group_ids", group_ids),
        sums=segment_sum,
    )
    loss = coefficient * reference.total(weights * error, layout.lengths, segment_sum)
    if poison is not None:
        loss = loss + poison
    return LossOutput(loss, _metrics(v.detach(), target, live, clipped), None, None)


def explained_variance(metrics: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Return 1 - Var(R - v) / Var(R) from (summed) metrics of `value_loss`, 0 if all returns are equal."""
    count = metrics["returns"][1].clamp(min=1)

    def variance(name: str) -> Tensor:
        mean, square = metrics[name][0] / count, metrics[f"{name}_squared"][0] / count
        return (square - mean * mean).clamp(min=0.0)

    returns = variance("returns")
    return torch.where(returns > 0, 1.0 - variance("value_error") / torch.where(returns > 0, returns, 1.0), 0.0)


def _metrics(v: Tensor, target: Tensor, live: Tensor, clipped: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return name -> (sum, count) over live tokens, in float64 on devices that have it."""
    wide = torch.float32 if v.device.type == "mps" else torch.float64
    v, target = v.to(wide), target.to(wide)
    count = live.sum().to(wide)
    error = target - v
    sums = {
        "clip_fraction": (clipped & live).to(wide),
        "values": v,
        "returns": target,
        "returns_squared": target * target,
        "value_error": error,
        "value_error_squared": error * error,
    }
    return {name: (total.sum(), count) for name, total in sums.items()}


def _check_options(
    clip: float | None,
    coefficient: float,
    old_values: Tensor | None,
    aggregate: str,
    constant: float | None,
    group_ids: Tensor | None,
) -> None:
    checks.plain_float("coefficient", coefficient, low=0.0)
    if clip is not None:
        checks.plain_float("clip", clip, low=0.0, open_low=True)
        if old_values is None:
            raise ValueError(f"clip={clip} needs old_values, got None; use clip=None for the plain squared error")
    if (constant is not None) != (aggregate == "constant"):
        raise ValueError(f"constant goes with aggregate='constant', got constant={constant!r}, aggregate={aggregate!r}")
    if constant is not None:
        checks.plain_float("constant", constant, low=0.0, open_low=True)
    if (group_ids is not None) != (aggregate == "prompt_mean"):
        raise ValueError(f"group_ids go with aggregate='prompt_mean', got aggregate={aggregate!r}")
