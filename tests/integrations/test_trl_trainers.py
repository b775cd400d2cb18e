"""Every trainer and loss of TRL, alone and with fastrl: the same losses, logs and weights, step by step."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("peft")

import trl_runs
from peft import LoraConfig
from trl_runs import Run, assert_same, train

from fastrl.integrations import trl as fast
from fastrl.integrations.common.proof import AdapterMismatchError

pytestmark = trl_runs.QUIET

DPO_LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
]  # fmt: skip
GRPO_LOSSES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]
SEQUENCE = {"importance_sampling_level": "sequence"}

DIVERGENCES = ["forward_kl", "js_divergence", "alpha_divergence"]
ADAPTIVE = {"use_adaptive_entropy": True, "entropy_coef": 0.05, "entropy_target": 9.0}
TRUNCATED = {"mask_truncated_completions": True, "max_completion_length": 12}

SETTINGS: list[tuple[str, str, dict[str, Any]]] = [
    ("sft-nll", "sft", {}),
    ("sft-dft", "sft", {"loss_type": "dft"}),
    ("sft-packed", "sft", {"packing": True, "max_length": 32, "packing_strategy": "wrapped"}),
    *((f"dpo-{name}", "dpo", {"loss_type": [name], "label_smoothing": 0.1}) for name in DPO_LOSSES),
    *((f"dpo-{name}", "dpo", {"f_divergence_type": name}) for name in DIVERGENCES),
    ("dpo-ld", "dpo", {"ld_alpha": 0.5}),
    ("dpo-wpo", "dpo", {"use_weighting": True}),
    ("dpo-mpo", "dpo", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
    ("dpo-sft-weighted", "dpo", {"loss_type": ["sft"], "loss_weights": [0.5]}),
    ("kto", "kto", {}),
    ("kto-apo", "kto", {"loss_type": "apo_zero_unpaired"}),
    ("kto-weights", "kto", {"desirable_weight": 1.5, "undesirable_weight": 0.4, "beta": 0.3}),
    ("kto-precomputed", "kto", {"precompute_ref_log_probs": True}),
    ("kto-apo-precomputed", "kto", {"loss_type": "apo_zero_unpaired", "precompute_ref_log_probs": True}),
    *((f"grpo-{name}", "grpo", {"loss_type": name}) for name in GRPO_LOSSES),
    *((f"grpo-{name}-sequence", "grpo", {"loss_type": name, **SEQUENCE}) for name in GRPO_LOSSES if name != "vespo"),
    ("grpo-kl", "grpo", {"beta": 0.3}),
    ("grpo-kl-plain", "grpo", {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "dr_grpo"}),
    ("grpo-kl-sequence", "grpo", {"beta": 0.3, "loss_type": "grpo", **SEQUENCE}),
    ("grpo-delta", "grpo", {"delta": 1.016, "epsilon_high": 0.015, "learning_rate": 0.5}),
    ("grpo-entropy", "grpo", {"entropy_coef": 0.1}),
    ("grpo-entropy-adaptive", "grpo", {**ADAPTIVE, "loss_type": "sapo"}),
    ("grpo-top-entropy", "grpo", {"top_entropy_quantile": 0.5, "entropy_coef": 0.1}),
    ("grpo-off-policy", "grpo", {"off_policy_mask_threshold": 0.0, "loss_type": "grpo"}),
    ("grpo-truncated", "grpo", {**TRUNCATED, "loss_type": "grpo", "entropy_coef": 0.1}),
    ("rloo", "rloo", {"beta": 0.0}),
    ("rloo-kl", "rloo", {"beta": 0.2}),
]
LOGPROBS_FIRST = {"dpo-aot", "dpo-aot_unpaired", "dpo-ld", "dpo-wpo", "grpo-top-entropy", "grpo-off-policy"}


@pytest.fixture(scope="module", autouse=True)
def _light_heap() -> Iterator[None]:
    """Trainers collect garbage at every start. Freezing keeps the objects imported by now out of that."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trl_runs.tiny_folder(tmp_path_factory.mktemp("model"))


