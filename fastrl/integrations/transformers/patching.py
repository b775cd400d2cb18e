"""The patch of a model's forward, and the fused cross-entropy that it runs.

The patched forward is an attribute of the instance. It replaces the head by `_LazyHead` for the duration of a call with
labels and runs the model's own forward. `unpatch` deletes the attribute, or restores the one that was there before.

Legend: B batch, T time, N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.backends import choice
from fastrl.integrations.common.autocast import as_autocast
from fastrl.integrations.common.proof import prove, sampled_tokens
from fastrl.integrations.transformers.head import (
    HeadPlace,
    check_output_layer,
    effective_linear,
    innermost,
    replaced_forward,
    vocabulary_of,
)
from fastrl.integrations.transformers.lazy_logits import CrossEntropy, LazyLogits, head_scalars_of
from fastrl.losses.policy.loss import PolicyLoss
from fastrl.ops.linear_token_logprobs import linear_token_logprobs
from fastrl.train.pretrained import causal_lm

_STATE = "_fastrl_patch"
_UNDO = "undo with fastrl.integrations.transformers.unpatch(model)"
_TOKEN_SUM = PolicyLoss.preset("sft", aggregate="token_sum")


class Patch:
    """A patched model, as a context manager: leaving it undoes the patch."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def undo(self) -> None:
        """Give the model its own forward back. A second call does nothing."""
        state: _State | None = self.model.__dict__.get(_STATE)
        if state is not None and state.active:
            unpatch(self.model)

    def __enter__(self) -> Patch:
        """Return the patch."""
        return self

    def __exit__(self, *error: object) -> None:
        """Undo the patch."""
        self.undo()


