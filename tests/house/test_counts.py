"""The counts of scripts/house.py: each within its limit, and each able to see a planted fault.

The import layers are tested beside them: the contracts of pyproject.toml name every package that has rooms of its own.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from script_loader import load_script

ROOT = Path(__file__).resolve().parents[2]
HOUSE = load_script("house")
LAYERED = ("backends", "integrations", "losses", "losses.policy", "losses.preference", "ops", "train", "verify")

pytestmark = pytest.mark.skipif(
    not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs git and a checkout"
)


@pytest.fixture(scope="module")
def counted() -> dict[str, tuple[float, str]]:
    return HOUSE.counts()


@pytest.mark.parametrize("name", HOUSE.LIMITS)
def test_count_is_within_its_limit(counted: dict[str, tuple[float, str]], name: str) -> None:
    value, where = counted[name]
    assert value <= HOUSE.LIMITS[name], f"{name}: {where}; python scripts/house.py --help"


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., ModuleType]:
    """Return a function that writes files, name=text, into an empty repository and lets the counts read that one."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(HOUSE, "ROOT", tmp_path)

    def write(**files: str) -> ModuleType:
        for name, text in files.items():
            path = tmp_path / "fastrl" / (name.replace("__", "/") + ".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            for package in (path.parent, *path.parent.parents[: len(path.relative_to(tmp_path).parts) - 2]):
                (package / "__init__.py").touch()
            path.write_text(textwrap.dedent(text))
        return HOUSE

    return write


def test_a_circle_is_found_in_a_function_and_through_a_folder(planted: Callable[..., ModuleType]) -> None:
    house = planted(
        ops__rows="from fastrl.losses.kl import kl\n",
        losses__kl="def kl():\n    import fastrl.ops.rows\n",
        losses__masks="from fastrl.losses import kl\n",
    )
    assert house.circles() == [["fastrl.losses", "fastrl.ops"]]


def test_a_circle_of_three_rooms_is_one(planted: Callable[..., ModuleType]) -> None:
    house = planted(
        ops__a="from fastrl.ops import b\n",
        ops__b="from . import c\n",
        ops__c="from .a import x\n",
        ops__d="from fastrl.ops import a, b, c\n",
    )
    assert house.circles() == [["fastrl.ops.a", "fastrl.ops.b", "fastrl.ops.c"]]


def test_a_room_may_not_import_the_face_that_imports_it(planted: Callable[..., ModuleType]) -> None:
    house = planted(verify__run="from fastrl.verify import judge\n")
    assert house.circles() == []
    (house.ROOT / "fastrl" / "verify" / "__init__.py").write_text("from fastrl.verify.run import judge\n")
    assert house.circles() == [["fastrl.verify.__init__", "fastrl.verify.run"]]


def test_a_face_is_a_part_of_its_package(planted: Callable[..., ModuleType]) -> None:
    house = planted(ops__rows="import fastrl.losses.kl\n", losses__kl="")
    (house.ROOT / "fastrl" / "losses" / "__init__.py").write_text("import fastrl.ops.rows\n")
    assert house.circles() == [["fastrl.losses", "fastrl.ops"]]


def test_imports_for_type_checkers_make_no_circle(planted: Callable[..., ModuleType]) -> None:
    for_types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fastrl.ops.b\nelse:\n    {}\n"
    house = planted(ops__a=for_types.format("pass"), ops__b="import fastrl.ops.a\n")
    assert house.circles() == []
    planted(ops__a=for_types.format("import fastrl.ops.b"))
    assert house.circles() == [["fastrl.ops.a", "fastrl.ops.b"]]


BODY = """
    first = 1  # {0}
    second = 2

    third = (
        3
    )
    from os import {0}
    fourth = 4
    fifth = 5
"""


def test_a_clone_is_counted_without_comments_imports_and_punctuation(planted: Callable[..., ModuleType]) -> None:
    house = planted(
        a="def f():" + BODY.format("path"), b='def g():\n    """Say."""' + BODY.format("sep"), c="x = 1\n" * 7
    )
    share, places = house.clones()
    # Six of the seven lines of each function; equal lines in a row of `c` are one run.
    assert share == pytest.approx(100.0 * 12 / 21)
    assert places == ["fastrl/a.py:2 = fastrl/b.py:3"]
    planted(b="def g():" + BODY.format("path").replace("fourth", "other"))
    assert house.clones() == (0.0, [])


def signature(name: str, count: int, before: str = "") -> str:
    return f"def {name}({before}{', '.join(f'a{i}' for i in range(count))}, *, key, **others): ...\n"


def test_long_signatures_are_compared_with_the_table(
    planted: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "class Loss:\n    " + signature("long", 9, "self, ") + "    " + signature("short", 8, "self, ")
    house = planted(losses__a=method + signature("function", 10))
    known = {"fastrl/losses/a.py Loss.long": house.PUBLIC, "fastrl/losses/a.py Loss.short": house.PUBLIC}
    monkeypatch.setattr(house, "LONG_SIGNATURES", known)
    assert house.long_signatures() == [("fastrl/losses/a.py Loss.long", 11), ("fastrl/losses/a.py function", 12)]
    assert house.unnamed_signatures() == ["fastrl/losses/a.py function"]
    assert house.stale_names() == ["fastrl/losses/a.py Loss.short"]


def test_prose_is_docstrings_and_comments_without_code(planted: Callable[..., ModuleType]) -> None:
    house = planted(
        a='''
        """Return what `what; that of` is; that of it.

            what = formula; those of

        Args:
            x: those of
                what
        """

        message = "what; that of"
        x = 1  # what it is  # noqa: E501
        y = 2  # noqa: what
        '''
    )
    found = house.prose()["fastrl/a.py"]
    assert (found.what, found.that_of, found.semicolons) == (3, 2, 1)


def test_prose_of_a_page_is_without_its_code(planted: Callable[..., ModuleType]) -> None:
    house = planted(a="")
    code = "```\nwhat;\n```\n\n    what;\n\n<!-- generated -->what;<!-- end -->"
    text = f"What [it](what;) is&nbsp;\n\n{code}\nThose\nof it.\n"
    (house.ROOT / "README.md").write_text(text)
    (house.ROOT / "csrc").mkdir()
    (house.ROOT / "csrc" / "rows.cc").write_text("// What;\nint what = 1;\n")
    counts = house.prose()
    assert counts["README.md"][1:] == (1, 1, 0)
    assert counts["csrc/rows.cc"][1:] == (1, 0, 1)


def test_the_widest_folder_is_counted_without_faces(planted: Callable[..., ModuleType]) -> None:
    house = planted(ops__a="", ops__b="", losses__a="")
    assert house.widest(house.sources()) == (2, "fastrl/ops")


def contracts() -> list[dict[str, object]]:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return pyproject["tool"]["importlinter"]["contracts"]


def test_contracts_forbid_circles_and_layer_the_packages() -> None:
    (acyclic,) = (contract for contract in contracts() if contract["type"] == "acyclic_siblings")
    assert acyclic["ancestors"] == ["fastrl", "fastrl_kernels"]
    assert not {"depth", "skip_descendants", "ignore_imports"} & set(acyclic)
    layered = [contract for contract in contracts() if contract["type"] == "layers" and "containers" in contract]
    assert {name for contract in layered for name in contract["containers"]} >= {f"fastrl.{name}" for name in LAYERED}
    for contract in layered:
        assert contract["exhaustive"] is True
        assert not any(":" in layer for layer in contract["layers"]), "independent modules are separated by |"


def test_no_test_module_is_imported() -> None:
    """Shared helpers are in tests/support or in a folder's conftest."""
    pattern = re.compile(r"^\s*(?:from|import)\s+(?:tests\b|[\w.]*\btest_\w+)", flags=re.MULTILINE)
    found = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("*.py") if pattern.search(path.read_text())]
    assert found == []


def test_the_map_of_the_tests_names_every_helper_and_folder() -> None:
    text = (ROOT / "tests" / "conftest.py").read_text(encoding="utf-8").split('"""')[1]
    folders = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    helpers = {path.name for path in (ROOT / "tests" / "support").glob("*.py")}
    named = set(re.findall(r"\w+(?=/)|\w+\.py", text))
    assert folders | helpers <= named
    assert {name for name in named if name.endswith(".py")} - helpers == {"conftest.py", "tiny_model.py"}


def test_the_script_says_which_count_is_above(
    planted: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    house = planted(ops__a="import fastrl.ops.b\n", ops__b="import fastrl.ops.a\n")
    (house.ROOT / "tests").mkdir()
    (house.ROOT / "tests" / "test_a.py").touch()
    monkeypatch.setattr(house, "LONG_SIGNATURES", {})
    monkeypatch.setattr(sys, "argv", ["house.py"])
    assert house.main() == 1
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("ABOVE")
    assert first.endswith("fastrl.ops.a <-> fastrl.ops.b")
    assert all(line.startswith("ok") for line in others)
