"""Listing and probing the input folder: media files, caption tables and files that are ignored.

A file that cannot be used is not an error: its `MediaFile` holds the reason.
"""

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.captions import TABLES
from magihuman.io.provenance import file_hash
from magihuman.media.reading import MediaError, MediaInfo, probe

_VIDEO = "3g2 3gp asf avi dv flv gif ivf m2ts m4v mkv mov mp4 mpeg mpg mts mxf nut ogv rm ts vob webm wmv"
_IMAGE = "avif bmp jpeg jpg png tif tiff webp"
_SOUND = "aac aif aiff flac m4a mp3 ogg opus wav wma"
MEDIA = frozenset(f".{ending}" for ending in f"{_VIDEO} {_IMAGE} {_SOUND}".split())


@dataclass(frozen=True)
class MediaFile:
    """A file of the input folder.

    Attributes:
        path: absolute; relative: to the input folder, with "/".
        size, modified: bytes and nanoseconds, to detect a change since the file was probed.
        info: facts from probing, or None if it cannot be used; `problem` is the reason.
    """

    path: str
    relative: str
    size: int = 0
    modified: int = 0
    info: MediaInfo | None = None
    problem: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MediaFile":
        info = values["info"]
        return cls(**{**values, "info": MediaInfo(**info) if info else None})


@dataclass(frozen=True)
class Listing:
    """Media files to probe, caption tables, and ignored files with the reason."""

    media: list[MediaFile]
    tables: list[Path]
    ignored: list[MediaFile]


def _walk(root: Path, skip: Path) -> Iterator[tuple[Path, list[os.DirEntry[str]] | OSError]]:
    """Folders under `root` in name order; symbolic links are followed, each real folder is visited once."""
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
        inner = [folder / entry.name for entry in entries if not entry.name.startswith(".") and _is_folder(entry)]
        pending.extend(reversed(inner))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def list_files(root: Path, output: Path) -> Listing:
    """Every regular file under `root` (hidden ones and the output folder left out), in name order."""
    media: list[MediaFile] = []
    tables: list[Path] = []
    others: list[MediaFile] = []
    texts: list[tuple[Path, MediaFile]] = []
    for folder, entries in _walk(root.absolute(), output.resolve()):
        if isinstance(entries, OSError):
            relative = os.path.relpath(folder, root.absolute())
            others.append(MediaFile(str(folder), relative, problem=f"folder cannot be read: {entries.strerror}"))
            continue
        for entry in entries:
            path = folder / entry.name
            if entry.name.startswith(".") or _is_folder(entry):
                continue
            relative = os.path.relpath(path, root.absolute()).replace(os.sep, "/")
            try:
                status = path.stat()
            except OSError as error:  # a dangling or circular link
                others.append(MediaFile(str(path), relative, problem=f"cannot be opened: {error.strerror}"))
                continue
            suffix = path.suffix.lower()
            found = MediaFile(str(path), relative, status.st_size, status.st_mtime_ns)
            if not path.is_file():
                others.append(MediaFile(str(path), relative, problem="is not a regular file (pipe, socket or device)"))
            elif suffix in MEDIA or not suffix:
                media.append(found)
            elif suffix in TABLES:
                tables.append(path)
            elif suffix == ".txt":
                texts.append((path, found))
            else:
                others.append(MediaFile(str(path), relative, problem=f"{suffix} is not a media file"))
    stems = {path for found in media for path in (str(Path(found.path).with_suffix("")), found.path)}
    for path, found in texts:
        if str(path.with_suffix("")) not in stems:
            others.append(MediaFile(found.path, found.relative, problem="caption without a media file of its name"))
    return Listing(media, tables, others)


def probe_file(found: MediaFile) -> MediaFile:
    """Copy of `found` with `info`, or with the reason why it cannot be used."""
    try:
        return replace(found, info=probe(found.path))
    except MediaError as error:
        return replace(found, problem=str(error))
    except Exception as error:  # a bug of a decoder must not end the run
        return replace(found, problem=f"cannot be read: {type(error).__name__}: {error}"[:200])


def find_duplicates(files: Iterable[MediaFile]) -> dict[str, str]:
    """Relative path of a file -> relative path of an earlier one with the same bytes; reads only files of equal size."""
    by_size: dict[int, list[MediaFile]] = defaultdict(list)
    for found in files:
        if found.info is not None:
            by_size[found.size].append(found)
    duplicates: dict[str, str] = {}
    for group in by_size.values():
        first: dict[str, str] = {}
        for found in group if len(group) > 1 else ():
            original = first.setdefault(file_hash(Path(found.path)), found.relative)
            if original != found.relative:
                duplicates[found.relative] = original
    return duplicates
