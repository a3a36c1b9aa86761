"""Reads W&B's offline files: the records of a `.wandb` file, without a server."""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """LevelDB's log format: blocks of chunks [crc:4][length:2][kind:1][bytes], kinds whole, first, middle, last."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if left < HEADER or kind == 0:
            at += left
            continue
        if at + HEADER + length > len(data):
            return  # not written to its end
        record = (b"" if kind in (1, 2) else record) + data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(record)


@dataclass
class Recorded:
    """What W&B's server would get of one run."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    preempting: bool = False
    exit_code: int | None = None


def read(folder: Path) -> list[Recorded]:
    """The offline runs in wandb/ of a run folder, oldest first."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for _ in range(100):  # W&B's process may still be writing the end
            run = _run(file)
            if run.exit_code is not None:
                break
            time.sleep(0.05)
        found.append(run)
    return found


def _run(file: Path) -> Recorded:
    found = Recorded()

    def items(updates: Any) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for update in updates:
            *path, last = update.nested_key or [update.key]
            inner = values
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = json.loads(update.value_json)
        return values

    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= items(record.run.config.update)
        elif kind == "config":
            found.config |= items(record.config.update)
        elif kind == "history":
            found.history.append(items(record.history.item))
        elif kind == "summary":
            found.summary |= items(record.summary.update)
        elif kind == "artifact":
            found.artifacts.append(record.artifact)
        elif kind == "files":
            found.files += [item.path for item in record.files.files]
        elif kind == "preempting":
            found.preempting = True
        elif kind == "exit":
            found.exit_code = record.exit.exit_code
    return found
