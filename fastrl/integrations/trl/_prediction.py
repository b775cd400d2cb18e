"""The gradient of the trainer's loss, predicted while the head runs and checked in the backward.

A trainer of TRL gets log-probs from the model's forward and computes its loss from them. If fastrl knows the loss, then
it can compute the gradient of each log-prob as soon as a chunk of logits is there, and form the gradients of hidden
states and head from that chunk. The backward then does not form the logits a second time.

The trainer's own code still computes the loss, the metrics and the logs. In the backward its gradient must equal the
predicted one times a number (loss scale, accumulation), or the step raises.

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

# Two ways to compute a coefficient may differ by this many roundings of the largest one in the batch. A coefficient can
# be a sum of far larger terms: discopop's, divided by its temperature, took 190 roundings.
COEFFICIENT_ROUNDINGS = 1024
# With all sigmoids saturated, one form of the derivative is 1e-32 and another 0. They are the same loss.
VANISHED = 1e-20
# A coefficient may lie anywhere between its values at log-probs this many roundings lower and higher. It decides tokens
# with a ratio on the edge of the clip.
LOGPROB_ROUNDINGS = 8


@dataclass(frozen=True)
class HeadCall:
    """A call of the model's fused head: TRL's tensors and options."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,)
    request: Any
    """The options, a `Request` of `_logprobs`."""
    wanted: Sequence[str] = ()
    """The statistics of the logits that TRL asks for beside log-probs and entropy."""


@dataclass(frozen=True)
class Fused:
    """The results of a pass through the head that also formed the gradients; all but `handle` are detached."""

    handle: Tensor  # (), its backward scales the gradients and hands them to hidden, weight and bias
    logprobs: Tensor  # (N,)
    entropy: Tensor  # (N,)
    columns: dict[str, Tensor] = field(default_factory=dict)
    """The wanted statistics, (N,) each."""


class Prediction(Protocol):
    """The loss of the next batch that passes through the head."""

    path: str
    """How the gradient was formed, for the trainer to show; empty before the head has run."""

    @property
    def needs_head_pass(self) -> bool:
        """Whether to form the gradient in the forward even with a frozen head, because entropies carry a gradient."""
        ...

    def fused(self, call: HeadCall) -> Fused:
        """Run the head and form the gradients on the way."""
        ...

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (dL/dlogprobs, dL/dentropy or None) of all live tokens, up to one factor."""
        ...


_active: ContextVar[Prediction | None] = ContextVar("fastrl_trl_prediction", default=None)


@contextmanager
def predicting(prediction: Prediction | None) -> Iterator[None]:
    """Let the next pass through a fused head with gradients on use `prediction`."""
    token = _active.set(prediction)
    try:
        yield
    finally:
        _active.reset(token)


def pending() -> Prediction | None:
    """Return the prediction for the current pass, or None if there is none or it has been used."""
    prediction = _active.get()
    return None if prediction is None or prediction.path or not torch.is_grad_enabled() else prediction


def attach(prediction: Prediction, fused: Fused) -> tuple[Tensor, Tensor]:
    """Return (logprobs, entropy), (N,) each. Their backward checks TRL's gradient and releases the predicted one."""
    g, h = prediction.coefficients(fused.logprobs, fused.entropy)
    logprobs, entropy = _Attach.apply(fused.handle, fused.logprobs, fused.entropy, g, h, prediction)
    return logprobs, entropy


class _Attach(torch.autograd.Function):
    """(handle) -> (logprobs, entropy). The gradient of the handle is the factor between TRL's gradient and ours."""

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
        # A factor that is not finite, after an overflow, proves no mismatch.
        if bool(factor.isfinite()):
            _check(ctx.prediction, factor, (host_g, host_h), (g, h), (logprobs, entropy))
        return (factor.to(ctx.handle_dtype), *(None,) * 5)


