"""Liger-Kernel's classes on fastrl's losses: signatures, values and gradients beside the real ones, and refusals.

The real chunked losses are PyTorch code that runs on a CPU with compiled=False. Its cross-entropies need a GPU: there
PyTorch's own cross-entropy stands in.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from memory import MemoryWatch
from oracle import assert_as_accurate
from torch import Tensor

from fastrl.integrations import liger as ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    theirs = pytest.importorskip("liger_kernel.chunked_loss")
    theirs_supervised = pytest.importorskip("liger_kernel.transformers")

B, T, D, V = 4, 7, 12, 61
BIASED = pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])


def _close(name: str, got: Tensor, want: Tensor) -> None:
    """Both are float32 sums of a few hundred terms in different orders: 32 roundings of the largest magnitude."""
    granted = 32 * torch.finfo(torch.float32).eps * max(want.detach().abs().max().item(), 1.0)
    error = (got.detach().double() - want.detach().double()).abs().max().item()
    assert got.shape == want.shape, name
    assert error <= granted, f"{name}: {error:.3g} exceeds {granted:.3g}"


def _batch(biased: bool = True, seed: int = 0) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    target = torch.randint(0, V, (B, T), generator=generator)
    target[0, 4:] = target[2, :2] = target[3, 5:] = -100
    return {
        "hidden": normal(B, T, D),
        "weight": 0.6 * normal(V, D),
        "bias": normal(V) if biased else None,
        "target": target,
        "ref_hidden": normal(B, T, D + 3),
        "ref_weight": 0.6 * normal(V, D + 3),
        "ref_bias": 0.5 * normal(V) if biased else None,
    }


def _run(
    call: Callable[..., Any], batch: dict[str, Any], scale: float = 1.5
) -> tuple[Tensor, tuple[Tensor, ...], dict[str, Tensor]]:
    """Return the loss, its metrics, and the gradients of scale times the loss."""
    leaves = {k: batch[k].clone().requires_grad_() for k in ("hidden", "weight", "bias") if batch[k] is not None}
    result = call(**{**batch, **leaves})
    loss, others = result if isinstance(result, tuple) else (result, ())
    gradients = torch.autograd.grad(scale * loss, list(leaves.values()))
    return loss, others, dict(zip(leaves, gradients, strict=True))


def _same(call: Callable[[Any], Callable[..., Any]], name: str, batch: dict[str, Any], **options: Any) -> None:
    """Build the class of both with the same options and compare everything that comes out."""
    loss, others, gradients = _run(call(getattr(ours, name)(**options)), batch)
    real = getattr(theirs, name)(**options, compiled=False)
    want_loss, want_others, want_gradients = _run(call(real), batch)
    _close("loss", loss, want_loss)
    assert isinstance(others, type(want_others))
    assert len(others) == len(want_others)
    for index, (got, want) in enumerate(zip(others, want_others, strict=True)):
        assert not got.requires_grad
        _close(f"output {index}", got, want)
    for key, want in want_gradients.items():
        _close(f"gradient of {key}", gradients[key], want)


# --- signatures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(set(ours.__all__) - {"CrossEntropyOutput"}))
def test_the_signatures_are_those_of_liger(name: str) -> None:
    real = getattr(theirs, name, None) or getattr(theirs_supervised, name)
    for method in ("__init__", "forward"):
        got, want = (inspect.signature(getattr(kind, method)).parameters for kind in (getattr(ours, name), real))
        assert [(p.name, p.default) for p in got.values()] == [(p.name, p.default) for p in want.values()]


# --- GRPO -------------------------------------------------------------------------------------------------------------


def _grpo_batch(biased: bool = True) -> dict[str, Any]:
    batch: dict[str, Any] = _batch(biased)
    generator = torch.Generator().manual_seed(3)
    mask = (batch["target"] != -100).float()
    # Log-probs near the policy's own, so that some ratios are clipped and none is extreme.
    near = torch.log_softmax(batch["hidden"] @ batch["weight"].T + (batch["bias"] if biased else 0.0), -1)
    near = near.gather(-1, batch["target"].clamp(min=0)[..., None])[..., 0]
    batch |= {
        "mask": mask,
        "ids": batch["target"].clamp(min=0),
        "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1]),
        "old": near + 0.3 * torch.randn(B, T, generator=generator),
        "ref": near + 0.4 * torch.randn(B, T, generator=generator),
        "ratio": torch.exp(0.2 * torch.randn(B, T, generator=generator)),
    }
    return batch


def _grpo(reference: str = "logps", old: bool = True, **fixed: Any) -> Callable[[Any], Callable[..., Any]]:
    def bind(module: Any) -> Callable[..., Any]:
        def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, **batch: Any) -> Any:
            extra = dict(fixed)
            if reference == "logps":
                extra["ref_per_token_logps"] = batch["ref"]
            elif reference == "hidden":
                extra |= {key: batch[key.replace("input", "hidden")] for key in ("ref_input", "ref_weight", "ref_bias")}
            ratio = torch.where(batch["mask"] != 0, batch["ratio"], 1.0)
            named = {"token": ratio, "sequence": batch["ratio"][:, :1], "masked": ratio * (ratio > 0.9)}
            if isinstance(extra.get("vllm_is_ratio"), str):
                extra["vllm_is_ratio"] = named[extra["vllm_is_ratio"]]
            return module(
                hidden, weight, batch["ids"], batch["mask"], batch["advantages"], bias=bias,
                old_per_token_logps=batch["old"] if old else None, **extra,
            )  # fmt: skip

        return call

    return bind


GRPO_TYPES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo", "max_completion_length": 9},
    {"loss_type": "cispo", "epsilon_high": 1.1},
    {"loss_type": "sapo", "sapo_temperature_pos": 0.8, "sapo_temperature_neg": 1.4},
    {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_neg": 2.5},
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    {"loss_type": "dapo", "importance_sampling_level": "sequence", "epsilon_high": 0.05},
    {"loss_type": "dapo", "delta": 1.5},
    {"loss_type": "bnpo", "temperature": 0.7},
]


@pytest.mark.parametrize("options", GRPO_TYPES, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("kl", ["none", "k3", "corrected"])
def test_grpo_losses(options: dict[str, Any], kl: str) -> None:
    options = {**options, "beta": 0.0 if kl == "none" else 0.07, "use_bias_correction_kl": kl == "corrected"}
    _same(_grpo(), "LigerFusedLinearGRPOLoss", _grpo_batch(), **options)


@pytest.mark.parametrize("ratio", ["token", "sequence", "masked"])
@pytest.mark.parametrize("options", [*GRPO_TYPES[:6], *GRPO_TYPES[7:9]], ids=lambda o: "-".join(map(str, o.values())))
def test_grpo_takes_the_weights_of_the_rollout_engine(options: dict[str, Any], ratio: str) -> None:
    _same(_grpo(vllm_is_ratio=ratio), "LigerFusedLinearGRPOLoss", _grpo_batch(), **options)


def test_vespo_takes_the_weights_into_the_sequence_weight() -> None:
    _same(_grpo(vllm_is_ratio="token"), "LigerFusedLinearGRPOLoss", _grpo_batch(), loss_type="vespo")
    # A sequence's weight enters once, not once per token. A weight of 0 leaves the sequence out.
    for ratio in (torch.tensor([0.7, 1.6, 0.0, 1.1]), torch.tensor([[0.7], [1.6], [0.0], [1.1]])):
        _same(_grpo(vllm_is_ratio=ratio), "LigerFusedLinearGRPOLoss", _grpo_batch(), loss_type="vespo")
    module = ours.LigerFusedLinearGRPOLoss(loss_type="vespo")
    with pytest.raises(ValueError, match="needs old_per_token_logps"):
        _run(_grpo(old=False, vllm_is_ratio="token")(module), _grpo_batch())


@BIASED
@pytest.mark.parametrize("old", [True, False])
def test_grpo_forms_the_reference_and_stays_on_policy_without_old_logprobs(biased: bool, old: bool) -> None:
    batch = _grpo_batch(biased)
    _same(_grpo("hidden", old=old), "LigerFusedLinearGRPOLoss", batch, temperature=0.9)
    _same(_grpo("none", old=old), "LigerFusedLinearGRPOLoss", batch, use_ref_model=False)
    _same(_grpo("none", old=old, num_items_in_batch=11), "LigerFusedLinearGRPOLoss", batch, use_ref_model=False)
    _same(_grpo("none", old=old, num_items_in_batch=torch.tensor(11)), "LigerFusedLinearGRPOLoss", batch,
          use_ref_model=False, loss_type="grpo")  # fmt: skip


@pytest.mark.parametrize("options", GRPO_TYPES, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_a_completion_without_tokens_counts_as_liger_counts_it(options: dict[str, Any]) -> None:
    batch = _grpo_batch()
    batch["mask"][1] = 0.0
    _same(_grpo(), "LigerFusedLinearGRPOLoss", batch, **options)


def test_luspo_is_liger_s_without_a_kl_and_masks_the_kl() -> None:
    options: dict[str, Any] = {"loss_type": "luspo", "importance_sampling_level": "sequence"}
    batch = _grpo_batch()
    _same(_grpo(), "LigerFusedLinearGRPOLoss", batch, **options, beta=0.0)
    # Liger 0.8.5 adds the KL of masked tokens. Where nothing is masked the two agree.
    real = theirs.LigerFusedLinearGRPOLoss(**options, compiled=False)
    mine = ours.LigerFusedLinearGRPOLoss(**options)
    moved = {**batch, "ref": torch.where(batch["mask"] != 0, batch["ref"], batch["ref"] + 1.0)}
    assert _run(_grpo()(real), moved)[0] != _run(_grpo()(real), batch)[0]
    assert torch.equal(_run(_grpo()(mine), moved)[0], _run(_grpo()(mine), batch)[0])
    _same(_grpo(), "LigerFusedLinearGRPOLoss", {**batch, "mask": torch.ones(B, T)}, **options)


def test_grpo_advantages_of_any_accepted_shape_mean_the_same() -> None:
    batch = _grpo_batch()
    module = ours.LigerFusedLinearGRPOLoss()
    base = _run(_grpo()(module), batch)[0]
    for advantages in (batch["advantages"][:, None], batch["advantages"][:, None].expand(B, T)):
        assert torch.equal(_run(_grpo()(module), {**batch, "advantages": advantages})[0], base)
    with pytest.raises(ValueError, match="advantages"):
        _run(_grpo()(module), {**batch, "advantages": torch.ones(B + 1)})


def test_what_stands_under_the_mask_of_grpo_has_no_effect() -> None:
    batch = _grpo_batch()
    dead = batch["mask"] == 0
    noisy = {**batch, "ids": batch["ids"].masked_fill(dead, -100)}
    for key in ("old", "ref"):
        noisy[key] = batch[key].masked_fill(dead, float("nan"))
    module = ours.LigerFusedLinearGRPOLoss()
    (loss, others, gradients), (want, want_others, want_gradients) = (_run(_grpo()(module), b) for b in (noisy, batch))
    assert torch.equal(loss, want)
    for a, b in zip((*others, *gradients.values()), (*want_others, *want_gradients.values()), strict=True):
        assert torch.equal(a, b)


# --- preferences ------------------------------------------------------------------------------------------------------


def _pairs(reference: bool = True, **fixed: Any) -> Callable[[Any], Callable[..., Any]]:
    def bind(module: Any) -> Callable[..., Any]:
        def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **batch: Any) -> Any:
            extra = dict(fixed)
            if reference:
                extra |= {key: batch[key.replace("input", "hidden")] for key in ("ref_input", "ref_weight", "ref_bias")}
            return module(weight, hidden, target, bias=bias, **extra)

        return call

    return bind


DPO_TYPES = {name: {} for name in theirs.LigerFusedLinearDPOLoss._SUPPORTED_LOSS_TYPES} | {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "discopop": {"discopop_tau": 0.3},
}


@BIASED
@pytest.mark.parametrize("loss_type", sorted(DPO_TYPES))
def test_dpo_losses(loss_type: str, biased: bool) -> None:
    options: dict[str, Any] = {"loss_type": loss_type, "beta": 0.3, **DPO_TYPES[loss_type]}
    batch = _batch(biased)
    _same(_pairs(), "LigerFusedLinearDPOLoss", batch, **options)
    _same(_pairs(), "LigerFusedLinearDPOLoss", batch, **options, compute_nll_loss=True, alpha=0.7)
    _same(_pairs(False), "LigerFusedLinearDPOLoss", batch, **options, use_ref_model=False, average_log_prob=True)


def test_label_smoothing_of_dpo_is_the_conservative_one() -> None:
    # Liger 0.8.5 takes the option for "sigmoid" and leaves it out of the loss.
    batch = _batch()
    plain, smooth = (_run(_pairs()(ours.LigerFusedLinearDPOLoss(label_smoothing=e)), batch)[0] for e in (0.0, 0.25))
    _, found, _ = _run(_pairs()(ours.LigerFusedLinearDPOLoss()), batch)
    z = found[5] - found[6]
    _close("smoothed", smooth, (-0.75 * F.logsigmoid(z) - 0.25 * F.logsigmoid(-z)).mean())
    assert plain != smooth
    real = theirs.LigerFusedLinearDPOLoss(label_smoothing=0.25, compiled=False)
    _close("Liger's", _run(_pairs()(real), batch)[0], plain)


@BIASED
def test_cpo_simpo_and_orpo(biased: bool) -> None:
    batch = _batch(biased)
    call = _pairs(False)
    for nll, average in itertools.product((True, False), repeat=2):
        options: dict[str, Any] = {"beta": 0.4, "compute_nll_loss": nll}
        _same(
            call, "LigerFusedLinearCPOLoss", batch, **options, alpha=0.6, label_smoothing=0.1, average_log_prob=average
        )
        _same(call, "LigerFusedLinearSimPOLoss", batch, **options, alpha=0.6, label_smoothing=0.1, gamma=0.8)
        _same(call, "LigerFusedLinearORPOLoss", batch, **options)


def test_an_nll_of_weight_0_is_still_returned() -> None:
    for name in ("LigerFusedLinearDPOLoss", "LigerFusedLinearCPOLoss", "LigerFusedLinearSimPOLoss"):
        _same(_pairs(name.endswith("DPOLoss")), name, _batch(), compute_nll_loss=True, alpha=0.0)


def test_orpo_takes_the_nll_under_labels_of_its_own() -> None:
    batch: dict[str, Any] = _batch()
    everything = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(8))
    everything[0, 6] = -100
    _same(_pairs(False, nll_target=everything), "LigerFusedLinearORPOLoss", batch, beta=0.4)
    module = ours.LigerFusedLinearORPOLoss(compute_nll_loss=False)
    with pytest.raises(ValueError, match="compute_nll_loss=False"):
        _run(_pairs(False, nll_target=everything)(module), batch)


def _kto(reference: bool, kl: Tensor | float | None) -> Callable[[Any], Callable[..., Any]]:
    def bind(module: Any) -> Callable[..., Any]:
        def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **batch: Any) -> Any:
            extra: dict[str, Any] = {}
            if reference:
                extra |= {key: batch[key.replace("input", "hidden")] for key in ("ref_input", "ref_weight", "ref_bias")}
            labels = torch.tensor([True, False, False, True])
            return module(hidden, weight, target, bias=bias, preference_labels=labels, kl=kl, **extra)

        return call

    return bind


@BIASED
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(
    "kl", [None, 0.4, torch.tensor(0.8), torch.tensor([0.1, 0.9, 2.0, 0.0])], ids=["0", "float", "one", "rows"]
)
def test_kto(biased: bool, average: bool, kl: Tensor | float | None) -> None:
    for reference in (True, False):
        # In chunks of less than the batch Liger 0.8.5 compares every row with every reference point.
        options: dict[str, Any] = {"use_ref_model": reference, "average_log_prob": average, "chunk_size": B}
        _same(_kto(reference, kl), "LigerFusedLinearKTOLoss", _batch(biased), **options, beta=0.3)


# --- distillation and cross-entropy -----------------------------------------------------------------------------------


@BIASED
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("weights", [(0.4, 0.9), (0.0, 1.0), (1.0, 0.0)])
def test_jsd(biased: bool, beta: float, weights: tuple[float, float]) -> None:
    def bind(module: Any) -> Callable[..., Any]:
        def call(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **batch: Any) -> Any:
            loss, *others = module(
                hidden.flatten(0, 1), weight, batch["ref_hidden"].flatten(0, 1), batch["ref_weight"], target.flatten(),
                bias, batch["ref_bias"],
            )  # fmt: skip
            return loss, tuple(x.detach() for x in others)

        return call

    batch: dict[str, Any] = _batch(biased)
    _same(
        bind, "LigerFusedLinearJSDLoss", batch, beta=beta, weight_hard_loss=weights[0], weight_soft_loss=weights[1],
        temperature=1.6, return_soft_hard_loss=True,
    )  # fmt: skip


def _eager_cross_entropy(logits: Tensor, target: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(loss, z-loss) by PyTorch, from the formulas of Liger's documentation."""
    softcap, z, reduction = (
        options.get("softcap"),
        options.get("lse_square_scale", 0.0),
        options.get("reduction", "mean"),
    )
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    per_token = F.cross_entropy(logits, target, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    live = target != -100
    z_loss = torch.where(live, z * logits.logsumexp(-1) ** 2, 0.0)
    scale = torch.ones_like(z_loss)
    if options.get("use_token_scaling"):
        scale = torch.softmax(logits.detach(), -1).gather(-1, target.clamp(min=0)[:, None])[:, 0]
    values = ((per_token + z_loss) * scale, z_loss.detach() * scale)
    if reduction == "none":
        return values
    return tuple(v.sum() / (live.sum() if reduction == "mean" else 1) for v in values)  # type: ignore[return-value]


CROSS_ENTROPIES: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none", "lse_square_scale": 1e-2},
    {"label_smoothing": 0.1, "lse_square_scale": 1e-3},
    {"softcap": 2.5},
    {"softcap": 2.5, "lse_square_scale": 1e-2, "reduction": "sum"},
    {"use_token_scaling": True, "lse_square_scale": 1e-2},
]


