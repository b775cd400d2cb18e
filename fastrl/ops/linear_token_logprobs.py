"""Per-token log-prob, entropy and logsumexp from hidden states and the LM head, without the N x V logits.

Rows go through the head in chunks of a fixed number, the last one padded, so that every GEMM has one shape and a row's
log-prob does not depend on the batch around it. The logits of a chunk are accumulated and kept in float32 (float64 for
float64 inputs) and turned into their own gradient in place; dW is accumulated in float32 over the chunks and cast once.
Rows whose label is ignored are dropped before the first GEMM.

Paths, in GEMM units of 2 N V D flop:

    forward only                                             1
    training, any function of the outputs                    1 forward + 3 backward (the logits are formed again)
    training, frozen head, function of the log-probs         2: the unit gradients (W_y - p W)/T are kept, (N, D)
    training, loss separable over tokens (`fused_gradient`)  3, or 2 with a frozen head
    training, loss that couples the tokens of a sequence     the same where whole sequences fit `BLOCK_CHUNKS` chunks
    any of the training paths, `tail_mass` > 0               dX and dW (not the forward) of the dense rows only

Legend: N tokens, D hidden, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.ops import dispatch, sparse_rows
from fastrl.ops.token_logprobs import TokenLogprobs, backward_rows, forward_rows, head_scalars, once_differentiable

CPU_CHUNK_TOKENS = 256
GPU_CHUNK_TOKENS = 2048
# Chunks whose logits are held at once where a loss couples the tokens of a sequence.
BLOCK_CHUNKS = 4
# Rows of a GEMM over the vocabulary come in multiples of this on a CPU.
CPU_GEMM_ROWS = 8
# A half-precision head on a CPU is widened in blocks of this many vocabulary rows, to keep the copy small.
CPU_WIDEN_ROWS = 8192


@dataclass(frozen=True)
class Head:
    """How logits become log-probs: everything of the vocabulary operation that is not a tensor."""

    logit_scale: float
    softcap: float
    ignore_index: int
    chunk_tokens: int
    backend: str
    tail_mass: float = 0.0


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
) -> TokenLogprobs:
    """Return log-prob of the label, entropy and logsumexp of `hidden @ weight.T + bias` without forming all logits.

        z = softcap tanh(logit_scale (hidden weight^T + bias) / softcap) / temperature
        logprobs = z_y - logsumexp(z);  entropy = -sum_v p_v log p_v, in nats

    Args:
        hidden: (..., D) hidden states, float32, bfloat16, float16 or float64.
        weight: (V, D) LM head. A dtype other than that of `hidden` is promoted as PyTorch promotes.
        labels: (...) int64 or int32, aligned with the hidden states: nothing is shifted here.
        bias: (V,) or None; -inf entries ban a token.
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
            most tail_mass |g| |logit_scale| / T max_v |W_v|. With `tp_group`, 0.0 only.
        tp_group: process group over which the rows of the head are spread: `weight` (V_r, D) and `bias` are then this
            rank's shard, of any size, or a DTensor sharded on dimension 0; `labels` are global ids, and every rank of
            the group makes the call, and its backward, with the same hidden states. See `fastrl.ops.vocab_parallel`.
        backend: of the row kernels: "auto", "torch", "cpu" or "triton". The GEMMs are PyTorch's.

    Returns:
        `TokenLogprobs` of float32 tensors (float64 for float64 inputs) of the shape of `labels`, all differentiable
        once with respect to `hidden`, `weight` and `bias`. Extra memory: one chunk of float32 logits, C V 4 bytes
        (the `torch` rows take ten tiles of 32 rows beside it); where `tail_mass` > 0, another chunk for dense rows and
        the lists, C K 8 bytes; the gradients, of which a trainable head's is V D 4 bytes until it is cast; for a frozen
        head the unit gradients, N D 4 bytes; and the live rows of one chunk.

    Raises:
        ValueError, TypeError, RuntimeError: as `token_logprobs`, and for heads that hold no values or are sharded.
    """
    if tp_group is not None:
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
    training = torch.is_grad_enabled()
    trains_head = training and (weight.requires_grad or (bias is not None and bias.requires_grad))
    unit = training and hidden.requires_grad and not trains_head
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
    )
    return TokenLogprobs(*(x.view(labels.shape) for x in outputs[:3]))


def check_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the tensors of the vocabulary operation in one dtype, or raise."""
    checks.float_tensor("hidden", hidden)
    checks.float_tensor("weight", weight)
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
    if bias is not None:
        checks.float_tensor("bias", bias)
        checks.same_shape("bias", bias, weight.shape[:1])
        checks.same_device("bias", bias, hidden.device)
    labels = checks.labels("labels", labels, hidden.shape[:-1], hidden.device, weight.shape[0], ignore_index)
    if torch.is_inference(weight) and torch.is_grad_enabled() and hidden.requires_grad:
        raise RuntimeError("weight is an inference tensor and cannot be saved for backward; pass weight.clone()")
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(dtype), weight.to(dtype), labels, None if bias is None else bias.to(dtype)


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
    if hidden.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    elif hidden.device.type == "cuda":
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start in range(0, weight.shape[0], CPU_WIDEN_ROWS):
            block = weight[start : start + CPU_WIDEN_ROWS].to(out.dtype)
            out[:, start : start + CPU_WIDEN_ROWS] = wide @ block.t()
    if bias is not None:
        out += bias.to(out.dtype)
    return out


