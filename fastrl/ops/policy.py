"""The token arithmetic of the policy loss: one fused kernel if Triton runs on the device, else plain PyTorch.

Both realisations give the same results and gradients. `fastrl.reference.token_terms` states the formulas.

Legend: N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl import reference
from fastrl.backends import choice
from fastrl.ops.rows import once_differentiable

if TYPE_CHECKING:
    from fastrl.losses.policy.axes import PolicyAxes
    from fastrl_kernels import policy as kernels

CONSTANTS = (
    "advantages",
    "weights",
    "kl_weights",
    "entropy_weights",
    "anchor",
    "kl_anchor",
    "kl_ratio_anchor",
    "positive",
)
NUMBERS = (
    "low",
    "high",
    "max_ratio",
    "dual_clip",
    "weight_low",
    "weight_high",
    "tau_pos",
    "tau_neg",
    "k_pos",
    "k_neg",
    "lambda_pos",
    "lambda_neg",
    "square_tau",
    "log_ratio_bound",
    "kl_log_ratio_bound",
    "kl_value_bound",
    "kl_ratio_max",
)


def fused_policy_terms(
    spec: PolicyAxes,
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    columns: reference.TokenColumns,
    *,
    backend: str = "auto",
) -> reference.TokenTerms:
    """Return each token's contribution to the loss, as `fastrl.reference.token_terms` states it.

    Args:
        spec: the loss, a `PolicyLoss`.
        logprobs: (N,) float32 or float64, with values under the mask already replaced.
        entropy: (N,) entropies, needed with `columns.entropy_weights`.
        columns: the constants of the arithmetic, and the log-ratio of the sequence, through which gradients flow.
        backend: "auto" takes Triton on GPUs and PyTorch elsewhere. "torch" and "triton" are used or refused.

    Returns:
        `TokenTerms`. `contribution` carries the gradient with respect to `logprobs`, `entropy` and
        `columns.sequence_log_ratio`. The kernel's gradient is differentiable once: it refuses `create_graph=True`.
    """
    if not choice.kernel_runs(backend, logprobs.device):
        return reference.token_terms(spec, logprobs, entropy, columns)
    if columns.entropy_weights is None:
        entropy = None
    elif entropy is None:
        raise ValueError("entropy_weights in the columns need entropy=, per token; got None")
    pooled = columns.sequence_log_ratio
    constants = {name: getattr(columns, name) for name in CONSTANTS if getattr(columns, name) is not None}
    needs_gradient = any(x is not None and x.requires_grad for x in (logprobs, entropy, pooled))
    contribution, surrogate, ratio, below, above, kl, dual, _, _ = _policy_terms(
        logprobs,
        entropy,
        pooled,
        list(constants.values()),
        ",".join(constants),
        *axes_of(spec),
        numbers_of(spec),
        torch.is_grad_enabled() and needs_gradient,
    )
    return reference.TokenTerms(
        contribution=contribution,
        surrogate=surrogate.detach(),
        kl=None if spec.kl is None else kl.detach(),
        ratio=ratio.detach(),
        clipped_low=below,
        clipped_high=above,
        dual_clipped=dual if spec.surrogate == "clip" and spec.dual_clip is not None else None,
    )


def axes_of(spec: PolicyAxes) -> tuple[str, str, str, str, str, str]:
    """Return (surrogate, carrier, kl, kl_gradient, kl_ratio, kl_clamp) as the kernel names them."""
    kl_ratio = "loss"
    if spec.kl_ratio_anchor is not None:
        kl_ratio = "own"
    elif reference.kl_ratio_per_token(spec):
        kl_ratio = "anchor"
    return spec.surrogate, spec.carrier or "", spec.kl or "", spec.kl_gradient, kl_ratio, spec.kl_value_clamp_order


def numbers_of(spec: PolicyAxes) -> list[float]:
    """Return `NUMBERS` of a loss. Open bounds are infinite."""
    low, high = _bounds(spec)
    limit = reference.LOG_RATIO_LIMIT
    values = {
        "low": low,
        "high": high,
        "max_ratio": _or(spec.max_ratio, math.inf),
        "dual_clip": _or(spec.dual_clip, math.inf),
        "weight_low": _or(spec.weight_low, -math.inf),
        "weight_high": _or(spec.weight_high, math.inf),
        "log_ratio_bound": min(_or(spec.log_ratio_clamp, limit), limit),
        "kl_log_ratio_bound": min(_or(spec.kl_log_ratio_clamp, limit), limit),
        "kl_value_bound": _or(spec.kl_value_clamp, math.inf),
        "kl_ratio_max": _or(spec.kl_ratio_max, math.inf),
    }
    return [float(values[name] if name in values else getattr(spec, name)) for name in NUMBERS]


def kernel_axes(spec: PolicyAxes) -> kernels.PolicyAxes:
    """Return the kernels' `PolicyAxes` of a loss."""
    from fastrl_kernels import policy

    return policy.PolicyAxes(*axes_of(spec))


