"""Log-probs of given completions under the reference policy: computed once, kept in the folder of the run.

The file carries a key: the hash of the tokens, of the reference's weights and of the precision. A file with another key
is computed anew, so a changed data set or model never meets old numbers. No reference model is in memory while the
policy is trained.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastrl.train.model import Policy
from fastrl.train.preferences.comparisons import Comparison, by_length, rollout_of
from fastrl.train.pretrained import causal_lm

logger = logging.getLogger(__name__)

FILE = "reference_logprobs.safetensors"


def reference_logprobs(
    folder: Path,
    policy: Policy,
    comparisons: Sequence[Comparison],
    *,
    batch_size: int,
    settings: Mapping[str, Any],
) -> list[tuple[Tensor, ...]]:
    """Return for each comparison the log-probs (T_c,), float32, of each of its completions under `policy`.

    Args:
        folder: the folder of the run. `reference_logprobs.safetensors` in it is read if its key fits, else written.
        policy: the reference policy, without adapters.
        comparisons: of equally many completions each.
        batch_size: comparisons in one forward pass.
        settings: the precision, as JSON values. The numbers depend on it too.
    """
    key = _key(policy.model, comparisons, settings)
    path = folder / FILE
    flat = _read(path, key)
    lengths = [len(ids) for comparison in comparisons for ids in comparison.completions]
    if flat is None:
        rows = _compute(policy, comparisons, batch_size)
        flat = torch.cat([values for row in rows for values in row])
        scratch = path.with_suffix(".tmp")
        save_file({"logprobs": flat}, scratch, metadata={"key": key})
        os.replace(scratch, path)  # a run that is killed here leaves no half file
    pieces = iter(flat.split(lengths))
    return [tuple(next(pieces) for _ in comparison.completions) for comparison in comparisons]


def _compute(policy: Policy, comparisons: Sequence[Comparison], batch_size: int) -> list[tuple[Tensor, ...]]:
    found: list[tuple[Tensor, ...]] = [()] * len(comparisons)
    for group in by_length(comparisons, batch_size):
        few = [comparisons[index] for index in group]
        logprobs = policy.logprobs(rollout_of(few, policy.pad_id, policy.device)).float().cpu()
        for place, index in enumerate(group):
            found[index] = tuple(
                logprobs[slot * len(few) + place, : len(ids)].clone() for slot, ids in enumerate(few[place].completions)
            )
    return found


def _read(path: Path, key: str) -> Tensor | None:
    """Return the stored log-probs, or None if there are none with this key."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("key") == key:
            return file.get_tensor("logprobs")
    logger.info("%s holds the log-probs of other data or another model; they are computed anew", path)
    return None


def _key(model: Any, comparisons: Sequence[Comparison], settings: Mapping[str, Any]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([dict(settings), [[c.prompt, *c.completions] for c in comparisons]]).encode())
    for name, tensor in sorted(causal_lm(model).state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
