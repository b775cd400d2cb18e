"""A training run: its folder, device, optimiser, checkpoints, evaluations, metrics and clock, for every loop.

    run = Run(config)                          # folder, accelerator, seeds
    model, tokenizer = load_model(..., device=run.device)
    run.start(named_parameters)             # AdamW; restores the newest checkpoint where the run is resumed
    with run:                                  # progress bar, trackers, autocast
        for step in run.steps():
            ...
            run.backward(loss)
            run.clip_and_step()
            ...
            run.finish_step(step, metrics)     # metrics.jsonl, and a checkpoint if one is due

A loop saves further state (a KL coefficient, averaged weights) with `run.register`, before
`run.start`. All random draws come from `run.generator` or the seeded global generators, so a resumed run continues
to the bit on a CPU.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import math
import os
import platform
import random
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

import fastrl
from fastrl.doctor import processor
from fastrl.train.config.run import RunConfig
from fastrl.train.pretrained import MERGED
from fastrl.train.run.checkpoint import (
    Checkpoint,
    disk_errors,
    latest_checkpoint,
    load_checkpoint,
    optimizer_from_tensors,
    optimizer_to_tensors,
    random_state,
    save_checkpoint,
    set_random_state,
    write_json,
)
from fastrl.train.run.folder import FolderLock, check_inputs, input_digests
from fastrl.train.run.masters import MasterWeights
from fastrl.train.run.tracking import RunTracker

logger = logging.getLogger(__name__)

RUN_FILES = ("metrics.jsonl", "evaluations.json", "samples.json", "checkpoints", "model")
PACKAGES = ("fastrl", "torch", "triton", "transformers", "accelerate", "peft", "safetensors", "reasoning-gym", "numpy")

Config = TypeVar("Config", bound=RunConfig)


@dataclass(frozen=True)
class RunResult:
    """The outcome of a run."""

    run_dir: Path
    steps: int
    evaluations: list[dict[str, Any]]
    """Records of `evaluations.json`, oldest first."""
    metrics: dict[str, float]
    """Metrics of the last step."""


class Stateful(Protocol):
    """An object with state to save: a flat mapping from names to tensors and JSON values."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Restore a state."""
        ...


class MetricSums:
    """Sums and counts of metrics, added over micro-batches and divided once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add (sum, count) by name, without moving the tensors to the host."""
        for name, (total, count) in metrics.items():
            before = self._sums.get(name)
            self._sums[name] = (total, count) if before is None else (before[0] + total, before[1] + count)

    def means(self) -> dict[str, float]:
        """Return sum / count by name, NaN if the count is 0. The host waits for the device."""
        return {
            name: float(total) / float(count) if float(count) else math.nan
            for name, (total, count) in self._sums.items()
        }


class Clock:
    """Wall time of the parts of a step, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._laps: dict[str, float] = {}
        self._start = self._last = self._now()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to `name`."""
        now = self._now()
        self._laps[name] = self._laps.get(name, 0.0) + now - self._last
        self._last = now

    def times(self) -> dict[str, float]:
        """Return `time/NAME` of each part, and `time/step` of the whole step."""
        return {
            **{f"time/{name}": seconds for name, seconds in self._laps.items()},
            "time/step": self._last - self._start,
        }

    def _now(self) -> float:
        # Kernels run asynchronously: without this their time would count for a later part.
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


