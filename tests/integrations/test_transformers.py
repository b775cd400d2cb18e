"""The patched forward of transformers models: the same numbers, no logits, nothing left behind when it is undone."""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from memory import MemoryWatch
from oracle import assert_as_accurate
from tiny_families import FAMILIES, SIZES, VOCABULARY, tiny_batch, tiny_family
from torch import Tensor

from fastrl.integrations.common.proof import AdapterMismatchError
from fastrl.integrations.transformers import patch, patching, unpatch


def _gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _next_labels(labels: Tensor) -> Tensor:
    return F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()


def _of_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, (B, T), from logits."""
    log_p = torch.log_softmax(logits.detach().to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    live = labels != -100
    chosen = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(live, chosen, 0.0), torch.where(live, -(log_p.exp() * log_p).sum(-1), 0.0)


def _in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def _alone_and_patched(model: Any, inputs: dict[str, Any]) -> tuple[Any, dict[str, Tensor], Any, dict[str, Tensor]]:
    """Return (output, gradients) of the model's own forward, then of the patched one."""
    theirs = model(**inputs)
    gradients = _gradients(model, theirs.loss)
    with patch(model):
        ours = model(**inputs)
        return theirs, gradients, ours, _gradients(model, ours.loss)


# --- the numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_its_numbers(family: str) -> None:
    model = tiny_family(family)
    inputs = tiny_batch(family, model)
    labels = _next_labels(inputs["labels"])
    twin = copy.deepcopy(model).double()
    exact = twin(**_in_double(inputs))
    exact_grads = _gradients(twin, exact.loss)
    eager = model(**inputs)
    eager_grads = _gradients(model, eager.loss)
    with patch(model):
        ours = model(**inputs)
        our_grads = _gradients(model, ours.loss)
    assert_as_accurate("loss", ours.loss, exact.loss, eager.loss)
    for name, got, want, plain in zip(
        ("logprobs", "entropy"),
        (ours.logprobs, ours.entropy),
        _of_logits(exact.logits, labels),
        _of_logits(eager.logits, labels),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert_as_accurate(name, got, want, plain)
    assert our_grads.keys() == exact_grads.keys()
    for name, want in exact_grads.items():
        assert_as_accurate(f"gradient of {name}", our_grads[name], want, eager_grads[name])


@pytest.mark.parametrize("family", ["llama", "mixtral", "llava", "gemma2"])
def test_every_other_field_of_the_output_is_the_hosts(family: str) -> None:
    model = tiny_family(family)
    inputs = {**tiny_batch(family, model), "output_hidden_states": True}
    theirs = model(**inputs)
    with patch(model):
        ours = model(**inputs)
    assert isinstance(ours, type(theirs))
    assert ours.logits is None
    assert set(ours) == (set(theirs) - {"logits"}) | {"logprobs", "entropy"}
    for name in set(theirs) - {"loss", "logits", "past_key_values"}:
        for a, b in zip(_leaves(ours[name]), _leaves(theirs[name]), strict=True):
            assert torch.equal(a, b), name
    if family == "mixtral":
        assert theirs.aux_loss.item() > 0.0  # the loss, compared above, holds it


def _leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for part in value for leaf in _leaves(part)]


def test_num_items_in_batch_divides_the_sum() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    for items in (7, torch.tensor(7)):
        theirs = model(**inputs, num_items_in_batch=items).loss
        with patch(model):
            ours = model(**inputs, num_items_in_batch=items)
        torch.testing.assert_close(ours.loss, theirs)
        torch.testing.assert_close(ours.loss, -ours.logprobs.sum() / 7)


def test_shift_labels_are_taken_as_they_are() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    shifted = inputs["labels"].roll(-2, 1)
    theirs = model(**inputs, shift_labels=shifted)
    with patch(model):
        ours = model(**inputs, shift_labels=shifted)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logprobs, _of_logits(theirs.logits, shifted)[0])


