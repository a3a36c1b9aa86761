"""Result files: JSON with all that is needed to make them again; written once, never changed."""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version, processor, sources_hash

FORMAT = "magihuman-latency/1"
FOLDER = Path(__file__).resolve().parents[1] / "results" / "latency"
KINDS = ("measure", "decode", "micro", "ladder", "train", "profile", "steps")
_QUERY = "driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
_THROTTLED = "clocks_event_reasons.active"  # older drivers do not know it


def provenance(device: Any) -> dict[str, Any]:
    """Where and from what: command, code, date, device with its clocks, libraries, load.

    Args:
        device: torch.device that ran.
    """
    import torch

    values: dict[str, Any] = {
        "how": "measured",
        "command": shlex.join(["python", "-m", "inference.benchmark", *sys.argv[1:]]),
        "code": {**code_version(), "sources": sources_hash()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": processor(),
        "threads": torch.get_num_threads(),
        "libraries": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if hasattr(os, "getloadavg"):
        values["load_average"] = round(os.getloadavg()[0], 2)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        values["machine"] = properties.name
        values["memory_bytes"] = properties.total_memory
        values["libraries"] |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        try:
            import triton

            values["libraries"]["triton"] = triton.__version__
        except ImportError:
            pass
        values["gpu"] = gpu_state()
    return values


def gpu_state() -> dict[str, Any]:
    """Driver, power and clocks, and how many other processes compute on the GPU; empty without nvidia-smi."""
    found: dict[str, Any] = {}
    for query in (_QUERY, _THROTTLED):
        state = _smi(f"--query-gpu={query}")
        if state:
            found |= dict(zip(query.split(","), state[0].split(", "), strict=False))
    others = {pid.strip() for pid in _smi("--query-compute-apps=pid")} - {str(os.getpid())}
    return {**found, "other_processes": len(others)} if found else {}


def _smi(query: str) -> list[str]:
    """Lines of an answer; none where there is no nvidia-smi or it does not know the question."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def write(
    kind: str, name: str, rows: list[dict[str, Any]], made: dict[str, Any], folder: Path | None = None
) -> Path:
    """Write a new file.

    Args:
        kind: one of `KINDS`; name: what was measured, for the file's name.
        made: see `provenance`.

    Returns:
        its path, such as 20260101t120000-nvidia-h100-measure-256p-fast-1a2b3c4.json.

    Raises:
        UserError: the folder cannot be written.
    """
    assert kind in KINDS
    folder = FOLDER if folder is None else folder
    commit = made["code"].get("commit", made["code"]["sources"])[:7]
    date = re.sub(r"[-:]|\+.*", "", made["date"])
    stem = _slug(f"{date}-{made['machine']}-{kind}-{name}-{commit}")
    values = {"format": FORMAT, "kind": kind, "rows": rows, "provenance": made}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path, number = folder / f"{stem}.json", 1
        while path.exists():  # an older measurement stays as it is
            number += 1
            path = folder / f"{stem}-{number}.json"
        write_atomically(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error
    return path


def read(folder: Path | None = None) -> list[dict[str, Any]]:
    """All result files of a folder, oldest first; each gets its own name as "file".

    Raises:
        UserError: a file that is damaged or of another format.
    """
    folder = FOLDER if folder is None else folder
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = json.loads(path.read_text())
            if values["format"] != FORMAT or values["kind"] not in KINDS:
                raise ValueError(f"its format is {values['format']!r}")
            if values["kind"] != "decode" and values["provenance"]["how"] != "measured":
                raise ValueError("it was not measured")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result file of inference.benchmark: {error}") from error
        found.append({**values, "file": path.name})
    # A second file of the same second has a longer name.
    return sorted(found, key=lambda v: (v["provenance"]["date"], len(v["file"]), v["file"]))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
