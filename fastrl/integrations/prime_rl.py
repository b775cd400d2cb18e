"""fastrl inside prime-rl: losses for its hook of custom losses.

    [trainer.loss]
    type = "custom"
    import_path = "fastrl.integrations.prime_rl.default_loss"
    kwargs = { dppo_mask_high = 0.2, kl_tau = 1e-3 }

`default_loss`, `ipo_loss`, `ref_kl_loss` and `ce_loss` are prime-rl's own losses, with its options and metrics.
`policy_loss` is any preset of `PolicyLoss`. prime-rl calls the hook for one sequence at a time, adds the results, and
divides by its global token count. So every loss here is a sum over tokens.

Legend: N tokens of one sequence.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl import checks
from fastrl.integrations.common.host import Host
from fastrl.integrations.common.proof import FirstUse, on_cpu, prove_loss
from fastrl.losses.kl import kl_estimate
from fastrl.losses.policy.loss import PolicyLoss, loss_value

HOST = Host("prime-rl", "prime-rl", "559b44772", "fastrl.integrations.prime_rl")

_MODULE = "prime_rl.trainer.rl.loss"
_CONFIGS = "prime_rl.configs.trainer"
_UNDO = "leave [trainer.loss] at prime-rl's own type, or pass prove=false in kwargs"
_REF_KL_BOUND = 0.2  # prime-rl's constants for its ref_kl loss, which has no options
_REF_KL_TAU = 1e-3

_proofs = FirstUse()


def default_loss(
    inputs: Any,
    *,
    dppo_mask_low: float = 0.2,
    dppo_mask_high: float = 0.2,
    adv_tau: float = 1.0,
    kl_tau: float = 1e-3,
    prove: bool = True,
) -> Any:
    """Return prime-rl's default loss of one sequence: DPPO's trust region on probabilities and a squared log-ratio.

        l = -keep adv_tau A r + kl_tau x^2      x = logp - logp_inference, r = e^x
        keep = p - q <= dppo_mask_high          for A > 0
               p - q >= -dppo_mask_low          otherwise

    p and q are the probabilities of the trainer and of the inference engine (arXiv 2602.04879).

    Args:
        inputs: prime-rl's `LossInputs`, with columns (N,).
        dppo_mask_low, dppo_mask_high, adv_tau, kl_tau: options of prime-rl's `DefaultLossConfig`.
        prove: whether to compare the first call with prime-rl's own loss.

    Raises:
        ValueError: options out of range.
        AdapterMismatchError: in the first call, if prime-rl's own loss or its gradient differs.
    """
    options = {"dppo_mask_low": dppo_mask_low, "dppo_mask_high": dppo_mask_high, "adv_tau": adv_tau, "kl_tau": kl_tau}
    _check_options(options)
    _prove_once("default", inputs, options, prove, _default)
    return _default(inputs, options)


def ipo_loss(
    inputs: Any, *, ipo_threshold: float = 0.1, adv_tau: float = 1.0, kl_tau: float = 1e-3, prove: bool = True
) -> Any:
    """Return prime-rl's loss "ipo" of one sequence: the default loss with keep = |p - q| <= ipo_threshold.

    Args:
        inputs: prime-rl's `LossInputs`, with columns (N,).
        ipo_threshold, adv_tau, kl_tau: options of prime-rl's `IPOLossConfig`.
        prove: whether to compare the first call with prime-rl's own loss.

    Raises:
        ValueError, AdapterMismatchError: as `default_loss` does.
    """
    options = {"ipo_threshold": ipo_threshold, "adv_tau": adv_tau, "kl_tau": kl_tau}
    _check_options(options)
    _prove_once("ipo", inputs, options, prove, _ipo)
    return _ipo(inputs, options)


def ref_kl_loss(inputs: Any, *, prove: bool = True) -> Any:
    """Return prime-rl's loss of on-policy distillation: its policy gradient with A = ref_logprob - logp, detached.

    Raises:
        ValueError: `inputs` have no ref_logprobs.
        AdapterMismatchError: in the first call, if prime-rl's own loss or its gradient differs.
    """
    if inputs.ref_logprobs is None:
        raise ValueError("prime-rl's ref_kl loss needs ref_logprobs, got None: use the 'opd' or 'opsd' algorithm")
    _prove_once("ref_kl", inputs, {}, prove, _ref_kl)
    return _ref_kl(inputs, {})


def ce_loss(inputs: Any, *, prove: bool = True) -> Any:
    """Return prime-rl's cross-entropy of one sequence: the sum of -logp over the mask.

    Raises:
        AdapterMismatchError: in the first call, if prime-rl's own loss or its gradient differs.
    """
    _prove_once("ce", inputs, {}, prove, _ce)
    return _ce(inputs, {})


def policy_loss(inputs: Any, *, preset: str, style: str | None = None, **fields: Any) -> Any:
    """Return any `PolicyLoss` of one sequence, by name: `kwargs = { preset = "cispo", weight_high = 4.0 }`.

    prime-rl's inference log-probs serve both as the old and as the rollout's log-probs. `loss_weights` multiply the
    advantages. Metrics: policy_loss, ratio, clip_fraction.

    Args:
        inputs: prime-rl's `LossInputs`, with columns (N,).
        preset, style, fields: arguments of `PolicyLoss.preset`. A preset's KL is left out unless `fields` have `kl`.

    Raises:
        ValueError: an unknown preset or field, an entropy bonus, or an aggregate other than "token_sum", because
            prime-rl divides by its own count. Or `inputs` have loss_weights and the loss has a KL or is not linear in
            the advantages.
    """
    loss = _preset(preset, style, tuple(sorted(fields.items())))
    c = _Columns(inputs)
    advantages = inputs.advantages
    if inputs.loss_weights is not None:
        if loss.kl is not None or loss.surrogate in ("nll", "dft", "square"):
            raise ValueError(
                f"loss_weights with preset={preset!r} are not supported: the weights multiply advantages, which cannot "
                "stand for them where a loss has a KL or does not use them linearly"
            )
        advantages = advantages * inputs.loss_weights
    output = loss(
        inputs.trainer_logprobs, advantages=advantages, mask=c.mask, old_logprobs=inputs.inference_logprobs,
        rollout_logprobs=inputs.inference_logprobs, ref_logprobs=inputs.ref_logprobs, cu_seqlens=c.offsets,
    )  # fmt: skip
    names = ("policy_loss", "ratio", "clip_fraction")
    metrics = {name: total / count for name, (total, count) in output.metrics.items() if name in names}
    return _outputs(output.loss, metrics)


@functools.lru_cache(maxsize=64)
def _preset(preset: str, style: str | None, fields: tuple[tuple[str, Any], ...]) -> PolicyLoss:
    given = dict(fields)
    if given.setdefault("aggregate", "token_sum") != "token_sum":
        raise ValueError(
            f"aggregate must be 'token_sum', prime-rl dividing by its own count, got {given['aggregate']!r}"
        )
    if "kl" not in given:
        given |= {"kl": None, "kl_coef": 0.0}
    loss = PolicyLoss.preset(preset, style=style, **given)
    if loss.uses_entropy:
        raise ValueError("prime-rl hands no entropy to its custom losses: entropy_coef must be 0")
    return loss


def _check_options(options: Mapping[str, float]) -> None:
    for name, value in options.items():
        checks.plain_float(name, value, low=0.0)


class _Columns:
    """The columns of `LossInputs`, with masked entries replaced by 0."""

    def __init__(self, inputs: Any) -> None:
        self.mask: Tensor = inputs.loss_mask  # (N,) bool
        # One sequence, as prime-rl calls the hook once for each.
        self.offsets = torch.tensor([0, self.mask.numel()], device=self.mask.device)
        self.logprobs = torch.where(self.mask, inputs.trainer_logprobs, 0.0)
        self.rollout = torch.where(self.mask, inputs.inference_logprobs, 0.0)
        self.weights = 1.0 if inputs.loss_weights is None else torch.where(self.mask, inputs.loss_weights, 0.0)
        with torch.no_grad():
            detached = self.logprobs.detach()
            self.moved = detached.exp() - self.rollout.exp()
            log_ratio = detached - self.rollout
            self.mismatch_kl = log_ratio.exp() - log_ratio - 1.0

    def mean(self, values: Tensor, tokens: Tensor) -> Tensor:
        return torch.where(tokens, values.detach(), 0.0).sum() / tokens.sum().clamp(min=1)

    def mismatch(self, dropped: Tensor) -> dict[str, Tensor]:
        return {
            "masked_mismatch_kl": self.mean(self.mismatch_kl, self.mask & dropped),
            "unmasked_mismatch_kl": self.mean(self.mismatch_kl, self.mask & ~dropped),
            "is_masked": self.mean(dropped.to(self.mismatch_kl.dtype), self.mask),
        }


_IMPORTANCE = PolicyLoss(
    surrogate="importance", ratio_anchor="rollout", clip_low=None, clip_high=None, aggregate="token_sum"
)


def _trust_region(c: _Columns, advantages: Tensor, dropped: Tensor, tau: float) -> Tensor:
    """Return sum_t w (-keep A r + tau x^2), the common form of prime-rl's three policy losses."""
    value = loss_value(
        _IMPORTANCE, c.logprobs, advantages=advantages * c.weights, mask=c.mask, rollout_logprobs=c.rollout,
        selection=~dropped, cu_seqlens=c.offsets,
    )  # fmt: skip
    penalty = 2.0 * kl_estimate(c.logprobs, c.rollout, "k2")  # k2 is x^2 / 2
    return value + tau * (torch.where(c.mask, penalty, 0.0) * c.weights).sum()