def patch(
    model: Any,
    *,
    differentiable_logprobs: bool = False,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Patch:
    """Let the model's forward with labels return loss, per-token log-probs and entropy without forming the logits.

    The output of a call with `labels`:

        loss               as the model's own code computes it from the cross-entropy
        logprobs, entropy  (B, T) float32, for the label that position t predicts: labels[t + 1], or shift_labels[t];
                           0 for an ignored label
        logits             None
        any other field    as in the model's own output

    Calls without labels, for example by `generate`, run the model's own forward.

    Args:
        model: a transformers model with an output head, or a PEFT model around one. Patch it before it is wrapped for
            several processes (FSDP, DeepSpeed, DDP).
        differentiable_logprobs: whether `logprobs` and `entropy` carry gradients, for a loss of your own. The training
            step then takes 4 GEMM units, or 2 with a frozen head. If False, they are detached, only the loss has a
            gradient, it is formed in the forward, and the step takes 3.
        chunk_tokens: rows of logits held at once; None: 256 on a CPU, 2048 elsewhere.
        backend: backend of the row kernels: "auto", "torch", "cpu", "triton" or "cuda".

    Returns:
        A `Patch`. Its `undo()`, leaving it as a context manager, and `unpatch(model)` all restore the forward.

    Raises:
        ValueError: the model is patched already, has no head, or takes no `labels`. Or its head is neither a Linear nor
            a Linear with plain LoRA adapters.
        AttributeError or ValueError in a call: an operation on the logits, or an option of the cross-entropy (label
            smoothing, class weights), that the fused operation does not have.
        AdapterMismatchError in the first call: its log-probs differ from the model's own.
    """
    inner = causal_lm(model)
    compiled = isinstance(inner, torch._dynamo.OptimizedModule)
    if compiled or not isinstance(inner, nn.Module) or not hasattr(inner, "get_output_embeddings"):
        raise ValueError(
            f"model must be a transformers model or a PEFT model around one, got {type(model).__name__}; patch a model "
            "before it is wrapped"
        )
    old: _State | None = inner.__dict__.get(_STATE)
    if old is not None and old.active:
        raise ValueError(f"this {type(inner).__name__} is patched already; {_UNDO} first")
    place = HeadPlace.of(inner)
    check_output_layer(place.module)
    signature = inspect.signature(inner.forward)
    if "labels" not in signature.parameters:
        raise ValueError(f"the forward of {type(inner).__name__} takes no labels, so there is no loss to fuse")
    options = _Options.checked(differentiable_logprobs, chunk_tokens, backend, next(inner.parameters()).device)
    # An undone patch is still there if another library wrapped its forward since. It is switched on again.
    if old is not None:
        old.options, old.active, old.proved = options, True, False
        return Patch(inner)
    forward = _forward_like(inner, signature)
    inner.__dict__[_STATE] = _State(place, signature, options, forward, inner.__dict__.get("forward"))
    inner.__dict__["forward"] = types.MethodType(forward, inner)
    return Patch(inner)


def unpatch(model: Any) -> None:
    """Give a patched model exactly the forward back that it had.

    Another library may have wrapped the patched forward since, for example accelerate for mixed precision. Then the
    wrapper stays, and the patched forward inside it passes every call on to the model's own.

    Raises ValueError for a model that is not patched.
    """
    inner = causal_lm(model)
    state: _State | None = getattr(inner, "__dict__", {}).get(_STATE)
    if state is None or not state.active:
        raise ValueError(f"this {type(inner).__name__} is not patched")
    state.active = False
    if getattr(inner.__dict__.get("forward"), "__func__", None) is not state.forward:
        return
    if state.previous is None:
        del inner.__dict__["forward"]
    else:
        inner.__dict__["forward"] = state.previous
    del inner.__dict__[_STATE]


# --- the patched forward ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    """The options of `patch`."""

    differentiable: bool
    chunk_tokens: int | None
    backend: str

    @classmethod
    def checked(cls, differentiable: Any, chunk_tokens: Any, backend: str, device: torch.device) -> _Options:
        """Return the options, or raise TypeError or ValueError."""
        if not isinstance(differentiable, bool):
            raise TypeError(f"differentiable_logprobs must be True or False, got {differentiable!r}")
        if chunk_tokens is not None and (
            isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1
        ):
            raise ValueError(f"chunk_tokens must be an int >= 1 or None, got {chunk_tokens!r}")
        if device.type != "meta":  # a model that is yet to be loaded: the first call chooses
            choice.choose(backend, device)
        return cls(differentiable, chunk_tokens, backend)


@dataclass
class _State:
    """The state of a patch, an attribute of the model."""

    # No member is bound to the model, so that a deep copy of a patched model is a patched model of its own.
    place: HeadPlace
    signature: inspect.Signature
    options: _Options
    forward: Callable[..., Any]
    """The patched forward, a function of (self, ...)."""
    previous: Any
    """The forward that the instance had as an attribute; None if it had only the forward of its class."""
    proved: bool = False
    active: bool = True

    def original(self, model: Any) -> Callable[..., Any]:
        """Return the model's own forward."""
        return types.MethodType(type(model).forward, model) if self.previous is None else self.previous


def _forward_like(model: Any, signature: inspect.Signature) -> Callable[..., Any]:
    """Return the patched forward, a function of (self, ...) with the name and the signature of the model's own one."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _patched_forward(self, args, kwargs)

    functools.update_wrapper(forward, type(model).forward)
    del forward.__wrapped__  # type: ignore[attr-defined]  # unwrapping a forward (accelerate does) is not unpatching
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = signature.replace(parameters=[own, *signature.parameters.values()])  # type: ignore[attr-defined]
    return forward


def _patched_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    state: _State = model.__dict__[_STATE]
    original = state.original(model)
    if not state.active or state.signature.bind_partial(*args, **kwargs).arguments.get("labels") is None:
        return original(*args, **kwargs)
    # `finish` reads the output's fields by name, so the model must not return a tuple.
    asked = kwargs.pop("return_dict", None)
    as_tuple = not (model.config.return_dict if asked is None else asked)
    call = _Call(state)
    with state.place.shadowed(_LazyHead(state.place.module, call)):
        output = original(*args, return_dict=True, **kwargs)
    result = call.finish(output)
    return result.to_tuple() if as_tuple else result


class _LazyHead:
    """Replaces the head during a call: takes hidden states and returns `LazyLogits`."""

    def __init__(self, module: nn.Module, call: Any) -> None:
        self._module = module
        self._call = call

    def __call__(self, hidden: Tensor) -> LazyLogits | Tensor:
        # Another thread may generate with the model at the same time. It gets real logits.
        if self._call.elsewhere():
            return self._module(hidden)
        check_output_layer(self._module)
        return LazyLogits(hidden, vocabulary_of(self._module), self._call.compute, hidden.dtype)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@dataclass
class _Call:
    """One call of a patched forward."""

    state: _State
    thread: int = field(default_factory=threading.get_ident)
    logprobs: Tensor | None = field(default=None)
    entropy: Tensor | None = field(default=None)

    def elsewhere(self) -> bool:
        """Return whether the current thread is not the one that made the call."""
        return threading.get_ident() != self.thread

    @torch.compiler.disable  # its kernels are compiled already, so the graph of the model's body breaks around it
    def compute(self, asked: CrossEntropy) -> Tensor:
        """Return the cross-entropy for the model's loss, and keep log-probs and entropy for the output."""
        if self.logprobs is not None:
            raise ValueError("the model takes the cross-entropy of its logits twice; leave it unpatched")
        outer = self.state.place.module
        head = innermost(outer)
        work: list[Callable[..., Any]] = []

        def fused(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.elsewhere():
                return work[0](hidden, *args, **kwargs)
            if args or kwargs:
                raise ValueError(
                    f"the output head is called with {', '.join(kwargs) or 'further arguments'} (PEFT batches of mixed "
                    "adapters, for one), which the fused head does not take"
                )
            if not self.state.proved:
                self.state.proved = _proved(head, work[0], hidden, asked, self.state.options)
            return _fused_cross_entropy(head, hidden, asked, self.state.options)

        with replaced_forward(head, fused) as original:
            work.append(original)
            loss, logprobs, entropy = outer(asked.hidden)
        shape = asked.hidden.shape[:-1]
        self.logprobs, self.entropy = logprobs.view(shape), entropy.view(shape)
        return loss

    def finish(self, output: Any) -> Any:
        """Return the model's output with log-probs and entropy, and None for the lazy logits."""
        from transformers.utils import ModelOutput

        if not isinstance(output, ModelOutput):
            raise TypeError(f"the model's forward returned {type(output).__name__}, expected a ModelOutput; {_UNDO}")
        if self.logprobs is None:
            raise RuntimeError(f"the model computed its loss without a cross-entropy of its head's logits; {_UNDO}")
        values = {item.name: getattr(output, item.name) for item in fields(output)}  # pyright: ignore[reportArgumentType]
        values = {name: None if isinstance(v, LazyLogits) else v for name, v in values.items()}
        return _with_logprobs(type(output))(**values, logprobs=self.logprobs, entropy=self.entropy)


@functools.cache
def _with_logprobs(kind: Any) -> Any:
    """Return a subclass of the model's output class with two more fields."""
    added = [(name, Tensor | None, field(default=None)) for name in ("logprobs", "entropy")]
    made = make_dataclass(f"{kind.__name__}WithLogprobs", added, bases=(kind,))
    made.__module__ = __name__
    made.__doc__ = f"{kind.__name__} with `logprobs` and `entropy`, (B, T)."
    return made


# --- the fused operation ----------------------------------------------------------------------------------------------


def _fused_cross_entropy(
    head: Any, hidden: Tensor, asked: CrossEntropy, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, logprobs (N,), entropy (N,)) of hidden states (..., D), inside the head's own call."""
    hidden, weight, bias = as_autocast(*effective_linear(head, hidden))
    # The model has cut the padding of its vocabulary off.
    if asked.vocabulary < weight.shape[0]:
        weight, bias = weight[: asked.vocabulary], None if bias is None else bias[: asked.vocabulary]
    flat = hidden.reshape(-1, hidden.shape[-1])
    scale, softcap = head_scalars_of(asked.steps)
    how = {
        "bias": bias,
        "logit_scale": scale,
        "softcap": softcap,
        "chunk_tokens": options.chunk_tokens,
        "backend": options.backend,
    }
    live = asked.labels != asked.ignore_index
    # The operands have their dtype. Autocast must not touch the float32 logits and their gradient inside.
    with torch.autocast(hidden.device.type, enabled=False):
        if options.differentiable or asked.reduction == "none":
            found = linear_token_logprobs(flat, weight, asked.labels, ignore_index=asked.ignore_index, **how)
            logprobs, entropy = found.logprobs, found.entropy
            total = -logprobs.sum()
        else:
            output = _TOKEN_SUM.from_hidden(flat[None], weight, asked.labels[None], mask=live[None], **how)
            assert output.logprobs is not None
            assert output.entropy is not None
            total, logprobs, entropy = output.loss, output.logprobs[0], output.entropy[0]
    if asked.reduction == "mean":
        total = total / live.sum().clamp(min=1)
    elif asked.reduction == "none":
        total = -logprobs if asked.rows is None else -logprobs[asked.rows]
    if options.differentiable:
        return total, logprobs, entropy
    return total, logprobs.detach(), entropy.detach()


@torch.no_grad()
def _proved(head: Any, own_forward: Callable[..., Any], hidden: Tensor, asked: CrossEntropy, options: _Options) -> bool:
    """Compare the log-probs of a few tokens with the model's own; return whether there were any."""
    live = (asked.labels != asked.ignore_index).nonzero().squeeze(-1)
    rows = live[sampled_tokens(live.numel(), live.device)]
    if rows.numel() == 0:
        return False
    states, labels = hidden.detach().reshape(-1, hidden.shape[-1])[rows], asked.labels[rows]
    # LoRA's dropout would draw other masks on the two sides.
    dropouts = [module for module in head.modules() if isinstance(module, nn.Dropout) and module.training]
    for module in dropouts:
        module.eval()
    try:
        logits = own_forward(states)[:, : asked.vocabulary]
        precision = logits.dtype
        for step in asked.steps:
            logits = step.apply(logits)
        few = CrossEntropy(states, labels, asked.ignore_index, "sum", asked.steps, None, asked.vocabulary)
        _, logprobs, entropy = _fused_cross_entropy(head, states, few, options)
    finally:
        for module in dropouts:
            module.train()
    theirs = torch.log_softmax(logits.double(), dim=-1)
    return prove(
        "the patched forward",
        {"logprobs": logprobs, "entropy": entropy},
        {
            "logprobs": theirs.gather(1, labels[:, None])[:, 0],
            "entropy": -torch.where(theirs.isfinite(), theirs.exp() * theirs, 0.0).sum(1),
        },
        largest_logit=torch.where(logits.isfinite(), logits, 0.0).abs().amax(1),
        dtype=precision,
        terms=hidden.shape[-1],
        vocabulary=logits.shape[-1],
        undo=_UNDO,
    )
