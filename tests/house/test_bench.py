"""The benchmark harness: it times what is right, refuses what is wrong, and reports what it measured."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu, measure, oracle, plots, record, report, samples, sparse, targets, tiles
from bench.baselines import EAGER, Contender, Missing, Outputs, contenders, fastrl_contender
from bench.cases import MODELS, OPERATIONS, Case, make_inputs, tiny_cases
from bench.suite import run_case, run_cases

CPU = torch.device("cpu")
ONE_ROUND = measure.Plan(repeats=2, warmups=0)
OURS = [fastrl_contender(), EAGER]


def tiny(operation: str, model: str = "tiny") -> Case:
    return Case(operation, MODELS[model], 4, 16)


def wrong(factor: float, name: str = "dhidden") -> Contender:
    """Return eager PyTorch with one result multiplied by a factor."""

    def prepare(inputs):
        run = EAGER.prepare(inputs)

        def spoilt() -> Outputs:
            outputs = run()
            return outputs._replace(**{name: getattr(outputs, name) * factor})

        return spoilt

    return Contender("wrong", tuple(OPERATIONS), prepare)


def invented_record(kind: str = "cpu") -> dict:
    """Return a record with round numbers, as `run_case` makes them."""

    def timed(name: str, units: float) -> dict:
        spread = {"median": units, "q25": units, "q75": units}
        errors = {
            "logprobs": {"error": 1e-6, "granted": 1e-5, "relative": 1e-7},
            "dhidden": {"error": 1e-8, "granted": 1e-7, "relative": 1e-6},
        }
        times = {"seconds": spread, "units": spread, "repeats": 3}
        return {"name": name, "status": "ok", "errors": errors, **times, "peak_bytes": 10**6}

    def case(operation: str, *records: dict) -> dict:
        floor = {"name": "floor: one GEMM", "median": 1.0, "q25": 1.0, "q75": 1.0, "repeats": 3, "per_second": 1e11}
        described = {**tiny(operation).describe(), "mean_entropy": 1.0, "live_tokens": 64}
        return {**described, "floor": floor, "contenders": list(records)}

    made = record.new_record(kind, CPU, {})
    made["results"] = [
        case("loss_hidden", timed("fastrl", 3.0), timed("PyTorch eager", 4.0), timed("TRL chunked log-prob", 2.0),
             {"name": "broken", "status": "refused: wrong", "reason": "dhidden"},
             {"name": "absent", "status": "missing", "reason": "not installed"}),
        case("loss_hidden_half", timed("fastrl", 1.5)),
        case("logprobs_hidden", timed("fastrl", 1.2)),
    ]  # fmt: skip
    made["targets"] = targets.cpu_targets(made["results"])
    return made


@pytest.mark.parametrize("case", tiny_cases(), ids=lambda case: f"{case.operation}-{case.model.name}")
def test_every_operation_is_judged_and_timed(case: Case) -> None:
    result = run_case(case, CPU, ONE_ROUND, OURS)
    assert [c["status"] for c in result["contenders"]] == ["ok", "ok"]
    expected = {"logprobs"} if not case.trains else {"loss", "logprobs"}
    if case.trains:
        expected |= {"dlogits"} if case.from_logits else {"dhidden", "dweight"}
    if case.operation == "loss_hidden_frozen":
        expected -= {"dweight"}
    for contender in result["contenders"]:
        assert set(contender["errors"]) == expected
        assert contender["units"]["q25"] <= contender["units"]["median"] <= contender["units"]["q75"]
        assert contender["repeats"] == 2
        assert contender["peak_bytes"] > 0
    assert result["live_tokens"] == (32 if case.operation == "loss_hidden_half" else 64)
    json.dumps(result)


@pytest.mark.parametrize(("operation", "name"), [
    ("loss_hidden", "dhidden"), ("loss_hidden", "dweight"), ("loss_hidden", "loss"),
    ("logprobs_hidden", "logprobs"), ("loss_logits", "dlogits"),
])  # fmt: skip
def test_a_contender_that_is_wrong_is_refused_and_not_timed(operation: str, name: str) -> None:
    result = run_case(tiny(operation), CPU, ONE_ROUND, [*OURS, wrong(1.001, name)])
    (refused,) = (c for c in result["contenders"] if c["name"] == "wrong")
    assert refused["status"] == "refused: wrong"
    assert name in refused["reason"]
    assert "seconds" not in refused
    assert "peak_bytes" not in refused


def test_a_contender_that_leaves_a_gradient_out_is_refused() -> None:
    def prepare(inputs):
        run = EAGER.prepare(inputs)
        return lambda: run()._replace(dweight=None)

    lazy = Contender("lazy", ("loss_hidden",), prepare)
    result = run_case(tiny("loss_hidden"), CPU, ONE_ROUND, [lazy])
    assert result["contenders"][0]["reason"] == "dweight is missing"


def test_a_contender_that_returns_nan_is_refused() -> None:
    result = run_case(tiny("loss_hidden"), CPU, ONE_ROUND, [wrong(float("nan"))])
    assert result["contenders"][0]["status"] == "refused: wrong"


def test_a_contender_that_cannot_run_says_why() -> None:
    def missing(inputs):
        raise Missing("no such thing")

    def failing(inputs):
        raise RuntimeError("out of luck\nand more")

    everyone = [Contender("missing", ("loss_hidden",), missing), Contender("failing", ("loss_hidden",), failing)]
    absent, failed = run_case(tiny("loss_hidden"), CPU, ONE_ROUND, everyone)["contenders"]
    assert absent == {"name": "missing", "status": "missing", "reason": "no such thing"}
    assert failed == {"name": "failing", "status": "failed", "reason": "RuntimeError: out of luck"}


def test_a_declared_error_is_granted_to_gradients_only() -> None:
    inputs = make_inputs(tiny("loss_hidden"))
    eager = EAGER.prepare(inputs)()
    judge = oracle.Judge.of(inputs, eager)
    assert eager.dhidden is not None
    assert eager.loss is not None
    near = eager._replace(dhidden=eager.dhidden * (1 + 1e-4))
    assert judge(near).complaint is not None
    assert judge(near, declared_error=2e-4).complaint is None
    off = eager._replace(loss=eager.loss * (1 + 1e-4))
    assert judge(off, declared_error=2e-4).complaint is not None


def test_masked_logprobs_are_not_judged() -> None:
    inputs = make_inputs(tiny("loss_hidden_half"))
    eager = EAGER.prepare(inputs)()
    assert eager.logprobs is not None
    garbage = eager._replace(logprobs=torch.where(inputs.mask.bool(), eager.logprobs, torch.nan))
    assert oracle.Judge.of(inputs, eager)(garbage).complaint is None


def test_the_exact_results_are_those_of_one_piece() -> None:
    inputs = make_inputs(tiny("loss_hidden", "tiny-softcap"))
    assert inputs.hidden is not None
    assert inputs.weight is not None
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    logits = 30.0 * torch.tanh(hidden @ weight.t() / 30.0)
    logprobs = logits.log_softmax(-1).gather(-1, inputs.labels.reshape(-1, 1)).view(inputs.mask.shape)
    ratio, advantage = (logprobs - inputs.old_logprobs).exp(), inputs.advantages.unsqueeze(-1).double()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    loss.backward()
    exact = oracle.exact_outputs(inputs)
    assert hidden.grad is not None
    assert weight.grad is not None
    for found, wanted in ((exact.loss, loss), (exact.dhidden, hidden.grad), (exact.dweight, weight.grad)):
        assert found is not None
        torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-15)


def test_turns_are_taken_and_warmups_thrown_away() -> None:
    calls: list[str] = []
    actions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measure.measure(actions, CPU, measure.Plan(repeats=2, warmups=1))
    assert "".join(calls) == "abccbaabc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2, "c": 2}


def test_no_round_begins_after_the_budget() -> None:
    seconds = measure.measure({"a": lambda: None}, CPU, measure.Plan(repeats=50, budget_s=0.0))
    assert len(seconds["a"]) == 3


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def action() -> torch.Tensor:
        first = torch.ones(1000)
        return torch.cat((first, first))

    assert measure.peak_bytes(action, CPU) == pytest.approx(3 * 4000, abs=256)


def test_units_are_multiples_of_the_floor_of_the_same_round() -> None:
    found = measure.summary([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert found["units"] == {"median": 2.0, "q25": 2.0, "q75": 2.0}
    assert found["seconds"]["median"] == 4.0


def test_the_memory_of_a_half_precision_head() -> None:
    """Bytes of the formula: a GPU's GEMMs need the logits' gradient in the head's precision, a CPU's do not."""
    rows, n, d, v = 2048, 8192, 4096, 151936
    single = targets.hidden_bytes(rows, n, d, v, 4, on_gpu=True)
    assert single == rows * v * 4 + v * d * 4 + n * d * 4 == targets.hidden_bytes(rows, n, d, v, 4, on_gpu=False)
    half = targets.hidden_bytes(rows, n, d, v, 2, on_gpu=True)
    assert half - targets.hidden_bytes(rows, n, d, v, 2, on_gpu=False) == rows * v * 2 + 16384 * d * 4
    # A small tile is gone when the head's gradient is cast.
    assert targets.hidden_bytes(8, n, d, v, 2, on_gpu=True) == v * d * 4 + n * d * 2 + v * d * 2


def test_targets_are_computed() -> None:
    verdicts = {target["what"]: target for target in invented_record()["targets"]}
    assert verdicts["hidden in, training, trainable head"]["status"] == "met"
    assert verdicts["half the rows masked"]["measured"] == 0.5
    assert verdicts["hidden in, forward"]["status"] == "missed"
    against_trl = verdicts["the same, against TRL's chunked log-prob"]
    assert against_trl["status"] == "not measured" or against_trl["measured"] == pytest.approx(2 / 3)
    assert verdicts["logits in, loss + gradient, against eager"]["status"] == "not measured"
    assert "the case did not run" in verdicts["logits in, loss + gradient, against eager"]["reason"]


def test_the_record_says_where_it_came_from(tmp_path: Path) -> None:
    made = invented_record()
    assert made["machine"]["cores"] >= 1
    assert made["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "fastrl" in made["versions"]
    path = record.save(made, tmp_path)
    assert path.name == f"cpu-{made['date'][:10]}.json"
    assert record.load(path) == made
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="schema 1"):
        record.load(tmp_path / "other.json")


def test_the_table_stands_between_its_markers_and_says_where_fastrl_loses(tmp_path: Path) -> None:
    results = tmp_path / "results"
    older = invented_record()
    older["date"] = "2000-01-01T00:00:00+00:00"
    record.save(older, results)
    record.save(invented_record(), results)
    page = tmp_path / "benchmarks.md"
    page.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n")
    command.main(["table", "--page", str(page), "--results", str(results)])
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:cpu -->\n")
    assert text.endswith("\n<!-- /bench:cpu -->\nafter\n")
    assert "old\n" not in text
    assert "2000-01-01" not in text
    assert "| TRL chunked log-prob | 2.00 s ± 0% | 2.00 | 1.50x SLOWER |" in text
    assert "| PyTorch eager | 4.00 s ± 0% | 4.00 | 1.33x faster |" in text
    assert "less accurate than eager PyTorch may be: broken." in text
    assert "Could not run on this machine: absent" in text
    again = text
    command.main(["table", "--page", str(page), "--results", str(results)])
    assert page.read_text() == again


def test_the_page_of_benchmarks_holds_the_committed_records() -> None:
    """Every number between the markers is the newest committed record's, and writing it again changes nothing."""
    text = (record.ROOT / "docs" / "benchmarks.md").read_text()
    records = record.newest(record.RESULTS)
    kinds = re.findall(r"<!-- bench:(\w+) -->", text)
    assert "cpu" in kinds
    for kind in kinds:
        assert report.fill_markers(text, kind, report.markdown(records[kind])) == text, "run python -m bench table"


