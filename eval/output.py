"""Output of the evaluation commands: folders, result files, and the record of code, machine and training in them."""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version, processor


def folder_for(kind: str, *names: str) -> Path:
    """Default folder of results: `kind` in a run folder, else runs/`kind` under the names of what was measured."""
    if len(names) == 1 and (Path(names[0]) / "export").is_dir():
        return Path(names[0]) / kind
    return Path("runs") / kind / "+".join(name.strip("./").replace("/", "-") for name in names)[:100]


def short_names(names: Sequence[str]) -> list[str]:
    """Last parts of checkpoints' names or folders, the whole where several end alike."""
    last = [name.rstrip("/").rsplit("/", 1)[-1] for name in names]
    return [name if last.count(end) > 1 else end for name, end in zip(names, last, strict=True)]


def write_results(folder: Path, name: str, values: Mapping[str, Any], text: str | None = None) -> None:
    """Write NAME.json and, with `text`, NAME.md into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / f"{name}.json", json.dumps(values, indent=1) + "\n")
    if text is not None:
        write_atomically(folder / f"{name}.md", text + "\n")


def provenance() -> dict[str, Any]:
    """Command, commit, machine, date and versions: what is needed to measure again."""
    import numpy
    import torch

    return {
        "command": [Path(sys.argv[0]).name, *map(portable, sys.argv[1:])],
        "code": code_version(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "libraries": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
    }


def portable(argument: str) -> str:
    """A command line's argument without folders of this machine: "folder=/home/me/magihuman/runs/a" -> "folder=runs/a".

    Absolute paths below the working folder become relative, of others the last part is kept.
    """

    def relative(path: str) -> str:
        if not os.path.isabs(path):
            return path
        below = os.path.relpath(path, Path.cwd())
        return Path(path).name if below.startswith("..") else below

    def setting(word: str) -> str:
        key, equals, value = word.rpartition("=")
        return f"{key}{equals}{','.join(map(relative, value.split(',')))}"

    return " ".join(map(setting, argument.split(" ")))


def training_record(checkpoint: str | Path) -> dict[str, Any]:
    """Command, steps, code and memory of the training behind a checkpoint, from its run.json and its last checkpoint.

    Returns:
        {} for anything but a run folder, else {"command", "steps", "seed", "code"}, with "process_gb" (decimal, peak
        memory of the process) and "state_mb" (decimal, size of the file to resume from: trained networks, their
        optimisers and averages, nothing frozen) where they are known.
    """
    file = Path(checkpoint) / "run.json"
    if not file.exists():
        return {}
    record = json.loads(file.read_text(encoding="utf-8"))
    made = record.get("provenance", {})
    found: dict[str, Any] = {
        "command": " ".join(map(portable, made.get("command", []))),
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
