"""A configuration dataclass from a YAML file and the command line, which overrides the file.

The keys of the file are the fields. An error for an unknown key lists similar fields, and an error for a value of the
wrong type names the key.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

Config = TypeVar("Config")


def parse_config(config_class: type[Config], arguments: Sequence[str], program: str) -> Config:
    """Return the configuration that the arguments describe: `--config FILE.yaml` and `--FIELD VALUE` for any field.

    Raises:
        ValueError: the file or a value is wrong. The message names the key.
        FileNotFoundError: there is no such file.
        SystemExit: with 2 and a message for wrong arguments, with 0 after `--help`.
    """
    import tyro

    # An option that only begins like --config is one of the dataclass's own fields, or a mistake.
    first = argparse.ArgumentParser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument("--config", metavar="FILE.yaml")
    known, rest = first.parse_known_args(arguments)
    fields = [f"--{field.name}" for field in dataclasses.fields(config_class)]  # pyright: ignore[reportArgumentType]
    for word in (argument.partition("=")[0] for argument in rest):
        if difflib.get_close_matches(word, ["--config", *fields], n=1, cutoff=0.75) == ["--config"]:
            first.error(f"unknown option {word}, did you mean --config FILE.yaml?")
    default = load_config(config_class, known.config) if known.config is not None else config_class()
    description = (
        "Settings come from --config FILE.yaml, whose keys are the names below with underscores, and from the options, "
        "which override it; the defaults shown are those of the file where one is given. "
        "Mappings are written --rewards accuracy=1.0 format=0.1."
    )
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                config_class,
                prog=program,
                description=description,
                args=rest,
                default=default,
                registry=_registry(),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_one_line(said.getvalue(), rest)) from None


def _one_line(box: str, arguments: Sequence[str]) -> str:
    """Return tyro's message, a box of several lines, as one line, with a hint for switches."""
    # The box is drawn with signs for it, or in ASCII where there is no terminal.
    lines = [re.sub(r"[\u2500-\u257f]+|-{5,}|^[|+]|[|+]$", " ", line.strip()).strip() for line in box.splitlines()]
    text = " ".join(" ".join(lines[1:]).split())  # without the title of the box
    text = re.sub(r" Perhaps you meant:? (--[\w-]+).*?(?= For full|$)", r", did you mean \1?", text)
    text = re.sub(r" Argument helptext:.*?(?= For full|$)", "", text).replace(" For full", "; for full")
    for before, value in itertools.pairwise(arguments):
        if value.lower() in ("true", "false") and before.startswith("--"):
            name = before.removeprefix("--").removeprefix("no-")
            text += f"; a switch takes no value: write --{name} or --no-{name}"
            break
    return text


def load_config(config_class: type[Config], path: str | Path) -> Config:
    """Return the configuration in a YAML file. Fields that are not in the file have their defaults."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no configuration file {path}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_loader())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} must be YAML: {error}") from error
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping from settings to values, got {type(content).__name__}")
    hints = typing.get_type_hints(config_class)
    fields = [field.name for field in dataclasses.fields(config_class)]  # pyright: ignore[reportArgumentType]
    values = {}
    for key, value in content.items():
        if key not in fields:
            close = difflib.get_close_matches(str(key), fields, n=3, cutoff=0.5)
            hint = f", did you mean {' or '.join(close)}" if close else f"; expected some of {', '.join(fields)}"
            raise ValueError(f"{path}: unknown setting {key!r}{hint}")
        values[key] = _converted(f"{path}: {key}", hints[key], value)
    return config_class(**values)


def _loader() -> type:
    """Return PyYAML's safe loader with two repairs: 1e-5 is a number, and a key that comes twice is an error."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            mapping = super().construct_mapping(node, deep)
            if len(mapping) != len(node.value):
                keys = [self.construct_object(key, deep=True) for key, _ in node.value]
                twice = next(key for key in keys if keys.count(key) > 1)
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} comes twice", node.start_mark)
            return mapping

    number = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+")
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"^(?:{number.pattern})$"), list("-+0123456789.")
    )
    return Loader


def _converted(name: str, hint: Any, value: Any) -> Any:
    """Return `value` as the type `hint` wants it, or raise a `ValueError` that names the setting."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(name, hint, inner, value)
    if origin is Literal and value in inner and type(value) in {type(choice) for choice in inner}:
        return value
    if origin is dict and isinstance(value, Mapping):
        return {
            _converted(f"{name}, a key", inner[0], key): _converted(f"{name}.{key}", inner[1], item)
            for key, item in value.items()
        }
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_converted(f"{name}[{index}]", inner[0], item) for index, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")


def _one_of(name: str, hint: Any, choices: Sequence[Any], value: Any) -> Any:
    # An exact type first: of `int | float | bool` it must not be a float that takes an int.
    exact = [choice for choice in choices if choice is type(value)]
    for choice in (*exact, *choices):
        try:
            return _converted(name, choice, value)
        except ValueError:
            continue
    raise ValueError(f"{name} must be {_described(hint)}, got {value!r}")


def _described(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(map(str, typing.get_args(hint)))}"
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_described(choice) for choice in typing.get_args(hint))
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def _registry() -> Any:
    """Return the rule by which tyro reads a mapping: any number of KEY=VALUE, in the place of the whole mapping."""
    import tyro

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def mapping_rule(info: Any) -> Any:
        if typing.get_origin(info.type) is not dict:
            return None
        _, value_hint = typing.get_args(info.type)
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="[KEY=VALUE ...]",
            instance_from_str=lambda words: dict(_pair(word, value_hint) for word in words),
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{key}={item}" for key, item in value.items()],
        )

    return registry


def _pair(word: str, value_hint: Any) -> tuple[str, Any]:
    import yaml

    # The last sign: the name of a reward may carry parameters, overlong(max_length=64, cache=16)=0.5.
    key, sign, text = word.rpartition("=")
    if not sign or not key:
        raise ValueError(f"expected KEY=VALUE, got {word!r}")
    return key, _converted(key, value_hint, yaml.load(text, Loader=_loader()))