def test_logits_to_keep_needs_labels_of_the_kept_positions() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    with pytest.raises(ValueError, match="batch_size"):
        model(**inputs, logits_to_keep=3)
    last = {**inputs, "labels": inputs["labels"][:, -3:]}
    theirs = model(**last, logits_to_keep=3)
    with patch(model):
        ours = model(**last, logits_to_keep=3)
        with pytest.raises(ValueError, match="labels must have the tokens of the logits"):
            model(**inputs, logits_to_keep=3)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.logprobs.shape == (3, 3)


def test_return_dict_false_gives_the_loss_first() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    with patch(model):
        output = model(**inputs)
        values = model(**inputs, return_dict=False)
    assert isinstance(values, tuple)
    assert torch.equal(values[0], output.loss)
    assert torch.equal(values[-2], output.logprobs)
    assert torch.equal(values[-1], output.entropy)


def test_nothing_to_learn_from_gives_an_attached_zero() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with patch(model):
        loss = model(**inputs).loss
        gradients = _gradients(model, loss)
    assert loss.item() == 0.0
    assert all(not g.any() for g in gradients.values())
    assert set(gradients) == {name for name, _ in model.named_parameters()}


def test_differentiable_logprobs_carry_the_gradient_of_a_loss_of_ones_own() -> None:
    model = tiny_family("gemma2")
    inputs = tiny_batch("gemma2", model)
    labels = _next_labels(inputs["labels"])
    torch.manual_seed(3)
    upstream, other = torch.randn(2, *labels.shape)

    def own_loss(run: Any, logits: bool) -> Tensor:
        output = run(**_in_double(inputs) if logits == "double" else inputs)
        if not logits:
            return (upstream * output.logprobs + other * output.entropy).sum()
        log_p = torch.log_softmax(output.logits, dim=-1)
        chosen = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return torch.where(labels != -100, upstream * chosen - other * (log_p.exp() * log_p).sum(-1), 0.0).sum()

    twin = copy.deepcopy(model).double()
    exact = _gradients(twin, own_loss(twin, "double"))  # type: ignore[arg-type]
    eager = _gradients(model, own_loss(model, True))
    with patch(model, differentiable_logprobs=True):
        ours = _gradients(model, own_loss(model, False))
        torch.testing.assert_close(model(**inputs).loss, -model(**inputs).logprobs.sum() / (labels != -100).sum())
    with patch(model), pytest.raises(RuntimeError, match="does not require grad"):
        own_loss(model, False).backward()
    for name, want in exact.items():
        assert_as_accurate(name, ours[name], want, eager[name])


def test_bfloat16_is_closer_to_the_truth_than_the_host() -> None:
    model = tiny_family("llama").bfloat16()
    inputs = tiny_batch("llama", model)
    labels = _next_labels(inputs["labels"])
    exact = copy.deepcopy(model).double()(**inputs)
    eager = model(**inputs)
    with patch(model):
        ours = model(**inputs)
    assert ours.loss.dtype == torch.float32
    assert_as_accurate(
        "logprobs", ours.logprobs, _of_logits(exact.logits, labels)[0], _of_logits(eager.logits, labels)[0]
    )


