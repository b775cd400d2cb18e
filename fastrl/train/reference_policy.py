"""The policy that a KL is measured to: a frozen copy of the model, or the model with its adapters switched off."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

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
