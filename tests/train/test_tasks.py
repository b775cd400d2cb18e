"""Tasks: determinism, a split that cannot leak, answers found in completions, and refusals."""

import pickle
import random

import numpy as np
import pytest

pytest.importorskip("reasoning_gym")

from fastrl.train.rewards.tasks import CHUNK, Problem, Task, extract_answer, load_task, task_names


def small_sums(seed: int = 0, **parameters: object) -> Task:
    return load_task("chain_sum", seed=seed, min_terms=2, max_terms=2, min_digits=1, max_digits=2, **parameters)


def test_the_stream_does_not_depend_on_how_it_is_read():
    whole = small_sums().train(CHUNK + 40)
    task = small_sums()
    task.held_out(5)
    assert task.train(30, start=CHUNK - 10) == whole[CHUNK - 10 : CHUNK + 20]
    assert [p for start in range(0, 40, 8) for p in task.train(8, start)] == whole[:40]
    assert task.held_out(3) == small_sums().held_out(20)[:3]
    assert task.train(1, start=10**9)[0].prompt  # the stream has no end


def test_the_stream_does_not_repeat_itself():
    prompts = [p.prompt for p in load_task("chain_sum", min_digits=9, max_digits=9).train(3 * CHUNK)]
    assert len(set(prompts)) == len(prompts)


def test_seeds_give_different_problems():
    streams = [{p.prompt for p in small_sums(seed).train(100)} for seed in (0, 1)]
    # Two independent draws of 100 from the 16,400 questions share some one-digit ones. Shifted copies would share all.
    assert len(streams[0] & streams[1]) < 40


@pytest.mark.parametrize("digits", [1, 2])
def test_no_held_out_question_is_ever_trained_on(digits):
    # One digit leaves 200 questions: drawn blindly, every held-out question would be trained on many times.
    options = {"min_terms": 2, "max_terms": 2, "min_digits": digits, "max_digits": digits}
    held_out = {p.prompt for p in load_task("chain_sum", seed=3, **options).held_out(12)}
    assert len(held_out) == 12
    for seed in (3, 4):  # the split is a property of the question, so it holds across seeds too
        trained = {p.prompt for p in load_task("chain_sum", seed=seed, **options).train(2000)}
        assert not trained & held_out


def test_a_question_space_without_enough_held_out_questions_is_refused():
    one_digit = load_task("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)
    with pytest.raises(ValueError, match=r"gave \d+ different held-out questions, expected 150"):
        one_digit.held_out(150)


def test_the_answer_scores_full_and_a_wrong_one_does_not():
    task = small_sums()
    for problem in task.train(20):
        assert task.score(problem, problem.answer) == 1.0
        assert task.is_correct(problem, f"<think>0</think>\n<answer> {problem.answer}\n</answer>")
        assert not task.is_correct(problem, str(int(problem.answer) + 1))
        assert not task.is_correct(problem, "")


@pytest.mark.parametrize(
    ("answer", "completion", "right"),
    [
        ("12", "12.0", True),
        ("12", " 12\n", True),
        ("1234", "1,234", True),
        ("5", "-5", False),
        ("-5", "5", False),
        ("5", "the answer is 5", False),  # part of the score only
        ("5", "<answer>4</answer> <answer>5</answer>", True),  # the last one counts
        ("5", "<answer>5</answer> no, <answer>4</answer>", False),
        ("5", "<answer>5", False),
        ("5", "\\boxed{4} then \\boxed{5}", True),
        ("5", "<think>5</think> 6", False),
        ("5", "", False),
        ("5", "5" * 100_000, False),
    ],
)
def test_scores_of_awkward_completions(answer, completion, right):
    problem = Problem("2 + 3 =", answer, {"question": "2 + 3 =", "answer": answer, "metadata": {}})
    assert small_sums().is_correct(problem, completion) is right


@pytest.mark.parametrize(
    ("text", "marked", "last"),
    [
        ("so 12 + 30 = 42.", "so 12 + 30 = 42.", "42"),
        ("<answer>a <answer>b</answer> c", "b", ""),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", "2"),
        ("\\boxed{{1}", "", ""),  # a box that does not end
        ("<answer></answer>3", "", ""),  # an empty answer
        ("it is 1,234.50!", "it is 1,234.50!", "1,234.50"),
        ("12-5", "12-5", "5"),
        ("is -5", "is -5", "-5"),
        ("\u0665", "\u0665", ""),
        ("<think>1</think><think>2</think> 3 </think> 4", "4", "4"),
    ],
)
def test_extraction(text, marked, last):
    assert extract_answer(text) == marked
    assert extract_answer(text, "last_number") == last


@pytest.mark.parametrize("extraction", ["marked", "last_number"])
@pytest.mark.parametrize("unit", ["<answer>", "</answer>", "\\boxed{", "1,", ",", "1.", "-", "</think>", "{", "\n"])
def test_extraction_of_hostile_text_is_fast(unit, extraction):
    extract_answer(unit * 100_000, extraction)  # the suite's time limit judges: quadratic code takes minutes


def test_extraction_setting_decides_the_score():
    task = small_sums(extraction="last_number")
    problem = task.train(1)[0]
    assert task.is_correct(problem, f"The answer is {problem.answer}.")
    assert task.instruction == ""
    assert small_sums().instruction == "Reply with the number only."


def test_a_task_survives_pickling():
    task = small_sums(seed=7, extraction="last_number")
    copy = pickle.loads(pickle.dumps(task))
    assert repr(copy) == repr(task)
    assert copy.train(5) == task.train(5)


def test_global_generators_are_left_alone():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    load_task("pool_matrix").train(2)  # this generator reseeds numpy's global one
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_unknown_names_list_close_ones():
    with pytest.raises(ValueError, match="unknown task 'chain_sums', did you mean chain_sum"):
        load_task("chain_sums")
    with pytest.raises(ValueError, match=r"unknown parameter 'max_term'.*did you mean .*max_terms"):
        load_task("chain_sum", max_term=2)
    with pytest.raises(ValueError, match=r"refused the parameters \{'min_terms': 0\}: min_terms must be positive"):
        load_task("chain_sum", min_terms=0)
    with pytest.raises(ValueError, match="'size' of task 'chain_sum' is set by load_task"):
        load_task("chain_sum", size=10)
    with pytest.raises(
        ValueError, match="extraction must be one of marked, boxed, tagged, last_number, choice, got 'first'"
    ):
        load_task("chain_sum", extraction="first")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="seed must be an int, got float"):
        load_task("chain_sum", seed=1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="start must be at least 0, got -1"):
        small_sums().train(1, start=-1)
    assert "chain_sum" in task_names()
