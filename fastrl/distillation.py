"""Distillation: from a teacher's distribution, or from its log-probs of the student's samples.

    distillation_loss                  KL, reverse KL or generalised Jensen-Shannon, from hidden states and two heads
    distillation_loss_from_logits      the same from logits
    sampled_distillation_advantages    teacher - student log-prob of sampled tokens, as advantages for a `PolicyLoss`

`fastrl.full_kl` is the KL to a reference policy over the vocabulary, from logits.
"""

from fastrl.losses.distillation import distillation_loss as distillation_loss
from fastrl.losses.distillation import distillation_loss_from_logits as distillation_loss_from_logits
from fastrl.losses.distillation import sampled_distillation_advantages as sampled_distillation_advantages
