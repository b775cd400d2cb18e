"""Supervised fine-tuning in one file: examples, packed without padding, one cross-entropy over their completions.

    records -> examples           prompt and completion, or conversations. The completions are trained
    for each step
        examples -> batches       packed to a budget of tokens. The sequences do not see each other
        batches -> gradient       PolicyLoss.from_hidden, no logits, divided by the tokens of the whole step
        one optimiser step
    now and then                  perplexity on held-out records, accuracy on held-out problems of a task

With a task and no data this is the cold start of a policy. The problems of the task with their answers, put into
`answer_template`, teach the form of an answer before any reward is paid for it.

Left out: more than one process, dropout (the model stays in eval mode), gradient checkpointing, NEFTune's noise.
"""

from __future__ import annotations

import logging

from fastrl.train.config.sft import SFTConfig
from fastrl.train.data.encoding import Encoder, Example, supervised_examples
from fastrl.train.data.packing import prove_packing, use_flash_attention
from fastrl.train.data.records import Records, read_records, split_held_out
from fastrl.train.model import load_policy
from fastrl.train.rewards.tasks import Problem, Task, load_task
from fastrl.train.run.run import Run, RunResult
from fastrl.train.update.epochs import held_out_problems, train_on_examples
from fastrl.train.update.supervised import backward_examples, held_out_loss, supervised_loss

logger = logging.getLogger(__name__)


def run_sft(config: SFTConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, data that cannot be read, and a model whose sequences
    cannot be packed.
    """
    if config.data is None and config.task is None:
        raise ValueError("sft needs data, a task to make examples of, or both; got neither")
    loss = supervised_loss(config.loss, config.loss_options)
    task = None
    if config.task is not None:
        task = load_task(config.task, **{"seed": config.seed, **config.task_parameters})
        task.held_out(config.eval_problems)  # too many of them are refused before the model is loaded
    train_records, held_out_records = sft_records(config, task)
    run = Run(config)
    policy = load_policy(config, run.device)
    encoder = Encoder(policy.tokenizer, policy.stop_ids, config.prompt_template, config.system_prompt)
    limits = {"max_tokens": config.max_tokens, "overlong": config.overlong}
    encoded = supervised_examples(train_records, encoder, **limits)
    train = encoded.examples
    held_out: list[Example] = []
    if held_out_records is not None:
        held_out = supervised_examples(held_out_records, encoder, **limits).examples
    use_flash_attention(policy.model)  # before the proof, which must see the attention that trains
    difference = prove_packing(policy.model, policy.head, train, packed=config.packing)
    logger.info("packed log-probs equal those of each sequence alone within %.2g nats", difference)
    run.start(policy.parameters())

    def gradient(chosen: list[int]) -> dict[str, float]:
        return backward_examples(run, policy, loss, [train[index] for index in chosen], budget=config.token_budget)

    with held_out_problems(run, task, policy) as problems, run:

        def evaluate_now(step: int) -> dict[str, float]:
            found = {}
            if held_out:
                measured = held_out_loss(policy, held_out, budget=config.token_budget)
                run.log.add(measured.perplexity(step).record())
                found["eval/loss"] = measured.mean
            if problems is not None:
                found |= problems.evaluate(step)
            return found

        train_on_examples(
            run, len(train), gradient=gradient, evaluate=evaluate_now, dropped=encoded.dropped, cut=encoded.cut
        )

    run.save_model(policy.model, policy.tokenizer)
    return run.result()


def sft_records(config: SFTConfig, task: Task | None) -> tuple[Records, Records | None]:
    """Return the records to train on and the held-out ones, None if the configuration wants none."""
    if config.data is None:
        assert task is not None  # a config has data or a task
        check_answers(task.train(config.task_examples), f"task {config.task}")
        train = answered(task.train(config.task_examples), config.answer_template, f"task {config.task}")
        if config.eval_problems == 0:
            return train, None
        return train, answered(task.held_out(config.eval_problems), config.answer_template, f"task {config.task}")
    records = read_records(config.data, split=config.data_split)
    if config.eval_data is not None:
        return records, read_records(config.eval_data)
    return split_held_out(records, config.eval_share) if config.eval_share else (records, None)


def check_answers(problems: list[Problem], source: str) -> None:
    """Raise `ValueError` for a problem without a reference answer, as in tasks whose scorer judges any solution."""
    if any(p.entry.get("answer", p.answer) is None for p in problems):
        raise ValueError(f"{source} has problems without a reference answer: there is nothing to imitate")


def answered(problems: list[Problem], template: str, source: str) -> Records:
    """Return the problems as records of prompt and completion, the answer put into the template."""
    rows = [{"prompt": p.prompt, "completion": template.replace("{answer}", p.answer)} for p in problems]
    return Records(rows, source=source, unit="problem")
