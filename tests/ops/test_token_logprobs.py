"""`token_logprobs` on every backend against float64, and what users feed it."""

import math

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor
from vocabulary_cases import BACKENDS, VOCABULARIES, draw, exact, patterns, upstream

import fastrl
from fastrl import token_logprobs

NAMES = ("logprobs", "entropy", "logsumexp", "gradient")
OPTIONS = {
    "plain": {},
    "all": {"temperature": 0.7, "logit_scale": 0.25, "softcap": 5.0},
    "hot": {"temperature": 10.0},
    "cold": {"temperature": 0.1},
}


def run(logits: Tensor, labels: Tensor, grads: tuple[Tensor | None, ...], backend: str, **options) -> tuple:  # type: ignore[no-untyped-def]
    leaf = logits.detach().clone().requires_grad_()
    outputs = token_logprobs(leaf, labels, backend=backend, **options)
    total = sum((g * x).sum() for g, x in zip(grads, outputs, strict=True) if g is not None)
    total.backward()
    return (*(x.detach() for x in outputs), leaf.grad)


def judge(logits: Tensor, labels: Tensor, backend: str, **options) -> None:  # type: ignore[no-untyped-def]
    grads = upstream(labels.numel())
    results = run(logits, labels, grads, backend, **options)
    want = exact(logits, labels, grads, torch.float64, **options)
    eager = exact(logits, labels, grads, torch.float32, **options)
    for name, result, right, plain in zip(NAMES, results, want, eager, strict=True):
        assert_as_accurate(name, result, right, plain, dtype=logits.dtype if name == "gradient" else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_vocabulary_sizes(vocabulary: int, backend: str) -> None:
    judge(*draw(5, vocabulary), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_options_and_dtypes(options: dict, dtype: torch.dtype, backend: str) -> None:
    judge(*draw(6, 1025, dtype), backend, **options)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocabulary", [4, 1030])
@pytest.mark.parametrize("name", patterns(4))
def test_hard_rows(name: str, vocabulary: int, backend: str) -> None:
    logits, labels = patterns(vocabulary)[name]
    if name == "target_banned":
        # log p = -inf, so its gradient is judged without an upstream gradient on the log-prob.
        grads = (None, *upstream(4)[1:])
        results, want = run(logits, labels, grads, backend), exact(logits, labels, grads, torch.float64)
        eager = exact(logits, labels, grads, torch.float32)
        for each in zip(NAMES, results, want, eager, strict=True):
            assert_as_accurate(*each)
        return
    judge(logits, labels, backend)
    judge(logits, labels, backend, temperature=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_common_offset_of_a_million_keeps_the_entropy(backend: str) -> None:
    """At an offset of 1e6 float32 logits are multiples of 1/16; the results are those of the rounded logits."""
    logits, labels = draw(6, 1025)
    shifted = logits + 1e6
    result, want = token_logprobs(shifted, labels, backend=backend), exact(shifted, labels, upstream(6), torch.float64)
    assert float((result.entropy - want[1]).abs().max()) < 1e-5
    assert float((result.logprobs - want[0]).abs().max()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [6e-6, 1e-7, 1e-9, 1e-12])
def test_target_gradient_near_certainty(gap: float, backend: str) -> None:
    """p - 1 and log p keep their relative precision at 1 - p = `gap`, where 1 - p is below float32's resolution."""
    logits = torch.zeros(1, 64)
    logits[0, 7] = math.log(63 / gap)
    labels = torch.tensor([7])
    got = run(logits, labels, (torch.ones(1), None, None), backend)
    want = exact(logits, labels, (torch.ones(1), None, None), torch.float64)
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5)
    assert got[3][0, 7].item() == pytest.approx(want[3][0, 7].item(), rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_stays_float64(backend: str) -> None:
    logits, labels = draw(5, 300, torch.float64)
    grads = tuple(g.double() for g in upstream(5))
    results, want = run(logits, labels, grads, backend), exact(logits, labels, grads, torch.float64)
    for name, result, right in zip(NAMES, results, want, strict=True):
        assert result.dtype == torch.float64
        assert float((result - right).abs().max()) < 1e-12 * max(1.0, float(right.abs().max())), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_are_float32_and_the_gradient_has_the_logits_dtype(dtype: torch.dtype, backend: str) -> None:
    results = run(*draw(3, 40, dtype), upstream(3), backend)
    assert [r.dtype for r in results] == [torch.float32] * 3 + [dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_per_token_temperature(backend: str) -> None:
    logits, labels = draw(6, 500)
    temperature = torch.tensor([0.5, 1.0, 2.0, 0.1, 10.0, 0.7])
    judge(logits, labels, backend, temperature=temperature)
    both = token_logprobs(logits.view(2, 3, -1), labels.view(2, 3), temperature=temperature.view(2, 3), backend=backend)
    assert torch.equal(
        both.logprobs.view(-1), token_logprobs(logits, labels, temperature=temperature, backend=backend)[0]
    )
    row = token_logprobs(
        logits.view(2, 3, -1), labels.view(2, 3), temperature=torch.tensor([[2.0], [3.0]]), backend=backend
    )
    assert torch.equal(
        row.logprobs[0], token_logprobs(logits[:3], labels[:3], temperature=2.0, backend=backend).logprobs
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_temperature_leaves_float64_logits_their_precision(backend: str) -> None:
    logits, labels = draw(6, 31, torch.float64)
    temperature = torch.tensor([0.5, 1.1, 2.3, 0.1, 10.0, 0.7])
    result = token_logprobs(logits, labels, temperature=temperature, backend=backend)
    want = token_logprobs(logits, labels, temperature=temperature.double(), backend=backend)
    assert all(torch.equal(one, other) for one, other in zip(result, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ignored_rows_cannot_matter(backend: str) -> None:
    logits, labels = draw(6, 200)
    labels[1] = labels[4] = -100
    poisoned = logits.clone()
    poisoned[1], poisoned[4, :] = math.nan, math.inf
    grads = upstream(6)
    bad_grads = tuple(torch.where(labels == -100, math.nan, g) for g in grads)
    clean, dirty = run(logits, labels, grads, backend), run(poisoned, labels, bad_grads, backend)
    live = labels != -100
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[live], b[live])
        assert torch.equal(b[~live], torch.zeros_like(b[~live]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_without_a_gradient_cannot_matter(backend: str) -> None:
    """A row of NaN whose outputs are selected away has the gradient 0, and the other rows theirs."""
    logits, labels = draw(5, 60)
    labels[1] = 3
    keep = torch.tensor([True, False, False, True, False])
    spoilt = logits.clone()
    spoilt[1], spoilt[2, 3], spoilt[4, 4] = math.nan, math.inf, -math.inf
    found = []
    for given in (logits, spoilt):
        leaf = given.clone().requires_grad_()
        outputs = token_logprobs(leaf, labels, backend=backend)
        torch.stack([torch.where(keep, x, 0.0).sum() for x in outputs]).sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)
    assert not found[1][~keep].any()
    assert found[1][keep].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_on_live_rows_stay_visible(backend: str) -> None:
    logits, labels = draw(4, 50)
    labels[1] = 3
    logits[0, 5], logits[1, 6], logits[2, :] = math.nan, math.inf, -math.inf
    result = token_logprobs(logits, labels, backend=backend)
    assert bool(result.logprobs[:3].isnan().all())
    assert bool(result.logprobs[3].isfinite())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rows_bits_do_not_depend_on_the_batch(backend: str) -> None:
    logits, labels = draw(77, 1003)
    whole = token_logprobs(logits, labels, backend=backend)
    order = torch.randperm(77, generator=torch.Generator().manual_seed(0))
    permuted = token_logprobs(logits[order], labels[order], backend=backend)
    single = token_logprobs(logits[40:41], labels[40:41], backend=backend)
    strided = token_logprobs(torch.nn.functional.pad(logits, (0, 3))[:, :1003], labels, backend=backend)
    for all_rows, shuffled, one, other in zip(whole, permuted, single, strided, strict=True):
        assert torch.equal(all_rows[order], shuffled)
        assert torch.equal(all_rows[40:41], one)
        assert torch.equal(all_rows, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice(backend: str) -> None:
    logits, labels = draw(9, 1200)
    for a, b in zip(*(run(logits, labels, upstream(9), backend) for _ in range(2)), strict=True):
        assert torch.equal(a, b)


def _layouts() -> dict[str, Tensor]:
    dense, _ = draw(8, 96)
    wide = torch.full((8, 300), math.nan)
    wide[:, 5:101] = dense
    spaced = torch.full((8, 192), math.nan)
    spaced[:, ::2] = dense
    return {
        "dense": dense,
        "column_slice": wide[:, 5:101],
        "vocabulary_stride_2": spaced[:, ::2],
        "transposed": dense.t().contiguous().t(),
        "every_other_row": torch.stack((dense, dense * math.nan), 1).view(16, 96)[::2],
        "expanded_row": dense[:1].expand(8, 96),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", _layouts())
def test_any_layout(name: str, backend: str) -> None:
    logits = _layouts()[name]
    _, labels = draw(8, 96)
    result = token_logprobs(logits, labels, backend=backend)
    want = token_logprobs(logits.contiguous(), labels, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(result, want, strict=True))
    leaf = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(token_logprobs(leaf, labels, backend=backend).logprobs.sum(), leaf)
    dense = logits.contiguous().requires_grad_()
    (expected,) = torch.autograd.grad(token_logprobs(dense, labels, backend=backend).logprobs.sum(), dense)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_next_token_slice_is_not_copied(backend: str) -> None:
    """`logits[:, :-1]` cannot be viewed as rows; it is taken block by block, with the values of the copy."""
    logits = draw(4 * 6, 64)[0].view(4, 6, 64)
    labels = torch.randint(0, 64, (4, 5), generator=torch.Generator().manual_seed(1))
    leaf, copy = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    sliced = token_logprobs(leaf[:, :-1], labels, temperature=torch.full((4, 5), 0.5), backend=backend)
    dense = token_logprobs(copy[:, :-1].contiguous(), labels, temperature=0.5, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(sliced, dense, strict=True))
    sliced.logprobs.sum().backward()
    dense.logprobs.sum().backward()
    assert torch.equal(leaf.grad, copy.grad)
    assert not leaf.grad[:, -1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_upstream_gradients_of_any_kind(backend: str) -> None:
    logits, labels = draw(5, 60)
    for grad in (torch.tensor(2.0).expand(5), torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), torch.arange(10.0)[::2] / 4):
        leaf = logits.clone().requires_grad_()
        token_logprobs(leaf, labels, backend=backend).logprobs.backward(grad)
        want = exact(logits, labels, (grad, None, None), torch.float64)[3]
        plain = exact(logits, labels, (grad, None, None), torch.float32)[3]
        assert_as_accurate("gradient", leaf.grad, want, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_output_alone_has_its_gradient(backend: str) -> None:
    logits, labels = draw(5, 60)
    for i in range(3):
        grads = tuple(g if i == j else None for j, g in enumerate(upstream(5)))
        got, want = run(logits, labels, grads, backend)[3], exact(logits, labels, grads, torch.float64)[3]
        assert_as_accurate(NAMES[i], got, want, exact(logits, labels, grads, torch.float32)[3])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_inputs_untouched(backend: str) -> None:
    logits, labels = draw(5, 60)
    leaf, before = logits.clone().requires_grad_(), logits.clone()
    result = token_logprobs(leaf, labels, backend=backend)
    grads = upstream(5)
    total = sum((g * x).sum() for g, x in zip(grads, result, strict=True))
    (first,) = torch.autograd.grad(total, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(total, leaf)
    assert torch.equal(first, second)
    assert torch.equal(leaf.detach(), before)
    assert all(torch.equal(g, h) for g, h in zip(grads, upstream(5), strict=True))


def test_second_derivative_is_refused_by_name() -> None:
    logits, labels = draw(3, 20)
    result = token_logprobs(logits.requires_grad_(), labels, backend="torch")
    with pytest.raises(RuntimeError, match="create_graph=True is not supported"):
        torch.autograd.grad(result.logprobs.sum(), logits, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_empty_batch(shape: tuple[int, ...], backend: str) -> None:
    logits = torch.zeros(*shape, 7, requires_grad=True)
    result = token_logprobs(logits, torch.zeros(shape, dtype=torch.int64), backend=backend)
    assert result.logprobs.shape == shape
    sum(x.sum() for x in result).backward()
    assert logits.grad is not None
    assert logits.grad.shape == (*shape, 7)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])
def test_more_rows_than_a_grid_axis_holds(backend: str) -> None:
    """The Triton kernel's grid is tested with the kernel: the interpreter would take minutes for these rows."""
    n = 65_537
    logits, labels = torch.randn(n, 2), torch.zeros(n, dtype=torch.int64)
    result = token_logprobs(logits, labels, backend=backend)
    assert torch.allclose(result.logprobs, logits.log_softmax(-1)[:, 0], atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_labels_and_scalar_rows(backend: str) -> None:
    logits, labels = draw(4, 30)
    narrow = token_logprobs(logits, labels.int(), backend=backend)
    assert torch.equal(narrow.logprobs, token_logprobs(logits, labels, backend=backend).logprobs)
    assert token_logprobs(logits[0], labels[0], backend=backend).logprobs.shape == ()


@pytest.mark.parametrize("bad", [-1, -100, 30, 31, 10**6])
def test_labels_out_of_range_are_refused_on_a_cpu(bad: int) -> None:
    logits, labels = draw(4, 30)
    labels[1], labels[2] = 0, bad
    with pytest.raises(ValueError, match=r"labels must be in \[0, V=30\)"):
        token_logprobs(logits, labels, ignore_index=-7)


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan, math.inf])
def test_temperatures_that_mean_nothing_are_refused(bad: float) -> None:
    logits, labels = draw(4, 30)
    with pytest.raises(ValueError, match="temperature must be finite"):
        token_logprobs(logits, labels, temperature=bad)
    with pytest.raises(ValueError, match="temperature must be finite"):
        token_logprobs(logits, labels, temperature=torch.tensor([1.0, bad, 1.0, 1.0]))


def test_temperature_none_is_one_and_shapes_are_checked() -> None:
    logits, labels = draw(4, 30)
    assert torch.equal(token_logprobs(logits, labels, temperature=None)[0], token_logprobs(logits, labels)[0])
    with pytest.raises(ValueError, match="broadcastable"):
        token_logprobs(logits, labels, temperature=torch.ones(3))
    with pytest.raises(TypeError, match="temperature must be a number"):
        token_logprobs(logits, labels, temperature="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"logits": torch.zeros(4, 30, dtype=torch.int64)}, TypeError, "logits must be float32"),
        (
            {"logits": torch.zeros(4, 30, device="meta"), "labels": torch.zeros(4, dtype=torch.int64, device="meta")},
            ValueError,
            "meta",
        ),
        ({"logits": torch.zeros(4, 30).to_sparse()}, TypeError, "dense"),
        ({"logits": [1.0]}, TypeError, "torch.Tensor"),
        ({"labels": torch.zeros(4)}, TypeError, "int64 or int32"),
        ({"labels": torch.zeros(4, dtype=torch.int16)}, TypeError, "int64 or int32"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape \(4,\), got \(5,\)"),
        ({"labels": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "labels must be on cpu, got meta"),
        ({"softcap": 0.0}, ValueError, "softcap must be finite and > 0"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite"),
        ({"logit_scale": 0.0}, ValueError, "logit_scale must not be 0"),
        ({"backend": "cuda11"}, ValueError, "backend must be one of 'auto'"),
    ],
)
def test_bad_arguments_name_what_was_expected(arguments: dict, error: type, message: str) -> None:
    given = {"logits": torch.zeros(4, 30), "labels": torch.zeros(4, dtype=torch.int64)} | arguments
    with pytest.raises(error, match=message):
        token_logprobs(given.pop("logits"), given.pop("labels"), **given)


def test_no_grad_and_inference_mode() -> None:
    logits, labels = draw(4, 30)
    with torch.no_grad():
        assert not token_logprobs(logits.requires_grad_(), labels).logprobs.requires_grad
    with torch.inference_mode():
        inside = logits * 1.0
        result = token_logprobs(inside, labels)
    assert torch.equal(result.logprobs, token_logprobs(logits.detach(), labels).logprobs)


def test_checkpointing_recomputes_the_same_bits() -> None:
    logits, labels = draw(4, 30)
    leaf = logits.clone().requires_grad_()

    def step(x: Tensor) -> Tensor:
        return token_logprobs(x * 2.0, labels).logprobs.sum()

    torch.utils.checkpoint.checkpoint(step, leaf, use_reentrant=False).backward()
    plain = logits.clone().requires_grad_()
    step(plain).backward()
    assert torch.equal(leaf.grad, plain.grad)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    logits, labels = draw(4, 30)
    arguments = (logits.requires_grad_(), labels, None, 1.0, 1.0, 0.0, -100, backend)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.fastrl.token_logprobs.default, arguments, test_utils=checks)


def test_explain_names_a_backend_for_every_operation() -> None:
    lines = fastrl.explain("cpu")
    assert set(lines) == {
        "token_logprobs",
        "linear_token_logprobs",
        "row_statistics",
        "policy_loss",
        "group_advantages",
        "segment_sum",
        "reverse_scan",
    }
    assert fastrl.explain("cpu", backend="torch")["token_logprobs"].startswith("torch: asked for by name")
    assert fastrl.explain("cuda", backend="cpu")["token_logprobs"].startswith("refused: backend 'cpu' needs")


def test_explain_tells_of_row_statistics() -> None:
    """The C++ kernels have none: what is told is what `row_statistics` does."""
    assert fastrl.explain("cpu")["row_statistics"].startswith("torch: neither the C++ kernels")
    assert fastrl.explain("cpu", backend="cpu")["row_statistics"].startswith("refused: backend 'cpu' (C++) has no row")
    assert fastrl.explain("cuda")["row_statistics"].startswith("triton: ")


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own, on entering forward mode
@pytest.mark.parametrize("leaf", [False, True])
@pytest.mark.parametrize("name", ["logits", "hidden", "weight", "bias", "statistics"])
def test_forward_mode_is_refused_rather_than_zero(name: str, leaf: bool) -> None:
    hidden, weight, bias, labels = torch.randn(3, 4), torch.randn(7, 4), torch.randn(7), torch.tensor([0, 6, 2])
    logits = hidden @ weight.T

    def linear(**changed: Tensor) -> Tensor:
        tensors = {"hidden": hidden, "weight": weight, "bias": bias} | changed
        return fastrl.linear_token_logprobs(labels=labels, **tensors).logprobs

    calls = {
        "logits": (logits, lambda x: token_logprobs(x, labels).logprobs),
        "hidden": (hidden, lambda x: linear(hidden=x)),
        "weight": (weight, lambda x: linear(weight=x)),
        "bias": (bias, lambda x: linear(bias=x)),
        "statistics": (logits, lambda x: fastrl.row_statistics(x, labels).logprobs),
    }
    primal, call = calls[name]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(primal.clone().requires_grad_(leaf), torch.ones_like(primal))
        with pytest.raises(NotImplementedError, match="reverse mode only"):
            call(dual)
    with pytest.raises(NotImplementedError, match="reverse mode only"):
        torch.func.jvp(call, (primal,), (torch.ones_like(primal),))


@pytest.mark.parametrize("ignore_index", [1.5, True, "-100", None])
def test_ignore_index_that_is_no_int_is_named(ignore_index: object) -> None:
    with pytest.raises(TypeError, match="ignore_index must be an int, got"):
        token_logprobs(torch.randn(2, 5), torch.tensor([0, 1]), ignore_index=ignore_index)  # type: ignore[arg-type]