def _times_weight(gradient: Tensor, weight: Tensor) -> Tensor:
    """Return gradient (C, V) @ weight (V, D) in the dtype of the gradient."""
    count = gradient.shape[0]
    whole = count - count % CPU_GEMM_ROWS
    if gradient.device.type == "cpu" and whole < count:
        # For other row counts the CPU's float32 GEMM may sum the vocabulary in one long chain: at 3 rows and V = 151936
        # its error was 4e-4, against 1e-6 with rows of zeros added.
        rest = torch.cat((gradient[whole:], gradient.new_zeros(CPU_GEMM_ROWS - count + whole, gradient.shape[1])))
        ragged = _times_weight(rest, weight)[: count - whole]
        return torch.cat((_times_weight(gradient[:whole], weight), ragged)) if whole else ragged
    if weight.dtype == gradient.dtype:
        return gradient @ weight
    if weight.device.type == "cuda":
        return torch.mm(gradient.to(weight.dtype), weight, out_dtype=gradient.dtype)
    total = torch.zeros((gradient.shape[0], weight.shape[1]), dtype=gradient.dtype, device=gradient.device)
    for start in range(0, weight.shape[0], CPU_WIDEN_ROWS):
        block = slice(start, start + CPU_WIDEN_ROWS)
        total.addmm_(gradient[:, block], weight[block].to(gradient.dtype))
    return total