def test_autocast_runs_the_head_in_its_dtype_and_keeps_the_row_arithmetic_in_float32() -> None:
    model = tiny_family("phi")
    inputs = tiny_batch("phi", model)
    seen: list[torch.dtype] = []
    original = patching.PolicyLoss.from_hidden

    def spy(self: Any, hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any) -> Any:
        seen.extend((hidden.dtype, weight.dtype, options["bias"].dtype))
        assert not torch.is_autocast_enabled("cpu")
        return original(self, hidden, weight, labels, **options)

    with pytest.MonkeyPatch.context() as context, torch.autocast("cpu", torch.bfloat16):
        theirs = _gradients(model, model(**inputs).loss)
        context.setattr(patching.PolicyLoss, "from_hidden", spy)
        with patch(model):
            loss = model(**inputs).loss
            ours = _gradients(model, loss)
    assert loss.dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    exact = _gradients(model, model(**inputs).loss)
    for name, want in exact.items():
        assert_as_accurate(name, ours[name], want, theirs[name], torch.bfloat16)


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["train", "differentiable", "no_grad"])
def test_no_tensor_of_logits_is_ever_allocated(mode: str) -> None:
    vocabulary, tokens = 3000, 512
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**SIZES, "vocab_size": vocabulary, "max_position_embeddings": 256}))
    ids = torch.randint(0, vocabulary, (2, tokens // 2))

    def step() -> None:
        with torch.set_grad_enabled(mode != "no_grad"):
            output = model(input_ids=ids, labels=ids)
            if mode == "differentiable":
                (output.logprobs + output.entropy).sum().backward()
            elif mode == "train":
                output.loss.backward()
        model.zero_grad()

    with patch(model, differentiable_logprobs=mode == "differentiable", chunk_tokens=32):
        step()  # the proof, once, looks at 32 rows
        with MemoryWatch() as watch:
            step()
    assert watch.largest < tokens * vocabulary * 4 / 4
    if mode != "differentiable":
        with MemoryWatch() as plain:
            step()
        assert plain.largest >= tokens * vocabulary * 4


# --- unchanged behaviour ----------------------------------------------------------------------------------------------


def test_calls_without_labels_and_generation_are_the_hosts() -> None:
    model = tiny_family("gemma2")
    inputs = tiny_batch("gemma2", model)
    del inputs["labels"]
    plain = model(**inputs)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with patch(model):
        patched = model(**inputs)
        assert type(patched) is type(plain)
        assert torch.equal(patched.logits, plain.logits)
        assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"]).logits, plain.logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), tokens)


@pytest.mark.parametrize("undo", ["context", "method", "function"])
def test_undoing_restores_the_model_exactly(undo: str) -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)

    def snapshot() -> list[tuple[str, str, int]]:
        return [(name, key, id(value)) for name, m in model.named_modules() for key, value in vars(m).items()]

    before, signature = snapshot(), inspect.signature(model.forward)
    theirs = model(**inputs)
    done = patch(model)
    assert inspect.signature(model.forward) == signature
    assert model.forward.__name__ == "forward"
    model(**inputs)
    if undo == "context":
        with done:
            pass
    elif undo == "method":
        done.undo()
        done.undo()
    else:
        unpatch(model)
    assert snapshot() == before
    assert "forward" not in vars(model)
    assert torch.equal(model(**inputs).logits, theirs.logits)
    with pytest.raises(ValueError, match="is not patched"):
        unpatch(model)


def test_a_forward_that_was_set_on_the_instance_comes_back() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    own, calls = model.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    counted.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = counted
    with patch(model):
        assert model(**inputs).logits is None
        assert calls == [1]
    assert model.forward is counted


def test_an_error_in_the_host_leaves_its_head_in_place() -> None:
    model = tiny_family("llama")
    head = model.lm_head
    with patch(model):
        with pytest.raises(ValueError, match="labels"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long), labels=torch.full((1, 4), VOCABULARY))
        assert model.lm_head is head
        assert "forward" not in vars(head)


