# ruff: noqa: RUF001, E501  # signs of other alphabets are the subject, and rows of a table stay on one line
"""Which answers are right: a table of references with texts that equal them and texts that do not, each with its reason."""

from __future__ import annotations

import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

from fastrl.train.rewards.answers import chosen_letter, extract_answer
from fastrl.train.rewards.functions import MathVerify, format_reward, last_number_reward, tag_count_reward
from fastrl.train.rewards.tasks import Problem

# Reason -> (reference, boxed answers that are right, boxed answers that are wrong).
EXPRESSIONS: dict[str, list[tuple[str, list[str], list[str]]]] = {
    "an integer, however it is written": [
        ("42", ["42", "42.0", "42.", "+42", " 42 ", "042", r"\text{42}", r"\mathbf{42}", "84/2"], ["41", "-42", "4", "2", "424", "4 2 1"]),
        ("-3", ["-3", "−3", "-3.0", "- 3", r"-\frac{6}{2}"], ["3", "--3", "0"]),
        ("0", ["0", "0.0", "-0", "0/5"], ["1", "-1", "10"]),
        ("7", ["7", "7.00", r"\frac{14}{2}"], ["77", "0.7", "70"]),
    ],
    "thousands": [
        ("1234", ["1234", "1,234", "1{,}234", r"1\,234", "1 234", "1234.0"], ["1", "234", "12,34", "1.234"]),
        ("1,234,567", ["1234567", "1,234,567", r"1\,234\,567", "1 234 567"], ["1234", "567", "1,234"]),
        ("12345", ["12,345", "12345", r"12\,345"], ["12", "345", "1234.5"]),
    ],
    "fractions and decimals": [
        (r"\frac{1}{2}", ["1/2", "0.5", ".5", r"\frac12", r"\dfrac{1}{2}", r"\tfrac12", "½", "2/4", "0.50"], ["1", "2", "12", "-1/2", "0.05"]),
        ("1/3", [r"\frac{1}{3}", r"\frac13", "2/6", "⅓"], ["0.3", "3", "1", "0.33"]),
        ("0.75", ["3/4", "0.750", ".75", "¾", r"\frac{3}{4}"], ["75", "0.57", "7.5"]),
        (r"-\frac{2}{3}", ["-2/3", r"\frac{-2}{3}", r"-\dfrac{2}{3}", r"\frac{2}{-3}"], ["2/3", "-3/2", "-2"]),
        (r"3\frac{1}{2}", ["7/2", "3.5", r"3\frac12"], ["3/2", "3", "31/2"]),
        ("1.25", ["5/4", "1.25", "1.250"], ["125", "1.2", "1,25"]),
    ],
    "powers and scientific notation": [
        ("1024", ["2^{10}", "1024", "4^5", "1{,}024"], ["2^9", "210", "2"]),
        ("0.001", ["10^{-3}", "1e-3", r"1\times 10^{-3}", "1/1000"], ["1e3", "10^3", "-3"]),
        ("1500", ["1.5e3", r"1.5 \times 10^3", "1.5×10^3", "1500"], ["1.5", "15", "1.5e2"]),
        ("8", ["2^3", "2³", r"\sqrt{64}"], ["23", "6", "2"]),
        (r"\frac{1}{4}", ["2^{-2}", "0.25"], ["-4", "2^2"]),
    ],
    "roots and constants": [
        (r"\sqrt{17}", [r"\sqrt{17}", "√17", r"17^{1/2}", r"\sqrt {17}"], ["17", "4", r"\sqrt{16}", "1"]),
        (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}", r"2\cdot\sqrt{3}", r"2 \sqrt 3"], ["2", r"\sqrt{3}", r"3\sqrt{2}", "3"]),
        (r"1-\sqrt{2}", [r"1-\sqrt{2}", r"-\sqrt{2}+1", r"1 - \sqrt 2"], ["1", r"1-\sqrt{3}", r"1+\sqrt{2}", r"\sqrt{2}-1"]),
        (r"2\pi", [r"2\pi", "2π", r"2 \cdot \pi", r"\pi \cdot 2"], ["2", r"\pi", "6.28"]),
        (r"\frac{\pi}{2}", [r"\pi/2", r"\frac{\pi}{2}", "π/2", r"\frac{1}{2}\pi"], [r"\pi", "1/2", "2"]),
        (r"\sqrt[3]{2}", [r"\sqrt[3]{2}", r"2^{1/3}"], [r"\sqrt{2}", "2", "3"]),
        ("2", [r"\sqrt[3]{8}", r"\log_2 4", "2"], ["8", "3"]),
    ],
    "percent": [
        (r"50\%", [r"50\%", "50%", "0.5", "1/2"], ["5", "500", "0.05"]),
        ("25%", ["25%", r"25 \%", "1/4"], ["0.025", "2.5"]),
    ],
    "units and currency count nothing": [
        ("5", [r"5\text{ cm}", "5 cm", "5$", "€5", r"\$5", "5€", r"5\,\text{km}", "$5"], ["6 cm", r"50\text{ cm}", r"\text{cm}"]),
        ("90", [r"90^\circ", "90°", "90"], ["9", "9^0"]),
        ("12.50", [r"\$12.50", "12.5", "£12.50"], ["12", "1250"]),
    ],
    "formulas": [
        ("x^2+1", ["x^2+1", "1+x^2", "x^2 + 1", "x*x+1", "(x^2+1)"], ["x^2", "x+1", "x^2-1", "2", "x^3+1"]),
        ("(x-1)(x+1)", ["x^2-1", "(x+1)(x-1)"], ["x^2+1", "x-1", "1"]),
        (r"\frac{x}{2}", ["x/2", "0.5x", r"\frac{1}{2}x"], ["2x", "x", "2"]),
        ("2x", ["2x", "2*x", "x+x", r"2\cdot x"], ["x^2", "2", "x", "3x"]),
        (r"\sin(x)", [r"\sin x", r"\sin(x)", r"\sin{x}"], [r"\cos(x)", "x"]),
        ("e^x", ["e^x", "e^{x}"], ["e", "x", "e^{2x}"]),
        ("3+4i", ["3+4i", "4i+3"], ["3-4i", "7", "3", "5"]),
    ],
    "equations": [
        ("3", ["x=3", "x = 3", "3"], ["x=4", "y=-3"]),
        ("x=3", ["x=3", "3", "x = 3.0"], ["x=2", "x=-3"]),
        ("y=2x+1", ["y=2x+1", "y = 1+2x"], ["y=2x", "y=x+1"]),
    ],
    "sets and lists have no order": [
        (r"\{1331, 1728\}", [r"\{1331, 1728\}", r"\{1728,1331\}", "1331, 1728", r"\left\{1331, 1728\right\}"], ["1331", "1728", "1331, 1729", "13311728"]),
        ("1, 2, 3", ["1,2,3", "3, 2, 1", r"\{1,2,3\}", "1, 2, 3"], ["123", "1,2", "3", "1,2,4"]),
        ("3, 4", ["3,4", "4, 3", "3, 4"], ["34", "3", "4", "3.4"]),
        ("1,-1", [r"\pm 1", "-1, 1"], ["1", "-1", "0"]),
        (r"2\pm\sqrt{3}", [r"2\pm\sqrt{3}", r"2+\sqrt{3}, 2-\sqrt{3}"], [r"2+\sqrt{3}", r"2", r"\sqrt{3}"]),
    ],
    "points have an order": [
        (r"\left(3, \frac{\pi}{2}\right)", [r"(3, \frac{\pi}{2})", r"\left(3,\frac{\pi}{2}\right)", r"(3,\pi/2)"], ["3", r"(\frac{\pi}{2}, 3)", r"\frac{\pi}{2}"]),
        ("(1,2)", ["(1,2)", "(1, 2)", r"\left(1,2\right)"], ["(2,1)", "1", "12", "[1,2]"]),
        ("(1,2,3)", ["(1,2,3)", "(1, 2, 3)"], ["(3,2,1)", "(1,2)", "123"]),
    ],
    "intervals have ends": [
        ("[1,2)", ["[1,2)", r"\left[1,2\right)", "[1, 2)"], ["[1,2]", "(1,2)", "1", "[1,3)"]),
        ("[0,1]", ["[0,1]", r"\left[0, 1\right]"], ["(0,1)", "[0,1)", "[0,2]"]),
        (r"(-\infty, 2]", [r"(-\infty,2]", "(-∞,2]"], [r"(-\infty,2)", "2", r"[2,\infty)"]),
        (r"(-\infty,2]\cup[3,\infty)", [r"(-\infty,2]\cup[3,\infty)", r"(-\infty, 2] \cup [3, \infty)"], [r"(-\infty,2]", r"[3,\infty)", r"(-\infty,\infty)"]),
    ],
    "infinity": [(r"\infty", [r"\infty", "∞", r"+\infty"], [r"-\infty", "0", "8"])],
    "matrices": [
        (
            r"\begin{pmatrix}1&2\\3&4\end{pmatrix}",
            [r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}"],
            [r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "1"],
        )
    ],
    "choices are letters": [
        ("B", ["B", "(B)", "B.", r"\text{B}", r"\text{(B)}", r"\mathrm{B}", "**B**", "[B]", "B)"], ["A", "C", "D", "b", "AB", "(A)", "A or B", "B or C", "42", "A, B, C, D"]),
        ("(C)", ["C", "(C)", "C."], ["A", "(D)", "E"]),
        ("A", ["A", "(A)", r"\text{A}"], ["B", "(B)", "A or B"]),
    ],
    "huge numbers end at once": [("5", ["5"], ["9^{9^{9}}", "9^{999999999}", "99999!", "10^{10^{10}}", "(" * 500 + "5" + ")" * 500, "9" * 5000])],
}  # fmt: skip
ROWS = [
    (reason, reference, answer, verdict)
    for reason, entries in EXPRESSIONS.items()
    for reference, right, wrong in entries
    for answers, verdict in ((right, 1.0), (wrong, 0.0))
    for answer in answers
]
# What math-verify cannot do, by name: (reference, answer) -> why.
KNOWN: dict[tuple[str, str], str] = {}

