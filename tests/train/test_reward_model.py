"""The reward model loop: against plain PyTorch, what is saved is what was trained, resuming, use by the loops."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_checks import assert_golden_curve, assert_resumes_to_the_bit, metrics_of
from tiny_model import tiny_tokenizer
from transformers import AutoModelForSequenceClassification

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.config.reward_model import RewardModelConfig
from fastrl.train.data.encoding import Encoder, preference_examples
from fastrl.train.data.records import read_records
from fastrl.train.grpo import run_grpo
from fastrl.train.pairs import write_pairs
from fastrl.train.reward_model import (
    backward_pairs,
    held_out_scores,
    load_classifier,
    pair_scores,
    run_reward_model,
    scoring_pad_id,
)
from fastrl.train.rewards.model import load_reward_model

TOKENIZER = tiny_tokenizer()
PAIRS = [
    {"prompt": f"{a}+{b}=", "chosen": f"{a + b}", "rejected": f"it is {a + b + 1} or so"[: 4 + a], "margin": a / 4}
    for a in range(1, 7)
    for b in (2, 5, 8)
]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(PAIRS, tmp_path_factory.mktemp("data") / "pairs.jsonl")


def settings(folder: Path, pairs: Path, run_dir: Path, **changes: Any) -> RewardModelConfig:
    values: dict[str, Any] = {
        "model": str(folder), "data": str(pairs), "run_dir": str(run_dir), "device": "cpu", "eval_share": 0.3,
        "prompt_template": "{prompt}", "steps": 3, "examples_per_step": 4, "learning_rate": 1e-2, "save_model": False,
    }  # fmt: skip
    return RewardModelConfig(**{**values, **changes})


def gradients(config: RewardModelConfig) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    model, _, encoder = load_classifier(config, torch.device("cpu"))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(0))
    examples = preference_examples(read_records(PAIRS), encoder).examples[:5]
    run = SimpleNamespace(device="cpu", backward=lambda value: value.backward())
    metrics = backward_pairs(run, model, examples, config)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    if config.micro_batch_size is not None:
        return ours, metrics
    model.zero_grad()
    terms = []
    for pair in examples:
        chosen, rejected = (
            model.base_model(input_ids=torch.tensor([[*pair.prompt, *ids]])).last_hidden_state[0, -1]
            @ model.score.weight[0]
            for ids in (pair.chosen, pair.rejected)
        )
        terms.append(-F.logsigmoid(chosen - rejected - pair.margin) + 0.1 * (chosen + rejected) ** 2)
    loss = torch.stack(terms).mean()
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        granted = 1e-4 * float(parameter.grad.abs().max())
        assert torch.allclose(ours[name], parameter.grad, rtol=0, atol=granted), name
    return ours, metrics


def test_gradient_is_that_of_the_formula_in_plain_pytorch(folder: Path, pairs: Path, tmp_path: Path) -> None:
    whole, metrics = gradients(settings(folder, pairs, tmp_path, centering_coef=0.1))
    split, split_metrics = gradients(settings(folder, pairs, tmp_path, centering_coef=0.1, micro_batch_size=2))
    for name, gradient in whole.items():
        assert torch.allclose(split[name], gradient, rtol=0, atol=1e-4 * float(gradient.abs().max())), name
    assert split_metrics["loss"] == pytest.approx(metrics["loss"], rel=1e-5)


def test_the_padding_token_ends_no_completion(folder: Path, pairs: Path, tmp_path: Path) -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id == 2
    assert scoring_pad_id(tiny_tokenizer(pad_is_eos=False), [2]) == 0
    assert scoring_pad_id(TOKENIZER, [2]) == 1
    assert scoring_pad_id(TOKENIZER, [1, 2]) == 3
    with pytest.raises(ValueError, match="none of the stop tokens"):
        scoring_pad_id(TOKENIZER, [1, 2, 3])
    model, tokenizer, encoder = load_classifier(settings(folder, pairs, tmp_path), torch.device("cpu"))
    assert (model.config.pad_token_id, tokenizer.pad_token_id) == (1, 1)
    with torch.no_grad():
        model.score.weight.fill_(1.0)
    few = preference_examples(read_records(PAIRS), encoder).examples[:3]
    batch = pair_scores(model, few).detach()
    for pair, row in zip(few, batch, strict=True):
        for ids, score in zip((pair.chosen, pair.rejected), row, strict=True):
            hidden = model.base_model(input_ids=torch.tensor([[*pair.prompt, *ids]])).last_hidden_state
            assert ids[-1] == 2
            assert float(score) == pytest.approx(hidden[0, -1].sum().item(), abs=1e-4)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 4}, {"centering_coef": 0.01, "head_learning_rate_factor": 2.0}])
def test_the_pairs_are_learnt_and_the_folder_is_a_reward_model(
    folder: Path, pairs: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run_dir = tmp_path / "run"
    config = settings(folder, pairs, run_dir, steps=15, examples_per_step=8, save_model=True, **changes)
    result = run_reward_model(config)
    before, after = ([r for r in result.evaluations if r["step"] == step] for step in (0, 15))
    assert [r["measure"] for r in before] == ["pair accuracy", "score margin"]
    assert (before[0]["value"], before[1]["value"]) == (0.5, 0.0)  # the head begins at zero
    assert after[0]["value"] > 0.9
    assert after[1]["value"] > 0.1
    scorer = load_reward_model(run_dir / "model", TOKENIZER)
    _, _, encoder = load_classifier(config, torch.device("cpu"))
    held_out = preference_examples(read_records(PAIRS), encoder).examples
    chosen, rejected = (
        scorer.score([p.prompt for p in held_out], [getattr(p, side) for p in held_out])
        for side in ("chosen", "rejected")
    )
    assert float((chosen > rejected).float().mean()) > 0.9
    reloaded = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    again = held_out_scores(reloaded.eval(), held_out, 0, 4)
    assert again[1].value == pytest.approx(float((chosen - rejected).double().mean()), abs=1e-4)
    assert metrics_of(run_dir)[-1]["rewards/margins"] > 0.0


def test_training_goes_on_from_a_reward_model_and_pays_a_policy(folder: Path, pairs: Path, tmp_path: Path) -> None:
    first = settings(folder, pairs, tmp_path / "first", steps=8, examples_per_step=8, save_model=True)
    before = run_reward_model(first).evaluations[-2:]
    trained = tmp_path / "first" / "model"
    after = run_reward_model(settings(trained, pairs, tmp_path / "second", steps=1)).evaluations[:2]
    assert [r["value"] for r in after] == pytest.approx([r["value"] for r in before], abs=1e-5)
    run_grpo(
        GRPOConfig(
            model=str(folder), run_dir=str(tmp_path / "grpo"), device="cpu", prompt_template="{prompt}", steps=1,
            task_parameters={"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}, rewards={},
            reward_model=str(trained), prompts_per_step=2, group_size=2, max_new_tokens=4, eval_problems=0,
            save_model=False, kl_coef=0.0, reward_timeout_s=None,
        )
    )  # fmt: skip
    assert "reward/reward_model" in metrics_of(tmp_path / "grpo")[0]


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_resuming_continues_to_the_bit(folder: Path, pairs: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    def train(run_dir: str, **more: Any) -> None:
        run_reward_model(settings(
            folder, pairs, Path(run_dir), steps=4, lr_schedule="linear", checkpoint_every=2, eval_every=3,
            examples_per_step=5, micro_batch_size=2, **changes, **more,
        ))  # fmt: skip

    assert_resumes_to_the_bit(train, tmp_path, steps=4, die_after=3)


def test_the_loss_curve_is_the_golden_one(folder: Path, pairs: Path, tmp_path: Path) -> None:
    run_reward_model(settings(folder, pairs, tmp_path, steps=6, learning_rate=1e-3, eval_share=0.0))
    assert_golden_curve("golden_reward_model", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "data must name the preference records"),
        ({"centering_coef": -1.0}, "centering_coef must be at least 0"),
        ({"head_learning_rate_factor": 0.0}, "head_learning_rate_factor"),
        ({"model": "no/such/model/folder"}, "could not be loaded as a sequence classifier"),
    ],
)
def test_what_cannot_be_is_refused(
    folder: Path, pairs: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_reward_model(settings(folder, pairs, tmp_path, **changes))


def test_a_margin_is_a_number() -> None:
    encoder = Encoder(TOKENIZER, [2], "{prompt}")
    with pytest.raises(ValueError, match="margin must be a finite number, got 'big'"):
        preference_examples(read_records([{**PAIRS[0], "margin": "big"}]), encoder)
