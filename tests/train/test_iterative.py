"""Iterative GRPO: what is replayed, what each round begins from, and going on after a stop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from loop_checks import metrics_of
from tiny_model import save_tiny_model

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.config.reward_model import RewardModelConfig
from fastrl.train.iterative import iterate, with_replay
from fastrl.train.pairs import PairsConfig

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def test_a_tenth_of_the_pairs_is_old() -> None:
    fresh, earlier = [{"new": n} for n in range(90)], [{"old": n} for n in range(50)]
    mixed = with_replay(fresh, earlier, 0.1, seed=0)
    assert mixed[:90] == fresh
    assert len(mixed) == 100
    assert len({record["old"] for record in mixed[90:]}) == 10
    assert with_replay(fresh, [], 0.1, seed=0) == fresh
    assert len(with_replay(fresh, earlier, 0.5, seed=0)) == 140
    with pytest.raises(ValueError, match="share must be at least 0"):
        with_replay(fresh, earlier, 1.0, seed=0)


def test_each_round_begins_from_the_models_of_the_last(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    common: dict[str, Any] = {"model": str(model), "device": "cpu", "prompt_template": "{prompt}"}
    sums: dict[str, Any] = {"task_parameters": SUMS, "max_new_tokens": 5, "reward_timeout_s": None}

    def run() -> list[Path]:
        return iterate(
            tmp_path / "run", rounds=2, replay=0.3,
            pairs=PairsConfig(
                problems=6, group_size=4, sample_batch_size=8, rewards={"tiny_model:digit_share": 1.0}, **common, **sums
            ),
            reward_model=RewardModelConfig(steps=2, examples_per_step=4, learning_rate=1e-2, eval_share=0.0, **common),
            grpo=GRPOConfig(
                steps=1, rewards={"exact": 0.0}, prompts_per_step=2, group_size=2, learning_rate=1e-3, eval_problems=0,
                kl_coef=0.1, **common, **sums,
            ),
        )  # fmt: skip

    policies = run()
    first, second = (tmp_path / "run" / f"round_{number}" for number in (0, 1))
    assert policies == [first / "grpo" / "model", second / "grpo" / "model"]

    def config(folder: Path, loop: str) -> dict[str, Any]:
        return json.loads((folder / loop / "config.json").read_text())

    assert config(second, "grpo")["model"] == str(first / "grpo" / "model")
    assert config(second, "reward_model")["model"] == str(first / "reward_model" / "model")
    assert config(second, "grpo")["reward_model"] == str(second / "reward_model" / "model")
    lines = [
        (folder / name).read_text().splitlines()
        for folder in (first, second)
        for name in ("fresh.jsonl", "pairs.jsonl")
    ]
    assert lines[0] == lines[1]
    assert set(lines[3]) - set(lines[2]) <= set(lines[0])
    assert len(lines[3]) > len(lines[2])
    # The reference of a round is the policy as it begins: before the first step its KL is 0.
    assert metrics_of(second / "grpo")[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    written = (first / "grpo" / "metrics.jsonl").stat().st_mtime_ns
    assert run() == policies
    assert (first / "grpo" / "metrics.jsonl").stat().st_mtime_ns == written
    # Stopped before the model of the second round was written: its run is there, without a checkpoint.
    before = metrics_of(second / "grpo")[0]
    shutil.rmtree(second / "grpo" / "model")
    assert run() == policies
    assert metrics_of(second / "grpo")[0]["loss"] == before["loss"]
    assert (second / "grpo" / "model" / "config.json").is_file()
