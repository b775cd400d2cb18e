"""The command: exit codes, one-line errors, configuration files with overrides, and commands without the extras."""

import dataclasses
import importlib.metadata
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("tyro")
pytest.importorskip("yaml")

import fastrl
from fastrl import cli, doctor
from fastrl.losses import catalogue
from fastrl.train.config.parse import load_config, parse_config

EXTRAS = ("tyro", "rich", "yaml", "transformers", "matplotlib", "reasoning_gym", "math_verify", "trl", "peft")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a test."""

    model: str = "tiny"
    """Name of the model."""
    steps: int = 3
    """Number of steps."""
    learning_rate: float = 1e-3
    """Step size."""
    kl: str | None = None
    """Estimator."""
    loss: Literal["grpo", "dapo"] = "grpo"
    """Loss."""
    quiet: bool = False
    """Say less."""
    rewards: dict[str, float] = field(default_factory=lambda: {"accuracy": 1.0})
    """Rewards."""
    options: dict[str, int | float | str | bool] = field(default_factory=dict)
    """Options."""
    modes: tuple[Literal["sampled", "greedy"], ...] = ("sampled",)
    """Modes."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")


def parse(*arguments: str) -> Settings:
    return parse_config(Settings, arguments, "test")


def write(tmp_path: Path, text: str) -> str:
    (tmp_path / "settings.yaml").write_text(text)
    return str(tmp_path / "settings.yaml")


def test_the_file_sets_and_the_options_override(tmp_path):
    path = write(
        tmp_path,
        "model: small\nsteps: 7\nlearning_rate: 1e-5\nkl: k3\nquiet: true\nmodes: [greedy, sampled]\n"
        "rewards: {accuracy: 1, format: 0.5}\noptions: {a: 1, b: 0.5, c: x, d: true}\n",
    )
    from_file = parse("--config", path)
    assert from_file == Settings(
        model="small",
        steps=7,
        learning_rate=1e-5,
        kl="k3",
        quiet=True,
        modes=("greedy", "sampled"),
        rewards={"accuracy": 1.0, "format": 0.5},
        options={"a": 1, "b": 0.5, "c": "x", "d": True},
    )
    assert [type(value) for value in from_file.options.values()] == [int, float, str, bool]
    changed = parse("--steps", "9", f"--config={path}", "--kl", "None", "--no-quiet", "--rewards", "exact=2")
    assert changed == dataclasses.replace(from_file, steps=9, kl=None, quiet=False, rewards={"exact": 2.0})
    assert load_config(Settings, path) == from_file
    assert load_config(Settings, write(tmp_path, "")) == Settings()