def test_a_deep_copy_of_a_patched_model_is_its_own() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    with patch(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.lm_head.weight.mul_(2.0)
        changed, kept = twin(**inputs), model(**inputs)
    assert changed.logits is None
    assert changed.loss.item() != kept.loss.item()
    unpatch(twin)
    torch.testing.assert_close(twin(**inputs).loss, changed.loss.detach())
    assert torch.equal(twin.lm_head.weight, 2.0 * model.lm_head.weight)


def test_wrapped_by_accelerate_the_patch_steps_aside() -> None:
    from accelerate import Accelerator

    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    handle = patch(model)
    wrapped = accelerator.prepare_model(model)
    output = wrapped(**inputs)
    assert output.logits is None
    assert output.logprobs.shape == inputs["labels"].shape
    handle.undo()
    assert wrapped(**inputs).logits is not None
    with patch(model):
        torch.testing.assert_close(wrapped(**inputs).loss, output.loss)
        # Taking accelerate's wrapper off is not taking the patch off.
        plain = accelerator.unwrap_model(wrapped, keep_fp32_wrapper=False)
        assert plain(**inputs).logits is None
    assert plain(**inputs).logits is not None
    assert "_fastrl_patch" not in vars(model)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _loss_with(operation: Callable[[Any], Any]) -> Callable[..., Tensor]:
    def loss(logits: Any, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return F.cross_entropy(operation(logits).view(-1, vocab_size), _next_labels(labels).view(-1))

    return loss


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda z: z + 1.0, "unsupported operand"),
        (lambda z: z.clamp(max=1.0), "uses clamp on its logits"),
        (lambda z: torch.log_softmax(z, -1), "uses log_softmax on its logits"),
        (lambda z: z.logsumexp(-1), "uses logsumexp on its logits"),
        (lambda z: z[..., 10:], "choosing among the vocabulary"),
        (lambda z: z[..., :10], "must stay the vocabulary, 10"),
        (lambda z: z[torch.tensor([0, 0, 1])], "indexing with Tensor"),
        (lambda z: z.view(-1, VOCABULARY * 3), "the last dimension must stay the vocabulary"),
        (lambda z: z * torch.ones(VOCABULARY), "one number is supported"),
        (lambda z: z * torch.nn.Parameter(torch.ones(())), "that is trained"),
        (lambda z: torch.tanh(torch.tanh(z)), "tanh to its logits twice"),
        (lambda z: torch.tanh(z) * -2.0, "must be > 0"),
    ],
)
def test_an_operation_on_the_logits_that_is_not_known_is_named(operation: Any, message: str) -> None:
    model = tiny_family("llama")
    model.loss_function = _loss_with(operation)
    with patch(model), pytest.raises((AttributeError, ValueError, TypeError), match=message):
        model(**tiny_batch("llama", model))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing=0.1"),
        ({"weight": torch.ones(VOCABULARY)}, "weight="),
        ({"reduction": "max"}, "reduction must be"),
    ],
)
def test_an_option_of_the_cross_entropy_that_is_not_known_is_named(option: dict[str, Any], message: str) -> None:
    model = tiny_family("llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits.view(-1, vocab_size), _next_labels(labels).view(-1), **option
    )
    with patch(model), pytest.raises((AttributeError, ValueError), match=message):
        model(**tiny_batch("llama", model))


