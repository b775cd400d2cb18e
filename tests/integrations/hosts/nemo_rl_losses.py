"""NeMo-RL's clipped policy-gradient loss beside fastrl's. Legend: B sequences, S padded length."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hosts.losses import Comparison, Outcome, outcome
from torch import Tensor

from fastrl.integrations import nemo_rl as adapter

BASES: list[dict[str, Any]] = [
    {}, {"ratio_clip_c": 1.1}, {"disable_ppo_ratio": True}, {"force_on_policy_ratio": True}, {"use_cispo": True},
    {"token_level_loss": False}, {"token_level_loss": False, "sequence_level_importance_ratios": True},
]  # fmt: skip
CORRECTIONS: list[dict[str, Any]] = [
    {}, {"use_importance_sampling_correction": True},
    *({"use_importance_sampling_correction": True, "truncated_importance_sampling_type": kind,
       "truncated_importance_sampling_ratio": 1.2, "truncated_importance_sampling_ratio_min": low}
      for kind, low in (("tis", None), ("tis", 0.9), ("icepop", 0.8), ("seq-mask-tis", 0.9))),
]  # fmt: skip
PENALTIES: list[dict[str, Any]] = [
    {"reference_policy_kl_penalty": 0.0},
    {"reference_policy_kl_type": "k1", "reference_policy_kl_penalty": 0.1},
    {"reference_policy_kl_type": "k2", "use_on_policy_kl_approximation": True},
    {"kl_input_clamp_value": 2.0, "kl_output_clamp_value": 0.2, "reference_policy_kl_penalty": 0.5},
    {"use_kl_in_reward": True, "positive_example_nll_weight": 0.3},
]
# NeMo-RL's own value multiplies by the number of sequences: its weights (B, 1) meet a mask (B,).
UNLIKE = frozenset({"sampling_importance_ratio"})


def batch(seed: int = 0, spread: float = 0.3, rows: int = 5, width: int = 9) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probs (B, S - 1) and NeMo-RL's columns (B, S) and (B,)."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, width)
    old = -3.0 * torch.rand(shape, generator=g).double()
    mask = (torch.rand(shape, generator=g) > 0.3).double()
    mask[:, 1] = 1.0

    def near() -> Tensor:
        return old + spread * torch.randn(shape, generator=g).double()

    data = {
        "token_mask": mask, "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]).repeat(rows // 5 + 1)[:rows],
        "advantages": torch.randn(shape, generator=g).double(), "prev_logprobs": old, "generation_logprobs": near(),
        "reference_policy_logprobs": near(),
        "rewards": torch.tensor([1.0, 0.0, 1.0, 1.0, -1.0]).repeat(rows // 5 + 1)[:rows],
    }  # fmt: skip
    return near()[:, 1:].clamp(max=-1e-3), data


def counts(data: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the global numbers of sequences and tokens, more than the batch holds."""
    tokens = (data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)).sum()
    return torch.tensor(9.0, dtype=tokens.dtype), 2.0 * tokens


def outcome_of(loss_fn: Any, columns: Mapping[str, Any]) -> Outcome:
    """Return the outcome of NeMo-RL's loss or of the adapter's, which have the same protocol."""
    data = {name: value for name, value in columns.items() if name != "logprobs"}
    return outcome(lambda leaf: loss_fn(leaf, dict(data), *counts(data)), columns["logprobs"])


def settings() -> Iterator[dict[str, Any]]:
    """Yield the options of the loss in every combination that NeMo-RL allows."""
    for base, correction, penalty in itertools.product(BASES, CORRECTIONS, PENALTIES):
        options = {"ratio_clip_min": 0.1, "ratio_clip_max": 0.25, **base, **correction, **penalty}
        if not (options.get("sequence_level_importance_ratios") and "seq-mask-tis" in options.values()):
            yield options


def comparisons() -> Iterator[Comparison]:
    """Yield every setting on two batches."""
    module = importlib.import_module(adapter._MODULE)
    for options in settings():
        cfg = module.ClippedPGLossConfig(**options)
        whole = options.get("sequence_level_importance_ratios", False)
        for seed, spread in ((0, 0.3), (1, 1.5)):
            logprobs, data = batch(seed, spread)
            # The k1 estimate is a mean of differences of log-probs.
            rounded = {"kl_penalty": cfg.reference_policy_kl_penalty * float(logprobs.abs().mean())}
            yield Comparison(
                str(options),
                f"spread {spread}",
                {"logprobs": logprobs, **data},
                lambda x, cfg=cfg: outcome_of(module.ClippedPGLossFn(cfg), x),
                lambda x, cfg=cfg: outcome_of(adapter.ClippedPGLoss(cfg), x),
                # NeMo-RL adds 1e-8 to the token count in the mean log-ratio of a sequence.
                inner=torch.float32 if whole else torch.float64,
                unlike=UNLIKE if whole else frozenset(),
                sizes=rounded,
            )
