"""What is written about the losses: tables are up to date, and the worked example of CONTRIBUTING.md works."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from script_loader import load_script
from torch import Tensor

import fastrl
from fastrl import LossOutput, PolicyLoss, PreferenceLoss
from fastrl.losses import catalogue
from fastrl.losses.policy.presets import TRAINERS
from fastrl.losses.preference.presets import PRESETS, describe

ROOT = Path(__file__).resolve().parents[2]
SECTION = re.search(
    r"^## Adding a loss\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE
)


@pytest.fixture
def make_docs() -> ModuleType:
    return load_script("make_docs")


def test_the_page_of_losses_is_up_to_date(make_docs: ModuleType) -> None:
    for path in make_docs.PAGES:
        text = path.read_text()
        assert make_docs.page(text) == text, f"{path.name}: run python scripts/make_docs.py"


def test_the_page_holds_every_preset_and_trainer(make_docs: ModuleType) -> None:
    text = make_docs.PAGES[0].read_text()
    names = (*PolicyLoss.presets(), *PreferenceLoss.presets(), *TRAINERS)
    assert all(f"| `{name}` |" in text for name in names)


@pytest.mark.parametrize("name", PreferenceLoss.presets())
def test_a_preference_preset_says_what_it_is(name: str) -> None:
    """Formula, source, defaults, and trainers that are known; every style builds, any other name is refused."""
    preset, text = PRESETS[name], describe(name)
    assert preset.formula in text
    assert preset.paper in text
    assert set(preset.notes) <= set(preset.styles) <= set(TRAINERS)
    for style, fields in preset.styles.items():
        assert style in text
        loss = PreferenceLoss.preset(name, style=style)
        assert {field: getattr(loss, field) for field in fields} == dict(fields)
        assert fields or loss == PreferenceLoss.preset(name)
    for other in {*TRAINERS, "TRL"} - set(preset.styles):
        with pytest.raises(ValueError, match=f"style of '{name}' must be one of 'trl'.*got '{other}'"):
            PreferenceLoss.preset(name, style=other)


def inputs_of(function: str) -> dict[str, object]:
    """Return small inputs for every required argument that the catalogue's options leave open."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return -torch.rand(*shape, generator=generator)

    tokens = dict.fromkeys(
        ("logprobs", "ref_logprobs", "old_logprobs", "teacher_logprobs", "token_rewards", "values", "old_values"),
        draw(4, 3),
    )
    pairs = {"chosen_scores": draw(4), "rejected_scores": draw(4), "targets": draw(4), "lengths": torch.ones(4)}
    more = {
        "mask": torch.ones(4, 3),
        "returns": draw(4, 3),
        "sum_squared_probs": -draw(4, 3),
        "anchor_logprobs": draw(4, 3),
        "baseline_rewards": draw(4),
        "rewards": draw(4, 3) if function in ("gae", "td_lambda_returns", "gdpo_advantages") else draw(4),
        "step_rewards": draw(4, 2),
        "step_ends": torch.tensor([[0, 2]] * 4),
        "logits": draw(4, 3, 5),
        "ref_logits": draw(4, 3, 5),
        "labels": torch.ones(4, 3, dtype=torch.int64),
        **{f"{side}_hidden": draw(4, 3, 6) for side in ("student", "teacher")},
        **{f"{side}_weight": draw(5, 6) for side in ("student", "teacher")},
    }
    return {**tokens, **pairs, **more}


@pytest.mark.parametrize("entry", [*catalogue.KL, *catalogue.ADVANTAGES, *catalogue.OTHERS], ids=catalogue.Entry.call)
def test_the_functions_of_the_catalogue_are_there(entry: catalogue.Entry) -> None:
    """Each call of the tables is a public function that takes the options and returns finite numbers."""
    function = getattr(fastrl, entry.function)
    given = inputs_of(entry.function)
    required = {
        name: given[name]
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty and name not in entry.options
    }
    result = function(**required, **entry.options)
    for part in result if isinstance(result, tuple) and not isinstance(result, LossOutput) else (result,):
        value = part.loss if isinstance(part, LossOutput) else part
        assert bool(value.isfinite().all())
    assert entry.formula
    assert entry.source


def test_a_page_without_a_mark_is_refused(make_docs: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"must mark each of presets, styles, trainers, .* once"):
        make_docs.page("<!-- generated: presets -->\n<!-- end -->\n")


def test_the_plot_is_drawn_of_the_losses(make_docs: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    make_docs.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    assert make_docs.PLOT.exists()


def changes() -> list[tuple[str, str, str, int]]:
    """Return (path, old text, new text, lines added) of each diff in the section; the last path named before is its."""
    assert SECTION is not None
    found, path = [], ""
    for named, diff in re.findall(r"`([\w/]+\.py)`|```diff\n(.*?)```", SECTION.group(1), flags=re.DOTALL):
        path = named or path
        if diff:
            lines = diff.splitlines(keepends=True)
            old = "".join(line[1:] for line in lines if line[0] in " -")
            new = "".join(line[1:] for line in lines if line[0] in " +")
            found.append((path, old, new, sum(line[0] == "+" for line in lines)))
    return found


def test_the_example_of_a_new_loss_works(tmp_path: Path) -> None:
    """The changes apply to the sources as they are; then the example, the kernel's parity, and the path from hidden."""
    assert SECTION is not None
    for folder in ("fastrl", "kernels/fastrl_kernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path, old, new, _ in changes():
        source = (tmp_path / path).read_text()
        assert source.count(old) == 1, f"{path}: expected once, found {source.count(old)} times:\n{old}"
        (tmp_path / path).write_text(source.replace(old, new))
    (example,) = re.findall(r"```python\n(.*?)```", SECTION.group(1), flags=re.DOTALL)
    more = """
import pytest
from policy_cases import judge_terms
import fastrl, fastrl_kernels
assert fastrl.__file__.startswith(ROOT) and fastrl_kernels.__file__.startswith(ROOT)
for dtype in (torch.float32, torch.float64):
    judge_terms("spo", PolicyLoss.preset("spo"), dtype)
with pytest.raises(ValueError, match="needs clip_high > 0, got None"):
    PolicyLoss.preset("spo", clip_high=None)
hidden, weight, labels = torch.randn(2, 3, 4, requires_grad=True), torch.randn(7, 4), torch.randint(0, 7, (2, 3))
inputs = {name: value.float() for name, value in inputs.items()}
grads = []
from_hidden = loss.from_hidden(hidden, weight, labels, **inputs)
for output in (from_hidden, loss.from_logits(hidden @ weight.T, labels, **inputs)):
    grads.append(torch.autograd.grad(output.loss, hidden)[0])
torch.testing.assert_close(*grads)
"""
    script = tmp_path / "example.py"
    script.write_text(example + f"\nROOT = {str(tmp_path)!r}" + more)
    paths = (tmp_path, tmp_path / "kernels", ROOT / "tests" / "support")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_example_states_its_size() -> None:
    assert SECTION is not None
    stated = re.search(r"It takes (\d+) lines", SECTION.group(1))
    assert stated is not None
    assert int(stated.group(1)) == sum(added for *_, added in changes())