def test_the_page_of_sparse_rows_holds_the_committed_record() -> None:
    """Each row of its table is a row of the newest record of `python -m bench sparse`."""
    page = (record.ROOT / "docs" / "sparse-rows.md").read_text()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "| T = " in line]
    measured = sparse.table(record.newest(record.RESULTS)["sparse"]["sparse"])[1:]
    found = {(entry.split(",")[0], *rest[:2]): (entry, *rest[2:4], *rest[5:]) for entry, *rest in measured}
    assert len(shown) == 21
    for name, tail_mass, places, *numbers in shown:
        temperature, _, entropy = name.removeprefix("T = ").partition(", ")
        entry, *expected = found[(f"{float(temperature):g}", tail_mass, places)]
        assert entropy in entry
        assert [number.replace(" %", "%") for number in numbers] == expected


@pytest.mark.parametrize("text", ["nothing", "<!-- bench:cpu -->", "<!-- /bench:cpu --> <!-- bench:cpu -->"])
def test_a_file_without_proper_markers_is_left_alone(text: str, tmp_path: Path) -> None:
    page = tmp_path / "benchmarks.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"bench:cpu|no marker"):
        report.write_tables(page, {"cpu": invented_record()})
    assert page.read_text() == text


def test_charts_are_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    charts = plots.write_charts(invented_record(), tmp_path, "cpu-x")
    assert [path.name for path in charts] == ["cpu-x-time.png", "cpu-x-memory.png", "cpu-x-error.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in charts)


def test_the_gpu_run_goes_through_its_steps_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "tiny_cases", lambda: [tiny("loss_hidden"), tiny("loss_logits")])
    monkeypatch.setattr("bench.suite.contenders", lambda: OURS)
    made = gpu.run_gpu(tmp_path, dry_run=True, parts=("cases", "experiments"))
    assert [result["operation"] for result in made["results"]] == ["loss_hidden", "loss_logits"]
    assert made["skipped"] == []
    assert set(made["experiments"]) == {"gemm", "tiles", "chunks"}
    assert all(spread["median"] > 0 for spread in made["experiments"]["chunks"][0]["seconds_by_chunk"].values())
    assert not any("failed" in entry for entries in made["experiments"].values() for entry in entries)
    (path,) = tmp_path.iterdir()
    assert record.load(path)["targets"] == made["targets"]


