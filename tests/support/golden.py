"""Reference vectors: inputs and outputs of released training libraries, one archive per family.

    for case in cases("preference"):
        inputs = case.leaves(torch.float64)          # fresh tensors; the differentiated ones require a gradient
        loss = some_loss(**inputs)
        case.check("loss", loss)                     # |a - b| <= atol + rtol * max |b|
        loss.backward()
        case.check_gradients(inputs)

`tests/data/golden/README.md` says what the families hold and how the fields of `hyper` are defined.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parents[1] / "data" / "golden"


@dataclass(frozen=True)
class Case:
    """One call of one library's released code."""

    id: str
    family: str
    algorithm: str
    """What was computed, in neutral words."""
    peer: str
    peer_version: str
    variant: str
    """The peer's own name of the setting."""
    regime: str
    """"moderate" or "strong": how far the policies or the scores are apart."""
    formula: str
    note: str | None
    hyper: dict[str, Any]
    """Neutral hyper-parameters; a field of the family that the case does not have is None."""
    peer_config: dict[str, Any]
    inputs: dict[str, Tensor]
    """As stored (float64 or float32; every float value is a float32 number)."""
    outputs: dict[str, Tensor]
    rtol: float
    """Relative to the largest magnitude of the expected tensor."""
    atol: float
    metrics: dict[str, float]
    differentiated: tuple[str, ...]
    """The inputs for which `outputs["grad_<name>"]` is stored."""
    grad_zero_outside_mask: bool | None
    tolerance: str = field(default="f64")

    def leaves(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return fresh copies of the inputs, floats as `dtype`; the differentiated ones require a gradient."""
        result = {}
        for name, value in self.inputs.items():
            copy = value.to(device=device, dtype=dtype if value.is_floating_point() else value.dtype, copy=True)
            result[name] = copy.requires_grad_(name in self.differentiated)
        return result

    def check(self, name: str, result: Tensor | float, expected: Tensor | float | None = None) -> None:
        """Assert that `result` agrees with `outputs[name]` (or `expected`) within the case's tolerance."""
        want = torch.as_tensor(self.outputs[name] if expected is None else expected).double()
        got = torch.as_tensor(result).detach().double().cpu()
        assert got.shape == want.shape, f"{self.id} {name}: expected shape {tuple(want.shape)}, got {tuple(got.shape)}"
        if want.numel() == 0:
            return
        granted = self.atol + self.rtol * float(want.abs().max())
        error = float((got - want).abs().max())
        assert error <= granted, f"{self.id} {name}: error {error:.3e} exceeds {granted:.3e}"

    def check_gradients(self, leaves: dict[str, Tensor]) -> None:
        """Assert the gradients left in `leaves` by a backward pass; a missing gradient counts as zero."""
        for name in self.differentiated:
            leaf = leaves[name]
            grad = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
            self.check(f"grad_{name}", grad)


@functools.cache
def _index() -> dict[str, Any]:
    return json.loads((FOLDER / "index.json").read_text())


def families() -> list[str]:
    """Return the names of the families, sorted."""
    return sorted(_index()["fields"])


@functools.cache
def cases(family: str) -> list[Case]:
    """Return every case of `family`, in the order of the index.

    Raises:
        KeyError: no such family.
    """
    index = _index()
    empty_hyper = dict.fromkeys(index["fields"][family])
    tensors: dict[str, dict[str, dict[str, Tensor]]] = {}
    with np.load(FOLDER / f"{family}.npz") as archive:
        for key in archive.files:
            case_id, side, name = key.split("|")
            tensors.setdefault(case_id, {"in": {}, "out": {}})[side][name] = torch.from_numpy(np.array(archive[key]))
    result = []
    for record in index["cases"]:
        if record["family"] != family:
            continue
        tolerance = index["tolerances"][record["tolerance"]]
        stored = tensors[record["id"]]
        fixed = record | {"hyper": empty_hyper | record["hyper"], "differentiated": tuple(record["differentiated"])}
        result.append(Case(**fixed, inputs=stored["in"], outputs=stored["out"], **tolerance))
    return result


def ids(family: str) -> list[str]:
    """Return the ids of `cases(family)`, for `pytest.mark.parametrize`."""
    return [case.id for case in cases(family)]
