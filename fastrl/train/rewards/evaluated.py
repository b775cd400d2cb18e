"""Scorers of reasoning-gym that evaluate an answer, and the only texts that may reach them.

Nine scorers pass a completion's answer to `eval`, or to sympy's parser, which evaluates it too. A text could then run a
command, read a secret, replace the scorer, or compute for years.

| scorers | the answer may be |
|---|---|
| `EVALUATE_PYTHON` | any text: `ast.literal_eval` stands where they call `eval` |
| `EVALUATE_NUMBERS` | numbers, + - * / ** and parentheses |
| `EVALUATE_FORMULAS` | these, variables of one letter and functions |

Powers are bounded: the constant exponents of a text, other than of a variable, multiply to at most `MOST_POWER`. Of any
other text the scorer sees `UNREADABLE`, for which it gives the score of a text that it cannot parse. `Integral` is no
function here: the derivative of an unsolved integral is the question itself. A tenth of the reference answers of
intermediate_integration are such integrals, and cannot be answered.
"""

from __future__ import annotations

import ast
import contextlib
import io
import sys
import tokenize
from collections.abc import Iterator
from unittest import mock

EVALUATE_PYTHON = ("binary_matrix", "n_queens", "spiral_matrix", "string_insertion")
EVALUATE_NUMBERS = ("countdown", "puzzle24")
EVALUATE_FORMULAS = ("intermediate_integration", "polynomial_multiplication", "simple_integration")

UNREADABLE = "?"
MOST_CHARACTERS = 2000
MOST_DIGITS = 40
MOST_POWER = 10_000
_OPERATORS = {"+", "-", "*", "/", "(", ")"}
_FUNCTIONS = {
    *("exp", "log", "ln", "sqrt", "Abs", "pi", "sin", "cos", "tan", "cot", "sec", "csc"),
    *("asin", "acos", "atan", "acot", "asec", "acsc", "sinh", "cosh", "tanh", "coth", "sech", "csch"),
    *("asinh", "acosh", "atanh", "acoth", "asech", "acsch", "erf", "erfi", "Si", "Ci", "li", "Ei"),
}  # fmt: skip


def readable(task: str, answer: str) -> str:
    """Return the answer as the scorer of `task` may see it: as it is, or `UNREADABLE`."""
    if task in EVALUATE_NUMBERS:
        return answer if _is_formula(answer, names=False) else UNREADABLE
    if task in EVALUATE_FORMULAS:
        return answer if _is_formula(answer, names=True) else UNREADABLE
    return answer


@contextlib.contextmanager
def literals_only(task: str, scorer: object) -> Iterator[None]:
    """While this is open, the scorer of `task` reads Python literals where it would evaluate Python."""
    if task not in EVALUATE_PYTHON:
        yield
        return
    module = sys.modules[type(scorer).__module__]
    with mock.patch.object(module, "eval", ast.literal_eval, create=True):
        yield


def _is_formula(text: str, *, names: bool) -> bool:
    """Whether a text holds numbers, operators and, with `names`, variables and functions, and no huge power."""
    text = text.strip()
    if len(text) > MOST_CHARACTERS or not text.isascii() or "\n" in text:
        return False
    try:
        tokens = [x for x in tokenize.generate_tokens(io.StringIO(text).readline) if x.string.strip()]
    except (tokenize.TokenError, SyntaxError):
        return False
    for token in tokens:
        if token.type == tokenize.NUMBER:
            if _size(token.string) is None:
                return False
        elif token.type == tokenize.NAME:
            if not (names and _is_name(token.string)):
                return False
        elif token.type != tokenize.OP or token.string not in {*_OPERATORS, "**"}:
            return False
    return _power([token.string for token in tokens]) <= MOST_POWER


def _is_name(name: str) -> bool:
    return name in _FUNCTIONS or (name[0].isalpha() and (len(name) == 1 or name[1:].isdigit()))


def _size(number: str) -> float | None:
    """Return a bound of a number, or None if it is too long or no plain decimal number."""
    digits = number.replace(".", "", 1)
    mantissa, _, exponent = digits.lower().partition("e")
    if not mantissa.isdigit() or len(mantissa) > MOST_DIGITS or len(exponent) > 3:
        return None
    try:
        return float(number)
    except ValueError:
        return None


def _power(tokens: list[str]) -> float:
    """Return the product of the numbers in exponents of all but variables, infinity for a power in an exponent."""
    product, place = 1.0, 0
    while place < len(tokens):
        if tokens[place] != "**":
            place += 1
            continue
        stop = _end_of_operand(tokens, place + 1)
        exponent = tokens[place + 1 : stop]
        if "**" in exponent or (stop < len(tokens) and tokens[stop] == "**"):
            return float("inf")
        of_variable = place > 0 and tokens[place - 1] not in _FUNCTIONS and tokens[place - 1][0].isalpha()
        for token in exponent if not of_variable else ():
            product *= max(2.0, _size(token) or 1.0) if token[0].isdigit() or token[0] == "." else 1.0
        place = stop
    return product


def _end_of_operand(tokens: list[str], place: int) -> int:
    """Return the place behind the operand that starts at `place`: signs, a name, a number or a parenthesis."""
    while place < len(tokens) and tokens[place] in ("+", "-"):
        place += 1
    if place < len(tokens) and tokens[place] != "(":
        place += 1  # a number, a variable, or a function whose argument follows
    if place >= len(tokens) or tokens[place] != "(":
        return place
    depth = 0
    while place < len(tokens):
        depth += (tokens[place] == "(") - (tokens[place] == ")")
        place += 1
        if depth == 0:
            break
    return place