def test_a_gpu_run_without_a_gpu_is_refused(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="--dry-run"):
        gpu.run_gpu(tmp_path)


def test_a_gpu_case_that_fails_or_is_late_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(case: Case, device: torch.device, plan: measure.Plan) -> dict:
        raise torch.OutOfMemoryError("no room")

    made: dict = {"results": [], "skipped": []}
    monkeypatch.setattr(gpu, "run_case", out_of_memory)
    clock = gpu.Clock(100.0)
    gpu._run_cases(made, CPU, [tiny("loss_hidden")], ONE_ROUND, clock, lambda: None)
    assert made["skipped"][0]["reason"] == "OutOfMemoryError: no room"
    gpu._run_cases(made, CPU, [tiny("loss_logits")], ONE_ROUND, gpu.Clock(-1.0), lambda: None)
    assert made["skipped"][1]["reason"] == "out of time"


def test_tiles_are_put_back() -> None:
    launch = pytest.importorskip("fastrl_kernels.launch")
    kernel = tiles.kernels()["token_logprobs backward"]
    before = kernel.module.BWD_TILES

    def stopped() -> None:
        with tiles.one_tile(kernel, launch.Tile(64, 4)):
            assert launch.tile_for(kernel.module.BWD_TILES, torch.bfloat16, 10**6).block == 64
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert kernel.module.BWD_TILES is before