# Reason -> (completion, reference, verdict of math_verify).
COMPLETIONS: dict[str, list[tuple[str, str, float]]] = {
    "the last box counts": [
        (r"\boxed{41} no, \boxed{42}", "42", 1.0),
        (r"\boxed{42} no, \boxed{41}", "42", 0.0),
        (r"\boxed{41}\boxed{42}\boxed{43}\boxed{44}", "42", 0.0),
        (r"so \boxed{ 42 } is it", "42", 1.0),
        (r"$\boxed{42}$", "42", 1.0),
        (r"\[ \boxed{\frac{1}{2}} \]", "0.5", 1.0),
        (r"\boxed{}", "42", 0.0),
        (r"42 \boxed{}", "42", 0.0),
    ],
    "a box that does not end takes the earlier one back": [
        (r"\boxed{42}. No: \boxed{4", "42", 0.0),
        (r"\boxed{42", "42", 0.0),
        (r"\boxed{\frac{1}{2}", "1/2", 0.0),
        (r"<answer>42", "42", 0.0),
        (r"<answer>42</answer> wait <answer>4", "42", 0.0),
        (r"<answer>\boxed{42</answer>", "42", 0.0),
    ],
    "a thought is no answer": [
        ("<think>Maybe 42", "42", 0.0),
        (r"<think>\boxed{42} or so", "42", 0.0),
        (r"<think>\boxed{41}</think> \boxed{42}", "42", 1.0),
        (r"<think>\boxed{42}</think> \boxed{41}", "42", 0.0),
        (r"\boxed{42}</think>", "42", 0.0),
        (r"thinking </think> \boxed{42}", "42", 1.0),
        (r"<think>a</think><think>b</think><answer>42</answer>", "42", 1.0),
        (r"<think>a</think> so <think> \boxed{42}", "42", 0.0),
        (r"<think>a <answer>42</answer> b", "42", 0.0),
        ("</think>42", "42", 1.0),
    ],
    "answer tags": [
        ("<answer>42</answer>", "42", 1.0),
        ("<answer> 42 </answer> done", "42", 1.0),
        ("<answer>\n42\n</answer>", "42", 1.0),
        (r"<answer>$\frac{1}{2}$</answer>", "0.5", 1.0),
        (r"<answer>\boxed{42}</answer>", "42", 1.0),
        ("<answer>41</answer><answer>42</answer>", "42", 1.0),
        ("<answer>42</answer><answer>41</answer>", "42", 0.0),
        ("<answer></answer> 42", "42", 0.0),
        ("42 <answer></answer>", "42", 0.0),
        (r"\boxed{41} <answer>42</answer>", "42", 1.0),
        (r"\boxed{42} <answer>41</answer>", "42", 0.0),
    ],
    "running text": [
        ("The answer is $42$.", "42", 1.0),
        ("The answer is 42.", "42", 1.0),
        ("It is 41.", "42", 0.0),
        ("", "42", 0.0),
        ("   ", "42", 0.0),
        ("no idea", "42", 0.0),
        ("42 42 42", "42", 1.0),
    ],
    "part of the reference, or more than it": [
        (r"\boxed{112}", "12", 0.0),
        (r"\boxed{1}", "12", 0.0),
        (r"\boxed{12, 13}", "12", 0.0),
        (r"\boxed{12 \text{ or } 13}", "12", 0.0),
        (r"\boxed{1, 2, 3, 4, 5, 6, 7, 8, 9}", "5", 0.0),
    ],
    "choices in running text": [
        ("The answer is (B).", "B", 1.0),
        ("The answer is B", "B", 1.0),
        ("Answer: B", "B", 1.0),
        ("**Answer:** **B**", "B", 1.0),
        ("The correct option is C.", "B", 0.0),
        ("A is wrong, C is wrong.\nSo the answer is B.", "B", 1.0),
        ("The answer is A or B.", "B", 0.0),
        ("It could be (A), (B), (C) or (D).", "B", 0.0),
        ("I choose (B)", "B", 1.0),
        ("Because I say so", "B", 0.0),
    ],
}  # fmt: skip
COMPLETION_ROWS = [(reason, *row) for reason, rows in COMPLETIONS.items() for row in rows]

