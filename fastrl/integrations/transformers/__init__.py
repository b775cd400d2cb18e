"""transformers models whose forward with labels never forms the (B, T, V) logits.

    from fastrl.integrations.transformers import patch

    patch(model)                       # or: with patch(model): trainer.train()
    output = model(input_ids, attention_mask=..., labels=labels)
    output.loss, output.logprobs, output.entropy

The model's own forward runs, with a stand-in for its head: whatever a family does before and after the head (images,
experts and their auxiliary loss, scale, softcap, shift, `num_items_in_batch`, the class of the output) is done by the
family's code. Where that code asks for the cross-entropy, the fused operation answers. On first use the log-probs of a
few tokens are compared with those of the model's own head.

Legend: B batch, T time, N tokens, D hidden, V vocabulary.
"""

from fastrl.integrations.transformers.patching import Patch as Patch
from fastrl.integrations.transformers.patching import patch as patch
from fastrl.integrations.transformers.patching import unpatch as unpatch
