"""One adapter per contender: the same loss on the same inputs, each called as its own project calls it.

Every RL loss here is the token mean of -min(r A, clip(r, 1 - 0.2, 1 + 0.2) A). Projects that only offer log-probs or a
per-token cross-entropy get that loss in PyTorch behind it. An adapter that cannot run says why.

Legend: B sequences, T tokens of one, N = B T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastrl
from bench.cases import HIDDEN_OPERATIONS, LOGITS_OPERATIONS, OPERATIONS, TAIL_OPERATIONS, Inputs
from bench.samples import Missing as Missing
from fastrl.backends import cuda

EPSILON = 0.2
TAIL_MASS = 1e-4
# Entries per vocabulary chunk in TRL 1.16's trainers, for a version that names its constant differently.
TRL_CHUNK_FALLBACK = 32768


class Outputs(NamedTuple):
    """Results of a contender. None for a result that the operation does not need or the contender does not expose."""

    loss: Tensor | None = None
    logprobs: Tensor | None = None  # (B, T)
    dhidden: Tensor | None = None  # (N, D)
    dweight: Tensor | None = None  # (V, D)
    dlogits: Tensor | None = None  # (N, V)


Runner = Callable[[], Outputs]


@dataclass(frozen=True)
class Contender:
    """A name, the operations it offers, and how to prepare a run."""

    name: str
    operations: tuple[str, ...]
    prepare: Callable[[Inputs], Runner]
    """Return the run for some inputs, or raise `Missing`."""
    declared_error: float = 0.0
    """Relative gradient error that the contender declares instead of exactness."""


def policy_loss(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss of log-probs (B, T), or of (N,), in plain PyTorch."""
    shape, mask = inputs.mask.shape, inputs.mask
    if inputs.case.operation == "sft_hidden":
        return -(mask * logprobs.view(shape)).sum() / mask.sum()
    ratio = (logprobs.view(shape) - inputs.old_logprobs).exp()
    advantage = inputs.advantages.unsqueeze(-1)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1.0 - EPSILON, 1.0 + EPSILON) * advantage)
    return -(mask * surrogate).sum() / mask.sum()


def _require(package: str, hint: str) -> Any:
    """Return an imported module of a peer, or raise `Missing`."""
    root = package.partition(".")[0]
    if importlib.util.find_spec(root) is None:
        raise Missing(f"{root} is not installed ({hint})")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Missing(f"{package} cannot be imported: {error}") from error


def _require_gpu(inputs: Inputs, what: str) -> None:
    if inputs.labels.device.type == "cpu":
        raise Missing(f"{what} needs a GPU")


def _no_softcap(inputs: Inputs, what: str) -> None:
    if inputs.case.model.softcap is not None and not inputs.case.from_logits:
        raise Missing(f"{what} has no softcap")


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    """Return the tensors that want a gradient, as fresh leaves, by the name of their gradient in `Outputs`."""
    case = inputs.case
    if not case.trains:
        return {}
    if case.from_logits:
        assert inputs.logits is not None
        return {"dlogits": inputs.logits.detach().requires_grad_()}
    assert inputs.hidden is not None
    assert inputs.weight is not None
    leaves = {"dhidden": inputs.hidden.detach().requires_grad_()}
    if case.operation != "loss_hidden_frozen":
        leaves["dweight"] = inputs.weight.detach().requires_grad_()
    return leaves


def runner(inputs: Inputs, compute: Callable[[Tensor, Tensor | None], tuple[Tensor | None, Tensor | None]]) -> Runner:
    """Return a run: forward, and backward if the operation trains.

    Args:
        inputs: of the case.
        compute: maps (hidden (N, D), weight (V, D)), or (logits (N, V), None), to (loss, log-probs), either None.
    """
    leaves = _leaves(inputs)
    if inputs.case.from_logits:
        first, second = leaves.get("dlogits", inputs.logits), None
    else:
        first, second = leaves.get("dhidden", inputs.hidden), leaves.get("dweight", inputs.weight)
    assert first is not None

    def run() -> Outputs:
        if not leaves:
            with torch.no_grad():
                _, logprobs = compute(first, second)
            assert logprobs is not None
            return Outputs(logprobs=logprobs.view(inputs.labels.shape))
        loss, logprobs = compute(first, second)
        assert loss is not None
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        shown = None if logprobs is None else logprobs.detach().view(inputs.labels.shape)
        return Outputs(loss.detach(), shown, **dict(zip(leaves, gradients, strict=True)))

    return run


