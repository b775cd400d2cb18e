"""Metrics as floats, for the trainers that add them up in Python: NeMo-RL and SkyRL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def as_floats(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics, scalar tensors or numbers, as floats."""
    if not metrics:
        return {}
    # Stacked first: `tolist` then waits for the device once, where `float` of each would wait once a metric.
    columns = [torch.as_tensor(value).double().reshape(()) for value in metrics.values()]
    return dict(zip(metrics, torch.stack(columns).tolist(), strict=True))