def _default(inputs: Any, o: Mapping[str, float]) -> Any:
    c = _Columns(inputs)
    advantages = torch.where(c.mask, inputs.advantages, 0.0)
    positive, negative = advantages > 0, advantages < 0
    above, below = c.moved > o["dppo_mask_high"], c.moved < -o["dppo_mask_low"]
    dropped = torch.where(positive, above, below)
    loss = _trust_region(c, o["adv_tau"] * advantages, dropped, o["kl_tau"])
    one = torch.ones_like(c.moved)
    metrics = {
        **c.mismatch(dropped),
        "is_masked_low": c.mean(one * (negative & below), c.mask),
        "is_masked_high": c.mean(one * (positive & above), c.mask),
        "masked_advantage_positive": c.mean(one * positive, c.mask & dropped),
        "masked_advantage_negative": c.mean(one * negative, c.mask & dropped),
    }
    return _outputs(loss, metrics)


def _ipo(inputs: Any, o: Mapping[str, float]) -> Any:
    c = _Columns(inputs)
    dropped = c.moved.abs() > o["ipo_threshold"]
    advantages = o["adv_tau"] * torch.where(c.mask, inputs.advantages, 0.0)
    return _outputs(_trust_region(c, advantages, dropped, o["kl_tau"]), c.mismatch(dropped))


