"""Records from every kind of source, and errors that name the place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fastrl.train.data.records import Records, read_records, split_held_out

datasets = pytest.importorskip("datasets")

ROWS = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, ROWS)) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(tmp_path / "splits")
    return {
        "jsonl": tmp_path / "a.jsonl",
        "json": str(tmp_path / "a.json"),
        "parquet": tmp_path / "a.parquet",
        "saved": tmp_path / "saved",
        "splits": tmp_path / "splits",
        "dataset": dataset,
        "list": ROWS,
        "records": Records(ROWS, source="memory", unit="record"),
    }


@pytest.mark.filterwarnings("default")  # datasets leaves its files to the collector
def test_every_source_gives_the_same_records(sources: dict[str, Any]) -> None:
    for kind, source in sources.items():
        assert list(read_records(source)) == ROWS, kind
    assert list(read_records(sources["splits"], split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match="no split 'dev'; expected one of train, test"):
        read_records(sources["splits"], split="dev")
    for kind in ("jsonl", "saved", "list"):
        with pytest.raises(ValueError, match="has no splits, got split='test'"):
            read_records(sources[kind], split="test")


def test_records_know_their_lines(sources: dict[str, Any]) -> None:
    records = read_records(sources["jsonl"])
    assert records.where(1).endswith("a.jsonl, line 3")  # after an empty line
    assert records.select([5, 1]).where(1) == records.where(1)
    assert read_records(sources["parquet"]).where(0).endswith("a.parquet, row 1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"a\.jsonl, line 2: expected JSON in UTF-8"),
        ("a.jsonl", '{"a": 1}\n[1]\n', r"a\.jsonl, line 2: expected an object, got list"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"a\.jsonl, line 1: expected JSON in UTF-8"),
        ("a.jsonl", "\n", r"a\.jsonl holds no record"),
        ("a.json", '{"a": 1}', r"a\.json must hold a list of objects, got dict"),
        ("a.json", '[{"a": 1}, 2]', r"a\.json, record 2: expected an object, got int"),
        ("a.parquet", "no parquet", r"a\.parquet could not be read as parquet"),
        ("a.csv", "a,b", r"must end in \.jsonl, \.ndjson, \.json, \.parquet, got .*a\.csv"),
    ],
)
def test_wrong_files_are_refused_with_the_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_records(tmp_path / name)


def test_wrong_sources_are_refused(tmp_path: Path) -> None:
    for missing in ("none.jsonl", tmp_path / "none", "a/b/c", "no such name"):
        with pytest.raises(FileNotFoundError, match="there is no data file"):
            read_records(missing)
    with pytest.raises(ValueError, match="was not written by"):
        read_records(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        read_records(3)
    with pytest.raises(ValueError, match="holds no record"):
        read_records([])


def test_no_prompt_is_on_both_sides_whatever_the_order() -> None:
    rows = [{"prompt": f"{n % 50}?", "completion": str(n)} for n in range(200)]
    train, held_out = split_held_out(read_records(rows), 0.2)
    assert len(train) + len(held_out) == 200
    assert 20 <= len(held_out) <= 60
    assert not {r["prompt"] for r in train} & {r["prompt"] for r in held_out}
    again = split_held_out(read_records(rows[::-1]), 0.2)[1]
    assert sorted(r["completion"] for r in again) == sorted(r["completion"] for r in held_out)
    talks = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]}
        for row in rows
    ]
    sides = split_held_out(read_records(talks), 0.2)
    asked = [{r["messages"][0]["content"] for r in side} for side in sides]
    assert not asked[0] & asked[1]


def test_a_split_leaves_something_on_both_sides() -> None:
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        split_held_out(read_records(ROWS), 1.0)
    with pytest.raises(ValueError, match="leaves 40 for training and 0 for evaluation"):
        split_held_out(read_records(ROWS), 1e-6)
