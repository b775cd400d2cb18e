"""Count how the sources are laid out and written, and exit 1 if a count is above its limit.

    python scripts/house.py              the counts beside their limits
    python scripts/house.py --prose      prose by file, the densest first
    python scripts/house.py --clones     the repeated runs of lines
    python scripts/house.py --signatures the functions with many parameters

Counts are over fastrl/ and kernels/. Prose is also counted in bench/, scripts/, csrc/ and the pages.

- Room: a file or a folder.
- Circle: a set of rooms of one folder that import each other. Imports inside functions count, imports for type
  checkers do not. A package's `__init__` is its face: it imports its own rooms, so a room may not import it.
- Clone: a run of 6 or more lines of code that occurs twice to the letter. Comments, docstrings, imports and lines of
  bare punctuation are no code.
- Long signature: more than 10 parameters besides self, cls and ctx. `LONG_SIGNATURES` names each with its reason.
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
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MOST_PARAMETERS = 10
CLONE_LINES = 6
FACE = "__init__"
PRAGMA = re.compile(r"#\s*(noqa|pyright|fmt|type|ruff|pragma)\b")
LIMITS = {
    "import circles": 0,
    "files in the widest folder of the sources": 18,
    "files in the widest folder of the tests": 35,
    "functions with more than 10 parameters": 38,
    "of these not named in LONG_SIGNATURES": 0,
    "names in LONG_SIGNATURES without such a function": 0,
    "lines of the longest file": 650,
    "verbatim clones, % of code lines": 5.0,
    "prose: 'what' per 1,000 words": 1.5,
    "prose: 'that of', 'those of' per 1,000 words": 0.3,
    "prose: ';' per 1,000 words": 6.0,
}

# Why a signature may be long.
KERNEL = "Triton entry kernel: one argument for each pointer and stride"
KERNEL_PART = "part of a kernel: values that Triton keeps in registers"
BACKEND = "one signature for all backends"
CUSTOM_OP = "custom op: tensors and numbers only"
PUBLIC = "public: every argument is a choice of the user"
LIGER = "Liger's signature"

# Key: file and qualified name. A function that is not here fails the count, and so does a name without its function.
LONG_SIGNATURES = {
    "fastrl/backends/cpu.py sparse_rows": BACKEND,
    "fastrl/backends/cpu.py token_logprobs_bwd": BACKEND,
    "fastrl/backends/cuda.py token_logprobs_bwd": BACKEND,
    "fastrl/backends/cuda.py token_logprobs_fwd_bwd": BACKEND,
    "fastrl/backends/torch_rows.py list_entries": BACKEND,
    "fastrl/backends/torch_rows.py token_logprobs_bwd": BACKEND,
    "fastrl/integrations/liger/policy.py LigerFusedLinearGRPOLoss.__init__": LIGER,
    "fastrl/integrations/liger/policy.py LigerFusedLinearGRPOLoss.forward": LIGER,
    "fastrl/integrations/liger/preference.py LigerFusedLinearDPOLoss.__init__": LIGER,
    "fastrl/integrations/liger/supervised.py LigerFusedLinearCrossEntropyLoss.__init__": LIGER,
    "fastrl/losses/advantages/group.py group_advantages": PUBLIC,
    "fastrl/losses/distillation.py distillation_loss": PUBLIC,
    "fastrl/losses/masks.py covariance_keep_mask": PUBLIC,
    "fastrl/losses/policy/loss.py PolicyLoss.__call__": PUBLIC,
    "fastrl/losses/policy/loss.py PolicyLoss.from_hidden": PUBLIC,
    "fastrl/losses/preference/loss.py PreferenceLoss.from_hidden": PUBLIC,
    "fastrl/losses/preference/loss.py PreferenceLoss.from_logprobs": PUBLIC,
    "fastrl/losses/value.py value_loss": PUBLIC,
    "fastrl/ops/linear_token_logprobs.py _linear_token_logprobs": CUSTOM_OP,
    "fastrl/ops/linear_token_logprobs.py _linear_token_logprobs_backward": CUSTOM_OP,
    "fastrl/ops/linear_token_logprobs.py linear_token_logprobs": PUBLIC,
    "fastrl/ops/policy.py _policy_terms": CUSTOM_OP,
    "fastrl/ops/policy_logits.py _policy_logits_": CUSTOM_OP,
    "fastrl/ops/token_logprobs.py _token_logprobs_backward": CUSTOM_OP,
    "kernels/fastrl_kernels/advantages.py _group_advantages_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/policy.py _policy_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/policy_logits.py _policy_logits_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/row_statistics.py _row_statistics_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/row_statistics.py _take_block": KERNEL_PART,
    "kernels/fastrl_kernels/sparse_rows.py _accumulate_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/sparse_rows.py _list_entries_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/sparse_rows.py _times_matrix_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/sparse_rows.py list_entries": BACKEND,
    "kernels/fastrl_kernels/token_logprobs.py _token_logprobs_bwd_kernel": KERNEL,
    "kernels/fastrl_kernels/token_logprobs.py _token_logprobs_fwd_kernel": KERNEL,
    "kernels/fastrl_kernels/token_logprobs.py row_gradient": KERNEL_PART,
    "kernels/fastrl_kernels/token_logprobs.py write_gradient": KERNEL_PART,
    "kernels/fastrl_kernels/token_logprobs.py token_logprobs_bwd": BACKEND,
}


class Prose(NamedTuple):
    """Words and marks of some text."""

    words: int
    what: int
    that_of: int
    semicolons: int

    @classmethod
    def of(cls, text: str) -> Prose:
        """Return the counts of a text without its code and without its HTML entities."""
        text = re.sub(r"`[^`]*`", " code ", text)
        text = re.sub(r"&#?\w+;", " ", text)
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


def text_of(path: Path) -> str:
    """Return the content of a file, named from the root."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def parsed(text: str) -> ast.Module:
    """Return the syntax tree of a text; it is shared, so nobody may change it."""
    return ast.parse(text)