def compare(kind: str, folder: Path, tmp_path: Path, options: dict[str, Any], **more: Any) -> Run:
    """Train three times, compare, and return the run with the fused loss."""
    theirs = train(kind, folder, tmp_path, options, **more)
    ours = theirs
    for mode in ("patched", "fast"):
        ours = train(kind, folder, tmp_path, options, mode=mode, **more)
        assert_same(ours, theirs)
    return ours


@pytest.mark.parametrize(("name", "kind", "options"), SETTINGS, ids=[s[0] for s in SETTINGS])
def test_setting(name: str, kind: str, options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    run = compare(kind, folder, tmp_path, options)
    expected = "log-probs first" if name in LOGPROBS_FIRST else "formed in the forward: 3 GEMM units"
    assert expected in run.path


def test_the_clip_is_reached(folder: Path, tmp_path: Path) -> None:
    """The comparison of the clipped losses has clipped tokens in it."""
    for kind in ("grpo", "rloo"):
        logs = train(kind, folder, tmp_path, {}, mode="fast").logs
        assert max(log.get("clip_ratio/region_mean", 0.0) for log in logs) > 0.1


@pytest.mark.parametrize("precomputed", [False, True])
def test_kto_against_another_reference(precomputed: bool, folder: Path, tmp_path: Path) -> None:
    """The KL of the mismatched completions, zero at the first step against the policy itself, moves every row."""
    reference = trl_runs.tiny_folder(tmp_path / "reference", seed=1)
    options = {"precompute_ref_log_probs": precomputed, "beta": 0.2}
    run = compare("kto", folder, tmp_path, options, ref_folder=reference)
    assert "3 GEMM units" in run.path
    assert any(log.get("kl", 0.0) > 0.1 for log in run.logs)


def test_kto_rows_of_one_label(folder: Path, tmp_path: Path) -> None:
    """Batches of desirable rows alone, of undesirable rows alone, and blocks of the head that hold either."""

    def sort(trainer: Any) -> None:
        trainer.train_dataset = trainer.train_dataset.sort("label")

    compare("kto", folder, tmp_path, {}, prepare=sort, ref_folder=trl_runs.tiny_folder(tmp_path / "reference", seed=1))


# --- other columns of a batch -----------------------------------------------------------------------------------------


def rollout(trainer: Any, change: Any) -> None:
    """Let `change(trainer, output)` add columns to the trainer's rollouts."""
    generate = trainer._generate_and_score_completions

    def wrapped(inputs: Any) -> dict[str, Any]:
        trainer.use_vllm = False
        output = generate(inputs)
        change(trainer, output)
        return output

    trainer._generate_and_score_completions = wrapped


def corrected(mode: str) -> Any:
    """Return a change after which a trainer corrects for another engine's log-probs, as if they came from vLLM."""

    def change(trainer: Any, output: dict[str, Any]) -> None:
        mask, old = output["completion_mask"], output["old_per_token_logps"]
        noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(5))
        rollout_logprobs = old + 0.1 * noise
        rollout_logprobs[0, 1] = torch.nan
        rollout_logprobs[1, 2] += 1.0
        gap = torch.nan_to_num((old - rollout_logprobs) * mask)
        ratio = (gap.sum(-1, keepdim=True) if mode.startswith("sequence") else gap).exp()
        low, high = trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max
        if mode.endswith("truncate"):
            ratio = ratio.clamp(low, high)
        else:
            ratio = torch.where((ratio < low) | (ratio > high), 0.0, ratio)
        output |= {"sampling_per_token_logps": rollout_logprobs, "importance_sampling_ratio": ratio}
        trainer.use_vllm = True

    def prepare(trainer: Any) -> None:
        trainer.args.use_vllm = True
        if hasattr(trainer, "fastrl_loss"):
            trainer.fastrl_loss = fast.policy_loss_from_config(trainer.args)
            assert trainer.fastrl_loss.correction is not None
        rollout(trainer, change)

    return prepare


