"""The policy loss of rows of logits with its gradient formed in the forward, for losses separable over tokens.

    backend        passes over the logits
    triton         1 read, 1 write, in one kernel
    cuda           the same, for losses whose gradient is known before the log-prob (`gradient_is_known`)
    elsewhere      2 reads, 1 write: log-probs of all rows, token arithmetic once, gradient of all rows

In a graph of `torch.compile` the backward cannot return the forward's gradient as it is. It reads and writes it
once more to scale it.

Legend: N tokens, V vocabulary, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastrl import checks, reference
from fastrl.backends import choice, memory
from fastrl.ops.fused import graph_is_kept, parts, scale_gradient
from fastrl.ops.policy import (
    CONSTANTS,
    NUMBERS,
    axes_of,
    fused_policy_terms,
    kernel_axes,
    kernel_columns,
    kernel_numbers,
    numbers_of,
    term_outputs,
)
from fastrl.ops.rows import LogitRows, backward_rows, forward_rows, once_differentiable, row_blocks

if TYPE_CHECKING:
    from fastrl.losses.policy.axes import PolicyAxes
    from fastrl_kernels import policy as kernels

# Surrogates with a derivative that does not depend on the log-prob, or depends on the ratio alone.
LINEAR = ("reinforce", "nll")
FUNCTIONS_OF_THE_RATIO = ("clip", "importance", "clipped_weight", "masked_weight", "topr", "sapo", "square")


def policy_logits(
    spec: PolicyAxes,
    logits: Tensor,  # (..., V)
    rows: LogitRows,
    columns: reference.TokenColumns,
    lengths: Tensor,  # (S,)
    *,
    inplace: bool = False,
) -> tuple[Tensor, Tensor, Tensor, reference.TokenTerms]:
    """Return (loss, logprobs (N,), entropy (N,), terms) and form the gradient of the loss here, not in the backward.

    Args:
        spec: a loss in which a token's gradient depends on its own row alone.
        logits: of any strides. Not float16: its gradient must meet the loss scale before it is rounded.
        rows: labels, temperature and options of the logits' rows.
        columns: the constants of the token arithmetic, without `sequence_log_ratio`.
        lengths: tokens of each sequence, which decide the order of the loss's sum.
        inplace: write the gradient over the logits, see `check_inplace`. In `torch.compile` only True, on Triton.

    Returns:
        The loss is differentiable once with respect to `logits`. Without `retain_graph=True`, the backward returns the
        gradient itself: no allocation, and no further pass if the upstream gradient is 1, else one pass to scale it in
        place. With `retain_graph=True` it scales into new memory, so that the next backward is right as well.
    """
    if inplace:
        check_inplace(logits)
    if torch.compiler.is_compiling():
        return _in_a_graph(spec, logits, rows, columns, lengths)
    plan = _Plan(spec, rows, columns, lengths, inplace)
    loss, logprobs, entropy, *terms = _PolicyLogits.apply(logits, plan)
    return loss, logprobs, entropy, reference.TokenTerms(*terms)


def check_inplace(logits: Tensor) -> None:
    """Raise `ValueError` if the gradient cannot be written over the logits."""
    # A graph has no inference tensors, and asking would break it.
    if not torch.compiler.is_compiling() and torch.is_inference(logits):
        raise ValueError("inplace=True needs logits made outside inference mode; pass logits.clone() or inplace=False")
    if logits.is_leaf:
        raise ValueError(
            "inplace=True would overwrite a leaf that requires grad; pass the output of an operation, or inplace=False"
        )
    base = logits._base
    if base is not None and base.is_leaf and base.requires_grad:
        raise ValueError("inplace=True would overwrite a view of a leaf that requires grad; pass inplace=False")
    if not _rows_apart(logits):
        raise ValueError(
            "inplace=True needs rows of adjacent entries that do not overlap, got "
            f"shape {tuple(logits.shape)} with strides {logits.stride()}; pass inplace=False"
        )


def _rows_apart(logits: Tensor) -> bool:
    """Return whether entries of a row are adjacent and no two rows share memory."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        return False
    extent = logits.shape[-1]
    for stride, size in sorted(zip(logits.stride()[:-1], logits.shape[:-1], strict=True)):
        if size > 1 and stride < extent:
            return False
        extent += stride * (size - 1)
    return True


