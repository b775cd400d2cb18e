"""Count how the sources are laid out and written, and exit 1 where a count is above its limit.

    python scripts/house.py              the counts beside their limits
    python scripts/house.py --prose      prose by file, the densest first
    python scripts/house.py --clones     the repeated runs of lines

Counts are over fastrl/ and kernels/; prose is also counted over bench/, scripts/ and the pages. A room is a file or a
folder. A circle is a set of rooms of one folder that import each other, in a function's body too.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_PARAMETERS = 10
CLONE_LINES = 6
LIMITS = {
    "import circles": 0,
    "files in the widest folder of the sources": 18,
    "files in the widest folder of the tests": 35,
    "functions with more than 10 parameters": 38,
    "lines of the longest file": 650,
    "verbatim clones, % of code lines": 5.0,
    "prose: 'what' per 1,000 words": 1.5,
    "prose: 'that of', 'those of' per 1,000 words": 0.3,
    "prose: ';' per 1,000 words": 6.0,
}


class Prose(NamedTuple):
    """Words and marks of some text."""

    words: int
    what: int
    that_of: int
    semicolons: int

    @classmethod
    def of(cls, text: str) -> Prose:
        """Return the counts of a text without its code."""
        text = re.sub(r"`[^`]*`", " code ", text)
        return cls(
            len(re.findall(r"[A-Za-z][A-Za-z'-]*", text)),
            len(re.findall(r"\bwhat\b", text, flags=re.IGNORECASE)),
            len(re.findall(r"\b(?:that|those)\s+of\b", text, flags=re.IGNORECASE)),
            text.count(";"),
        )

    def __add__(self, other: object) -> Prose:
        """Return the sums."""
        if not isinstance(other, Prose):
            return NotImplemented
        return Prose(*(a + b for a, b in zip(self, other, strict=True)))

    def per_thousand(self) -> tuple[float, float, float]:
        """Return `what`, `that of` and `;` per 1,000 words."""
        scale = 1000.0 / max(1, self.words)
        return self.what * scale, self.that_of * scale, self.semicolons * scale


def tracked(*folders: str, ends: str = ".py") -> list[Path]:
    """Return the tracked and new files of some folders, relative to the root."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *folders]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = sorted({name for name in listing.split("\0") if name.endswith(ends)})
    return [Path(name) for name in names if (ROOT / name).is_file()]


def sources() -> list[Path]:
    """Return the files of the library and its kernels."""
    return tracked("fastrl", "kernels")


