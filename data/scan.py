"""Which files of a folder are media, and what each holds.

Nothing here is fatal: a file that cannot be used becomes a `Found` with a reason.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.captions import TABLES
from magihuman.media.mp4 import MediaError, MediaInfo, probe

_VIDEO = "3g2 3gp asf avi dv flv gif ivf m2ts m4v mkv mov mp4 mpeg mpg mts mxf nut ogv rm ts vob webm wmv"
_IMAGE = "avif bmp jpeg jpg png tif tiff webp"
_SOUND = "aac aif aiff flac m4a mp3 ogg opus wav wma"
MEDIA = frozenset(f".{ending}" for ending in f"{_VIDEO} {_IMAGE} {_SOUND}".split())


@dataclass(frozen=True)
class Found:
    """A file of the input folder.

    Attributes:
        path: absolute; relative: to the input folder, with "/".
        size, modified: bytes, nanoseconds; they tell whether a file has changed since it was looked at.
        info: what it holds, or None and `problem` says why it cannot be used.
    """

    path: str
    relative: str
    size: int = 0
    modified: int = 0
    info: MediaInfo | None = None
    problem: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Found":
        info = values["info"]
        return cls(**{**values, "info": MediaInfo(**info) if info else None})


@dataclass(frozen=True)
class Listing:
    """Media files to look into, caption tables, and what was passed over with its reason."""

    media: list[Found]
    tables: list[Path]
    passed_over: list[Found]


def _walk(root: Path, skip: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]] | OSError]]:
    """Folders under `root` in name order, through symbolic links but each real folder once."""
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, error
            continue
        if (status.st_dev, status.st_ino) in seen or folder.resolve() == skip:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder, entries
        inner = [
            folder / entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)
        ]
        pending.extend(reversed(inner))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_files(root: Path, output: Path) -> Listing:
    """Every regular file under `root` (hidden ones and the output folder left out), in name order."""
    media: list[Found] = []
    tables: list[Path] = []
    others: list[Found] = []
    texts: list[tuple[Path, Found]] = []
    for folder, entries in _walk(root.absolute(), output.resolve()):
        if isinstance(entries, OSError):
            relative = os.path.relpath(folder, root.absolute())
            others.append(Found(str(folder), relative, problem=f"folder cannot be read: {entries.strerror}"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith(".") or _is_folder(entry):
                continue
            relative = os.path.relpath(path, root.absolute()).replace(os.sep, "/")
            try:
                status = path.stat()
            except OSError as error:  # a dangling or circular link
                others.append(Found(str(path), relative, problem=f"cannot be opened: {error.strerror}"))
                continue
            suffix = path.suffix.lower()
            found = Found(str(path), relative, status.st_size, status.st_mtime_ns)
            if not path.is_file():
                others.append(
                    Found(str(path), relative, problem="is not a regular file (pipe, socket or device)")
                )
            elif suffix in MEDIA or not suffix:
                media.append(found)
            elif suffix in TABLES:
                tables.append(path)
            elif suffix == ".txt":
                texts.append((path, found))
            else:
                others.append(Found(str(path), relative, problem=f"{suffix} is not a media file"))
    stems = {path for found in media for path in (str(Path(found.path).with_suffix("")), found.path)}
    for path, found in texts:
        if str(path.with_suffix("")) not in stems:
            others.append(Found(found.path, found.relative, problem="text without a media file of its name"))
    return Listing(media, tables, others)


def look(found: Found) -> Found:
    """`found` with its `info`, or with the reason why it has none."""
    try:
        info = probe(found.path)
    except MediaError as error:
        return Found(found.path, found.relative, found.size, found.modified, None, str(error))
    except Exception as error:  # a decoder's bug is one file's problem, not the end of the run
        problem = f"cannot be read: {type(error).__name__}: {error}"[:200]
        return Found(found.path, found.relative, found.size, found.modified, None, problem)
    return Found(found.path, found.relative, found.size, found.modified, info)


def _digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def repeated(files: Iterable[Found]) -> dict[str, str]:
    """Relative path of a file -> relative path of an earlier one with the same bytes.

    Only files of equal size are read.
    """
    by_size: dict[int, list[Found]] = defaultdict(list)
    for found in files:
        if found.info is not None:
            by_size[found.size].append(found)
    repeats: dict[str, str] = {}
    for group in by_size.values():
        first: dict[str, str] = {}
        for found in group if len(group) > 1 else ():
            original = first.setdefault(_digest(found.path), found.relative)
            if original != found.relative:
                repeats[found.relative] = original
    return repeats