def test_tiles_of_every_kernel_are_timed_and_the_best_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kept: list[int] = []
    found = tiles.sweep(
        CPU, (70,), ((32, 1), (3, 1)), row_bytes=300, repeats=1, kept=lambda found: kept.append(len(found))
    )
    assert kept == list(range(1, len(found) + 1))
    assert {entry["kernel"] for entry in found} == set(tiles.kernels())
    assert [entry["dtype"] for entry in found] == ["bfloat16"] * 3 + ["float32"] * 4
    for entry in found:
        assert "failed" in entry["seconds"]["3x1"]  # no power of two
        assert tiles.best(entry) == ("32x1", entry["seconds"]["32x1"]["median"])
    assert len(tiles.table(found)) == len(found) + 1
    assert tiles.sweep(CPU, (70,), ((32, 1),), row_bytes=300, repeats=1, limit_s=-1.0) == []
    assert tiles.best({"seconds": {"copy": {"median": 1.0}, "32x1": {"failed": "no room"}}}) is None


def test_the_gpu_lane_is_collected_where_little_is_installed() -> None:
    """The other test files import what a rented device need not have, and a file that cannot be imported ends a run."""
    files = gpu.gpu_test_files()
    assert "tests/kernels/test_token_logprobs.py" in files
    assert "tests/kernels/test_gpu.py" in files
    for file in files:
        text = (record.ROOT / file).read_text()
        assert not re.search(r"^(import|from) (transformers|trl|yaml|datasets|safetensors|matplotlib)", text, re.M), (
            file
        )


