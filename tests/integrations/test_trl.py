"""fastrl in place of TRL's chunked log-prob function: the values, the contract, and the switch."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

pytest.importorskip("trl")

import trl.kernels
import trl.trainer.utils as utils

from fastrl.integrations import trl as fast
from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.integrations.trl import _logprobs

ORIGINAL = utils._ChunkedLogProbFunction
COMPACT = utils._use_triton
ALL = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
N, D, V = 70, 24, 61


@pytest.fixture(autouse=True)
def _restored() -> Any:
    """Leave TRL as it was found, and prove anew in every test."""
    _logprobs.proofs.forget()
    yield
    fast.disable()
    assert utils._ChunkedLogProbFunction is ORIGINAL


def head(dtype: torch.dtype, *, bias: bool, frozen: bool = False) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(*shape, generator=generator).to(dtype) for shape in ((N, D), (V, D), (V,))]
    labels = torch.randint(0, V, (N,), generator=generator)
    # Some labels are the most likely ones.
    logits = made[0].float() @ made[1].float().T + (made[2].float() if bias else 0.0)
    labels[::3] = logits.argmax(-1)[::3]
    hidden, weight, offsets = made[0].requires_grad_(), made[1], made[2] if bias else None
    if not frozen:
        weight.requires_grad_()
        if offsets is not None:
            offsets.requires_grad_()
    return SimpleNamespace(hidden=hidden, weight=weight, bias=offsets, labels=labels)


def objective(logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    weights = torch.linspace(-1.0, 2.0, N, dtype=logprobs.dtype)
    total = (weights * logprobs).sum()
    return total if entropy is None else total + (weights.flip(0) * entropy).sum()


def eager(h: SimpleNamespace, temperature: float, cap: float | None, scale: float, dtype: torch.dtype) -> list[Tensor]:
    """Return [logprobs, entropy, log sum p^2, mean logits, gradients...] of PyTorch's eager code in `dtype`."""
    leaves = [
        None if x is None else x.detach().to(dtype).requires_grad_(x.requires_grad)
        for x in (h.hidden, h.weight, h.bias)
    ]
    hidden, weight, bias = leaves
    logits = hidden @ weight.T + (0.0 if bias is None else bias)
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    logp = logits.log_softmax(-1)
    logprobs, entropy = logp.gather(-1, h.labels[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)
    gradients = torch.autograd.grad(
        objective(logprobs, entropy), [x for x in leaves if x is not None and x.requires_grad]
    )
    return [logprobs, entropy, (2.0 * logp).logsumexp(-1), logits.mean(-1), *gradients]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("temperature", "cap", "scale", "bias"), [(1.0, None, 1.0, False), (0.7, 4.0, 0.5, True)], ids=["plain", "all"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_function_is_as_accurate_as_pytorch(
    dtype: torch.dtype, temperature: float, cap: float | None, scale: float, bias: bool, frozen: bool
) -> None:
    h = head(dtype, bias=bias, frozen=frozen)
    leaves = [x for x in (h.hidden, h.weight, h.bias) if x is not None and x.requires_grad]
    with fast.patched():
        found = utils._ChunkedLogProbFunction.apply(
            h.hidden, h.weight, h.bias, h.labels, temperature, 16, cap, scale, ALL
        )
    assert [x.dtype for x in found[:4]] == [torch.float32] * 4
    assert not any(x.requires_grad for x in found[2:])
    gradients = torch.autograd.grad(objective(found[0], found[1]), leaves)
    exact, low = (eager(h, temperature, cap, scale, d) for d in (torch.float64, dtype))
    for name, ours, true, rough in zip(
        (*ALL[:4], "dx", "dw", "db"), (*found[:4], *gradients), exact, low, strict=False
    ):
        assert_as_accurate(name, ours.detach(), true.detach(), rough.detach())
    theirs = ORIGINAL.apply(h.hidden, h.weight, h.bias, h.labels, temperature, 16, cap, scale, ALL)
    assert torch.equal(found[4], theirs[4])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_logits_are_those_of_trl(dtype: torch.dtype, bias: bool) -> None:
    """`round_logits=True` reads the logits that TRL reads: log-probs differ by float32 rounding, not by bf16's."""
    h = head(dtype, bias=bias)
    call = (h.hidden, h.weight, h.bias, h.labels, 0.7, 16, 4.0, 0.5, ALL)
    theirs = ORIGINAL.apply(*call)
    found = []
    for rounds in (True, False):
        with fast.patched(round_logits=rounds):
            found.append(utils._ChunkedLogProbFunction.apply(*call))
    gradients = [torch.autograd.grad(objective(x[0], x[1]), h.weight)[0] for x in (theirs, *found)]
    far = [float((x[0] - theirs[0]).detach().abs().max()) for x in found]
    assert far[0] <= 8.0 * torch.finfo(torch.float32).eps * float(theirs[0].detach().abs().max()) < far[1]
    assert float((gradients[1] - gradients[0]).abs().max()) <= torch.finfo(dtype).eps * float(gradients[0].abs().max())


def test_two_roundings_at_once_are_refused() -> None:
    with fast.patched(round_logits=True):
        with fast.patched():
            pass
        with pytest.raises(ValueError, match="round_logits=False, but fastrl is on with True"):
            fast.enable(round_logits=False)
    with pytest.raises(TypeError, match="round_logits must be"), fast.patched(round_logits=1):  # type: ignore[arg-type]
        pass
    assert all(bound())


@pytest.mark.parametrize("outputs", [("log_probs",), ("log_probs", "entropy", "is_top1"), ("log_probs", "mean_logits")])
def test_only_what_is_asked_for_is_returned(outputs: tuple[str, ...]) -> None:
    h = head(torch.float32, bias=False)
    with fast.patched():
        found = utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, None, h.labels, 1.0, 16, None, 1.0, outputs)
    assert [name for name, x in zip(ALL, found, strict=True) if x is not None] == list(outputs)
    found[0].sum().backward()
    assert h.weight.grad is not None


def test_frozen_head_keeps_unit_gradients() -> None:
    """Log-probs alone, with a frozen head, have their gradient ready: the same as through the logits again."""
    h = head(torch.float32, bias=True, frozen=True)
    with fast.patched():
        found = utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, h.bias, h.labels, 0.9, 16, None, 1.0, ALL)
        assert found[0].grad_fn.saved_tensors[4].shape == (N, D)
    (gradient,) = torch.autograd.grad(objective(found[0], None), h.hidden)
    results = []
    for dtype in (torch.float64, torch.float32):
        hidden = h.hidden.detach().to(dtype).requires_grad_()
        logp = ((hidden @ h.weight.to(dtype).T + h.bias.to(dtype)) / 0.9).log_softmax(-1)
        results += torch.autograd.grad(objective(logp.gather(-1, h.labels[:, None]).squeeze(-1), None), hidden)
    assert_as_accurate("dx", gradient, *results)