@dataclass(frozen=True)
class _Plan:
    """Inputs of `_PolicyLogits` beside the logits."""

    spec: PolicyAxes
    rows: LogitRows
    columns: reference.TokenColumns
    lengths: Tensor
    inplace: bool


class _PolicyLogits(torch.autograd.Function):
    """logits -> loss, with the gradient formed in the forward. The other results have no gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, plan: _Plan) -> tuple[Tensor | None, ...]:
        if plan.inplace:
            logprobs, entropy, terms = loss_and_gradient(plan.spec, logits, plan.rows, plan.columns, None)
            # An operation that saved the logits for its backward must notice that they are overwritten.
            torch.autograd.graph.increment_version(logits)
            gradient = logits.detach()
        else:
            gradient = memory.empty(logits.shape, logits.dtype, logits.device)
            logprobs, entropy, terms = loss_and_gradient(plan.spec, logits, plan.rows, plan.columns, gradient)
        ctx.save_for_backward(gradient)
        ctx.backend = plan.rows.backend
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logprobs, entropy, *(x for x in terms if x is not None))
        return reference.total(terms.contribution, plan.lengths), logprobs, entropy, *terms

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        once_differentiable()
        if grads[0] is None:
            return None, None
        (gradient,) = ctx.saved_tensors
        return scale_gradient(gradient, grads[0], ctx.backend, keep=graph_is_kept()), None


def loss_and_gradient(
    spec: PolicyAxes,
    logits: Tensor,  # (..., V)
    rows: LogitRows,
    columns: reference.TokenColumns,
    out: Tensor | None,  # (..., V) contiguous, or None to write over the logits
) -> tuple[Tensor, Tensor, reference.TokenTerms]:
    """Return (logprobs (N,), entropy (N,), detached terms), and write the gradient of their contributions' sum."""
    gradients = None if out is None else out.view(-1, logits.shape[-1])
    if rows.backend == "triton":
        return _in_one_kernel(spec, logits, rows, columns, gradients)
    if rows.backend == "cuda" and gradient_is_known(spec, columns):
        return _in_a_cluster(spec, logits, rows, columns, gradients)
    # Tiles of rows that stay in a CPU's cache would save the second read, but no time. At N=1024, V=49152 the two walks
    # took 27 ms in tiles of 16 rows and 26 ms in larger ones. The token arithmetic took another 0.5 ms for each tile.
    blocks = list(row_blocks(logits.detach(), rows.labels, rows.inv_temperature_rows))
    found = [
        forward_rows(
            rows.backend,
            x,
            labels,
            rows.inv_temperature if inv_temperature is None else inv_temperature,
            **rows.scalars(),
        )
        for x, labels, inv_temperature in blocks
    ]
    logprobs, entropy = (_joined([each[i] for each in found]) for i in range(2))
    terms, g, h = _terms_and_coefficients(spec, logprobs, entropy, columns, choice.companion_backend(rows.backend))
    for ((x, labels, inv_temperature), part), outputs in zip(parts(blocks), found, strict=True):
        backward_rows(
            rows.backend,
            x,
            labels,
            rows.inv_temperature if inv_temperature is None else inv_temperature,
            outputs,
            (g[part], None if h is None else h[part], None),
            **rows.scalars(),
            out=x if gradients is None else gradients[part],
        )
    return logprobs, entropy, terms


def _joined(blocks: Sequence[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks))


