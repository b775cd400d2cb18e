"""Pairs of an answer and its revision: what the model is asked, what becomes a pair, what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_model import save_tiny_model

from fastrl.train import constitutional
from fastrl.train.constitutional import ConstitutionalConfig, make_constitutional_pairs, revised
from fastrl.train.rewards.tasks import Problem

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


class Scripted:
    """Says what it is told to, and keeps what it was asked."""

    def __init__(self, *replies: tuple[list[str], list[bool]]) -> None:
        self.replies, self.asked = list(replies), []

    def reply(self, questions: Sequence[str], max_new_tokens: int) -> tuple[list[str], list[bool]]:
        self.asked.append((list(questions), max_new_tokens))
        return self.replies.pop(0)


def test_the_revision_of_the_criticised_answer_is_chosen() -> None:
    config = ConstitutionalConfig(
        critique_template="{prompt}|{answer}|{principle}", revision_template="{prompt}|{answer}|{critique}",
        max_new_tokens=7, critique_tokens=9, keep_truncated=False,
    )  # fmt: skip
    speaker: Any = Scripted(
        (["4 {critique}", "5", "6"], [False, False, True]),
        (["wrong", "right", "long"], [False, False, False]),
        (["3", " 5 ", "7"], [False, False, False]),
    )
    problems = [Problem(prompt=f"p{n}", answer="") for n in range(3)]
    pairs = revised(speaker, problems, ["be right"] * 3, config)
    # The second revision says the same, the third answer was cut off.
    expected = {
        "prompt": "p0", "chosen": "3", "rejected": "4 {critique}", "principle": "be right", "critique": "wrong",
    }  # fmt: skip
    assert pairs == [expected]
    assert speaker.asked[0] == (["p0", "p1", "p2"], 7)
    assert speaker.asked[1] == (["p0|4 {critique}|be right", "p1|5|be right", "p2|6|be right"], 9)
    assert speaker.asked[2] == (["p0|4 {critique}|wrong", "p1|5|right", "p2|6|long"], 7)


def test_a_model_makes_a_file(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    config = ConstitutionalConfig(
        model=str(model), prompt_template="{prompt}", task_parameters=SUMS, problems=16, sample_batch_size=6,
        max_new_tokens=5, critique_tokens=4, principles=("be right",), output=str(tmp_path / "pairs.jsonl"),
        critique_template="{prompt}{answer}{principle}", revision_template="{prompt}{answer}{critique}",
    )  # fmt: skip
    lines = [json.loads(line) for line in make_constitutional_pairs(config).read_text().splitlines()]
    assert 1 < len(lines) <= 16
    assert all(line["chosen"] != line["rejected"] for line in lines)
    judged = ConstitutionalConfig(
        **{**vars(config), "rewards": {"tiny_model:digit_share": 1.0}, "reward_timeout_s": None}
    )
    kept = [json.loads(line) for line in make_constitutional_pairs(judged).read_text().splitlines()]
    assert 0 < len(kept) <= len(lines)
    assert all(line["chosen_reward"] > line["rejected_reward"] for line in kept)
    with pytest.raises(ValueError, match="not one of 16 answers"):
        make_constitutional_pairs(ConstitutionalConfig(**{**vars(config), "rewards": {"exact": 0.0}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"principles": ()}, "principles must have at least one"),
        ({"critique_template": "{prompt} {answer}"}, "critique_template must contain"),
        ({"revision_template": "{answer}"}, "revision_template must contain"),
        ({"critique_tokens": 0}, "critique_tokens must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        constitutional.ConstitutionalConfig(**changes)