def test_options_alone():
    settings = parse(
        "--learning_rate", "1e-4", "--modes", "greedy", "sampled", "--options", "a=1", "b=1e-3", "c=yes sir"
    )
    assert settings.learning_rate == 1e-4
    assert settings.modes == ("greedy", "sampled")
    assert settings.options == {"a": 1, "b": 1e-3, "c": "yes sir"}
    assert parse("--rewards", "overlong(max_length=64, cache=16)=0.5").rewards == {
        "overlong(max_length=64, cache=16)": 0.5
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"settings\.yaml: unknown setting 'stepz', did you mean steps"),
        ("zzz: 3", "unknown setting 'zzz'; expected some of model, steps"),
        ("steps: many", r"settings\.yaml: steps must be int, got 'many'"),
        ("steps: 3.0", r"steps must be int, got 3\.0"),
        ("steps: true", "steps must be int, got True"),
        ("steps: null", "steps must be int, got None"),
        ("steps: 0", "steps must be at least 1, got 0"),
        ("learning_rate: fast", "learning_rate must be float, got 'fast'"),
        ("kl: 3", "kl must be str or null, got 3"),
        ("loss: ppo", "loss must be one of grpo, dapo, got 'ppo'"),
        ("quiet: 1", "quiet must be bool, got 1"),
        ("rewards: accuracy", r"rewards must be dict\[str, float\], got 'accuracy'"),
        ("rewards: {accuracy: high}", r"rewards\.accuracy must be float, got 'high'"),
        ("modes: [greedy, beam]", r"modes\[1\] must be one of sampled, greedy, got 'beam'"),
        ("steps: 1\nsteps: 2", "the key 'steps' comes twice"),
        ("[1, 2]", "must hold a mapping from settings to values, got list"),
        ("a: [", "must be YAML"),
        ("a: !!python/object/apply:os.getcwd []", "must be YAML"),
    ],
)
def test_files_that_are_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_config(Settings, write(tmp_path, text))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stepz", "3"],
        ["--steps", "many"],
        ["--steps", "0"],
        ["--rewards", "accuracy"],
        ["--rewards", "accuracy=high"],
        ["--loss", "ppo"],
        ["extra"],
        ["--conf", "x.yaml"],
    ],
)
def test_options_that_are_refused(arguments, capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        parse(*arguments)
    said = "".join(capsys.readouterr()) + str(stop.value)
    assert not isinstance(stop.value, SystemExit) or stop.value.code == 2
    assert arguments[0] in said or arguments == ["--steps", "0"]
    assert "---" not in said


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for line in ("--learning-rate FLOAT", "Step size.", "--rewards [KEY=VALUE ...]", "--config FILE.yaml"):
        assert line in shown


@pytest.mark.parametrize(
    "example", sorted((Path(__file__).parents[2] / "examples").glob("*.yaml")), ids=lambda p: p.name
)
def test_the_examples_are_valid(example):
    command = re.search(rf"fastrl (?:train )?(\S+) --config examples/{example.name}", example.read_text())
    assert command, "the header says how to run it"
    load_config(cli._named({**cli.ALGORITHMS, **cli.MAKERS}[command[1]][0]), example)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["no-such-command"], 2),
        (["train"], 2),
        (["train", "ppo-that-is-not-there"], 2),
        (["report"], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["report", "--help"], 0),
        (["verify", "--help"], 0),
        (["verify", "--backend", "mkl"], 2),
        (["bench", "--help"], 0),
        (["bench", "no-such-benchmark"], 2),
    ],
)
def test_exit_codes(arguments, code, capsys):
    assert cli.main(arguments) == code
    assert "Traceback" not in "".join(capsys.readouterr())