def kernel_numbers(spec: PolicyAxes) -> kernels.PolicyNumbers:
    """Return the kernels' `PolicyNumbers` of a loss."""
    from fastrl_kernels import policy

    return policy.PolicyNumbers(*numbers_of(spec))


def kernel_columns(values: Sequence[Tensor | None]) -> kernels.PolicyColumns:
    """Return the kernels' `PolicyColumns` from the columns named by `CONSTANTS`, in that order."""
    from fastrl_kernels import policy

    return policy.PolicyColumns(*values)  # pyright: ignore[reportArgumentType]  # the first two are always there


def _bounds(spec: PolicyAxes) -> tuple[float, float]:
    """Return the bounds of clipping or dropping: on the ratio for "clip", else on the log-ratio or the divergence."""
    low, high = spec.clip_low, spec.clip_high
    if spec.surrogate == "divergence_tv_symmetric":
        low = high = low if high is None else high
    centre = 1.0 if spec.surrogate == "clip" else 0.0
    return (-math.inf if low is None else centre - low), (math.inf if high is None else centre + high)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


# custom_op cannot take None inside a list, so `names` says which columns are present. It returns only tensors:
# absent outputs are empty.
@torch.library.custom_op("fastrl::policy_terms", mutates_args=())
def _policy_terms(
    logprobs: Tensor,
    entropy: Tensor | None,
    sequence_log_ratio: Tensor | None,
    constants: Sequence[Tensor],
    names: str,
    surrogate: str,
    carrier: str,
    kl: str,
    kl_gradient: str,
    kl_ratio: str,
    kl_clamp: str,
    numbers: Sequence[float],
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastrl_kernels import policy

    results = policy.policy_terms(
        policy.PolicyAxes(surrogate, carrier, kl, kl_gradient, kl_ratio, kl_clamp),
        policy.PolicyNumbers(**dict(zip(NUMBERS, numbers, strict=True))),
        logprobs,
        entropy,
        sequence_log_ratio,
        policy.PolicyColumns(**dict(zip(names.split(","), constants, strict=True))),
        gradient=gradient,
    )

    def present(x: Tensor | None) -> Tensor:
        return logprobs.new_empty(0) if x is None else x

    return (
        results.contribution,
        results.surrogate,
        results.ratio,
        results.clipped_low,
        results.clipped_high,
        present(results.kl),
        present(results.dual_clipped),
        present(results.grad_logprobs),
        present(results.grad_sequence),
    )


@_policy_terms.register_fake
def _(logprobs: Tensor, entropy: Tensor | None, sequence_log_ratio: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    _, _, surrogate, _, kl, *_, numbers, gradient = others
    return (
        *term_outputs(logprobs, surrogate, kl, numbers),
        logprobs.new_empty(logprobs.shape if gradient else 0),
        logprobs.new_empty(logprobs.shape if gradient and sequence_log_ratio is not None else 0),
    )


def term_outputs(
    like: Tensor,  # (N,)
    surrogate: str,
    kl: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return tensors of the shapes and dtypes of the kernels' terms of N tokens, (0,) for those that a loss lacks."""

    def row(wanted: bool = True) -> Tensor:
        return like.new_empty(like.shape if wanted else 0)

    def flags() -> Tensor:
        return torch.empty(like.shape, dtype=torch.bool, device=like.device)

    dual = surrogate == "clip" and dict(zip(NUMBERS, numbers, strict=True))["dual_clip"] < math.inf
    return row(), row(), row(), flags(), flags(), row(kl != ""), flags() if dual else row(False)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    constants = dict(zip(inputs[4].split(","), inputs[3], strict=True))
    ctx.n_constants = len(constants)
    ctx.save_for_backward(*output[-2:], constants.get("entropy_weights"))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    once_differentiable()
    upstream, rest = grads[0], ([None] * ctx.n_constants, *(None,) * 9)
    if upstream is None:
        return (None, None, None, *rest)
    grad_logprobs, grad_sequence, entropy_weights = ctx.saved_tensors
    return (
        upstream * grad_logprobs if ctx.needs_input_grad[0] else None,
        upstream * -entropy_weights if ctx.needs_input_grad[1] else None,
        upstream * grad_sequence if ctx.needs_input_grad[2] else None,
        *rest,
    )


_policy_terms.register_autograd(_backward, setup_context=_setup_context)
