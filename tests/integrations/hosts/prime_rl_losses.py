"""prime-rl's losses beside fastrl's, one sequence at a time. Legend: N tokens."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hosts.losses import Comparison, Outcome, outcome
from torch import Tensor

from fastrl.integrations import prime_rl as adapter

SETTINGS: list[tuple[str, dict[str, float]]] = [
    ("default", {}), ("default", {"dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "adv_tau": 0.5, "kl_tau": 0.3}),
    ("ipo", {}), ("ipo", {"ipo_threshold": 0.05, "adv_tau": 2.0, "kl_tau": 0.1}), ("ref_kl", {}), ("ce", {}),
]  # fmt: skip


def sequence(seed: int = 0, weighted: bool = False, spread: float = 0.4, tokens: int = 24) -> dict[str, Any]:
    """Return the columns (N,) of prime-rl's `LossInputs`."""
    g = torch.Generator().manual_seed(seed)
    inference = -2.0 * torch.rand(tokens, generator=g).double()

    def near() -> Tensor:
        return (inference + spread * torch.randn(tokens, generator=g)).clamp(max=-1e-3)

    weights = torch.randn(tokens, generator=g).double() if weighted else None
    return {
        "advantages": torch.randn(tokens, generator=g).double(), "trainer_logprobs": near(),
        "inference_logprobs": inference, "ref_logprobs": near(), "loss_mask": torch.rand(tokens, generator=g) > 0.3,
        "loss_weights": weights,
    }  # fmt: skip


def host(name: str, options: Mapping[str, float], columns: Mapping[str, Any]) -> Outcome:
    """Return the outcome of prime-rl's loss."""
    module, configs = importlib.import_module(adapter._MODULE), importlib.import_module(adapter._CONFIGS)
    function, config = adapter._THEIRS[name]
    call = [] if config is None else [getattr(configs, config)(**options)]

    def loss(leaf: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        result = getattr(module, function)(module.LossInputs(**{**columns, "trainer_logprobs": leaf}), *call)
        return result.loss, {key: value.detach() for key, value in result.metrics.items()}

    return outcome(loss, columns["trainer_logprobs"])


def ours(name: str, options: Mapping[str, Any], columns: Mapping[str, Any]) -> Outcome:
    """Return the outcome of the adapter's loss, which prime-rl's types wrap."""
    module = importlib.import_module(adapter._MODULE)

    def loss(leaf: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        inputs = module.LossInputs(**{**columns, "trainer_logprobs": leaf})
        result = getattr(adapter, f"{name}_loss")(inputs, **options)
        assert isinstance(result, module.LossOutputs)
        return result.loss, result.metrics

    return outcome(loss, columns["trainer_logprobs"])


def comparisons() -> Iterator[Comparison]:
    """Yield every loss, with options and by default, with and without weights, near the rollout and far from it."""
    for name, options in SETTINGS:
        for seed, weighted, spread in ((0, False, 0.3), (1, True, 0.3), (2, True, 1.5), (3, False, 1.5)):
            yield Comparison(
                f"{name} {options}",
                f"{'weighted' if weighted else 'plain'}, spread {spread}",
                sequence(seed, weighted, spread),
                lambda x, name=name, options=options: host(name, options, x),
                lambda x, name=name, options=options: ours(name, options, x),
                leaf="trainer_logprobs",
            )
