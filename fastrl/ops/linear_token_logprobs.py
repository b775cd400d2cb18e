"""Per-token log-prob, entropy and logsumexp from hidden states and the LM head, without the N x V logits.

Rows go through the head in chunks of a fixed number, the last one padded, so that every GEMM has one shape and a row's
log-prob does not depend on the batch around it. The logits of a chunk are accumulated and kept in float32 (float64 for
float64 inputs) and turned into their own gradient in place; dW is accumulated in float32 over the chunks and cast once.
Rows whose label is ignored are dropped before the first GEMM, rows without a gradient before the GEMMs that it is for.

What the host waits for, on CUDA and ROCm: in every forward, and in a backward that forms the logits again, once for the
number of rows that take part, the logits of the first chunk being queued behind it; in `fused_gradient` once per chunk
for the number of rows that have a gradient, their row kernel being queued behind it; and before it, where a loss
couples the tokens of a sequence, for the lengths, with nothing behind. Nothing else, and nothing in the backward of
`fused_gradient` or of a frozen head's log-probs. On other accelerators the same numbers are waited for at once.

Paths, in GEMM units of 2 N V D flop:

    forward only                                             1
    training, any function of the outputs                    1 forward + 3 backward (the logits are formed again)
    training, frozen head, function of the log-probs         2: the unit gradients (W_y - p W)/T are kept, (N, D)
    training, frozen head, function of the entropies too     3 with `keep_units=False`, else 4
    training, loss separable over tokens (`fused_gradient`)  3, or 2 with a frozen head
    training, loss that couples tokens of a sequence or pair the same where whole sequences fit `BLOCK_CHUNKS` chunks
    any of the training paths, `tail_mass` > 0               dX and dW (not the forward) of the dense rows only

Legend: N tokens, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.ops import buffers, dispatch, sparse_rows
from fastrl.ops.compaction import Kept, kept_first, refuse_capture
from fastrl.ops.sampling_rows import (
    check_allowed,
    check_labels_are_allowed,
    check_rounding,
    kernel_scalars,
    prepare,
    prepared_backward_rows,
)
from fastrl.ops.token_logprobs import TokenLogprobs, forward_rows, head_scalars, once_differentiable

# Rows of a chunk. In GEMM units at N = 1024, D = 576, V = 49152 in float32 (one AVX-512 thread, its CPU time):
#         forward   training   frozen head   half the rows masked
#   256     1.06       2.97          2.02                   1.48
#   512     1.05       3.09          1.99                   1.45
#  1024     1.04       3.03          1.95                   1.92, the chunk being padded
CPU_CHUNK_TOKENS = 256
GPU_CHUNK_TOKENS = 2048
# Chunks whose logits are held at once where a loss couples the tokens of a sequence.
BLOCK_CHUNKS = 4
# Rows of a chunk that have a gradient are moved together in this many steps, each with a copy of its share.
MOVE_STEPS = 32
# The head's gradient is added to on a GPU in blocks of this many vocabulary rows, whose product needs room of its own.
GPU_HEAD_ROWS = 16384
# Rows of a GEMM over the vocabulary come in multiples of this on a CPU.
CPU_GEMM_ROWS = 8
# Logits are formed on a CPU in blocks of this many vocabulary rows, which stay in the cache: a chunk of 256 rows took
# 0.85 of the time of one GEMM over the vocabulary (D = 576 and V = 49152, D = 1536 and V = 151936; two threads). The
# gradients' GEMMs gain nothing from it.
CPU_LOGIT_ROWS = 1024
# A half-precision head on a CPU is widened for its gradients in blocks of this many vocabulary rows, to keep the copy
# small.
CPU_WIDEN_ROWS = 8192
# The host waits in these operations: `torch.compile` must leave them out of CUDA graphs (mode="reduce-overhead").
_WAITS = (torch.Tag.cudagraph_unsafe,)


@dataclass(frozen=True)
class Head:
    """How logits become log-probs: everything of the vocabulary operation that is not a tensor."""

    logit_scale: float
    softcap: float
    ignore_index: int
    chunk_tokens: int
    backend: str
    tail_mass: float = 0.0
    observe: Callable[[Tensor, Tensor], None] | None = None
    """Called in the forward with (indices of rows, their logits), for what else is wanted of the logits while they are
    there; it must leave them as they are."""


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
    keep_units: bool = True,
    allowed: Tensor | None = None,  # (..., V) bool, (..., ceil(V/32)) int32 or (..., K) int64
    logits_rounding: str | None = None,
) -> TokenLogprobs:
    """Return log-prob of the label, entropy and logsumexp of `hidden @ weight.T + bias` without forming all logits.

        z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature
        logprobs = z_y - logsumexp(z);  entropy = -sum_v p_v log p_v, in nats

    Args:
        hidden: (..., D) hidden states, float32, bfloat16, float16 or float64.
        weight: (V, D) LM head. A dtype other than that of `hidden` is promoted as PyTorch promotes: bfloat16 hidden
            states and a float32 head, which a trainer under autocast has, meet in float32. Autocast itself changes
            nothing here, neither forward nor backward; for GEMMs in bfloat16 pass both in it.
        labels: (...) int64 or int32, aligned with the hidden states: nothing is shifted here.
        bias: (V,) or None; -inf entries ban a token. It is added to the float32 logits as it comes, also where the head
            is of half precision.
        temperature: a float or a tensor broadcastable to `labels`, finite and > 0. None means 1.
        logit_scale: factor on the logits, before the softcap.
        softcap: bound c of c tanh(x / c), or None.
        ignore_index: label of rows to leave out; they never reach the head.
        chunk_tokens: rows of a chunk; 256 on a CPU and 2048 elsewhere unless given. Bits depend on it, values do not.
        tail_mass: 0.0 for the exact gradient; else, below 1, the largest share of a row's gradient that may be left
            out to save its two GEMM passes. The outputs are exact either way. A row of the logits' gradient whose
            entries outside a short list add up to at most `tail_mass` (|g| + |h| + |l|) |logit_scale| / T in absolute
            value, for the upstream gradients g, h, l of the three outputs, is taken as that list; the others are
            exact. For the log-prob alone this is the probability outside the list, and the error of a row of dX is at
            most tail_mass |g| |logit_scale| / T max_v |W_v|. With `tp_group`, `allowed` or `logits_rounding`, 0.0 only.
        tp_group: process group over which the rows of the head are spread: `weight` (V_r, D) and `bias` are then this
            rank's shard, of any size, or a DTensor sharded on dimension 0; `labels` are global ids, and every rank of
            the group makes the call, and its backward, with the same hidden states. See `fastrl.ops.vocab_parallel`.
        backend: of the row kernels: "auto", "torch", "cpu", "triton" or "cuda". The GEMMs are PyTorch's.
        keep_units: with a frozen head, whether the forward keeps the gradients of the log-probs, (N, D). A function of
            the log-probs then takes 2 GEMM units in all, but one of the entropies or logsumexps 4; False makes that 3,
            for either, and keeps nothing.
        allowed, logits_rounding: as `token_logprobs`; a chunk's logits are rounded and restricted where they are. Not
            with `tp_group`.

    Returns:
        `TokenLogprobs` of float32 tensors (float64 for float64 inputs) of the shape of `labels`, all differentiable
        once with respect to `hidden`, `weight` and `bias`, also inside `torch.compile(fullgraph=True)` and activation
        checkpoints. Extra memory: one chunk of float32 logits, C V 4 bytes (the `torch` rows take ten tiles of 32 rows
        beside it); where `tail_mass` > 0, another chunk for dense rows and the lists, C K 8 bytes; the gradients, of
        which a trainable head's is V D 4 bytes until it is cast; for a frozen head the unit gradients, N D 4 bytes; and
        the live rows of one chunk. On a CPU a chunk's memory, up to 256 MiB, stays with the process for the next call
        (`fastrl.ops.buffers.release` gives it back).

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logprobs`, and for heads that hold no values or are sharded.
    """
    if not isinstance(keep_units, bool):
        raise TypeError(f"keep_units must be True or False, got {keep_units!r}")
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
            keep_units=keep_units,
        )
    hidden, weight, labels, bias = check_head(hidden, weight, labels, bias, ignore_index)
    head = make_head(
        hidden,
        logit_scale,
        softcap,
        ignore_index,
        chunk_tokens=chunk_tokens,
        tail_mass=tail_mass,
        tp_group=tp_group,
        backend=backend,
    )
    inverse = inverse_temperature(temperature, labels, hidden)
    sets, rounding = check_restrictions(allowed, logits_rounding, labels, weight.shape[0], head)
    training = torch.is_grad_enabled()
    trains_head = training and (weight.requires_grad or (bias is not None and bias.requires_grad))
    unit = keep_units and training and hidden.requires_grad and not trains_head
    flat = hidden.reshape(-1, hidden.shape[-1])
    outputs = _linear_token_logprobs(
        flat,
        weight,
        labels.reshape(-1),
        bias,
        inverse,
        head.logit_scale,
        head.softcap,
        head.ignore_index,
        head.chunk_tokens,
        head.backend,
        head.tail_mass,
        unit,
        sets,
        rounding,
    )
    if sets is not None:
        check_labels_are_allowed(outputs[0].view(labels.shape))
    return TokenLogprobs(*(x.view(labels.shape) for x in outputs[:3]))


def check_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors of the vocabulary operation in one dtype, or raise."""
    checks.vocabulary_tensor("hidden", hidden)
    checks.vocabulary_tensor("weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"weight is empty, shape {tuple(weight.shape)}: gather the sharded head first (ZeRO-3: GatheredParameters; "
            "FSDP: call through the wrapped module's forward)"
        )
    if hidden.dim() < 1 or weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight must be (V, D={hidden.shape[-1] if hidden.dim() else '?'}), got {tuple(weight.shape)}"
        )
    checks.same_device("weight", weight, hidden.device)
    refuse_capture(hidden.device)
    if bias is not None:
        checks.vocabulary_tensor("bias", bias)
        checks.same_shape("bias", bias, weight.shape[:1])
        checks.same_device("bias", bias, hidden.device)
    labels = checks.labels("labels", labels, hidden.shape[:-1], hidden.device, weight.shape[0], ignore_index)
    trains = torch.is_grad_enabled() and hidden.requires_grad and not torch.compiler.is_compiling()
    if trains and torch.is_inference(weight):
        raise RuntimeError("weight is an inference tensor and cannot be saved for backward; pass weight.clone()")
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), labels, None if bias is None else as_added(bias, dtype)


def as_added(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bias of a head of `dtype`: widened to it, but not rounded, as the logits that it is added to are."""
    return bias.to(torch.promote_types(bias.dtype, dtype))


def make_head(
    hidden: Tensor,
    logit_scale: Any,
    softcap: Any,
    ignore_index: int,
    *,
    chunk_tokens: int | None,
    tail_mass: float,
    tp_group: Any,
    backend: str,
) -> Head:
    """Return the validated `Head`."""
    tail_mass = sparse_rows.check_tail_mass(tail_mass)
    if tp_group is not None:
        raise ValueError("tp_group is not supported here: gather the head first, or take the log-probs with tp_group")
    scale, cap = head_scalars(logit_scale, softcap)
    if chunk_tokens is None:
        chunk_tokens = CPU_CHUNK_TOKENS if hidden.device.type == "cpu" else GPU_CHUNK_TOKENS
    elif isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be an int >= 1 or None, got {chunk_tokens!r}")
    return Head(scale, cap, ignore_index, chunk_tokens, dispatch.choose(backend, hidden.device).backend, tail_mass)


def check_restrictions(
    allowed: Tensor | None, logits_rounding: str | None, labels: Tensor, vocabulary: int, head: Head
) -> tuple[Tensor | None, str]:
    """Return `allowed` and `logits_rounding` as the kernels take them, or raise."""
    if head.tail_mass > 0.0 and not (allowed is None and logits_rounding is None):
        raise ValueError(
            "tail_mass > 0 is not supported together with allowed= or logits_rounding=: expected tail_mass=0.0, "
            f"got {head.tail_mass}"
        )
    return check_allowed(allowed, labels, vocabulary), check_rounding(logits_rounding)


def inverse_temperature(temperature: Any, labels: Tensor, hidden: Tensor) -> Tensor:
    """Return 1/T per token, (N,), in the dtype of the row kernels."""
    heat = checks.temperature(temperature, labels.shape, hidden.device)
    dtype = _wide(hidden.dtype)
    if isinstance(heat, Tensor):
        return heat.to(dtype).reciprocal().reshape(-1)
    return torch.full((labels.numel(),), 1.0 / heat, dtype=dtype, device=hidden.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def chunk_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Write the logits of one chunk (C, D) to `out` (C, V), accumulated and kept in `out`'s dtype."""
    if hidden.dtype == out.dtype and hidden.device.type != "cpu":
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, weight.shape[0], CPU_LOGIT_ROWS):
            block = slice(start, start + CPU_LOGIT_ROWS)
            torch.mm(wide, weight[block].to(out.dtype).t(), out=out[:, block])
    if bias is not None:
        out += bias.to(out.dtype)
    return out


def _for_products(gradient: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return (operand, factor): dlogits (C, V) as the operand of the GEMMs, whose products times the factor are wanted.

    On a GPU the operand has the head's dtype and is cast once for both of them.
    """
    if gradient.device.type != "cuda":
        return gradient, None
    return _as_float16(gradient) if weight.dtype == torch.float16 else (gradient.to(weight.dtype), None)


def _as_float16(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return (x, factor) with x * factor = gradient, x in float16 and |x| < 2^14: what is small does not vanish.

    The factor is a power of two, so that nothing is rounded twice. Beside entries that are not finite it is no help.
    """
    largest = torch.linalg.vector_norm(gradient, math.inf).nan_to_num(nan=1.0, posinf=1.0).clamp(2.0**-100, 2.0**100)
    power = largest / torch.frexp(largest).mantissa
    return torch.mul(gradient, 2.0**14 / power, out=torch.empty_like(gradient, dtype=torch.float16)), power * 2.0**-14


def _times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return gradient (C, V) @ weight (V, D), at least in float32."""
    count = gradient.shape[0]
    whole = count - count % CPU_GEMM_ROWS
    if gradient.device.type == "cpu" and whole < count:
        # For other row counts the CPU's float32 GEMM may sum the vocabulary in one long chain: at 3 rows and V = 151936
        # its error was 4e-4, against 1e-6 with rows of zeros added.
        rest = gradient.new_zeros(CPU_GEMM_ROWS, gradient.shape[1])
        rest[: count - whole] = gradient[whole:]
        ragged = _times_weight(rest, weight)[: count - whole]
        return torch.cat((_times_weight(gradient[:whole], weight), ragged)) if whole else ragged
    wide = _wide(weight.dtype)
    if weight.dtype == wide:
        return gradient @ weight
    if weight.device.type == "cuda":
        operand, factor = (gradient, None) if gradient.dtype == weight.dtype else _for_products(gradient, weight)
        product = torch.mm(operand, weight, out_dtype=wide)
        return product if factor is None else product.mul_(factor)
    total = torch.zeros((gradient.shape[0], weight.shape[1]), dtype=wide, device=gradient.device)
    for start in range(0, weight.shape[0], CPU_WIDEN_ROWS):
        block = slice(start, start + CPU_WIDEN_ROWS)
        total.addmm_(gradient[:, block], weight[block].to(wide))
    return total


def _add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor, factor: Tensor | None = None) -> None:
    """Add gradient^T (V, C) @ hidden (C, D) to `total` (V, D), at least float32; both operands of `_for_products`."""
    # In place and with the vocabulary outermost: 0.89 of the time of the logits' GEMM at C = 256, D = 576, V = 49152;
    # in vocabulary blocks 0.90, as the transpose (D, V) 1.09.
    if hidden.dtype == total.dtype or hidden.device.type != "cuda":
        total.addmm_(gradient.t(), hidden.to(total.dtype))
        return
    for start in range(0, total.shape[0], GPU_HEAD_ROWS):
        block = slice(start, start + GPU_HEAD_ROWS)
        product = torch.mm(gradient[:, block].t(), hidden, out_dtype=total.dtype)
        total[block] += product if factor is None else product.mul_(factor)


@dataclass
class Chunks:
    """The live rows of a batch, cut into chunks of a fixed number of rows; the last one is padded with zero rows."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    inverse: Tensor  # (N,)
    head: Head
    live: Tensor  # (L,) indices of the rows to compute
    allowed: Tensor | None = None  # (N, ...) sets, as `check_allowed` returns them
    rounding: str = ""
    ahead: tuple[Tensor, Tensor] | None = None
    """States (C, D) and logits (C, V) of the first chunk, queued before the number of live rows was known."""

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        inverse: Tensor,
        head: Head,
        *,
        live: Tensor | None = None,  # (L,)
        allowed: Tensor | None = None,
        rounding: str = "",
        keep: Tensor | None = None,  # (N,) bool
        ahead: bool = True,
    ) -> Chunks:
        """Return the chunks of the rows whose label is not ignored, and which `keep` marks where it is given.

        `live` gives these rows in the order in which to take them, where it is not their own.

        On an asynchronous device the logits of the first chunk are queued before the host waits for the number of
        rows, unless `ahead` is False: for callers that hold several chunks at once.
        """
        if live is not None:
            return cls(hidden, weight, bias, labels, inverse, head, live, allowed, rounding)
        wanted = labels != head.ignore_index
        kept = Kept(wanted if keep is None else wanted & keep)
        chunks = cls(hidden, weight, bias, labels, inverse, head, kept.order, allowed, rounding)
        if ahead and kept.is_pending and labels.numel() and weight.numel():
            # Rows of `order` that turn out not to be kept are formed too, and never looked at.
            buffer = chunks.buffer(1)
            with dispatch.own_precision(hidden.device):
                states, _ = chunks.logits(slice(0, min(head.chunk_tokens, labels.numel())), buffer)
            chunks.ahead = states, buffer
        chunks.live = kept.indices()
        return chunks

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield (positions in `live`, their hidden states, their logits in a buffer that the next chunk overwrites)."""
        n, size = self.live.numel(), self.head.chunk_tokens
        buffer = self.buffer(1) if n else None
        for start in range(0, n, size):
            rows = slice(start, min(start + size, n))
            assert buffer is not None
            yield rows, *self.logits(rows, buffer)

    def buffer(self, chunks: int) -> Tensor:
        """Return room for the logits of some chunks."""
        if chunks == 1 and self.ahead is not None:
            return self.ahead[1]
        rows = chunks * self.head.chunk_tokens
        return buffers.scratch((rows, self.weight.shape[0]), _wide(self.hidden.dtype), self.hidden.device)

    def logits(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return (hidden states, logits) of live rows, the logits written to `buffer` one GEMM of a chunk at a time."""
        size, count = self.head.chunk_tokens, rows.stop - rows.start
        if self.ahead is not None and rows.start == 0 and buffer is self.ahead[1]:
            states, self.ahead = self.ahead[0], None
            return states[:count], buffer[:count]
        states = self.hidden.index_select(0, self.live[rows])
        for start in range(0, count, size):
            part = self._padded(states[start : start + size])
            chunk_logits(part, self.weight, self.bias, buffer[start : start + size])
        if self.rounding or self.allowed is not None:
            scalars = (self.head.logit_scale, self.head.softcap)
            prepare(buffer[:count], self.allowed, self.live[rows], self.rounding, *scalars)
        return states, buffer[:count]

    def _padded(self, states: Tensor) -> Tensor:
        """Return the states of a chunk with rows of zeros up to C."""
        missing = self.head.chunk_tokens - states.shape[0]
        return states if missing == 0 else torch.cat((states, states.new_zeros(missing, states.shape[1])))

    def scalars(self) -> dict[str, Any]:
        """Return the keyword arguments of the row kernels."""
        return kernel_scalars(self.allowed, self.head.logit_scale, self.head.softcap, self.head.ignore_index)

    def forward_rows(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (logprobs, entropy, logsumexp, residual) of one chunk."""
        index = self.live[rows]
        if self.head.observe is not None:
            self.head.observe(index, logits)
        return forward_rows(self.head.backend, logits, self.labels[index], self.inverse[index], **self.scalars())

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return room for what `forward_rows` returns of all live rows."""
        n, dtype, device = self.live.numel(), _wide(self.hidden.dtype), self.hidden.device
        sizes = (n, n, n, n if dispatch.keeps_residual(self.head.backend) else 0)
        first, second, third, fourth = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
        return first, second, third, fourth

    def backward_rows(
        self,
        rows: slice,
        logits: Tensor,
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    ) -> Tensor:
        """Turn the logits of one chunk into their gradient, in place."""
        index = self.live[rows]
        labels, inverse, head = self.labels[index], self.inverse[index], self.head
        scalars = (head.logit_scale, head.softcap, head.ignore_index)
        return prepared_backward_rows(head.backend, logits, labels, inverse, outputs, grads, self.allowed, *scalars)

    def scattered(self, values: Tensor) -> Tensor:
        """Return values of the live rows (L, ...) at their places among all rows (N, ...), 0 elsewhere."""
        full = values.new_zeros((self.labels.numel(), *values.shape[1:]))
        return full.index_copy_(0, self.live, values)


class Gradients:
    """The gradients of hidden states, head and bias, gathered chunk by chunk; only those that are asked for.

    With `per_live_row` the gradient of the hidden states is (L, D), of the live rows, and not rounded to their dtype.
    With `unscaled`, which says that a loss scale is yet to multiply them, gradients of float16 stay in float32.
    """

    def __init__(
        self, chunks: Chunks, needs: tuple[bool, bool, bool], per_live_row: bool = False, *, unscaled: bool = False
    ) -> None:
        self.chunks = chunks
        self.wanted = any(needs)
        self.unrounded = unscaled and chunks.hidden.dtype == torch.float16
        wide = _wide(chunks.hidden.dtype)
        self.hidden = None
        if needs[0] and per_live_row:
            self.hidden = chunks.hidden.new_empty((chunks.live.numel(), chunks.hidden.shape[1]), dtype=wide)
        elif needs[0]:
            dtype = wide if self.unrounded else chunks.hidden.dtype
            self.hidden = torch.zeros_like(chunks.hidden, dtype=dtype, memory_format=torch.contiguous_format)
        self.weight = buffers.zeros(chunks.weight.shape, wide, chunks.weight.device) if needs[1] else None
        self.bias = torch.zeros(chunks.weight.shape[0], dtype=wide, device=chunks.weight.device) if needs[2] else None
        self.per_live_row = per_live_row
        self.sparse = None
        if chunks.head.tail_mass > 0.0:
            rule = sparse_rows.rule_for(chunks.head.tail_mass, chunks.weight.shape[0], chunks.weight.device)
            self.sparse = sparse_rows.Collector(
                rule, chunks.head.backend, chunks.head.chunk_tokens, chunks.weight, chunks.scalars()
            )

    def take(
        self,
        rows: slice,
        states: Tensor,  # (C, D)
        logits: Tensor,  # (C, V), overwritten
        outputs: tuple[Tensor, Tensor, Tensor, Tensor],
        grads: tuple[Tensor | None, Tensor | None, Tensor | None],
        contributes: Kept | None = None,
    ) -> None:
        """Add one chunk from its logits, what `forward_rows` returned of them, and the gradients of that."""
        if self.sparse is None:
            self.add(rows, states, self.chunks.backward_rows(rows, logits, outputs, grads), contributes)
            return
        index = self.chunks.live[rows]
        problem = sparse_rows.Problem(self.chunks.labels[index], self.chunks.inverse[index], outputs, grads)
        self.sparse.take(self, self._places(rows), states, logits, problem)

    def add(self, rows: slice, states: Tensor, dlogits: Tensor, contributes: Kept | None = None) -> None:
        """Add one chunk, dlogits (C, V), which is overwritten; all but the rows of `contributes` have no gradient."""
        index = self._places(rows)
        if contributes is not None:
            kept = contributes.indices()
            # Moving costs a read and a write of the rows that stay; below this share the GEMMs saved pay for it.
            if kept.numel() <= 0.8 * dlogits.shape[0]:
                index, states, dlogits = index[kept], states[kept], _moved_up(dlogits, kept)
        self.add_rows(index, states, dlogits)

    def _places(self, rows: slice) -> Tensor:
        """Return where live rows stand in the gradient of the hidden states."""
        if not self.per_live_row:
            return self.chunks.live[rows]
        return torch.arange(rows.start, rows.stop, device=self.chunks.live.device)

    def add_rows(self, places: Tensor, states: Tensor, dlogits: Tensor) -> None:
        """Add rows dlogits (C, V), which may be followed by rows of zeros, at their places in `hidden`."""
        if places.numel() == 0:
            return
        operand, factor = _for_products(dlogits, self.chunks.weight)
        if self.hidden is not None:
            product = _times_weight(operand, self.chunks.weight)[: places.numel()]
            self.hidden[places] = (product if factor is None else product.mul_(factor)).to(self.hidden.dtype)
        if self.weight is not None:
            _add_weight_gradient(self.weight, operand, states, factor)
        if self.bias is not None:
            self.bias += dlogits.sum(0)

    def flush(self) -> None:
        """Add what is held back for a later chunk."""
        if self.sparse is not None:
            self.sparse.flush(self)

    def cast(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dhidden, dweight, dbias) after the last `flush`, in their inputs' dtypes or, `unscaled`, float32."""
        if self.unrounded:
            return self.hidden, self.weight, self.bias
        weight = None if self.weight is None else self.weight.to(self.chunks.weight.dtype)
        bias = None if self.bias is None or self.chunks.bias is None else self.bias.to(self.chunks.bias.dtype)
        return self.hidden, weight, bias


def _moved_up(rows: Tensor, kept: Tensor) -> Tensor:
    """Return the rows at rising indices `kept`, moved to the front of `rows`: one gather would need a second tile.

    Row i comes from kept[i] >= i, so that no move overwrites what a later one reads.
    """
    count, step = kept.numel(), max(1, rows.shape[0] // MOVE_STEPS)
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows[part] = rows[kept[part]]
    return rows[:count]


def blocks(n: int, chunk_tokens: int, units: Sequence[int] | None) -> Iterator[slice]:
    """Yield consecutive ranges of the n live rows: chunks, or as many whole units as `BLOCK_CHUNKS` chunks hold.

    A unit (a sequence) is never split: one that is longer than that is a block of its own.
    """
    if units is None:
        for start in range(0, n, chunk_tokens):
            yield slice(start, min(start + chunk_tokens, n))
        return
    start = stop = 0
    for length in units:
        if stop > start and stop + length - start > BLOCK_CHUNKS * chunk_tokens:
            yield slice(start, stop)
            start = stop
        stop += length
    if stop > start:
        yield slice(start, stop)


Coefficients = Callable[[Tensor, Tensor, slice, Tensor], tuple[Tensor, Tensor | None]]


def fused_gradient(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (N,)
    inverse: Tensor,  # (N,)
    head: Head,
    needs: tuple[bool, bool, bool],
    coefficients: Coefficients,
    units: Sequence[int] | None = None,
    live: Tensor | None = None,  # (L,)
    allowed: Tensor | None = None,
    rounding: str = "",
    tally: sparse_rows.Tally | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], int]:
    """Return (logprobs (N,), entropy (N,), gradients, recomputed) of a loss, its gradient formed in the forward.

    Args:
        hidden, weight, bias, labels, inverse, head: the vocabulary operation.
        needs: which of the gradients of hidden, weight and bias to compute.
        coefficients: maps (logprobs, entropy, block, indices), (M,) of the rows of a block, to (dL/dlogprobs,
            dL/dentropy or None). `block` are the rows' positions among the live rows, `indices` among all.
        units: live rows of each sequence, where the loss couples the tokens of a sequence; None: every token alone.
        live: the rows whose label is not ignored, in the order in which to take them; None: as they stand.
        allowed, rounding: as `check_allowed` and `check_rounding` return them.
        tally: receives how many rows were sparse and dense, and the largest mass left out, where `tail_mass` > 0.

    Returns:
        The gradients have the dtypes of their inputs, but for float16: theirs are float32, for the loss scale, which
        the caller is given only in the backward, to come before the rounding. The last is the number of rows whose
        logits were formed a second time, because their sequence is longer than `BLOCK_CHUNKS` chunks.
    """
    restricted = {"live": live, "allowed": allowed, "rounding": rounding}
    chunks = Chunks.of(hidden, weight, bias, labels, inverse, head, **restricted, ahead=units is None)
    gradients = Gradients(chunks, needs, unscaled=True)
    if tally is not None and gradients.sparse is not None:
        gradients.sparse.tally = tally
    found = chunks.outputs()
    with dispatch.own_precision(hidden.device):
        recomputed = _form(chunks, gradients, found, coefficients, units)
        gradients.flush()
    # Only here, where the logits are gone: a head's gradient of half precision is made beside the one it was summed in.
    return chunks.scattered(found[0]), chunks.scattered(found[1]), gradients.cast(), recomputed


def _form(
    chunks: Chunks,
    gradients: Gradients,
    found: tuple[Tensor, Tensor, Tensor, Tensor],
    coefficients: Coefficients,
    units: Sequence[int] | None,
) -> int:
    """Fill `found` and `gradients` block by block; return how many rows had their logits formed twice."""
    logprobs, entropy = found[:2]
    n, size = chunks.live.numel(), chunks.head.chunk_tokens
    plan = list(blocks(n, size, units))
    held = min(BLOCK_CHUNKS, max((-(-(b.stop - b.start) // size) for b in plan), default=0)) if units is not None else 1
    buffer = chunks.buffer(held) if n else None
    recomputed = 0
    for block in plan:
        assert buffer is not None
        fits = block.stop - block.start <= held * size
        parts = [block] if fits else [slice(a, min(a + size, block.stop)) for a in range(block.start, block.stop, size)]
        for rows in parts:
            states, logits = chunks.logits(rows, buffer)
            _keep(found, rows, chunks.forward_rows(rows, logits))
        if not gradients.wanted:
            continue
        g, h = coefficients(logprobs[block], entropy[block], block, chunks.live[block])
        for rows in parts:
            if not fits:
                states, logits = chunks.logits(rows, buffer)
                recomputed += rows.stop - rows.start
            within = slice(rows.start - block.start, rows.stop - block.start)
            grads = (g[within], None if h is None else h[within], None)
            # Before the row kernel: an asynchronous device runs it while the host learns how many rows contribute.
            contributes = Kept(grads[0] != 0 if grads[1] is None else (grads[0] != 0) | (grads[1] != 0))
            outputs = (found[0][rows], found[1][rows], found[2][rows], found[3][rows])
            gradients.take(rows, states, logits, outputs, grads, contributes)
    return recomputed


def _keep(found: tuple[Tensor, ...], rows: slice, values: tuple[Tensor, ...]) -> None:
    """Write the outputs of some rows to their places among those of all live rows."""
    for out, value in zip(found, values, strict=True):
        if out.numel():
            out[rows] = value


@torch.library.custom_op("fastrl::linear_token_logprobs", mutates_args=(), tags=_WAITS)
def _linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    inverse: Tensor,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    chunk_tokens: int,
    backend: str,
    tail_mass: float,
    unit: bool,
    allowed: Tensor | None = None,
    rounding: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(logit_scale, softcap, ignore_index, chunk_tokens, backend, tail_mass)
    chunks = Chunks.of(hidden, weight, bias, labels, inverse, head, allowed=allowed, rounding=rounding)
    found = chunks.outputs()
    gradients = Gradients(chunks, (unit, False, False), per_live_row=True)
    with dispatch.own_precision(hidden.device):
        for rows, states, logits in chunks:
            results = chunks.forward_rows(rows, logits)
            _keep(found, rows, results)
            if unit:
                gradients.take(rows, states, logits, results, (torch.ones_like(results[0]), None, None))
        gradients.flush()
    units = found[0].new_empty((0, hidden.shape[1])) if gradients.hidden is None else gradients.hidden
    logprobs, entropy, logsumexp = (chunks.scattered(x) for x in found[:3])
    return logprobs, entropy, logsumexp, chunks.scattered(found[3]) if found[3].numel() else found[3].clone(), units


@_linear_token_logprobs.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    inverse: Tensor,
    logit_scale: float,
    softcap: float,
    ignore_index: int,
    chunk_tokens: int,
    backend: str,
    tail_mass: float,
    unit: bool,
    allowed: Tensor | None = None,
    rounding: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _wide(hidden.dtype)
    logprobs, entropy, logsumexp = (torch.empty(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    residual = logprobs.new_empty(labels.shape if dispatch.keeps_residual(backend) else 0)
    n_live = torch.library.get_ctx().new_dynamic_size() if unit else 0
    return logprobs, entropy, logsumexp, residual, logprobs.new_empty((n_live, hidden.shape[1]))


@torch.library.custom_op("fastrl::linear_token_logprobs_backward", mutates_args=(), tags=_WAITS)
def _linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    inverse: Tensor,
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
    head = Head(logit_scale, softcap, ignore_index, chunk_tokens, backend, tail_mass)
    upstream = [g for g in (grad_logprobs, grad_entropy, grad_logsumexp) if g is not None]
    nonzero = torch.stack([g != 0 for g in upstream]).any(0)
    restricted = {"allowed": allowed, "rounding": rounding}
    chunks = Chunks.of(hidden, weight, bias, labels, inverse, head, **restricted, keep=nonzero)
    gradients = Gradients(chunks, (needs[0], needs[1], needs[2]))
    outputs = (logprobs, entropy, logsumexp, residual if residual.numel() else logprobs)
    with dispatch.own_precision(hidden.device):
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
def _(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    inverse: Tensor,
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
    return (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight) if needs[1] else hidden.new_empty(0),
        torch.empty_like(bias) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, inverse, *scalars, ctx.unit, allowed, ctx.rounding = inputs
    ctx.scalars = scalars
    ctx.tally = sparse_rows.counting()
    ctx.save_for_backward(hidden, weight, labels, bias, inverse, allowed, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    once_differentiable()
    grad_logprobs, grad_entropy, grad_logsumexp = grads[:3]
    none = (None,) * 9
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
    if not any(needs) or all(g is None for g in grads):
        return (None, None, None, None, None, *none)
    hidden, weight, labels, bias, inverse, allowed, *outputs, units = ctx.saved_tensors
    if ctx.unit and grad_entropy is None and grad_logsumexp is None and grad_logprobs is not None:
        live = kept_first(labels != ctx.scalars[2])[: units.shape[0]]
        scaled = grad_logprobs[live].to(units.dtype).unsqueeze(-1) * units
        return (torch.zeros_like(hidden).index_copy_(0, live, scaled.to(hidden.dtype)), None, None, None, None, *none)
    with sparse_rows.counted(ctx.tally):
        dhidden, dweight, dbias = _linear_token_logprobs_backward(
            hidden,
            weight,
            labels,
            bias,
            inverse,
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