def _masked_rows(logits: Any, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """The way of some image models: shift, drop rows by a mask, then flatten."""
    keep = labels[..., 1:] != -100
    shifted = logits[..., :-1, :][keep].contiguous()
    per_token = F.cross_entropy(shifted.view(-1, vocab_size).float(), labels[..., 1:][keep], reduction="none")
    return (per_token * torch.linspace(0.5, 2.0, per_token.numel())).sum()


def _shifted(flat: Callable[[Any, int], Any]) -> Callable[..., Tensor]:
    """Return the loss that shifts logits and labels by slices, as many a model's own file does."""

    def loss(logits: Any, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
        return F.cross_entropy(flat(logits[..., :-1, :], vocab_size), labels[..., 1:].reshape(-1))

    return loss


SHIFTS = {
    "masked": _masked_rows,
    "contiguous-view": _shifted(lambda logits, vocabulary: logits.contiguous().view(-1, vocabulary)),
    "reshape": _shifted(lambda logits, vocabulary: logits.reshape(-1, vocabulary)),
    "flatten": _shifted(lambda logits, vocabulary: logits.float().flatten(0, 1)),
    "negative": _shifted(lambda logits, vocabulary: (logits * -1.5).reshape(-1, vocabulary)),
}


@pytest.mark.parametrize("shift", SHIFTS)
def test_rows_chosen_by_the_loss_go_back_to_their_places(shift: str) -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    model.loss_function = SHIFTS[shift]
    theirs, gradients, ours, got = _alone_and_patched(model, inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    logits = theirs.logits * (-1.5 if shift == "negative" else 1.0)
    torch.testing.assert_close(ours.logprobs, _of_logits(logits, _next_labels(inputs["labels"]))[0])
    for name, want in gradients.items():
        torch.testing.assert_close(got[name], want, atol=1e-5 * float(want.abs().max()), rtol=1e-5)


def test_another_thread_without_labels_has_the_model_to_itself() -> None:
    """A generation in the background, while the patched forward has its stand-ins in place."""
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    want = model(inputs["input_ids"]).logits
    found: list[Any] = []

    def beside() -> None:
        with torch.no_grad():
            found.append(model(inputs["input_ids"]).logits)
        try:
            model(**inputs)
        except RuntimeError as error:
            found.append(str(error))

    def run_beside(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    own_loss = model.loss_function
    with patch(model):
        loss = model(**inputs).loss
        model.loss_function = lambda *args, **kwargs: (run_beside(), own_loss(*args, **kwargs))[1]
        model.lm_head.register_forward_pre_hook(run_beside)
        assert torch.equal(model(**inputs).loss, loss)
    for logits, refusal in (found[:2], found[2:]):
        assert torch.equal(logits, want)
        assert "take turns" in refusal


def test_a_padded_vocabulary_is_cut_as_the_host_cuts_it() -> None:
    model = tiny_family("phi")
    inputs = tiny_batch("phi", model)
    inputs["labels"] = inputs["labels"].clamp(max=59)
    model.loss_function = lambda logits, labels, vocab_size, **_: F.cross_entropy(
        logits[..., :60].reshape(-1, 60), _next_labels(labels).view(-1)
    )
    theirs, gradients, ours, got = _alone_and_patched(model, inputs)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logprobs, _of_logits(theirs.logits[..., :60], _next_labels(inputs["labels"]))[0])
    for name, want in gradients.items():
        torch.testing.assert_close(got[name], want, atol=2e-6, rtol=2e-5)


def test_models_that_cannot_be_patched_say_why() -> None:
    model = tiny_family("llama")
    with patch(model), pytest.raises(ValueError, match="patched already"):
        patch(model)
    with pytest.raises(ValueError, match="no output head"):
        patch(model.model)
    with pytest.raises(ValueError, match="must be a transformers model"):
        patch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="chunk_tokens must be an int >= 1"):
        patch(model, chunk_tokens=0)
    with pytest.raises(TypeError, match="differentiable_logprobs must be"):
        patch(model, differentiable_logprobs="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend"):
        patch(model, backend="metal")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Linear.*Sequential"):
        patch(model)
    assert "forward" not in vars(model)
    model = tiny_family("llama")
    with pytest.raises(ValueError, match="before it is wrapped"):
        patch(torch.compile(model, backend="eager"))
    patch(model)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Linear.*Sequential"):
        model(**tiny_batch("llama", model))


def test_a_head_that_is_not_reproduced_raises_on_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_family("phi")
    inputs = tiny_batch("phi", model)
    real = patching.effective_linear
    monkeypatch.setattr(patching, "effective_linear", lambda head, hidden: (*real(head, hidden)[:2], None))
    with patch(model), pytest.raises(AdapterMismatchError, match="does not reproduce the host"):
        model(**inputs)
    monkeypatch.setattr(patching, "head_scalars_of", lambda steps: (1.0, None))
    monkeypatch.setattr(patching, "effective_linear", real)
    scaled = tiny_family("granite")
    with patch(scaled), pytest.raises(AdapterMismatchError, match="does not reproduce the host"):
        scaled(**tiny_batch("granite", scaled))


# --- hosts: PEFT, checkpointing, Trainer ------------------------------------------------------------------------------


def _lora(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)  # zeros would hide an adapter that is left out
    return wrapped


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("qwen2", {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.4}),
        ("phi", {"target_modules": ["lm_head"], "lora_bias": True}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ],
    ids=["body", "head", "head-bias", "saved-head"],
)
@pytest.mark.parametrize("order", ["adapter first", "patch first"])
def test_lora(family: str, options: dict[str, Any], order: str) -> None:
    plain = _lora(tiny_family(family), **options).train()
    base = tiny_family(family)
    if order == "patch first":
        patch(base)
    model = _lora(base, **options).train()
    if order == "adapter first":
        patch(model)
    inputs = tiny_batch(family, plain)
    torch.manual_seed(7)
    theirs = plain(**inputs)
    gradients = _gradients(plain, theirs.loss)
    # The proof draws no random numbers: the dropout is the host's.
    torch.manual_seed(7)
    ours = model(**inputs)
    got = _gradients(model, ours.loss)
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert got.keys() == gradients.keys()
    for name, want in gradients.items():
        torch.testing.assert_close(got[name], want, atol=2e-6, rtol=2e-5)
    with model.disable_adapter(), plain.disable_adapter():
        torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)
    model.merge_adapter()
    plain.merge_adapter()
    torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)
    unpatch(model)


