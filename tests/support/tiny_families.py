"""Tiny random models of the families that do something of their own before or after the output head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCABULARY = 67
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS = {"output_router_logits": True, "router_aux_loss_coef": 0.3}


def _qwen2_vl() -> Any:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 1}
    text = {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config=text, image_token_id=3, vision_start_token_id=4)
    return hf.Qwen2VLForConditionalGeneration(config)


def _llava() -> Any:
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=hf.LlamaConfig(**SIZES), image_token_index=3)
    return hf.LlavaForConditionalGeneration(config)


FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama_tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**SIZES, n_positions=64)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(
        hf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0, sliding_window=4)
    ),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, head_dim=8, final_logit_softcapping=1.5)),
    "cohere": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.25)),
    "cohere2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**SIZES, logit_scale=3.0, head_dim=8)),
    "granite": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=0.5)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES)),
    "falcon_h1": lambda: hf.FalconH1ForCausalLM(
        hf.FalconH1Config(
            **SIZES, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8,
            mamba_n_groups=1, mamba_chunk_size=8, head_dim=8,
        )
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, **EXPERTS, num_local_experts=4, num_experts_per_tok=2, sliding_window=None)
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **SIZES, **EXPERTS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
            decoder_sparse_step=1,
        )
    ),
    "llava": _llava,
    "qwen2_vl": _qwen2_vl,
}  # fmt: skip


def tiny_family(name: str, seed: int = 0) -> Any:
    """Return the model in eval mode, its parameters far enough from uniform that a wrong head shows."""
    torch.manual_seed(seed)
    model = FAMILIES[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.25)
            elif key == "lm_head.bias":
                parameter.normal_(0.0, 1.0)
    if hasattr(model.config, "num_experts_per_tok"):
        model.set_experts_implementation("eager")  # the grouped products know no float64
    return model.eval()


def tiny_batch(name: str, model: Any) -> dict[str, Any]:
    """Return inputs with padding, labels ignored on the prompt, and an image where the family takes one."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (3, 9))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if name == "llava":
        ids[:, 2:6] = 3
        inputs["pixel_values"] = torch.randn(3, 3, 8, 8)
    elif name == "qwen2_vl":
        ids[:, 2], ids[:, 3] = 4, 3
        patch = 3 * model.config.vision_config.temporal_patch_size * model.config.vision_config.patch_size**2
        inputs |= {"pixel_values": torch.randn(12, patch), "image_grid_thw": torch.tensor([[1, 2, 2]] * 3)}
        inputs["mm_token_type_ids"] = (ids == 3).int()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    labels[2, 6] = -100
    return {**inputs, "labels": labels}
