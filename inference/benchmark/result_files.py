"""Result files in inference/results/latency: JSON with all that a repetition needs; written once, never changed."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magihuman.errors import UserError
from magihuman.io.files import write_result
from magihuman.io.markdown import commit
from magihuman.io.provenance import code_version, processor, sources_hash
from magihuman.io.text import load_json
from magihuman.models.gpu_specs import GPUS, recognise

FORMAT = "magihuman-latency/1"
FOLDER = Path(__file__).resolve().parents[1] / "results" / "latency"
KINDS = ("measure", "decode", "micro", "ladder", "train", "profile", "steps")
Row = dict[str, Any]
_QUERY = "driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu"
_THROTTLED = "clocks_event_reasons.active"  # older drivers do not know it


def provenance(device: Any) -> dict[str, Any]:
    """Command, code, date, device with its clocks, libraries and load of a measurement.

    Args:
        device: torch.device of the measurement.
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
    """Lines of the answer; none where there is no nvidia-smi or it does not support the query."""
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line for line in done.stdout.splitlines() if line.strip()]


def write(kind: str, name: str, rows: list[Row], made: dict[str, Any], folder: Path | None = None) -> Path:
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
    stem = re.sub(r"[^a-z0-9.]+", "-", f"{date}-{made['machine']}-{kind}-{name}-{commit}".lower()).strip("-")
    values = {"format": FORMAT, "kind": kind, "rows": rows, "provenance": made}
    path, number = folder / f"{stem}.json", 1
    while path.exists():  # an older measurement stays as it is
        number += 1
        path = folder / f"{stem}-{number}.json"
    return write_result(path, values)


def read(folder: Path | None = None) -> list[dict[str, Any]]:
    """All result files of a folder, oldest first; each gets its own name as "file".

    Raises:
        UserError: a file that is damaged or of another format.
    """
    folder = FOLDER if folder is None else folder
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            values = load_json(path)
            if values["format"] != FORMAT or values["kind"] not in KINDS:
                raise ValueError(f"its format is {values['format']!r}")
            if values["kind"] != "decode" and values["provenance"]["how"] != "measured":
                raise ValueError("it was not measured")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is not a result file of inference.benchmark: {error}") from error
        found.append({**values, "file": path.name})
    # A second file of the same second has a longer name.
    return sorted(found, key=lambda v: (v["provenance"]["date"], len(v["file"]), v["file"]))


def newest(folder: Path, kind: str, key: Callable[[Row], tuple[Any, ...]]) -> list[Row]:
    """Rows of a kind, each with its file's name and provenance; of rows with the same key on one machine the newest."""
    found: dict[tuple[Any, ...], Row] = {}
    for values in read(folder):
        if values["kind"] == kind:
            for row in values["rows"]:
                named = {**row, "file": values["file"], "made": values["provenance"]}
                found[key(row), values["provenance"]["machine"]] = named
    return list(found.values())


def measured(folder: Path) -> list[Row]:
    """The newest row of every clip, tier, decoder and machine."""

    def key(row: Row) -> tuple[Any, ...]:
        decoder = (row["decoder"] or {}).get("name")
        stages = tuple((stage["steps"], stage["tokens"]["total"]) for stage in row["geometry"].values())
        return row["size"], row["model"], row["tier"], str(row["options"]), row["dtype"], decoder, stages

    return newest(folder, "measure", key)


def on_gpu(row: Row) -> bool:
    """Whether a GPU made this row of `newest`."""
    return "gpu" in row["made"]


def card(machine: str) -> str:
    """A GPU's short name."""
    known = recognise(machine)
    return machine.removeprefix("NVIDIA ") if known is None else known.name


def is_published_card(row: Row) -> bool:
    """Whether a row of `newest` is of the card of the published table."""
    return card(row["made"]["machine"]) == GPUS["h100"].name


def origin(rows: Iterable[Row]) -> str:
    """Machines, days and commits of rows of `newest`."""
    made = [row["made"] for row in rows]
    days = sorted({each["date"][:10] for each in made})
    commits = {commit(each["code"]) for each in made}
    machines = {f"{each['machine']}, torch {each['libraries']['torch']}" for each in made}
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(sorted(machines))}; {when}; commit {', '.join(sorted(commits))}."
