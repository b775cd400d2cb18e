"""A tiny random model with a tokenizer, built here: no file, no network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = list("0123456789 +-=.,:?\nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ<>/_'\"()")
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(*, pad_is_eos: bool = True) -> Any:
    """Return a tokenizer of single characters with SmolLM2's chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, "<|unk|>", *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>" if pad_is_eos else "<|pad|>",
        unk_token="<|unk|>",
        chat_template=TEMPLATE,
    )


def tiny_model(tokenizer: Any, *, family: str = "llama", seed: int = 0) -> Any:
    """Return a random two-layer model; `gemma2` has a softcap and sliding attention, `gpt2` absolute positions."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    if family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=8, final_logit_softcapping=3.0, sliding_window=16))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    elif family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**sizes, n_positions=sizes["max_position_embeddings"]))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.25)  # far from uniform, so that wrong masks and scales show
    return model.eval()


def save_tiny_model(folder: Path, **options: Any) -> Path:
    """Write a tiny model and its tokenizer to `folder` and return it."""
    tokenizer = tiny_tokenizer()
    tiny_model(tokenizer, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def digit_share(problem: Any, completion: str) -> float:
    """A reward that a random model gets some of: the share of digits among 6 characters."""
    del problem
    return sum(character.isdigit() for character in completion) / 6.0


def fails_on_letters(problem: Any, completion: str) -> float:
    """A reward that raises for completions with an `a`."""
    del problem
    if "a" in completion.lower():
        raise RuntimeError("no letters")
    return float(len(completion) % 2)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/tiny_model.py FOLDER")
    save_tiny_model(Path(sys.argv[1]))