# (reason, completion, the last number).
LAST_NUMBERS = [
    ("the last one", "first 3 then 4", "4"),
    ("a list", "3,4", "4"),
    ("a list of three", "1,2,3", "3"),
    ("a list with spaces", "1, 2, 3", "3"),
    ("thousands", "1,234", "1,234"),
    ("millions", "12,345,678", "12,345,678"),
    ("no thousands", "12,34", "34"),
    ("a decimal comma", "3,14", "14"),
    ("a decimal point", "3.14", "3.14"),
    ("a full stop", "it is 3.", "3"),
    ("a point first", "it is .5", ".5"),
    ("a sign", "it is -5", "-5"),
    ("a minus sign of its own", "it is −5", "-5"),
    ("a difference", "12-5", "5"),
    ("a difference with spaces", "12 - 5", "5"),
    ("a difference behind a parenthesis", "(12)-5", "5"),
    ("money", "$1,234.50", "1,234.50"),
    ("percent", "50%", "50"),
    ("a fraction", "1/2", "2"),
    ("a date", "2024-01-02", "02"),
    ("none", "none", ""),
    ("nothing", "", ""),
    ("in a box", r"7 \boxed{8} 9", "8"),
    ("in a tag", "7 <answer>is 8</answer> 9", "8"),
    ("an open box", r"7 \boxed{8", ""),
    ("a thought", "<think>7</think> 8", "8"),
    ("an open thought", "<think>7", ""),
    ("a longer number", "1234,567", "567"),
    ("digits behind letters", "x2", "2"),
]  # fmt: skip


