"""The preference loss from hidden states: parity with the loss on log-probs, GEMM units, blocks, memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from memory import MemoryWatch
from oracle import assert_as_accurate
from torch import Tensor

from fastrl import PreferenceLoss, linear_token_logprobs

ROWS, TIME, WIDTH, VOCABULARY = 8, 6, 5, 13
LOSSES: dict[str, tuple[PreferenceLoss, dict[str, Any], float]] = {
    **{name: (PreferenceLoss.preset(name), {}, 3.0) for name in PreferenceLoss.presets()},
    "aot": (PreferenceLoss.preset("aot"), {}, 4.0),
    "aot_unpaired": (PreferenceLoss.preset("aot_unpaired"), {}, 4.0),
    "kto": (PreferenceLoss.preset("kto", desirable_weight=1.5), {"reference_point": 0.3}, 3.0),
    "kto, own point": (PreferenceLoss.preset("kto"), {}, 4.0),
    "kto, paired mean": (PreferenceLoss.preset("kto", style="openrlhf"), {}, 4.0),
    "kto, mismatched": (
        PreferenceLoss.preset("kto"),
        {"kl_logprobs": -torch.ones(3, 2), "kl_ref_logprobs": -torch.full((3, 2), 1.2)},
        3.0,
    ),
    "bco": (PreferenceLoss.preset("bco"), {"baseline": 0.1}, 3.0),
    "bco, own mean": (PreferenceLoss.preset("bco"), {}, 4.0),
    "smoothed": (PreferenceLoss.preset("sigmoid", label_smoothing=0.1, sft_coef=0.2), {"n_pairs": 7.0}, 3.0),
    "f-divergence": (PreferenceLoss.preset("sigmoid", f_divergence="js_divergence"), {}, 3.0),
    "length desensitised": (PreferenceLoss.preset("sigmoid", ld_alpha=0.4), {}, 3.0),
    "mixture": (PreferenceLoss.mixture([("sigmoid", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]), {"n_tokens": 40.0}, 3.0),
    "mixture with a sort": (PreferenceLoss.mixture([("sigmoid", 0.8), ("aot", 0.2)]), {}, 4.0),
    "wpo": (PreferenceLoss.preset("sigmoid", use_weighting=True), {}, 5.0),
}


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Return hidden states, head, labels and masks with gaps, a row and a whole pair without live tokens."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    mask = torch.rand(ROWS, TIME, generator=generator) < 0.7
    mask[1], mask[[2, 6]] = False, False
    return {
        "hidden": draw(ROWS, TIME, WIDTH),
        "weight": draw(VOCABULARY, WIDTH),
        "bias": draw(VOCABULARY),
        "labels": torch.randint(0, VOCABULARY, (ROWS, TIME), generator=generator),
        "mask": mask,
        "ref_logprobs": -2.0 - draw(ROWS, TIME).abs(),
        "desirable": torch.tensor([1, 0, 0, 1, 1, 0, 1, 0]),
    }


def run(loss: PreferenceLoss, x: dict[str, Tensor], given: dict[str, Any], chunk: int, fused: bool) -> dict[str, Any]:
    """Return loss, gradients, metrics and log-probs, from hidden states or through the log-probs."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("hidden", "weight", "bias")}
    ref = x["ref_logprobs"] if loss.reads_reference else None
    rows = x["desirable"] if loss.unpaired else None
    head = {"bias": leaves["bias"], "chunk_tokens": chunk, "backend": "torch"}
    if fused:
        labels = torch.where(x["mask"], x["labels"], 10**6)
        hidden = torch.where(x["mask"].unsqueeze(-1), leaves["hidden"], math.nan)
        output = loss.from_hidden(
            hidden, leaves["weight"], labels, x["mask"], ref_logprobs=ref, desirable=rows, **head, **given
        )
    else:
        ids = torch.where(x["mask"], x["labels"], -100)
        logprobs = linear_token_logprobs(leaves["hidden"], leaves["weight"], ids, **head)
        more = dict(given)
        if loss.weighting:
            half = linear_token_logprobs(leaves["hidden"], leaves["weight"], ids, temperature=0.5, **head)
            more["log_sum_squared_probs"] = (half.logsumexp - 2.0 * logprobs.logsumexp).detach()
        output = loss.from_logprobs(logprobs.logprobs, x["mask"], ref, desirable=rows, **more)
    (2.5 * output.loss).backward(retain_graph=True)
    grads = {f"grad_{name}": leaf.grad for name, leaf in leaves.items()}
    return {"loss": output.loss.detach().reshape(1), **grads, "metrics": output.metrics}


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_those_of_log_probs(name: str, chunk: int) -> None:
    loss, given, units = LOSSES[name]
    x = batch()
    got, want = run(loss, x, given, chunk, True), run(loss, x, given, chunk, False)
    for key in ("loss", "grad_hidden", "grad_weight", "grad_bias"):
        error, largest = float((got[key] - want[key]).abs().max()), float(want[key].abs().max())
        assert error <= 1e-13 * max(largest, 1.0), f"{key}: error {error:.2e} of {largest:.2e}"
    assert bool(want["grad_weight"].any())
    metrics = got["metrics"]
    for key, (total, count) in want["metrics"].items():
        torch.testing.assert_close((metrics[key][0], metrics[key][1]), (total, count))
    parts = x["mask"].sum(1)
    lengths = parts if loss.unpaired else parts[: ROWS // 2] + parts[ROWS // 2 :]
    twice = float(lengths[lengths > 4 * chunk].sum() / lengths.sum()) if units == 3.0 else 0.0
    assert metrics["path/gemm_units"][0].item() == pytest.approx(units + twice)


@pytest.mark.parametrize("name", ["sigmoid", "simpo", "kto", "orpo"])
def test_float32_is_as_accurate_as_the_path_of_log_probs(name: str) -> None:
    loss, given, _ = LOSSES[name]
    low = batch(torch.float32)
    x = {key: value.double() if value.is_floating_point() else value for key, value in low.items()}
    exact, eager, got = run(loss, x, given, 3, False), run(loss, low, given, 3, False), run(loss, low, given, 3, True)
    for key in ("loss", "grad_hidden", "grad_weight", "grad_bias"):
        assert got[key].dtype == torch.float32
        assert_as_accurate(key, got[key], exact[key], eager[key])


@pytest.mark.parametrize(("name", "units"), [("sigmoid", 2.0), ("aot", 3.0)])
def test_frozen_states_save_the_product_of_their_gradient(name: str, units: float) -> None:
    """The head alone trains: its gradient, and for a loss of sorted pairs the logits a second time."""
    x = batch()
    given = {"labels": x["labels"], "mask": x["mask"], "ref_logprobs": x["ref_logprobs"], "backend": "torch"}
    weight = x["weight"].clone().requires_grad_()
    output = LOSSES[name][0].from_hidden(x["hidden"].detach(), weight, **given)
    assert output.metrics["path/gemm_units"][0].item() == units


def test_a_sum_of_squares_that_would_be_replaced_is_refused() -> None:
    x = batch()
    loss = PreferenceLoss.preset("sigmoid", weighting="wpo")
    given = {"ref_logprobs": x["ref_logprobs"], "log_sum_squared_probs": torch.zeros_like(x["ref_logprobs"])}
    with pytest.raises(TypeError, match="log_sum_squared_probs= is computed here"):
        loss.from_hidden(x["hidden"], x["weight"], x["labels"], x["mask"], **given)
    with pytest.raises(TypeError, match="log_sum_squared_probs= is computed here"):
        loss.from_logits(x["hidden"] @ x["weight"].T, x["labels"], x["mask"], **given)


@pytest.mark.parametrize("name", ["sigmoid", "aot", "kto"])
def test_a_frozen_head_takes_two_units_and_evaluation_one(name: str) -> None:
    loss, given, _ = LOSSES[name]
    x = batch()
    inputs = {"labels": x["labels"], "mask": x["mask"], "backend": "torch", **given}
    if loss.unpaired:
        inputs["desirable"] = x["desirable"]

    def units(hidden: Tensor, weight: Tensor, **reference: Tensor) -> float:
        return loss.from_hidden(hidden, weight, **inputs, **reference).metrics["path/gemm_units"][0].item()

    hidden, ref = x["hidden"].clone().requires_grad_(), {"ref_logprobs": x["ref_logprobs"]}
    assert units(hidden, x["weight"], **ref) == 2
    assert units(hidden, x["weight"], ref_hidden=x["hidden"]) == 3
    assert units(x["hidden"], x["weight"], **ref) == 1
    with torch.no_grad():
        assert units(hidden, x["weight"].clone().requires_grad_(), **ref) == 1
    trained = x["weight"].clone().requires_grad_()
    full = 4 if name == "aot" else 3
    assert units(hidden, trained, **ref) == full
    assert units(hidden, trained, ref_hidden=x["hidden"]) == full + 1
    if name != "aot":
        assert units(x["hidden"], trained, **ref) == 2


def test_the_reference_may_be_the_same_head() -> None:
    """At the start of training the reference is the policy: every log-ratio is 0, and DPO's loss log 2."""
    x = batch()
    weight = x["weight"].clone().requires_grad_()
    loss = PreferenceLoss.preset("sigmoid")
    output = loss.from_hidden(x["hidden"], weight, x["labels"], x["mask"], ref_hidden=x["hidden"], backend="torch")
    assert output.loss.item() == math.log(2.0)


def test_memory_is_a_few_chunks() -> None:
    """Logits of at most 4 chunks are held, and no copy of the hidden states in another order."""
    rows, time, width, vocabulary, chunk = 16, 64, 32, 2048, 32
    hidden = torch.randn(rows, time, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    labels, mask = torch.randint(0, vocabulary, (rows, time)), torch.ones(rows, time)
    loss = PreferenceLoss.preset("simpo")
    with MemoryWatch() as watch:
        loss.from_hidden(hidden, weight, labels, mask, chunk_tokens=chunk, backend="cpu").loss.backward()
    logits = 4 * chunk * vocabulary * 4
    gradients = 2 * (hidden.numel() + weight.numel()) * 4
    assert watch.largest <= logits + 1024
    assert watch.peak <= logits + gradients + 64 * rows * time * 8 + chunk * vocabulary * 4


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("sigmoid", {"ref_logprobs": None}, "needs ref_logprobs"),
        ("simpo", {}, "reads no reference"),
        ("kto", {}, "needs desirable="),
        ("sigmoid", {"desirable": torch.ones(ROWS)}, "desirable is for losses of rows"),
        ("sigmoid", {"mask": torch.ones(ROWS, TIME - 1)}, "mask must have shape"),
        ("sigmoid", {"ref_logprobs": torch.zeros(ROWS, TIME - 1)}, "ref_logprobs must have shape"),
        ("sigmoid", {"tail_mass": 2.0}, "tail_mass"),
        ("sigmoid", {"baseline": 1.0}, "baseline is for losses of rows"),
        ("kto", {"desirable": torch.ones(ROWS - 1), "reference_point": 0.1}, "desirable must have shape"),
    ],
)
def test_bad_input_is_refused(name: str, more: dict[str, Any], message: str) -> None:
    x = batch()
    given = {"mask": x["mask"], "ref_logprobs": x["ref_logprobs"], **more}
    loss = PreferenceLoss.preset(name)
    with pytest.raises(ValueError, match=message):
        loss.from_hidden(
            x["hidden"].clone().requires_grad_(), x["weight"].clone().requires_grad_(), x["labels"], **given
        )


