"""The reward of programs: right and wrong ones, and ones that attack the machine or the judge."""

from __future__ import annotations

import os
import platform
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym")

from fastrl.train.rewards.code import CodeTests, extract_program
from fastrl.train.rewards.reward_set import build_rewards
from fastrl.train.rewards.tasks import Problem, load_task

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and platform.machine() == "x86_64"), reason="the confinement is for Linux on x86_64"
)

DOUBLE = Problem(
    "Print twice the number.", "", {"tests": [{"input": "2", "output": "4"}, {"input": "5", "output": "10"}]}
)


def block(program: str) -> str:
    return f"Here:\n```python\n{program}\n```\n"


@pytest.fixture(scope="module")
def tests() -> CodeTests:
    return CodeTests(timeout_s=3.0, memory_mb=128, output_kb=16)


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        (block("a = 1"), "a = 1\n"),
        ("```\na\n```", "a\n"),
        (block("a") + block("b"), "b\n"),
        ("<think>" + block("a") + "</think> none", None),
        (block("a") + "<think></think>" + block("b"), "b\n"),
        ("```python\nnever closed", None),
        ("```js\na\n```", None),
        ("print(4)", None),
        ("", None),
        ("```text\n3 4\n```\nso\n```python\na\n```", "a\n"),
        ("```bash\nx\n```\n" + block("a"), "a\n"),
        (block("a") + "prints\n```\n7\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("~~~\na\n```\n~~~", "a\n```\n"),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("```Python3 title=x\na\n```", "a\n"),
        ("```{.python}\na\n```", "a\n"),
        ("```py\na\n```", "a\n"),
        ("1. So:\n   ```python\n   if a:\n       b\n   ```", "if a:\n    b\n"),
        ("- ```python\n  a\n  ```", "a\n"),
        ("> ```python\n> if a:\n>     b\n> ```", "if a:\n    b\n"),
        ("<answer>```python\na\n```</answer>", "a\n"),
        ("<answer>\n```python\na\n```\n</answer>", "a\n"),
        ("```python\r\na\r\n```\r\n", "a\n"),
        (block("a") + "```python\nnever closed", "a\n"),
        ("```python\n```", ""),
        ("```" * 30_000, None),
    ],
)
def test_the_program_of_a_completion(completion: str, program: str | None) -> None:
    assert extract_program(completion) == program


@pytest.mark.parametrize(
    ("program", "reward", "partial"),
    [
        ("print(2 * int(input()))", 1.0, 1.0),
        ("import math, sys\nprint(math.prod([2, int(sys.stdin.read())]), ' ')\nprint()", 1.0, 1.0),
        ("print(4)", 0.0, 0.5),
        ("print(2 * int(input()))\nraise SystemExit(1)", 0.0, 0.0),
        ("import os\nos._exit(0)", 0.0, 0.0),
        ("syntax error", 0.0, 0.0),
        ("print('\\ud800')", 0.0, 0.0),
        ("", 0.0, 0.0),
        ("print(2 * int(input()))\nexit()", 1.0, 1.0),
        ("print(2 * int(input()))\nquit(0)", 1.0, 1.0),
        ("print(2 * int(input()))\nexit('why')", 0.0, 0.0),
        ("print(2 * int(open(0).read()))", 1.0, 1.0),
        ("print(2 * int(open('/dev/stdin').read()))", 1.0, 1.0),
        ("def main():\n    print(2 * int(input()))\nif __name__ == '__main__':\n    main()", 1.0, 1.0),
        ("\ufeffprint(2 * int(input()))", 1.0, 1.0),
        ("n = int(input())\r\nprint(2 * n)\r", 1.0, 1.0),
        (
            "from __future__ import annotations\nimport dataclasses, pickle, typing\n@dataclasses.dataclass\n"
            "class N:\n    x: int\nassert typing.get_type_hints(N) == {'x': int}\n"
            "print(2 * pickle.loads(pickle.dumps(N(int(input())))).x)",
            1.0,
            1.0,
        ),
        ("from concurrent.futures import ThreadPoolExecutor as P\nprint(*P(2).map(int, [2 * int(input())]))", 1.0, 1.0),
        (
            "import asyncio\nasync def f():\n    await asyncio.sleep(0)\n    print(2 * int(input()))\nasyncio.run(f())",
            1.0,
            1.0,
        ),
        (
            "import sys\nsys.setrecursionlimit(10**5)\nf = lambda n: n and 1 + f(n - 1)\n"
            "print(2 * int(input()) + f(9000) - 9000)",
            1.0,
            1.0,
        ),
    ],
)
def test_tests_that_pass(tests: CodeTests, program: str, reward: float, partial: float) -> None:
    assert tests(DOUBLE, block(program)) == reward
    assert CodeTests(partial=True)(DOUBLE, block(program)) == partial


