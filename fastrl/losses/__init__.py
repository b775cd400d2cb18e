"""Policy, preference, value, reward, KL, advantage and distillation losses as tensor code."""
