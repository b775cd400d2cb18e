"""Records from files, folders, the hub or memory, with errors that name the place of a wrong one.

    records = read_records("pairs.jsonl")          # a list of dicts that knows the line of each
    train, held_out = split_held_out(records, share=0.1)

The loop decides on the fields. `fastrl.train.data.encoding` turns the usual kinds of records into tokens.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

FILE_KINDS = (".jsonl", ".ndjson", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?(?::[\w.-]+)?")


class Records(list[dict[str, Any]]):
    """A list of records that knows the place of each in its source."""

    def __init__(
        self, records: Iterable[dict[str, Any]], *, source: str, unit: str, numbers: Sequence[int] | None = None
    ) -> None:
        """Keep the records with their places.

        Args:
            records: one mapping each.
            source: their file or name, for error messages.
            unit: the word before a number in messages: `line`, `row`, `record`.
            numbers: the number of each record, 1, 2, ... if None.
        """
        super().__init__(records)
        self.source = source
        self.unit = unit
        self.numbers = list(numbers) if numbers is not None else list(range(1, len(self) + 1))

    def where(self, index: int) -> str:
        """Return the place of record `index` for an error message: `pairs.jsonl, line 7`."""
        return f"{self.source}, {self.unit} {self.numbers[index]}"

    def select(self, indices: Iterable[int]) -> Records:
        """Return the records at the indices, with their places."""
        chosen = list(indices)
        numbers = [self.numbers[index] for index in chosen]
        return Records([self[index] for index in chosen], source=self.source, unit=self.unit, numbers=numbers)


def read_records(source: Any, *, split: str | None = None) -> Records:
    """Return the records of a data source.

    Args:
        source: a file (.jsonl and .ndjson with one object a line, .json with a list of objects, or .parquet), a folder
            written by `datasets.Dataset.save_to_disk`, a dataset on the Hugging Face hub (`owner/name` or
            `owner/name:config`), a `datasets.Dataset`, or a sequence of mappings.
        split: the split to read, `train` if None. A source without splits refuses it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the source cannot be read or is empty, or a record is no object. The message names the place.
        TypeError: a source of another kind.
    """
    if isinstance(source, str | Path):
        records = _read_named(source, split)
    elif _is_dataset(source) or _is_dataset_dict(source):
        records = _dataset_records(source, split, type(source).__name__)
    elif isinstance(source, Sequence):
        _refuse_split(split, "a sequence of records")
        records = source if isinstance(source, Records) else _checked(source, "records", "record")
    else:
        raise TypeError(
            "records must come from a path, the name of a dataset, a datasets.Dataset or a sequence of mappings, "
            f"got {type(source).__name__}"
        )
    if not records:
        raise ValueError(f"{records.source} holds no record")
    return records


def split_held_out(records: Records, share: float) -> tuple[Records, Records]:
    """Return (training, held-out) records, with about `share` of the prompts held out.

    A hash of the prompt decides, so no prompt is on both sides, for any order and number of records. The prompt is the
    field `prompt`, or else the messages before the first turn of the assistant.

    Raises:
        ValueError: `share` is outside (0, 1), or one side would be empty.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"the share that is held out must be between 0 and 1, got {share}")
    sides: tuple[list[int], list[int]] = ([], [])
    for index, record in enumerate(records):
        digest = hashlib.blake2b(_prompt_key(record).encode(), digest_size=8).digest()
        sides[int.from_bytes(digest, "big") < share * 2**64].append(index)
    if not all(sides):
        raise ValueError(
            f"holding out {share:g} of the {len(records)} records of {records.source} leaves {len(sides[0])} for "
            f"training and {len(sides[1])} for evaluation; expected some of both"
        )
    return records.select(sides[0]), records.select(sides[1])