@pytest.mark.parametrize(
    ("options", "linear"),
    [
        pytest.param(options, linear, id=f"{'hidden' if linear else 'logits'}-{'-'.join(options) or 'plain'}")
        for options, linear in itertools.product(CROSS_ENTROPIES, (True, False))
        if linear or "use_token_scaling" not in options
    ],
)
def test_cross_entropy(options: dict[str, Any], linear: bool) -> None:
    kind = ours.LigerFusedLinearCrossEntropyLoss if linear else ours.LigerCrossEntropyLoss
    flags = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
    batch: dict[str, Any] = _batch()
    target = batch["target"].flatten()

    def evaluate(eager: bool, dtype: torch.dtype) -> tuple[Any, list[Tensor]]:
        hidden, weight, bias = (batch[k].to(dtype).requires_grad_() for k in ("hidden", "weight", "bias"))
        logits = hidden.flatten(0, 1) @ weight.T + bias
        leaves = [hidden, weight, bias]
        if eager:
            output = _eager_cross_entropy(logits, target, options)
            loss = output[0]
        elif linear:
            output = kind(**options, **flags)(weight, hidden.flatten(0, 1), target, bias)
            loss = output.loss
        else:
            output = kind(**options, **flags)(logits, target)
            loss = output.loss
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=dtype).view(loss.shape)
        return output, list(torch.autograd.grad((upstream * loss).sum(), leaves))

    got, gradients = evaluate(False, torch.float32)
    exact, exact_gradients = evaluate(True, torch.float64)
    eager, eager_gradients = evaluate(True, torch.float32)
    assert_as_accurate("loss", got.loss, exact[0], eager[0])
    assert_as_accurate("z_loss", got.z_loss, exact[1], eager[1])
    for name, mine, want, plain in zip(
        ("hidden", "weight", "bias"), gradients, exact_gradients, eager_gradients, strict=True
    ):
        assert_as_accurate(f"gradient of {name}", mine, want, plain)
    largest = (batch["hidden"].flatten(0, 1) @ batch["weight"].T + batch["bias"]).argmax(-1)
    live = target != -100
    assert torch.equal(got.predicted_tokens, torch.where(live, largest, -1))
    hits = ((largest == target) & live).float()
    per_token = options.get("reduction") == "none"
    torch.testing.assert_close(got.token_accuracy, hits if per_token else hits.sum() / live.sum())
    bare = kind(**options)
    assert isinstance(bare(batch["weight"], batch["hidden"].flatten(0, 1), target) if linear else bare(
        torch.randn(target.numel(), V), target), Tensor)  # fmt: skip