@pytest.fixture(scope="module")
def math_verify() -> MathVerify:
    return MathVerify()


def test_the_table_is_long() -> None:
    assert len(ROWS) + len(COMPLETION_ROWS) + len(LAST_NUMBERS) >= 400
    assert len(KNOWN) < 0.02 * len(ROWS)


@pytest.mark.parametrize(
    ("reason", "reference", "answer", "verdict"), ROWS, ids=[f"{r} = {a[:40]} {v:.0f}" for _, r, a, v in ROWS]
)
def test_expressions(math_verify: MathVerify, reason: str, reference: str, answer: str, verdict: float) -> None:
    if (reference, answer) in KNOWN:
        pytest.xfail(KNOWN[reference, answer])
    assert math_verify(Problem("q", reference), rf"So \boxed{{{answer}}}.") == verdict, reason
    assert math_verify(Problem("q", reference), f"<think>.</think><answer>{answer}</answer>") == verdict, reason


@pytest.mark.parametrize(("reason", "completion", "reference", "verdict"), COMPLETION_ROWS)
def test_completions(math_verify: MathVerify, reason: str, completion: str, reference: str, verdict: float) -> None:
    assert math_verify(Problem("q", reference), completion) == verdict, reason


@pytest.mark.parametrize(("reason", "completion", "number"), LAST_NUMBERS)
def test_last_numbers(reason: str, completion: str, number: str) -> None:
    assert extract_answer(completion, "last_number") == number, reason
    reference = number.replace(",", "")
    if reference:
        assert last_number_reward(Problem("q", reference), completion) == 1.0
        assert last_number_reward(Problem("q", "98765"), completion) == 0.0


@pytest.mark.parametrize(
    ("text", "letter"),
    [("B", "B"), ("(B)", "B"), ("b", ""), ("The answer is: **D**.", "D"), ("Option C", "C"), ("A cat", ""), ("K", "")],
)
def test_letters(text: str, letter: str) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("extraction", "text", "answer"),
    [
        ("boxed", r"<answer>1</answer> \boxed{2}", "2"),
        ("boxed", "<answer>1</answer>", ""),
        ("tagged", r"<answer>1</answer> \boxed{2}", "1"),
        ("tagged", r"\boxed{2}", ""),
        ("choice", r"\boxed{C}", "C"),
        ("marked", r"\boxed{a \} b}", r"a \} b"),
    ],
)
def test_extractions(extraction, text: str, answer: str) -> None:
    assert extract_answer(text, extraction) == answer


def test_the_format_of_a_thought_that_the_template_opens() -> None:
    problem = Problem("q", "4")
    assert format_reward(problem, "so\n</think>\n<answer>4</answer>") == 1.0
    assert tag_count_reward(problem, "so\n</think>\n<answer>4</answer>") == 1.0
    assert format_reward(problem, "so\n<answer>4</answer>") == 0.0
    assert format_reward(problem, "so</think></think><answer>4</answer>") == 0.0
    assert tag_count_reward(problem, "<answer>4</answer>") == 0.5
