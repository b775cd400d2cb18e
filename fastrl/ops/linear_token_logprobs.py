"""Per-token log-prob, entropy and logsumexp from hidden states and the LM head, without the N x V logits.

Rows go through the head in chunks of a fixed number, the last one padded. Every GEMM then has one shape, and a row's
log-prob does not depend on the batch around it. Logits are accumulated and kept in float32 (float64 for float64 inputs)
and turned into their own gradient in place. dW is summed in float32 over the chunks and cast once. Rows with an ignored
label are dropped before the first GEMM, rows without a gradient before the GEMMs of the gradient.

docs/engine.md has the chunks, the GEMM units of every path, the host waits and the memory as tables.

Legend: N tokens, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.backends import choice
from fastrl.ops import sparse_rows
from fastrl.ops.chunks import Chunks, _keep
from fastrl.ops.gradients import Gradients
from fastrl.ops.head import HeadOptions, LinearRows
from fastrl.ops.live_rows import kept_first
from fastrl.ops.rows import TokenLogprobs, once_differentiable
from fastrl.ops.sampling import check_labels_are_allowed

# The host waits in these operations: `torch.compile` must leave them out of CUDA graphs (mode="reduce-overhead").
_WAITS = (torch.Tag.cudagraph_unsafe,)


def linear_token_logprobs(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    temperature: float | Tensor | None = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    tail_mass: float = 0.0,
    tp_group: Any = None,
    backend: str = "auto",
    keep_token_grads: bool | None = None,
    keep_units: bool | None = None,
    allowed: Tensor | None = None,  # (..., V) bool, (..., ceil(V/32)) int32 or (..., K) int64
    logits_rounding: str | None = None,
) -> TokenLogprobs:
    """Return log-prob of the label, entropy and logsumexp of `hidden @ weight.T + bias` without forming all logits.

        z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature
        logprobs = z_y - logsumexp(z)
        entropy  = -sum_v p_v log p_v, in nats

    Args:
        hidden: (..., D) hidden states, float32, bfloat16, float16 or float64.
        weight: (V, D) LM head. `hidden` and `weight` are promoted to the wider dtype, as PyTorch promotes: bfloat16
            hidden states and a float32 head, which a trainer under autocast has, meet in float32. Autocast has no
            effect, neither forward nor backward. For GEMMs in bfloat16 pass both in it.
        labels: (...) int64 or int32, aligned with the hidden states: nothing is shifted here.
        bias: (V,) or None. An entry of -inf bans a token. The bias is added to the float32 logits unrounded, also if
            the head is of half precision.
        temperature: a float or a tensor broadcastable to `labels`, finite and > 0. None means 1.
        logit_scale: factor on the logits, before the softcap.
        softcap: bound c of c tanh(x / c), or None.
        ignore_index: label of rows to leave out. They never reach the head.
        chunk_tokens: rows of a chunk. Default: 256 on a CPU, 2048 elsewhere. Bits depend on it, values do not.
        tail_mass: 0.0 for the exact gradient. Above 0 and below 1, the largest share of a row's gradient that may be
            left out to save its two GEMM passes. The outputs are exact either way. Let g, h, l be the upstream
            gradients of the three outputs. A row of the logits' gradient becomes a short list of entries if the other
            entries add up to at most `tail_mass` (|g| + |h| + |l|) |logit_scale| / T in absolute value. All other rows
            are exact. For the log-prob alone this is the probability outside the list, and the error of a row of dX
            is at most tail_mass |g| |logit_scale| / T max_v |W_v|. With `tp_group`, `allowed` or `logits_rounding`,
            0.0 only.
        tp_group: process group over which the rows of the head are spread. `weight` (V_r, D) and `bias` are then this
            rank's shard, of any size, or a DTensor sharded on dimension 0. `labels` are global ids. Every rank of the
            group makes the call, and its backward, with the same hidden states. See `fastrl.ops.vocab_parallel`.
        backend: of the row kernels: "auto", "torch", "cpu", "triton" or "cuda". The GEMMs are PyTorch's.
        keep_token_grads: with a frozen head, whether the forward keeps the gradient of every log-prob, (N, D). True by
            default. A function of the log-probs then takes 2 GEMM units in all, a function of the entropies or
            logsumexps 4. False keeps nothing, and either takes 3.
        keep_units: the former name of `keep_token_grads`, an alias for this version. Give one of the two.
        allowed, logits_rounding: as `token_logprobs`. They change a chunk's logits in place. Not with `tp_group`.

    Returns:
        `TokenLogprobs` of float32 tensors (float64 for float64 inputs) of the shape of `labels`, all differentiable
        once with respect to `hidden`, `weight` and `bias`, also inside `torch.compile(fullgraph=True)` and activation
        checkpoints. Extra memory: one chunk of float32 logits, C V 4 bytes, and the gradients. docs/engine.md has the
        rest. On a CPU a chunk's memory, up to 256 MiB, stays with the process for the next call
        (`fastrl.backends.memory.release` gives it back).

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logprobs`, and for heads that hold no values or are sharded.
    """
    keep = _keep_token_grads(keep_token_grads, keep_units)
    if tp_group is not None:
        if allowed is not None or logits_rounding is not None:
            raise ValueError("allowed and logits_rounding must keep their defaults with tp_group")
        from fastrl.ops.vocab_parallel import linear_token_logprobs_parallel

        return linear_token_logprobs_parallel(
            hidden,
            weight,  # pyright: ignore[reportCallIssue]  # the decorator that keeps it out of graphs hides its signature
            labels,
            group=tp_group,
            bias=bias,
            temperature=temperature,
            logit_scale=logit_scale,
            softcap=softcap,
            ignore_index=ignore_index,
            chunk_tokens=chunk_tokens,
            tail_mass=tail_mass,
            backend=backend,
            keep_token_grads=keep,
        )
    rows = LinearRows.checked(
        hidden,
        weight,
        labels,
        bias=bias,
        temperature=temperature,
        logit_scale=logit_scale,
        softcap=softcap,
        ignore_index=ignore_index,
        chunk_tokens=chunk_tokens,
        tail_mass=tail_mass,
        backend=backend,
        allowed=allowed,
        logits_rounding=logits_rounding,
    )
    keep = keep and torch.is_grad_enabled() and rows.hidden.requires_grad and not rows.trains_head
    options = rows.options
    outputs = _linear_token_logprobs(
        rows.hidden,
        rows.weight,
        rows.labels,
        rows.bias,
        rows.inv_temperature,
        options.logit_scale,
        options.softcap,
        options.ignore_index,
        options.chunk_tokens,
        options.backend,
        options.tail_mass,
        keep,
        rows.allowed,
        rows.rounding,
    )
    logprobs, entropy, logsumexp = (rows.restored(x) for x in outputs[:3])
    if rows.allowed is not None:
        check_labels_are_allowed(logprobs)
    return TokenLogprobs(logprobs, entropy, logsumexp)


def _keep_token_grads(keep_token_grads: bool | None, keep_units: bool | None) -> bool:
    """Return the option from its name and its alias, or raise. True unless given."""
    if keep_token_grads is not None and keep_units is not None:
        raise TypeError("keep_units is an alias of keep_token_grads: expected one of them, got both")
    name = "keep_token_grads" if keep_units is None else "keep_units"
    value = keep_token_grads if keep_units is None else keep_units
    if value is None:
        return True
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


@torch.library.custom_op("fastrl::linear_token_logprobs", mutates_args=(), tags=_WAITS)
def _linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    chunk_tokens: int,
    backend: str,
    tail_mass: float,
    keep_token_grads: bool,
    allowed: Tensor | None = None,
    rounding: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = HeadOptions(logit_scale, softcap, ignore_index, chunk_tokens, backend, tail_mass)
    chunks = Chunks.of(LinearRows(hidden, weight, bias, labels, inv_temperature, options, allowed, rounding))
    found = chunks.outputs()
    gradients = Gradients(chunks, (keep_token_grads, False, False), per_live_row=True)
    with choice.autocast_disabled(hidden.device):
        for rows, states, logits in chunks:
            results = chunks.forward_rows(rows, logits)
            _keep(found, rows, results)
            if keep_token_grads:
                # The gradient of each log-prob alone: the backward multiplies its row by the upstream gradient.
                gradients.take(rows, states, logits, results, (torch.ones_like(results[0]), None, None))
        gradients.flush()
    token_grads = found[0].new_empty((0, hidden.shape[1])) if gradients.hidden is None else gradients.hidden
    logprobs, entropy, logsumexp = (chunks.scattered(x) for x in found[:3])
    residual = chunks.scattered(found[3]) if found[3].numel() else found[3].clone()
    return logprobs, entropy, logsumexp, residual, token_grads


@_linear_token_logprobs.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    backend, keeps = options[6], options[8]
    dtype = checks.wide(hidden.dtype)
    logprobs, entropy, logsumexp = (torch.empty(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    residual = logprobs.new_empty(labels.shape if choice.needs_lse_residual(backend) else 0)
    # The number of live rows depends on the labels.
    n_live = torch.library.get_ctx().new_dynamic_size() if keeps else 0
    return logprobs, entropy, logsumexp, residual, logprobs.new_empty((n_live, hidden.shape[1]))


@torch.library.custom_op("fastrl::linear_token_logprobs_backward", mutates_args=(), tags=_WAITS)
def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    inv_temperature: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    logsumexp: Tensor,
    residual: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_logsumexp: Tensor | None,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    chunk_tokens: int,
    backend: str,
    tail_mass: float,
    needs: list[bool],
    allowed: Tensor | None = None,
    rounding: str = "",
) -> tuple[Tensor, Tensor, Tensor]:
    options = HeadOptions(logit_scale, softcap, ignore_index, chunk_tokens, backend, tail_mass)
    linear_rows = LinearRows(hidden, weight, bias, labels, inv_temperature, options, allowed, rounding)
    upstream = [g for g in (grad_logprobs, grad_entropy, grad_logsumexp) if g is not None]
    chunks = Chunks.of(linear_rows, keep=torch.stack([g != 0 for g in upstream]).any(0))
    gradients = Gradients(chunks, (needs[0], needs[1], needs[2]))
    outputs = (logprobs, entropy, logsumexp, residual if residual.numel() else logprobs)
    with choice.autocast_disabled(hidden.device):
        _add_chunks(chunks, gradients, outputs, (grad_logprobs, grad_entropy, grad_logsumexp))
        gradients.flush()
    empty = hidden.new_empty(0)
    dhidden, dweight, dbias = gradients.cast()
    return (
        empty if dhidden is None else dhidden,
        empty.clone() if dweight is None else dweight,
        empty.clone() if dbias is None else dbias,
    )


def _add_chunks(
    chunks: Chunks,
    gradients: Gradients,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> None:
    """Add all chunks to the gradients, from outputs and their gradients of all tokens, (N,) each."""
    for rows, states, logits in chunks:
        index = chunks.live[rows]
        first, second, third = (None if g is None else g[index] for g in grads)
        of_rows = (outputs[0][index], outputs[1][index], outputs[2][index], outputs[3][index])
        gradients.take(rows, states, logits, of_rows, (first, second, third))


@_linear_token_logprobs_backward.register_fake
def _(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs = rest[14]
    return (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight) if needs[1] else hidden.new_empty(0),
        torch.empty_like(bias) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, inv_temperature, *scalars, ctx.keeps_token_grads, allowed, ctx.rounding = inputs
    ctx.scalars = scalars
    ctx.stats = sparse_rows.current_sparse_stats()
    ctx.save_for_backward(hidden, weight, labels, bias, inv_temperature, allowed, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    once_differentiable()
    grad_logprobs, grad_entropy, grad_logsumexp = grads[:3]
    none = (None,) * 9
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
    if not any(needs) or all(g is None for g in grads):
        return (None, None, None, None, None, *none)
    hidden, weight, labels, bias, inv_temperature, allowed, *outputs, token_grads = ctx.saved_tensors
    if ctx.keeps_token_grads and grad_entropy is None and grad_logsumexp is None and grad_logprobs is not None:
        # The shape of the kept gradients tells the number of live rows, so the host does not wait.
        live = kept_first(labels != ctx.scalars[2])[: token_grads.shape[0]]
        scaled = grad_logprobs[live].to(token_grads.dtype).unsqueeze(-1) * token_grads
        return (torch.zeros_like(hidden).index_copy_(0, live, scaled.to(hidden.dtype)), None, None, None, None, *none)
    with sparse_rows.collect_sparse_stats(ctx.stats):
        dhidden, dweight, dbias = _linear_token_logprobs_backward(
            hidden,
            weight,
            labels,
            bias,
            inv_temperature,
            *outputs,
            grad_logprobs,
            grad_entropy,
            grad_logsumexp,
            *ctx.scalars,
            needs,
            allowed,
            ctx.rounding,
        )
    return (
        dhidden if needs[0] else None,
        dweight if needs[1] else None,
        None,
        dbias if needs[2] else None,
        None,
        *none,
    )


_linear_token_logprobs.register_autograd(_backward, setup_context=_setup_context)