@cache
def comments(text: str) -> list[tuple[int, int, str]]:
    """Return (line, column, comment) of the comments in a text."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [(*token.start, token.string) for token in tokens if token.type == tokenize.COMMENT]


def module_name(path: Path) -> tuple[str, ...]:
    """Return the dotted name of a file, in parts."""
    parts = path.with_suffix("").parts
    parts = parts[1:] if parts[0] == "kernels" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def typing_only(tree: ast.Module) -> set[int]:
    """Return the ids of the nodes that only a type checker reads."""
    return {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }


def imports(path: Path, modules: set[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """Yield the modules of ours that a file imports when it runs, in functions too."""
    tree = parsed(text_of(path))
    skipped = typing_only(tree)
    own = module_name(path)
    package = own if path.name == "__init__.py" else own[:-1]
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            names = [(*base, alias.name) if (*base, alias.name) in modules else base for alias in node.names]
        else:
            continue
        yield from (name for name in names if name in modules)


def circles() -> list[list[str]]:
    """Return the sets of rooms, of any folder, that import each other."""
    files = {module_name(path): path for path in sources()}
    arrows: dict[tuple[str, ...], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name, path in files.items():
        for other in imports(path, set(files)):
            shared = 0
            while shared < min(len(name), len(other)) and name[shared] == other[shared]:
                shared += 1
            if name != other:
                rooms = [(*module, FACE)[shared] for module in (name, other)]
                arrows[name[:shared]][rooms[0]].add(rooms[1])
    return [
        [".".join((*folder, room)) for room in sorted(group)]
        for folder, graph in arrows.items()
        for group in strongly_connected(graph)
    ]


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


def functions(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[tuple[str, ast.arguments]]:
    """Yield the qualified name and the parameters of every function."""
    for node in ast.iter_child_nodes(tree):
        name = inside
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = (*inside, node.name)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield ".".join(name), node.args
        yield from functions(node, name)


def long_signatures() -> list[tuple[str, int]]:
    """Return ("file function", parameters) of the functions with many; self, cls and ctx do not count."""
    found = []
    for path in sources():
        for name, given in functions(parsed(text_of(path))):
            names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            names += [a.arg for a in (given.vararg, given.kwarg) if a is not None]
            count = len([name for name in names if name not in ("self", "cls", "ctx")])
            if count > MOST_PARAMETERS:
                found.append((f"{path.as_posix()} {name}", count))
    return sorted(found)


def unnamed_signatures() -> list[str]:
    """Return the long signatures that the table does not name."""
    return [name for name, _ in long_signatures() if name not in LONG_SIGNATURES]


def stale_names() -> list[str]:
    """Return the names of the table whose function is gone or short."""
    return sorted(set(LONG_SIGNATURES) - {name for name, _ in long_signatures()})


def is_text(node: ast.Expr) -> bool:
    """Return whether a statement is a string alone: a docstring or a text under a field."""
    return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, text) of the lines of code: no comments, docstrings, imports or bare punctuation."""
    text = text_of(path)
    dropped: set[int] = set()
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Expr) and is_text(node)):
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = dict(enumerate(text.splitlines(), 1))
    for row, column, _ in comments(text):
        lines[row] = lines[row][:column]
    code = ((i, line.strip()) for i, line in lines.items() if i not in dropped)
    return [(i, line) for i, line in code if re.search(r"\w", line)]


