"""The gradient of the host's loss, predicted while the head runs and checked when the host's own arrives.

A trainer of TRL takes log-probs from the model's forward and computes its loss from them. Where the loss is known
beforehand, its gradient with respect to each log-prob is known as soon as the log-probs of a chunk are, and the
gradients of hidden states and head can be formed from the logits that are still there: the logits are not formed a
second time in the backward. The trainer's own code stays what computes the loss, the metrics and the logs; when its
gradient comes back it must be the predicted one times a number (loss scale, accumulation), or the step raises.

Legend: N live tokens in the order of the batch, S sequences, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fastrl.checks import MASKED_LABEL, wide
from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops.fused import Coefficients, fused_gradient

# Roundings, of the largest coefficient of the batch, that two ways to compute the coefficients may differ by. The terms
# that one sums can be far larger than it is: those of discopop, divided by its temperature, took 190.
COEFFICIENT_ROUNDINGS = 1024
# Where a sigmoid is saturated everywhere, one form of its derivative is 1e-32 and another 0: that is the same loss.
VANISHED = 1e-20
# Roundings of a log-prob: a coefficient may be any of those between the log-probs that much lower and higher, which is
# what decides a token whose ratio lies on the edge of the clip.
LOGPROB_ROUNDINGS = 8


@dataclass(frozen=True)
class Fused:
    """What a fused pass gives: a scalar whose backward releases the gradients, and numbers without a graph."""

    handle: Tensor  # ()
    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    columns: dict[str, Tensor] = field(default_factory=dict)
    """Statistics of the head that were asked for, (N,) each."""


class Prediction(Protocol):
    """The loss of the batch that goes through the head next."""

    path: str
    """What ran, for the trainer to show; empty before the head has run."""

    @property
    def needs_head_pass(self) -> bool:
        """Whether a frozen head gains too (its log-probs' gradients are kept, its entropies' are not)."""
        ...

    def fused(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Any, wanted: Sequence[str]
    ) -> Fused:
        """Run the head, the gradient formed on the way."""
        ...

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (dL/dlogprobs, dL/dentropy or None) of all live tokens, up to one factor."""
        ...


_active: ContextVar[Prediction | None] = ContextVar("fastrl_trl_prediction", default=None)


@contextmanager
def predicting(prediction: Prediction | None) -> Iterator[None]:
    """Let the next pass with a gradient through a fused head use `prediction`."""
    token = _active.set(prediction)
    try:
        yield
    finally:
        _active.reset(token)


def pending() -> Prediction | None:
    """Return the prediction for the pass that is being made, if there is one and it has not been used."""
    prediction = _active.get()
    return None if prediction is None or prediction.path or not torch.is_grad_enabled() else prediction


def attach(prediction: Prediction, fused: Fused) -> tuple[Tensor, Tensor]:
    """Return (logprobs, entropy), (N,) each, whose backward checks the host's gradient and releases the fused one."""
    g, h = prediction.coefficients(fused.logprobs, fused.entropy)
    logprobs, entropy = _Attach.apply(fused.handle, fused.logprobs, fused.entropy, g, h, prediction)
    return logprobs, entropy


class _Attach(torch.autograd.Function):
    """(handle) -> (logprobs, entropy); the backward's gradient of the handle is the factor the host put before."""

    @staticmethod
    def forward(
        ctx: Any,
        handle: Tensor,  # ()
        logprobs: Tensor,  # (N,)
        entropy: Tensor,  # (N,)
        g: Tensor,  # (N,)
        h: Tensor | None,  # (N,)
        prediction: Prediction,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, h, logprobs, entropy)
        ctx.prediction = prediction
        ctx.handle_dtype = handle.dtype
        return logprobs.clone(), entropy.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the fused loss is differentiable once: create_graph=True is not supported")
        g, h, logprobs, entropy = ctx.saved_tensors
        host_g, host_h = (torch.zeros_like(g) if x is None else x.to(g.dtype) for x in grads)
        factor = common_factor(host_g, host_h, g, h)
        if bool(factor.isfinite()):
            _check(ctx.prediction, factor, (host_g, host_h), (g, h), (logprobs, entropy))
        return (factor.to(ctx.handle_dtype), *(None,) * 5)


