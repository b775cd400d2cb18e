"""Models and data that people really have: trained as they are, or refused in one line before the first step."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import tiny_model, tiny_tokenizer

from fastrl.train.config import SFTConfig
from fastrl.train.data.encoding import Encoder, preference_examples
from fastrl.train.data.records import read_records
from fastrl.train.pretrained import MERGED, add_lora, check_positions, load_model
from fastrl.train.rewards.tasks import Problem, load_task
from fastrl.train.rollouts.generate import decode, generate
from fastrl.train.sft import check_answers, run_sft


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter_folder(tmp_path: Path) -> str:
    """A folder with trained adapters, which names its base model."""
    base = saved(tmp_path / "base", tiny_model(tiny_tokenizer()))
    model = add_lora(load_model(base)[0], rank=2, alpha=4.0, targets="all-linear")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    return saved(tmp_path / "adapters", model)


def test_training_goes_on_from_adapters(adapter_folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    base = load_model(str(tmp_path / "base"))[0]
    model = load_model(adapter_folder)[0]
    assert "merged into their base model" in caplog.text
    assert getattr(model, MERGED)
    with torch.no_grad():
        wanted = model(ids).logits
        assert float((wanted - base(ids).logits).abs().max()) > 1e-3
        # New adapters start as nothing.
        assert torch.equal(add_lora(model, rank=4, alpha=8.0, targets="all-linear")(ids).logits, wanted)


def test_what_is_saved_after_adapters_on_adapters_is_the_whole_model(adapter_folder: str, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) + "\n" for i in range(4)))
    config = SFTConfig(
        model=adapter_folder, data=str(data), run_dir=str(tmp_path / "run"), steps=1, examples_per_step=2,
        eval_share=0.0, prompt_template="{prompt}", device="cpu", lora_rank=2, learning_rate=1e-12, checkpoint_every=0,
    )  # fmt: skip
    run_sft(config)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted = load_model(adapter_folder)[0](ids).logits
        got = load_model(str(tmp_path / "run" / "model"))[0](ids).logits
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("targets", ["q_proj, v_proj", " q_proj ,v_proj,", "q_proj,v_proj"])
def test_lora_targets_with_spaces(targets: str) -> None:
    names = SFTConfig(model="x", data="y", lora_targets=targets).lora_modules
    assert names == ("q_proj", "v_proj")
    model = add_lora(tiny_model(tiny_tokenizer()), rank=2, alpha=4.0, targets=names)
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}


def test_a_lora_target_that_no_module_has_is_named() -> None:
    with pytest.raises(ValueError, match=r"lora_targets names 'q_porj', which no module has; linear modules: .*q_proj"):
        add_lora(tiny_model(tiny_tokenizer()), rank=2, alpha=4.0, targets=("v_proj", "q_porj"))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=len(tiny_tokenizer()), **sizes))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=len(tiny_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config)


@pytest.mark.parametrize("make", [bert, t5])
def test_what_is_no_causal_model_is_refused_in_one_short_line(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"causal language model|could not be loaded") as caught:
        load_model(saved(tmp_path / "model", make()))
    assert len(str(caught.value)) < 700


def test_a_model_without_a_cache_of_rows_is_refused(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 8, "eos_token_id": 1, "pad_token_id": 0}
    config = MambaConfig(vocab_size=len(tiny_tokenizer()), **sizes)
    with pytest.raises(ValueError, match=r"MambaForCausalLM keeps no key-value cache .* cannot be sampled from here"):
        generate(MambaForCausalLM(config), [[5, 6]], group_size=2, max_new_tokens=3, stop_ids=[1], pad_id=0)


def test_a_router_goes_without_its_auxiliary_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=len(tiny_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, output_router_logits=True,
        max_position_embeddings=64,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model, _ = load_model(saved(tmp_path / "model", MixtralForCausalLM(config)))
    assert "auxiliary loss" in caplog.text
    rollout = generate(model, [[5, 6], [7]], group_size=2, max_new_tokens=3, stop_ids=[1], pad_id=0)
    assert rollout.completion_ids.shape[0] == 4


def test_positions_that_end_and_positions_that_go_on(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    table = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=1, n_head=2, eos_token_id=1))
    check_positions(table, 40)
    with pytest.raises(ValueError, match="a sequence of 41 tokens is longer than the 40 positions of GPT2LMHeadModel"):
        check_positions(table, 41)
    with pytest.raises(ValueError, match="longer than the 40 positions"):
        generate(table, [[5] * 38], group_size=1, max_new_tokens=4, stop_ids=[1], pad_id=0)
    rotary = tiny_model(tiny_tokenizer())
    limit = rotary.config.max_position_embeddings
    for _ in range(2):
        check_positions(rotary, limit + 1)
    assert caplog.text.count("longer than the") == 1


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny_model(tiny_tokenizer()))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<extra{i}>" for i in range(200)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"ids up to .* the model's embedding has .* rows: resize the embedding"):
        load_model(folder)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", tiny_model(tiny_tokenizer()))
    weights = Path(folder) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"the weights of the model .* are damaged"):
        load_model(folder)


def pairs(tmp_path: Path, *rows: tuple[str, str]) -> Any:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": "q", "chosen": a, "rejected": b}) + "\n" for a, b in rows))
    return read_records(str(file))


def test_equal_pairs_are_dropped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = Encoder(tiny_tokenizer(), [1], "{prompt}")
    encoded = preference_examples(pairs(tmp_path, ("1", "1"), ("1", "2")), encoder)
    assert (len(encoded.examples), encoded.dropped) == (1, 1)
    assert "the same tokens" in caplog.text
    with pytest.raises(ValueError, match=r"in all 1 pairs .* the same tokens"):
        preference_examples(pairs(tmp_path, ("1", "1")), encoder)
    # Equal only because both ends were cut off.
    long = pairs(tmp_path, ("1" * 30 + "2", "1" * 30 + "3"))
    with pytest.raises(ValueError, match="raise max_tokens"):
        preference_examples(long, encoder, max_tokens=10, overlong="cut")


@pytest.mark.parametrize("label", ["1", "0", "true", 2, 0.5, None, [1]])
def test_a_label_is_true_or_false(label: Any, tmp_path: Path) -> None:
    from fastrl.train.data.encoding import unpaired_examples

    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "1", "completion": "2", "label": label}) + "\n")
    with pytest.raises(ValueError, match="label must be true or false"):
        unpaired_examples(read_records(str(file)), Encoder(tiny_tokenizer(), [1], "{prompt}"))


def test_a_task_without_reference_answers_has_nothing_to_imitate() -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ValueError, match="problems without a reference answer"):
        check_answers(load_task("graph_color").train(1), "task graph_color")
    check_answers(load_task("chain_sum").train(2), "task chain_sum")
    check_answers([Problem("q", "a")], "mine")


@pytest.mark.parametrize(
    ("prefill", "finished", "completion"),
    [
        ("assistant: <think></think>", "assistant: {{ m['content'] }}<eos>", "4<eos>"),
        ("assistant: ", "assistant: {{ m['content'] }}<eos>", "4<eos>"),
        ("assistant: <think>", "assistant: {{ m['content'] }}<eos>", "4<eos>"),
    ],
)
def test_a_template_that_prefills_a_thought(prefill: str, finished: str, completion: str) -> None:
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}" + finished.replace("<eos>", eos)
        + "{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + prefill + "{% endif %}"
    )  # fmt: skip
    encoder = Encoder(tokenizer, [tokenizer.eos_token_id])
    ids = encoder.completion("2+2?", "4")
    assert tokenizer.decode(ids) == completion.replace("<eos>", eos)


def test_tags_that_are_special_tokens_reach_the_rewards() -> None:
    from fastrl.train.data.rollout import Rollout

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|im_end|>"]})
    text = "<think>2</think>4<|im_end|>" + tokenizer.eos_token
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    mask = torch.ones_like(ids, dtype=torch.bool)
    zeros = torch.zeros(ids.shape)
    rollout = Rollout(ids[:, :1], mask[:, :1], torch.zeros(1, dtype=torch.long), ids, mask, zeros, mask[:, 0])
    assert decode(tokenizer, rollout) == ["<think>2</think>4"]


def test_a_run_says_what_it_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = saved(tmp_path / "model", tiny_model(tiny_tokenizer()))
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}+1=", "completion": str(i + 1)}) + "\n" for i in range(4)))
    caplog.set_level(logging.INFO, logger="fastrl.train.run.run")
    config = SFTConfig(
        model=folder, data=str(data), run_dir=str(tmp_path / "run"), steps=1, examples_per_step=2, eval_share=0.0,
        prompt_template="{prompt}", device="cpu", dtype="bfloat16", checkpoint_every=0, save_model=False,
    )  # fmt: skip
    result = run_sft(config)
    assert "in bfloat16 rounded from float32 master weights, from step 0" in caplog.text
    assert 0.0 < result.metrics["weights_moved"] <= 1.0
