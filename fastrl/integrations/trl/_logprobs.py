"""TRL's chunked log-prob function, computed by fastrl: log-probs, entropy, and the statistics of logits that TRL logs.

Legend: N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastrl.checks import MASKED_LABEL, wide
from fastrl.integrations.common.proof import FirstUse, prove, sampled_tokens
from fastrl.integrations.trl import _seams
from fastrl.integrations.trl._prediction import HeadCall, Prediction, attach, pending
from fastrl.ops.chunks import Chunks, chunk_logits
from fastrl.ops.gradients import Gradients
from fastrl.ops.head import LinearRows
from fastrl.ops.row_statistics import row_statistics

ALL_OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
STATISTICS = ALL_OUTPUTS[1:]
UNDO = "fastrl.integrations.trl.disable(), or leaving patched(), gives TRL's own function back"

Outputs = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]

proofs = FirstUse()


@dataclass(frozen=True)
class Request:
    """The arguments of a call of TRL's function that are no tensors."""

    temperature: float
    softcap: float | None
    logit_scale: float
    outputs: tuple[str, ...]
    compute_dtype: torch.dtype
    rounded: bool = False
    """Whether to round logits to `compute_dtype`, as TRL does."""
    ignored: int = MASKED_LABEL

    def rows(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignore_index: int = MASKED_LABEL
    ) -> LinearRows:
        """Return the vocabulary operation, validated."""
        return LinearRows.checked(
            hidden, weight, targets, bias=bias, temperature=self.temperature, logit_scale=self.logit_scale,
            softcap=self.softcap, ignore_index=ignore_index,
        )  # fmt: skip

    def cast(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the tensors in the dtype of TRL's matrix product."""
        dtype = self.compute_dtype
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    def formed(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Return the logits of a chunk, rounded in place if asked for."""
        if self.rounded:
            # TRL adds the bias to rounded logits and rounds again.
            logits.copy_(logits.to(self.compute_dtype))
            if bias is not None:
                logits.add_(bias.to(self.compute_dtype)).copy_(logits.to(self.compute_dtype))
        return logits

    def columns(self, n: int, wanted: Sequence[str], like: Tensor) -> dict[str, Tensor]:
        """Return empty tensors for the statistics of n rows."""
        return {name: like.new_empty(n, dtype=torch.bool if name == "is_top1" else None) for name in wanted}

    def observe(self, columns: dict[str, Tensor], rows: Tensor | slice, logits: Tensor, labels: Tensor) -> None:
        """Write the statistics of some rows into the columns."""
        found = row_statistics(
            logits, labels, temperature=self.temperature, logit_scale=self.logit_scale, softcap=self.softcap,
            ignore_index=MASKED_LABEL,
        )  # fmt: skip
        values = {
            "log_sum_sq_probs": found.log_sum_squared_probs,
            "mean_logits": found.mean_logits,
            "is_top1": found.argmax == labels,  # of equal logits the lowest id counts
        }
        for name, out in columns.items():
            out[rows] = values[name]

    def chunks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Chunks:
        """Return the rows, cut into chunks."""
        rows = self.rows(*self.cast(hidden, weight, bias)[:2], bias, targets)
        # `formed` adds the bias between the two roundings.
        return Chunks.of(replace(rows, bias=None) if self.rounded else rows)


def request_of(
    hidden: Tensor,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: tuple[str, ...],
    round_logits: bool,
) -> Request:
    """Return the request of a call. The projection runs in autocast's dtype, or in the dtype of the hidden states."""
    unknown = sorted(set(outputs) - {"log_probs", *ALL_OUTPUTS})
    if unknown:
        raise ValueError(f"outputs must be among log_probs, {', '.join(ALL_OUTPUTS)}; got {', '.join(unknown)}")
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rounded = round_logits and dtype in (torch.bfloat16, torch.float16)
    return Request(temperature, softcap, logit_scale, tuple(outputs), dtype, rounded)


def forward_pass(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    request: Request,
    *,
    keep_token_grads: bool = False,
) -> tuple[Outputs, tuple[Tensor, ...], Tensor | None]:
    """Return (TRL's outputs, the row results for the backward, d logprob_i / d hidden_i (N, D) or None)."""
    chunks = request.chunks(hidden, weight, bias, targets)
    found = chunks.outputs()
    wanted = [name for name in STATISTICS if name in request.outputs]
    columns = request.columns(targets.numel(), wanted, found[0])
    token_grads = Gradients(chunks, (keep_token_grads, False, False))
    for rows, states, logits in chunks:
        results = chunks.forward_rows(rows, request.formed(logits, bias))
        for out, value in zip(found, results, strict=True):
            if out.numel():
                out[rows] = value
        if wanted:
            request.observe(columns, rows, logits, targets[rows])
        if keep_token_grads:
            ones = torch.ones_like(results[0])
            token_grads.add(rows, states, chunks.backward_rows(rows, logits, results, (ones, None, None)))
    outputs = (
        found[0],
        found[1] if "entropy" in request.outputs else None,
        columns.get("log_sum_sq_probs"),
        columns.get("mean_logits"),
        columns.get("is_top1"),
    )
    return outputs, found, token_grads.hidden


class _Function(torch.autograd.Function):
    """TRL's outputs with a gradient: one GEMM in the forward and three in the backward, or two in all (frozen head).

    With a frozen head and `keep_token_grads` the forward also forms the gradient of every log-prob, and the backward
    multiplies it by the incoming one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        request: Request,
        keep_token_grads: bool,
    ) -> Outputs:
        ctx.set_materialize_grads(False)
        with torch.autocast(hidden.device.type, enabled=False):
            outputs, found, token_grads = forward_pass(
                hidden, weight, bias, targets, request, keep_token_grads=keep_token_grads
            )
        ctx.request = request
        ctx.save_for_backward(hidden, weight, bias, targets, token_grads, *found)
        ctx.mark_non_differentiable(*(x for x in outputs[2:] if x is not None))
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused log-probs are differentiable once: create_graph=True is not supported")
        hidden, weight, bias, targets, token_grads, *found = ctx.saved_tensors
        g, h = grads[:2]
        none = (None, None, None)
        if g is None and h is None:
            return (None, None, None, *none)
        if token_grads is not None and h is None and g is not None:
            return ((token_grads * g.unsqueeze(-1).to(token_grads.dtype)).to(hidden.dtype), None, None, *none)
        needs = ctx.needs_input_grad[:3]
        # ZeRO-3 frees the head between forward and backward.
        with _seams.gathered(weight, bias):
            chunks = ctx.request.chunks(hidden, weight, bias, targets)
            gradients = Gradients(chunks, needs)
            for rows, states, logits in chunks:
                ctx.request.formed(logits, bias)
                outputs = tuple(x[rows] if x.numel() else x for x in found)
                row_grads = (None if g is None else g[rows], None if h is None else h[rows], None)
                gradients.add(rows, states, chunks.backward_rows(rows, logits, outputs, row_grads))
        pairs = zip((gradients.hidden, gradients.weight, gradients.bias), (hidden, weight, bias), strict=True)
        return (*(None if x is None else x.to(y.dtype) for x, y in pairs), *none)


class FusedLogProbFunction:
    """Replaces TRL's chunked log-prob function. TRL calls only its `apply`."""

    original: Any = None
    """TRL's own class, for the proof."""
    round_logits: bool = False
    """Whether to round half-precision logits as TRL does."""

    @classmethod
    def apply(
        cls,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ALL_OUTPUTS,
    ) -> Outputs:
        """Return (log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1), (N,) each; None if not in `outputs`.

        The first two are differentiable once, with respect to hidden, weight and bias. They are float32, or float64 for
        float64 inputs. `chunk_size`, TRL's tile of the vocabulary, has no effect: fastrl cuts the tokens into chunks.
        """
        del chunk_size
        request = request_of(hidden, temperature, final_logit_softcapping, logit_scale, outputs, cls.round_logits)
        key = (request, hidden.device.type, hidden.dtype, weight.dtype, tuple(weight.shape), bias is None)
        proofs.once(key, lambda: cls._proves(hidden, weight, bias, targets, request))
        training = torch.is_grad_enabled()
        trained = training and (weight.requires_grad or (bias is not None and bias.requires_grad))
        prediction = pending()
        if prediction is not None and request.rounded:
            prediction.path = "log-probs first, 4 GEMM units (2 with a frozen head): round_logits=True"
        elif prediction is not None and (trained or prediction.needs_head_pass):
            return _predicted(prediction, hidden, weight, bias, targets, request)
        elif prediction is not None:
            prediction.path = "frozen head, gradients of the log-probs kept: 2 GEMM units"
        return _Function.apply(
            hidden, weight, bias, targets, request, training and not trained and hidden.requires_grad
        )

    @classmethod
    @torch.no_grad()
    def _proves(cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Request) -> bool:
        """Compare a few tokens with TRL's own function."""
        picked = sampled_tokens(targets.numel(), targets.device)
        if picked.numel() == 0:
            return False
        states, labels = hidden[picked], targets[picked]
        theirs = cls.original.apply(
            states, weight, bias, labels, request.temperature, 32768, request.softcap, request.logit_scale,
            request.outputs,
        )  # fmt: skip
        with torch.autocast(hidden.device.type, enabled=False):
            ours, _, _ = forward_pass(states, weight, bias, labels, request)
            largest = _largest_logits(states, weight, bias, request)
        names = ("logprobs", "entropy", "log_sum_squared_probs", "mean_logits")
        return prove(
            "fastrl's log-prob function for TRL",
            dict(zip(names, ours, strict=False)),
            dict(zip(names, theirs, strict=False)),
            largest_logit=largest,
            # TRL's function computes in float32 even for float64 inputs, on a projection in their dtype.
            dtype=torch.float32 if request.compute_dtype == torch.float64 else request.compute_dtype,
            terms=hidden.shape[-1],
            vocabulary=weight.shape[0],
            undo=UNDO,
        )


def _predicted(
    prediction: Prediction, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Request
) -> Outputs:
    """Return TRL's outputs, and form the gradient of the trainer's loss on the way."""
    wanted = [name for name in STATISTICS if name in request.outputs]
    call = HeadCall(*request.cast(hidden, weight, bias), targets, request, wanted)
    with torch.autocast(hidden.device.type, enabled=False):
        fused = prediction.fused(call)
        logprobs, entropy = attach(prediction, fused)
    columns = [fused.columns.get(name) for name in STATISTICS]
    return logprobs, entropy if "entropy" in request.outputs else None, columns[0], columns[1], columns[2]


def _largest_logits(states: Tensor, weight: Tensor, bias: Tensor | None, request: Request) -> Tensor:
    """Return the largest absolute finite logit of each row (K,), after scale, softcap and temperature."""
    hidden, weight, bias = request.cast(states, weight, bias)
    dtype = wide(hidden.dtype)
    out = torch.empty((hidden.shape[0], weight.shape[0]), dtype=dtype, device=hidden.device)
    logits = chunk_logits(hidden, weight, bias, out) * request.logit_scale
    if request.softcap:
        logits = request.softcap * torch.tanh(logits / request.softcap)
    return torch.where(logits.isfinite(), logits.abs(), 0.0).amax(-1) / request.temperature