def _ref_kl(inputs: Any, o: Mapping[str, float]) -> Any:
    del o
    c = _Columns(inputs)
    dropped = c.moved < -_REF_KL_BOUND
    advantages = torch.where(c.mask, inputs.ref_logprobs, 0.0) - c.logprobs.detach()
    loss = _trust_region(c, advantages, dropped, _REF_KL_TAU)
    metrics = {f"ref_kl/{name}": value for name, value in c.mismatch(dropped).items()}
    return _outputs(loss, {**metrics, "ref_kl": c.mean(advantages, c.mask)})


def _ce(inputs: Any, o: Mapping[str, float]) -> Any:
    del o
    c = _Columns(inputs)
    return _outputs(-(c.logprobs * c.weights).sum(), {"nll": c.mean(-c.logprobs, c.mask)})


def _outputs(loss: Tensor, metrics: dict[str, Tensor]) -> Any:
    outputs = HOST.attribute(HOST.module(_MODULE), "LossOutputs")
    return outputs(loss=loss, metrics={name: value.detach() for name, value in metrics.items()})


# our name -> (prime-rl's function, its config class)
_THEIRS: Mapping[str, tuple[str, str | None]] = {
    "default": ("default_loss_fn", "DefaultLossConfig"),
    "ipo": ("ipo_loss_fn", "IPOLossConfig"),
    "ref_kl": ("ref_kl_loss_fn", None),
    "ce": ("ce_loss_fn", None),
}
_COLUMNS = ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask", "loss_weights")


def _prove_once(
    name: str, inputs: Any, options: dict[str, float], prove: bool, ours: Callable[[Any, Mapping[str, float]], Any]
) -> None:
    if prove:
        _proofs.once((name, tuple(options.items())), lambda: _proved(name, inputs, options, ours))


def _proved(name: str, inputs: Any, options: dict[str, float], ours: Callable[[Any, Mapping[str, float]], Any]) -> bool:
    """Compare one sequence with prime-rl's own loss."""
    function, config = _THEIRS[name]
    module = HOST.module(_MODULE)
    call: list[Any] = []
    if config is None:
        original = HOST.function(module, function, ("inputs",))
    else:
        original = HOST.function(module, function, ("inputs", "loss_config"))
        call = [HOST.attribute(HOST.module(_CONFIGS), config)(**options)]
    few = {column: on_cpu(getattr(inputs, column)) for column in _COLUMNS}
    mask = few["loss_mask"]
    if not bool(mask.any()):
        return False
    # Masked entries may be nan, and a proof needs finite numbers.
    for column in ("trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages"):
        if few[column] is not None:
            few[column] = torch.where(mask, few[column], 0.0)

    def of(leaf: Tensor) -> Any:
        return types.SimpleNamespace(**{**few, "trainer_logprobs": leaf})

    return prove_loss(
        f"{HOST.adapter} ({name}_loss)",
        lambda leaf: ours(of(leaf), options).loss,
        lambda leaf: original(of(leaf), *call).loss,
        few["trainer_logprobs"],
        undo=_UNDO,
    )