def common_factor(
    host_g: Tensor,  # (N,)
    host_h: Tensor,  # (N,)
    g: Tensor,  # (N,)
    h: Tensor | None,  # (N,)
) -> Tensor:
    """Return the factor () between TRL's gradient and the predicted one: the median over the larger coefficients."""
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
    """Raise unless TRL's gradient is the expected one times the factor, up to rounding."""
    (g, h), (logprobs, entropy) = expected, outputs
    if _outside(host[0], g * factor, g * factor, _slack(g, factor)).any():
        step = LOGPROB_ROUNDINGS * torch.finfo(logprobs.dtype).eps * logprobs.abs().clamp(min=1.0)
        # The first two moves shift a ratio, the last two the margin of a pair.
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

    def fused(self, call: HeadCall) -> Fused:
        """Run `PolicyLoss.from_hidden`."""
        if call.wanted:
            raise RuntimeError(f"a policy loss does not go with the statistics {', '.join(call.wanted)} of the head")
        n = self.inputs["mask"].numel()
        if call.targets.numel() != n:
            raise RuntimeError(f"the model scored {call.targets.numel()} tokens where the batch has {n} live ones")
        output = self.loss.from_hidden(
            call.hidden, call.weight, call.targets, bias=call.bias, **_logit_options(call.request), **self.inputs
        )
        assert output.logprobs is not None
        assert output.entropy is not None
        total, count = output.metrics["path/gemm_units"]
        self.path = gradient_path(float(total / count))
        return Fused(output.loss, *self._of_all_tokens(call, output.logprobs, output.entropy))

    def _of_all_tokens(self, call: HeadCall, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor]:
        """Return (logprobs, entropy) with the tokens outside the loss's mask filled in, which TRL may log."""
        keep = self.inputs["mask"] != 0
        if bool(keep.all()):
            return logprobs, entropy
        from fastrl.ops import linear_token_logprobs

        with torch.no_grad():
            rest = linear_token_logprobs(
                call.hidden[~keep], call.weight, call.targets[~keep], bias=call.bias, **_logit_options(call.request)
            )
        logprobs, entropy = logprobs.clone(), entropy.clone()
        logprobs[~keep], entropy[~keep] = rest.logprobs, rest.entropy
        return logprobs, entropy

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of the loss with respect to log-probs and, if it uses them, entropies."""
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            leaf_entropy = entropy.detach().requires_grad_() if self.loss.uses_entropy else None
            loss = self.loss(leaf, entropy=leaf_entropy, **self.inputs).loss
            if leaf_entropy is None:
                return torch.autograd.grad(loss, leaf)[0], None
            g, h = torch.autograd.grad(loss, (leaf, leaf_entropy))
        return g, h


def _logit_options(request: Any) -> dict[str, Any]:
    """Return temperature, logit_scale and softcap of a request."""
    return {name: getattr(request, name) for name in ("temperature", "logit_scale", "softcap")}


# --- losses given by their coefficients -------------------------------------------------------------------------------


class _Release(torch.autograd.Function):
    """(hidden, weight, bias) -> 0, with gradients that are known already. The backward scales them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, *gradients: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        return hidden.new_zeros((), dtype=wide(hidden.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else (g * grads[0]).to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None)


def fused_pass(
    call: HeadCall, coefficients: Coefficients, group_sizes: Sequence[int] | None = None
) -> tuple[Fused, float]:
    """Run the head for a loss given by its coefficients; return the results and the number of GEMM units.

    Args:
        call: the call of the head.
        coefficients: the gradient of the loss with respect to the log-probs of a chunk.
        group_sizes: tokens of each row or pair, which a chunk must not split; None: chunks may end anywhere.
    """
    hidden, weight, bias, targets, request = call.hidden, call.weight, call.bias, call.targets, call.request
    needs = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    fixed_bias = None if bias is None else bias.detach()
    rows = request.rows(hidden.detach(), weight.detach(), fixed_bias, targets, request.ignored)
    columns = request.columns(targets.numel(), call.wanted, rows.inv_temperature)

    def observe(index: Tensor, logits: Tensor) -> None:
        request.observe(columns, index, logits, targets[index])

    options = replace(rows.options, ignore_index=MASKED_LABEL, observe=observe if call.wanted else None)
    with torch.no_grad():
        logprobs, entropy, gradients, recomputed = fused_gradient(
            replace(rows, options=options), needs, coefficients, group_sizes
        )
    handle = _Release.apply(hidden, weight, bias, *gradients)
    gemm_units = 1.0 + needs[0] + needs[1] + recomputed / max(targets.numel(), 1)
    return Fused(handle, logprobs, entropy, columns), gemm_units


def gradient_path(gemm_units: float) -> str:
    """Return the trainer's message about a fused pass."""
    return f"gradient formed in the forward: {gemm_units:.3g} GEMM units"


@dataclass
class SupervisedPrediction:
    """The sum over tokens of -logp ("nll") or -sg(p) logp ("dft")."""

    kind: str
    path: str = ""
    needs_head_pass: bool = field(default=False, init=False)

    def fused(self, call: HeadCall) -> Fused:
        """Run the head chunk by chunk."""

        def of_chunk(logprobs: Tensor, entropy: Tensor, block: slice, index: Tensor) -> tuple[Tensor, None]:
            del block, index
            return self.coefficients(logprobs, entropy)

        result, gemm_units = fused_pass(call, of_chunk)
        self.path = gradient_path(gemm_units)
        return result

    def coefficients(self, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        """Return -1, or -p."""
        del entropy
        return (-logprobs.exp() if self.kind == "dft" else torch.full_like(logprobs, -1.0)), None
