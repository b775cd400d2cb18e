"""What a GRPO step is trained on: dynamic sampling, filtered prompts, curricula, steps, the reference; every loss."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_checks import SUMS, TOKENIZER, interrupt
from loop_checks import grpo_settings as settings
from safetensors.torch import load_file
from tiny_model import save_tiny_model, tiny_model

from fastrl import PolicyLoss
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.data.rollout import Rollout, concatenate
from fastrl.train.grpo import run_grpo
from fastrl.train.model import Policy
from fastrl.train.rewards.reward_set import RewardBatch, RewardSet
from fastrl.train.rewards.tasks import Problem, load_task
from fastrl.train.rollouts.dynamic_sampling import sample_batch
from fastrl.train.rollouts.generate import generate
from fastrl.train.rollouts.prompts import Prompts
from fastrl.train.rollouts.step_rewards import process_advantages, step_ends
from fastrl.train.run.run import Clock
from fastrl.train.update.reference import ReferencePolicy

GOLDEN = Path(__file__).parents[1] / "data" / "grpo_losses.json"


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


class Scripted:
    """A sampler whose groups have the answers that are written down here, one string of 0 and 1 each."""

    def __init__(self, groups: list[str]) -> None:
        self.groups: Iterator[str] = iter(groups)
        self.asked: list[str] = []

    def rollout(self, problems: list[Problem]) -> Rollout:
        self.asked += [problem.prompt for problem in problems]
        prompts = encode_prompts(TOKENIZER, [problem.prompt for problem in problems], template="{prompt}")
        return generate(
            MODEL, prompts, group_size=4, max_new_tokens=5, stop_ids=[2, *range(10, 20)], pad_id=2,
            generator=torch.Generator().manual_seed(len(self.asked)),
        )  # fmt: skip

    def score(self, problems: list[Problem], rollout: Rollout) -> RewardBatch:
        correct = torch.tensor([float(answer) for _ in problems for answer in next(self.groups)])
        # The length makes the rewards of a group differ though its answers do not.
        return RewardBatch(correct - 0.01 * rollout.completion_mask.sum(dim=1), {"exact": correct}, 0)


MODEL = tiny_model(TOKENIZER)


def sampled(tmp_path: Path, groups: list[str], **changes: Any) -> tuple[Any, Scripted]:
    config = settings(tmp_path, tmp_path, **changes)
    sampler = Scripted(groups)
    prompts = Prompts(config, load_task("chain_sum", seed=0, **SUMS))
    return sample_batch(sampler, prompts, config, 2, Clock(torch.device("cpu"))), sampler  # type: ignore[arg-type]


def test_uniform_groups_are_replaced(tmp_path: Path) -> None:
    batch, sampler = sampled(tmp_path, ["0000", "0110", "1111", "1000"], dynamic_sampling="correct")
    assert batch.rounds == 3  # two prompts, then one for each group that was missing
    assert [problem.prompt for problem in batch.problems] == [sampler.asked[1], sampler.asked[3]]
    assert batch.scored.components["exact"].tolist() == [0, 1, 1, 0, 1, 0, 0, 0]
    assert batch.metrics()["sampling/completions"] == 16
    assert batch.metrics()["sampling/correct"] == pytest.approx(7 / 16)
    for row, group in enumerate(batch.rollout.prompt_index.tolist()):
        prompt = batch.rollout.prompt_ids[group][batch.rollout.prompt_mask[group]]
        assert TOKENIZER.decode(prompt) == batch.problems[row // 4].prompt
        # A row's tokens are those that its log-probs belong to, after the rounds were joined.
        length = int(batch.rollout.completion_mask[row].sum())
        ids = batch.rollout.completion_ids[row, :length]
        logits = MODEL(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1]
        expected = torch.log_softmax(logits, -1).gather(1, ids[:, None])[:, 0]
        assert torch.allclose(batch.rollout.logprobs[row, :length], expected, rtol=0, atol=1e-5)


def test_the_tries_end_and_the_batch_is_filled_up(tmp_path: Path) -> None:
    batch, sampler = sampled(
        tmp_path, ["0000", "1111", "0000", "0001"], dynamic_sampling="correct", dynamic_sampling_tries=2
    )
    assert batch.rounds == 2
    assert [problem.prompt for problem in batch.problems] == [sampler.asked[0], sampler.asked[3]]
    assert batch.scored.total.numel() == 8


def test_rewards_that_differ_are_informative_where_rewards_decide(tmp_path: Path) -> None:
    groups = ["0000", "1111"]
    assert sampled(tmp_path, groups, dynamic_sampling="reward")[0].rounds == 1
    assert sampled(tmp_path, groups)[0].rounds == 1
    assert "sampling/rounds" not in metrics_after_a_run(tmp_path / "run", dynamic_sampling="off")[0]


def metrics_after_a_run(run_dir: Path, **changes: Any) -> list[dict[str, float]]:
    folder = save_tiny_model(run_dir / "tiny")
    run_grpo(settings(folder, run_dir / "out", **changes))
    return metrics_of(run_dir / "out")


def test_joined_rollouts_keep_their_rows() -> None:
    prompts = encode_prompts(TOKENIZER, ["1+1=", "what is 23 - 60?"], template="{prompt}")
    options: dict[str, Any] = {"group_size": 3, "stop_ids": list(range(5, 60)), "pad_id": 2}
    a = generate(MODEL, prompts[:1], max_new_tokens=2, generator=torch.Generator().manual_seed(0), **options)
    b = generate(MODEL, prompts[1:], max_new_tokens=9, generator=torch.Generator().manual_seed(1), **options)
    both = concatenate([a, b], 2)
    for part, rows in ((a, range(3)), (b, range(3, 6))):
        again = both.select(torch.tensor(list(rows)))
        assert again.prompt_index.tolist() == [0, 0, 0]
        assert again.prompt_ids[0][again.prompt_mask[0]].tolist() == part.prompt_ids[0].tolist()
        for row in range(3):
            mask, expected = again.completion_mask[row], part.completion_mask[row]
            assert again.completion_ids[row][mask].tolist() == part.completion_ids[row][expected].tolist()
            assert torch.equal(again.logprobs[row][mask], part.logprobs[row][expected])
        assert torch.equal(again.truncated, part.truncated)


def test_filtered_prompts_come_again_and_again(tmp_path: Path) -> None:
    config = settings(tmp_path, tmp_path, filter_prompts=5)
    task = load_task("chain_sum", seed=0, **SUMS)
    prompts = Prompts(config, task)
    prompts.filter(Scripted(["0000", "0001", "1111", "1010", "0000"]))  # type: ignore[arg-type]
    kept = [task.train(1, start=slot)[0].prompt for slot in (1, 3)]
    assert [problem.prompt for problem in prompts.take(3)] == [kept[0], kept[1], kept[0]]
    other = Prompts(config, task)
    other.load_state_dict(json.loads(json.dumps(prompts.state_dict())))
    assert [problem.prompt for problem in other.take(2)] == [kept[1], kept[0]]
    with pytest.raises(
        ValueError, match=r"of filter_prompts=5 problems 1 are answered right sometimes.* a step takes 2"
    ):
        Prompts(config, task).filter(Scripted(["0000", "0001", "1111", "1111", "0000"]))  # type: ignore[arg-type]


def test_a_curriculum_goes_on_when_a_stage_is_learnt(tmp_path: Path) -> None:
    config = settings(
        tmp_path, tmp_path, task_parameters={**SUMS, "max_digits": 3}, curriculum_parameter="max_digits",
        curriculum_values=[1, 3], curriculum_threshold=0.75, curriculum_window=2,
    )  # fmt: skip
    prompts = Prompts(config, load_task("chain_sum", seed=0, **SUMS))
    longest: Callable[[], int] = lambda: max(len(n.strip("-")) for p in prompts.take(30) for n in p.answer.split())  # noqa: E731
    for correct, stage in ((1.0, 0), (0.0, 0), (1.0, 0), (math.nan, 0), (0.5, 0), (1.0, 1), (1.0, 1), (1.0, 1)):
        assert longest() <= 2 if prompts.metrics()["curriculum_stage"] == 0 else longest() > 2
        prompts.observe(torch.tensor([correct, correct]))
        assert prompts.metrics()["curriculum_stage"] == stage
    with pytest.raises(ValueError, match="unknown parameter 'digits'"):
        Prompts(
            settings(tmp_path, tmp_path, curriculum_parameter="digits", curriculum_values=[1]),
            load_task("chain_sum", seed=0, **SUMS),
        )


@pytest.mark.parametrize(
    ("text", "marker", "ends"),
    [
        ("ab\ncd\nef", "\n", [2, 5, 7]),
        ("ab\ncd\n", "\n", [2, 5]),
        ("ab", "\n", [1]),
        ("", "\n", [0]),
        ("\n\n", "\n", [2]),
        ("a\n\n\nb", "\n", [1, 4]),
        ("\na\nb", "\n", [2, 3]),
        ("a<step>b<step>c", "<step>", [6, 13, 14]),
        ("a<step><step>", "<step>", [12]),
        ("a<ste>b", "<step>", [6]),
    ],
)
def test_where_steps_end(text: str, marker: str, ends: list[int]) -> None:
    ids = [TOKENIZER.convert_tokens_to_ids(character) for character in text]
    stopped = [*ids, TOKENIZER.eos_token_id]
    # The stop token has no text; it belongs to the last step.
    assert step_ends(TOKENIZER, stopped, marker) == [*ends[:-1], len(ids)]
    if ids:
        assert step_ends(TOKENIZER, ids, marker) == [*ends[:-1], len(ids) - 1]


def last_step_has_a(problem: Problem, text: str) -> float:
    del problem
    return float("a" in text.rstrip("\n").rpartition("\n")[2])


def test_process_advantages_against_the_formula(tmp_path: Path) -> None:
    texts = ["a\nb", "b", "a\na\nb", "a"]
    rows = [[TOKENIZER.convert_tokens_to_ids(character) for character in text] for text in texts]
    width = max(map(len, rows))
    mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    ids = torch.tensor([row + [2] * (width - len(row)) for row in rows])
    prompt = torch.zeros(1, 1, dtype=torch.long)
    nothing = torch.zeros(4, dtype=torch.long)
    rollout = Rollout(prompt, prompt == 0, nothing, ids, mask, torch.zeros(4, width), nothing == 0)
    config = settings(tmp_path, tmp_path, prompts_per_step=1, step_rewards={"last_step_has_a": 1.0})
    rewards = RewardSet({"last_step_has_a": last_step_has_a}, {"last_step_has_a": 1.0}, timeout_s=None)
    found, metrics = process_advantages([Problem("?", "a")], rollout, rewards, TOKENIZER, config)
    steps = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    one, zero = ((value - steps.mean()) / (steps.std() + 1e-4) for value in (1.0, 0.0))
    expected = torch.zeros(4, width)
    expected[0, :3] = torch.stack([one + zero, one + zero, zero])
    expected[1, :1] = zero
    expected[2, :5] = torch.stack([one + one + zero, one + one + zero, one + zero, one + zero, zero])
    expected[3, :1] = one
    torch.testing.assert_close(found, expected)
    assert metrics["steps_per_completion"] == 7 / 4
    assert metrics["step_reward/last_step_has_a"] == pytest.approx(4 / 7)


def test_process_supervision_trains(folder: Path, tmp_path: Path) -> None:
    # An `e` is about as frequent as anything else in the texts of a random model.
    run_grpo(
        settings(
            folder,
            tmp_path,
            rewards={"exact": 0.0},
            step_rewards={"tiny_model:digit_share": 1.0},
            step_marker="e",
            steps=20,
            prompts_per_step=4,
            group_size=8,
        )
    )
    shares = [line["step_reward/tiny_model:digit_share"] for line in metrics_of(tmp_path)]
    assert sum(shares[-5:]) > 2 * sum(shares[:5])


def test_the_reference_follows() -> None:
    policy = tiny_model(TOKENIZER)
    start = {name: p.detach().clone() for name, p in policy.named_parameters()}
    reference = ReferencePolicy(Policy.of(policy), adapters=False)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(1.0)
    for keep, share in ((0.75, 0.25), (0.75, 0.4375), (0.0, 1.0)):
        reference.update(Policy.of(policy), keep)
        for name, weight in reference.state_dict().items():
            torch.testing.assert_close(weight, start[name] + share)
            assert not weight.requires_grad


def resumed(folder: Path, tmp_path: Path, **changes: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Return the metrics of a run of four steps, and of one that died after three and was resumed after two."""
    common = {"steps": 4, "checkpoint_every": 2, **changes}
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run_grpo(settings(folder, straight, **common))
    interrupt(lambda: run_grpo(settings(folder, broken, **common)), after=3)
    run_grpo(settings(folder, broken, resume=True, **common))
    names = [p.name for p in (straight / "checkpoints" / "step_00000004").glob("*.safetensors")]
    assert {"weights.safetensors", "optimizer.safetensors"} <= set(names)
    for name in names:
        a, b = (load_file(d / "checkpoints" / "step_00000004" / name) for d in (straight, broken))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    left_out = ("time/", "tokens_per_second", "first_step", "approx_kl_old")
    first, second = (
        [{k: v for k, v in line.items() if not k.startswith(left_out)} for line in metrics_of(d)]
        for d in (straight, broken)
    )
    return first, second


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_coef": 0.1, "reference_sync_steps": 1, "reference_ema": 0.5},
        {"dynamic_sampling": "reward", "filter_prompts": 0, "rewards": {"number_only": 1.0}, "max_new_tokens": 2},
    ],
)
def test_resuming_continues_to_the_bit(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    first, second = resumed(folder, tmp_path, **changes)
    assert first == second
    if "reference_ema" in changes:
        assert (tmp_path / "straight" / "checkpoints" / "step_00000004" / "reference.safetensors").is_file()
        assert first[3]["kl"] > 0
    else:
        assert max(line["sampling/rounds"] for line in first) > 1


def test_zero_advantages_are_counted(folder: Path, tmp_path: Path) -> None:
    run_grpo(settings(folder, tmp_path, rewards={"last_number": 1.0}))  # a random model is never right
    for line in metrics_of(tmp_path):
        assert line["zero_advantage_fraction"] == 1.0
        assert line["frac_reward_zero_std"] == 1.0
        assert line["grad_norm"] == 0.0


def test_golden_losses(folder: Path, tmp_path: Path) -> None:
    run_grpo(settings(folder, tmp_path, steps=4, kl_coef=0.1, epochs_per_batch=2, minibatches=2, learning_rate=1e-3))
    golden = json.loads(GOLDEN.read_text())
    lines = metrics_of(tmp_path)
    assert len(lines) == len(golden) == 4
    for line, expected in zip(lines, golden, strict=True):
        for name, value in expected.items():
            # Another CPU sums in another order: about 1e-6 in a loss, which 16 updates of AdamW make more of.
            assert line[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


REFUSED = {
    "sft": "does not look at the rewards", "rft": "does not look at the rewards", "dft": "does not look at the rewards",
}  # fmt: skip


@pytest.mark.parametrize("loss", PolicyLoss.presets())
def test_every_loss_takes_two_steps_or_is_refused_by_name(folder: Path, tmp_path: Path, loss: str) -> None:
    config = settings(folder, tmp_path, loss=loss, kl_coef=None, epochs_per_batch=2, group_size=2)
    if loss in REFUSED:
        with pytest.raises(ValueError, match=f"'{loss}'.* {REFUSED[loss]}"):
            run_grpo(config)
        return
    run_grpo(config)
    lines = metrics_of(tmp_path)
    assert len(lines) == 2
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)
    assert ("detached_fraction" in lines[0]) == (loss == "clip_cov")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_cov_low": 2.0}, "clip_cov_low=2.0 has no effect with loss='grpo'"),
        ({"loss": "clip_cov", "clip_cov_fraction": 0.0}, r"clip_cov_fraction must be in \(0, 1\], got 0.0"),
        ({"loss": "clip_cov", "clip_cov_low": 5.0}, "clip_cov_low must be less than clip_cov_high, got 5.0 and 5.0"),
        ({"dynamic_sampling": "always"}, "dynamic_sampling must be one of off, reward, correct"),
        ({"dynamic_sampling_tries": 0}, "dynamic_sampling_tries must be at least 1"),
        ({"filter_prompts": 1}, "filter_prompts must be 0 or at least prompts_per_step=2, got 1"),
        ({"curriculum_values": [1]}, "belong together"),
        ({"curriculum_parameter": "max_digits"}, "belong together"),
        ({"curriculum_parameter": "max_digits", "curriculum_values": [1], "filter_prompts": 4}, "exclude each other"),
        ({"reference_ema": 0.9}, "needs reference_sync_steps"),
        ({"reference_ema": 1.0, "reference_sync_steps": 1}, r"must be in \[0, 1\)"),
        ({"reference_sync_steps": 1, "lora_rank": 2}, "needs a copy of the model"),
        ({"step_rewards": {"exact": 1.0}, "advantage_scale": "leave_one_out"}, "advantage_scale with step_rewards"),
        ({"step_rewards": {"exact": 1.0}, "step_marker": ""}, "step_marker must not be empty"),
        ({"step_rewards": {"exact": 1.0}, "dynamic_sampling": "reward"}, "must be 'off' or 'correct'"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, **changes)


def test_a_reference_that_nothing_is_measured_to_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference_sync_steps=1 needs a KL to a reference"):
        run_grpo(settings(folder, tmp_path, reference_sync_steps=1))