@pytest.mark.parametrize(
    ("mode", "loss_type"),
    [
        ("token_truncate", "dapo"),
        ("token_mask", "grpo"),
        ("sequence_truncate", "sapo"),
        ("sequence_mask", "dapo"),
        ("token_truncate", "vespo"),
        ("token_mask", "vespo"),
        ("sequence_truncate", "vespo"),
        ("sequence_mask", "vespo"),
    ],
)
def test_rollout_correction(mode: str, loss_type: str, folder: Path, tmp_path: Path) -> None:
    options = {
        "loss_type": loss_type,
        "vllm_importance_sampling_mode": mode,
        "vllm_importance_sampling_clip_max": 1.5,
        "vllm_importance_sampling_clip_min": 0.6,
        "beta": 0.1,
    }
    run = compare("grpo", folder, tmp_path, options, prepare=corrected(mode))
    assert "3 GEMM units" in run.path


def with_tools(trainer: Any, output: dict[str, Any]) -> None:
    """Mark tokens as written by a tool, and give the advantages per token."""
    mask = output["completion_mask"].clone()
    mask[:, 1::3] = 0
    output["tool_mask"] = mask
    signs = torch.ones(mask.shape[1])
    signs[::2] = -0.5
    output["advantages"] = output["advantages"][:, None] * signs


def test_tokens_of_a_tool_keep_their_log_probs() -> None:
    """TRL computes with these tokens and multiplies by zero, so their numbers must be finite for any old log-prob."""
    from fastrl.integrations.trl._logprobs import request_of
    from fastrl.integrations.trl._prediction import HeadCall, PolicyPrediction
    from fastrl.ops import linear_token_logprobs

    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(6, 8, generator=generator), torch.randn(11, 8, generator=generator)
    weight.requires_grad_()
    labels = torch.arange(6)
    inputs = {"mask": torch.tensor([1, 0, 1, 1, 0, 1]), "cu_seqlens": torch.tensor([0, 6]), "advantages": torch.ones(1)}
    request = request_of(hidden, 0.9, None, 1.0, ("log_probs", "entropy"), False)
    loss = fast.policy_loss_from_config(bare_config("grpo"))
    fused = PolicyPrediction(loss, inputs).fused(HeadCall(hidden, weight, None, labels, request))
    exact = linear_token_logprobs(hidden, weight, labels, temperature=0.9)
    assert torch.equal(fused.logprobs, exact.logprobs)
    assert torch.equal(fused.entropy, exact.entropy)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "vespo"])
