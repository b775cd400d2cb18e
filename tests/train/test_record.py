"""The record of a run: what is kept of it, and what is refused."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from run_folder import write_run

from fastrl import cli
from fastrl.train.run import record
from fastrl.train.run.record import FILES, summary, write_record


def timed(steps: int) -> list[dict]:
    return [{"step": step, "loss": 1.0 / step, "time/step": 2.0 + step} for step in range(1, steps + 1)]


def test_a_record_holds_the_small_files_of_a_run_and_a_summary(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics=timed(12))
    (run / "model").mkdir()
    (run / "model" / "weights").write_bytes(b"large")
    kept = tmp_path / "reports" / "run"
    files = write_record(run, kept)
    assert sorted(path.name for path in kept.iterdir()) == sorted([*FILES, "summary.json"])
    assert sorted(files) == sorted(kept.iterdir())
    for name in FILES:
        assert (kept / name).read_bytes() == (run / name).read_bytes()
    written = json.loads((kept / "summary.json").read_text())
    assert written["steps"] == 12
    assert written["training_seconds"] == 12 * 2.0 + 78.0
    (gain,) = written["gains"]
    assert (gain["split"], gain["mode"], gain["measure"]) == ("held_out", "sampled", "accuracy")
    assert gain["before"] == {"step": 0, "value": 0.1, "standard_error": 0.03, "n": 100}
    assert gain["after"] == {"step": 12, "value": 0.5, "standard_error": 0.04, "n": 100}
    assert gain["in_standard_errors"] == pytest.approx(8.0)


def test_a_number_that_is_not_known_is_none(tmp_path: Path) -> None:
    entries = [{"step": s, "measure": "length", "value": 4.0 + s} for s in (0, 12)]
    found = summary(write_run(tmp_path, evaluations=entries))
    assert found["training_seconds"] is None  # these metrics have no time
    (gain,) = found["gains"]
    assert (gain["difference"], gain["in_standard_errors"]) == (12.0, None)
    assert gain["before"]["standard_error"] is None
    json.dumps(found, allow_nan=False)


def test_a_record_is_replaced_and_other_files_stay(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    write_record(write_run(tmp_path / "first", metrics=timed(12)), kept)
    (kept / "README.md").write_text("why")
    write_record(write_run(tmp_path / "second", metrics=timed(3), evaluations=[]), kept)
    assert json.loads((kept / "summary.json").read_text())["steps"] == 3
    assert (kept / "README.md").read_text() == "why"


def test_what_is_no_record_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run")
    with pytest.raises(ValueError, match="a folder of its own, got that of the run"):
        write_record(run, tmp_path / "kept" / ".." / "run")
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        write_record(tmp_path / "nowhere", tmp_path / "kept")
    (run / "environment.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no environment\.json; a record takes config\.json"):
        write_record(run, tmp_path / "kept")
    write_run(run)
    monkeypatch.setattr(record, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="at most 1,000 bytes together, got"):
        write_record(run, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, kept = write_run(tmp_path / "run"), tmp_path / "kept"
    assert cli.main(["report", str(run), "--record", str(kept)]) == 0
    assert capsys.readouterr().out == f"{kept}\n"
    assert (kept / "summary.json").is_file()
    assert (run / "report.html").is_file()