def clones() -> tuple[float, list[str]]:
    """Return the percentage of code lines in runs that occur twice to the letter, and these runs."""
    files = {path: code_lines(path) for path in sources()}
    places: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, lines in files.items():
        for i in range(len(lines) - CLONE_LINES + 1):
            places[tuple(line for _, line in lines[i : i + CLONE_LINES])].append((path, i))
    repeated: dict[Path, set[int]] = defaultdict(set)
    shown = []
    for found in places.values():
        (first, start), (last, end) = found[0], found[-1]
        # Equal lines in a row overlap themselves: that is one run, not two.
        if first != last or end - start >= CLONE_LINES:
            shown.append(" = ".join(f"{path.as_posix()}:{files[path][i][0]}" for path, i in found))
            for path, i in found:
                repeated[path].update(range(i, i + CLONE_LINES))
    total = max(1, sum(map(len, files.values())))
    return 100.0 * sum(map(len, repeated.values())) / total, sorted(shown)


def python_prose(path: Path) -> str:
    """Return the docstrings, field docstrings and comments of a file, without the code set off in them."""
    text = text_of(path)
    parts = []
    for node in ast.walk(parsed(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            block = node.value.value
            # Lines indented by four blanks are formulas, tables or code, unless they describe an argument.
            base = " " * node.col_offset
            lines = [line.removeprefix(base) for line in block.splitlines()]
            section, kept = "", []
            for line in lines:
                section = line if re.match(r"(Args|Returns|Raises|Attributes|Yields):", line) else section
                section = "" if line and not line.startswith((" ", section)) else section
                if section or not line.startswith("    "):
                    kept.append(line)
            parts.append("\n".join(kept))
    parts += [comment.lstrip("# ") for _, _, comment in comments(text) if not PRAGMA.match(comment)]
    return "\n".join(parts)


def device_prose(path: Path) -> str:
    """Return the comments of a C++ or CUDA file."""
    text = text_of(path)
    return "\n".join(line.lstrip("/ ") for line in re.findall(r"//.*", text))


def page_prose(path: Path) -> str:
    """Return a page without its fenced and indented code, its links' targets and its generated tables."""
    text = text_of(path)
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- generated.*?<!-- end -->", "", text, flags=re.DOTALL)
    return "\n".join(line for line in re.sub(r"\]\([^)]*\)", "]", text).splitlines() if not line.startswith("    "))


def prose() -> dict[str, Prose]:
    """Return the counts of every file that holds prose."""
    found = {}
    for path in tracked("fastrl", "kernels", "bench", "scripts"):
        found[path.as_posix()] = Prose.of(python_prose(path))
    for path in (path for end in (".h", ".cc", ".cu", ".cuh") for path in tracked("csrc", ends=end)):
        found[path.as_posix()] = Prose.of(device_prose(path))
    for path in tracked("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", ends=".md"):
        found[path.as_posix()] = Prose.of(page_prose(path))
    return found


def counts() -> dict[str, tuple[float, str]]:
    """Return each count with the place or the names that make it."""
    width, folder = widest(sources())
    test_width, test_folder = widest(tracked("tests"))
    unnamed, stale = unnamed_signatures(), stale_names()
    longest, path = max((len(text_of(path).splitlines()), path) for path in sources())
    total = sum(prose().values(), Prose(0, 0, 0, 0))
    found = circles()
    values = [
        (len(found), ", ".join(" <-> ".join(group) for group in found)),
        (width, folder),
        (test_width, test_folder),
        (len(long_signatures()), ""),
        (len(unnamed), ", ".join(unnamed)),
        (len(stale), ", ".join(stale)),
        (longest, path.as_posix()),
        (round(clones()[0], 2), ""),
        *((round(value, 2), "") for value in total.per_thousand()),
    ]
    return dict(zip(LIMITS, values, strict=True))


def main() -> int:
    """Print the table or the list asked for; return 1 if a count is above its limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("--prose", "--clones", "--signatures"):
        parser.add_argument(option, action="store_true")
    given = parser.parse_args()
    if given.prose:
        for name, found in sorted(prose().items(), key=lambda item: -sum(item[1][1:])):
            what, that_of, semicolons = found.per_thousand()
            print(f"{name:<60} {found.words:>6} words  what {what:5.1f}  that of {that_of:5.1f}  ; {semicolons:5.1f}")
        return 0
    if given.clones:
        print("\n".join(clones()[1]))
        return 0
    if given.signatures:
        for name, count in long_signatures():
            print(f"{count:>3} {name:<80} {LONG_SIGNATURES.get(name, 'NOT NAMED')}")
        return 0
    too_many = 0
    for name, (value, where) in counts().items():
        limit = LIMITS[name]
        too_many += value > limit
        print(f"{'ABOVE' if value > limit else 'ok':<6} {name:<48} {value:>8g}   limit {limit:<6g} {where}")
    return int(too_many > 0)


if __name__ == "__main__":
    sys.exit(main())