def from_logprobs(inputs: Inputs, logprobs_of: Callable[[Tensor, Tensor | None], Tensor]) -> Runner:
    """Return a run of a contender that offers log-probs (N,). PyTorch computes the loss after it."""

    def compute(first: Tensor, second: Tensor | None) -> tuple[Tensor | None, Tensor]:
        logprobs = logprobs_of(first, second)
        return (policy_loss(logprobs, inputs) if inputs.case.trains else None), logprobs

    return runner(inputs, compute)


def _eager_logprobs(inputs: Inputs) -> Callable[[Tensor, Tensor | None], Tensor]:
    labels, softcap = inputs.labels.reshape(-1, 1), inputs.case.model.softcap

    def logprobs_of(first: Tensor, weight: Tensor | None) -> Tensor:
        logits = first
        if weight is not None:
            logits = torch.nn.functional.linear(first, weight)
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
        return logits.float().log_softmax(-1).gather(-1, labels).squeeze(-1)

    return logprobs_of


def _eager(inputs: Inputs) -> Runner:
    return from_logprobs(inputs, _eager_logprobs(inputs))


def _compiled(inputs: Inputs) -> Runner:
    if inputs.labels.device.type == "cpu":
        raise Missing("skipped on a CPU: compiling takes longer than the rest of the run")
    torch.compiler.reset()
    return from_logprobs(inputs, torch.compile(_eager_logprobs(inputs), dynamic=False))


def _torch_linear(inputs: Inputs) -> Runner:
    function = getattr(torch.nn.functional, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Missing(f"torch {torch.__version__} has no chunked linear_cross_entropy")
    _no_softcap(inputs, "linear_cross_entropy")
    labels = inputs.labels.reshape(-1)
    if inputs.case.operation == "sft_hidden":
        return runner(inputs, lambda hidden, weight: (function(hidden, weight, labels, options=options()), None))
    return from_logprobs(
        inputs, lambda hidden, weight: -function(hidden, weight, labels, reduction="none", options=options())
    )


def _trl(inputs: Inputs) -> Runner:
    """TRL: the fused LM head of its trainers with the outputs of GRPO, entropy among them, and its default chunk."""
    utils = _require("trl.trainer.utils", "pip install trl>=1.16")
    function = getattr(utils, "_ChunkedLogProbFunction", None)
    if function is None:
        raise Missing("this trl has no _ChunkedLogProbFunction")
    chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", TRL_CHUNK_FALLBACK)
    labels, mask, softcap = inputs.labels.reshape(-1), inputs.mask.reshape(-1).bool(), inputs.case.model.softcap
    # As TRL does: with Triton it scores the valid positions only, otherwise all of them.
    compact = labels.device.type in ("cuda", "xpu")

    def logprobs_of(hidden: Tensor, weight: Tensor | None) -> Tensor:
        rows, targets = (hidden[mask], labels[mask]) if compact else (hidden, labels)
        logprobs = function.apply(rows, weight, None, targets, 1.0, chunk, softcap, 1.0, ("entropy",))[0]
        if compact:
            return logprobs.new_zeros(mask.shape).masked_scatter(mask, logprobs)
        return logprobs.masked_fill(~mask, 0.0)

    return from_logprobs(inputs, logprobs_of)


def _trl_logits(inputs: Inputs) -> Runner:
    utils = _require("trl.trainer.utils", "pip install trl>=1.16")
    return from_logprobs(
        inputs,
        lambda logits, _: utils.selective_log_softmax(
            logits.view(*inputs.labels.shape, logits.shape[-1]), inputs.labels
        ),
    )


def _liger_grpo(inputs: Inputs) -> Runner:
    module = _require("liger_kernel.chunked_loss.grpo_loss", "pip install liger-kernel")
    _no_softcap(inputs, "LigerFusedLinearGRPOLoss")
    on_gpu = inputs.labels.device.type != "cpu"
    loss = module.LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=on_gpu, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="dapo"
    )
    shape, count = inputs.labels.shape, inputs.mask.sum()

    def compute(hidden: Tensor, weight: Tensor | None) -> tuple[Tensor, None]:
        result = loss(
            hidden.view(*shape, -1),
            weight,
            inputs.labels,
            inputs.mask,
            inputs.advantages,
            old_per_token_logps=inputs.old_logprobs,
            num_items_in_batch=count,
        )
        return result[0], None

    return runner(inputs, compute)


