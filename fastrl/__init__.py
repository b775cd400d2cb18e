"""Fused per-token log-probs, policy and preference losses for language-model post-training."""
