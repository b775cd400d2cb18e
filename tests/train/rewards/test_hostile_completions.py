"""Completions that attack their scorer: none runs a command, earns a reward, or changes how another is scored."""

from __future__ import annotations

import ast
import os
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

import reasoning_gym

from fastrl.train.rewards import evaluated
from fastrl.train.rewards.reward_set import RewardSet, build_rewards
from fastrl.train.rewards.tasks import Problem, Task, load_task

EVALUATING = (*evaluated.EVALUATE_PYTHON, *evaluated.EVALUATE_NUMBERS, *evaluated.EVALUATE_FORMULAS)
# MARK is a file that must not appear.
TEXTS = {
    "command": "__import__('os').system('touch MARK')",
    "command in a list": "[__import__('os').system('touch MARK')]",
    "file": "open('MARK', 'w')",
    "file as a list": "list(open('MARK', 'w'))",
    "equal to anything": "type('X', (list,), {'__eq__': lambda s, o: True})()",
    "text equal to anything": "type('X', (str,), {'__eq__': lambda s, o: True, '__hash__': str.__hash__})('')",
    "another scorer": "setattr(type(self), 'score_answer', lambda *a: 1.0) or []",
    "the answer out of the frame": "__import__('sys')._getframe(1).f_locals['entry']['answer']",
    "the answer by a name": "oracle_answer",
    "the entry": "entry['answer']",
    "exit": "__import__('os')._exit(0)",
    "exit by name": "exit()",
    "interrupt": "__import__('_thread').interrupt_main()",
    "kill": "__import__('os').kill(__import__('os').getppid(), 9)",
    "fork": "__import__('os').fork()",
    "secret": "__import__('os').environ['PLANTED_TOKEN']",
    "tower": "9**9**9**9",
    "tower in parentheses": "((9**99)**99)**99",
    "product in the exponent": "9**(99*99*99*99)",
    "huge number": "9" * 100_000,
    "loop": "[x for x in iter(int, 1)]",
    "generator": "sum(1 for _ in iter(int, 1))",
    "lambda": "(lambda f: f(f))(lambda f: f(f))",
    "deep parentheses": "(" * 3000 + "1" + ")" * 3000,
    "deep lists": "[" * 3000 + "]" * 3000,
    "memory": "[0] * 10**11",
    "attribute": "(1).__class__.__bases__[0].__subclasses__()",
    "walrus": "(x := __import__('os').system('touch MARK'))",
    "format": "'{0.__class__}'.format(1)",
    "starred": "[*open('MARK', 'w')]",
    "evaluation in an evaluation": "eval('open(\\'MARK\\', \\'w\\')')",
    "execution": "exec('open(\\'MARK\\', \\'w\\')')",
    "factorial": "factorial(10**9)",
    "sympy's own import": "sympify('__import__(\\'os\\')')",
    "symbol": "Symbol('x').func",
    "integral": "Integral(1, x)",
    "call of a number": "1(2)",
    "line break": "1\n__import__('os').system('touch MARK')",
    "comment": "1 # __import__('os')",
    "null": "1\0",
    "other digits": "٤ + ٢",
    "true": "True",
    "comparison": "1 == 1",
}


@pytest.fixture(scope="module")
def rewards() -> dict[str, tuple[Task, RewardSet]]:
    """One worker for each evaluating scorer."""
    made = {}
    for name in EVALUATING:
        task = load_task(name)
        made[name] = (task, build_rewards({"exact": 1.0}, task, timeout_s=5.0))
    return made


def test_texts_are_many() -> None:
    assert len(TEXTS) >= 40
    print(f"{len(TEXTS)} hostile completions for each of {len(EVALUATING)} scorers")


