"""The training loops: rollouts, rewards, data, checkpoints, reports."""
