"""Time the training step of TRL's trainers: alone, under `patched()`, and with fastrl's trainers.

    python scripts/trl_step_time.py [--rounds 10] [--threads 2] [--layers 1] [--tokens 256] [TRAINER ...]

The model is a random Llama with the head of SmolLM2-135M (49,152 tokens, hidden size 576). A step is the trainer's own
`compute_loss` on one batch, forward and backward, without the optimiser. References are computed beforehand. The three
ways take turns in one process, so other processes on the machine disturb all three. The best of the rounds counts.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from fastrl.integrations import trl as fast

VOCABULARY, HIDDEN, ROWS = 49152, 576, 4
TRAINERS: dict[str, tuple[type, type, type, dict[str, Any]]] = {
    "sft": (trl.SFTConfig, trl.SFTTrainer, fast.FastSFTTrainer, {}),
    "dpo": (trl.DPOConfig, trl.DPOTrainer, fast.FastDPOTrainer, {"precompute_ref_log_probs": True}),
    "kto": (trl.KTOConfig, trl.KTOTrainer, fast.FastKTOTrainer, {"precompute_ref_log_probs": True}),
    "grpo": (trl.GRPOConfig, trl.GRPOTrainer, fast.FastGRPOTrainer, {"num_generations": 2}),
}


def tokenizer() -> Any:
    """Return a tokenizer of four words. The trainers need one, but the batches are made of ids."""
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "one", "two"])}
    made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", pad_token="<pad>")


def rows(kind: str) -> Dataset:
    """Return a dataset with the columns that the trainer's constructor needs."""
    columns = {
        "sft": {"text": "one two"},
        "dpo": {"prompt": "one", "chosen": "two", "rejected": "one"},
        "kto": {"prompt": "one", "completion": "two", "label": True},
        "grpo": {"prompt": "one"},
    }
    return Dataset.from_list([columns[kind]] * ROWS)


def batch(kind: str, tokens: int) -> dict[str, Any]:
    """Return a batch with `tokens` scored tokens: whole rows for SFT, half of every row for the others."""
    length = tokens // ROWS
    ids = torch.randint(2, VOCABULARY, (ROWS, (1 if kind == "sft" else 2) * length))
    ones = torch.ones_like(ids)
    zero = torch.zeros(ROWS)
    if kind == "sft":
        return {"input_ids": ids, "attention_mask": ones, "labels": ids.clone()}
    if kind == "grpo":
        prompt, completion = ids.split(length, dim=1)
        masks = {"prompt_mask": torch.ones_like(prompt), "completion_mask": torch.ones_like(completion)}
        inputs = {"prompt_ids": prompt, "completion_ids": completion, **masks}
        return {**inputs, "advantages": torch.randn(ROWS), "num_items_in_batch": torch.tensor(tokens)}
    mask = (torch.arange(ids.shape[1]) >= length).long().expand_as(ids)
    inputs = {"input_ids": ids, "attention_mask": ones, "completion_mask": mask}
    if kind == "dpo":
        return {**inputs, "ref_chosen_logps": zero[: ROWS // 2], "ref_rejected_logps": zero[: ROWS // 2]}
    mismatched = {f"KL_{name}": value.roll(1, 0) for name, value in inputs.items()}
    return {**inputs, **mismatched, "label": torch.arange(ROWS) % 2 == 0, "ref_logps": zero, "ref_KL_logps": zero}


def steps(kind: str, layers: int, tokens: int, output: str) -> dict[str, Callable[[], None]]:
    """Return a training step of each of the three ways, on the same weights and the same batch."""
    config, plain, fused, options = TRAINERS[kind]
    settings = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, tie_word_embeddings=True, pad_token_id=0,
        num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=layers,
    )  # fmt: skip
    more: dict[str, Any] = {"reward_funcs": lambda completions, **_: [0.0] * len(completions)} if kind == "grpo" else {}

    def make(trainer_class: type) -> Any:
        torch.manual_seed(0)
        gpu = torch.cuda.is_available()
        arguments = config(
            output_dir=output, use_cpu=not gpu, bf16=gpu, gradient_checkpointing=False, report_to=[],
            per_device_train_batch_size=ROWS, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = trainer_class(
            model=LlamaForCausalLM(settings), args=arguments, train_dataset=rows(kind), processing_class=tokenizer(),
            **more,
        )  # fmt: skip
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
        return trainer

    trainers = {"TRL": make(plain), "patched()": make(plain), fused.__name__: make(fused)}
    inputs = trainers["TRL"]._prepare_inputs(batch(kind, tokens)) if kind != "grpo" else batch(kind, tokens)
    inputs = {name: value.to(trainers["TRL"].accelerator.device) for name, value in inputs.items()}

    def step(name: str) -> None:
        trainer = trainers[name]
        with fast.patched() if name == "patched()" else contextlib.nullcontext():
            trainer.compute_loss(trainer.model, inputs).backward()
        trainer.model.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return {name: lambda name=name: step(name) for name in trainers}


def main() -> None:
    """Print the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trainers", nargs="*", help=f"among {', '.join(TRAINERS)}; default: all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256, help="scored tokens of the batch; default: 256")
    given = parser.parse_intermixed_args()
    unknown = sorted(set(given.trainers) - set(TRAINERS))
    if unknown:
        parser.error(f"trainers must be among {', '.join(TRAINERS)}, got {', '.join(unknown)}")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(given.threads)
    print("| trainer | way | ms | TRL's time over this |\n|---|---|---|---|")
    for kind in given.trainers or TRAINERS:
        with tempfile.TemporaryDirectory() as output:
            ways = steps(kind, given.layers, given.tokens, output)
            best = dict.fromkeys(ways, float("inf"))
            for i in range(given.rounds + 1):
                for name, step in ways.items():
                    start = time.perf_counter()
                    step()
                    # The first round is the warm-up: it includes the proof of the log-probs and all compilation.
                    best[name] = min(best[name], time.perf_counter() - start) if i else best[name]
        for name, seconds in best.items():
            print(f"| {kind} | {name} | {1e3 * seconds:.1f} | {best['TRL'] / seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
