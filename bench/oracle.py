"""The exact results of a case in float64, and the judge of the test suite, which decides who may be timed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from bench.baselines import EPSILON, Outputs
from bench.cases import Inputs

TESTS = Path(__file__).resolve().parent.parent / "tests" / "support"
# Rows of float64 logits held at a time.
EXACT_ROWS = 128


@cache
def shared(name: str) -> ModuleType:
    """Return a module of tests/support/ by its file: the benchmarks use the judge and the memory watch of the tests."""
    spec = importlib.util.spec_from_file_location(f"fastrl_tests_{name}", TESTS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"bench runs from a checkout: expected {TESTS / f'{name}.py'}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Judgement:
    """The judge's finding, per quantity: error, granted error, and error relative to the largest exact value."""

    errors: dict[str, dict[str, float]]
    complaint: str | None


def _token_loss(logprobs: Tensor, inputs: Inputs) -> Tensor:
    """Return the loss in float64 from flat log-probs, independent of the contenders' code."""
    mask = inputs.mask.double().reshape(-1)
    if inputs.case.operation == "sft_hidden":
        return -(mask * logprobs).sum() / mask.sum()
    advantage = inputs.token_advantages.double().reshape(-1)
    ratio = (logprobs - inputs.old_logprobs.double().reshape(-1)).exp()
    bounded = ratio.clamp(1.0 - EPSILON, 1.0 + EPSILON)
    return -(mask * torch.minimum(ratio * advantage, bounded * advantage)).sum() / mask.sum()


def exact_outputs(inputs: Inputs) -> Outputs:
    """Return loss, log-probs and gradients in float64, a few rows at a time."""
    case, labels = inputs.case, inputs.labels.reshape(-1, 1)
    weight = None if inputs.weight is None else inputs.weight.double()

    def logprobs_of(rows: Tensor, start: int) -> Tensor:
        logits = rows
        if weight is not None:
            logits = rows @ weight_leaf.t()
            if case.model.softcap is not None:
                logits = case.model.softcap * torch.tanh(logits / case.model.softcap)
        return logits.log_softmax(-1).gather(-1, labels[start : start + EXACT_ROWS]).squeeze(-1)

    source = inputs.logits if inputs.hidden is None else inputs.hidden
    assert source is not None
    starts = range(0, source.shape[0], EXACT_ROWS)
    weight_leaf = torch.empty(0) if weight is None else weight
    with torch.no_grad():
        logprobs = torch.cat([logprobs_of(source[i : i + EXACT_ROWS].double(), i) for i in starts])
    if not case.trains:
        return Outputs(logprobs=logprobs.view(inputs.labels.shape))
    leaf = logprobs.clone().requires_grad_()
    loss = _token_loss(leaf, inputs)
    (g,) = torch.autograd.grad(loss, leaf)
    if weight is not None and case.operation != "loss_hidden_frozen":
        weight_leaf = weight.requires_grad_()
    gradients = []
    for start in starts:
        rows = source[start : start + EXACT_ROWS].double().requires_grad_()
        (logprobs_of(rows, start) * g[start : start + EXACT_ROWS]).sum().backward()
        assert rows.grad is not None
        gradients.append(rows.grad)
    gradient = torch.cat(gradients)
    return Outputs(
        loss=loss.detach(),
        logprobs=logprobs.view(inputs.labels.shape),
        dhidden=None if case.from_logits else gradient,
        dlogits=gradient if case.from_logits else None,
        dweight=None if weight is None else weight.grad,
    )


def _compared(outputs: Outputs, inputs: Inputs) -> Mapping[str, Tensor | None]:
    """Return the quantities to compare. Log-probs under the mask may be anything."""
    values = outputs._asdict()
    if values["logprobs"] is not None:
        values["logprobs"] = values["logprobs"].masked_select(inputs.mask.bool())
    return values


@dataclass(frozen=True)
class Judge:
    """Holds contenders to the budget of tests/support/oracle.py.

    The budget is twice the error of the eager code at the precision of the case, plus a few roundings.
    """

    inputs: Inputs
    exact: Mapping[str, Tensor | None]
    granted: dict[tuple[str, torch.dtype], float]
    """Error granted per quantity and dtype of the result."""
    largest: dict[str, float]

    @classmethod
    def of(cls, inputs: Inputs, eager: Outputs) -> Judge:
        """Return the judge of a case, given the results of PyTorch's eager code."""
        exact, common = _compared(exact_outputs(inputs), inputs), _compared(eager, inputs)
        granted, largest = {}, {}
        for name, right in exact.items():
            usual = common[name]
            if right is None or usual is None:
                continue
            largest[name] = float(right.abs().max())
            # A half-precision case may be answered in its own dtype or in float32.
            for dtype in {inputs.case.dtype, torch.float32, usual.dtype}:
                granted[name, dtype] = shared("oracle").budget(right, usual, dtype)
        return cls(inputs, exact, granted, largest)

    def __call__(self, outputs: Outputs, declared_error: float = 0.0) -> Judgement:
        """Return the errors of a contender, and a complaint if it is less accurate than eager PyTorch may be.

        A contender may declare a relative gradient error. The larger of the two bounds holds.
        """
        errors: dict[str, dict[str, float]] = {}
        complaints = []
        for name, value in _compared(outputs, self.inputs).items():
            right = self.exact[name]
            if value is None:
                if right is not None and name not in ("logprobs", "loss"):
                    complaints.append(f"{name} is missing")
                continue
            if name not in self.largest or right is None:
                continue
            try:
                error = shared("oracle").max_error(value.reshape(right.shape), right)
                granted = self.granted[name, value.dtype]
            except (AssertionError, KeyError, RuntimeError) as failure:
                complaints.append(f"{name}: {type(failure).__name__}: {failure}")
                continue
            if name.startswith("d"):
                granted = max(granted, declared_error * self.largest[name])
            largest = self.largest[name]
            errors[name] = {"error": error, "granted": granted, "relative": error / largest if largest > 0 else 0.0}
            if not error <= granted:
                complaints.append(f"{name}: error {error:.2e} against float64 exceeds the budget {granted:.2e}")
        return Judgement(errors, "; ".join(complaints) or None)