def test_tool_mask_and_token_advantages(loss_type: str, folder: Path, tmp_path: Path) -> None:
    options = {"loss_type": loss_type, "entropy_coef": 0.05, "beta": 0.1}
    run = compare("grpo", folder, tmp_path, options, prepare=lambda trainer: rollout(trainer, with_tools))
    assert "3 GEMM units" in run.path


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sft", {}),
        ("dpo", {}),
        ("kto", {}),
        ("grpo", {"entropy_coef": 0.1, "loss_type": "dapo", "beta": 0.2}),
        ("grpo", {"entropy_coef": 0.1, "loss_type": "grpo"}),
        ("rloo", {}),
    ],
    ids=["sft", "dpo", "kto", "grpo-dapo", "grpo-grpo", "rloo"],
)
def test_gradient_accumulation(kind: str, options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    options = {**options, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    run = compare(kind, folder, tmp_path, options)
    assert len(run.losses) == 4


@pytest.mark.parametrize(
    ("kind", "options", "units"),
    [
        ("sft", {}, "frozen head, gradients of the log-probs kept: 2 GEMM units"),
        ("dpo", {"loss_type": ["sigmoid", "sft"]}, "frozen head, gradients of the log-probs kept: 2 GEMM units"),
        ("kto", {}, "frozen head, gradients of the log-probs kept: 2 GEMM units"),
        ("grpo", {"beta": 0.2}, "frozen head, gradients of the log-probs kept: 2 GEMM units"),
        ("grpo", {"entropy_coef": 0.1}, "formed in the forward: 2 GEMM units"),
        ("rloo", {"beta": 0.2}, "frozen head, gradients of the log-probs kept: 2 GEMM units"),
    ],
    ids=["sft", "dpo", "kto", "grpo", "grpo-entropy", "rloo"],
)
def test_lora(kind: str, options: dict[str, Any], units: str, folder: Path, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=True)
    run = compare(kind, folder, tmp_path, {**options, "learning_rate": 0.5}, peft_config=lora)
    assert run.path == units or units in run.path


@pytest.mark.parametrize("kind", ["sft", "grpo"])
def test_softcap(kind: str, tmp_path: Path) -> None:
    compare(kind, trl_runs.tiny_folder(tmp_path / "gemma2", family="gemma2"), tmp_path, {})


def test_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path: Path) -> None:
    """The load-balancing loss is TRL's, added to the fused one and logged."""
    folder = trl_runs.tiny_experts(tmp_path / "experts")
    for kind in ("sft", "grpo"):
        run = compare(kind, folder, tmp_path, {"router_aux_loss_coef": 0.5})
        assert run.logs[0]["aux_loss"] > 0.0
        assert "3 GEMM units" in run.path


def test_head_cast_to_float32(folder: Path, tmp_path: Path) -> None:
    run = compare("grpo", folder, tmp_path, {"cast_lm_head_to_fp32": True, "bf16": True})
    assert "3 GEMM units" in run.path


def test_autocast(folder: Path, tmp_path: Path) -> None:
    """Under bf16 autocast TRL rounds its logits, and so its log-probs, to bf16. The losses agree to that rounding."""
    for kind in ("sft", "dpo"):
        theirs = train(kind, folder, tmp_path, {"bf16": True})
        for mode in ("patched", "fast"):
            ours = train(kind, folder, tmp_path, {"bf16": True}, mode=mode)
            assert ours.losses == pytest.approx(theirs.losses, rel=torch.finfo(torch.bfloat16).eps)


def test_rounded_logits_take_the_log_probs_first(folder: Path, tmp_path: Path) -> None:
    with fast.patched(round_logits=True):
        ours = train("sft", folder, tmp_path, {"bf16": True}, mode="fast")
    assert "round_logits=True" in ours.path
    theirs = train("sft", folder, tmp_path, {"bf16": True})
    assert ours.losses == pytest.approx(theirs.losses, rel=torch.finfo(torch.bfloat16).eps)
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=1e-5)  # before any weight has moved


