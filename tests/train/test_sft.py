"""Supervised fine-tuning: against plain PyTorch, budget invariance, held-out loss, resuming, learning, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from loop_checks import assert_golden_curve, assert_resumes_to_the_bit, metrics_of
from tiny_model import tiny_model, tiny_tokenizer
from torch import Tensor

from fastrl.train.config.sft import SFTConfig
from fastrl.train.data.encoding import Example
from fastrl.train.model import Policy
from fastrl.train.sft import run_sft
from fastrl.train.update.epochs import shuffled
from fastrl.train.update.supervised import HeldOutLoss, backward_examples, held_out_loss, supervised_loss

TOKENIZER = tiny_tokenizer()
EXAMPLES = Path(__file__).parents[2] / "examples"
SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
TALK = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}] * 2


def settings(folder: Path, run_dir: Path, **changes: Any) -> SFTConfig:
    values: dict[str, Any] = {
        "model": str(folder), "run_dir": str(run_dir), "device": "cpu", "prompt_template": "{prompt}", "steps": 3,
        "task": "chain_sum", "task_parameters": SUMS, "task_examples": 20, "examples_per_step": 4, "max_tokens": 90,
        "micro_batch_tokens": 200, "learning_rate": 1e-2, "eval_problems": 0, "max_new_tokens": 4, "save_model": False,
        "reward_timeout_s": None,
    }  # fmt: skip
    return SFTConfig(**{**values, **changes})


def some_examples() -> list[Example]:
    pairs = [("1+1=", "2"), ("what is seven and eight?", "15"), ("say", "one two three")]
    made = [Example.of(TOKENIZER(p).input_ids, [*TOKENIZER(c).input_ids, 2]) for p, c in pairs]
    gaps = Example(TOKENIZER("user and assistant in turns").input_ids, [n % 5 in (2, 3) for n in range(27)])
    return [*made, gaps]


def gradients(loss: str, budget: int | None, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    model = tiny_model(TOKENIZER).double()
    run = SimpleNamespace(device="cpu", backward=lambda value: value.backward())
    metrics = backward_examples(
        run, Policy.of(model, temperature=0.8), supervised_loss(loss, options), some_examples(), budget=budget
    )
    return {name: parameter.grad for name, parameter in model.named_parameters()}, metrics


def plain_logprobs(model: Any, example: Example, temperature: float = 1.0) -> Tensor:
    """Log-probs of the trained tokens, from the model's own logits."""
    ids = torch.tensor(example.ids)
    logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1] / temperature
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, ids[1:, None])[:, 0]
    return logprobs[torch.tensor(example.trained[1:])]


@pytest.mark.parametrize(
    ("loss", "options"),
    [("sft", {}), ("dft", {}), ("rft", {"aggregate": "sequence_mean"}), ("sft", {"aggregate": "token_sum"})],
)
def test_gradient_is_that_of_the_formula_in_plain_pytorch(loss: str, options: dict[str, Any]) -> None:
    ours, metrics = gradients(loss, 40, **options)
    model = tiny_model(TOKENIZER).double()
    rows = [plain_logprobs(model, example, 0.8) for example in some_examples()]
    terms = [-row * (row.exp().detach() if loss == "dft" else 1.0) for row in rows]
    if options.get("aggregate") == "sequence_mean":
        value = torch.stack([term.mean() for term in terms]).mean()
    else:
        value = torch.cat(terms).sum() if options else torch.cat(terms).mean()
    value.backward()
    assert metrics["loss"] == pytest.approx(value.item(), rel=1e-6)
    assert metrics["trained_tokens"] == sum(len(row) for row in rows)
    for name, parameter in model.named_parameters():
        granted = 1e-5 * float(parameter.grad.abs().max())  # the model's norms are in float32
        assert torch.allclose(ours[name], parameter.grad, rtol=0, atol=granted), name


@pytest.mark.parametrize("aggregate", ["token_mean", "sequence_mean", "sequence_sum"])
@pytest.mark.parametrize("budget", [26, None])
def test_the_budget_changes_the_memory_only(aggregate: str, budget: int | None) -> None:
    whole, metrics = gradients("sft", 200, aggregate=aggregate)
    split, split_metrics = gradients("sft", budget, aggregate=aggregate)
    assert (metrics["micro_batches"], metrics["packing"]) == (1, metrics["tokens"] / 200)
    assert split_metrics["micro_batches"] == (4 if budget is None else 3)
    for name, gradient in whole.items():
        assert torch.allclose(split[name], gradient, rtol=0, atol=1e-5 * float(gradient.abs().max())), name
    for name in ("loss", "entropy", "trained_tokens", "tokens"):
        assert split_metrics[name] == pytest.approx(metrics[name], rel=1e-5), name


@pytest.mark.parametrize("budget", [26, 200, None])
def test_held_out_loss_is_weighted_by_tokens(budget: int | None) -> None:
    model = tiny_model(TOKENIZER)
    measured = held_out_loss(Policy.of(model, temperature=0.5), some_examples(), budget=budget)
    with torch.no_grad():
        rows = [-plain_logprobs(model, example).double() for example in some_examples()]
    mean = torch.cat(rows).mean()
    residuals = torch.stack([row.sum() - len(row) * mean for row in rows])
    assert measured.n_tokens == sum(map(len, rows))
    assert measured.mean == pytest.approx(float(mean), rel=1e-5)
    assert measured.standard_error == pytest.approx(
        float(residuals.square().sum().sqrt()) / measured.n_tokens, rel=1e-4
    )
    record = measured.perplexity(3).record()
    assert record["value"] == pytest.approx(math.exp(float(mean)), rel=1e-4)
    assert (record["measure"], record["better"], record["n"], record["step"]) == ("perplexity", "lower", 4, 3)


