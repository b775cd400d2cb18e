"""What is written about the losses: tables are up to date, and the worked example of CONTRIBUTING.md works."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastrl import PolicyLoss
from fastrl.losses.policy_presets import TRAINERS

ROOT = Path(__file__).resolve().parent.parent
SECTION = re.search(
    r"^## Adding a loss\n(.*?)^## ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL | re.MULTILINE
)


@pytest.fixture
def make_docs() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_losses_is_up_to_date(make_docs: ModuleType) -> None:
    for path in make_docs.PAGES:
        text = path.read_text()
        assert make_docs.page(text, path.name) == text, f"{path.name}: run python scripts/make_docs.py"


def test_the_page_holds_every_preset_and_trainer(make_docs: ModuleType) -> None:
    text = make_docs.PAGES[0].read_text()
    assert all(f"| `{name}` |" in text for name in (*PolicyLoss.presets(), *TRAINERS))


def test_a_page_without_a_mark_is_refused(make_docs: ModuleType) -> None:
    with pytest.raises(ValueError, match="must mark each of presets, styles, trainers once"):
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
    paths = (tmp_path, tmp_path / "kernels", ROOT / "tests")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_example_states_its_size() -> None:
    assert SECTION is not None
    stated = re.search(r"It takes (\d+) lines", SECTION.group(1))
    assert stated is not None
    assert int(stated.group(1)) == sum(added for *_, added in changes())