def test_contenders_offer_known_operations_under_names_of_their_own() -> None:
    everyone = contenders()
    assert len({c.name for c in everyone}) == len(everyone)
    assert all(set(c.operations) <= set(OPERATIONS) for c in everyone)


def test_peaked_rows_have_the_entropy_of_a_sharp_policy() -> None:
    inputs = make_inputs(Case("loss_hidden_peaked", MODELS["SmolLM2-135M"], 1, 48))
    assert 0.2 < inputs.mean_entropy < 0.7


def test_a_case_without_its_model_is_skipped_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(temperature: float, tokens: int) -> samples.Samples:
        raise Missing(f"no model for {tokens} tokens at {temperature}")

    monkeypatch.setattr("bench.cases.samples", absent)
    monkeypatch.setattr("bench.suite.contenders", lambda: OURS)
    made = invented_record()
    made["skipped"] = []
    sampled = Case("loss_hidden_sampled", MODELS["SmolLM2-135M"], 1, 8)
    assert run_cases([sampled], CPU, ONE_ROUND, made["skipped"]) == []
    assert "loss_hidden_sampled (SmolLM2-135M): skipped: no model for 8 tokens at 0.5" in report.terminal(made)
    with pytest.raises(ValueError, match="must be of SmolLM2-135M, got tiny"):
        tiny("loss_hidden_sampled")


def test_a_model_that_cannot_be_had_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("FASTRL_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FASTRL_SMOLLM2_WHEEL", str(tmp_path / "absent.whl"))
    with pytest.raises(Missing, match="the samples need the model 'smollm2'"):
        samples.samples(0.5, 8)


def test_cost_and_error_of_lists_are_measured(tmp_path: Path, seed: int) -> None:
    """Peaked rows of a small head: lists save rows, and the error of each setting is about what it may leave out."""
    n, d, v = 32, 16, 3000
    weight = torch.randn(v, d)
    labels = torch.randint(0, v, (n,))
    given = samples.Samples(0.5 * torch.randn(n, d) + weight[labels], labels, weight, 0.5)
    records = sparse.measure_samples(given, [(1e-3, 32), (1e-3, 93), (1e-2, 93)], ONE_ROUND)
    assert [(r["tail_mass"], r["places"]) for r in records] == [(0.0, None), (1e-3, 32), (1e-3, 93), (1e-2, 93)]
    assert records[0]["error_hidden"] == records[0]["error_weight"] == records[0]["sparse_rows"] == 0.0
    assert 0 < records[1]["sparse_rows"] <= records[2]["sparse_rows"] <= records[3]["sparse_rows"] <= 1
    assert all(0 < r["left_max"] <= r["tail_mass"] for r in records[1:])
    assert all(0 < r["error_hidden"] < 20 * r["tail_mass"] for r in records[1:])
    assert len(sparse.table(records)) == 5
    pytest.importorskip("matplotlib")
    assert sparse.plot(records, tmp_path / "sparse.png").read_bytes().startswith(b"\x89PNG")
    made = record.new_record("sparse", CPU, {})
    path = record.save({**made, "sparse": records}, tmp_path, prefix="sparse-")
    assert path.name.startswith("sparse-cpu-")
    assert record.newest(tmp_path)["sparse"]["sparse"] == records


def test_an_unknown_operation_is_refused() -> None:
    with pytest.raises(ValueError, match="operation must be one of"):
        tiny("loss")
