"""Rewards: formulas, awkward texts, weights, and functions that raise, hang, crash or answer nonsense."""

import math
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("reasoning_gym")
pytest.importorskip("math_verify")

from fastrl.train.rewards.functions import (
    LanguageConsistency,
    MathVerify,
    Repetition,
    cosine_length_reward,
    format_reward,
    kimi_length_reward,
    last_number_reward,
    number_only_reward,
    overlong_reward,
    tag_count_reward,
)
from fastrl.train.rewards.reward_set import RewardSet, build_rewards, reward_names
from fastrl.train.rewards.tasks import Problem, load_task

QUESTION = Problem("6 * 7 =", "42")
HOSTILE = ["", " ", "x" * 100_000, "<think>" * 20_000, "</answer><answer>" * 5_000, "(" * 50_000, "\0", "\ud800", "٤٢"]


def length_in_tens(problem: Problem, completion: str) -> float:
    return len(completion) / 10


def misbehave(problem: Problem, completion: str):
    """Misbehave as the completion says."""
    match completion:
        case "raise":
            raise RuntimeError("grader down")
        case "exit":
            sys.exit(3)
        case "crash":
            os._exit(3)
        case "leave quietly":
            os._exit(0)
        case "hang":
            while True:
                pass
        case "hang in C":
            return len(str(9**9**9))
        case "swallow":
            while True:
                try:
                    time.sleep(60)
                except BaseException:
                    continue
        case "none":
            return None
        case "text":
            return "1.0"
        case "list":
            return [1.0]
        case "nan":
            return math.nan
        case "inf":
            return -math.inf
        case "tensor":
            return torch.tensor(2.0)
        case "bool":
            return True
        case "interrupt":
            raise KeyboardInterrupt
    return 1.0


class Unloadable:
    def __call__(self, problem: Problem, completion: str) -> float:
        return 0.0

    def __reduce__(self):
        return int, ("not a number",)


@pytest.fixture(scope="module")
def task():
    return load_task("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=2)


@pytest.fixture(scope="module")
def guarded():
    """One worker with a short limit for all tests of misbehaviour: a new one takes seconds."""
    with RewardSet(
        {"misbehave": misbehave, "tens": length_in_tens}, {"misbehave": 1.0, "tens": 0.5}, None, 0.5
    ) as set_:
        set_([QUESTION], ["fine"])
        yield set_


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        ("raise", "misbehave raised RuntimeError: grader down"),
        ("exit", "misbehave raised SystemExit: 3"),
        ("crash", "misbehave ended the process that it ran in"),
        ("leave quietly", "misbehave ended the process that it ran in"),
        ("hang", r"misbehave took more than 0\.5 s"),
        ("hang in C", r"misbehave took more than 0\.5 s"),
        ("swallow", r"misbehave took more than 0\.5 s"),
        ("none", "misbehave returned None"),
        ("text", "misbehave returned str, expected a number"),
        ("list", "misbehave returned list, expected a number"),
        ("nan", "misbehave returned nan, expected a finite number"),
        ("inf", "misbehave returned -inf, expected a finite number"),
    ],
)
def test_a_failing_call_is_nan_and_counted_and_the_others_stand(guarded, completion, reason):
    completions = ["good", completion, "tensor", "bool"]
    start = time.perf_counter()
    batch = guarded([QUESTION] * 4, completions)
    assert time.perf_counter() - start < 20
    assert batch.failures == 1
    assert len(batch.reasons) == 1
    assert re.fullmatch(reason, batch.reasons[0]), batch.reasons
    values = batch.components["misbehave"]
    assert values.isnan().tolist() == [False, True, False, False]
    assert values[[0, 2, 3]].tolist() == [1.0, 2.0, 1.0]
    tens = torch.tensor([len(text) / 10 for text in completions])
    torch.testing.assert_close(batch.components["tens"], tens)
    torch.testing.assert_close(batch.total, values + 0.5 * tens, equal_nan=True)


def test_several_hangs_in_one_batch(guarded):
    batch = guarded([QUESTION] * 5, ["hang", "good", "crash", "hang", "good"])
    assert batch.components["misbehave"].isnan().tolist() == [True, False, True, True, False]
    assert batch.failures == 3


def test_a_hang_is_ended_outside_the_main_thread_too(guarded):
    result = []
    thread = threading.Thread(target=lambda: result.append(guarded([QUESTION] * 2, ["hang", "good"])))
    thread.start()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert result[0].failures == 1