# Each of these prints the expected output after its attack, so a reward of 0 shows that the attack ended the program.
ATTACKS = {
    "fork": "import os\nif os.fork() == 0:\n    os._exit(0)",
    "fork bomb": "import os\nwhile True:\n    os.fork()",
    "program": "import subprocess\nsubprocess.run(['true'])",
    "exec": "import os\nos.execv('/bin/echo', ['echo', str(2 * n)])",
    "memory": "x = bytearray(10**9)",
    "flood": "print('x' * 10**6)",
    "socket": "import socket\nsocket.create_connection(('127.0.0.1', PORT), timeout=1)",
    "read": "open('FOLDER/there').read()",
    "write": "open('FOLDER/new', 'w')",
    "truncate": "open('FOLDER/there', 'w')",
    "append": "open('FOLDER/there', 'a')",
    "low-level write": "import os\nos.open('FOLDER/there', os.O_RDWR)",
    "remove": "import os\nos.remove('FOLDER/there')",
    "rename": "import os\nos.rename('FOLDER/there', 'FOLDER/new')",
    "mode": "import os\nos.chmod('FOLDER/there', 0)",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "raise the limits": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\nf = lambda: f()\nf()",
}


def children() -> set[str]:
    """Return the processes that this one has started and not waited for."""
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_fail_and_leave_nothing(tests: CodeTests, tmp_path: Path, name: str) -> None:
    before = children()  # other tests of this process may have left some
    (tmp_path / "there").write_text("kept")
    mode = (tmp_path / "there").stat().st_mode
    with socket.create_server(("127.0.0.1", 0)) as server:
        attack = ATTACKS[name].replace("FOLDER", str(tmp_path)).replace("PORT", str(server.getsockname()[1]))
        assert tests(DOUBLE, block(f"n = int(input())\n{attack}\nprint(2 * n)")) == 0.0
    assert [(path.name, path.read_text(), path.stat().st_mode) for path in tmp_path.iterdir()] == [
        ("there", "kept", mode)
    ]
    assert children() <= before  # every child was waited for


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(99)", "9**9**9"])
def test_what_takes_too_long_ends(program: str) -> None:
    quick = CodeTests(timeout_s=0.5)
    start = time.monotonic()
    assert quick(DOUBLE, block(program)) == 0.0
    assert time.monotonic() - start < 10.0


def test_through_the_worker_and_by_name() -> None:
    # The filter is the child's alone: this process still starts threads and files.
    with build_rewards({"code_tests(partial=True, timeout_s=2)": 1.0}, load_task("chain_sum")) as rewards:
        batch = rewards([DOUBLE, DOUBLE, Problem("?", "")], [block("print(4)"), "no program", block("print(4)")])
    assert batch.total[:2].tolist() == [0.5, 0.0]
    assert batch.total[2].isnan()
    assert batch.failures == 1
    threading.Thread(target=lambda: None).start()


def test_settings() -> None:
    with pytest.raises(ValueError, match="timeout_s must be finite and greater than 0, got 0"):
        CodeTests(timeout_s=0)
