"""The report: gains, gaps, missing files, hostile completions, and one file that needs nothing else."""

import math
import re

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from run_folder import write_run

from fastrl.train.run.curves import Series, _drawings, _painted, draw_curves, smoothed
from fastrl.train.run.measure import ACCURACY, PERPLEXITY, Measure, Measurement
from fastrl.train.run.report import EvaluationPoint, Gain, gains, read_run, write_report


def test_the_report_is_one_small_file_that_needs_no_network(tmp_path):
    path = write_report(write_run(tmp_path / "run1"))
    page = path.read_text()
    assert path.name == "report.html"
    assert (tmp_path / "run1" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 500_000
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert "10.0 %" in page
    assert "50.0 %" in page
    assert "+40.0 points = +8.0 standard errors" in page
    for expected in ("1 + 1 =", "three", "rewards.accuracy", "2.13.0", "step 0 &rarr; 12, 100 problems"):
        assert expected in page


def test_gains_against_hand_arithmetic():
    points = [
        EvaluationPoint(0, 0.1, 0.03, 100),
        EvaluationPoint(5, math.nan, math.nan, 0),
        EvaluationPoint(9, 0.5, 0.04, 100),
    ]
    train = [EvaluationPoint(0, 0.9, 0.0, 0), EvaluationPoint(9, 0.8, 0.0, 0)]
    held_out, trained = gains(
        {Series("train", ""): train, Series("held_out", "greedy"): points, Series("lonely", ""): points[:1]}
    )
    assert (held_out.series.split, held_out.before.step, held_out.after.step) == ("held_out", 0, 9)
    assert held_out.difference == pytest.approx(0.4)
    assert held_out.standard_error == pytest.approx(0.05)
    assert held_out.in_standard_errors == pytest.approx(8.0)
    assert trained.series.split == "train"
    assert math.isnan(Gain(Series("train", ""), *train).in_standard_errors)


def test_a_missing_standard_error_is_that_of_a_share(tmp_path):
    entries = [{"step": s, "accuracy": 0.5, "n": 100} for s in (0, 4)]
    points = read_run(write_run(tmp_path, evaluations=entries)).evaluations[Series("held_out", "")]
    assert [point.standard_error for point in points] == pytest.approx([0.05, 0.05])


def test_a_step_evaluated_twice_counts_once(tmp_path):
    entries = [{"step": s, "accuracy": a, "n": 10} for s, a in ((0, 0.1), (4, 0.2), (4, 0.3))]
    points = read_run(write_run(tmp_path, evaluations=entries)).evaluations[Series("held_out", "")]
    assert [(point.step, point.value) for point in points] == [(0, 0.1), (4, 0.3)]


def measurements(measure: Measure, first: float, last: float) -> list[dict[str, object]]:
    return [
        Measurement(step, value, standard_error=0.3, n=40, measure=measure).record()
        for step, value in ((0, first), (12, last))
    ]


@pytest.mark.parametrize(
    ("measure", "first", "last", "expected"),
    [
        (
            PERPLEXITY,
            12.34,
            5.5,
            ["held-out perplexity (lower is better)", "12.34", "-6.84 = -16.1", "change up", "40 ex"],
        ),
        (PERPLEXITY, 5.5, 12.34, ["+6.84 = +16.1 standard errors", "change down"]),
        (Measure("reward margin"), -0.25, 1.5, ["held-out reward margin<", ">-0.25<", "+1.75 = +4.1", "change up"]),
        (Measure("win rate", share=True), 0.5, 0.75, ["held-out win rate<", "75.0 %", "+25.0 points", "change up"]),
        (Measure("completion length", "neither"), 9.0, 30.0, ["held-out completion length<", "+21 =", "change same"]),
        (ACCURACY, 0.5, 0.25, ["held-out accuracy<", "-25.0 points", "change down", "40 problems"]),
    ],
)
def test_other_measures_have_their_own_label_unit_and_direction(tmp_path, measure, first, last, expected):
    page = write_report(write_run(tmp_path, evaluations=measurements(measure, first, last))).read_text()
    for text in expected:
        assert text in page


def test_each_measure_has_its_own_panel_and_gain(tmp_path):
    both = [*measurements(PERPLEXITY, 9.0, 4.0), *measurements(ACCURACY, 0.1, 0.6)]
    run = read_run(write_run(tmp_path, evaluations=both))
    assert [(gain.series.measure, gain.difference) for gain in gains(run.evaluations)] == [
        (PERPLEXITY, -5.0),
        (ACCURACY, 0.5),
    ]
    curves = {key: ([0, 12], [p.value for p in points], [0.3, 0.3]) for key, points in run.evaluations.items()}
    assert [*plan_panels([], curves)] == [
        "Perplexity, held-out (±\u00a0standard\u00a0error)",
        "Accuracy, held-out (±\u00a0standard\u00a0error)",
    ]


def test_a_long_title_stays_above_its_own_panel():
    names = ["reward accuracy", "mean log-ratio of mismatched completions to the reference", "an" + "unbroken" * 9]
    curves = {Series("held_out", "", Measure(name)): ([0, 9], [0.1, 0.4], [0.1, 0.1]) for name in names}
    canvas = _painted(_drawings([], curves))
    axes = canvas.figure.axes
    assert len(axes) == len(names)
    ends = [*(axis.get_window_extent().x0 for axis in axes[1:]), canvas.get_width_height()[0]]
    for axis, end in zip(axes, ends, strict=True):
        title = axis._left_title.get_window_extent()
        assert title.x1 <= end
        assert title.y0 >= axis.get_window_extent().y1


def test_a_measure_has_a_name_and_a_known_direction():
    with pytest.raises(ValueError, match="better must be one of higher, lower, neither, got 'up'"):
        Measure("length", better="up")
    with pytest.raises(ValueError, match="must not be empty"):
        Measure("")


@pytest.mark.parametrize(
    "missing",
    [("config",), ("samples",), ("environment",), ("evaluations",), ("metrics",), ("config", "samples", "environment")],
)
def test_missing_files_are_left_out_and_said_to_be(tmp_path, missing):
    page = write_report(write_run(tmp_path, **dict.fromkeys(missing))).read_text()
    for name in set(missing) & {"config", "samples", "environment"}:
        assert f"{name}.json was not recorded." in page
    assert ("no gain to report" in page) == ("evaluations" in missing)


@pytest.mark.parametrize("value", [None, "x", True, 1e300, -1e300, 0.0])
def test_odd_values_do_not_break_it(tmp_path, value):
    odd = [{"step": step, "reward": value, "kl": value, "time/rollout": value, "grad_norm": step} for step in (1, 2, 3)]
    evaluations = [{"step": step, "accuracy": value, "standard_error": value, "n": value} for step in (0, 3)]
    samples = [{"step": 0, "prompt": value, "completion": value, "reward": value}, {"prompt": "no step"}, "no object"]
    write_report(write_run(tmp_path, metrics=odd, evaluations=[*evaluations, "no object", {}], samples=samples))


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_any_number_of_steps(tmp_path, steps):
    write_report(write_run(tmp_path, steps=steps))
    assert write_report(write_run(tmp_path, steps=steps)).stat().st_size < 500_000


def test_hostile_completions_are_shown_as_text(tmp_path):
    hostile = "<script>alert(1)</script>\" ' & </pre></td>\ud800\x00" + "x" * 100_000
    samples = [
        {"step": step, "prompt": hostile, "completion": hostile, "reward": 0, "answer": hostile} for step in (0, 9)
    ]
    config = {hostile: hostile}
    path = write_report(write_run(tmp_path, samples=samples, config=config))
    page = path.read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "more characters)" in page
    assert path.stat().st_size < 500_000


def test_what_is_not_a_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds neither metrics\.jsonl nor evaluations\.json"):
        write_report(tmp_path)
    write_run(tmp_path, config=[1])
    with pytest.raises(ValueError, match=r"config\.json must hold a dict, got list"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json must be JSON"):
        write_report(tmp_path)


def test_smoothing_has_no_bias_at_the_start_and_keeps_constants():
    assert smoothed(np.full(50, 3.0)) == pytest.approx(np.full(50, 3.0))
    assert smoothed(np.array([5.0, 1.0])).tolist() == [5.0, 1.0]  # too short to smooth
    noisy = np.random.default_rng(0).normal(size=400)
    assert smoothed(noisy)[100:].std() < 0.3


def test_the_names_that_the_loop_logs_are_drawn():
    names = [
        "loss",
        "reward",
        "reward_std",
        "reward/exact",
        "reward/format",
        "kl",
        "rollout_kl",
        "entropy",
        "clip_fraction",
        "clip_fraction_low",
        "grad_norm",
        "completion_length",
        "completion_length_max",
        "truncated_fraction",
        "frac_reward_zero_std",
        "tokens_per_second",
        "learning_rate",
        "time/rollout",
        "time/backward",
        "time/step",
    ]
    once = {"step": 1, "approx_kl_old": 0.0}
    metrics = [once, *({"step": step, **dict.fromkeys(names, 0.5)} for step in range(2, 6))]
    panels = plan_panels(metrics)
    assert panels == {
        "Reward": ["reward"],
        "Parts of the reward": ["exact", "format"],
        "Loss": ["loss"],
        "KL divergence": ["kl"],
        "Entropy": ["entropy"],
        "Clipped tokens": ["clip fraction", "low"],
        "Gradient norm": ["grad norm"],
        "Completion length (tokens)": ["completion length", "max"],
        "Shares": ["truncated fraction", "frac reward zero std"],
        "Tokens per second": ["tokens per second"],
        "Learning rate": ["learning rate"],
        "Seconds per step": ["rollout", "backward"],
    }


def plan_panels(metrics: list[dict], evaluated: dict | None = None) -> dict[str, list[str]]:
    """Draw onto real axes, and return the labels of each panel."""
    from matplotlib.figure import Figure

    shown = {}
    for draw in _drawings(metrics, evaluated or {}):
        axis = Figure().add_subplot()
        draw(axis)
        handles, labels = axis.get_legend_handles_labels()
        assert len(handles) == len(labels)
        shown[axis.get_title(loc="left") or axis.get_title()] = labels
    return shown


def test_curves_without_anything_are_an_empty_picture():
    assert draw_curves([], {}).startswith(b"\x89PNG")
