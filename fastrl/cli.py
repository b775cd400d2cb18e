"""The `fastrl` command.

    fastrl train ALGORITHM [--config FILE.yaml] [--FIELD VALUE ...]
    fastrl pairs|constitutional-pairs [--config FILE.yaml] [--FIELD VALUE ...]
    fastrl report RUN_DIR [--record DIR]
    fastrl losses [NAME]
    fastrl doctor [--json]
    fastrl verify [--device cpu|cuda|...] [--backend NAME|all] [--seed N] [--quick] [--json]
    fastrl bench cpu|gpu|table|plot ...

| exit code | meaning |
|---|---|
| 0 | success |
| 1 | the work or a check failed, or settings do not fit the model, the data or each other |
| 2 | the command line or a field of the configuration is wrong |
| 130 | interrupted (Ctrl-C) |
| 143 | terminated (SIGTERM) |

A run that is interrupted or terminated goes on from its last checkpoint with --resume.

An error is one line. With the environment variable FASTRL_DEBUG set, it comes with its traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fastrl

OK, FAILURE, USAGE, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143

# Loop -> the class of its settings, and the function that trains.
ALGORITHMS = {
    "grpo": ("fastrl.train.config:GRPOConfig", "fastrl.train.grpo:run_grpo"),
    "ppo": ("fastrl.train.config:PPOConfig", "fastrl.train.ppo:run_ppo"),
    "sft": ("fastrl.train.config:SFTConfig", "fastrl.train.sft:run_sft"),
    "rft": ("fastrl.train.config:RFTConfig", "fastrl.train.rft:run_rft"),
    "online-rft": ("fastrl.train.config:OnlineRFTConfig", "fastrl.train.rft:run_rft"),
    "reward-model": ("fastrl.train.config:RewardModelConfig", "fastrl.train.reward_model:run_reward_model"),
    "dpo": ("fastrl.train.config:DPOConfig", "fastrl.train.dpo:run_dpo"),
    "online-dpo": ("fastrl.train.config:OnlineDPOConfig", "fastrl.train.online_dpo:run_online_dpo"),
}
# Maker of data -> the class of its settings, and the function that writes a file and returns its path.
MAKERS = {
    "pairs": ("fastrl.train.config:PairsConfig", "fastrl.train.pairs:make_pairs"),
    "constitutional-pairs": (
        "fastrl.train.config:ConstitutionalConfig",
        "fastrl.train.constitutional:make_constitutional_pairs",
    ),
}
# Packages of the extra `train` that a loop imports.
TRAIN_NEEDS = ("tyro", "yaml", "rich", "transformers", "accelerate", "safetensors", "reasoning_gym", "matplotlib")


class UsageError(Exception):
    """The command line or the configuration is wrong."""


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived: the parts of a run that close on Ctrl-C close on it too."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _terminable():
            return _dispatch(arguments)
    except Terminated:
        print("fastrl: terminated", file=sys.stderr)
        return TERMINATED
    except BrokenPipeError:  # `fastrl losses | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print("fastrl: interrupted", file=sys.stderr)
        return INTERRUPTED
    except SystemExit as stop:  # how argparse and tyro end
        return stop.code if isinstance(stop.code, int) else OK if stop.code is None else FAILURE
    except (UsageError, ValueError, ImportError, OSError) as error:
        if os.environ.get("FASTRL_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"fastrl: error: {message}", file=sys.stderr)
        return USAGE if isinstance(error, UsageError) else FAILURE
    except Exception as error:  # of a library, or a mistake of ours
        if os.environ.get("FASTRL_DEBUG"):
            raise
        message = " ".join(str(error).split())[:500]
        print(f"fastrl: error: {type(error).__name__}: {message} (FASTRL_DEBUG=1 shows where)", file=sys.stderr)
        return FAILURE


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """While this is open, SIGTERM ends the command as Ctrl-C does, in the main thread."""

    def end(number: int, frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _dispatch(arguments: list[str]) -> int:
    # tyro reads the options of a loop, which are the fields of a dataclass. It is not always installed, so argparse
    # reads all other commands.
    if arguments[:1] == ["train"] and arguments[1:2] and arguments[1] in ALGORITHMS:
        return _train(arguments[1], arguments[2:])
    if arguments[:1] and arguments[0] in MAKERS:
        return _make(arguments[0], arguments[1:])
    # The benchmark, a program of the checkout, reads its own options.
    if arguments[:1] == ["bench"]:
        return _bench(arguments[1:])
    options = _parser().parse_args(arguments)
    match options.command:
        case "report":
            return _report(options.run_dir, options.record)
        case "losses":
            return _losses(options.name)
        case "doctor":
            return _doctor(options.json)
        case "verify":
            return _verify(options)
        case _:
            raise UsageError(
                f"train expects an algorithm first, one of {', '.join(ALGORITHMS)}: "
                "fastrl train ALGORITHM [--config FILE.yaml] [--FIELD VALUE ...]"
            )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrl", description="RL post-training of language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastrl {fastrl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        help="train a model (`fastrl train grpo --help` lists the settings)",
        epilog="Then the settings: --config FILE.yaml, --FIELD VALUE; `fastrl train grpo --help` lists those of grpo.",
    )
    train.add_argument("algorithm", choices=list(ALGORITHMS), help="the training loop")
    commands.add_parser("pairs", help="sample preferences from a model (`fastrl pairs --help` lists the settings)")
    commands.add_parser(
        "constitutional-pairs", help="let a model criticise and revise its answers; preferences of both"
    )
    report = commands.add_parser("report", help="write report.html and curves.png of a run")
    report.add_argument("run_dir", help="the directory of the run")
    report.add_argument("--record", metavar="DIR", help="also keep its settings, numbers and curves, without the model")
    losses = commands.add_parser("losses", help="list the losses with their formulas, or describe one")
    losses.add_argument("name", nargs="?", help="a preset or a function: its formula, source, fields and trainers")
    doctor = commands.add_parser("doctor", help="show versions, devices, compilers and backends")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    verify = commands.add_parser("verify", help="check every operation on every backend of this machine")
    verify.add_argument("--device", help="cpu, cuda, cuda:1, xpu, ...; all that are here unless given")
    verify.add_argument(
        "--backend",
        default="all",
        metavar="NAME",
        help="torch, cpu, triton (on a CPU through its interpreter, slowly), cuda, or all (the default)",
    )
    verify.add_argument("--seed", type=int, default=0, help="of the inputs (default 0)")
    verify.add_argument("--quick", action="store_true", help="fewer vocabularies and presets")
    verify.add_argument("--json", action="store_true", help="print JSON")
    commands.add_parser("bench", help="time and memory beside the peers (in a checkout): cpu, gpu, table, plot")
    return parser


def _losses(name: str | None) -> int:
    from fastrl.losses import catalogue

    width = shutil.get_terminal_size().columns
    if name is None:
        print(catalogue.table(width))
        print("\nfastrl losses NAME describes one of them.")
        return OK
    try:
        print(catalogue.wrapped(catalogue.describe(name), width))
    except ValueError as error:
        raise UsageError(str(error)) from error
    return OK


def _doctor(as_json: bool) -> int:
    from fastrl.doctor import diagnose, render

    findings = diagnose()
    print(json.dumps(findings, indent=2) if as_json else render(findings))
    return OK


def _verify(options: argparse.Namespace) -> int:
    if options.backend == "triton" and options.device is not None and options.device.partition(":")[0] == "cpu":
        # Only the interpreter runs Triton on a CPU. Triton reads this variable when the kernels are first imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    from fastrl import verify

    if options.backend != "all" and options.backend not in verify.BACKENDS:
        raise UsageError(f"--backend must be all, {', '.join(verify.BACKENDS)}, got {options.backend!r}")
    if options.seed < 0:
        raise UsageError(f"--seed must be >= 0, got {options.seed}")
    backends = verify.BACKENDS if options.backend == "all" else (options.backend,)
    devices = None if options.device is None else [options.device]
    try:
        results = verify.verify(devices, backends, seed=options.seed, quick=options.quick)
    except ValueError as error:
        raise UsageError(str(error)) from error
    checks = []
    if not options.json:
        print(verify.header())
    for check in results:
        checks.append(check)
        if not options.json:
            print(verify.line(check), flush=True)
    if options.json:
        print(json.dumps(verify.record(checks, seed=options.seed, quick=options.quick), indent=2))
    else:
        print(verify.summary(checks))
    return OK if verify.succeeded(checks) else FAILURE


def _bench(arguments: list[str]) -> int:
    root = Path(fastrl.__file__).resolve().parent.parent
    if not ((root / "bench" / "__main__.py").is_file() and (root / "pyproject.toml").is_file()):
        raise FileNotFoundError(
            "the benchmarks are not part of the installed package: they are the folder bench/ of fastrl's repository; "
            "run `python -m bench` in a checkout, or `fastrl bench` where it is installed with pip install -e ."
        )
    # -P: Python must not take a folder called bench in the current directory for the package.
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-P", "-m", "bench", *arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _report(run_dir: str, record_dir: str | None) -> int:
    from fastrl.train.run.record import write_record
    from fastrl.train.run.report import write_report

    if record_dir is not None:
        write_record(run_dir, record_dir)
        print(record_dir)
    else:
        print(write_report(run_dir))
    return OK


def _make(command: str, arguments: list[str]) -> int:
    # The makers sample for minutes without a progress bar, so their log shows the progress.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastrl.train").setLevel(logging.INFO)
    print(_configured(*MAKERS[command], arguments, f"fastrl {command}"))
    return OK


def _train(algorithm: str, arguments: list[str]) -> int:
    from fastrl.train.run.report import write_report

    # One line before the first step says what is trained.
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fastrl.train.run.run").setLevel(logging.INFO)
    config_class, train = ALGORITHMS[algorithm]
    result = _configured(config_class, train, arguments, f"fastrl train {algorithm}")
    print(f"report: {write_report(result.run_dir)}", file=sys.stderr)
    return OK


def _configured(config_class: str, function: str, arguments: list[str], program: str) -> Any:
    """Call the function with the settings in the arguments, and return its result."""
    missing = [name for name in TRAIN_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}: pip install "fastrl[train]"')
    from fastrl.train.config.parse import parse_config

    try:
        config = parse_config(_named(config_class), arguments, program)
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    # A reward may be module:function with a module in the current directory. It comes last: a file there that has the
    # name of a package must not run in its place.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    return _named(function)(config)


def _named(path: str) -> Any:
    """Import and return `module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


if __name__ == "__main__":
    sys.exit(main())