@pytest.mark.parametrize("name", EVALUATING)
def test_hostile_completions_earn_nothing_and_do_nothing(
    name: str, rewards: dict[str, tuple[Task, RewardSet]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED_TOKEN", "secret")
    task, scored = rewards[name]
    mark = tmp_path / "mark"
    (problem,) = task.train(1)
    texts = [text.replace("MARK", str(mark)) for text in TEXTS.values()]
    start = time.monotonic()
    right = f"<answer>{problem.answer}</answer>"
    batch = scored([problem] * (len(texts) + 2), [*texts, "nonsense", right])
    assert batch.total.nan_to_num(0.0).tolist() == [0.0] * (len(texts) + 1) + [1.0]
    assert not mark.exists()
    assert time.monotonic() - start < 60.0
    # In this process too, where a user may call a task.
    for text in texts:
        assert task.score(problem, text) < 1.0
    assert not mark.exists()
    assert task.is_correct(problem, right)


def test_the_evaluating_scorers_are_known_by_name() -> None:
    """Every scorer of reasoning-gym that calls eval or sympy's parser is in the list, from the sources."""
    root = Path(reasoning_gym.__file__).parent
    found = set()
    for name, (dataset, _) in reasoning_gym.factory.DATASETS.items():
        tree = ast.parse(Path(sys.modules[dataset.__module__].__file__ or "").read_text())
        assert root in Path(sys.modules[dataset.__module__].__file__ or "").parents
        for function in (x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "score_answer"):
            for call in (x for x in ast.walk(function) if isinstance(x, ast.Call)):
                called = getattr(call.func, "id", getattr(call.func, "attr", ""))
                of_answer = any(isinstance(x, ast.Name) and x.id == "answer" for x in call.args)
                if of_answer and called in ("eval", "exec", "parse_expr", "sympify", "parse_latex"):
                    found.add(name)
    assert found == set(EVALUATING)


@pytest.mark.parametrize("name", EVALUATING)
def test_every_reference_answer_reaches_its_scorer(name: str) -> None:
    task = load_task(name)
    for problem in task.train(60):
        if "Integral" not in problem.answer:
            assert evaluated.readable(name, problem.answer) == problem.answer
            assert task.is_correct(problem, f"<answer>{problem.answer}</answer>")


@pytest.mark.parametrize(
    ("text", "numbers", "formulas"),
    [
        ("3 + 4*(2 - 1)/5", True, True),
        ("2**10", True, True),
        ("9**99", True, True),
        ("9**9**9", False, False),
        ("((9**99)**99)**99", False, False),
        ("9**(9*9*9*9*9*9)", False, False),
        ("9**-(99*99*99)", False, False),
        ("x**2/2 + C", False, True),
        ("-3*z**8 + 5*z**7 - z**6 + z**5*y**4", False, True),
        ("exp(2*x)*sin(x)/3", False, True),
        ("log(3*x + 2)/3", False, True),
        ("x.y", False, False),
        ("f(x) if x else 2", False, False),
        ("x[0]", False, False),
        ("'a'", False, False),
        ("1e9999", False, False),
        ("1" * 41, False, False),
        ("0x10", False, False),
        ("(1", False, False),
        ("", True, True),
    ],
)
def test_the_texts_that_may_be_evaluated(text: str, numbers: bool, formulas: bool) -> None:
    assert (evaluated.readable("countdown", text) == text) is numbers
    assert (evaluated.readable("simple_integration", text) == text) is formulas


def test_the_scorer_of_a_confined_worker_has_no_rights(tmp_path: Path) -> None:
    """A text that got past every check would still find a process that cannot write, start or connect."""
    task = load_task("spiral_matrix")
    with RewardSet({"exact": _exact(task)}, {"exact": 1.0}) as scored:
        (worker,) = scored._workers
        assert worker is not None
        assert worker.confined
        scored([Problem("q", "a")], ["x"])
        assert worker._scorer is not None
        status = Path(f"/proc/{worker._scorer}/status").read_text()
        assert "Seccomp:\t2" in status
        assert "CapEff:\t0000000000000000" in status
        assert os.getpid() != worker._scorer


def _exact(task: Task):
    from fastrl.train.rewards.functions import Exact

    return Exact(task)
