"""A finished run's folder, written by hand: what the report and the record of a run read."""

import json
from pathlib import Path


def write_run(folder: Path, *, steps: int = 12, **files: object) -> Path:
    """Write a run directory; a keyword replaces the content of a file, None leaves the file out."""
    content: dict[str, object] = {
        "metrics": [
            {
                "step": step,
                "reward": step / steps,
                "rewards/accuracy": step / steps,
                "kl": None if step == 3 else 0.01 * step,
                "entropy": 1.0,
                "clip_ratio/low_mean": 0.01,
                "clip_ratio/high_mean": 0.02,
                "grad_norm": 1.0,
                "completion_length/mean": 9.0,
                "time/rollout": 2.0,
                "time/loss_backward": 1.0,
            }
            for step in range(1, steps + 1)
        ],
        "evaluations": [
            {"step": 0, "split": "held_out", "mode": "sampled", "accuracy": 0.1, "standard_error": 0.03, "n": 100},
            {"step": steps, "split": "held_out", "mode": "sampled", "accuracy": 0.5, "standard_error": 0.04, "n": 100},
        ],
        "samples": [
            {"step": 0, "prompt": "1 + 1 =", "completion": "three", "answer": "2", "reward": 0.0},
            {"step": steps, "prompt": "1 + 1 =", "completion": "2", "answer": "2", "reward": 1.0},
        ],
        "config": {"model": "tiny", "steps": steps, "rewards": {"accuracy": 1.0}, "lora_rank": None},
        "environment": {"torch": "2.13.0", "cores": 2},
    } | files
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in content.items():
        if value is None:
            continue
        if name == "metrics":
            (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in value))
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