def _liger_scaled(inputs: Inputs) -> Runner:
    module = _require("liger_kernel.ops.fused_linear_scaled_cross_entropy", "pip install liger-kernel")
    _no_softcap(inputs, "LigerFusedLinearScaledCrossEntropyFunction")
    labels = torch.where(inputs.mask.bool(), inputs.labels, -100).reshape(-1)
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def logprobs_of(hidden: Tensor, weight: Tensor | None) -> Tensor:
        result = function.apply(hidden, weight, labels, 1.0, -100, 1, True)
        return -(result[0] if isinstance(result, tuple) else result)

    return from_logprobs(inputs, logprobs_of)


def _liger_linear(inputs: Inputs) -> Runner:
    _require_gpu(inputs, "Liger's Triton cross-entropy")
    module = _require("liger_kernel.transformers.fused_linear_cross_entropy", "pip install liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(softcap=inputs.case.model.softcap)
    labels = inputs.labels.reshape(-1)
    return runner(inputs, lambda hidden, weight: (loss(weight, hidden, labels), None))


def _liger_logits(inputs: Inputs) -> Runner:
    _require_gpu(inputs, "Liger's triton_grpo_loss")
    module = _require("liger_kernel.transformers.grpo_loss", "pip install liger-kernel")
    assert inputs.logits is not None
    # It takes one position more than there are tokens, as a model's output has it, and leaves it alone.
    leaf = torch.nn.functional.pad(inputs.logits.view(*inputs.labels.shape, -1), (0, 0, 0, 1)).requires_grad_()
    count = inputs.mask.sum()

    def run() -> Outputs:
        # The default works in place: it would overwrite the logits that the next run reads.
        result = module.triton_grpo_loss(
            leaf, inputs.old_logprobs, None, inputs.labels, inputs.advantages, inputs.mask,
            temperature=1.0, beta=0.0, eps_low=EPSILON, eps_high=EPSILON, inplace=False, reduce=True,
            num_items_in_batch=count,
        )  # fmt: skip
        (gradient,) = torch.autograd.grad(result[0], leaf)
        return Outputs(result[0].detach(), None, dlogits=gradient[:, :-1])

    return run


def _verl_torch(inputs: Inputs) -> Runner:
    module = _require("verl.utils.experimental.torch_functional", "pip install verl>=0.9")
    _no_softcap(inputs, "verl's FusedLinearForPPO")
    head, labels = module.FusedLinearForPPO(), inputs.labels.reshape(1, -1)
    return from_logprobs(
        inputs, lambda hidden, weight: head(hidden.unsqueeze(0), weight, labels, temperature=1.0)[0].reshape(-1)
    )


def _verl_triton(inputs: Inputs) -> Runner:
    module = _require("verl.utils.kernel.linear_cross_entropy", "pip install verl>=0.9")
    _require_gpu(inputs, "verl's Triton kernel")
    _no_softcap(inputs, "verl's Triton kernel")
    labels = inputs.labels.reshape(-1)
    return from_logprobs(
        inputs, lambda hidden, weight: module.linear_cross_entropy(hidden, weight, labels, 1.0, "none")[0].reshape(-1)
    )


def _cut_cross_entropy(inputs: Inputs) -> Runner:
    module = _require("cut_cross_entropy", "pip install cut-cross-entropy")
    _require_gpu(inputs, "Cut Cross Entropy")
    labels = torch.where(inputs.mask.bool(), inputs.labels, -100).reshape(-1)
    softcap, mean = inputs.case.model.softcap, inputs.case.operation == "sft_hidden"
    if mean:
        return runner(
            inputs, lambda hidden, weight: (module.linear_cross_entropy(hidden, weight, labels, softcap=softcap), None)
        )
    return from_logprobs(
        inputs,
        lambda hidden, weight: -module.linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction="none"),
    )


def _quack_linear(inputs: Inputs) -> Runner:
    module = _require("quack.linear_cross_entropy", "pip install quack-kernels")
    _require_gpu(inputs, "QuACK")
    _no_softcap(inputs, "QuACK's linear cross-entropy")
    labels = inputs.labels.reshape(-1)
    return runner(inputs, lambda hidden, weight: (module.chunked_linear_cross_entropy(hidden, weight, labels), None))


