"""Weights of metrics: found on this machine only, and identified for the cache of values.

    folder = local_model("zai-org/GLM-ASR-Nano-2512")   # or a path; UserError with the command that gets it
    fingerprint(folder)                                  # "commit 5f2c..." or "sha256 91ab..."

Nothing here opens a connection.
"""

import hashlib
import os
import re
from pathlib import Path

from eval.metrics.registry import MissingDependency
from magihuman.errors import UserError
from magihuman.io.files import hub_folder, is_hub_id

PIECE = 64 << 10
"""Bytes that `fingerprint` reads at the start, in the middle and at the end of a file."""


def fingerprint(path: Path) -> str:
    """Identity of weights, quick enough for every start of a command.

    A snapshot in the cache of the Hugging Face Hub is its commit. Anything else is a sha256 over the names, sizes and
    three pieces of `PIECE` bytes of its files: other weights and weights that were trained further are noticed, the
    change of a few numbers of a large file may not be.

    Raises:
        UserError: there is nothing at `path`, or it cannot be read.
    """
    # cache/models--OWNER--NAME/snapshots/COMMIT; a snapshot's files are links, so the path is not resolved.
    if re.fullmatch(r"[0-9a-f]{40}", path.name) and path.parent.name == "snapshots" and path.is_dir():
        return f"commit {path.name}"
    digest = hashlib.sha256()
    try:
        files = [path] if not path.is_dir() else sorted(found for found in path.rglob("*") if found.is_file())
        for file in files:
            name, size = (file.name if file == path else file.relative_to(path).as_posix()), file.stat().st_size
            digest.update(f"{name} {size}\n".encode())
            with file.open("rb") as stream:
                for start in (0, max(0, (size - PIECE) // 2), max(0, size - PIECE)):
                    stream.seek(start)
                    digest.update(stream.read(PIECE))
    except OSError as error:
        raise UserError(f"weights {path} cannot be read: {error.strerror or error}") from error
    return f"sha256 {digest.hexdigest()}"


def local_model(source: str | Path) -> Path:
    """Folder of a model of transformers: a local path, or a Hub name that is in the local cache, completely.

    Raises:
        UserError: it is not there; with the command that gets it.
    """
    found = _look_up(source)
    if isinstance(found, MissingDependency):
        raise UserError(str(found))
    return found


def missing_model(source: str | Path) -> MissingDependency | None:
    """What `local_model` lacks, for `Measurement.missing`; None where the model is there."""
    found = _look_up(source)
    return found if isinstance(found, MissingDependency) else None


def missing_file(path: str | Path | None, option: str, content: str) -> MissingDependency | None:
    """Whether a file that a metric needs is not given or not there.

    Args:
        option: that names it, such as "lip_sync.weights"; content: for the message, such as "weights of SyncNet".
    """
    if path is None:
        return MissingDependency(f"no {content}", f"{option}=FILE")
    if not Path(path).expanduser().is_file():
        return MissingDependency(f"{option}={path} is no file", f"{option}=FILE, {content}")
    return None


def _look_up(source: str | Path) -> Path | MissingDependency:
    path = Path(os.path.expanduser(source))
    command = f"hf download {source}"
    if path.is_dir():
        command = "copy the whole folder again, or give another"
    elif not is_hub_id(source):
        return MissingDependency(
            f"there is no folder {source}", "give a folder with config.json, or a Hub name OWNER/NAME"
        )
    elif (snapshot := hub_folder(str(source))) is None:
        return MissingDependency(f"{source} is not in the local Hugging Face cache", command)
    else:
        path = snapshot
    lost = _lost_files(path)
    return MissingDependency(f"{source} is incomplete here: {lost} missing", command) if lost else path


def _lost_files(folder: Path) -> str:
    """Names of files that a model's folder should hold and does not; "" for none."""
    import json

    lost = [] if (folder / "config.json").is_file() else ["config.json"]
    indices = [*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]
    if indices:
        try:
            shards = set(json.loads(indices[0].read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return f"a readable {indices[0].name}"
        lost += sorted(str(shard) for shard in shards if not (folder / str(shard)).is_file())
    elif not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        lost.append("*.safetensors")
    return ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