def test_evaluation(folder: Path, tmp_path: Path) -> None:
    """The loss of an evaluation is TRL's, and predicts no gradient."""
    losses = []
    for trainer in (None, fast.FastDPOTrainer):
        made = trl_runs.make_trainer("dpo", folder, tmp_path, {}, trainer, eval_dataset=trl_runs.dataset("dpo"))
        losses.append(made.evaluate()["eval_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert made.fastrl_path == ""


def bare_config(kind: str, **options: Any) -> Any:
    return trl_runs.CONFIGS[kind](output_dir="unused", use_cpu=True, bf16=False, **options)


def test_pairs_without_a_prompt(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a prompt nothing predicts the first token, but TRL's averages count it."""
    pairs = trl_runs.dataset("dpo").map(lambda row: {"prompt": "", "chosen": row["chosen"] + ".", "rejected": "no!"})
    monkeypatch.setattr(trl_runs, "dataset", lambda kind: pairs)
    options = {"loss_type": ["ipo", "sigmoid_norm", "sft"], "max_steps": 1}
    assert "3 GEMM units" in compare("dpo", folder, tmp_path, options).path


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_compiled_reference_has_no_truth_value(kind: str, folder: Path, tmp_path: Path) -> None:
    """`bool` of a compiled model asks the model for its length, which raises."""

    def length(self: Any) -> int:
        raise TypeError(f"{type(self).__name__} does not support len()")

    def compiled(trainer: Any) -> None:
        reference = trainer.ref_model
        reference.__class__ = type(type(reference).__name__, (type(reference),), {"__len__": length})

    run = train(kind, folder, tmp_path, {"max_steps": 1}, mode="fast", prepare=compiled)
    assert "3 GEMM units" in run.path


def test_a_subclass_keeps_what_it_adds_to_the_loss(folder: Path, tmp_path: Path) -> None:
    class Regularised(trl_runs.TRAINERS["sft"]):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            return loss + 1e-3 * sum(p.square().sum() for p in self.model.parameters())

    weights = []
    for kind in (Regularised, type("Fast", (fast.FastSFTTrainer, Regularised), {})):
        trainer = trl_runs.make_trainer("sft", folder, tmp_path, {"max_steps": 1}, kind)
        trainer.train()
        weights.append(trl_runs.weights(trainer.model))
    assert "3 GEMM units" in trainer.fastrl_path
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0.0, atol=1e-6)
    with pytest.raises(NotImplementedError, match="put the class that knows it in front"):
        trl_runs.make_trainer("sft", folder, tmp_path, {}, type("Bare", (fast.FastLossMixin, Regularised), {}))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_liger_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="use_liger_kernel=True does not go together"):
        fast.policy_loss_from_config(bare_config("grpo", use_liger_kernel=True))
    with pytest.raises(ValueError, match="use_liger_kernel=True does not go together"):
        trl_runs.make_trainer("sft", folder, tmp_path, {"use_liger_kernel": True}, fast.FastSFTTrainer)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("grpo", {"loss_type": "gmpo"}, "loss_type must be one of 'grpo'"),
        ("grpo", {"importance_sampling_level": "turn"}, "importance_sampling_level must be 'token' or 'sequence'"),
        ("grpo", {"delta": 1.1, "epsilon": 0.2}, "delta must be > 1 \\+ epsilon_high"),
        ("grpo", {"loss_type": "vespo", "beta": 0.1, **SEQUENCE}, "use importance_sampling_level='token'"),
        ("grpo", {"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length, which is None"),
        ("grpo", {"beta": -0.1}, "kl_coef"),
        ("grpo", {"epsilon": 1.5}, "clip_low"),
        ("sft", {"loss_type": "ce"}, "loss_type must be one of 'nll', 'dft'"),
        ("dpo", {"loss_type": ["sigmoid", "simulated"]}, "unknown preference loss 'simulated'"),
        ("dpo", {"loss_type": ["sft"], "use_weighting": True}, "weighting"),
        ("dpo", {"loss_type": ["exo_pair"], "label_smoothing": 0.0}, "label_smoothing"),
        ("kto", {"loss_type": "bco"}, "loss_type must be one of 'kto', 'apo_zero_unpaired', got 'bco'"),
        ("kto", {"beta": 0.0}, "beta"),
        ("kto", {"undesirable_weight": -1.0}, "undesirable_weight"),
    ],
)
def test_options_without_a_counterpart_are_named(kind: str, options: dict[str, Any], message: str) -> None:
    config = bare_config(kind, **options)
    translate = fast.preference_loss_from_config if kind in ("dpo", "kto") else fast.policy_loss_from_config
    with pytest.raises(ValueError, match=message) as error:
        translate(config)
    assert type(config).__name__ in str(error.value)


def test_options_that_short_runs_do_not_reach() -> None:
    loss = fast.policy_loss_from_config(bare_config("grpo", delta=1.5, epsilon_high=0.3))
    assert (loss.clip_low, loss.clip_high, loss.max_ratio) == (0.2, 0.3, 1.5)
    loss = fast.policy_loss_from_config(bare_config("grpo", loss_type="vespo", vespo_k_neg=4.0, vespo_lambda_pos=0.0))
    assert (loss.k_pos, loss.k_neg, loss.lambda_pos, loss.lambda_neg) == (2.0, 4.0, 1e-4, 2.0)
    loss = fast.policy_loss_from_config(bare_config("grpo", loss_type="sapo", sapo_temperature_neg=1.5))
    assert (loss.tau_pos, loss.tau_neg) == (1.0, 1.5)
    loss = fast.policy_loss_from_config(bare_config("rloo", epsilon=0.1, epsilon_high=0.4))
    assert (loss.ratio_level, loss.clip_low, loss.clip_high) == ("sequence_sum", 0.1, 0.4)


