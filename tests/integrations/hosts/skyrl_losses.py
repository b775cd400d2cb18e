"""SkyRL's policy losses beside fastrl's, both by name from its registry. Legend: B sequences, T padded length."""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from hosts.losses import Comparison, Outcome, outcome
from torch import Tensor

from fastrl.integrations import skyrl as adapter

CORRECTIONS: list[dict[str, Any]] = [
    {}, {"tis_ratio_type": "token"}, {"tis_ratio_type": "sequence"},
    {"sequence_mask_metric": "geometric"}, {"sequence_mask_metric": "product", "tis_ratio_type": "token"},
    {"outlier_token_is_threshold_low": 0.75, "outlier_token_is_threshold_high": 1.5, "tis_ratio_type": "sequence"},
    {"token_mask_is_threshold_low": 0.9, "token_mask_is_threshold_high": 1.2, "sequence_mask_metric": "geometric",
     "tis_ratio_type": "token"},
]  # fmt: skip
BOUNDS = {
    "token_tis_ratio_clip_high": 1.1, "sequence_tis_ratio_clip_high": 1.3, "geo_mask_high": 1.1, "geo_mask_low": 0.9,
    "product_mask_high": 1.6, "product_mask_low": 0.6,
}  # fmt: skip


def batch(seed: int = 0, spread: float = 0.3, rows: int = 6, width: int = 8) -> tuple[Tensor, ...]:
    """Return log-probs, old ones, advantages, mask and rollout log-probs, (B, T) each."""
    g = torch.Generator().manual_seed(seed)
    shape = (rows, width)
    old = -3.0 * torch.rand(shape, generator=g).double()
    logprobs = (old + spread * torch.randn(shape, generator=g)).clamp(max=-1e-3)
    rollout = old + 0.5 * spread * torch.randn(shape, generator=g)
    advantages = torch.randn(shape, generator=g).double() / 20.0
    advantages[1] = 0.0
    mask = (torch.rand(shape, generator=g) > 0.3).double()
    mask[:, 0] = 1.0
    return logprobs, old, advantages, mask, rollout


def config(name: str, correction: Mapping[str, Any], anchor: str) -> Any:
    """Return SkyRL's own algorithm config for a loss."""
    c = importlib.import_module("skyrl.train.config.config")
    return c.AlgorithmConfig(
        policy_loss_type=name,
        eps_clip_low=0.2,
        eps_clip_high=0.28,
        clip_ratio_c=1.5,
        loss_reduction="sequence_mean",
        off_policy_correction=c.OffPolicyCorrectionConfig(**BOUNDS, **correction),
        sapo=c.SAPOConfig(tau_pos=1.0, tau_neg=1.05),
        cispo=c.CISPOConfig(cispo_anchor=anchor, cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.3),
        dppo=c.DPPOConfig(
            dppo_type="binary_kl" if anchor == "rollout" else "binary_tv", delta_low=0.05, delta_high=0.1
        ),
        kl_cov=c.KLCovConfig(kl_cov_frac=0.2, ppo_kl_coef=0.5),
        clip_cov=c.ClipCovConfig(clip_ratio=0.2, clip_cov_lb=0.05, clip_cov_ub=5.0),
    )


def outcome_of(name: str, cfg: Any, columns: Mapping[str, Tensor]) -> Outcome:
    """Return the outcome of the loss that SkyRL's registry has under a name."""
    function = importlib.import_module(adapter._MODULE).PolicyLossRegistry.get(name)
    old, advantages, mask, rollout = (columns[key] for key in ("old", "advantages", "mask", "rollout"))

    def loss(leaf: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        torch.manual_seed(3)
        return function(leaf, old, advantages, cfg, mask, rollout)

    return outcome(loss, columns["logprobs"])


def settings() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield (loss, correction, anchor) in every combination that SkyRL allows."""
    for name, correction, anchor in itertools.product(adapter.FORMS, CORRECTIONS, ("old", "rollout")):
        without = name in adapter._WITHOUT_CORRECTION and correction
        only_old = anchor == "rollout" and name not in ("cispo", "dppo")
        corrected_twice = name == "cispo" and anchor == "rollout" and "tis_ratio_type" in correction
        if not (without or only_old or corrected_twice):
            yield name, correction, anchor


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Put fastrl's names into SkyRL's registry inside this context. Raise RuntimeError unless it is restored."""
    registry = importlib.import_module(adapter._MODULE).PolicyLossRegistry
    before = {name: registry.get(name) for name in registry.list_available()}
    adapter.register()
    try:
        yield
    finally:
        adapter.unregister()
    if {name: registry.get(name) for name in registry.list_available()} != before:
        raise RuntimeError("SkyRL's registry differs from its state before fastrl's names were in it")


def comparisons() -> Iterator[Comparison]:
    """Yield every setting on two batches. SkyRL computes its exponentials in float32."""
    with registered():
        for name, correction, anchor in settings():
            theirs, ours = (config(label, correction, anchor) for label in (name, f"fastrl_{name}"))
            for seed, spread in ((0, 0.3), (1, 1.5)):
                columns = ("logprobs", "old", "advantages", "mask", "rollout")
                yield Comparison(
                    f"{name} {correction}, anchor {anchor}",
                    f"spread {spread}",
                    dict(zip(columns, batch(seed, spread), strict=True)),
                    lambda x, name=name, cfg=theirs: outcome_of(name, cfg, x),
                    lambda x, name=name, cfg=ours: outcome_of(f"fastrl_{name}", cfg, x),
                    inner=torch.float32,
                )