def test_autocast_projects_in_its_dtype() -> None:
    h = head(torch.float32, bias=True)
    low = SimpleNamespace(**{k: v.bfloat16() if v.is_floating_point() else v for k, v in vars(h).items()})
    with fast.patched(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, h.bias, h.labels, 1.0, 16, None, 1.0, ALL)
        # A float32 bias is added to the float32 logits as it is.
        alone = utils._ChunkedLogProbFunction.apply(low.hidden, low.weight, h.bias, low.labels, 1.0, 16, None, 1.0, ALL)
    assert torch.equal(found[0], alone[0])
    found[0].sum().backward()
    assert h.weight.grad.dtype == h.hidden.grad.dtype == torch.float32


def test_no_tokens() -> None:
    h = head(torch.float32, bias=False)
    with fast.patched():
        found = utils._ChunkedLogProbFunction.apply(h.hidden[:0], h.weight, None, h.labels[:0], 1.0, 16, None, 1.0, ALL)
    assert all(x.shape == (0,) for x in found)
    found[0].sum().backward()
    assert bool((h.weight.grad == 0).all())


def test_a_tie_with_an_earlier_id_is_no_top1_prediction() -> None:
    weight = torch.zeros(V, D)
    weight[7], weight[20] = 1.0, 1.0
    hidden, labels = torch.ones(2, D), torch.tensor([7, 20])
    with fast.patched():
        found = utils._ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 16, None, 1.0, ALL)
    assert found[4].tolist() == [True, False]


def test_create_graph_is_refused() -> None:
    h = head(torch.float32, bias=False)
    with fast.patched():
        found = utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, None, h.labels, 1.0, 16)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(found[0].sum(), h.hidden, create_graph=True)


