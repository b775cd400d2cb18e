"""Rejection sampling fine-tuning in one file: sample, verify, keep the right completions, fine-tune on them.

    for each round of `steps_per_round` steps
        prompts -> completions        `group_size` of each, sampled from the policy as it is now
        completions -> kept ones      reward at least `keep_reward`, ended by themselves. At most `keep_per_prompt` of
                                      a prompt, and no text twice if `distinct`
        kept ones -> steps            `epochs_per_round` passes in random order, packed without padding, cross-entropy

With the defaults it is the rejection sampling fine-tuning of Yuan et al. (arXiv 2308.01825) in rounds. A round goes on
from the policy of the last one and does not begin again at the first model.

With one step per round every completion comes from the very policy that it trains. DeepSeekMath (arXiv 2402.03300,
section 5.2) calls it online RFT: the policy gradient whose coefficient is 1 for a right completion and 0 for a wrong
one. `OnlineRFTConfig` has those defaults.

Left out: more than one process, an inference engine for the samples, dropout, gradient checkpointing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from fastrl.train.config.rft import RFTConfig
from fastrl.train.data.encoding import Example
from fastrl.train.data.packing import prove_packing, use_flash_attention
from fastrl.train.model import load_policy
from fastrl.train.rewards.reward_set import build_rewards, check_rewards
from fastrl.train.rewards.tasks import load_task
from fastrl.train.rollouts.evaluate import CORRECT, HeldOut
from fastrl.train.rollouts.rejection import Rejection, sample_and_reject
from fastrl.train.run.run import Run, RunResult
from fastrl.train.update.epochs import shuffled
from fastrl.train.update.supervised import backward_examples, supervised_loss

logger = logging.getLogger(__name__)


class KeptCompletions:
    """The completions that the last round kept. A checkpoint holds them, so it can be in the middle of a round."""

    def __init__(self) -> None:
        self.examples: list[Example] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the examples as flat tensors."""
        return {
            "ids": torch.tensor([token for e in self.examples for token in e.ids], dtype=torch.int64),
            "trained": torch.tensor([kept for e in self.examples for kept in e.trained], dtype=torch.bool),
            "lengths": torch.tensor([len(e.ids) for e in self.examples], dtype=torch.int64),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the examples."""
        lengths = state["lengths"].tolist()
        ids, trained = state["ids"].split(lengths), state["trained"].split(lengths)
        self.examples = [Example(i.tolist(), t.tolist()) for i, t in zip(ids, trained, strict=True)]


def run_rft(config: RFTConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, a round of several steps without a right completion, and a
    model whose sequences cannot be packed.
    """
    loss = supervised_loss(config.loss, config.loss_options)
    task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
    task.held_out(config.eval_problems)  # too many of them are refused before the model is loaded
    check_rewards(config.rewards, task)
    run = Run(config)
    policy = load_policy(config, run.device)
    use_flash_attention(policy.model)
    kept = KeptCompletions()
    run.register("kept", kept)
    run.start(policy.parameters())
    rewards = build_rewards({CORRECT: 0.0, **config.rewards}, task, config.reward_timeout_s)
    held_out = HeldOut(run, task, rewards, policy, config.eval_rewards)
    rejection = Rejection(config.keep_reward, config.keep_per_prompt, config.distinct)

    with rewards, run:
        if run.start_step == 0:
            held_out.evaluate(0)
        for step in run.steps():
            # Sampling, at the beginning of a round
            metrics: dict[str, float] = {}
            round_number, done_in_round = divmod(step, config.steps_per_round)
            if done_in_round == 0:
                count = config.prompts_per_step * config.steps_per_round
                sampled = sample_and_reject(
                    policy,
                    task.train(count, start=round_number * count),
                    rewards,
                    rejection,
                    group_size=config.group_size,
                    batch_size=config.sample_batch_size,
                    prompt_template=config.prompt_template,
                    system_prompt=config.system_prompt,
                    max_new_tokens=config.max_new_tokens,
                    generator=run.generator,
                )
                kept.examples, metrics = sampled.kept, sampled.metrics
                if step == 0:
                    difference = prove_packing(policy.model, policy.head, sampled.some, packed=config.packing)
                    logger.info("packed log-probs equal those of each sequence alone within %.2g nats", difference)
                if not kept.examples and config.steps_per_round > 1:
                    raise ValueError(
                        f"none of the {count * config.group_size} completions of round {round_number} was right: begin "
                        "from a better model (fastrl train sft), with an easier task or more samples"
                    )
            run.clock.lap("rollout")

            # A gradient step on this step's share of them. An online step without a right completion takes none.
            n = len(kept.examples)
            size = -(-n * config.epochs_per_round // config.steps_per_round)  # rounded up
            order = shuffled(n, start=done_in_round * size, count=size, seed=config.seed + round_number) if n else []
            examples = [kept.examples[index] for index in order]
            metrics["trained_completions"] = float(len(examples))
            if examples:
                metrics |= backward_examples(run, policy, loss, examples, budget=config.token_budget)
                run.clock.lap("backward")
                metrics |= {name: float(total / count) for name, (total, count) in run.clip_and_step().items()}
                run.clock.lap("optimizer")
            metrics |= {"learning_rate": run.learning_rate, **run.clock.times()}
            if run.evaluation_due(step + 1):
                metrics |= held_out.evaluate(step + 1)
            run.finish_step(step, metrics)

    run.save_model(policy.model, policy.tokenizer)
    return run.result()