def test_keyboard_interrupt_passes_and_the_next_batch_is_right(guarded):
    with pytest.raises(KeyboardInterrupt):
        guarded([QUESTION] * 3, ["good", "interrupt", "good"])
    assert guarded([QUESTION] * 2, ["tensor", "good"]).components["misbehave"].tolist() == [2.0, 1.0]


def test_in_this_process_without_a_limit():
    with RewardSet({"f": lambda p, c: misbehave(p, c)}, {"f": 2.0}, timeout_s=None) as rewards:  # a lambda is fine here
        batch = rewards([QUESTION] * 4, ["good", "raise", "none", "exit"])
        assert batch.total.isnan().tolist() == [False, True, True, True]
        assert batch.failures == 3
        with pytest.raises(KeyboardInterrupt):
            rewards([QUESTION], ["interrupt"])


def test_the_worker_ends_with_the_process_that_started_it(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys, signal\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from fastrl.train.rewards.worker import RewardWorker\n"
        "from test_rewards import misbehave, QUESTION\n"
        "worker = RewardWorker([misbehave], 600.0)\n"
        "worker.evaluate([QUESTION], ['good'], 1)\n"
        "print(worker._process.pid, worker._scorer, flush=True)\n"
        "worker.evaluate([QUESTION], ['hang'], 1)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        process.kill()
    deadline = time.monotonic() + 20
    while any(_alive(pid) for pid in workers):
        assert time.monotonic() < deadline, f"still there: {[pid for pid in workers if _alive(pid)]}"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_functions_that_cannot_be_sent_are_refused():
    with pytest.raises(TypeError, match=r"lambda.* cannot be sent to the reward worker"):
        RewardSet({"f": lambda p, c: 1.0}, {"f": 1.0})
    with RewardSet({"f": Unloadable()}, {"f": 1.0}) as rewards, pytest.raises(RuntimeError, match="could not load"):
        rewards([QUESTION], ["x"])


def test_a_batch_of_simple_scores_takes_milliseconds(task):
    problems = [problem for problem in task.train(16) for _ in range(8)]
    completions = [problem.answer for problem in problems]
    with build_rewards({"accuracy": 1.0, "number_only": 0.1}, task) as rewards:
        rewards(problems, completions)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            batch = rewards(problems, completions)
            times.append(time.perf_counter() - start)
    assert batch.failures == 0
    torch.testing.assert_close(batch.total, torch.full((128,), 1.1))
    assert min(times) < 0.1  # 3 to 8 ms on a quiet machine, but a process per call would take seconds


def test_weights_and_components(task):
    problem = task.train(1)[0]
    with build_rewards({"exact": 1.0, "number_only": 0.25, "tag_count": 0.0}, task, timeout_s=None) as rewards:
        batch = rewards([problem] * 3, [problem.answer, "no idea", "<think></think>7"])
    assert batch.total.tolist() == [1.25, 0.0, 0.0]
    assert batch.components["tag_count"].tolist() == [0.0, 0.0, 0.5]
    assert list(batch.components) == ["exact", "number_only", "tag_count"]


def test_a_nan_without_weight_does_not_reach_the_total():
    rewards = RewardSet({"f": misbehave, "g": length_in_tens}, {"f": 0.0, "g": 1.0}, timeout_s=None)
    batch = rewards([QUESTION], ["none"])
    assert batch.total.tolist() == pytest.approx([0.4])
    assert batch.failures == 1


def test_empty_batch(task):
    with build_rewards({"exact": 1.0, "kimi_length": 1.0}, task, timeout_s=None) as rewards:
        assert rewards([], [], []).total.shape == (0,)


@pytest.mark.parametrize(
    "name", ["format", "tag_count", "number_only", "last_number", "repetition", "language_consistency"]
)
def test_hostile_texts_give_finite_rewards_in_bounded_time(task, name):
    with build_rewards({name: 1.0}, task, timeout_s=None) as rewards:
        batch = rewards([QUESTION] * len(HOSTILE), HOSTILE)
    assert batch.failures == 0
    assert bool(batch.total.isfinite().all())


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        (" <think>\na\n</think>\n\n<answer>b</answer>\n", 1.0),
        ("<think></think> <answer></answer>", 1.0),
        ("<think>a</think>x<answer>b</answer>", 0.0),
        ("x<think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>x", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</think></answer>", 0.0),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.0),
        ("<think>a</think><answer><answer>b</answer></answer>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<THINK>a</THINK><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format(text, value):
    assert format_reward(QUESTION, text) == value


def test_tag_count():
    assert tag_count_reward(QUESTION, "<think>a</think><answer>b</answer>") == 1.0
    assert tag_count_reward(QUESTION, "<think>a<think></think>") == 0.25


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((number, 1.0) for number in ("5", "-5", "+5", " 5\n", "1,234", "12.0", "1,234,567.89", "007")),
        *(
            (other, 0.0)
            for other in (
                "",
                "5.",
                ".5",
                "1,23",
                "12,3456",
                "5 6",
                "5 apples",
                "\u0665",
                "\uff15",
                "--5",
                "1e5",
                "5\n6",
            )
        ),
    ],
)
def test_number_only(text, value):
    assert number_only_reward(QUESTION, text) == value


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("42", "12 + 30 = 42.", 1.0),
        ("42", "42 or 43", 0.0),
        ("42", "42.0", 1.0),
        ("5", "-5", 0.0),
        ("-5", "it is -5", 1.0),
        ("1234", "1,234", 1.0),
        ("42", "no number", 0.0),
        ("42", "9" * 100_000, 0.0),
        ("42", "٤٢", 0.0),
        ("yes", "42", None),
        ("12345678901234567891", "12345678901234567892", 0.0),  # equal as floats
    ],
)
def test_last_number(answer, text, value):
    assert last_number_reward(Problem("?", answer), text) == value


