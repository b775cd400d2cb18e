"""The pages' Python examples run; links, commands, files, modules, tests and numbers that the pages name are true."""

import importlib
import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

from bench import record, report
from fastrl import cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
FOLDERS = "tests|fastrl|csrc|bench|examples|scripts|docs|reports|kernels"
# The measured gain of each loop in the README: the run's record, and the measure that the table shows.
GAINS = {
    "grpo": ("grpo", "sampled accuracy"),
    "ppo": ("ppo", "sampled accuracy"),
    "sft": ("sft", "sampled accuracy"),
    "rft": ("rft", "sampled accuracy"),
    "online-rft": ("online_rft", "sampled accuracy"),
    "dpo": ("dpo", "sampled accuracy"),
    "online-dpo": ("online_dpo", "sampled accuracy"),
    "reward-model": ("reward_model", "pair accuracy"),
}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made from the text."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "least"), [("README.md", 1), ("docs/entrances.md", 6)])
def test_python_examples_run(page: str, least: int) -> None:
    pytest.importorskip("transformers")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= least
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)


def test_promises_name_tests_that_exist() -> None:
    promises = (ROOT / "docs" / "promises.md").read_text()
    rows = [line for line in promises.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 13
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, function in named:
            assert f"def {function}(" in (ROOT / file).read_text(), f"{file}::{function}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_are_named_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", text):
        path = page.parent / target if target else page
        assert path.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(path), f"{page.name}: {target}#{anchor}"
    for target in re.findall(rf"`((?:{FOLDERS})/[\w./-]+)[`:]", text):
        assert target.endswith("/X.py") or (ROOT / target).exists(), f"{page.name}: {target}"
    for target in re.findall(r"(?<![\w/.-])(?:examples|scripts)/\w+\.\w+", text):
        assert "NAME" in target or (ROOT / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_that_are_named_import(page: Path) -> None:
    """`fastrl.a.b.name` is a module, or something that its longest importable part holds."""
    for name in set(re.findall(r"\bfastrl(?:\.[a-z_]\w*)+", page.read_text())):
        module, rest = name, []
        while not _is_module(module):
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
        try:
            found: object = importlib.import_module(module)
        except ImportError as error:
            # verl's plugin registers on import, so without verl its import says that it needs verl.
            if " needs " in str(error):
                continue
            raise
        for part in rest:
            assert hasattr(found, part), f"{page.name}: {name}"
            found = getattr(found, part)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_are_shown_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tyro")
    text = page.read_text()
    for command in sorted(
        set(re.findall(r"\bfastrl (train [a-z-]+|pairs|constitutional-pairs|report|doctor)\b", text))
    ):
        assert cli.main([*command.split(), "--help"]) == 0, f"{page.name}: fastrl {command}"
    assert capsys.readouterr().err == ""


def test_the_gains_of_the_loops_are_those_of_their_records() -> None:
    rows = re.findall(
        r"\| `fastrl train ([a-z-]+) .*?` \| \w+ right ([\d.]+) % to ([\d.]+) % \(([\d.]+) s\.e\.\)", README
    )
    assert {loop for loop, *_ in rows} == set(GAINS)
    for loop, *shown in rows:
        folder, wanted = GAINS[loop]
        gains = json.loads((ROOT / "reports" / folder / "summary.json").read_text())["gains"]
        (gain,) = (g for g in gains if wanted in (f"{g['mode']} {g['measure']}".strip(), g["measure"]))
        before, after = (100.0 * gain[side]["value"] for side in ("before", "after"))
        assert shown == [f"{before:.1f}", f"{after:.1f}", f"{gain['in_standard_errors']:.1f}"], loop


def test_the_headline_numbers_are_those_of_the_newest_record() -> None:
    results = record.newest(record.RESULTS)["cpu"]["results"]
    (case,) = (result for result in results if result["operation"] == "loss_hidden")
    found = {contender["name"]: contender for contender in case["contenders"]}
    names = ("TRL chunked log-prob", "PyTorch eager", "fastrl")
    seconds = [report.seconds_text(found[name]["seconds"]["median"]) for name in names]
    peaks = [report.bytes_text(found[name]["peak_bytes"]) for name in names]
    for trl, eager, ours in (seconds, peaks):
        assert f"| TRL {trl}, eager {eager} | {ours} |" in README