def test_a_perplexity_beyond_the_floats_is_infinite() -> None:
    assert HeldOutLoss(800.0, 1.0, 2, 5).perplexity(0).value == math.inf


@hypothesis_settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 25), st.integers(0, 5))
def test_the_order_is_one_stream_of_whole_permutations(n: int, start: int, count: int, seed: int) -> None:
    stream = shuffled(n, start=0, count=start + count, seed=seed)
    assert shuffled(n, start=start, count=count, seed=seed) == stream[start:]
    for first in range(0, len(stream) - n + 1, n):
        assert sorted(stream[first : first + n]) == list(range(n))


def test_epochs_and_seeds_have_different_orders() -> None:
    orders = [tuple(shuffled(30, start=s, count=30, seed=seed)) for s in (0, 30) for seed in (0, 1)]
    assert len(set(orders)) == 4


def test_resuming_continues_to_the_bit(folder: Path, tmp_path: Path) -> None:
    def train(run_dir: str, **changes: Any) -> None:
        run_sft(settings(
            folder, Path(run_dir), steps=4, lr_schedule="linear", checkpoint_every=2, eval_problems=4,
            examples_per_step=7, micro_batch_tokens=100, **changes,
        ))  # fmt: skip

    assert_resumes_to_the_bit(train, tmp_path, steps=4, die_after=3)


def test_the_loss_curve_is_the_golden_one(folder: Path, tmp_path: Path) -> None:
    run_sft(settings(folder, tmp_path, steps=6, learning_rate=1e-3))
    assert_golden_curve("golden_sft", tmp_path)


def test_it_learns_the_answers(folder: Path, tmp_path: Path) -> None:
    result = run_sft(settings(
        folder, tmp_path, steps=60, task_examples=8, examples_per_step=8, eval_problems=4, answer_template="= {answer}",
    ))  # fmt: skip
    losses = [line["loss"] for line in metrics_of(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]
    by_step = {record["step"]: record["value"] for record in result.evaluations if "measure" in record}
    assert by_step[60] < by_step[0]


def test_what_a_run_on_records_leaves(folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(30)] + [{"messages": TALK}]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": "3" * 95, "completion": ""}]))
    config = settings(
        folder, tmp_path / "run", data=str(data), task=None, task_parameters={}, eval_share=0.3, prompt_template="chat",
        save_model=True, lora_rank=2,
    )  # fmt: skip
    result = run_sft(config)
    assert [(e["step"], e["measure"]) for e in result.evaluations] == [(0, "perplexity"), (3, "perplexity")]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == config.as_dict()
    lines = metrics_of(tmp_path / "run")
    assert lines[-1]["dropped_examples"] == 1.0
    assert lines[-1]["eval/loss"] == pytest.approx(math.log(result.evaluations[-1]["value"]))
    assert lines[-1]["epoch"] == pytest.approx(3 * 4 / (31 - result.evaluations[0]["n"]))
    assert (tmp_path / "run" / "model" / "adapter_config.json").is_file()


def test_held_out_records_of_their_own_and_a_task_beside_the_data(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "1+1=", "completion": "2"}]))
    (tmp_path / "b.json").write_text(json.dumps([{"prompt": "1+2=", "completion": "3"}] * 2))
    both = {"data": str(tmp_path / "a.json"), "eval_data": str(tmp_path / "b.json"), "eval_problems": 3}
    result = run_sft(settings(folder, tmp_path / "run", steps=1, packing=False, loss="dft", **both))
    assert [(e.get("measure", "accuracy"), e["n"]) for e in result.evaluations] == [
        ("perplexity", 2),
        ("accuracy", 3),
    ] * 2
    assert "packing" not in metrics_of(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 202}, "must hold the longest example, max_tokens - 1 = 201, got 200"),
        ({"eval_share": 1.0}, "eval_share must be at least 0 and less than 1"),
        ({"answer_template": "answer"}, "must contain '{answer}'"),
        ({"eval_data": "x.jsonl"}, "belong to data, which is not given"),
        ({"overlong": "wrap"}, "overlong must be one of drop, cut"),
        ({"examples_per_step": 0}, "examples_per_step must be at least 1"),
        ({"max_tokens": 1}, "max_tokens must be at least 2"),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": None}, "sft needs data, a task to make examples of, or both; got neither"),
        ({"loss": "grpo"}, "for given tokens choose sft, rft or dft"),
        ({"loss_options": {"aggregate": "prompt_mean"}}, "'prompt_mean' is not for packed examples"),
        ({"loss_options": {"aggregate": "constant"}}, "'constant' is not for packed examples"),
        ({"loss_options": {"kl": "k3"}}, "kl='k3' needs the log-probs of another policy"),
        ({"loss_options": {"clip_low": 0.1}}, "clip_low"),
        ({"data": "none.jsonl"}, "there is no data file none.jsonl"),
        ({"max_tokens": 5}, "none of the 20 records of task chain_sum fits max_tokens=5"),
    ],
)
def test_what_the_loop_cannot_do_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_sft(settings(folder, tmp_path / "run", **changes))


def test_the_example_is_a_configuration() -> None:
    values = yaml.safe_load((EXAMPLES / "sft.yaml").read_text())
    config = SFTConfig(**values)
    supervised_loss(config.loss, config.loss_options)
    assert {key: value for key, value in config.as_dict().items() if key in values} == values
