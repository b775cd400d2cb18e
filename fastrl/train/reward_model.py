"""A reward model in one file: given pairs, a score at the last token, Bradley-Terry.

    records -> pairs              a prompt with its chosen and its rejected completion, perhaps with a margin
    for each step
        pairs -> scores           the backbone and a linear head with one output, at the last token of a completion
        scores -> gradient        reward_model_loss, divided by the pairs of the whole step
        one optimiser step
    now and then                  held-out pairs: how often the chosen one has the greater score, and by how much

The loop writes a sequence classifier of transformers with one label, and the tokenizer beside it. `reward_model` of
`fastrl train grpo` and `ppo` takes the folder, and so does other software. Training goes through transformers' own
forward pass, so the trained score is the one that a reader of the folder gets. That pass takes the score at the last
token that is not the padding token. If the padding token also ends completions, the classifier gets another one
(`scoring_pad_id`).

The backbone comes from a language model, and the head begins at zero: every score is 0 before the first step. With
adapters, the head is trained in full, and the adapters are merged into the weights that are written.

Left out: more than one process, dropout (the model stays in eval mode), gradient checkpointing, classification of the
steps of a solution (the loss is `fastrl.losses.reward.process_reward_loss`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fastrl.losses.reward import reward_model_loss
from fastrl.train.config.reward_model import RewardModelConfig
from fastrl.train.data.encoding import Encoder, PreferenceExample, preference_examples
from fastrl.train.preferences.comparisons import comparison_records
from fastrl.train.pretrained import DTYPES, SMOLLM2, smollm2_path
from fastrl.train.rewards.model import sequence_scores
from fastrl.train.run.measure import Measure, Measurement
from fastrl.train.run.run import MetricSums, Run, RunResult
from fastrl.train.update.epochs import log_measurements, train_on_examples

PAIR_ACCURACY = Measure("pair accuracy", share=True)


SCORE_MARGIN = Measure("score margin")


def run_reward_model(config: RewardModelConfig) -> RunResult:
    """Train as `config` says and return where the results are.

    Raises ValueError for settings that do not fit together, data that cannot be read, and a model that has no sequence
    classifier in transformers.
    """
    train_records, held_out_records = comparison_records(config)
    run = Run(config)
    model, tokenizer, encoder = load_classifier(config, run.device)
    limits: dict[str, Any] = {"max_tokens": config.max_tokens, "overlong": config.overlong}
    encoded = preference_examples(train_records, encoder, **limits)
    train = encoded.examples
    held_out: list[PreferenceExample] = []
    if held_out_records is not None:
        held_out = preference_examples(held_out_records, encoder, **limits).examples
    run.start(named_parameters(model), factors={"score": config.head_learning_rate_factor})

    def gradient(chosen: list[int]) -> dict[str, float]:
        return backward_pairs(run, model, [train[index] for index in chosen], config)

    def evaluate_now(step: int) -> dict[str, float]:
        return log_measurements(run, held_out_scores(model, held_out, step, config.micro_batch) if held_out else [])

    with run:
        train_on_examples(
            run, len(train), gradient=gradient, evaluate=evaluate_now, dropped=encoded.dropped, cut=encoded.cut
        )

    run.save_model(model.merge_and_unload() if config.lora_rank else model, tokenizer)
    return run.result()


def scoring_pad_id(tokenizer: Any, stop_ids: Sequence[int]) -> int:
    """Return a padding token that no completion ends with.

    transformers' sequence classifiers read the score at the last token that is not padding. In many tokenizers the
    padding token is the stop token. The classifier would then miss the end of a completion.

    Raises:
        ValueError: every special token of the tokenizer is a stop token.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, *tokenizer.all_special_ids)
    for token in candidates:
        if token is not None and token not in stop_ids:
            return int(token)
    raise ValueError(
        f"a reward model needs a special token that is none of the stop tokens {list(stop_ids)} as padding; the "
        "tokenizer has no other one"
    )