def common_factor(
    host_g: Tensor,  # (N,)
    host_h: Tensor,  # (N,)
    g: Tensor,  # (N,)
    h: Tensor | None,  # (N,)
) -> Tensor:
    """Return the factor () that the host put before the predicted gradient: the median over the tokens that tell it."""
    for found, expected in ((host_g, g), (host_h, h)):
        if expected is None or expected.numel() == 0:
            continue
        telling = (expected.abs() > 1e-3 * expected.abs().max()) & (found != 0)
        if bool(telling.any()):
            return (found[telling] / expected[telling]).median()
    return g.new_ones(())


def _check(
    prediction: Prediction,
    factor: Tensor,
    host: tuple[Tensor, Tensor],
    expected: tuple[Tensor, Tensor | None],
    outputs: tuple[Tensor, Tensor],
) -> None:
    """Raise unless the host's gradient is the expected one, to rounding, times the factor."""
    (g, h), (logprobs, entropy) = expected, outputs
    if _outside(host[0], g * factor, g * factor, _slack(g, factor)).any():
        step = LOGPROB_ROUNDINGS * torch.finfo(logprobs.dtype).eps * logprobs.abs().clamp(min=1.0)
        # All log-probs too high or too low move a ratio; those of a pair move its margin against each other.
        moves = (step, -step, step * g.sign(), -step * g.sign())
        around = [prediction.coefficients(logprobs + move, entropy)[0] for move in moves]
        edges = torch.stack([g, *around]) * factor
        _compare("log-prob", host[0], edges.amin(0), edges.amax(0), _slack(g, factor))
    bonus = torch.zeros_like(g) if h is None else h * factor
    _compare("entropy", host[1], bonus, bonus, _slack(bonus, torch.ones_like(factor)))


def _slack(values: Tensor, factor: Tensor) -> Tensor:
    largest = values.abs().max() if values.numel() else values.new_zeros(())
    rounding = COEFFICIENT_ROUNDINGS * torch.finfo(values.dtype).eps * (largest * factor).abs()
    return rounding + VANISHED * factor.abs().clamp(min=1.0)


def _outside(found: Tensor, low: Tensor, high: Tensor, slack: Tensor) -> Tensor:
    return (found < low - slack) | (found > high + slack)


def _compare(what: str, found: Tensor, low: Tensor, high: Tensor, slack: Tensor) -> None:
    outside = _outside(found, low, high, slack)
    if bool(outside.any()):
        worst = int(torch.where(outside, (found - (low + high) / 2).abs(), -1.0).argmax())
        raise AdapterMismatchError(
            f"TRL's loss has the gradient {float(found[worst]):.7g} with respect to the {what} of live token {worst} "
            f"({int(outside.sum())} of {found.numel()} differ), fastrl's form of that loss between "
            f"{float(low[worst]):.7g} and {float(high[worst]):.7g}: the trainer computes another loss than its "
            "configuration says. Use fastrl.integrations.trl.patched(), which leaves the loss to the trainer"
        )


# --- policy losses ----------------------------------------------------------------------------------------------------


