"""The policy that a KL is measured to: a frozen copy of the model, or the model with its adapters switched off.

A copy may follow the policy: `update` mixes the policy's weights into it. With `keep=0` every few steps it is the
policy of the last synchronisation; with `keep=0.99` after every step it is an exponential moving average.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastrl.train.model import Head, head_of


class ReferencePolicy:
    """The frozen reference of a policy; with adapters it costs no second copy of the weights."""

    def __init__(self, model: Any, *, adapters: bool) -> None:
        """Take the reference of `model` as it is now.

        Args:
            model: the policy, before it is trained.
            adapters: the policy is trained through PEFT adapters, so that it is its own reference without them.
        """
        self._copied = None if adapters else copy.deepcopy(model).requires_grad_(False)

    @contextlib.contextmanager
    def active(self, model: Any) -> Iterator[Any]:
        """Yield the reference model of the policy `model`."""
        if self._copied is not None:
            yield self._copied
            return
        with model.disable_adapter():
            yield model

    def head(self, policy_head: Head) -> Head:
        """Return the reference model's head."""
        return policy_head if self._copied is None else head_of(self._copied)

    @torch.no_grad()
    def update(self, model: Any, keep: float) -> None:
        """Set the weights of the copy to `keep * reference + (1 - keep) * policy`.

        Raises:
            ValueError: the policy without its adapters is the reference, which cannot follow them.
        """
        if self._copied is None:
            raise ValueError(
                "a reference that follows the policy needs a copy of the model; with adapters there is none"
            )
        for mine, policy in zip(self._copied.parameters(), model.parameters(), strict=True):
            mine.mul_(keep).add_(policy, alpha=1.0 - keep) if keep else mine.copy_(policy)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the copy; empty with adapters."""
        return {} if self._copied is None else dict(self._copied.named_parameters())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take the weights over."""
        for name, weight in self.state_dict().items():
            weight.copy_(state[name])