def test_errors_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert cli.main(["report", str(tmp_path / "nowhere")]) == 1
    assert capsys.readouterr().err == (
        f"fastrl: error: {tmp_path / 'nowhere'} is not a directory; expected the directory of a run\n"
    )
    assert cli.main(["train", "grpo", "--config", write(tmp_path, "modle: x")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown setting 'modle', did you mean model" in error
    monkeypatch.setenv("FASTRL_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(["report", str(tmp_path / "nowhere")])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--out", "runs/x"], "Unrecognized options: --out"),
        (["--save-model", "False"], "a switch takes no value: write --save-model or --no-save-model"),
        (["--no-save-model", "true"], "write --save-model or --no-save-model"),
        (["--temperature", "0"], "temperature must be finite and greater than 0"),
        (["--group-size", "1"], "group_size must be at least 2"),
        (["--learning-rate", "abc"], "--learning-rate: could not convert string to float: 'abc'"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "1.5"], "--steps"),
        (["--loss"], "--loss"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert cli.main(["train", "grpo", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastrl: error: ")
    assert error.count("\n") == 1
    assert words in error


def test_an_error_of_a_library_is_one_line_with_a_way_to_its_place(monkeypatch, capsys):
    def fails(findings: object) -> str:
        raise IndexError("index out of range\nin self")

    monkeypatch.setattr(doctor, "render", fails)
    monkeypatch.setattr(doctor, "diagnose", dict)
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert cli.main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error == "fastrl: error: IndexError: index out of range in self (FASTRL_DEBUG=1 shows where)\n"


def test_a_termination_has_its_line_and_code(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "diagnose", dict)
    monkeypatch.setattr(doctor, "render", lambda findings: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["doctor"]) == 143
    assert capsys.readouterr().err == "fastrl: terminated\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_bench_passes_its_arguments_on_from_any_folder(tmp_path, monkeypatch, capfd):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("raise SystemExit(7)")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "gpu", "--help"]) == 0
    assert "--dry-run" in capfd.readouterr().out


def test_bench_outside_a_checkout_says_where_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fastrl, "__file__", str(tmp_path / "site-packages" / "fastrl" / "__init__.py"))
    monkeypatch.delenv("FASTRL_DEBUG", raising=False)
    assert cli.main(["bench", "cpu"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "the folder bench/ of fastrl's repository" in error


def test_an_interrupt_is_no_traceback(monkeypatch, capsys):
    def interrupted(findings: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "render", interrupted)
    monkeypatch.setattr(doctor, "diagnose", dict)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "fastrl: interrupted\n"


@pytest.mark.parametrize("width", [60, 100, 200])
def test_losses_lists_every_loss_within_the_width(width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main(["losses"]) == cli.OK
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    first = {line.split()[0].partition("(")[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert set(catalogue.names()) <= first


def test_losses_describes_one(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.main(["losses", "dapo"]) == cli.OK
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    assert " ".join(shown.split()) == " ".join(fastrl.describe("dapo").split())
    assert cli.main(["losses", "value_loss"]) == cli.OK
    assert capsys.readouterr().out.count("formula") == 2


def test_an_unknown_loss_is_one_line_with_close_names(capsys):
    assert cli.main(["losses", "grop"]) == cli.USAGE
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fastrl: error: unknown loss 'grop'; close: grpo")
    assert printed.err.count("\n") == 1


def test_doctor_prints_json_with_a_reason_for_every_backend(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert set(findings) == {"system", "packages", "devices", "compilers", "triton", "backends"}
    assert "failed" not in str(list(findings.values()))
    assert findings["packages"]["core"]["torch"]
    for choice in findings["backends"]["cpu"].values():
        backend, _, reason = choice.partition(": ")
        assert backend in {"torch", "cpu", "triton"}
        assert reason
    assert findings["backends"]["cuda kernels"].startswith(("built by ", "cannot be built: "))


def test_the_package_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastrl", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("fastrl", run_name="__main__")
    assert stopped.value.code == 0
    assert "doctor" in capsys.readouterr().out


def test_doctor_knows_the_packages_of_a_checkout(monkeypatch):
    installed = doctor._packages()

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert doctor._packages() == installed


def test_doctor_survives_whatever_is_broken(monkeypatch):
    def broken() -> dict[str, object]:
        raise OSError("driver is gone")

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("PATH", "/nowhere")
    findings = doctor.diagnose()
    assert findings["devices"] == {"failed": "OSError: driver is gone"}
    assert findings["compilers"]["C++"] == "not found (no-such-compiler)"
    assert "driver is gone" in doctor.render(findings)


def test_help_and_doctor_work_without_the_extras_and_train_names_them():
    script = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {EXTRAS!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, package=None: None if name in {EXTRAS!r} else found(name, package)\n"
        "from fastrl.cli import main\n"
        "codes = main(['--help']), main(['doctor']), main(['train', 'grpo'])\n"
        "print('codes', codes)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "codes (0, 0, 1)", done.stderr
    assert done.stderr.splitlines()[-1].endswith('pip install "fastrl[train]"')
    assert "training needs tyro, yaml, rich, transformers" in done.stderr


@pytest.mark.parametrize("algorithm", cli.ALGORITHMS)
def test_every_loop_lists_its_settings(algorithm, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_config(cli._named(cli.ALGORITHMS[algorithm][0]), ["--help"], f"fastrl train {algorithm}")
    assert stop.value.code in (0, None)
    assert "--run-dir" in capsys.readouterr().out
    assert callable(cli._named(cli.ALGORITHMS[algorithm][1]))