def test_other_configurations_are_refused() -> None:
    with pytest.raises(TypeError, match="must be a GRPOConfig, RLOOConfig or SFTConfig, got KTOConfig"):
        fast.policy_loss_from_config(bare_config("kto"))
    with pytest.raises(TypeError, match="must be a DPOConfig or KTOConfig, got GRPOConfig"):
        fast.preference_loss_from_config(bare_config("grpo"))


@pytest.mark.parametrize("change", ["aggregate", "entropy", "kl"])
def test_another_loss_than_the_trainer_computes_is_refused(change: str, folder: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {
        "aggregate": {"aggregate": "sequence_mean"},
        "entropy": {"entropy_coef": 0.1},
        "kl": {"kl_coef": 0.6},
    }[change]

    def prepare(trainer: Any) -> None:
        trainer.fastrl_loss = replace(trainer.fastrl_loss, **fields)
        if change == "entropy":
            trainer._fastrl_entropy = lambda: 0.1

    with pytest.raises(AdapterMismatchError, match="the trainer computes another loss than its configuration"):
        train("grpo", folder, tmp_path, {"beta": 0.3}, mode="fast", prepare=prepare)


def test_a_token_on_the_edge_of_the_clip_is_no_mismatch() -> None:
    """A ratio that rounding puts on either side of the clip may have either gradient, and no other."""
    from fastrl.integrations.trl._prediction import Fused, PolicyPrediction, attach

    loss = fast.policy_loss_from_config(bare_config("grpo", epsilon=0.2))
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    old = logprobs.clone()
    old[1] -= torch.tensor(1.2).log()
    inputs = {
        "mask": torch.ones(4),
        "cu_seqlens": torch.tensor([0, 4]),
        "advantages": torch.ones(1),
        "old_logprobs": old,
    }
    handle = torch.zeros((), requires_grad=True)

    def backward(gradient: Tensor) -> None:
        prediction = PolicyPrediction(loss, inputs)
        found, _ = attach(prediction, Fused(handle, logprobs, torch.zeros(4)))
        found.backward(gradient)

    free, clipped = torch.tensor([-0.25, -0.3, -0.25, -0.25]), torch.tensor([-0.25, 0.0, -0.25, -0.25])
    backward(0.5 * free)
    assert handle.grad == 0.5
    backward(0.5 * clipped)
    with pytest.raises(AdapterMismatchError, match="live token 1"):
        backward(torch.tensor([-0.25, -0.4, -0.25, -0.25]))
    with pytest.raises(AdapterMismatchError, match="live token 2"):
        backward(torch.tensor([-0.25, -0.3, 0.0, -0.25]))


def test_gradients_that_have_vanished_are_the_same_loss() -> None:
    """Saturated sigmoids: one form of their derivative is 1e-32 and another 0. Any larger difference is refused."""
    from fastrl.integrations.trl._prediction import Fused, PolicyPrediction, attach

    inputs = {"mask": torch.ones(2), "cu_seqlens": torch.tensor([0, 2]), "advantages": torch.zeros(1)}
    inputs["old_logprobs"] = torch.full((2,), -1.0)
    prediction = PolicyPrediction(fast.policy_loss_from_config(bare_config("grpo", epsilon=0.2)), inputs)

    def backward(gradient: float) -> None:
        fused = Fused(torch.zeros((), requires_grad=True), torch.full((2,), -1.0), torch.zeros(2))
        attach(prediction, fused)[0].backward(torch.full((2,), gradient))

    backward(-1.4e-32)
    with pytest.raises(AdapterMismatchError, match="2 of 2 differ"):
        backward(-1e-12)
