"""slime's policy loss beside fastrl's, from logits, with and without slime's own log-probs replaced.

slime takes float32 logits only. So in float64 the log-probs and entropies of both sides come from PyTorch, and only the
loss after them is slime's own. Legend: S samples, T tokens of all samples, V vocabulary.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from hosts.losses import Comparison, Outcome, outcome
from torch import Tensor

from fastrl.integrations import slime as adapter

MODULE, REDUCTIONS = "slime.backends.megatron_utils.loss", "slime.backends.megatron_utils.cp_utils"
VOCABULARY, TEMPERATURE = 17, 0.8
SAMPLES = (([5, 3, 7], [2, 4, 3]), ([1, 8, 4, 2], [3, 1, 2, 5]))
"""Lengths of responses and prompts of two batches."""


def arguments(**fields: Any) -> SimpleNamespace:
    """Return slime's arguments, as far as its loss reads them."""
    defaults = {
        "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": None, "advantage_estimator": "grpo", "use_kl_loss": False,
        "kl_loss_type": None, "kl_loss_coef": 0.1, "use_unbiased_kl": False, "entropy_coef": 0.0,
        "use_rollout_logprobs": False, "use_opsm": False, "use_tis": False, "get_mismatch_metrics": False,
        "rollout_temperature": TEMPERATURE, "log_probs_chunk_size": -1, "allgather_cp": False,
        "calculate_per_token_loss": False, "rollout_top_p": 1.0, "context_parallel_size": 1,
        "custom_pg_loss_reducer_function_path": None,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **fields})


def settings() -> Iterator[dict[str, Any]]:
    """Yield 480 combinations of slime's arguments."""
    for estimator, per_token, kl, unbiased, cap, coef, rollout in itertools.product(
        ("grpo", "gspo", "cispo"), (False, True), (None, "k1", "k2", "k3", "low_var_kl"), (False, True), (None, 1.5),
        (0.0, 0.02), (False, True),
    ):  # fmt: skip
        yield {
            "advantage_estimator": estimator, "calculate_per_token_loss": per_token, "use_kl_loss": kl is not None,
            "kl_loss_type": kl, "use_unbiased_kl": unbiased, "eps_clip_c": cap, "entropy_coef": coef,
            "use_rollout_logprobs": rollout,
        }  # fmt: skip


def batch(seed: int, responses: list[int], prompts: list[int]) -> dict[str, Any]:
    """Return slime's batch with logits (1, T, V). The other policies' log-probs lie around the ones of the logits."""
    g = torch.Generator().manual_seed(seed)
    totals = [response + prompt for response, prompt in zip(responses, prompts, strict=True)]
    tokens = [torch.randint(0, VOCABULARY, (total,), generator=g) for total in totals]
    masks = [torch.ones(response, dtype=torch.int) for response in responses]
    masks[2][2] = 0
    x: dict[str, Any] = {
        "logits": torch.randn(1, sum(totals), VOCABULARY, generator=g).double(),
        "advantages": [torch.randn(1, generator=g).double().expand(response).clone() for response in responses],
        "response_lengths": responses,
        "total_lengths": totals,
        "unconcat_tokens": tokens,
        "loss_masks": masks,
    }
    current = rows(x["logits"], tokens, totals, responses)[0]
    for name, spread in (("log_probs", 0.4), ("rollout_log_probs", 0.3), ("ref_log_probs", 0.3)):
        x[name] = [part + spread * torch.randn(part.shape, generator=g).double() for part in current]
    return x


def rows(
    logits: Tensor, tokens: list[Tensor], totals: list[int], responses: list[int]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return PyTorch's log-probs and entropies of the responses, one tensor per sample."""
    logprobs, entropy = [], []
    parts = zip(logits.squeeze(0).split(totals), tokens, responses, strict=True)
    for part, ids, length in parts:
        predicted = (part[-length - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logprobs.append(predicted.gather(-1, ids[-length:].unsqueeze(-1)).squeeze(-1))
        entropy.append(-(predicted.exp() * predicted).sum(-1))
    return logprobs, entropy


def _exact_rows(logits: Tensor, **batch: Any) -> tuple[None, dict[str, list[Tensor]]]:
    logprobs, entropy = rows(logits, batch["unconcat_tokens"], batch["total_lengths"], batch["response_lengths"])
    return None, {"log_probs": logprobs, "entropy": entropy}


def reduction_of(args: Any, x: Mapping[str, Any]) -> Any:
    """Return slime's own sum over samples of means, or of sums."""
    masks = x["loss_masks"]
    return importlib.import_module(REDUCTIONS).get_sum_of_sample_mean(
        x["total_lengths"], x["response_lengths"], masks, [mask.sum() for mask in masks], args.calculate_per_token_loss
    )


def outcome_of(function: Any, args: Any, x: Mapping[str, Any]) -> Outcome:
    """Return the outcome of slime's loss or the adapter's, with slime's own reduction."""
    module, reduction = importlib.import_module(MODULE), reduction_of(args, x)
    given = {name: value for name, value in x.items() if name != "logits"}
    double = x["logits"].dtype is torch.float64
    rows_in_double = mock.patch.object(module, "get_log_probs_and_entropy", _exact_rows)
    with rows_in_double if double else contextlib.nullcontext():
        return outcome(lambda leaf: function(args, given, leaf, reduction), x["logits"])


def _switched(args: Any, x: Mapping[str, Any]) -> Outcome:
    with adapter.patched():
        return outcome_of(adapter.policy_loss, args, x)


def comparisons() -> Iterator[Comparison]:
    """Yield every setting on two batches, each with slime's log-probs and with fastrl's in their place."""
    host = importlib.import_module(MODULE).policy_loss_function
    for fields in settings():
        args = arguments(**fields)
        # slime takes its KL estimates in float32.
        inner = torch.float32 if args.use_kl_loss else torch.float64
        for seed, (responses, prompts) in enumerate(SAMPLES):
            x = batch(seed, responses, prompts)
            # A mean of differences of log-probs.
            rounded = {"ppo_kl": float(reduction_of(args, x)(torch.cat(x["log_probs"]).abs()))}
            for replaced in (False, True):
                yield Comparison(
                    str(fields),
                    f"batch {seed}{', log-probs replaced' if replaced else ''}",
                    x,
                    lambda x, args=args: outcome_of(host, args, x),
                    lambda x, args=args, replaced=replaced: (
                        _switched(args, x) if replaced else outcome_of(adapter.policy_loss, args, x)
                    ),
                    leaf="logits",
                    inner=inner,
                    precisions=(torch.float32,) if replaced else (torch.float32, torch.float64),
                    sizes=rounded,
                )
