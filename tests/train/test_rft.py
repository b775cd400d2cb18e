"""Rejection sampling fine-tuning: what is kept, the gradient of an online step, resuming, learning, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from loop_checks import assert_golden_curve, assert_resumes_to_the_bit, metrics_of
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer

from fastrl.train import rft as module
from fastrl.train.config.rft import OnlineRFTConfig, RFTConfig
from fastrl.train.data.encoding import Example, encode_prompts
from fastrl.train.model import Policy
from fastrl.train.pretrained import load_model
from fastrl.train.rewards.reward_set import RewardSet
from fastrl.train.rewards.tasks import Problem
from fastrl.train.rft import KeptCompletions, run_rft
from fastrl.train.rollouts.rejection import Rejection, sample_and_reject
from fastrl.train.update.supervised import backward_examples, supervised_loss

TOKENIZER = tiny_tokenizer()
EXAMPLES = Path(__file__).parents[2] / "examples"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Several stop tokens, so that a random model does stop.
    model = tiny_model(TOKENIZER)
    path = save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    model.generation_config.eos_token_id = [TOKENIZER.eos_token_id, *range(20, 60)]
    model.generation_config.save_pretrained(path)
    return path


def settings(folder: Path, run_dir: Path, *, online: bool = False, **changes: Any) -> RFTConfig:
    values: dict[str, Any] = {
        "model": str(folder), "run_dir": str(run_dir), "device": "cpu", "prompt_template": "{prompt}",
        "task_parameters": SUMS, "rewards": {"tiny_model:digit_share": 1.0}, "keep_reward": 0.15, "steps": 4,
        "prompts_per_step": 2, "group_size": 4, "sample_batch_size": 8, "max_new_tokens": 6, "learning_rate": 1e-2,
        "eval_problems": 0, "micro_batch_tokens": 300, "save_model": False, "reward_timeout_s": None,
    }  # fmt: skip
    return (OnlineRFTConfig if online else RFTConfig)(**{"steps_per_round": 1 if online else 2, **values, **changes})


def test_what_is_right_ended_by_itself_and_has_the_reward() -> None:
    rewards, truncated = [1.0, 0.5, math.nan, 1.0, 2.0], [False, False, False, True, False]
    assert Rejection(1.0).right(rewards, truncated) == [True, False, False, False, True]


@pytest.mark.parametrize(
    ("rejection", "kept"),
    [
        (Rejection(), [0, 2, 3, 4, 5, 6, 7]),
        (Rejection(keep_per_prompt=2), [0, 2, 4, 5]),
        (Rejection(distinct=True), [0, 3, 4, 7]),
        (Rejection(keep_per_prompt=1, distinct=True), [0, 4]),
    ],
)
def test_what_is_kept_by_hand(rejection: Rejection, kept: list[int]) -> None:
    texts = ["2", "3", " 2\n", "two", "2", "2", "2 ", "zwei"]
    assert rejection.kept(texts, [True, False] + [True] * 6, group_size=4) == kept


def test_the_kept_completions_are_those_that_were_sampled(folder: Path) -> None:
    policy = Policy.of(*load_model(str(folder)))
    assert policy.stop_ids == [2, *range(20, 60)]
    problems = [Problem(f"{n}+1=", str(n + 1)) for n in range(5)]
    seen: list[str] = []

    def even(problem: Problem, completion: str) -> float:
        seen.append(f"{problem.prompt}{completion}")
        return 1.0 if len(completion) % 2 == 0 else 0.0

    options = {
        "max_new_tokens": 6,
        "prompt_template": "{prompt}", "system_prompt": None, "group_size": 4,
    }  # fmt: skip
    rewards = RewardSet({"even": even}, {"even": 1.0}, timeout_s=None)
    sampled = sample_and_reject(
        policy, problems, rewards, Rejection(), batch_size=8,
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    metrics = sampled.metrics
    assert metrics["sampled_completions"] == len(seen) == 20
    assert 0 < metrics["kept_completions"] == len(sampled.kept) < 20
    assert metrics["pass_rate"] == metrics["kept_share"] == len(sampled.kept) / 20
    assert metrics["reward"] == pytest.approx(sum(len(text.partition("=")[2]) % 2 == 0 for text in seen) / 20)
    assert metrics["truncated_fraction"] < 1
    for example in sampled.kept:
        text = TOKENIZER.decode(example.ids, skip_special_tokens=True)
        assert text in seen
        completion = [t for t, trained in zip(example.ids, example.trained, strict=True) if trained]
        assert (
            example.ids[: -len(completion)]
            == encode_prompts(TOKENIZER, [text.partition("=")[0] + "="], template="{prompt}")[0]
        )
        assert completion[-1] in policy.stop_ids
    assert len(sampled.some) == 4


def test_an_online_step_is_the_policy_gradient_with_rewards_of_one_and_zero(tmp_path: Path) -> None:
    model = tiny_model(TOKENIZER).double()
    right = [Example.of([5, 6, 7], [8, 9, 2]), Example.of([5, 6], [11, 2])]

    class Plain:
        device = "cpu"

        def backward(self, loss: torch.Tensor) -> None:
            loss.backward()

    policy = Policy.of(model, temperature=0.7)
    backward_examples(Plain(), policy, supervised_loss("rft", {}), right, budget=300)
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    wrong = Example.of([5, 6], [13, 14, 2])
    loss = torch.zeros((), dtype=torch.float64)
    for example, reward in ((right[0], 1.0), (right[1], 1.0), (wrong, 0.0)):
        ids = torch.tensor(example.ids)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1] / 0.7
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
        loss = loss - reward * logprobs[torch.tensor(example.trained[1:])].sum() / 5
    loss.backward()
    for name, parameter in model.named_parameters():
        granted = 1e-5 * float(parameter.grad.abs().max())  # the model's norms are in float32
        assert torch.allclose(ours[name], parameter.grad, rtol=0, atol=granted), name


def test_a_round_samples_once_and_its_steps_share_what_was_kept(folder: Path, tmp_path: Path) -> None:
    run_rft(settings(folder, tmp_path, steps=6, steps_per_round=3, epochs_per_round=2))
    lines = metrics_of(tmp_path)
    assert ["pass_rate" in line for line in lines] == [True, False, False] * 2
    for start in (0, 3):
        assert lines[start]["sampled_completions"] == 2 * 3 * 4
        share = math.ceil(2 * lines[start]["kept_completions"] / 3)
        assert [line["trained_completions"] for line in lines[start : start + 3]] == [share] * 3


def test_resuming_continues_to_the_bit_also_within_a_round(folder: Path, tmp_path: Path) -> None:
    def train(run_dir: str, **changes: Any) -> None:
        run_rft(settings(
            folder, Path(run_dir), steps=6, steps_per_round=3, lr_schedule="cosine", checkpoint_every=2,
            eval_problems=3, keep_reward=0.0, **changes,
        ))  # fmt: skip

    assert_resumes_to_the_bit(train, tmp_path, steps=6, die_after=5)


def test_it_learns_online(folder: Path, tmp_path: Path) -> None:
    run_rft(settings(folder, tmp_path, online=True, steps=15, prompts_per_step=4, group_size=8, sample_batch_size=32))
    rewards = [line["reward"] for line in metrics_of(tmp_path) if "reward" in line]
    assert rewards[-1] > 2 * rewards[0]


def test_the_loss_curve_is_the_golden_one(folder: Path, tmp_path: Path) -> None:
    run_rft(settings(folder, tmp_path, keep_reward=0.0, learning_rate=1e-3))
    assert_golden_curve("golden_rft", tmp_path)


def test_without_a_right_completion_an_online_step_is_left_out_and_a_round_ends_the_run(
    folder: Path, tmp_path: Path
) -> None:
    run_rft(settings(folder, tmp_path / "online", online=True, steps=2, keep_reward=5.0, save_model=True))
    for line in metrics_of(tmp_path / "online"):
        assert line["kept_completions"] == line["trained_completions"] == 0.0
        assert "loss" not in line
    before, after = (load_model(str(path))[0].state_dict() for path in (folder, tmp_path / "online" / "model"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match="none of the 16 completions of round 0 was right"):
        run_rft(settings(folder, tmp_path / "rounds", keep_reward=5.0))


def test_kept_completions_survive_a_checkpoint() -> None:
    kept, again = KeptCompletions(), KeptCompletions()
    for examples in ([], [Example([1, 2, 3], [False, True, True]), Example([4, 5], [False, True])]):
        kept.examples = examples
        again.load_state_dict(kept.state_dict())
        assert again.examples == examples


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 5}, "steps must be a multiple of steps_per_round=2, got 5"),
        ({"sample_batch_size": 6}, "sample_batch_size must be a multiple of group_size=4, got 6"),
        ({"keep_per_prompt": -1}, "keep_per_prompt must be at least 0"),
        ({"epochs_per_round": 0}, "epochs_per_round must be at least 1"),
        ({"loss": "grpo"}, "for given tokens choose sft, rft or dft"),
        ({"task": "chain_sums"}, "chain_sum"),
    ],
)
def test_impossible_settings_are_refused(folder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_rft(settings(folder, tmp_path, **changes))


def test_what_a_run_leaves(folder: Path, tmp_path: Path) -> None:
    config = settings(folder, tmp_path, steps=2, eval_problems=3, eval_modes=["sampled", "greedy"], packing=False)
    result = run_rft(config)
    assert [(e["step"], e["mode"]) for e in result.evaluations] == [
        (0, "sampled"), (0, "greedy"), (2, "sampled"), (2, "greedy"),
    ]  # fmt: skip
    assert json.loads((tmp_path / "config.json").read_text()) == config.as_dict()


@pytest.mark.parametrize(("name", "config_class"), [("rft", RFTConfig), ("online_rft", OnlineRFTConfig)])
def test_the_examples_are_configurations(name: str, config_class: type[RFTConfig]) -> None:
    values = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    config = config_class(**values)
    module.supervised_loss(config.loss, config.loss_options)
    assert {key: value for key, value in config.as_dict().items() if key in values} == values
