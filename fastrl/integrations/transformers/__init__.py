"""transformers models whose forward with labels does not form the (B, T, V) logits.

    from fastrl.integrations.transformers import patch

    patch(model)                       # or: with patch(model): trainer.train()
    output = model(input_ids, attention_mask=..., labels=labels)
    output.loss, output.logprobs, output.entropy

`patch` replaces the head by one that returns lazy logits, and runs the model's own forward. So the code of the model's
family still does the rest: images, experts and their auxiliary loss, scale, softcap, shift, `num_items_in_batch`, the
class of the output. When that code calls the cross-entropy, the fused operation computes it. On first use the log-probs
of a few tokens are compared with the model's own.

patching.py     patch, unpatch, and the fused cross-entropy
head.py         the output head: its place in the model, its weight and bias, LoRA adapters on it
lazy_logits.py  the object that passes through the model's code as logits

Legend: B batch, T time, N tokens, D hidden, V vocabulary.
"""

from fastrl.integrations.transformers.patching import Patch as Patch
from fastrl.integrations.transformers.patching import patch as patch
from fastrl.integrations.transformers.patching import unpatch as unpatch