def _add_weight_gradient(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """Add gradient^T (V, C) @ hidden (C, D) to `total` (V, D), which is at least float32."""
    if hidden.dtype == total.dtype or hidden.device.type != "cuda":
        total.addmm_(gradient.t(), hidden.to(total.dtype))
    else:
        total += torch.mm(gradient.to(hidden.dtype).t(), hidden, out_dtype=total.dtype)


@dataclass
class Chunks:
    """The live rows of a batch, cut into chunks of a fixed number of rows; the last one is padded with zero rows."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    labels: Tensor  # (N,)
    inverse: Tensor  # (N,)
    head: Head
    live: Tensor  # (L,) indices of the rows that are not ignored

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, inverse: Tensor, head: Head
    ) -> Chunks:
        """Return the chunks of the rows whose label is not ignored."""
        live = (labels != head.ignore_index).nonzero().squeeze(-1)
        return cls(hidden, weight, bias, labels, inverse, head, live)

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
        rows = chunks * self.head.chunk_tokens
        return torch.empty((rows, self.weight.shape[0]), dtype=_wide(self.hidden.dtype), device=self.hidden.device)

    def logits(self, rows: slice, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Return (hidden states, logits) of live rows, the logits written to `buffer` one GEMM of a chunk at a time."""
        states = self.hidden.index_select(0, self.live[rows])
        size, count = self.head.chunk_tokens, rows.stop - rows.start
        for start in range(0, count, size):
            part = states[start : start + size]
            if part.shape[0] < size:
                part = torch.cat((part, part.new_zeros(size - part.shape[0], part.shape[1])))
            chunk_logits(part, self.weight, self.bias, buffer[start : start + size])
        return states, buffer[:count]

    def scalars(self) -> dict[str, Any]:
        """Return the keyword arguments of the row kernels."""
        return {
            "logit_scale": self.head.logit_scale,
            "softcap": self.head.softcap,
            "ignore_index": self.head.ignore_index,
        }

    def forward_rows(self, rows: slice, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (logprobs, entropy, logsumexp, residual) of one chunk."""
        index = self.live[rows]
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
        labels, inverse = self.labels[index], self.inverse[index]
        return backward_rows(self.head.backend, logits, labels, inverse, outputs, grads, **self.scalars(), out=logits)

    def scattered(self, values: Tensor) -> Tensor:
        """Return values of the live rows (L, ...) at their places among all rows (N, ...), 0 elsewhere."""
        full = values.new_zeros((self.labels.numel(), *values.shape[1:]))
        return full.index_copy_(0, self.live, values)


class Gradients:
    """The gradients of hidden states, head and bias, gathered chunk by chunk; only those that are asked for.

    With `per_live_row` the gradient of the hidden states is (L, D), of the live rows, and not rounded to their dtype.
    """

    def __init__(self, chunks: Chunks, needs: tuple[bool, bool, bool], per_live_row: bool = False) -> None:
        self.chunks = chunks
        wide = _wide(chunks.hidden.dtype)
        self.hidden = None
        if needs[0] and per_live_row:
            self.hidden = chunks.hidden.new_empty((chunks.live.numel(), chunks.hidden.shape[1]), dtype=wide)
        elif needs[0]:
            self.hidden = torch.zeros_like(chunks.hidden, memory_format=torch.contiguous_format)
        self.weight = torch.zeros(chunks.weight.shape, dtype=wide, device=chunks.weight.device) if needs[1] else None
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
        contributes: Tensor | None = None,  # (C,)
    ) -> None:
        """Add one chunk from its logits, what `forward_rows` returned of them, and the gradients of that."""
        if self.sparse is None:
            self.add(rows, states, self.chunks.backward_rows(rows, logits, outputs, grads), contributes)
            return
        index = self.chunks.live[rows]
        problem = sparse_rows.Problem(self.chunks.labels[index], self.chunks.inverse[index], outputs, grads)
        self.sparse.take(self, self._places(rows), states, logits, problem)

    def add(self, rows: slice, states: Tensor, dlogits: Tensor, contributes: Tensor | None = None) -> None:
        """Add one chunk, dlogits (C, V); rows that `contributes` (C,) marks False have a zero gradient."""
        index = self._places(rows)
        if contributes is not None:
            kept = contributes.nonzero().squeeze(-1)
            # Gathering costs a read and a write of the rows that stay; below this share the GEMMs saved pay for it.
            if kept.numel() <= 0.8 * contributes.numel():
                index, states, dlogits = index[kept], states[kept], dlogits[kept]
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
        if self.hidden is not None:
            product = _times_weight(dlogits, self.chunks.weight)
            self.hidden[places] = product[: places.numel()].to(self.hidden.dtype)
        if self.weight is not None:
            _add_weight_gradient(self.weight, dlogits, states)
        if self.bias is not None:
            self.bias += dlogits.sum(0)

    def flush(self) -> None:
        """Add what is held back for a later chunk."""
        if self.sparse is not None:
            self.sparse.flush(self)

    def cast(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return (dhidden, dweight, dbias) in the dtypes of their inputs."""
        self.flush()
        weight = None if self.weight is None else self.weight.to(self.chunks.weight.dtype)
        bias = None if self.bias is None or self.chunks.bias is None else self.bias.to(self.chunks.bias.dtype)
        return self.hidden, weight, bias


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
    tally: sparse_rows.Tally | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor | None, Tensor | None, Tensor | None], int]:
    """Return (logprobs (N,), entropy (N,), gradients, recomputed) of a loss, its gradient formed in the forward.

    Args:
        hidden, weight, bias, labels, inverse, head: the vocabulary operation.
        needs: which of the gradients of hidden, weight and bias to compute.
        coefficients: maps (logprobs, entropy, block, indices), (M,) of the rows of a block, to (dL/dlogprobs,
            dL/dentropy or None). `block` are the rows' positions among the live rows, `indices` among all.
        units: live rows of each sequence, where the loss couples the tokens of a sequence; None: every token alone.
        tally: receives how many rows were sparse and dense, and the largest mass left out, where `tail_mass` > 0.

    Returns:
        The last is the number of rows whose logits were formed a second time, because their sequence is longer than
        `BLOCK_CHUNKS` chunks.
    """
    chunks = Chunks.of(hidden, weight, bias, labels, inverse, head)
    gradients = Gradients(chunks, needs)
    if tally is not None and gradients.sparse is not None:
        gradients.sparse.tally = tally
    n, size = chunks.live.numel(), head.chunk_tokens
    found = chunks.outputs()
    logprobs, entropy = found[:2]
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
        g, h = coefficients(logprobs[block], entropy[block], block, chunks.live[block])
        if not any(needs):
            continue
        for rows in parts:
            if not fits:
                states, logits = chunks.logits(rows, buffer)
                recomputed += rows.stop - rows.start
            within = slice(rows.start - block.start, rows.stop - block.start)
            grads = (g[within], None if h is None else h[within], None)
            contributes = None
            if g.device.type == "cpu":
                contributes = grads[0] != 0 if grads[1] is None else (grads[0] != 0) | (grads[1] != 0)
            outputs = (found[0][rows], found[1][rows], found[2][rows], found[3][rows])
            gradients.take(rows, states, logits, outputs, grads, contributes)
    return chunks.scattered(logprobs), chunks.scattered(entropy), gradients.cast(), recomputed


