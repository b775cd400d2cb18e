"""Float32 master weights: 16-bit parameters that small updates move all the same.

A bfloat16 number has 8 bits of precision, so an update of less than 0.2 % of a weight is rounded away: at a learning
rate of 1e-6 nearly all of them are. In float16 the second moments of Adam round to 0, and its quotients become
infinite. So the optimiser keeps float32 copies of such parameters, takes its steps on them, and rounds the result into
the model (Micikevicius et al., arXiv 1710.03740, section 3.1). They cost 4 bytes a trained parameter, and 4 more for
each moment than moments of 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

# Entries looked at for the share of weights that a step moved, and the parameters that they are taken from.
LOOKED_AT = 4096
LOOKED_IN = 16


class MasterWeights:
    """The float32 copies of a run's 16-bit parameters, and the share of weights that a step moves."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._parameters = dict(parameters)
        self._masters = {
            name: nn.Parameter(parameter.detach().float())
            for name, parameter in parameters.items()
            if parameter.dtype in (torch.bfloat16, torch.float16)
        }
        largest = sorted(parameters.values(), key=torch.numel, reverse=True)[:LOOKED_IN]
        self._looked_in = [(p, max(1, p.numel() // LOOKED_AT)) for p in largest if p.numel()]

    def __len__(self) -> int:
        return len(self._masters)

    def optimised(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the optimiser steps on, by name: the master, or the parameter without one."""
        return {name: self._masters.get(name, parameter) for name, parameter in self._parameters.items()}

    def of(self, parameter: Tensor) -> Tensor:
        """Return the master of a parameter, or the parameter if it has none."""
        for name, master in self._masters.items():
            if self._parameters[name] is parameter:
                return master
        return parameter

    def take_gradients(self) -> None:
        """Move the gradients of the parameters to their masters, in float32."""
        for name, master in self._masters.items():
            parameter = self._parameters[name]
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None

    @torch.no_grad()
    def write_back(self) -> None:
        """Round the masters into the parameters."""
        for name, master in self._masters.items():
            self._parameters[name].copy_(master)

    @torch.no_grad()
    def read_anew(self) -> None:
        """Take the parameters as they are now for the masters."""
        for name, master in self._masters.items():
            master.copy_(self._parameters[name])

    def look(self) -> list[Tensor]:
        """Return some entries of the model's weights, the same ones at every call."""
        return [parameter.detach().flatten()[::step][:LOOKED_AT].clone() for parameter, step in self._looked_in]

    def moved(self, before: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return (number of entries that differ from `before`, number of entries looked at)."""
        now = self.look()
        device = now[0].device if now else torch.device("cpu")
        different = torch.zeros((), device=device)
        for old, new in zip(before, now, strict=True):
            different = different + (old != new).sum().to(device)
        return different, torch.tensor(float(sum(x.numel() for x in now)), device=device)
