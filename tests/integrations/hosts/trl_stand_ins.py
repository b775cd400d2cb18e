"""Stand-ins for the models and datasets of TRL's test suite, for a machine without the hub.

    python tests/integrations/hosts/trl_stand_ins.py FOLDER

writes two things:

    FOLDER/hub        a cache of the hub with random models of the families that TRL's tests name, each with a tokenizer
                      trained here and TRL's own copy of the family's chat template
    FOLDER/datasets   datasets with the configurations and columns of TRL's

With `HF_HUB_CACHE=FOLDER/hub HF_HUB_OFFLINE=1` transformers finds the models under their names. As a pytest plugin
(`-p trl_stand_ins`, `TRL_STAND_INS=FOLDER`) this module sends `load_dataset` to the datasets. There are no models of
images or with remote code.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

ORGANISATION = "trl-internal-testing"
REVISION = "0" * 40
SIZES = {
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
}
CLASSIFIER = {**SIZES, "hidden_size": 16, "num_labels": 1}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """The special tokens of a family, and the chat template that TRL keeps for it."""

    pad: str | None
    eos: str
    template: str | None
    bos: str | None = None
    more: tuple[str, ...] = ()


CHATML = ("<|im_start|>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>")
HARMONY = ("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>")
GLM = ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<think>", "</think>")
COHERE = ("<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>")

QWEN2 = Tokens("<|endoftext|>", "<|im_end|>", "qwen2_5", None, CHATML)
QWEN3 = Tokens("<|endoftext|>", "<|im_end|>", "qwen3", None, CHATML)
GPTOSS = Tokens("<|endoftext|>", "<|return|>", "gptoss", "<|startoftext|>", HARMONY)
GEMMA = Tokens("<pad>", "<eos>", "gemma", "<bos>", ("<start_of_turn>", "<end_of_turn>"))
AYA = Tokens("<PAD>", "<|END_OF_TURN_TOKEN|>", "cohere", "<BOS_TOKEN>", COHERE)
LFM2 = Tokens("<|pad|>", "<|im_end|>", "lfm2", "<|startoftext|>", ("<|im_start|>", "<|endoftext|>"))
DEEPSEEK = Tokens(
    "<|pad|>", "<|end_of_sentence|>", "deepseekv3", "<|begin_of_sentence|>", ("<|User|>", "<|Assistant|>")
)


def _llama(template: str) -> Tokens:
    return Tokens(None, "<|eot_id|>", template, "<|begin_of_text|>", LLAMA)


@dataclass(frozen=True)
class Model:
    """A model of the hub: the class of transformers, its tokens, and the fields of its configuration."""

    architecture: str
    tokens: Tokens
    fields: dict[str, Any] = field(default_factory=lambda: SIZES)


MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": Model("Qwen2ForCausalLM", QWEN2),
    "tiny-Qwen3ForCausalLM": Model("Qwen3ForCausalLM", QWEN3),
    "tiny-Qwen3MoeForCausalLM": Model("Qwen3MoeForCausalLM", QWEN3, {**SIZES, **EXPERTS, "head_dim": 8}),
    "tiny-LlamaForCausalLM-3": Model("LlamaForCausalLM", _llama("llama3")),
    "tiny-LlamaForCausalLM-3.1": Model("LlamaForCausalLM", _llama("llama3_1")),
    "tiny-LlamaForCausalLM-3.2": Model("LlamaForCausalLM", _llama("llama3_2")),
    "tiny-MistralForCausalLM-0.1": Model("MistralForCausalLM", Tokens(None, "</s>", None, "<s>")),
    "tiny-MistralForCausalLM-0.2": Model("MistralForCausalLM", Tokens(None, "</s>", None, "<s>")),
    "tiny-GptOssForCausalLM": Model(
        "GptOssForCausalLM", GPTOSS, {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}
    ),
    "tiny-GemmaForCausalLM": Model("GemmaForCausalLM", GEMMA),
    "tiny-Gemma2ForCausalLM": Model("Gemma2ForCausalLM", GEMMA),
    "tiny-CohereForCausalLM": Model("CohereForCausalLM", AYA, {**SIZES, "logit_scale": 0.125}),
    "tiny-Cohere2ForCausalLM": Model("Cohere2ForCausalLM", AYA, {**SIZES, "logit_scale": 1.0}),
    "tiny-Phi3ForCausalLM": Model(
        "Phi3ForCausalLM",
        Tokens("<|endoftext|>", "<|end|>", "phi3", "<s>", ("<|user|>", "<|assistant|>", "<|system|>")),
    ),
    "tiny-Olmo3ForCausalLM": Model("Olmo3ForCausalLM", QWEN2),
    "tiny-Lfm2ForCausalLM": Model("Lfm2ForCausalLM", LFM2, {**SIZES, "full_attn_idxs": [1], "block_multiple_of": 8}),
    "tiny-Lfm2ForCausalLM-2.5": Model(
        "Lfm2ForCausalLM", LFM2, {**SIZES, "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    ),
    "tiny-Glm4MoeForCausalLM": Model(
        "Glm4MoeForCausalLM",
        Tokens("<|endoftext|>", "<|user|>", "glm4moe", None, GLM),
        {**SIZES, "head_dim": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "tiny-DeepseekV3ForCausalLM": Model(
        "DeepseekV3ForCausalLM", DEEPSEEK, {**SIZES, "num_attention_heads": 2, "num_key_value_heads": 2}
    ),
    "tiny-GPTNeoXForCausalLM": Model("GPTNeoXForCausalLM", Tokens(None, "<|endoftext|>", None)),
    "tiny-Qwen2ForSequenceClassification-2.5": Model("Qwen2ForSequenceClassification", QWEN2, CLASSIFIER),
    "tiny-Qwen3ForSequenceClassification": Model("Qwen3ForSequenceClassification", QWEN3, CLASSIFIER),
    "tiny-Qwen3MoeForSequenceClassification": Model(
        "Qwen3MoeForSequenceClassification", QWEN3, {**CLASSIFIER, **EXPERTS}
    ),
    "tiny-LlamaForSequenceClassification-3.2": Model("LlamaForSequenceClassification", _llama("llama3_2"), CLASSIFIER),
}


@cache
def tokenizer(tokens: Tokens) -> Any:
    """Return a byte-level BPE trained on the datasets' texts, with the family's special tokens."""
    from importlib.resources import files

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = [token for token in (tokens.pad, tokens.bos, tokens.eos, *tokens.more) if token is not None]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=list(dict.fromkeys(special)), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    roles = ["system\nuser\nassistant\ntool\n"]
    made.train_from_iterator([*roles, *(f"{question} {right}\n{wrong}" for question, right, wrong in facts())], trainer)
    template = None
    if tokens.template is not None:
        template = (files("trl") / "chat_templates" / f"{tokens.template}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=tokens.bos, eos_token=tokens.eos, pad_token=tokens.pad, chat_template=template,
        model_max_length=4096,
    )  # fmt: skip


def save_model(name: str, hub: Path) -> None:
    """Write a random model and its tokenizer where the hub's cache has `name`."""
    import torch
    import transformers

    spec = MODELS[name]
    ids = tokenizer(spec.tokens)
    made = getattr(transformers, spec.architecture)
    named = {"bos_token_id": ids.bos_token_id, "eos_token_id": ids.eos_token_id, "pad_token_id": ids.pad_token_id}
    torch.manual_seed(0)
    model = made(made.config_class(vocab_size=len(ids), **named, **spec.fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    cached = hub / f"models--{ORGANISATION}--{name}"
    folder = cached / "snapshots" / REVISION
    model.to(torch.bfloat16).save_pretrained(folder)
    ids.save_pretrained(folder)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(REVISION)


# --- datasets ---------------------------------------------------------------------------------------------------------


def facts() -> list[tuple[str, str, str]]:
    """Return 19 questions, each with a right and a wrong answer."""
    capitals = [("France", "Paris"), ("Japan", "Tokyo"), ("Peru", "Lima"), ("Kenya", "Nairobi"), ("Norway", "Oslo")]
    cities = [city for _, city in capitals]
    made = [
        (f"What is the capital of {country}?", f"The capital is {city}.", f"Perhaps {cities[i - 1]}?")
        for i, (country, city) in enumerate(capitals)
    ]
    sums = [(2, 3), (7, 5), (12, 9), (30, 4), (8, 8), (15, 6), (21, 2)]
    made += [(f"How much is {a} plus {b}?", f"It makes {a + b}.", f"Around {a * b}, I believe.") for a, b in sums]
    opposites = [
        ("hot", "cold"),
        ("up", "down"),
        ("early", "late"),
        ("full", "empty"),
        ("loud", "quiet"),
        ("old", "new"),
    ]
    made += [(f"Name the opposite of {a}.", f"That would be {b}.", f"Very {a}, of course.") for a, b in opposites]
    return [*made, ("Is water wet?", "Yes, to the touch.", "No one has ever known that.")]


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def zen() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every configuration of TRL's plain-text dataset."""
    standard: dict[str, list[dict[str, Any]]] = {
        "language_modeling": [{"text": f"{q} {right}"} for q, right, _ in facts()],
        "prompt_only": [{"prompt": q} for q, _, _ in facts()],
        "prompt_completion": [{"prompt": q, "completion": f" {right}"} for q, right, _ in facts()],
        "preference": [{"prompt": q, "chosen": f" {right}", "rejected": f" {wrong}"} for q, right, wrong in facts()],
        "implicit_prompt_preference": [
            {"chosen": f"{q} {right}", "rejected": f"{q} {wrong}"} for q, right, wrong in facts()
        ],
        "unpaired_preference": [
            {"prompt": q, "completion": f" {wrong if i % 3 else right}", "label": i % 3 == 0}
            for i, (q, right, wrong) in enumerate(facts())
        ],
    }
    conversational: dict[str, list[dict[str, Any]]] = {
        "language_modeling": [{"messages": _user(q) + _assistant(right)} for q, right, _ in facts()],
        "prompt_only": [{"prompt": _user(q)} for q, _, _ in facts()],
        "prompt_completion": [{"prompt": _user(q), "completion": _assistant(right)} for q, right, _ in facts()],
        "preference": [
            {"prompt": _user(q), "chosen": _assistant(right), "rejected": _assistant(wrong)}
            for q, right, wrong in facts()
        ],
        "implicit_prompt_preference": [
            {"chosen": _user(q) + _assistant(right), "rejected": _user(q) + _assistant(wrong)}
            for q, right, wrong in facts()
        ],
        "unpaired_preference": [
            {"prompt": _user(q), "completion": _assistant(wrong if i % 3 else right), "label": i % 3 == 0}
            for i, (q, right, wrong) in enumerate(facts())
        ],
    }
    kinds = {"standard": standard, "conversational": conversational}
    return {f"{kind}_{name}": rows for kind, table in kinds.items() for name, rows in table.items()}


def harmony() -> dict[str, list[dict[str, Any]]]:
    """Return conversations with a thought before the answer, and options for the template."""
    efforts = ("low", "medium", "high")
    options = [{"reasoning_effort": efforts[i % 3], "model_identity": "You are a test."} for i in range(len(facts()))]
    thought = {"thinking": "I look it up."}
    right = [[{**_assistant(text)[0], **thought}] for _, text, _ in facts()]
    wrong = [[{**_assistant(text)[0], **thought}] for _, _, text in facts()]
    prompts = [_user(q) for q, _, _ in facts()]
    rows = list(zip(prompts, right, wrong, options, strict=True))
    return {
        "language_modeling": [{"messages": p + w, "chat_template_kwargs": o} for p, w, _, o in rows],
        "prompt_completion": [{"prompt": p, "completion": w, "chat_template_kwargs": o} for p, w, _, o in rows],
        "preference": [{"prompt": p, "chosen": w, "rejected": r, "chat_template_kwargs": o} for p, w, r, o in rows],
    }


def toolcall() -> dict[str, list[dict[str, Any]]]:
    """Return conversations in which a calculator or an atlas is called, its schema as JSON text."""
    modelling, preference = [], []
    for i, (question, right, wrong) in enumerate(facts()):
        name, argument = ("calculate", "expression") if i % 2 else ("look_up", "place")
        parameters = {"type": "object", "properties": {argument: {"type": "string", "description": "What to answer."}}}
        schema = {"name": name, "description": "Answers a question.", "parameters": parameters}
        tools = json.dumps([{"type": "function", "function": schema}])
        call = {"type": "function", "function": {"name": name, "arguments": {argument: question}}}
        asked = {"role": "assistant", "tool_calls": [call]}
        answer = {"role": "tool", "name": name, "content": right}
        modelling.append({"messages": [*_user(question), asked, answer, *_assistant(right)], "tools": tools})
        pair = {"chosen": [asked], "rejected": _assistant(wrong)}
        preference.append({"prompt": _user(question), **pair, "tools": tools})
    return {"language_modeling": modelling, "preference": preference}


def chatml() -> dict[str, list[dict[str, Any]]]:
    """Return conversations under the column names of ChatML."""
    rows = [
        {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": right}]} for q, right, _ in facts()
    ]
    return {"default": rows}


DATASETS = {"zen": zen, "harmony": harmony, "toolcall": toolcall, "dolly-chatml-sft": chatml}
TEST_ROWS = 2


def save_dataset(name: str, folder: Path) -> None:
    """Write the configurations of a dataset as Parquet, with the card that names them."""
    from datasets import Dataset

    card = ["---", "configs:"]
    for config, rows in DATASETS[name]().items():
        splits = {"train": rows[:-TEST_ROWS], "test": rows[-TEST_ROWS:]}
        card += [f"- config_name: {config}", "  data_files:"]
        for split, part in splits.items():
            path = f"{config}/{split}.parquet"
            (folder / name / config).mkdir(parents=True, exist_ok=True)
            Dataset.from_list(part, on_mixed_types="use_json").to_parquet(str(folder / name / path))
            card += [f"  - split: {split}", f"    path: {path}"]
    (folder / name / "README.md").write_text("\n".join([*card, "---", ""]))


def build(folder: Path) -> None:
    """Write all models and datasets to a new folder."""
    for name in MODELS:
        save_model(name, folder / "hub")
    for name in DATASETS:
        save_dataset(name, folder / "datasets")


# --- plugin -----------------------------------------------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Let `load_dataset` find the stand-ins before a test module binds it by name."""
    del config
    import datasets
    import torch

    # Without a GPU Liger's kernels cannot run, and TRL's tests of them leave patches in transformers' classes. So we
    # tell TRL that Liger is not installed.
    if not torch.cuda.is_available():
        importlib.import_module("trl.import_utils").is_liger_kernel_available = lambda *_, **__: False

    folder = Path(os.environ["TRL_STAND_INS"]) / "datasets"
    original = datasets.load_dataset

    def load_dataset(path: str, *arguments: Any, **options: Any) -> Any:
        owner, _, name = path.partition("/")
        local = str(folder / name) if owner == ORGANISATION and name in DATASETS else path
        return original(local, *arguments, **options)

    datasets.load_dataset = load_dataset


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/integrations/hosts/trl_stand_ins.py FOLDER")
    build(Path(sys.argv[1]))
