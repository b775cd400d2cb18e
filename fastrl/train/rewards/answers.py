"""The answer of a completion: where it stands in the text, and what number, formula or letter it writes.

`extract_answer` first drops thoughts, then looks in this order, and takes the first that the text has:

| extraction | the answer is |
|---|---|
| `marked` | the inside of the last `<answer>...</answer>`, of the last `\\boxed{...}`, or the whole text |
| `boxed` | the inside of the last `\\boxed{...}`, else nothing |
| `tagged` | the inside of the last `<answer>...</answer>`, else nothing |
| `last_number` | the last number of the marked text, else nothing |
| `choice` | the letter A to J that the marked text settles on, else nothing |

| text | rule |
|---|---|
| a thought | everything up to the last `</think>` is dropped, also if the template opened it in the prompt |
| a thought that does not end | holds no answer: everything from its `<think>` is dropped |
| a box or an answer tag that does not end | holds no answer, and an earlier one was taken back: nothing |
| a box inside an answer tag | the inside of the box |
| a comma | separates thousands in 1,234 and 12,345,678. In 3,4 and 3,14 it separates two numbers |
"""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

Extraction = Literal["marked", "boxed", "tagged", "last_number", "choice"]

# A sign after an operand is an operator: the last number of "12-5" is 5.
NUMBER = re.compile(
    r"(?:(?<![0-9A-Za-z)])[-+])?(?:(?<![0-9])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|"
    r"(?:(?<![0-9A-Za-z)])[-+])?(?<![0-9])\.[0-9]+"
)
_LETTER = r"(?:\\(?:text|mathrm|mathbf|textbf)\s*\{\s*)?[(\[{]?\s*([A-J])\s*[)\]}]?\}?"
_ONLY_LETTER = re.compile(rf"\**{_LETTER}\s*[.:)]?\**", re.DOTALL)
_SAID_LETTER = re.compile(rf"(?:answer|option|choice)(?:\s+is)?[\s:=*$]*{_LETTER}(?![A-Za-z'])", re.IGNORECASE)
_TWO_LETTERS = re.compile(r"\b[A-J]\)?\s*(?:,|or|and|/|&)+\s*\(?[A-J]\b")
_SHOWN_LETTER = re.compile(r"\(([A-J])\)|\b([A-J])(?=[.):]?\s*$)", re.MULTILINE)


def extract_answer(completion: str, extraction: Extraction = "marked") -> str:
    """Return the part of a completion that is its answer, by the table of this module. Empty if there is none.

    Args:
        completion: the text that the model wrote.
        extraction: "marked", "boxed", "tagged", "last_number" or "choice".
    """
    text = without_thoughts(completion)
    if extraction == "boxed":
        return _last_boxed(text) or ""
    if extraction == "tagged":
        return _last_tagged(text) or ""
    marked = _marked(text)
    if extraction == "last_number":
        numbers = NUMBER.findall(marked.replace("\N{MINUS SIGN}", "-"))
        return numbers[-1] if numbers else ""
    if extraction == "choice":
        return chosen_letter(marked)
    return marked


def without_thoughts(completion: str) -> str:
    """Return the text behind the last thought, without a thought that does not end."""
    return completion.rpartition("</think>")[2].partition("<think>")[0]


def is_marked(completion: str) -> bool:
    """Whether the answer stands in a tag or a box, and not in the running text."""
    text = without_thoughts(completion)
    return "<answer>" in text or "\\boxed{" in text


def _marked(text: str) -> str:
    tagged = _last_tagged(text)
    if tagged is not None:
        boxed = _last_boxed(tagged)
        return tagged if boxed is None else boxed
    boxed = _last_boxed(text)
    return text.strip() if boxed is None else boxed


def _last_tagged(text: str) -> str | None:
    """Return the inside of the last answer tag, empty if it does not end, or None if there is no tag."""
    _, opening, inside = text.rpartition("<answer>")
    if not opening:
        return None
    content, closing, _ = inside.partition("</answer>")
    return content.strip() if closing else ""


def _last_boxed(text: str) -> str | None:
    """Return the inside of the last box, empty if it does not end, or None if there is no box."""
    _, marker, rest = text.rpartition("\\boxed{")
    if not marker:
        return None
    depth, escaped = 1, False
    for position, character in enumerate(rest):
        if escaped:
            escaped = False
            continue
        escaped = character == "\\"
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position].strip()
    return ""


