"""The reference policy of a KL: a frozen copy of the policy, or the policy with its adapters switched off.

A copy may follow the policy: `update` mixes the policy's weights into it. With `keep=0` every few steps it is the
policy of the last synchronisation. With `keep=0.99` after every step it is an exponential moving average.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastrl.train.model import Policy


class ReferencePolicy:
    """The frozen reference of a policy. With adapters it costs no second copy of the weights."""

    def __init__(self, policy: Policy, *, adapters: bool) -> None:
        """Take the reference of `policy` as it is now.

        Args:
            policy: the policy, before it is trained.
            adapters: the policy is trained through PEFT adapters, so that it is its own reference without them.
        """
        self._copied = None
        if not adapters:
            self._copied = policy.with_model(copy.deepcopy(policy.model).requires_grad_(False))

    @contextlib.contextmanager
    def active(self, policy: Policy) -> Iterator[Policy]:
        """Yield the reference of `policy`."""
        if self._copied is not None:
            yield self._copied
            return
        with policy.model.disable_adapter():
            yield policy

    @torch.no_grad()
    def update(self, policy: Policy, keep: float) -> None:
        """Set the weights of the copy to `keep * reference + (1 - keep) * policy`.

        Raises:
            ValueError: the reference is the policy without its adapters, which cannot follow them.
        """
        if self._copied is None:
            raise ValueError(
                "a reference that follows the policy needs a copy of the model; with adapters there is none"
            )
        for mine, theirs in zip(self._copied.model.parameters(), policy.model.parameters(), strict=True):
            mine.mul_(keep).add_(theirs, alpha=1.0 - keep) if keep else mine.copy_(theirs)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the copy. There are none with adapters."""
        return {} if self._copied is None else dict(self._copied.parameters())

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights of the copy."""
        for name, weight in self.state_dict().items():
            weight.copy_(state[name])
