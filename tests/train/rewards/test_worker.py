"""Reward functions that fork, print, overflow or always fail: rewards never shift, and a dead reward stops the run."""

from __future__ import annotations

import os
import sys
import threading

import pytest

pytest.importorskip("reasoning_gym")

from fastrl.train.rewards.reward_set import DEAD_BATCHES, RewardSet
from fastrl.train.rewards.tasks import Problem
from fastrl.train.rewards.worker import call_reward

PROBLEMS = [Problem(f"q{i}", "") for i in range(4)]
TEXTS = ["a" * (i + 1) for i in range(4)]


def length(problem: Problem, completion: str) -> float:
    return float(len(completion))


def child_returns(problem: Problem, completion: str) -> float:
    os.fork()
    return float(len(completion))


def child_exits(problem: Problem, completion: str) -> float:
    if os.fork() == 0:
        sys.exit(0)
    return float(len(completion))


def child_raises(problem: Problem, completion: str) -> float:
    if os.fork() == 0:
        raise KeyboardInterrupt
    return float(len(completion))


def child_writes(problem: Problem, completion: str) -> float:
    """A process that writes to every descriptor that it has inherited, the socket of the scorer among them."""
    if os.fork() == 0:
        from fastrl.train.rewards import worker

        for descriptor in range(3, 32):
            try:
                message = worker._message(worker.VALUE, 0, b"\0" * 8)
                os.write(descriptor, len(message).to_bytes(4, "big") + message)
            except OSError:
                pass
        os._exit(0)
    os.wait()
    return float(len(completion))


def thread_prints(problem: Problem, completion: str) -> float:
    thread = threading.Thread(target=lambda: print("from a thread", flush=True))
    thread.start()
    thread.join()
    print("from the reward", flush=True)
    return float(len(completion))


def huge(problem: Problem, completion: str) -> float:
    return 1e300


def silent_error(problem: Problem, completion: str) -> float:
    class NoTextError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    raise NoTextError


def fails_on_short(problem: Problem, completion: str) -> float:
    if len(completion) < 4:
        raise ValueError("too short")
    return 1.0


def always_fails(problem: Problem, completion: str) -> float:
    raise ValueError("no judge")


@pytest.mark.parametrize("function", [child_returns, child_exits, child_raises, child_writes, thread_prints])
def test_no_other_process_answers_for_the_scorer(function, capfd: pytest.CaptureFixture[str]) -> None:
    parts = {function.__name__: function, "length": length}
    with RewardSet(parts, dict.fromkeys(parts, 1.0), timeout_s=5.0) as rewards:
        for _ in range(3):
            batch = rewards(PROBLEMS, TEXTS)
            assert batch.components["length"].tolist() == [1, 2, 3, 4]
            assert batch.components[function.__name__].tolist() == [1, 2, 3, 4]
            assert batch.failures == 0
    assert capfd.readouterr().out == ""  # the caller's output is its own


def test_a_fork_in_this_process_does_not_go_on() -> None:
    """Without a worker the child would go on training."""
    before = os.getpid()
    assert call_reward(child_returns, PROBLEMS[0], "aa") == (2.0, None)
    assert call_reward(child_exits, PROBLEMS[0], "aa") == (2.0, None)
    assert os.getpid() == before
    for _ in range(2):
        assert os.waitstatus_to_exitcode(os.wait()[1]) == 0


def test_a_number_beyond_float32_is_a_failure() -> None:
    with RewardSet({"huge": huge}, {"huge": 1.0}, timeout_s=None) as rewards:
        batch = rewards(PROBLEMS, TEXTS)
    assert batch.failures == 4
    assert batch.reasons == ("huge returned 1e+300, expected a number within float32, at most 3.403e+38",)


def test_an_exception_that_cannot_describe_itself_is_a_failure() -> None:
    assert call_reward(silent_error, PROBLEMS[0], "a").failure == "raised NoTextError: (no text)"


@pytest.mark.parametrize("timeout_s", [None, 5.0])
def test_a_reward_that_always_fails_stops_the_run(timeout_s: float | None) -> None:
    with RewardSet(
        {"judge": always_fails, "length": length}, {"judge": 1.0, "length": 1.0}, timeout_s=timeout_s
    ) as dead:
        for _ in range(DEAD_BATCHES - 1):
            assert dead(PROBLEMS, TEXTS).failures == 4
        with pytest.raises(
            RuntimeError, match=r"reward 'judge' failed on every completion of 5 .* ValueError: no judge"
        ):
            dead(PROBLEMS, TEXTS)


def test_a_reward_that_fails_on_some_goes_on() -> None:
    with RewardSet({"some": fails_on_short}, {"some": 1.0}, timeout_s=None) as rewards:
        for _ in range(DEAD_BATCHES + 2):
            assert rewards(PROBLEMS, TEXTS).failures == 3
