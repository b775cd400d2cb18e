"""The output head of a loaded model: its place in the model, its weight and bias, and the adapters on it.

The head is called as a module, with its `forward` replaced for that one call. So its hooks run around the fused
operation: they gather a sharded weight (FSDP2, ZeRO-3) or bring an offloaded one to the device.

Legend: D hidden, V vocabulary, R rank of an adapter.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


@dataclass(frozen=True)
class HeadPlace:
    """The place of a model's output head: attribute `name` of `owner`."""

    owner: nn.Module
    name: str

    @classmethod
    def of(cls, model: Any) -> HeadPlace:
        """Return the place of a transformers model's output embeddings, or raise ValueError."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if head is None:
            raise ValueError(f"{type(model).__name__} has no output head (get_output_embeddings() is None) to fuse")
        for owner in model.modules():
            for name, child in owner.named_children():
                if child is head:
                    return cls(owner, name)
        raise ValueError(f"the output head of {type(model).__name__} is not one of its modules")

    @property
    def module(self) -> nn.Module:
        """The head as it is now: wrappers and adapters may be newer than the patch."""
        return self.owner._modules[self.name]  # pyright: ignore[reportReturnType]  # a head is there

    @contextmanager
    def shadowed(self, stand_in: Any) -> Iterator[None]:
        """Make `owner.name` return the stand-in inside this context."""
        # Python looks into the instance's __dict__ before nn.Module.__getattr__ looks into _modules.
        if self.name in self.owner.__dict__:
            raise RuntimeError("a patched model was called with labels while such a call was running: take turns")
        self.owner.__dict__[self.name] = stand_in
        try:
            yield
        finally:
            del self.owner.__dict__[self.name]


@contextmanager
def replaced_forward(module: nn.Module, replacement: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Give the module another forward inside this context, under all of its hooks; yield the original one."""
    # accelerate's hook is itself the `forward`, and calls `_old_forward`.
    name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    before = module.__dict__.get(name, _ABSENT)
    original = getattr(module, name)
    module.__dict__[name] = replacement
    try:
        yield original
    finally:
        if before is _ABSENT:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def innermost(module: Any) -> Any:
    """Return the module inside wrappers that only pass a call on (FSDP, torch.compile, PEFT's modules_to_save)."""
    while True:
        if hasattr(module, "_fsdp_wrapped_module"):
            module = module._fsdp_wrapped_module
        elif isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
        elif (peft := sys.modules.get("peft.utils.other")) and isinstance(module, peft.ModulesToSaveWrapper):
            own = module.disable_adapters or not module.active_adapters
            module = module.original_module if own else module.modules_to_save[module.active_adapters[0]]
        else:
            return module


def check_output_layer(module: Any) -> None:
    """Raise ValueError, naming the kind, unless the head is a Linear or a Linear with plain LoRA adapters."""
    inner = innermost(module)
    if _is_linear(inner):
        return
    if not _is_lora(inner):
        raise ValueError(
            f"the output head must be a torch.nn.Linear, by itself or with LoRA adapters, got {_kind(inner)}; "
            "quantised heads and other adapters are not supported: leave lm_head out of them"
        )
    if not _is_linear(inner.base_layer):
        raise ValueError(f"LoRA on the output head needs a torch.nn.Linear under it, got {_kind(inner.base_layer)}")
    variants = sorted(set(inner.lora_variant) & set(inner.active_adapters))
    if variants:
        kinds = ", ".join(type(inner.lora_variant[name]).__name__ for name in variants)
        raise ValueError(f"the adapter on the output head is {kinds}; plain LoRA is supported (use_dora=False)")


def vocabulary_of(module: Any) -> int:
    """Return V."""
    # Not from the weight, which may be sharded.
    return int(innermost(module).out_features)


def effective_linear(
    module: Any,  # the innermost module
    hidden: Tensor,  # (..., D)
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (hidden, weight, bias) of one Linear equal to the head with its adapters, attached to their parameters.

    LoRA adds s B A x to W x, which is one wider Linear: [x, s A dropout(x)] (..., D + R) with [W, B] (V, D + R). The
    gradients of A and B and the dropout are the host's own. The extra memory is one copy of the head.
    """
    if _is_linear(module):
        return hidden, module.weight, module.bias
    if module.disable_adapters and module.merged:
        module.unmerge()
    base = module.base_layer
    if module.disable_adapters or module.merged:
        return hidden, base.weight, base.bias
    states, weights, bias = [hidden], [base.weight], base.bias
    for name in module.active_adapters:
        if name not in module.lora_A:
            continue
        down, up, scaling = module.lora_A[name], module.lora_B[name], module.scaling[name]
        low = down(module.lora_dropout[name](hidden.to(down.weight.dtype))) * scaling
        states.append(low.to(hidden.dtype))
        weights.append(up.weight.to(base.weight.dtype))
        if up.bias is not None:
            bias = up.bias * scaling if bias is None else bias + up.bias * scaling
    if len(states) == 1:
        return hidden, base.weight, bias
    return torch.cat(states, dim=-1), torch.cat(weights, dim=-1), bias


def _is_linear(module: Any) -> bool:
    # FSDP2 and parametrisations make subclasses with the same forward. Quantised layers have another.
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_lora(module: Any) -> bool:
    lora = sys.modules.get("peft.tuners.lora")
    return lora is not None and type(module) is lora.Linear


def _kind(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__name__}"