@pytest.mark.parametrize(
    ("argument", "value"), [("temperature", 0.0), ("outputs", ("log_probs", "p")), ("targets", None)]
)
def test_bad_calls_are_refused(argument: str, value: Any) -> None:
    h = head(torch.float32, bias=False)
    call: dict[str, Any] = {"temperature": 1.0, "outputs": ALL, "targets": h.labels}
    call[argument] = torch.full((N,), V) if argument == "targets" else value
    with fast.patched(), pytest.raises((ValueError, ZeroDivisionError)):
        utils._ChunkedLogProbFunction.apply(
            h.hidden, h.weight, None, call["targets"], call["temperature"], 16, None, 1.0, call["outputs"]
        )


# --- the proof --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["temperature", "softcap", "logit_scale"])
def test_a_wrong_head_is_refused_on_first_use(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    h = head(torch.float32, bias=False)
    right = _logprobs.request_of

    def wrong(*arguments: Any) -> Any:
        made = right(*arguments)
        return _logprobs.Request(
            **{**vars(made), field: {"temperature": 0.9, "softcap": 9.0, "logit_scale": 1.1}[field]}
        )

    with fast.patched():
        monkeypatch.setattr(_logprobs, "request_of", wrong)
        monkeypatch.setattr(_logprobs.FusedLogProbFunction, "original", PlainHead())
        with pytest.raises(AdapterMismatchError, match="does not reproduce the host"):
            utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, None, h.labels, 1.0, 16)


class PlainHead:
    """TRL's function, called with the plain head whatever it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def apply(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Any:
        self.calls += 1
        return ORIGINAL.apply(hidden, weight, bias, labels, 1.0, 16, None, 1.0, rest[-1])


def test_each_setting_is_proved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    h = head(torch.float32, bias=False)
    with fast.patched():
        probe = PlainHead()
        monkeypatch.setattr(_logprobs.FusedLogProbFunction, "original", probe)
        for _ in range(3):
            utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, None, h.labels, 1.0, 16)
        assert probe.calls == 1
        utils._ChunkedLogProbFunction.apply(h.hidden, h.weight, None, h.labels, 1.0, 16, None, 1.0, ("log_probs",))
    assert probe.calls == 2


# --- the switch -------------------------------------------------------------------------------------------------------


def bound() -> list[bool]:
    return [x is ORIGINAL for x in (utils._ChunkedLogProbFunction, trl.kernels.ChunkedLogProbFunction)] + [
        utils._use_triton is COMPACT
    ]


def test_patched_restores_the_originals() -> None:
    assert all(bound())
    assert not fast.enabled()
    with fast.patched():
        assert not any(bound())
        assert fast.enabled()
        with fast.patched():
            assert not any(bound())
        assert not any(bound())
    assert all(bound())
    with pytest.raises(KeyError), fast.patched():
        raise KeyError
    assert all(bound())


def test_enable_and_disable() -> None:
    fast.enable()
    fast.enable()
    with fast.patched():
        pass
    assert not any(bound())
    fast.disable()
    assert all(bound())
    fast.disable()
    assert all(bound())
    with fast.patched():
        fast.enable()
        fast.disable()
        assert not any(bound())
    assert all(bound())


def test_a_foreign_patch_is_left_and_named() -> None:
    other = object()
    with pytest.warns(RuntimeWarning, match=r"trl\.trainer\.utils\._use_triton was replaced"), fast.patched():
        utils._use_triton = other
    assert utils._use_triton is other
    utils._use_triton = COMPACT
    assert all(bound())


def test_another_signature_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Changed:
        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> None: ...

    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    with pytest.raises(
        RuntimeError, match=r"not supported: .*forward takes \(ctx, hidden, weight\), expected \(ctx, hid"
    ):
        fast.enable()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match=r"_ChunkedLogProbFunction does not exist; .* was tested with 1"):
        fast.enable()
    monkeypatch.undo()
    assert not fast.enabled()


def test_without_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    with pytest.raises(ImportError, match=r"pip install 'fastrl\[trl\]'"), fast.patched():
        pass


def test_importing_the_adapter_imports_no_trl() -> None:
    code = "import sys, fastrl.integrations.trl; print(sorted({'trl', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
