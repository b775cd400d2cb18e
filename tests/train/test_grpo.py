"""The GRPO loop: against plain PyTorch, split invariance, the first ratio, resuming, failures, and learning."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loop_checks import EXAMPLES, TOKENIZER, PlainRun, interrupt, metrics_of
from loop_checks import grpo_settings as settings
from safetensors.torch import load_file
from tiny_model import digit_share, tiny_model
from torch import Tensor

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.data.rollout import Rollout
from fastrl.train.grpo import build_loss, run_grpo, take_steps
from fastrl.train.model import Policy
from fastrl.train.rollouts.evaluate import TaskEvaluation
from fastrl.train.rollouts.generate import generate
from fastrl.train.update.batches import RolloutBatch, minibatch_rows


def random_batch(model: Any, config: GRPOConfig) -> RolloutBatch:
    prompts = encode_prompts(TOKENIZER, ["1+1=", "what is 23 - 60?"])
    rollout: Rollout = generate(
        model, prompts, group_size=config.group_size, max_new_tokens=config.max_new_tokens,
        stop_ids=[2, *range(10, 20)], pad_id=2, generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    noise = torch.Generator().manual_seed(2)
    shape = rollout.logprobs.shape
    old = rollout.logprobs.double() + 0.3 * torch.randn(shape, generator=noise, dtype=torch.float64)
    ref = rollout.logprobs.double() + 0.3 * torch.randn(shape, generator=noise, dtype=torch.float64)
    advantages = torch.randn(config.batch_size, generator=noise, dtype=torch.float64)
    return RolloutBatch(rollout, advantages, rollout.completion_mask, old, ref)


def gradients(config: GRPOConfig) -> tuple[dict[str, Tensor], dict[str, float]]:
    model = tiny_model(TOKENIZER)
    batch = random_batch(model, config)
    model = model.double()
    policy = Policy.of(model, temperature=config.temperature)
    totals = take_steps(PlainRun(config), policy, build_loss(config), batch)
    return {name: p.grad for name, p in model.named_parameters()}, totals.means()


def test_gradient_is_that_of_the_formula_in_plain_pytorch(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, kl_coef=0.1, clip_high=0.1, temperature=0.7)
    ours, metrics = gradients(config)
    model = tiny_model(TOKENIZER)
    batch = random_batch(model, config)
    model = model.double()
    loss = torch.zeros((), dtype=torch.float64)
    for row in range(8):
        mask = batch.mask[row]
        prompt = int(batch.rollout.prompt_index[row])
        start = batch.rollout.prompt_ids[prompt][batch.rollout.prompt_mask[prompt]]
        end = batch.rollout.completion_ids[row][mask]
        logits = model(input_ids=torch.cat([start, end])[None], use_cache=False).logits[0, len(start) - 1 : -1]
        logprobs = torch.log_softmax(logits / 0.7, dim=-1).gather(1, end[:, None])[:, 0]
        ratio = torch.exp(logprobs - batch.old_logprobs[row][mask])
        advantage = batch.advantages[row]
        surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.1) * advantage)
        delta = batch.ref_logprobs[row][mask] - logprobs
        loss = loss + (-surrogate + 0.1 * (torch.exp(delta) - delta - 1.0)).mean() / 8
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["clip_fraction"] > 0
    for name, parameter in model.named_parameters():
        granted = 1e-5 * float(parameter.grad.abs().max())  # the model's norms are in float32
        assert torch.allclose(ours[name], parameter.grad, rtol=0, atol=granted), name


def test_clip_cov_detaches_the_unclipped_tokens_of_high_covariance(tmp_path: Path) -> None:
    # All candidates are detached, so that nothing is left to chance.
    config = settings(tmp_path, tmp_path, loss="clip_cov", clip_cov_fraction=1.0, clip_cov_low=0.1, clip_cov_high=9.0)
    ours, metrics = gradients(config)
    model = tiny_model(TOKENIZER)
    batch = random_batch(model, config)
    model = model.double()
    logprobs, old, advantages = [], [], []
    for row in range(8):
        mask, prompt = batch.mask[row], int(batch.rollout.prompt_index[row])
        start = batch.rollout.prompt_ids[prompt][batch.rollout.prompt_mask[prompt]]
        end = batch.rollout.completion_ids[row][mask]
        logits = model(input_ids=torch.cat([start, end])[None], use_cache=False).logits[0, len(start) - 1 : -1]
        logprobs.append(torch.log_softmax(logits, dim=-1).gather(1, end[:, None])[:, 0])
        old.append(batch.old_logprobs[row][mask])
        advantages.append(batch.advantages[row].expand(len(end)))
    lp, a = torch.cat(logprobs), torch.cat(advantages)
    ratio = torch.exp(lp - torch.cat(old))
    covariance = (a - a.mean()) * (lp - lp.mean()).detach()
    clipped = (ratio * a > ratio.clamp(0.8, 1.2) * a).detach()
    detached = ~clipped & (covariance > 0.1) & (covariance < 9.0)
    terms = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
    (-terms[~detached].sum() / len(terms)).backward()
    assert metrics["detached_fraction"] == pytest.approx(float(detached.double().mean()))
    assert 0.0 < metrics["detached_fraction"] < 1.0
    for name, parameter in model.named_parameters():
        granted = 1e-5 * float(parameter.grad.abs().max())  # the model's norms are in float32
        assert torch.allclose(ours[name], parameter.grad, rtol=0, atol=granted), name


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"])
def test_micro_batches_change_the_memory_only(tmp_path: Path, loss: str) -> None:
    whole = settings(tmp_path, tmp_path, loss=loss)
    parts = dataclasses.replace(whole, micro_batch_size=2)
    expected, metrics = gradients(whole)
    split, split_metrics = gradients(parts)
    for name, gradient in expected.items():
        assert torch.allclose(split[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max())), name
    for name, value in metrics.items():
        assert split_metrics[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


@pytest.mark.parametrize("changes", [{}, {"micro_batch_size": 2}, {"loss": "gspo"}, {"lora_rank": 2}, {"kl_coef": 0.1}])
def test_first_ratio_is_bitwise_one(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run_grpo(settings(folder, tmp_path, epochs_per_batch=2, minibatches=2, **changes))
    for line in metrics_of(tmp_path):
        assert line["first_step_ratio_max_dev"] == 0.0
        assert line["ratio"] != 1.0 or line["grad_norm"] == 0.0  # later steps of the batch do move
        assert line["rollout_abs_diff"] < 1e-5
        if "kl_coef" in changes:
            assert line["kl"] > 0.0


def test_it_learns(folder: Path, tmp_path: Path) -> None:
    run_grpo(settings(folder, tmp_path, steps=25, prompts_per_step=4, group_size=8))
    rewards = [line["reward"] for line in metrics_of(tmp_path)]
    assert sum(rewards[-5:]) / 5 > 3 * sum(rewards[:5]) / 5


@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": 2, "kl": "k3", "kl_coef": 0.1, "loss": "dapo", "epochs_per_batch": 2}]
)
def test_resuming_continues_to_the_bit(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    common = {
        "steps": 4,
        "lr_schedule": "linear",
        "checkpoint_every": 2,
        "minibatches": 2,
        "eval_problems": 4,
        **changes,
    }
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_grpo(settings(folder, straight, **common))
    interrupt(lambda: run_grpo(settings(folder, broken, **common)), after=3)
    run_grpo(settings(folder, broken, resume=True, **common))

    once = {"first_step_ratio_max_dev", "approx_kl_old"}  # the first step after a start measures more
    for a, b in zip(metrics_of(straight), metrics_of(broken), strict=True):
        assert {k: v for k, v in a.items() if k not in once} == {k: v for k, v in b.items() if k not in once}
    assert (straight / "evaluations.json").read_text() == (broken / "evaluations.json").read_text()
    for name in ("weights", "optimizer", "random"):
        a, b = (load_file(d / "checkpoints" / "step_00000004" / f"{name}.safetensors") for d in (straight, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_a_resumed_run_may_be_longer_but_not_another(folder: Path, tmp_path: Path) -> None:
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    run_grpo(settings(folder, straight, steps=4, checkpoint_every=4))
    run_grpo(settings(folder, extended, steps=2, checkpoint_every=2))
    run_grpo(settings(folder, extended, steps=4, checkpoint_every=2, resume=True))
    a, b = (load_file(d / "checkpoints" / "step_00000004" / "weights.safetensors") for d in (straight, extended))
    assert all(torch.equal(a[key], b[key]) for key in a)
    with pytest.raises(ValueError, match=r"other settings: learning_rate \(saved 0\.01, now 0\.5\)"):
        run_grpo(settings(folder, extended, steps=6, resume=True, learning_rate=0.5))
    with pytest.raises(ValueError, match="holds an earlier run"):
        run_grpo(settings(folder, extended))
    run_grpo(settings(folder, extended, steps=1, overwrite=True))
    assert len(metrics_of(extended)) == 1


def test_failed_rewards_are_counted_and_teach_nothing(folder: Path, tmp_path: Path) -> None:
    config = settings(
        folder, tmp_path, rewards={"tiny_model:fails_on_letters": 1.0}, steps=2, group_size=8, reward_timeout_s=5.0
    )
    run_grpo(config)
    lines = metrics_of(tmp_path)
    assert sum(line["reward_failures"] for line in lines) > 0
    for line in lines:
        assert line["n_missing"] == line["reward_failures"] / config.batch_size
        assert math.isfinite(line["grad_norm"])
        assert line["skipped_updates"] == 0.0


def test_what_a_run_leaves(folder: Path, tmp_path: Path) -> None:
    config = settings(
        folder, tmp_path, eval_problems=5, eval_modes=["sampled", "greedy"], eval_samples=2, save_model=True
    )
    result = run_grpo(config)
    evaluations = json.loads((tmp_path / "evaluations.json").read_text())
    assert evaluations == result.evaluations
    assert [(e["step"], e["mode"], e["n"]) for e in evaluations] == [
        (0, "sampled", 5), (0, "greedy", 5), (2, "sampled", 5), (2, "greedy", 5),
    ]  # fmt: skip
    samples = json.loads((tmp_path / "samples.json").read_text())
    assert len(samples) == 8
    assert {"step", "prompt", "completion", "answer", "reward"} <= samples[0].keys()
    assert json.loads((tmp_path / "config.json").read_text()) == config.as_dict()
    assert json.loads((tmp_path / "environment.json").read_text())["packages"]["torch"]
    assert run_grpo(settings(tmp_path / "model", tmp_path / "next", steps=1)).steps == 1


@pytest.mark.parametrize("name", ["demo", "smoke", "dapo", "process"])
def test_the_examples_are_configurations(name: str) -> None:
    values = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    config = GRPOConfig(**values)
    build_loss(config)
    assert {key: value for key, value in config.as_dict().items() if key in values} == values


def test_the_smoke_example_runs(folder: Path, tmp_path: Path) -> None:
    values = yaml.safe_load((EXAMPLES / "smoke.yaml").read_text())
    result = run_grpo(GRPOConfig(**{**values, "model": str(folder), "run_dir": str(tmp_path / "run")}))
    assert result.steps == len(metrics_of(result.run_dir))


def test_truncated_completions_can_be_left_out(folder: Path, tmp_path: Path) -> None:
    run_grpo(settings(folder, tmp_path, max_new_tokens=1, mask_truncated=True))
    assert all(line["truncated_fraction"] > 0 for line in metrics_of(tmp_path))
    assert all(line["loss"] == 0.0 for line in metrics_of(tmp_path) if line["truncated_fraction"] == 1.0)


def test_minibatches_cover_the_batch_and_keep_their_composition(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, minibatches=2, micro_batch_size=2)
    generator = torch.Generator().manual_seed(0)
    passes = [list(minibatch_rows(config, generator)) for _ in range(8)]
    for steps in passes:
        assert [len(rows) for rows in steps] == [2, 2]
        assert sorted(row for rows in steps for row in rows) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert len({str(steps) for steps in passes}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"minibatches": 3}, "minibatches must divide the batch .* = 8 completions, got 3"),
        ({"micro_batch_size": 3}, "micro_batch_size must divide the minibatch of 8 completions, got 3"),
        ({"temperature": 0.0}, "temperature must be finite and greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate must be finite"),
        ({"steps": 1.5}, "steps must be an int, got float 1.5"),
        ({"dtype": "float8"}, "dtype must be one of float32"),
        ({"lr_schedule": "step"}, "lr_schedule must be one of constant, linear, cosine"),
        ({"eval_modes": ["best"]}, "eval_modes must be one of sampled, greedy"),
        ({"dtype": "bfloat16", "mixed_precision": "bf16"}, "needs dtype='float32'"),
        ({"resume": True, "overwrite": True}, "exclude each other"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "grop"}, "dr_grpo"),
        ({"loss_options": {"clip": 0.1}}, "unknown field clip"),
        ({"clip_low": 0.1, "loss_options": {"clip_low": 0.2}}, "given twice"),
        ({"loss": "sft"}, "does not look at the rewards"),
        ({"loss": "clip_cov", "micro_batch_size": 2}, "'clip_cov' is computed over a whole minibatch"),
        ({"loss": "kl_cov", "kl_coef": None, "micro_batch_size": 2}, "expected micro_batch_size=None"),
        ({"task": "chain_sums"}, "chain_sum"),
        ({"rewards": {"acuracy": 1.0}}, "accuracy"),
        ({"model": "/no/such/folder"}, "could not be loaded"),
    ],
)
def test_unknown_names_list_the_known_ones(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_grpo(settings(folder, tmp_path / "run", **changes))


def test_learning_rates(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, steps=10, warmup_steps=2, learning_rate=1.0, lr_schedule="linear")
    assert [config.learning_rate_at(step) for step in (0, 1, 2, 6)] == [0.5, 1.0, 1.0, 0.5]
    cosine = dataclasses.replace(config, lr_schedule="cosine")
    assert cosine.learning_rate_at(6) == pytest.approx(0.5)
    assert dataclasses.replace(config, lr_schedule="constant").learning_rate_at(9) == 1.0


def test_several_processes_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process, got WORLD_SIZE=2"):
        run_grpo(settings(folder, tmp_path))


def test_evaluations_measure_the_rewards_they_are_asked_for(folder: Path, tmp_path: Path) -> None:
    name = "tiny_model:digit_share"
    run_grpo(settings(folder, tmp_path / "run", eval_rewards=(name,), eval_problems=12, eval_samples=12, steps=1))
    records = json.loads((tmp_path / "run" / "evaluations.json").read_text())
    samples = json.loads((tmp_path / "run" / "samples.json").read_text())
    measured = [record for record in records if record.get("measure") == name]
    assert [record["step"] for record in measured] == [0, 1]
    for record in measured:
        texts = [sample["completion"] for sample in samples if sample["step"] == record["step"]]
        values = torch.tensor([digit_share(None, text) for text in texts], dtype=torch.float64)
        assert record["n"] == len(values) == 12
        assert record["value"] == pytest.approx(float(values.mean()), rel=1e-6)
        assert record["standard_error"] == pytest.approx(float(values.std(correction=0)) / math.sqrt(12), rel=1e-6)


def test_a_reward_that_failed_is_left_out_of_its_measurement() -> None:
    rewards = {"known": torch.tensor([1.0, math.nan, 0.0]), "never": torch.tensor([math.nan] * 3)}
    evaluation = TaskEvaluation(3, "greedy", 3, 0.0, 0.0, ("a", "b", "c"), rewards)
    known, never = evaluation.of_reward("known"), evaluation.of_reward("never")
    assert (known.value, known.standard_error, known.n) == (0.5, pytest.approx(0.5 / math.sqrt(2)), 2)
    assert known.mode == "greedy"
    assert never.n == 0
    assert math.isnan(never.value)


def test_a_measured_reward_is_one_of_the_rewards(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_rewards must be one of tiny_model:digit_share, got 'format'"):
        settings(folder, tmp_path, eval_rewards=("format",))
