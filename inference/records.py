"""What a generated clip leaves on disk: mp4, JSON record, line of the manifest; and when it counts as done.

A record holds all that is needed to make the clip again and nothing that changes from run to run (no dates,
no durations), so the same command gives the same bytes. A clip is done when its record describes the very
request and its mp4 has the recorded hash; a run killed at any point continues with the rest.
"""

import json
import os
import platform
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from glob import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inference.requests import Request
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version, file_hash

if TYPE_CHECKING:
    from inference.settings import Settings

FORMAT = "magihuman-clip/1"
MANIFEST = "manifest.jsonl"


@dataclass(frozen=True)
class Job:
    """A request with everything resolved.

    Attributes:
        identity: the part of the record that decides the clip (prompt, seed, conditions, checkpoint, ...).
        path: of the mp4.
        command: makes this clip alone.
    """

    request: Request
    settings: "Settings"
    identity: dict[str, Any]
    path: Path
    command: list[str]

    @property
    def record_path(self) -> Path:
        """Of the JSON beside the mp4."""
        return self.path.with_suffix(".json")

    def finished(self) -> dict[str, Any] | None:
        """The record on disk if it belongs to this job and its mp4 is whole, else None."""
        try:
            record = json.loads(self.record_path.read_text(encoding="utf-8"))
            # Compared as JSON: tuples have become lists there.
            same = all(
                record.get(key) == value for key, value in json.loads(json.dumps(self.identity)).items()
            )
            return record if same and file_hash(self.path) == record["sha256"] else None
        except (OSError, ValueError, AttributeError, KeyError):
            return None


def write(job: Job, save: Callable[[Path], dict[str, Any]], manifest: Path | None) -> None:
    """Write a clip's mp4, then its record, then its line of the manifest, each whole or not at all.

    Args:
        save: writes the mp4 and returns facts about it for the record.

    Raises:
        UserError: the disk is full, the folder cannot be written, or the like.
    """
    try:
        for leftover in job.path.parent.glob(f".{escape(job.path.name)}.*.part"):  # of a killed run
            leftover.unlink(missing_ok=True)
        facts = save(job.path)
        record = {
            **job.identity,
            "file": job.path.name,
            "sha256": file_hash(job.path),
            **facts,
            "versions": versions(),
            "command": shlex.join(job.command),
        }
        write_atomically(job.record_path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if manifest is not None:
            append_line(manifest, manifest_line(job.request.name, record))
    except OSError as error:
        raise UserError(f"cannot write {job.path}: {error.strerror or error}") from error


def manifest_line(name: str, record: dict[str, Any]) -> str:
    """A finished clip as its line of the manifest."""
    line = {"name": name, **{key: record[key] for key in ("file", "prompt", "seed", "sha256")}}
    return json.dumps(line, ensure_ascii=False)


def repair_manifest(path: Path, finished: dict[str, dict[str, Any] | None]) -> None:
    """Make the manifest say what is done.

    A kill may have left a torn last line, or a clip without its line; a clip that is to be made again must
    lose its line. Lines of clips that are not asked about stay.

    Args:
        finished: the record, or None where the clip is still to be made, by name.
    """
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            if json.loads(line)["name"] not in finished:
                kept.append(line)
        except (ValueError, TypeError, KeyError):
            continue
    kept += [manifest_line(name, record) for name, record in finished.items() if record is not None]
    write_atomically(path, "".join(line + "\n" for line in kept))


def append_line(path: Path, line: str) -> None:
    """Append one line by a single write, so that lines of several processes never mix."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@cache
def versions() -> dict[str, Any]:
    """Of what the bytes of a clip depend on."""
    packages = {name: metadata.version(name) for name in ("magihuman", "torch", "av", "numpy")}
    return {"python": platform.python_version(), **packages, "code": code_version()}
