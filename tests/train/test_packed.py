"""Packed rollouts against padded ones: hidden states, gradients, and whole runs of the loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loop_checks import metrics_of
from tiny_model import tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from fastrl.train.config.dpo import OnlineDPOConfig
from fastrl.train.config.grpo import GRPOConfig
from fastrl.train.config.ppo import PPOConfig
from fastrl.train.data.encoding import encode_prompts
from fastrl.train.data.rollout import Rollout
from fastrl.train.grpo import run_grpo
from fastrl.train.model import Policy, completion_hidden, packed_completion_hidden
from fastrl.train.online_dpo import run_online_dpo
from fastrl.train.ppo import Learner, build_loss, run_ppo, terminal_rewards
from fastrl.train.rollouts.generate import generate
from fastrl.train.update.critic import Critic

TOKENIZER = tiny_tokenizer()


def sampled(model: Any) -> Rollout:
    """Return nine completions of three prompts, of several lengths."""
    prompts = encode_prompts(TOKENIZER, ["1+1=", "what is 23 - 60?", "?"])
    return generate(
        model, prompts, group_size=3, max_new_tokens=7, stop_ids=[2, *range(10, 20)], pad_id=2,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip


def gradients(forward: Callable[..., Tensor], model: Any, rollout: Rollout) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the hidden states under the mask, and the gradients of a fixed combination of them."""
    model.zero_grad()
    hidden = forward(model, rollout)[rollout.completion_mask]
    factors = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (hidden * factors.to(hidden.dtype)).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return hidden.detach(), grads


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("stream_tokens", [1, 40, 4096])
def test_packed_and_padded_are_the_same(family: str, stream_tokens: int) -> None:
    model = tiny_model(TOKENIZER, family=family)
    rollout = sampled(model)
    assert len(set(rollout.completion_mask.sum(dim=1).tolist())) > 2
    # In float64 transformers' eager attention overflows on the padding rows of gemma2: its softmax is in float32. The
    # norms of all of them are.
    dtype, granted = (torch.float64, 1e-5) if family != "gemma2" else (torch.float32, 1e-4)
    model = model.to(dtype)
    expected, padded = gradients(completion_hidden, model, rollout)
    found, packed = gradients(lambda m, r: packed_completion_hidden(m, r, stream_tokens), model, rollout)
    assert torch.allclose(found, expected, rtol=0, atol=granted * float(expected.abs().max()))
    assert packed.keys() == padded.keys()
    for name, gradient in padded.items():
        assert torch.allclose(packed[name], gradient, rtol=0, atol=granted * float(gradient.abs().max())), name
    hidden = packed_completion_hidden(model, rollout, stream_tokens)
    assert hidden.shape[:2] == rollout.completion_ids.shape
    assert not hidden[~rollout.completion_mask].any()


def test_sliding_windows_and_softcaps_are_kept() -> None:
    model = tiny_model(TOKENIZER, family="gemma2")
    assert Policy.of(model, temperature=0.6, stream_tokens=60).verify(sampled(model)) < 1e-4


LOOPS = {
    "grpo": (GRPOConfig, run_grpo, {"kl_coef": 0.1, "epochs_per_batch": 2, "minibatches": 2}),
    "grpo in micro-batches": (GRPOConfig, run_grpo, {"micro_batch_size": 2, "loss": "gspo"}),
    "ppo": (PPOConfig, run_ppo, {"critic": "shared"}),
    "ppo with a critic": (PPOConfig, run_ppo, {"critic": "separate"}),
    "trust region": (PPOConfig, run_ppo, {"update": "trust_region", "target_kl": 0.02}),
    "online dpo": (OnlineDPOConfig, run_online_dpo, {}),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_learns_the_same(folder: Path, tmp_path: Path, loop: str) -> None:
    config, train, changes = LOOPS[loop]
    values: dict[str, Any] = {
        "model": str(folder), "device": "cpu", "rewards": {"tiny_model:digit_share": 1.0}, "reward_timeout_s": None,
        "task_parameters": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}, "steps": 2,
        "prompts_per_step": 2, "group_size": 4, "max_new_tokens": 6, "learning_rate": 1e-3, "eval_problems": 0,
        "save_model": False, **changes,
    }  # fmt: skip
    train(config(**values, run_dir=str(tmp_path / "padded")))
    train(config(**values, run_dir=str(tmp_path / "packed"), packing=True, packing_tokens=60))
    padded, packed = metrics_of(tmp_path / "padded"), metrics_of(tmp_path / "packed")
    for expected, found in zip(padded, packed, strict=True):
        assert found.keys() == expected.keys()
        assert found["grad_norm"] > 0
        for name, value in expected.items():
            if name == "path/gemm_units":
                continue
            # Rounding in another order, which two epochs of AdamW make more of.
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
        assert found.get("first_step_ratio_max_dev", 0.0) == 0.0


def test_the_state_after_a_cut_has_the_same_value(tmp_path: Path) -> None:
    model = tiny_model(TOKENIZER)
    rollout = sampled(model)
    assert 0 < int(rollout.truncated.sum()) < len(rollout.truncated)
    values = []
    for packing in (False, True):
        config = PPOConfig(
            run_dir=str(tmp_path), prompts_per_step=3, group_size=3, minibatches=1, bootstrap_truncated=True,
            packing=packing, packing_tokens=60,
        )  # fmt: skip
        policy = Policy.of(model, stream_tokens=60 if packing else None)
        critic = Critic(policy, "head")
        torch.nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(4))
        learner = Learner(policy, critic, build_loss(config))
        values.append(terminal_rewards(learner, rollout, torch.zeros(9), config))
    assert bool((values[0] != 0.0).eq(rollout.truncated).all())
    torch.testing.assert_close(values[1], values[0])


def test_a_model_that_mixes_sequences_is_refused() -> None:
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(TOKENIZER), hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=256,
        )
    ).eval()  # fmt: skip
    rollout = sampled(tiny_model(TOKENIZER))
    with pytest.raises(ValueError, match=r"OPTForCausalLM cannot be trained on packed .* \(set packing to false\)"):
        Policy.of(model, stream_tokens=512).verify(rollout)