@pytest.mark.parametrize(
    ("answer", "text", "value"),
    [
        ("42", "42", 1.0),
        ("42", "The answer is $42$.", 1.0),
        ("42", "42.0", 1.0),
        ("42", "-42", 0.0),
        ("1/2", "\\boxed{\\frac{1}{2}}", 1.0),
        ("42", "<think>42</think> 41", 0.0),
        ("42", "", 0.0),
        ("", "42", None),
    ],
)
def test_math_verify(answer, text, value):
    assert MathVerify()(Problem("?", answer), text) == value


def test_math_verify_that_hangs_is_ended(task):
    # sympy computes the tower in one call into C: no alarm of the library's own would end it.
    with build_rewards({"math_verify": 1.0}, task, timeout_s=1.0) as rewards:
        batch = rewards([QUESTION] * 3, ["42", "9**9**9", "41"])
    assert batch.failures == 1
    assert batch.total.isnan().tolist() == [False, True, False]
    assert batch.total[[0, 2]].tolist() == [1.0, 0.0]


def test_repetition():
    assert Repetition(2)(QUESTION, "a b a b a b") == pytest.approx(2 / 5 - 1)  # ab ba ab ba ab: two of five differ
    assert Repetition(2)(QUESTION, "a b c") == 0.0
    assert Repetition(3)(QUESTION, "a b") == 0.0
    assert Repetition(1)(QUESTION, "A a a a") == -0.75
    with pytest.raises(ValueError, match="ngram of the repetition reward must be at least 1, got 0"):
        Repetition(0)


def test_language_consistency():
    latin = LanguageConsistency()
    assert latin(QUESTION, "two plus 2 is four !") == 1.0
    assert latin(QUESTION, "two плюс two мы") == 0.5
    assert latin(QUESTION, "mix\u0435dword") == 0.0
    assert latin(QUESTION, "42 + 1") == 0.0
    assert LanguageConsistency("cjk")(QUESTION, "答案 是 four") == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match=r"script must be one of .*LATIN.*, got 'ENGLISH'"):
        LanguageConsistency("ENGLISH")


def test_kimi_length_against_the_formula():
    lengths, correct = torch.tensor([10, 20, 30, 7, 7, 50, 90]), torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, math.nan])
    group = torch.tensor([4, 4, 4, 1, 1, 9, 9])
    value = kimi_length_reward(lengths, correct, group)
    expected = torch.tensor([0.5, 0.0, -0.5, 0.0, 0.0, 0.0, math.nan])  # 50 of (50, 90): 0.5, but wrong, so 0
    torch.testing.assert_close(value, expected, equal_nan=True)


