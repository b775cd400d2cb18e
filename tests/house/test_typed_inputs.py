"""The inputs of a loss are visible: in the signature's types, in `help()`, and to a type checker."""

from __future__ import annotations

import inspect
import pydoc
import re
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastrl import PolicyLoss, PreferenceLoss
from fastrl.losses.policy.inputs import PolicyInputs
from fastrl.losses.policy.loss import loss_value
from fastrl.losses.preference.inputs import PreferenceInputs

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (PolicyLoss.from_logits, PolicyInputs),
        (PolicyLoss.from_hidden, PolicyInputs),
        (loss_value, PolicyInputs),
        (PreferenceLoss.from_logits, PreferenceInputs),
        (PreferenceLoss.from_hidden, PreferenceInputs),
    ],
)
def test_the_signature_holds_the_typed_inputs(function: Callable[..., Any], inputs: type) -> None:
    parameters = inspect.signature(function).parameters
    assert parameters["inputs"].kind is inspect.Parameter.VAR_KEYWORD
    hint = typing.get_type_hints(function)["inputs"]
    assert typing.get_args(hint) == (inputs,)


def test_the_inputs_are_the_arguments_of_the_loss_on_logprobs() -> None:
    """The entrances on logits and hidden states compute log-probs and entropy; they take every other argument."""
    policy = set(inspect.signature(PolicyLoss.__call__).parameters) - {"self", "logprobs", "entropy"}
    assert set(PolicyInputs.__annotations__) == policy
    preference = set(inspect.signature(PreferenceLoss.from_logprobs).parameters)
    assert set(PreferenceInputs.__annotations__) == preference - {"self", "logprobs", "mask", "ref_logprobs", "labels"}


@pytest.mark.parametrize(
    ("loss", "inputs"), [(PolicyLoss, PolicyInputs), (PreferenceLoss, PreferenceInputs)], ids=["policy", "preference"]
)
@pytest.mark.parametrize("entrance", ["from_logits", "from_hidden"])
def test_help_names_every_input(loss: type, inputs: type, entrance: str) -> None:
    text = pydoc.plain(pydoc.render_doc(getattr(loss, entrance)))
    assert [name for name in inputs.__annotations__ if not re.search(rf"\b{name}\b", text)] == []


WRONG = """
from torch import Tensor
from fastrl import PolicyLoss, PreferenceLoss


def right(policy: PolicyLoss, preference: PreferenceLoss, x: Tensor) -> None:
    policy.from_hidden(x, x, x, advantages=x, mask=x, old_logprobs=x, n_tokens=3.0)
    policy.from_logits(x, x, mask=x)
    preference.from_hidden(x, x, x, x, desirable=x, reference_point=0.1)


def wrong(policy: PolicyLoss, preference: PreferenceLoss, x: Tensor) -> None:
    policy.from_hidden(x, x, x, advantages=x, mask=x, old_logprob=x)
    policy.from_logits(x, x, advantage=x, mask=x)
    policy.from_logits(x, x, advantages=x)
    preference.from_logits(x, x, x, n_pair=2)
"""


@pytest.mark.slow
def test_a_type_checker_reports_a_misspelt_input(tmp_path: Path) -> None:
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is not installed")
    (tmp_path / "calls.py").write_text(WRONG)
    (tmp_path / "pyrightconfig.json").write_text(f'{{"extraPaths": ["{ROOT}", "{ROOT}/kernels"]}}')
    command = [pyright, "--pythonpath", sys.executable, "--project", str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = re.findall(r"calls\.py:(\d+):\d+ - error: (.*)", run.stdout)
    lines = WRONG.splitlines()
    found = {lines[int(number) - 1].strip(): message for number, message in errors}
    assert len(found) == 4, run.stdout
    assert all(call.startswith(("policy.", "preference.")) for call in found)
    text = " ".join(found.values())
    assert all(word in text for word in ('"old_logprob"', '"advantage"', '"mask"', '"n_pair"')), text