def _quack_logits(inputs: Inputs) -> Runner:
    module = _require("quack.cross_entropy", "pip install quack-kernels")
    _require_gpu(inputs, "QuACK")
    labels = inputs.labels.reshape(-1)
    return from_logprobs(inputs, lambda logits, _: -module.cross_entropy(logits, labels, reduction="none"))


def _flash_logits(inputs: Inputs) -> Runner:
    module = _require("flash_attn.ops.triton.cross_entropy", "pip install flash-attn")
    _require_gpu(inputs, "flash-attn's Triton cross-entropy")
    labels = inputs.labels.reshape(-1)
    return from_logprobs(inputs, lambda logits, _: -module.cross_entropy_loss(logits, labels)[0])


def fastrl_contender(name: str = "fastrl", tail_mass: float = 0.0, **options: Any) -> Contender:
    """Return fastrl with options of its vocabulary operation, for example `chunk_tokens` or `backend`."""

    def prepare(inputs: Inputs) -> Runner:
        case, labels, mask = inputs.case, inputs.labels, inputs.mask
        if options.get("backend") == "cuda":
            available, reason = cuda.cuda_available(labels.device, build=True)
            if not available:
                raise Missing(reason)
        softcap = case.model.softcap
        given = {"advantages": inputs.token_advantages, "mask": mask, "old_logprobs": inputs.old_logprobs}
        loss = fastrl.PolicyLoss(clip_low=EPSILON, clip_high=EPSILON)
        if case.operation == "sft_hidden":
            loss, given = fastrl.PolicyLoss.preset("sft"), {"mask": mask, "advantages": None}
        hidden_options = {**options, "tail_mass": tail_mass, "softcap": softcap}

        def compute(first: Tensor, weight: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            rows = first.view(*labels.shape, first.shape[-1])
            if weight is None:
                if not case.trains:
                    return None, fastrl.token_logprobs(rows, labels, **options).logprobs
                output = loss.from_logits(rows, labels, **given, **options)
            elif not case.trains:
                return None, fastrl.linear_token_logprobs(rows, weight, labels, **hidden_options).logprobs
            else:
                output = loss.from_hidden(rows, weight, labels, **given, **hidden_options)
            return output.loss, output.logprobs

        return runner(inputs, compute)

    # By name only, until a device shows it right and faster. This row measures that.
    operations = _LOGITS if options.get("backend") == "cuda" else tuple(OPERATIONS)
    return Contender(name, TAIL_OPERATIONS if tail_mass else operations, prepare, tail_mass)


_HIDDEN = tuple(HIDDEN_OPERATIONS)
_HIDDEN_LOSSES = tuple(name for name in _HIDDEN if name.startswith("loss"))
_LOGITS = tuple(LOGITS_OPERATIONS)
EAGER = Contender("PyTorch eager", tuple(OPERATIONS), _eager)


def contenders() -> list[Contender]:
    """Return everyone, fastrl first and PyTorch's eager code, which the oracle needs, second."""
    return [
        fastrl_contender(),
        EAGER,
        fastrl_contender("fastrl, tail_mass=1e-4", tail_mass=TAIL_MASS),
        fastrl_contender("fastrl, backend=cuda", backend="cuda"),
        Contender("PyTorch torch.compile", tuple(OPERATIONS), _compiled),
        Contender("PyTorch F.linear_cross_entropy", ("logprobs_hidden", "loss_hidden", "sft_hidden"), _torch_linear),
        Contender("TRL chunked log-prob", _HIDDEN, _trl),
        Contender("TRL selective_log_softmax", _LOGITS, _trl_logits),
        Contender("Liger GRPO (chunked)", ("loss_hidden", "loss_hidden_frozen", "loss_hidden_half"), _liger_grpo),
        Contender("Liger scaled cross-entropy", ("logprobs_hidden", *_HIDDEN_LOSSES, "sft_hidden"), _liger_scaled),
        Contender("Liger linear cross-entropy", ("sft_hidden",), _liger_linear),
        Contender("Liger triton_grpo_loss", ("loss_logits",), _liger_logits),
        Contender("verl torch", _HIDDEN, _verl_torch),
        Contender("verl Triton", _HIDDEN, _verl_triton),
        Contender("Cut Cross Entropy", _HIDDEN, _cut_cross_entropy),
        Contender("QuACK linear cross-entropy", ("sft_hidden",), _quack_linear),
        Contender("QuACK cross-entropy", _LOGITS, _quack_logits),
        Contender("flash-attn cross-entropy", _LOGITS, _flash_logits),
    ]