def load_classifier(config: RewardModelConfig, device: torch.device) -> tuple[Any, Any, Encoder]:
    """Return a sequence classifier with one label on the backbone of the model, its tokenizer and its encoder.

    A folder that holds a reward model already is continued, head and all.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = str(smollm2_path()) if config.model == SMOLLM2 else config.model
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=1, dtype=DTYPES[config.dtype], output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {config.model!r} could not be loaded as a sequence classifier of transformers: {error}"
        ) from error
    missing = sorted(report["missing_keys"])
    if missing not in ([], ["score.weight"]):
        raise ValueError(f"model {config.model!r} must lack nothing but score.weight, got {', '.join(missing)}")
    if missing:  # the folder holds a language model and no reward model yet
        torch.nn.init.zeros_(model.score.weight)
    stop_ids = _stop_ids(source, model, tokenizer)
    # The classifier finds the end of a sequence by the pad token of its config, so the tokenizer must have the same.
    model.config.pad_token_id = scoring_pad_id(tokenizer, stop_ids)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(model.config.pad_token_id)
    model.eval().to(device)
    if config.lora_rank:
        model = _add_lora(model, config)
    return model, tokenizer, Encoder(tokenizer, stop_ids, config.prompt_template, config.system_prompt)


def _stop_ids(source: str, model: Any, tokenizer: Any) -> list[int]:
    """Return every id that ends a completion of the language model in `source`, the tokenizer's own among them."""
    from transformers import GenerationConfig

    try:
        configured = GenerationConfig.from_pretrained(source).eos_token_id
    except OSError:  # a classifier's folder has no generation config
        configured = model.config.eos_token_id
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None})


def named_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Return the parameters by name. The names of the head begin with `score.`, inside adapters too."""
    return {
        f"score.{name}" if ".score." in name and "modules_to_save" in name else name: parameter
        for name, parameter in model.named_parameters()
    }


def backward_pairs(
    run: Run[Any], model: Any, pairs: Sequence[PreferenceExample], config: RewardModelConfig
) -> dict[str, float]:
    """Accumulate the gradient of the loss of one optimiser step in the parameters, and return its metrics."""
    totals = MetricSums()
    value = torch.zeros((), device=run.device)
    tokens = 0
    for few in _micro_batches(pairs, config.micro_batch):
        scores = pair_scores(model, few)
        margin = torch.tensor([pair.margin for pair in few], device=scores.device)
        output = reward_model_loss(scores[:, 0], scores[:, 1], margin, config.centering_coef, n_pairs=float(len(pairs)))
        run.backward(output.loss)
        totals.add(output.metrics)
        value = value + output.loss.detach()
        tokens += sum(2 * len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in few)
    return {**totals.means(), "loss": float(value), "tokens": float(tokens)}


def pair_scores(model: Any, pairs: Sequence[PreferenceExample]) -> Tensor:
    """Return (P, 2): the scores of the chosen and of the rejected completions, differentiable."""
    sequences = [[*pair.prompt, *completion] for pair in pairs for completion in (pair.chosen, pair.rejected)]
    return sequence_scores(model, sequences).view(-1, 2)


@torch.no_grad()
def held_out_scores(model: Any, pairs: Sequence[PreferenceExample], step: int, size: int) -> list[Measurement]:
    """Return the accuracy and the margin on held-out pairs. Equal scores are half right."""
    scores = torch.cat([pair_scores(model, few).double().cpu() for few in _micro_batches(pairs, size)])
    margins = scores[:, 0] - scores[:, 1]
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    n, accuracy = len(pairs), float(right.mean())
    return [
        Measurement(step, accuracy, (accuracy * (1.0 - accuracy) / n) ** 0.5, n, PAIR_ACCURACY),
        Measurement(step, float(margins.mean()), float(margins.std(correction=0)) / n**0.5, n, SCORE_MARGIN),
    ]


def _micro_batches(pairs: Sequence[PreferenceExample], size: int) -> Iterator[list[PreferenceExample]]:
    """Yield the pairs, similar lengths together, for less padding."""
    ordered = sorted(pairs, key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _add_lora(model: Any, config: RewardModelConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.lora_modules
    adapters = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by the rank, a float serves
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=["score"],
        lora_dropout=0.0,
        bias="none",
        task_type="SEQ_CLS",
    )
    with warnings.catch_warnings():
        # PEFT 0.21 reads an attribute that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        return get_peft_model(model, adapters).eval()