def _terms_and_coefficients(
    spec: PolicyAxes, logprobs: Tensor, entropy: Tensor, columns: reference.TokenColumns, backend: str = "auto"
) -> tuple[reference.TokenTerms, Tensor, Tensor | None]:
    """Return (detached terms, dL/dlogprobs, dL/dentropy or None), each (N,)."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        leaf_entropy = None if columns.entropy_weights is None else entropy.detach().requires_grad_()
        terms = fused_policy_terms(spec, leaf, leaf_entropy, columns, backend=backend)
        leaves = [leaf] if leaf_entropy is None else [leaf, leaf_entropy]
        g, *h = torch.autograd.grad(terms.contribution.sum(), leaves)
    return terms._replace(contribution=terms.contribution.detach()), g, h[0] if h else None


def gradient_is_known(spec: PolicyAxes, columns: reference.TokenColumns) -> bool:
    """Return whether dL/dlogprobs and dL/dentropy of every token are known before its log-prob is.

    They are for a loss that is linear in the log-prob, and on-policy, with every ratio 1. Not with a KL term.
    """
    if spec.kl is not None:
        return False
    return spec.surrogate in LINEAR or (columns.anchor is None and spec.surrogate in FUNCTIONS_OF_THE_RATIO)


def _in_a_cluster(
    spec: PolicyAxes, logits: Tensor, rows: LogitRows, columns: reference.TokenColumns, gradients: Tensor | None
) -> tuple[Tensor, Tensor, reference.TokenTerms]:
    """Do `loss_and_gradient` with the CUDA kernel that reads and writes the logits once."""
    from fastrl.backends import cuda

    # The gradient does not depend on the log-prob: any finite number serves.
    anything = torch.zeros_like(columns.advantages)
    _, g, h = _terms_and_coefficients(spec, anything, anything, columns)
    found = []
    for block, part in parts(row_blocks(logits.detach(), rows.labels, rows.inv_temperature_rows)):
        x, labels, inv_temperature = block
        results, _ = cuda.token_logprobs_fwd_bwd(
            x,
            labels,
            rows.inv_temperature if inv_temperature is None else inv_temperature,
            g[part],
            None if h is None else h[part],
            **rows.scalars(),
            out=x if gradients is None else gradients[part],
        )
        found.append(results)
    logprobs, entropy = (_joined([each[i] for each in found]) for i in range(2))
    return logprobs, entropy, _terms_and_coefficients(spec, logprobs, entropy, columns)[0]


def _in_one_kernel(
    spec: PolicyAxes, logits: Tensor, rows: LogitRows, columns: reference.TokenColumns, gradients: Tensor | None
) -> tuple[Tensor, Tensor, reference.TokenTerms]:
    """Do `loss_and_gradient` with the Triton kernel."""
    values = [getattr(columns, name) for name in CONSTANTS]
    return _through_kernel(kernel_axes(spec), kernel_numbers(spec), logits, rows, values, gradients)


def _through_kernel(
    axes: kernels.PolicyAxes,
    numbers: kernels.PolicyNumbers,
    logits: Tensor,  # (..., V)
    rows: LogitRows,
    values: Sequence[Tensor | None],  # (N,) each, named by `CONSTANTS`
    gradients: Tensor | None,  # (N, V), or None to write over the logits
) -> tuple[Tensor, Tensor, reference.TokenTerms]:
    from fastrl_kernels import policy_logits as kernels

    found = []
    for block, part in parts(row_blocks(logits.detach(), rows.labels, rows.inv_temperature_rows, *values)):
        x, labels, inv_temperature, *given = block
        found.append(
            kernels.policy_logits_fwd(
                axes,
                numbers,
                x,
                labels,
                rows.inv_temperature if inv_temperature is None else inv_temperature,
                kernel_columns(given),
                out=x if gradients is None else gradients[part],
                **rows.scalars(),
            )
        )
    logprobs, entropy = (_joined([each[i] for each in found]) for i in range(2))
    results = [each[2] for each in found]
    terms = reference.TokenTerms(
        contribution=_joined([x.contribution for x in results]),
        surrogate=_joined([x.surrogate for x in results]),
        kl=None if results[0].kl is None else _joined([x.kl for x in results]),
        ratio=_joined([x.ratio for x in results]),
        clipped_low=_joined([x.clipped_low for x in results]),
        clipped_high=_joined([x.clipped_high for x in results]),
        dual_clipped=None if results[0].dual_clipped is None else _joined([x.dual_clipped for x in results]),
    )
    return logprobs, entropy, terms


def _in_a_graph(
    spec: PolicyAxes, logits: Tensor, rows: LogitRows, columns: reference.TokenColumns, lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor, reference.TokenTerms]:
    """Do `policy_logits` with `inplace` inside `torch.compile`."""
    gradient = logits.detach()
    constants = {name: getattr(columns, name) for name in CONSTANTS if getattr(columns, name) is not None}
    results = _policy_logits_(
        gradient,
        rows.labels,
        rows.inv_temperature_rows,
        list(constants.values()),
        ",".join(constants),
        rows.inv_temperature,
        rows.logit_scale,
        rows.softcap,
        rows.ignore_index,
        ",".join(axes_of(spec)),
        numbers_of(spec),
    )
    logprobs, entropy, contribution, surrogate, ratio, below, above, kl, dual = results
    terms = reference.TokenTerms(
        contribution=contribution,
        surrogate=surrogate,
        kl=None if spec.kl is None else kl,
        ratio=ratio,
        clipped_low=below,
        clipped_high=above,
        dual_clipped=dual if spec.surrogate == "clip" and spec.dual_clip is not None else None,
    )
    loss = _with_known_gradient(logits, gradient, reference.total(contribution, lengths))
    return loss, logprobs, entropy, terms


@torch.library.custom_op("fastrl::with_known_gradient", mutates_args=())
def _with_known_gradient(logits: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
    """Return the loss, whose gradient with respect to the logits is known."""
    return loss.clone()


@_with_known_gradient.register_fake
def _(_logits: Tensor, _gradient: Tensor, loss: Tensor) -> Tensor:
    return torch.empty_like(loss)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, factor: Tensor) -> tuple[Tensor, None, None]:
    once_differentiable()
    # Plain arithmetic, which the compiler fuses with its neighbours and may do in the memory of the gradient.
    (gradient,) = ctx.saved_tensors
    return (gradient.to(factor.dtype) * factor).to(gradient.dtype), None, None


_with_known_gradient.register_autograd(_backward, setup_context=_setup_context)


# As in `policy_terms`, the lists of tensors leave out absent columns, and absent outputs are empty tensors.
@torch.library.custom_op("fastrl::policy_logits_", mutates_args=("logits",))
def _policy_logits_(
    logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    inv_temperature_rows: Tensor | None,  # (...)
    constants: Sequence[Tensor],  # (N,) each
    names: str,
    inv_temperature: float,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    axes: str,
    numbers: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastrl_kernels import policy

    given = dict(zip(names.split(","), constants, strict=True))
    rows = LogitRows(labels, inv_temperature, inv_temperature_rows, logit_scale, softcap, ignore_index, "triton")
    logprobs, entropy, terms = _through_kernel(
        policy.PolicyAxes(*axes.split(",")),
        policy.PolicyNumbers(**dict(zip(NUMBERS, numbers, strict=True))),
        logits,
        rows,
        [given.get(name) for name in CONSTANTS],
        None,
    )

    def present(x: Tensor | None) -> Tensor:
        return logprobs.new_empty(0) if x is None else x

    return (
        logprobs,
        entropy,
        terms.contribution,
        terms.surrogate,
        terms.ratio,
        terms.clipped_low,
        terms.clipped_high,
        present(terms.kl),
        present(terms.dual_clipped),
    )


@_policy_logits_.register_fake
def _(logits: Tensor, labels: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, axes, numbers = others
    row = torch.empty(labels.numel(), dtype=checks.wide(logits.dtype), device=logits.device)
    surrogate, _, kl, *_ = axes.split(",")
    return torch.empty_like(row), row, *term_outputs(row, surrogate, kl, numbers)
