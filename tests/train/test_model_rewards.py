"""Reward models: scores do not depend on the batch, and other models are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_checks import grpo_settings as settings
from loop_checks import metrics_of
from tiny_model import save_tiny_model, tiny_tokenizer
from transformers import LlamaConfig, LlamaForSequenceClassification

from fastrl.train.grpo import run_grpo
from fastrl.train.rewards.model import SequenceClassifier, load_reward_model

PROMPTS = [[5, 6], [7], [8, 9, 10], [5], [6, 6]]
COMPLETIONS = [[11, 2], [12, 13, 14, 2], [15], [16, 17], [2]]


def classifier(*, labels: int = 1, pad: int | None = 2) -> Any:
    tokenizer = tiny_tokenizer()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, num_labels=labels, pad_token_id=pad,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def save_classifier(folder: Path, **options: Any) -> Path:
    classifier(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("pad", [2, None])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_batch_gets_the_scores_of_its_sequences_alone(pad: int | None, batch_size: int) -> None:
    model = classifier(pad=pad)
    scores = SequenceClassifier(model, batch_size=batch_size).score(PROMPTS, COMPLETIONS)
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    for prompt, completion, score in zip(PROMPTS, COMPLETIONS, scores, strict=True):
        alone = model(input_ids=torch.tensor([prompt + completion])).logits[0, 0]
        assert torch.allclose(score, alone, rtol=0, atol=1e-6)  # some roundings of scores below 1
    assert SequenceClassifier(model).score([], []).shape == (0,)


def test_what_is_no_reward_model_is_refused(tmp_path: Path) -> None:
    policy = save_tiny_model(tmp_path / "policy")
    with pytest.raises(ValueError, match=r"must hold a trained sequence classifier; it lacks score\.weight"):
        load_reward_model(policy, tiny_tokenizer())
    with pytest.raises(ValueError, match="num_labels=1, got 3"):
        load_reward_model(save_classifier(tmp_path / "three", labels=3), tiny_tokenizer())
    with pytest.raises(ValueError, match="reward_model must be a folder with a saved model"):
        load_reward_model(tmp_path / "nothing", tiny_tokenizer())
    folder = save_classifier(tmp_path / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] |= {"a": tokenizer["model"]["vocab"]["b"], "b": tokenizer["model"]["vocab"]["a"]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="must have the policy's tokenizer"):
        load_reward_model(folder, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"as many as prompt_ids \(5\), got 4"):
        SequenceClassifier(classifier()).score(PROMPTS, COMPLETIONS[:4])


def test_a_loop_adds_the_score_to_its_rewards(tmp_path: Path) -> None:
    policy, model = save_tiny_model(tmp_path / "policy"), save_classifier(tmp_path / "reward_model")
    changes = {"reward_model": str(model), "reward_model_weight": 0.5, "steps": 1, "max_new_tokens": 4}
    run_grpo(settings(policy, tmp_path / "both", **changes))
    line = metrics_of(tmp_path / "both")[0]
    assert line["reward/reward_model"] != 0.0
    expected = line["reward/tiny_model:digit_share"] + 0.5 * line["reward/reward_model"]
    assert line["reward"] == pytest.approx(expected)
    run_grpo(settings(policy, tmp_path / "alone", **{**changes, "rewards": {}}))
    line = metrics_of(tmp_path / "alone")[0]
    assert line["reward"] == pytest.approx(0.5 * line["reward/reward_model"])