def chosen_letter(text: str) -> str:
    """Return the letter A to J that a text settles on, or nothing: alone, behind the word answer, or the last shown.

    A text that ends on two different letters ("A or B") has chosen none.
    """
    text = text.strip().strip("$").strip()
    if match := _ONLY_LETTER.fullmatch(text):
        return match[1]
    said = list(_SAID_LETTER.finditer(text))
    if said:
        rest = text[said[-1].end() :]
        other = re.match(r"\s*(?:,|or|and|/|&)\s*\(?([A-J])\b", rest)
        letter = said[-1][1]
        return "" if not letter.isupper() or (other and other[1] != letter) else letter
    if _TWO_LETTERS.search(text):
        return ""
    shown = [first or second for first, second in _SHOWN_LETTER.findall(text)]
    return shown[-1] if shown and len(set(shown)) == 1 else ""


_SCIENTIFIC = re.compile(r"(?<![A-Za-z0-9.])([0-9]+(?:\.[0-9]+)?)[eE]([-+]?[0-9]{1,3})(?![A-Za-z0-9])")
# Signs that say what is counted, and change no number.
_CURRENCY = "$€£¥₹"


def latex_of(text: str) -> str:
    """Return an answer as LaTeX in dollars, as math-verify reads it, in the plain form of numbers.

    | written | read as |
    |---|---|
    | `½`, `−`, `×`, `π`, `√`, `∞` | `\\frac{1}{2}`, `-`, `\\times`, `\\pi`, `\\sqrt`, `\\infty` |
    | `1\\,234`, `1 234`, `1{,}234` | `1234` |
    | `1e-3`, `1.5E3` | `1 \\times 10^{-3}`, `1.5 \\times 10^{3}` |
    | `€5`, `\\$5`, `5.` | `5` |
    """
    text = unicodedata.normalize("NFC", text.strip())
    for delimiters in ((r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$")):
        inside = text[len(delimiters[0]) : len(text) - len(delimiters[1])]
        if text.startswith(delimiters[0]) and text.endswith(delimiters[1]) and inside and delimiters[0] not in inside:
            text = inside.strip()
            break
    text = re.sub(r"√\s*([0-9]+|[a-z])", r"\\sqrt{\1}", text)
    text = "".join(_SIGNS.get(character, character) for character in text)
    text = re.sub(r"(?<=[0-9])\\[,;!: ](?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"(?<=[0-9])\{,\}(?=[0-9]{3})", "", text)
    text = re.sub(r"(?<![0-9])([0-9]{1,3})((?: [0-9]{3})+)(?![0-9])", lambda m: m[1] + m[2].replace(" ", ""), text)
    text = _SCIENTIFIC.sub(r"\1 \\times 10^{\2}", text)
    text = re.sub(rf"(?:\\?[{re.escape(_CURRENCY)}])\s*(?=[-+]?[0-9.])", "", text)
    text = re.sub(rf"(?<=[0-9])\s*(?:\\?[{re.escape(_CURRENCY)}])", "", text)
    if text.endswith(".") and not text.endswith("..."):
        text = text[:-1]
    return f"${text}$"


_SIGNS = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DIVISION SIGN}": "/",
    "\N{FRACTION SLASH}": "/",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{SQUARE ROOT}": r"\sqrt ",
    "\N{INFINITY}": r"\infty ",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{NO-BREAK SPACE}": " ",
    "\N{NARROW NO-BREAK SPACE}": " ",
    "\N{THIN SPACE}": " ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{UNION}": r"\cup ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{SUPERSCRIPT THREE}": "^3",
    **{
        sign: rf"\frac{{{top}}}{{{bottom}}}"
        for sign, top, bottom in (
            ("½", 1, 2), ("⅓", 1, 3), ("⅔", 2, 3), ("¼", 1, 4), ("¾", 3, 4), ("⅕", 1, 5), ("⅖", 2, 5), ("⅗", 3, 5),
            ("⅘", 4, 5), ("⅙", 1, 6), ("⅚", 5, 6), ("⅛", 1, 8), ("⅜", 3, 8), ("⅝", 5, 8), ("⅞", 7, 8),
        )
    },
}  # fmt: skip