@dataclass
class PolicyPrediction:
    """A `PolicyLoss` on packed tokens."""

    loss: PolicyLoss
    inputs: dict[str, Any]
    """The arguments of the call: packed tensors (N,) or (S,), `mask`, `cu_seqlens`, `n_tokens`, `n_sequences`."""
    path: str = ""

    @property
    def needs_head_pass(self) -> bool:
        """Whether entropies carry a gradient."""
        return self.loss.uses_entropy

    def fused(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Any, wanted: Sequence[str]
    ) -> Fused:
        """Run `PolicyLoss.from_hidden`."""
        if wanted:
            raise RuntimeError(f"a policy loss does not go with the statistics {', '.join(wanted)} of the head")
        n = self.inputs["mask"].numel()
        if targets.numel() != n:
            raise RuntimeError(f"the model scored {targets.numel()} tokens where the batch has {n} live ones")
        output = self.loss.from_hidden(
            hidden, weight, targets, bias=bias, temperature=request.temperature, logit_scale=request.logit_scale,
            softcap=request.softcap, **self.inputs,
        )  # fmt: skip
        assert output.logprobs is not None
        assert output.entropy is not None
        total, count = output.metrics["path/gemm_units"]
        self.path = f"gradient formed in the forward: {float(total / count):.3g} GEMM units"
        return Fused(output.loss, *self._scored(hidden, weight, bias, targets, request, output))

    def _scored(self, *call: Any) -> tuple[Tensor, Tensor]:
        """Return (logprobs, entropy), those of tokens outside the mask of the loss too, which the host may log."""
        hidden, weight, bias, targets, request, output = call
        keep = self.inputs["mask"] != 0
        if bool(keep.all()):
            return output.logprobs, output.entropy
        from fastrl.ops import linear_token_logprobs

        with torch.no_grad():
            rest = linear_token_logprobs(
                hidden[~keep], weight, targets[~keep], bias=bias, temperature=request.temperature,
                logit_scale=request.logit_scale, softcap=request.softcap,
            )  # fmt: skip
        logprobs, entropy = output.logprobs.clone(), output.entropy.clone()
        logprobs[~keep], entropy[~keep] = rest.logprobs, rest.entropy
        return logprobs, entropy

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the loss on log-probs."""
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            leaf_entropy = entropy.detach().requires_grad_() if self.loss.uses_entropy else None
            loss = self.loss(leaf, entropy=leaf_entropy, **self.inputs).loss
            if leaf_entropy is None:
                return torch.autograd.grad(loss, leaf)[0], None
            g, h = torch.autograd.grad(loss, (leaf, leaf_entropy))
        return g, h


# --- losses whose gradient is formed here --------------------------------------------------------------------------


class _Release(torch.autograd.Function):
    """(hidden, weight, bias) -> 0, with gradients that are known; backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return hidden.new_zeros((), dtype=wide(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else (g * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None)


def fused_pass(
    call: tuple[Tensor, Tensor, Tensor | None, Tensor, Any],
    wanted: Sequence[str],
    coefficients: Coefficients,
    group_sizes: Sequence[int] | None = None,
) -> tuple[Fused, float]:
    """Return the fused pass of a loss given by its coefficients, and the GEMM units that it took."""
    hidden, weight, bias, targets, request = call
    needs = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    fixed_bias = None if bias is None else bias.detach()
    rows = request.rows(hidden.detach(), weight.detach(), fixed_bias, targets, request.ignored)
    columns = request.columns(targets.numel(), wanted, rows.inv_temperature)

    def observe(index: Tensor, logits: Tensor) -> None:
        request.observe(columns, index, logits, targets[index])

    options = replace(rows.options, ignore_index=MASKED_LABEL, observe=observe if wanted else None)
    with torch.no_grad():
        logprobs, entropy, gradients, recomputed = fused_gradient(
            replace(rows, options=options), needs, coefficients, group_sizes
        )
    handle = _Release.apply(hidden, weight, bias, *gradients)
    units_taken = 1.0 + needs[0] + needs[1] + recomputed / max(targets.numel(), 1)
    return Fused(handle, logprobs, entropy, columns), units_taken


def gradient_path(units: float) -> str:
    """Return what a trainer shows of a fused pass."""
    return f"gradient formed in the forward: {units:.3g} GEMM units"


@dataclass
class SupervisedPrediction:
    """The sum over tokens of -logp ("nll") or -sg(p) logp ("dft")."""

    kind: str
    path: str = ""

    @property
    def needs_head_pass(self) -> bool:
        """Entropies carry no gradient."""
        return False

    def fused(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, request: Any, wanted: Sequence[str]
    ) -> Fused:
        """Run the head, chunk by chunk."""

        def of_chunk(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
            del block, index
            return self.coefficients(logprobs, entropy)

        result, units = fused_pass((hidden, weight, bias, targets, request), wanted, of_chunk)
        self.path = gradient_path(units)
        return result

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        """Return -1, or -p."""
        del entropy
        return (-logprobs.exp() if self.kind == "dft" else torch.full_like(logprobs, -1.0)), None