def _prompt_key(record: Mapping[str, Any]) -> str:
    prompt = record.get("prompt")
    if prompt is None:
        turns = record.get("messages") or record.get("chosen")
        prompt = turns
        if isinstance(turns, list):
            roles = [turn.get("role") if isinstance(turn, Mapping) else None for turn in turns]
            prompt = turns[: roles.index("assistant")] if "assistant" in roles else turns
    return json.dumps(prompt, sort_keys=True, default=str)


def _read_named(source: str | Path, split: str | None) -> Records:
    path = Path(source)
    if path.is_dir():
        return _read_folder(path, split)
    if path.is_file():
        _refuse_split(split, f"the file {path}")
        return _read_file(path)
    name = str(source)
    if path.suffix in FILE_KINDS or isinstance(source, Path) or not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"there is no data file {name}")
    return _read_hub(name, split)


def _read_file(path: Path) -> Records:
    match path.suffix:
        case ".jsonl" | ".ndjson":
            return _read_lines(path)
        case ".json":
            content = _parse(path.read_bytes(), str(path))
            if not isinstance(content, list):
                raise ValueError(f"{path} must hold a list of objects, got {type(content).__name__}")
            return _checked(content, str(path), "record")
        case ".parquet":
            return _read_parquet(path)
    raise ValueError(f"a data file must end in {', '.join(FILE_KINDS)}, got {path}")


def _read_lines(path: Path) -> Records:
    found, numbers = [], []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                found.append(_parse(line, f"{path}, line {number}"))
            except ValueError:
                if number == 1 and _is_whole_json(path):
                    raise ValueError(
                        f"{path} must hold one object a line, got one JSON list over several lines: call it .json"
                    ) from None
                raise
            numbers.append(number)
    return _checked(found, str(path), "line", numbers)


def _is_whole_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8-sig")), list)
    except (ValueError, OSError):
        return False


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except ValueError as error:  # of the decoding too
        raise ValueError(f"{place}: expected JSON in UTF-8: {error}") from error


def _read_parquet(path: Path) -> Records:
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise ImportError('parquet files need pyarrow: pip install "fastrl[train]"') from error
    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} could not be read as parquet: {error}") from error
    return Records(rows, source=str(path), unit="row")


def _read_folder(path: Path, split: str | None) -> Records:
    datasets = _datasets()
    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"the folder {path} was not written by datasets.Dataset.save_to_disk") from error
    return _dataset_records(loaded, split, str(path))


def _read_hub(name: str, split: str | None) -> Records:
    datasets = _datasets()
    owner_and_name, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(owner_and_name, config or None, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name!r} is no file here and could not be loaded from the hub: {error}") from error
    return Records(loaded.to_list(), source=name, unit="row")


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise ImportError('saved and hub datasets need datasets: pip install "fastrl[train]"') from error
    return datasets


def _is_dataset(source: Any) -> bool:
    return hasattr(source, "column_names") and hasattr(source, "to_list")


def _is_dataset_dict(source: Any) -> bool:
    return isinstance(source, Mapping) and len(source) > 0 and all(map(_is_dataset, source.values()))


def _dataset_records(dataset: Any, split: str | None, source: str) -> Records:
    if _is_dataset_dict(dataset):
        wanted = split or "train"
        if wanted not in dataset:
            raise ValueError(f"{source} has no split {wanted!r}; expected one of {', '.join(dataset)}")
        return Records(dataset[wanted].to_list(), source=f"{source}, split {wanted}", unit="row")
    _refuse_split(split, source)
    return Records(dataset.to_list(), source=source, unit="row")


def _refuse_split(split: str | None, source: str) -> None:
    if split is not None:
        raise ValueError(f"{source} has no splits, got split={split!r}")


def _checked(found: Sequence[Any], source: str, unit: str, numbers: Sequence[int] | None = None) -> Records:
    records = Records(found, source=source, unit=unit, numbers=numbers)
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            raise ValueError(f"{records.where(index)}: expected an object, got {type(record).__name__}")
    return records