def test_of_equal_logits_the_lowest_id_is_the_prediction() -> None:
    # Liger keeps the first of equal logits, and counts a token whose label is another of them as missed.
    logits = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 2.0, 2.0], [3.0, 0.0, 0.0]])
    target = torch.tensor([0, 1, 2, -1])
    output = ours.LigerCrossEntropyLoss(ignore_index=-1, return_token_accuracy=True, return_predicted_tokens=True)(
        logits, target
    )
    assert output.predicted_tokens.tolist() == [0, 0, 1, -1]
    assert float(output.token_accuracy) == pytest.approx(1 / 3)


def test_nothing_to_learn_from_gives_an_attached_zero() -> None:
    target = torch.full((B, T), -100)
    hidden, weight = torch.randn(B, T, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
    losses = [
        ours.LigerFusedLinearCrossEntropyLoss()(weight, hidden.flatten(0, 1), target.flatten()),
        ours.LigerCrossEntropyLoss()(hidden.flatten(0, 1) @ weight.T, target.flatten()),
        ours.LigerFusedLinearCPOLoss()(weight, hidden, target)[0] - F.softplus(torch.zeros(())),
        ours.LigerFusedLinearGRPOLoss(use_ref_model=False)(
            hidden, weight, target.clamp(min=0), torch.zeros(B, T), torch.ones(B)
        )[0],
    ]
    for loss in losses:
        assert abs(loss.item()) < 1e-6
        gradients = torch.autograd.grad(loss, [hidden, weight])
        assert all(not g.any() for g in gradients)


# --- refusals and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("GRPO", {"loss_type": "gspo"}, "loss_type must be one of"),
        ("GRPO", {"importance_sampling_level": "turn"}, "importance_sampling_level must be one of"),
        ("GRPO", {"loss_type": "cispo", "importance_sampling_level": "sequence"}, "does not go with loss_type='cispo'"),
        ("GRPO", {"loss_type": "luspo"}, "use importance_sampling_level='sequence'"),
        ("GRPO", {"loss_type": "sapo", "delta": 2.0}, "delta is read by"),
        ("GRPO", {"loss_type": "dr_grpo"}, "max_completion_length is needed"),
        ("GRPO", {"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "tau_pos must be"),
        ("GRPO", {"delta": 1.0}, "max_ratio must be"),
        ("GRPO", {"temperature": 0.0}, "temperature must be"),
        ("GRPO", {"beta": -0.1}, "beta must be"),
        ("DPO", {"loss_type": "ipo"}, "loss_type must be one of"),
        ("DPO", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
        ("DPO", {"loss_type": "exo_pair"}, "label_smoothing must be > 0"),
        ("DPO", {"discopop_tau": 0.1}, "discopop_tau is read by"),
        ("CPO", {"beta": 0.0}, "beta"),
        ("SimPO", {"label_smoothing": 1.5}, "label_smoothing"),
        ("CrossEntropy", {"ce_weight": torch.ones(V)}, "ce_weight"),
        ("CrossEntropy", {"accum_dtype": torch.bfloat16}, "accum_dtype must be"),
        ("CrossEntropy", {"softcap": 3.0, "label_smoothing": 0.1}, "label_smoothing with softcap"),
        ("CrossEntropy", {"reduction": "max"}, "reduction must be one of"),
        ("JSD", {"temperature": 0.0}, "temperature must be"),
        ("JSD", {"beta": 1.5}, "beta must be"),
    ],
)
def test_an_option_that_is_not_supported_raises_when_the_object_is_built(
    name: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(ours, f"LigerFusedLinear{name}Loss")(**options)


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("LigerFusedLinearGRPOLoss", "beta"),
        ("LigerFusedLinearGRPOLoss", "epsilon_high"),
        ("LigerFusedLinearDPOLoss", "label_smoothing"),
        ("LigerFusedLinearSimPOLoss", "gamma"),
        ("LigerFusedLinearORPOLoss", "compute_nll_loss"),
        ("LigerFusedLinearKTOLoss", "beta"),
    ],
)
def test_an_option_cannot_be_changed_afterwards(name: str, option: str) -> None:
    module = getattr(ours, name)()
    with pytest.raises(AttributeError, match=f"{option} cannot be changed.*build another"):
        setattr(module, option, 0.3)
    module.chunk_size = 4


def test_calls_that_do_not_fit_say_what_was_expected() -> None:
    batch: dict[str, Any] = _grpo_batch()
    with pytest.raises(ValueError, match="use_ref_model=True needs"):
        _run(_grpo("none")(ours.LigerFusedLinearGRPOLoss()), batch)
    with pytest.raises(ValueError, match="use_ref_model=False"):
        _run(_grpo("logps")(ours.LigerFusedLinearGRPOLoss(use_ref_model=False)), batch)
    with pytest.raises(ValueError, match="ref_input and ref_weight"):
        _run(_pairs(False)(ours.LigerFusedLinearDPOLoss()), batch)
    with pytest.raises(ValueError, match="use_ref_model=False"):
        _run(_pairs()(ours.LigerFusedLinearDPOLoss(use_ref_model=False)), batch)
    odd = {k: v[:3] if k in ("hidden", "target") else v for k, v in batch.items()}
    with pytest.raises(ValueError, match="2P rows"):
        _run(_pairs(False)(ours.LigerFusedLinearCPOLoss()), odd)
    with pytest.raises(ValueError, match="preference_labels"):
        ours.LigerFusedLinearKTOLoss()(batch["hidden"], batch["weight"], batch["target"])
    with pytest.raises(ValueError, match="kl must be one number"):
        _run(_kto(False, torch.ones(3))(ours.LigerFusedLinearKTOLoss()), batch)


def test_no_tensor_of_logits_is_ever_allocated() -> None:
    # Pairs are taken in blocks of up to four chunks, 1024 rows.
    rows, length, width, vocabulary = 4, 1280, 16, 1000
    hidden = torch.randn(rows, length, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    target = torch.randint(0, vocabulary, (rows, length))
    for call in (
        lambda: ours.LigerFusedLinearDPOLoss(use_ref_model=False)(weight, hidden, target)[0],
        lambda: ours.LigerFusedLinearCrossEntropyLoss(label_smoothing=0.1)(
            weight, hidden.flatten(0, 1), target.flatten()
        ),
        lambda: ours.LigerFusedLinearGRPOLoss(use_ref_model=False)(
            hidden, weight, target, torch.ones(rows, length), torch.ones(rows)
        )[0],
    ):
        with MemoryWatch() as watch:
            call().backward()
        assert watch.largest < rows * length * vocabulary * 4 / 4
