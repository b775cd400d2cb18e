"""The record of a run: its content, and refusals."""

import json
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from run_folder import write_run

from fastrl import cli
from fastrl.train.run import record
from fastrl.train.run.record import MAX_ROWS, summary, write_record


def timed(steps: int) -> list[dict]:
    return [{"step": step, "loss": 1.0 / step, "time/step": 2.0 + step} for step in range(1, steps + 1)]


def test_a_record_is_a_summary_and_the_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", metrics=timed(12))
    (run / "model").mkdir()
    (run / "model" / "weights").write_bytes(b"large")
    kept = tmp_path / "reports" / "run"
    files = write_record(run, kept)
    assert sorted(path.name for path in kept.iterdir()) == ["curves.png", "summary.json"]
    assert sorted(files) == sorted(kept.iterdir())
    assert (kept / "curves.png").read_bytes() == (run / "curves.png").read_bytes()
    written = json.loads((kept / "summary.json").read_text())
    assert written["steps"] == 12
    assert written["training_seconds"] == 12 * 2.0 + 78.0
    (gain,) = written["gains"]
    assert (gain["split"], gain["mode"], gain["measure"]) == ("held_out", "sampled", "accuracy")
    assert gain["before"] == {"step": 0, "value": 0.1, "standard_error": 0.03, "n": 100}
    assert gain["after"] == {"step": 12, "value": 0.5, "standard_error": 0.04, "n": 100}
    assert gain["in_standard_errors"] == pytest.approx(8.0)
    for name, file in (("settings", "config"), ("environment", "environment"), ("evaluations", "evaluations")):
        assert written[name] == json.loads((run / f"{file}.json").read_text())
    assert written["metrics"]["loss"] == {"first": 1.0, "last": 0.0833333, "min": 0.0833333, "max": 1.0}
    assert written["curve"]["columns"] == ["step", "loss"]
    assert written["curve"]["rows"] == [[step, float(f"{1.0 / step:.6g}")] for step in range(1, 13)]


@pytest.mark.parametrize("steps", [1, 2, MAX_ROWS, MAX_ROWS + 1, 399])
def test_the_curve_is_short_and_has_the_first_and_the_last_step(tmp_path: Path, steps: int) -> None:
    rows = summary(write_run(tmp_path, metrics=timed(steps)))["curve"]["rows"]
    assert len(rows) == min(steps, MAX_ROWS)
    assert (rows[0][0], rows[-1][0]) == (1, steps)
    assert sorted({step for step, _ in rows}) == [step for step, _ in rows]


def test_a_row_of_the_curve_is_a_line_of_the_file(tmp_path: Path) -> None:
    write_record(write_run(tmp_path / "run"), tmp_path / "kept")
    text = (tmp_path / "kept" / "summary.json").read_text()
    assert text.count("\n   [") == 12
    assert json.loads(text) == summary(tmp_path / "run")


def test_a_number_that_is_not_known_is_none(tmp_path: Path) -> None:
    entries = [{"step": s, "measure": "length", "value": 4.0 + s} for s in (0, 12)]
    entries.append({"step": 13, "measure": "length", "value": float("nan")})
    found = summary(write_run(tmp_path, evaluations=entries))
    assert found["evaluations"][-1]["value"] is None
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
