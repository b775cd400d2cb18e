"""A run that cannot be: refused before anything is lost, with the setting that is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import safetensors.torch
from safetensors import SafetensorError
from tiny_model import save_tiny_model

from fastrl import cli, doctor
from fastrl.backends import build, cpu, cuda
from fastrl.train import config as settings
from fastrl.train import constitutional, grpo, online_dpo, pairs, ppo, rft
from fastrl.train.config import ConstitutionalConfig, GRPOConfig, OnlineDPOConfig, PairsConfig, PPOConfig, RFTConfig
from fastrl.train.constitutional import make_constitutional_pairs
from fastrl.train.grpo import run_grpo
from fastrl.train.online_dpo import run_online_dpo
from fastrl.train.pairs import make_pairs
from fastrl.train.ppo import run_ppo
from fastrl.train.pretrained import cache_dir
from fastrl.train.rft import run_rft

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> GRPOConfig:
    """Return the settings of a run of two steps that has been made, with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("run")
    config = GRPOConfig(
        model=str(save_tiny_model(folder / "model")), run_dir=str(folder / "run"), device="cpu", task_parameters=SUMS,
        rewards={"exact": 1.0}, steps=2, prompts_per_step=2, group_size=2, max_new_tokens=4, kl_coef=0.0,
        eval_problems=0, checkpoint_every=1, reward_timeout_s=None,
    )  # fmt: skip
    run_grpo(config)
    return config


def contents(folder: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/folder"}, "'/no/such/folder' could not be loaded: there is no such folder"),
        ({"model": "runs/sft/model"}, "'runs/sft/model' could not be loaded: there is no such folder"),
        ({"rewards": {"exat": 1.0}}, "unknown reward 'exat', did you mean exact"),
        ({"step_rewards": {"exat": 1.0}}, "unknown reward 'exat', did you mean exact"),
        ({"loss": "gropo"}, "unknown preset 'gropo'"),
        (
            {"reward_model": "/no/such/folder"},
            "reward_model must be a folder .*there is no such folder",
        ),
    ],
)
def test_overwriting_keeps_the_earlier_run_until_the_settings_are_right(
    finished: GRPOConfig, changes: dict[str, Any], message: str
) -> None:
    before = contents(finished.run_dir)
    with pytest.raises(ValueError, match=message):
        run_grpo(dataclasses.replace(finished, overwrite=True, **changes))
    assert contents(finished.run_dir) == before