def test_an_odd_number_of_rows_is_refused() -> None:
    hidden, weight = torch.randn(3, 2, 4), torch.randn(7, 4, requires_grad=True)
    with pytest.raises(ValueError, match=r"\(2P, T\), chosen first, got \(3, 2\)"):
        PreferenceLoss.preset("simpo").from_hidden(
            hidden, weight, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)
        )


@pytest.mark.parametrize("label", [-100, -1, 7, -(2**31), 2**40])
def test_a_live_label_that_is_no_id_is_refused_and_a_masked_one_is_not(label: int) -> None:
    """A live -100 would count in the length of its completion with a log-prob of 0."""
    hidden, weight, mask = torch.randn(2, 3, 4), torch.randn(7, 4), torch.tensor([[1, 1, 0], [1, 0, 0]])
    labels, loss = torch.tensor([[1, 2, -100], [3, 99, -7]]), PreferenceLoss.preset("simpo")
    trained = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
    calls = [
        lambda: loss.from_logits(hidden @ weight.t(), labels, mask),
        lambda: loss.from_hidden(hidden, weight, labels, mask),
        lambda: loss.from_hidden(*trained, labels, mask),
    ]
    for call in calls:
        call()
    labels[0, 1] = label
    for call in calls:
        with pytest.raises(ValueError, match=r"labels must be in \[0, V=7\)"):
            call()


@pytest.mark.parametrize("name", ["simpo", "sigmoid", "orpo"])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_pairs_give_zero_with_zero_gradients(name: str, frozen: bool) -> None:
    """An empty rank or micro-batch: the loss is 0, attached, and every gradient is there."""
    hidden = torch.randn(0, 3, 4, requires_grad=True)
    weight = torch.randn(7, 4, requires_grad=not frozen)
    ids, mask = torch.zeros(0, 3, dtype=torch.long), torch.zeros(0, 3, dtype=torch.bool)
    loss = PreferenceLoss.preset(name)
    more = {"ref_logprobs": torch.zeros(0, 3)} if name == "sigmoid" else {}
    output = loss.from_hidden(hidden, weight, ids, mask, **more)
    output.loss.backward()
    assert float(output.loss.detach()) == 0.0
    assert hidden.grad is not None
    if not frozen:
        assert weight.grad is not None
        assert bool((weight.grad == 0).all())