def _keep(found: tuple[Tensor, ...], rows: slice, values: tuple[Tensor, ...]) -> None:
    """Write the outputs of some rows to their places among those of all live rows."""
    for out, value in zip(found, values, strict=True):
        if out.numel():
            out[rows] = value


@torch.library.custom_op("fastrl::linear_token_logprobs", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    head = Head(logit_scale, softcap, ignore_index, chunk_tokens, backend, tail_mass)
    chunks = Chunks.of(hidden, weight, bias, labels, inverse, head)
    found = chunks.outputs()
    gradients = Gradients(chunks, (unit, False, False), per_live_row=True)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = _wide(hidden.dtype)
    logprobs, entropy, logsumexp = (torch.empty(labels.shape, dtype=dtype, device=hidden.device) for _ in range(3))
    residual = logprobs.new_empty(labels.shape if dispatch.keeps_residual(backend) else 0)
    n_live = torch.library.get_ctx().new_dynamic_size() if unit else 0
    return logprobs, entropy, logsumexp, residual, logprobs.new_empty((n_live, hidden.shape[1]))


@torch.library.custom_op("fastrl::linear_token_logprobs_backward", mutates_args=())
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
) -> tuple[Tensor, Tensor, Tensor]:
    head = Head(logit_scale, softcap, ignore_index, chunk_tokens, backend, tail_mass)
    chunks = Chunks.of(hidden, weight, bias, labels, inverse, head)
    gradients = Gradients(chunks, (needs[0], needs[1], needs[2]))
    kept = residual if residual.numel() else logprobs
    for rows, states, logits in chunks:
        index = chunks.live[rows]
        outputs = (logprobs[index], entropy[index], logsumexp[index], kept[index])
        first, second, third = (None if g is None else g[index] for g in (grad_logprobs, grad_entropy, grad_logsumexp))
        gradients.take(rows, states, logits, outputs, (first, second, third))
    empty = hidden.new_empty(0)
    dhidden, dweight, dbias = gradients.cast()
    return (
        empty if dhidden is None else dhidden,
        empty.clone() if dweight is None else dweight,
        empty.clone() if dbias is None else dbias,
    )


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
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden) if needs[0] else hidden.new_empty(0),
        torch.empty_like(weight) if needs[1] else hidden.new_empty(0),
        torch.empty_like(bias) if needs[2] and bias is not None else hidden.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, inverse, *scalars, ctx.unit = inputs
    ctx.scalars = scalars
    ctx.save_for_backward(hidden, weight, labels, bias, inverse, *output)
    ctx.mark_non_differentiable(*output[3:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    once_differentiable()
    grad_logprobs, grad_entropy, grad_logsumexp = grads[:3]
    none = (None,) * 7
    needs = [bool(ctx.needs_input_grad[i]) for i in (0, 1, 3)]
    if not any(needs) or all(g is None for g in grads):
        return (None, None, None, None, None, *none)
    hidden, weight, labels, bias, inverse, *outputs, units = ctx.saved_tensors
    if ctx.unit and grad_entropy is None and grad_logsumexp is None and grad_logprobs is not None:
        ignore_index = ctx.scalars[2]
        live = (labels != ignore_index).nonzero().squeeze(-1)
        scaled = grad_logprobs[live].to(units.dtype).unsqueeze(-1) * units
        return (torch.zeros_like(hidden).index_copy_(0, live, scaled.to(hidden.dtype)), None, None, None, None, *none)
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