def test_an_adapter_on_the_head_that_is_not_plain_lora_is_refused() -> None:
    model = _lora(tiny_family("llama"), target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ValueError, match="plain LoRA is supported"):
        patch(model)


def test_gradient_checkpointing() -> None:
    model = tiny_family("llama").train()
    inputs = tiny_batch("llama", model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable()
    theirs = _gradients(model, model(**inputs, use_cache=False).loss)
    with patch(model):
        ours = _gradients(model, model(**inputs, use_cache=False).loss)
    for name, want in theirs.items():
        torch.testing.assert_close(ours[name], want, atol=2e-6, rtol=2e-5)


@pytest.mark.filterwarnings("ignore")  # the compiler's warnings of graph breaks
def test_a_compiled_model() -> None:
    model = tiny_family("llama")
    inputs = tiny_batch("llama", model)
    theirs = model(**inputs)
    gradients = _gradients(model, theirs.loss)
    with patch(model):
        ours = torch.compile(model, backend="eager")(**inputs)
        got = _gradients(model, ours.loss)
    torch._dynamo.reset()
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert ours.logits is None
    for name, want in gradients.items():
        torch.testing.assert_close(got[name], want, atol=2e-6, rtol=2e-5)


def _trained(folder: Path, patched: bool, **options: Any) -> tuple[list[float], dict[str, Tensor], dict[str, float]]:
    """Run two optimiser steps of transformers.Trainer, and return losses, weights and the result of the evaluation."""
    model = tiny_family("llama")
    torch.manual_seed(11)
    rows = [{"input_ids": (ids := torch.randint(5, VOCABULARY, (6 + i % 3,)))} | {"labels": ids} for i in range(8)]

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        pad = torch.nn.utils.rnn.pad_sequence
        ids, labels = ([item[key] for item in items] for key in ("input_ids", "labels"))
        return {"input_ids": pad(ids, True, 0), "labels": pad(labels, True, -100)}

    arguments = hf.TrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=0.1, lr_scheduler_type="constant", logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, optim="sgd", **options,
    )  # fmt: skip
    trainer = hf.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:3], data_collator=collate)
    handle = patch(model) if patched else None
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    evaluation = trainer.evaluate()
    if handle is not None:
        handle.undo()
    return losses, dict(model.state_dict()), evaluation


def test_metrics_of_the_trainer_see_logprobs_and_entropy(tmp_path: Path) -> None:
    model = tiny_family("llama")
    ids = torch.randint(5, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    seen: list[Any] = []

    def metrics(evaluated: Any) -> dict[str, float]:
        seen.extend(evaluated.predictions)
        return {}

    arguments = hf.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = hf.Trainer(model=model, args=arguments, eval_dataset=rows, compute_metrics=metrics)
    with patch(model), torch.no_grad():
        trainer.evaluate()
        output = model(input_ids=ids, labels=ids)
    assert len(seen) == 2
    torch.testing.assert_close(torch.tensor(seen[0]), output.logprobs)
    torch.testing.assert_close(torch.tensor(seen[1]), output.entropy)


@pytest.mark.parametrize("options", [{}, {"bf16": True}], ids=["float32", "bf16"])
def test_trainer_steps_are_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    losses, weights, evaluation = _trained(tmp_path, False, **options)
    our_losses, our_weights, our_evaluation = _trained(tmp_path, True, **options)
    # One rounding of a bfloat16 logit moves a log-prob by up to 2^-8 of it.
    rtol = 2e-2 if options else 1e-5
    assert our_losses == pytest.approx(losses, rel=rtol)
    assert our_evaluation["eval_loss"] == pytest.approx(evaluation["eval_loss"], rel=rtol)
    start = tiny_family("llama").state_dict()
    for name, want in weights.items():
        moved = (want - start[name]).abs().max()
        assert (our_weights[name] - want).abs().max() <= rtol * 2 * moved + 1e-7, name