class RunLog:
    """The files `evaluations.json` and `samples.json` of a run. A resumed run drops records after its checkpoint."""

    def __init__(self, run_dir: Path, start_step: int) -> None:
        self._dir = run_dir
        self.evaluations = self._read("evaluations.json", start_step)
        self._samples = self._read("samples.json", start_step)

    def _read(self, name: str, start_step: int) -> list[dict[str, Any]]:
        path = self._dir / name
        if start_step == 0 or not path.is_file():
            return []
        return [record for record in json.loads(path.read_text()) if record["step"] <= start_step]

    def add(self, evaluation: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Append an evaluation (step, split, mode, accuracy, standard_error, n) and its samples, and write both."""
        self.evaluations.append(dict(evaluation))
        self._samples += [dict(sample) for sample in samples]
        write_json(self._dir / "evaluations.json", self.evaluations)
        write_json(self._dir / "samples.json", self._samples)


class Run(Generic[Config]):
    """One training run. The top of the module shows the order of the calls."""

    def __init__(self, config: Config) -> None:
        """Open the folder of the run and seed everything.

        Raises:
            ValueError: an earlier run is in the folder, another run uses it, or this is one process of several.
            OSError: the folder cannot be made.
        """
        self.config = config
        self.dir = open_run_dir(config)
        self._lock = FolderLock(self.dir)
        self.accelerator = _accelerator(config)
        self.device: torch.device = self.accelerator.device
        seed_everything(config.seed)
        self.generator = torch.Generator(device=self.device).manual_seed(config.seed)
        self.start_step = 0
        self.metrics: dict[str, float] = {}
        self._registered: dict[str, Stateful] = {}
        self._stack = contextlib.ExitStack()

    def register(self, name: str, stateful: Stateful) -> None:
        """Save and restore the state of `stateful` with every checkpoint. Call this before `start`."""
        if name in self._registered or name in ("weights", "optimizer", "random"):
            raise ValueError(f"the state {name!r} is registered already")
        self._registered[name] = stateful

    def start(
        self, parameters: Mapping[str, torch.nn.Parameter], *, factors: Mapping[str, float] | None = None
    ) -> None:
        """Make the optimiser of the named parameters, and continue from the newest checkpoint if the run resumes.

        `factors` multiply the learning rate of the parameters whose name begins with the key and a dot.

        Raises:
            ValueError: the checkpoint belongs to other settings, or is beyond the last step.
        """
        config = self.config
        self._inputs = input_digests(config.as_dict())
        if config.warmup_steps >= config.steps > 1:
            logger.warning(
                "warmup_steps=%d with steps=%d: the learning rate never reaches its peak",
                config.warmup_steps,
                config.steps,
            )
        # Not earlier: a mistake in the settings, the model or the data must not cost the earlier run.
        if config.overwrite:
            _remove_earlier_run(self.dir)
        self.parameters = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if not self.parameters:
            raise ValueError(
                "no parameter of the model is trained: give lora_rank, or a model whose weights are not frozen"
            )
        self.masters = MasterWeights(self.parameters)
        groups: dict[float, list[Tensor]] = {}
        for name, parameter in self.masters.optimised().items():
            factor = (factors or {}).get(name.split(".", 1)[0], 1.0)
            groups.setdefault(factor, []).append(parameter)
        self._factors = list(groups)
        self.optimizer = self.accelerator.prepare(
            torch.optim.AdamW(
                [{"params": group} for group in groups.values()],
                lr=config.learning_rate,
                betas=(config.adam_beta1, config.adam_beta2),
                weight_decay=config.weight_decay,
            )
        )
        if config.resume and (newest := latest_checkpoint(self.checkpoints)) is not None:
            self.start_step = self._restore(newest)
            if self.start_step >= config.steps:
                self._check_finished()
        self._say_what_is_trained(parameters)
        self.log = RunLog(self.dir, self.start_step)
        write_json(self.dir / "config.json", config.as_dict())
        write_json(self.dir / "environment.json", environment(self.device))

    def _say_what_is_trained(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        trained = sum(p.numel() for p in self.parameters.values())
        adapters = all("lora_" in name for name in self.parameters)
        dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in self.parameters.values()}))
        logger.info(
            "trains %s: %s of %s parameters in %s%s, from step %d",
            "LoRA adapters" if adapters else "the model",
            f"{trained:,}",
            f"{sum(p.numel() for p in parameters.values()):,}",
            dtypes,
            " rounded from float32 master weights" if len(self.masters) else "",
            self.start_step,
        )

    def zero_grad(self) -> None:
        """Drop the gradients that the parameters hold."""
        self.optimizer.zero_grad()
        for parameter in self.parameters.values():
            parameter.grad = None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.dir / "checkpoints"

    def __enter__(self) -> Run[Config]:
        """Open the progress bar and the trackers, and enter autocast if the run has mixed precision."""
        config = self.config
        tracker = RunTracker(self.dir, config.steps, tensorboard=config.tensorboard, trackio=config.trackio)
        self.tracker = self._stack.enter_context(tracker)
        self._stack.enter_context(self.accelerator.autocast())
        if config.resume:
            tracker.resume(self.start_step)
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the progress bar and the trackers, leave autocast, and give the folder free."""
        try:
            self._stack.close()
        finally:
            self._lock.release()

    def steps(self) -> Iterator[int]:
        """Yield the remaining steps, counted from 0. Each starts with its learning rate and a new `clock`."""
        for step in range(self.start_step, self.config.steps):
            self.clock = Clock(self.device)
            self.learning_rate = self.config.learning_rate_at(step)
            for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
                group["lr"] = self.learning_rate * factor
            yield step

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss` to the gradients of the parameters."""
        self.accelerator.backward(loss)

    def clip_and_step(self, parts: Mapping[str, Sequence[Tensor]] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Clip the gradient, take an optimiser step and zero the gradient.

        Returns metrics: the norm of the gradient, `skipped_updates`, and `weights_moved`, the share of (some 65,000)
        weights of the model that the step changed. Of weights in 16 bits a small step moves few.

        `parts` maps the name of a norm among the metrics to the parameters that are clipped by it. Without `parts`, one
        norm `grad_norm` clips all. Steps with a non-finite gradient norm are skipped and counted in `skipped_updates`.
        """
        self.masters.take_gradients()
        self.accelerator.unscale_gradients()
        norms = {
            name: torch.nn.utils.clip_grad_norm_([self.masters.of(p) for p in part], self.config.max_grad_norm)
            for name, part in (parts or {"grad_norm": list(self.parameters.values())}).items()
        }
        # One such update would make every parameter NaN.
        finite = all(bool(torch.isfinite(norm)) for norm in norms.values())
        before = self.masters.look()
        if finite:
            self.optimizer.step()
            self.masters.write_back()
        self.zero_grad()
        one = torch.ones((), device=self.device)
        return {
            **{name: (norm, one) for name, norm in norms.items()},
            "skipped_updates": (one * (not finite), one),
            "weights_moved": self.masters.moved(before),
        }

    def evaluation_due(self, done: int) -> bool:
        """Return whether the run evaluates after `done` steps: every `eval_every` steps, and after the last one."""
        every = self.config.eval_every
        return done == self.config.steps or bool(every and done % every == 0)

    def finish_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the metrics of step `step`, counted from 0, and write a checkpoint if one is due."""
        done, config = step + 1, self.config
        self.metrics = dict(metrics)
        self.tracker.log(done, self.metrics)
        if config.checkpoint_every and (done % config.checkpoint_every == 0 or done == config.steps):
            self._save(done)

    def save_model(self, model: Any, tokenizer: Any) -> None:
        """Write the model (or its adapters) and the tokenizer to `model/`, if `save_model` is set."""
        if self.config.save_model:
            if hasattr(model, "get_base_model") and getattr(model.get_base_model(), MERGED, False):
                # Its adapters continue weights that stand in no folder: only the whole model is the trained one.
                model = model.merge_and_unload()
            with disk_errors(self.dir / "model"):
                model.save_pretrained(self.dir / "model")
                tokenizer.save_pretrained(self.dir / "model")

    def result(self) -> RunResult:
        """Return the outcome of the run."""
        return RunResult(self.dir, self.config.steps, self.log.evaluations, self.metrics)

    def _save(self, step: int) -> None:
        optimizer_tensors, groups = optimizer_to_tensors(self.optimizer)
        random_tensors, random_values = random_state(self.generator)
        # Where there are masters, they are the weights: the model's own are their roundings.
        tensors = {"weights": self.masters.optimised(), "optimizer": optimizer_tensors, "random": random_tensors}
        values: dict[str, Any] = {
            "config": self.config.as_dict(),
            "inputs": self._inputs,
            "optimizer_groups": groups,
            "random": random_values,
            "kept": {},
        }
        for name, stateful in self._registered.items():
            state = stateful.state_dict()
            tensors[name] = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            values["kept"][name] = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
        save_checkpoint(self.checkpoints, step, tensors, values, keep=self.config.keep_checkpoints)

    def _restore(self, path: Path) -> int:
        """Load the checkpoint in `path` into the parameters, the optimiser and the generators. Return its step."""
        saved = load_checkpoint(path)
        for part in ("weights", "optimizer", "random"):
            if part not in saved.tensors:
                raise ValueError(f"the checkpoint {path} has no {part}.safetensors: it cannot be resumed")
        self.config.check_resumable(saved.state["config"])
        check_inputs(saved.state.get("inputs", {}), self._inputs)
        _same_names(path, "parameters", saved.tensors["weights"], self.parameters)
        _same_names(path, "state", saved.state["kept"], self._registered)
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.tensors["weights"][name])
            for name, master in self.masters.optimised().items():
                master.copy_(saved.tensors["weights"][name])
        optimizer_from_tensors(self.optimizer, saved.tensors["optimizer"], saved.state["optimizer_groups"])
        for name, stateful in self._registered.items():
            stateful.load_state_dict({**saved.tensors.get(name, {}), **saved.state["kept"][name]})
        self._restore_random(saved)
        return int(saved.state["step"])

    def _check_finished(self) -> None:
        """Log that no step is left, or raise if the checkpoint has more steps than this run."""
        if self.start_step > self.config.steps:
            raise ValueError(
                f"steps={self.config.steps} are fewer than the {self.start_step} of the checkpoint in {str(self.dir)!r}"
            )
        logger.warning("run_dir %r holds all %d steps: nothing is left to train", str(self.dir), self.start_step)

    def _restore_random(self, saved: Checkpoint) -> None:
        set_random_state(self.generator, saved.tensors["random"], saved.state["random"])


def _same_names(path: Path, kind: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    if different := sorted(saved.keys() ^ here.keys()):
        raise ValueError(f"the checkpoint {path} holds other {kind} than this run: {different[:4]}")


def open_run_dir(config: RunConfig) -> Path:
    """Return the folder of the run, made if needed. Raise if it holds an earlier run that must stay."""
    run_dir = Path(config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"run_dir must be a folder that can be written to, got {str(run_dir)!r}: {error}") from error
    if _earlier_run(run_dir) and not (config.resume or config.overwrite):
        raise ValueError(
            f"run_dir {str(run_dir)!r} holds an earlier run; resume it (--resume), overwrite it (--overwrite), "
            "or choose another"
        )
    return run_dir


def _earlier_run(run_dir: Path) -> list[Path]:
    return [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]


def _remove_earlier_run(run_dir: Path) -> None:
    for path in _earlier_run(run_dir):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _accelerator(config: RunConfig) -> Any:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"this loop runs in one process, got WORLD_SIZE={os.environ['WORLD_SIZE']}")
    from accelerate import Accelerator

    return Accelerator(mixed_precision=config.mixed_precision, cpu=config.device == "cpu")


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.manual_seed(seed)


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions and the machine, as JSON values."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "packages": versions,
        "backends": fastrl.explain(device),
    }
