"""Provenance of results: hashes of checkpoints and data, version of the code, processor. No heavy imports."""

import hashlib
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

README = "README.md"
"""The model card of a folder."""
HASHED_BYTES = 2 << 30
"""Of folders larger than this, index files and `SAMPLE_BYTES` of every `SAMPLE_STEP` bytes are hashed instead of all."""
SAMPLE_BYTES, SAMPLE_STEP = 4 << 10, 16 << 20


def file_hash(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path) -> dict[str, Any]:
    """Identity of a parent (file, export folder or shard folder).

    Returns:
        {"sha256", "of"}: over every byte of its files but README.md, which people edit, or a sample of them where there are
        more than `HASHED_BYTES`: a file that was trained further or replaced is noticed, the change of a few numbers may not
        be.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name != README)
    sizes = {file: file.stat().st_size for file in files}
    sampled = sum(sizes.values()) > HASHED_BYTES
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.relative_to(path) if file != path else file.name} {sizes[file]}\n".encode())
    for file in files:
        whole = not sampled or file.suffix == ".json"
        with file.open("rb") as stream:
            for start in range(0, sizes[file], 1 << 20 if whole else SAMPLE_STEP):
                stream.seek(start)
                digest.update(stream.read(1 << 20 if whole else SAMPLE_BYTES))
    return {"sha256": digest.hexdigest(), "of": "a sample of the bytes" if sampled else "all bytes"}


def code_version() -> dict[str, Any]:
    """Commit of the code and whether it was changed since; empty outside a git checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"commit": commit, "changed": bool(changed)}


def computed(how: str, *command: str) -> dict[str, Any]:
    """Provenance of numbers that a command computed.

    Args:
        how: in words, and that nothing was measured; command: module and arguments of `python -m`.
    """
    return {
        "how": how,
        "command": shlex.join(["python", "-m", *command]),
        "code": code_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def sources_hash() -> str:
    """Hash of every Python file that inference and training run, to identify the commit of a copy without git."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for package in ("magihuman", "inference", "recipes"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def processor() -> str:
    """The CPU's name and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{cores} cores of {name}"


def portable(argument: str) -> str:
    """A text without folders of this machine: "[a,folder=/home/me/magihuman/runs/a]" -> "[a,folder=runs/a]".

    Absolute paths below the working folder become relative, of others (also ~/x and file:///x) the last part is kept. A path
    ends at a space, a comma, a quote or a bracket.
    """

    def relative(match: re.Match[str]) -> str:
        path = os.path.expanduser(match[0].removeprefix("file://"))
        below = os.path.relpath(path, Path.cwd())
        return Path(path).name if below.startswith("..") else below

    # Not within a relative path or an address of another kind.
    return re.sub(r"(?:file://|(?<![\w./~*-])(?:~[\w.-]*)?)/(?!/)[^\s,;'\"`()\[\]{}<>|]+", relative, argument)


def without_secrets(node: Any) -> Any:
    """Plain values whose texts have no password and no query (a signature, a token) in addresses, for what is published.

    without_secrets({"shards": "https://me:word@host/a.tar?sig=1"})  # {"shards": "https://host/a.tar"}
    """
    if isinstance(node, Mapping):
        return {key: without_secrets(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [without_secrets(value) for value in node]
    if not isinstance(node, str):
        return node
    return re.sub(r"(\w://[^\s?'\"]+)\?[^\s'\"]*", r"\1", re.sub(r"(?<=\w://)[^/@\s]*@", "", node))