def test_resuming_a_finished_run_says_so_and_fewer_steps_are_refused(
    finished: GRPOConfig, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = Path(finished.run_dir, "metrics.jsonl").read_text()
    run_grpo(dataclasses.replace(finished, resume=True))
    assert "holds all 2 steps: nothing is left to train" in caplog.text
    assert Path(finished.run_dir, "metrics.jsonl").read_text() == metrics
    with pytest.raises(ValueError, match="steps=1 are fewer than the 2 of the checkpoint"):
        run_grpo(dataclasses.replace(finished, resume=True, steps=1))
    assert json.loads(Path(finished.run_dir, "config.json").read_text())["steps"] == 2


def test_a_checkpoint_of_another_loop_is_refused_in_a_few_words(finished: GRPOConfig) -> None:
    other = PPOConfig(model=finished.model, run_dir=finished.run_dir, device="cpu", resume=True)
    saved = finished.as_dict()
    with pytest.raises(ValueError, match=r"a run with other settings: .*, and \d+ more$") as error:
        other.check_resumable(saved)
    assert str(error.value).count("(saved ") == 8


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_run_folder_that_cannot_be_made_is_named(finished: GRPOConfig, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"run_dir must be a folder that can be written to, got '{tmp_path / place}'"):
        run_grpo(dataclasses.replace(finished, run_dir=str(tmp_path / place)))


@pytest.mark.parametrize("every", [0, 1])
def test_a_full_disk_is_one_line(
    finished: GRPOConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    every: int,
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "serialize_file", full)
    options = {"model": finished.model, "run-dir": str(tmp_path / "r"), "device": "cpu", "checkpoint-every": every}
    options |= {"steps": 1, "eval-problems": 0, "prompts-per-step": 1, "group-size": 2, "max-new-tokens": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    assert cli.main(["train", "grpo", *words, "--kl-coef", "0"]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    folder = tmp_path / "r" / ("checkpoints" if every else "model")
    assert error == f"fastrl: error: cannot write {folder}: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"group_size": 1}, "group_size must be at least 2, or nothing is learnt"),
        ({"group_size": 1, "advantage_baseline": "none"}, "group_size must be at least 2, or nothing is learnt"),
        ({"advantage_scale": "std"}, "advantage_scale must be one of group, batch, none, .*, got 'std'"),
        ({"advantage_baseline": "given"}, "advantage_baseline must be one of group_mean, .*, got 'given'"),
    ],
)
def test_groups_that_teach_nothing_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GRPOConfig(**changes)
    assert GRPOConfig(group_size=1, advantage_baseline="none", advantage_scale="batch").batch_size == 8


@pytest.mark.parametrize("name", [name for name in vars(settings) if name.endswith("Config")])
def test_every_choice_of_an_annotation_is_checked(name: str) -> None:
    kind = getattr(settings, name)
    for field, hint in get_type_hints(kind).items():
        several = get_origin(hint) is tuple
        choice = get_args(hint)[0] if several else hint
        if get_origin(choice) is Literal:
            with pytest.raises(
                ValueError, match=f"^{field} must be one of {', '.join(get_args(choice))}, got 'no such'"
            ):
                kind(**{field: ("no such",) if several else "no such"})


@pytest.mark.parametrize(
    ("module", "config", "run"),
    [
        (grpo, GRPOConfig(rewards={"exat": 1.0}), run_grpo),
        (ppo, PPOConfig(rewards={"exat": 1.0}), run_ppo),
        (rft, RFTConfig(rewards={"exat": 1.0}), run_rft),
        (online_dpo, OnlineDPOConfig(rewards={"exat": 1.0}), run_online_dpo),
        (pairs, PairsConfig(rewards={"exat": 1.0}), make_pairs),
        (constitutional, ConstitutionalConfig(rewards={"exat": 1.0}), make_constitutional_pairs),
        (pairs, PairsConfig(output="file/pairs.jsonl"), make_pairs),
        (constitutional, ConstitutionalConfig(output="folder"), make_constitutional_pairs),
    ],
)
def test_rewards_and_outputs_are_checked_before_the_model_is_loaded(
    module: Any, config: Any, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the model is loaded")

    loader = "load_model" if module in (pairs, constitutional) else "load_policy"
    monkeypatch.setattr(module, loader, load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises((ValueError, OSError), match=r"unknown reward 'exat'|output must be a file that can be written"):
        run(config)
    assert not (tmp_path / "runs").exists()


def test_without_a_home_directory_the_cache_is_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    for name in ("FASTRL_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    message = "no home directory to keep compiled kernels and models in; set FASTRL_CACHE_DIR"
    assert cpu._missing.__wrapped__() in (message, cpu._missing())
    with pytest.raises(ValueError, match=message):
        cache_dir()
    monkeypatch.setattr(cuda, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: object())
    assert cuda.missing() == message
    assert doctor.diagnose()["backends"]["cache of compiled kernels"] == f"none: {message}"


def test_doctor_finds_the_ninja_that_the_build_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\necho 1.2.3\n")
    ninja.chmod(0o755)
    monkeypatch.setenv("PATH", "/usr/bin/none")
    monkeypatch.setattr(build, "ninja_folder", lambda: str(tmp_path))
    assert doctor.diagnose()["compilers"]["ninja"] == f"1.2.3 ({ninja})"
