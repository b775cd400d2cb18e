"""The critic: the value of every prefix of a completion, read off hidden states by a linear head.

The value of position t belongs to the prompt and the completion tokens before t. It comes from the hidden state that
predicts token t. There are three kinds, by cost:

    "head"      the head alone is trained, on the policy's hidden states. The value loss does not move the policy
    "shared"    the same, but the value loss also trains the backbone that the policy stands on
    "separate"  a copy of the policy as it is at the start, trained by the value loss alone

Shapes: B completions, T time, D hidden.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.train.config.run import check_choice
from fastrl.train.data.rollout import Rollout
from fastrl.train.model import Policy

KINDS = ("head", "shared", "separate")


class Critic:
    """The value head and, if the critic is separate, its backbone. Every value is 0 until the head is trained."""

    def __init__(self, policy: Policy, kind: str) -> None:
        """Make the critic of `policy`, which has no adapters yet. A separate backbone is run as the policy is.

        Raises:
            ValueError: an unknown kind.
        """
        check_choice("critic", kind, KINDS)
        self.kind, self._policy = kind, policy
        self.value_head = nn.Linear(policy.weight.shape[1], 1, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.backbone: Any = None
        if kind == "separate":
            self.backbone = copy.deepcopy(policy.model)
            # The copy's output head is not used. It is trained only if it is the embedding too.
            unused, embedding = self.backbone.get_output_embeddings(), self.backbone.get_input_embeddings()
            unused.weight.requires_grad_(unused.weight is embedding.weight)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters: `critic.*` of the backbone, `value_head.*` of the head."""
        backbone = {} if self.backbone is None else dict(self.backbone.named_parameters())
        return {
            **{f"critic.{name}": parameter for name, parameter in backbone.items()},
            **{f"value_head.{name}": parameter for name, parameter in self.value_head.named_parameters()},
        }

    def values(self, rollout: Rollout, policy_hidden: Tensor) -> Tensor:
        """Return values (B, T), differentiable, in the head's float32. `policy_hidden` is (B, T, D)."""
        if self.backbone is not None:
            hidden = self._policy.hidden_of(self.backbone, rollout)
        else:
            hidden = policy_hidden if self.kind == "shared" else policy_hidden.detach()
        # A value of 100.3 is 100 in bfloat16, so the head stays out of autocast.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.value_head(hidden.to(self.value_head.weight.dtype))[..., 0]
