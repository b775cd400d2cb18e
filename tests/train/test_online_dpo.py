"""Online DPO: best and worst, a step against plain PyTorch, learning, resuming; and pairs files from a policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop_checks import assert_golden_curve, assert_resumes_to_the_bit, metrics_of
from tiny_model import tiny_model, tiny_tokenizer

from fastrl import PreferenceLoss
from fastrl.train.config.dpo import OnlineDPOConfig
from fastrl.train.model import Policy
from fastrl.train.online_dpo import backward_ranked, run_online_dpo
from fastrl.train.pairs import PairsConfig, best_and_worst, make_pairs
from fastrl.train.rollouts.generate import generate
from fastrl.train.run.run import MetricSums

TOKENIZER = tiny_tokenizer()
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def settings(folder: Path, run_dir: Path, **changes: Any) -> OnlineDPOConfig:
    values: dict[str, Any] = {
        "model": str(folder), "run_dir": str(run_dir), "device": "cpu", "prompt_template": "{prompt}", "steps": 3,
        "task_parameters": SUMS, "rewards": {"tiny_model:digit_share": 1.0}, "prompts_per_step": 4, "group_size": 4,
        "max_new_tokens": 6, "learning_rate": 3e-3, "eval_problems": 0, "save_model": False,
        "reward_timeout_s": None,
    }  # fmt: skip
    return OnlineDPOConfig(**{**values, **changes})


def test_best_and_worst_of_each_group() -> None:
    nan = math.nan
    scores = [0.1, 0.9, 0.2, 0.5, 0.5, 0.5, nan, 1.0, nan, nan, 2.0, -1.0, math.inf, 0.0, -math.inf]
    chosen, rejected = best_and_worst(torch.tensor(scores), 3)
    assert chosen.tolist() == [1, 10, 12]
    assert rejected.tolist() == [0, 11, 14]
    first, _ = best_and_worst(torch.tensor([1.0, 1.0, 0.0, 0.0]), 4)
    assert first.tolist() == [0]
    with pytest.raises(ValueError, match=r"scores must be \(P \* group_size=4,\)"):
        best_and_worst(torch.zeros(6), 4)


@pytest.mark.parametrize("micro", [None, 2])
def test_a_step_is_that_of_the_formula_in_plain_pytorch(micro: int | None) -> None:
    model = tiny_model(TOKENIZER).double()
    prompts = [TOKENIZER(text).input_ids for text in ("1+1=", "two and two?", "9-4=")]
    rollout = generate(
        model, prompts, group_size=4, max_new_tokens=7, stop_ids=[2], pad_id=2, temperature=0.8,
        generator=torch.Generator().manual_seed(3),
    )  # fmt: skip
    pairs = torch.tensor([1, 6, 11]), torch.tensor([3, 4, 8])
    ref = torch.where(rollout.completion_mask, -3.0 * torch.rand(rollout.completion_mask.shape), 0.0)
    config = SimpleNamespace(micro_batch_size=micro)
    run: Any = SimpleNamespace(device="cpu", config=config, backward=lambda value: value.backward())
    totals = MetricSums()
    loss = PreferenceLoss.preset("sigmoid", beta=0.2)
    backward_ranked(run, Policy.of(model, temperature=0.8), loss, rollout, pairs, ref, totals)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.zero_grad()
    terms = []
    for chosen, rejected in zip(*(index.tolist() for index in pairs), strict=True):
        ratios = []
        for row in (chosen, rejected):
            completion = rollout.completion_ids[row][rollout.completion_mask[row]]
            prompt = prompts[row // 4]
            ids = torch.cat([torch.tensor(prompt), completion])
            logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1] / 0.8
            logprobs = torch.log_softmax(logits, dim=-1).gather(1, completion[:, None])
            ratios.append(logprobs.sum() - ref[row].sum())
        terms.append(-F.logsigmoid(0.2 * (ratios[0] - ratios[1])))
    value = torch.stack(terms).mean()
    value.backward()
    assert totals.means()["loss"] == pytest.approx(value.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        granted = 1e-5 * float(parameter.grad.abs().max())  # the model's norms are in float32
        assert torch.allclose(ours[name], parameter.grad, rtol=0, atol=granted), name


@pytest.mark.parametrize("changes", [{}, {"loss": "simpo"}, {"lora_rank": 4, "learning_rate": 3e-2}])
def test_the_reward_rises(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    run_online_dpo(settings(folder, tmp_path, steps=15, prompts_per_step=8, **{"learning_rate": 1e-2, **changes}))
    lines = metrics_of(tmp_path)
    rewards = [line["reward/tiny_model:digit_share"] for line in lines]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:2]) / 2 + 0.1
    assert lines[0]["pairs"] > 0
    if changes.get("loss") != "simpo":
        assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-4)
        assert lines[-1]["kl"] > 0.05


def test_a_step_without_a_pair_changes_nothing(folder: Path, tmp_path: Path) -> None:
    run_online_dpo(settings(folder, tmp_path, rewards={"exact": 0.0}, steps=2))
    assert [line["pairs"] for line in metrics_of(tmp_path)] == [0.0, 0.0]
    assert all("grad_norm" not in line for line in metrics_of(tmp_path))


def test_resuming_continues_to_the_bit(folder: Path, tmp_path: Path) -> None:
    def train(run_dir: str, **more: Any) -> None:
        run_online_dpo(settings(
            folder, Path(run_dir), steps=4, lr_schedule="linear", checkpoint_every=2, eval_problems=4,
            micro_batch_size=4, epochs_per_batch=2, **more,
        ))  # fmt: skip

    assert_resumes_to_the_bit(train, tmp_path, steps=4, die_after=3)


def test_the_loss_curve_is_the_golden_one(folder: Path, tmp_path: Path) -> None:
    run_online_dpo(settings(folder, tmp_path, steps=5))
    assert_golden_curve("golden_online_dpo", tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "kto"}, "online DPO needs a loss of pairs"),
        ({"minibatches": 2}, "expected minibatches=1"),
        ({"group_size": 1}, "group_size must be at least 2"),
        ({"mask_truncated": True}, "mask_truncated"),
        ({"loss": "aot", "micro_batch_size": 2}, "expected micro_batch_size=None"),
    ],
)
def test_what_cannot_be_is_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_online_dpo(settings(folder, tmp_path, **changes))


def test_a_pairs_file_holds_the_best_and_the_worst(folder: Path, tmp_path: Path) -> None:
    config = PairsConfig(
        model=str(folder), prompt_template="{prompt}", task_parameters=SUMS, problems=6, group_size=4,
        max_new_tokens=6, sample_batch_size=8, rewards={"tiny_model:digit_share": 1.0}, reward_timeout_s=None,
        output=str(tmp_path / "deep" / "pairs.jsonl"),
    )  # fmt: skip
    lines = [json.loads(line) for line in make_pairs(config).read_text().splitlines()]
    assert 0 < len(lines) <= 6
    for line in lines:
        shares = [sum(c.isdigit() for c in line[side]) / 6 for side in ("chosen", "rejected")]
        assert [line["chosen_reward"], line["rejected_reward"]] == pytest.approx(shares)
        assert shares[0] > shares[1]
    assert make_pairs(config).read_text().splitlines() == [json.dumps(line) for line in lines]


def test_a_pairs_file_can_hold_the_answers(folder: Path, tmp_path: Path) -> None:
    config = PairsConfig(
        model=str(folder), prompt_template="{prompt}", task_parameters=SUMS, problems=4, group_size=2,
        max_new_tokens=6, sample_batch_size=8, chosen="answer", answer_template="it is {answer}",
        rewards={"accuracy": 1.0}, reward_timeout_s=None, output=str(tmp_path / "pairs.jsonl"),
    )  # fmt: skip
    lines = [json.loads(line) for line in make_pairs(config).read_text().splitlines()]
    assert lines
    assert all(line["chosen"].startswith("it is ") for line in lines)
    assert all(line["chosen_reward"] > line["rejected_reward"] for line in lines)
    with pytest.raises(ValueError, match="none of 2 problems"):
        make_pairs(PairsConfig(
            model=str(folder), prompt_template="{prompt}", task_parameters=SUMS, problems=2, group_size=2,
            max_new_tokens=2, rewards={"exact": 0.0}, output=str(tmp_path / "none.jsonl"),
        ))  # fmt: skip
