"""What the run folder of a checkpoint says about its training, for result files."""

import json
from pathlib import Path
from typing import Any

STATE = "training state in a checkpoint, MB"
PROCESS = "peak memory of the training process, GB"


def trained(checkpoint: str | Path) -> dict[str, Any]:
    """Command, steps, code and memory of a run, from its run.json and its last checkpoint.

    Returns:
        {} for anything but a run folder, else {"command", "steps", "seed", "code"}, with "process_gb" (decimal, most
        that the process held) and "state_mb" (decimal, of the file to continue from: trained networks, their
        optimisers and averages, but nothing that is frozen) where they are known.
    """
    file = Path(checkpoint) / "run.json"
    if not file.exists():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    made = record.get("provenance", {})
    found: dict[str, Any] = {
        "command": " ".join(made.get("command", [])),
        "steps": record.get("steps"),
        "seed": made.get("seed"),
        "code": made.get("code"),
    }
    if "memory_gb" in record.get("metrics", {}):
        found["process_gb"] = round(record["metrics"]["memory_gb"], 3)
    last = Path(checkpoint) / "checkpoints" / "last.ckpt"
    if last.is_file():
        found["state_mb"] = round(last.stat().st_size / 1e6, 1)
    return found