def module_name(path: Path) -> tuple[str, ...]:
    """Return the dotted name of a file, in parts."""
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imports(path: Path, modules: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield the modules of ours that a file imports when it runs, in functions too."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            base = tuple(node.module.split("."))
            names = [(*base, alias.name) if (*base, alias.name) in modules else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in modules)


def circles() -> list[list[str]]:
    """Return the sets of rooms, of any folder, that import each other."""
    files = {module_name(path): path for path in sources()}
    packages = {name for name, path in files.items() if path.name == "__init__.py"}
    arrows: dict[tuple[str, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, path in files.items():
        if name in packages and len(name) > 1:
            continue  # the face of a package imports its own rooms
        for other in imports(path, set(files)):
            shared = 0
            while shared < min(len(name), len(other)) and name[shared] == other[shared]:
                shared += 1
            if shared and shared < len(name) and shared < len(other):
                arrows[name[:shared]][name[shared]].add(other[shared])
    found = []
    for folder, graph in arrows.items():
        for group in strongly_connected(graph):
            found.append([".".join((*folder, room)) for room in sorted(group)])
    return found


def strongly_connected(graph: dict[str, set[str]]) -> list[set[str]]:
    """Return the groups of two or more nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for node in graph.get(todo.pop(), ()):
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
        return seen

    reach = {node: reached(node) for node in graph}
    groups: list[set[str]] = []
    for node in graph:
        group = {other for other in reach[node] if node in reach.get(other, ())} | {node}
        if len(group) > 1 and group not in groups:
            groups.append(group)
    return groups


def widest(files: list[Path]) -> tuple[int, str]:
    """Return the largest number of files in one folder, and the folder."""
    counts = Counter(path.parent.as_posix() for path in files if path.name != "__init__.py")
    folder, count = counts.most_common(1)[0]
    return count, folder


def long_signatures() -> list[str]:
    """Return "file function parameters" of functions with many parameters; self, cls and ctx do not count."""
    found = []
    for path in sources():
        for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                given = node.args
                names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
                names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
                count = len([name for name in names if name not in ("self", "cls", "ctx")])
                if count > MOST_PARAMETERS:
                    found.append(f"{path.as_posix()} {node.name} {count}")
    return sorted(found)


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the lines of code: no comments, docstrings, imports or bare punctuation."""
    text = (ROOT / path).read_text(encoding="utf-8")
    dropped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        if bare or isinstance(node, ast.Import | ast.ImportFrom):
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [(i, line.split("  # ")[0].strip()) for i, line in enumerate(text.splitlines(), 1)]
    return [(i, line) for i, line in lines if i not in dropped and re.search(r"\w", line) and not line.startswith("#")]


def clones() -> tuple[float, list[str]]:
    """Return the share of code lines in runs that stand twice to the letter, in percent, and these runs."""
    files = {path: code_lines(path) for path in sources()}
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, lines in files.items():
        for i in range(len(lines) - CLONE_LINES + 1):
            places[tuple(line for _, line in lines[i : i + CLONE_LINES])].append((path, i))
    repeated: dict[Path, set[int]] = defaultdict(set)
    shown = []
    for found in places.values():
        if len(found) > 1:
            shown.append(" = ".join(f"{path.as_posix()}:{files[path][i][0]}" for path, i in found))
            for path, i in found:
                repeated[path].update(range(i, i + CLONE_LINES))
    total = sum(map(len, files.values()))
    return 100.0 * sum(map(len, repeated.values())) / total, sorted(shown)


def python_prose(path: Path) -> str:
    """Return the docstrings, field docstrings and comments of a file, without the code set off in them."""
    text = (ROOT / path).read_text(encoding="utf-8")
    parts = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            block = node.value.value
            # Lines set off by four blanks are formulas, tables or code, unless they describe an argument.
            base = " " * node.col_offset
            lines = [line.removeprefix(base) for line in block.splitlines()]
            section, kept = "", []
            for line in lines:
                section = line if re.match(r"(Args|Returns|Raises|Attributes|Yields):", line) else section
                section = "" if line and not line.startswith((" ", section)) else section
                if section or not line.startswith("    "):
                    kept.append(line)
            parts.append("\n".join(kept))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and not re.match(r"#\s*(noqa|pyright|fmt|type):", token.string):
            parts.append(token.string.lstrip("# "))
    return "\n".join(parts)


def page_prose(path: Path) -> str:
    """Return a page without its fenced and indented code, its links' targets and its generated tables."""
    text = (ROOT / path).read_text(encoding="utf-8")
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", text, flags=re.DOTALL)
    return "\n".join(line for line in re.sub(r"\]\([^)]*\)", "]", text).splitlines() if not line.startswith("    "))


def prose() -> dict[str, Prose]:
    """Return the counts of every file that holds prose."""
    found = {}
    for path in tracked("fastrl", "kernels", "bench", "scripts"):
        found[path.as_posix()] = Prose.of(python_prose(path))
    for path in tracked("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", ends=".md"):
        found[path.as_posix()] = Prose.of(page_prose(path))
    return found


def counts() -> dict[str, tuple[float, str]]:
    """Return each count with the place or the names that make it."""
    width, folder = widest(sources())
    test_width, test_folder = widest(tracked("tests"))
    signatures, (cloned, _) = long_signatures(), clones()
    longest, path = max((len((ROOT / path).read_text(encoding="utf-8").splitlines()), path) for path in sources())
    total = sum(prose().values(), Prose(0, 0, 0, 0))
    found = circles()
    values = [
        (len(found), "; ".join(" <-> ".join(group) for group in found)),
        (width, folder),
        (test_width, test_folder),
        (len(signatures), ""),
        (longest, path.as_posix()),
        (round(cloned, 2), ""),
        *((round(value, 2), "") for value in total.per_thousand()),
    ]
    return dict(zip(LIMITS, values, strict=True))


def main() -> int:
    """Print what was asked for; return 1 where a count is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prose", action="store_true")
    parser.add_argument("--clones", action="store_true")
    given = parser.parse_args()
    if given.prose:
        for name, found in sorted(prose().items(), key=lambda item: -sum(item[1][1:])):
            what, that_of, semicolons = found.per_thousand()
            print(f"{name:<60} {found.words:>6} words  what {what:5.1f}  that of {that_of:5.1f}  ; {semicolons:5.1f}")
        return 0
    if given.clones:
        print("\n".join(clones()[1]))
        return 0
    too_many = 0
    for name, (value, where) in counts().items():
        limit = LIMITS[name]
        too_many += value > limit
        print(f"{'ABOVE' if value > limit else 'ok':<6} {name:<48} {value:>8g}   limit {limit:<6g} {where}")
    print(*("       " + line for line in long_signatures()), sep="\n")
    return int(too_many > 0)


if __name__ == "__main__":
    sys.exit(main())
