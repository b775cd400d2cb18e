"""Iterative GRPO: rounds of fresh pairs, a reward model that is trained further on them, and GRPO on its scores.

    for each round
        policy -> pairs               fresh problems, its own completions, ranked by the rewards of `pairs`
        pairs -> reward model         trained further, with a share of the pairs of earlier rounds among the fresh ones
        reward model -> policy        GRPO, with the policy as the round begins as the reference of the KL

This is algorithm 1 of DeepSeekMath (Shao et al. 2024, arXiv 2402.03300). The reward model follows the policy, because
it would otherwise know the policy's samples less and less. A tenth of its data is old.

Here every round is three runs of loops, which can be run by hand too. Each keeps its folder. Called again after a stop,
`iterate` does nothing twice: it skips a run whose model is there, and continues one that was stopped.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.config.reward_model import RewardModelConfig
from fastrl.train.config.run import RunConfig, check_int
from fastrl.train.grpo import run_grpo
from fastrl.train.pairs import PairsConfig, make_pairs, write_pairs
from fastrl.train.reward_model import run_reward_model
from fastrl.train.run.checkpoint import latest_checkpoint

logger = logging.getLogger(__name__)
Settings = TypeVar("Settings", bound=RunConfig)


def with_replay(
    fresh: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]], share: float, seed: int
) -> list[dict[str, Any]]:
    """Return the fresh records and, after them, so many random earlier ones that they are `share` of all.

    If there are too few earlier records, all of them are taken.

    Raises:
        ValueError: `share` is outside [0, 1).
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share must be at least 0 and less than 1, got {share}")
    count = min(len(earlier), round(share / (1.0 - share) * len(fresh)))
    return [*fresh, *random.Random(seed).sample(list(earlier), count)]


def iterate(
    run_dir: str | Path,
    *,
    rounds: int,
    pairs: PairsConfig,
    reward_model: RewardModelConfig,
    grpo: GRPOConfig,
    replay: float = 0.1,
) -> list[Path]:
    """Run the rounds and return the folder of the policy after each.

    Args:
        run_dir: folder of all rounds, with `round_0/pairs.jsonl`, `round_0/reward_model`, `round_0/grpo`, ...
        rounds: how many.
        pairs: settings of the fresh pairs. Each round takes the next problems.
        reward_model: settings of the reward model. The first round begins from its `model`.
        grpo: settings of the policy. The first round begins from its `model`. The score of the reward model is added to
            its rewards.
        replay: share of a reward model's pairs that come from earlier rounds.

    Raises:
        ValueError: settings that do not fit together, or a round without a pair.
    """
    check_int("rounds", rounds, at_least=1)
    policy, classifier = grpo.model, reward_model.model
    earlier: list[dict[str, Any]] = []
    policies = []
    for number in range(rounds):
        folder = Path(run_dir) / f"round_{number}"
        sampled = dataclasses.replace(
            pairs, model=policy, output=str(folder / "fresh.jsonl"), seed=pairs.seed,
            first_problem=pairs.first_problem + number * pairs.problems,
        )  # fmt: skip
        fresh_file = Path(sampled.output)
        if not fresh_file.is_file():
            make_pairs(sampled)
        fresh = [json.loads(line) for line in fresh_file.read_text(encoding="utf-8").splitlines()]
        data = write_pairs(with_replay(fresh, earlier, replay, seed=number), folder / "pairs.jsonl")
        earlier += fresh
        scored = dataclasses.replace(
            reward_model, model=classifier, data=str(data), run_dir=str(folder / "reward_model"), save_model=True
        )
        classifier = _once(scored, run_reward_model)
        trained = dataclasses.replace(
            grpo, model=policy, reward_model=classifier, run_dir=str(folder / "grpo"), save_model=True
        )
        policy = _once(trained, run_grpo)
        logger.info("round %d of %d: %d fresh pairs, policy in %s", number + 1, rounds, len(fresh), policy)
        policies.append(Path(policy))
    return policies


def _once(config: Settings, train: Callable[[Settings], Any]) -> str:
    """Return the folder of the model of a run, which is trained unless it is there."""
    folder = Path(config.run_dir)
    if not (folder / "model" / "config.json").is_file():
        # A stopped run goes on from its last checkpoint, or begins anew if it has none.
        stopped = latest_checkpoint(folder / "checkpoints") is not None
        train(dataclasses.replace(config, resume=stopped, overwrite=not stopped))
    return str(folder / "model")