def test_cosine_length_against_the_formula():
    lengths, correct = torch.tensor([0, 50, 99, 100, 0, 50, 150, 10]), torch.tensor([1, 1, 1, 1, 0, 0, 0, math.nan])
    value = cosine_length_reward(lengths, correct, max_length=100)
    near = 1 + 0.5 * (1 + math.cos(math.pi * 0.99))
    expected = torch.tensor([2.0, 1.5, near, -10.0, -10.0, -5.0, -10.0, math.nan])
    torch.testing.assert_close(value, expected, equal_nan=True)


def test_overlong_against_the_formula():
    value = overlong_reward(torch.tensor([0, 80, 81, 90, 100, 101]), max_length=100, cache=20)
    torch.testing.assert_close(value, torch.tensor([0.0, 0.0, -0.05, -0.5, -1.0, -1.0]))


def test_length_rewards_by_name(task):
    problems = task.train(2)
    batch_problems = [problems[0], problems[0], problems[1]]
    completions = [problems[0].answer, "wrong", problems[1].answer]
    names = {
        "kimi_length": 1.0,
        "overlong(max_length=10, cache=5)": 2.0,
        "cosine_length(max_length=20, exceeded=-3)": 0.5,
    }
    with build_rewards(names, task, timeout_s=None) as rewards:
        batch = rewards(batch_problems, completions, torch.tensor([4, 8, 20]))
        with pytest.raises(ValueError, match=r"kimi_length.* need lengths, the 3 token counts, got none"):
            rewards(batch_problems, completions)
    assert list(batch.components) == list(names)
    kimi, overlong, cosine = batch.components.values()
    assert kimi.tolist() == [0.5, -0.5, 0.0]
    assert overlong.tolist() == pytest.approx([0.0, -0.6, -1.0])
    assert cosine.tolist()[2] == -3.0
    torch.testing.assert_close(batch.total, kimi + 2 * overlong + 0.5 * cosine)


def test_a_function_of_the_users_own_by_name(task):
    with build_rewards({"tests.train.test_rewards:length_in_tens": 1.0}, task, timeout_s=None) as rewards:
        assert rewards([QUESTION], ["12345"]).total.tolist() == [0.5]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({}, "at least one reward"),
        ({"acuracy": 1.0}, r"unknown reward 'acuracy', did you mean accuracy; expected one of accuracy, exact"),
        ({"overlong": 1.0}, r"missing a required argument: 'max_length'; expected overlong\(max_length, cache\)"),
        ({"overlong(max_length=1, cash=1)": 1.0}, r"expected overlong\(max_length, cache\)"),
        ({"overlong(max_length=4, cache=9)": 1.0}, "cache of the overlong reward must be at most max_length 4, got 9"),
        ({"overlong(max_length=-4, cache=9)": 1.0}, "max_length must be greater than 0, got -4"),
        ({"overlong(max_length=4.5, cache=2)": 1.0}, "max_length of the overlong reward must be an int"),
        ({"repetition(open('x'))": 1.0}, "must be written name or name"),
        ({"format": math.nan}, "weight of reward 'format' must be a finite number, got nan"),
        ({"format": "1"}, "weight of reward 'format' must be a finite number, got '1'"),
        ({"no_such_module:f": 1.0}, "'no_such_module:f' cannot be imported"),
        ({"tests.train.test_rewards:nothing": 1.0}, "'tests.train.test_rewards:nothing' cannot be imported"),
        ({"tests.train.test_rewards:QUESTION": 1.0}, "must be a function, got Problem"),
    ],
)
def test_refusals(task, names, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(names, task, timeout_s=None)


def test_refusals_of_calls(task):
    rewards = build_rewards({"format": 1.0}, task, timeout_s=None)
    with pytest.raises(ValueError, match=r"completions must be as many as problems \(1\), got 2"):
        rewards([QUESTION], ["a", "b"])
    with pytest.raises(TypeError, match="completions must be str, got NoneType"):
        rewards([QUESTION], [None])  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="timeout_s must be None or finite and greater than 0, got 0"):
        build_rewards({"format": 1.0}, task, timeout_s=0)
    with pytest.raises(ValueError, match=r"rewards of lengths \(k\) need a task"):
        RewardSet({"k": build_rewards({"kimi_length": 1.0}, task, None)._length_rewards["kimi_length"]}, {"k": 1.0})


def test_names_show_their_parameters():
    names = reward_names()
    assert "accuracy" in names
    assert "overlong(max_length, cache)" in names
    assert "repetition(ngram)" in names
