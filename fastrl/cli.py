"""The `fastrl` command.

    fastrl train grpo [--config FILE.yaml] [--FIELD VALUE ...]
    fastrl report RUN_DIR
    fastrl doctor [--json]

It exits with 0 when all went well, 1 when the work failed and 2 when the command line or the configuration is wrong.
An error is one line; with the environment variable FASTRL_DEBUG set it comes with its traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import fastrl

OK, FAILURE, USAGE, INTERRUPTED = 0, 1, 2, 130

# What `train` imports before anything else; each comes with the extra.
TRAIN_NEEDS = ("tyro", "yaml", "rich", "transformers", "accelerate", "safetensors", "reasoning_gym", "matplotlib")


class UsageError(Exception):
    """The command line or the configuration is wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
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


def _dispatch(arguments: list[str]) -> int:
    # The options of `train grpo` are the fields of a dataclass: they are read by tyro, which is not always installed.
    if arguments[:2] == ["train", "grpo"]:
        return _train_grpo(arguments[2:])
    options = _parser().parse_args(arguments)
    match options.command:
        case "report":
            return _report(options.run_dir)
        case "doctor":
            return _doctor(options.json)
        case _:
            raise UsageError("train expects an algorithm: fastrl train grpo [--config FILE.yaml] [--FIELD VALUE ...]")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastrl", description="RL post-training of language models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"fastrl {fastrl.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="train a model (`fastrl train grpo --help` lists the settings)")
    train.add_argument("algorithm", choices=["grpo"], help="the training loop")
    report = commands.add_parser("report", help="write report.html and curves.png of a run")
    report.add_argument("run_dir", help="the directory of the run")
    doctor = commands.add_parser("doctor", help="show versions, devices, compilers and backends")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _doctor(as_json: bool) -> int:
    from fastrl.doctor import diagnose, render

    findings = diagnose()
    print(json.dumps(findings, indent=2) if as_json else render(findings))
    return OK


def _report(run_dir: str) -> int:
    from fastrl.train.report import write_report

    print(write_report(run_dir))
    return OK


def _train_grpo(arguments: list[str]) -> int:
    missing = [name for name in TRAIN_NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'training needs {", ".join(missing)}: pip install "fastrl[train]"')
    from fastrl.train.config import GRPOConfig
    from fastrl.train.config_file import parse_config

    try:
        config = parse_config(GRPOConfig, arguments, "fastrl train grpo")
    except (ValueError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error
    # A reward may be a function of the user's own, module:function, in the current directory.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    from fastrl.train.grpo import run_grpo
    from fastrl.train.report import write_report

    run_grpo(config)
    print(f"report: {write_report(config.run_dir)}", file=sys.stderr)
    return OK


if __name__ == "__main__":
    sys.exit(main())
