"""Supervised fine-tuning in one file: examples, packed without padding, one cross-entropy over their completions.

    records -> examples           prompt and completion, or conversations; the completions are trained
    for each step
        examples -> batches       packed to a budget of tokens; the sequences do not see each other
        batches -> gradient       PolicyLoss.from_hidden, no logits; divided by the tokens of the whole step
        one optimiser step
    now and then                  perplexity on held-out records, accuracy on held-out problems of a task

With a task and no data this is the cold start of a policy: the problems of the task with their answers, put into
`answer_template`, teach the form of an answer before any reward is paid for it.

Left out: more than one process, dropout (the model stays in eval mode), gradient checkpointing, NEFTune's noise.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

from fastrl.train.config import TaskEvaluationConfig, check_choice, check_int
from fastrl.train.data import Records, read_records, split_held_out
from fastrl.train.epochs import held_out_problems, train_on_examples
from fastrl.train.examples import Encoder, Example, supervised_examples
from fastrl.train.model import add_lora, head_of, load_model, stop_token_ids
from fastrl.train.packing import prove_packing, use_flash_attention
from fastrl.train.run import Run, RunResult
from fastrl.train.supervised import backward_examples, held_out_loss, supervised_loss
from fastrl.train.tasks import Problem, Task, load_task

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TaskEvaluationConfig):
    """Settings of `run_sft`."""

    # The data
    data: str | None = None
    """Records to train on, as `fastrl.train.data.read_records` takes them; None: problems of the task, answered."""
    data_split: str | None = None
    """Split of a data source that has several."""
    eval_data: str | None = None
    """Held-out records; None takes `eval_share` of `data`."""
    eval_share: float = 0.05
    """Share of the prompts of `data` that is held out, by a hash of each; 0 holds none out."""
    max_tokens: int = 1024
    """Longest example, prompt and completions together."""
    overlong: Literal["drop", "cut"] = "drop"
    """What becomes of a longer one: left out, or its end is; both are counted."""

    # The task
    task: str | None = None
    """A reasoning-gym dataset: its held-out problems are answered in evaluations, and without `data` it is the data."""
    task_examples: int = 1000
    """Problems of the task to train on, where there is no `data`."""
    answer_template: str = "{answer}"
    """The completion that is trained for a problem, with `{answer}` in the place of the answer."""

    # The loss
    loss: str = "sft"
    """A preset of `fastrl.PolicyLoss` for given tokens: sft, or dft, which weights a token by its own probability."""
    loss_options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Any other field of `fastrl.PolicyLoss`, as `aggregate: sequence_mean`."""
    temperature: float = 1.0
    """Divides the logits where evaluations sample; the loss is at 1."""

    # The batch
    examples_per_step: int = 16
    """Examples in an optimiser step."""
    micro_batch_tokens: int = 2048
    """Tokens in one forward and backward pass; it changes the memory, not the gradient."""
    packing: bool = True
    """Several examples in a pass; false takes one at a time, for a model whose sequences cannot be kept apart."""

    run_dir: str = "runs/sft"
    """Folder of the run: metrics, evaluations, samples, checkpoints and the final model."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for values that cannot be."""
        super().__post_init__()
        for name in ("task_examples", "examples_per_step"):
            check_int(name, getattr(self, name), at_least=1)
        for name in ("max_tokens", "micro_batch_tokens"):
            check_int(name, getattr(self, name), at_least=2)
        check_choice("overlong", self.overlong, ("drop", "cut"))
        if self.packing and self.micro_batch_tokens < self.max_tokens - 1:
            raise ValueError(
                f"micro_batch_tokens must hold the longest example, max_tokens - 1 = {self.max_tokens - 1}, "
                f"got {self.micro_batch_tokens}"
            )
        if not 0.0 <= self.eval_share < 1.0:
            raise ValueError(f"eval_share must be at least 0 and less than 1, got {self.eval_share}")
        if "{answer}" not in self.answer_template:
            raise ValueError(f"answer_template must contain '{{answer}}', got {self.answer_template!r}")
        if self.data is None and (self.eval_data is not None or self.data_split is not None):
            raise ValueError("eval_data and data_split belong to data, which is not given")

    @property
    def token_budget(self) -> int | None:
        """Tokens in a packed batch; None where batches hold one example."""
        return self.micro_batch_tokens if self.packing else None


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
    train_records, held_out_records = records_of(config, task)
    run = Run(config)
    model, tokenizer = load_model(config.model, dtype=config.dtype, device=run.device)
    stop_ids = stop_token_ids(model, tokenizer)
    encoder = Encoder(tokenizer, stop_ids, config.prompt_template, config.system_prompt)
    limits = {"max_tokens": config.max_tokens, "overlong": config.overlong}
    encoded = supervised_examples(train_records, encoder, **limits)
    train = encoded.examples
    held_out: list[Example] = []
    if held_out_records is not None:
        held_out = supervised_examples(held_out_records, encoder, **limits).examples
    if config.lora_rank:
        model = add_lora(model, rank=config.lora_rank, alpha=config.lora_alpha, targets=config.lora_modules)
    use_flash_attention(model)
    head = head_of(model)
    difference = prove_packing(model, head, train, packed=config.packing)
    logger.info("packed log-probs equal those of each sequence alone within %.2g nats", difference)
    run.optimize(dict(model.named_parameters()))

    def gradient(chosen: list[int]) -> dict[str, float]:
        return backward_examples(run, model, head, loss, [train[index] for index in chosen], budget=config.token_budget)

    with held_out_problems(run, task, stop_ids) as problems, run:

        def evaluate_now(step: int) -> dict[str, float]:
            found = {}
            if held_out:
                measured = held_out_loss(model, head, held_out, budget=config.token_budget)
                run.log.add(measured.perplexity(step).record())
                found["eval/loss"] = measured.mean
            if problems is not None:
                found |= problems.evaluate(model, tokenizer, step)
            return found

        train_on_examples(
            run, len(train), gradient=gradient, evaluate=evaluate_now, dropped=encoded.dropped, cut=encoded.cut
        )

    run.save_model(model, tokenizer)
    return run.result()


def records_of(config: SFTConfig, task: Task | None) -> tuple[Records, Records | None]:
    """Return the records to train on and the held-out ones, None where there are to be none."""
    if config.data is None:
        assert task is not None  # a config has data or a task
        train = answered(task.train(config.task_examples), config.answer_template, f"task {config.task}")
        if config.eval_problems == 0:
            return train, None
        return train, answered(task.held_out(config.eval_problems), config.answer_template, f"task {config.task}")
    records = read_records(config.data, split=config.data_split)
    if config.eval_data is not None:
        return records, read_records(config.eval_data)
    return split_held_out(records, config.eval_share) if config.eval_share else (records, None)


def answered(problems: list[Problem], template: str, source: str) -> Records:
    """Return the problems as records of prompt and completion, the answer put into the template."""
    rows = [{"prompt": p.prompt, "completion": template.replace("{answer}", p.answer)} for p in problems]
    return Records(rows, source=source, unit="problem")
