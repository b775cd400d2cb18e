"""A bandit whose best policy is known: strings of at most three letters, each with a reward, and a tiny model of them.

A completion is one of 40 strings over a, b, c: it ends with the stop token, or is cut after three letters. Maximising
E[R] - beta KL(pi || pi_ref) over all distributions gives pi*(y) = pi_ref(y) exp(R(y) / beta) / Z, which is summed here
string by string (Rafailov et al. 2023, arXiv 2305.18290, eq. 4). A tiny transformer can represent it to rounding: it
needs one distribution of four tokens for each of 13 prefixes.

Shapes: Y = 40 strings, T = 3 tokens.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastrl.train.rewards.tasks import Problem

STOP = 0
LETTERS = "abc"
LONGEST = 3
# The prompt is the stop token. A letter would not do: without absolute positions, attention over equal tokens tells
# their number from nothing, and "c", "cc" and "ccc" would have one distribution.
PROMPT = "<stop>"
TEXTS = ["".join(letters) for length in range(LONGEST + 1) for letters in itertools.product(LETTERS, repeat=length)]


class Strings(NamedTuple):
    """All completions, in the order of `TEXTS`."""

    ids: Tensor  # (Y, T) padded with the stop token
    mask: Tensor  # (Y, T) bool, the first stop token included


def strings() -> Strings:
    """Return all completions."""
    ids = torch.zeros(len(TEXTS), LONGEST, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        ids[row, : len(text)] = torch.tensor([1 + LETTERS.index(letter) for letter in text], dtype=torch.int64)
    lengths = torch.tensor([min(len(text) + 1, LONGEST) for text in TEXTS])
    return Strings(ids, torch.arange(LONGEST) < lengths[:, None])


def reward_table() -> Tensor:
    """Return the reward (Y,) of each string, float64, drawn once, of standard deviation 2."""
    return 2.0 * torch.randn(len(TEXTS), generator=torch.Generator().manual_seed(3), dtype=torch.float64)


_REWARDS = dict(zip(TEXTS, reward_table().tolist(), strict=True))


def reward(problem: Any, completion: str) -> float:
    """The reward of a string, as a reward function of the loops: `bandit:reward`."""
    del problem
    return _REWARDS[completion]


def optimum(ref_logprobs: Tensor, beta: float) -> Tensor:
    """Return log pi* (Y,) of the reference log-probs (Y,)."""
    return torch.log_softmax(ref_logprobs + reward_table() / beta, dim=0)


def kl(logprobs: Tensor, other: Tensor) -> float:
    """Return KL(p || other) in nats between distributions over the strings, (Y,) log-probs each."""
    return float((logprobs.exp() * (logprobs - other)).sum())


def bandit_tokenizer() -> Any:
    """Return a tokenizer of the letters and the stop token."""
    tokenizer = Tokenizer(models.WordLevel({"<stop>": STOP, **{c: 1 + i for i, c in enumerate(LETTERS)}}, "<stop>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<stop>", pad_token="<stop>")


def bandit_model(seed: int = 0) -> Any:
    """Return a one-layer transformer with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1 + len(LETTERS), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16, bos_token_id=STOP, eos_token_id=STOP,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def save_bandit(folder: Path) -> Path:
    """Write the model and its tokenizer to `folder` and return it."""
    bandit_model().save_pretrained(folder)
    bandit_tokenizer().save_pretrained(folder)
    return folder


@torch.no_grad()
def string_logprobs(model: Any) -> Tensor:
    """Return the log-prob (Y,) of every string after the prompt, float64; their exponentials sum to 1."""
    ids, mask = strings()
    prompt = torch.full((len(TEXTS), 1), STOP)
    logits = model(input_ids=torch.cat([prompt, ids[:, :-1]], dim=1)).logits.double()
    chosen = torch.log_softmax(logits, dim=-1).gather(-1, ids[..., None])[..., 0]
    return torch.where(mask, chosen, 0.0).sum(dim=1)


class BanditTask:
    """The bandit in the place of a `fastrl.train.rewards.tasks.Task`: one problem, again and again."""

    def train(self, n: int, start: int = 0) -> list[Problem]:
        """Return the problem `n` times."""
        del start
        return [Problem(prompt=PROMPT, answer="")] * n

    def held_out(self, n: int) -> list[Problem]:
        """Return the problem `n` times."""
        return self.train(n)

    def is_correct(self, problem: Problem, completion: str) -> bool:
        """Return whether it is the string with the largest reward."""
        return reward(problem, completion) == max(_REWARDS.values())
