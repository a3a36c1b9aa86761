"""Listing and probing the input folder: media files, caption tables and files that are ignored.

A file that cannot be used is not an error: its `MediaFile` holds the reason.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.captions import FileNames
from magihuman.io.provenance import file_hash
from magihuman.io.text import TABLES
from magihuman.media.container import MediaError
from magihuman.media.reading import MediaInfo, probe

_VIDEO = "3g2 3gp asf avi dv flv gif ivf m2ts m4v mkv mov mp4 mpeg mpg mts mxf nut ogv rm ts vob webm wmv"
_IMAGE = "avif bmp jpeg jpg png tif tiff webp"
_SOUND = "aac aif aiff flac m4a mp3 ogg opus wav wma"
MEDIA = frozenset(f".{ending}" for ending in f"{_VIDEO} {_IMAGE} {_SOUND}".split())


@dataclass(frozen=True)
class MediaFile:
    """A file of the input folder.

    Attributes:
        path: absolute; relative: to the input folder, with "/".
        size: in bytes; stamp: size, times and inode, which change when the file is written or replaced.
        content: sha256 of its bytes.
        info: facts from probing, or None if it cannot be used; `problem` is the reason.
    """

    path: str
    relative: str
    size: int = 0
    stamp: str = ""
    content: str = ""
    info: MediaInfo | None = None
    problem: str = ""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "MediaFile":
        info = values["info"]
        return cls(**{**values, "info": MediaInfo(**info) if info else None})


@dataclass(frozen=True)
class Listing:
    """Media files to probe, their names, caption tables, and ignored files with the reason.

    Attributes:
        texts: path of a media file -> its caption's text file.
    """

    media: list[MediaFile]
    names: FileNames
    texts: dict[str, Path]
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
    others: list[MediaFile] = []
    captions: list[MediaFile] = []
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
            # The change time cannot be set by copying programs, as the time of modification can.
            stamp = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
            found = MediaFile(str(path), relative, status.st_size, stamp)
            if not path.is_file():
                others.append(MediaFile(str(path), relative, problem="is not a regular file (pipe, socket or device)"))
            elif suffix in MEDIA or not suffix:
                media.append(found)
            elif suffix in (".txt", *TABLES):
                captions.append(found)
            else:
                others.append(MediaFile(str(path), relative, problem=f"{suffix} is not a media file"))
    names = FileNames(found.path for found in media)
    texts, tables = _match_captions(captions, names, others)
    return Listing(media, names, texts, tables, others)


def _match_captions(
    captions: list[MediaFile], names: FileNames, others: list[MediaFile]
) -> tuple[dict[str, Path], list[Path]]:
    """Text file of each media file, and tables; files that are neither are added to `others`."""
    texts: dict[str, Path] = {}
    tables: list[Path] = []
    # dog.txt before dog.mp4.txt before Dog.TXT, for dog.mp4.
    for found in sorted(captions, key=lambda found: _closeness(found.path, names)):
        path = Path(found.path)
        named = names.find(os.path.splitext(path)[0])
        problem = ""
        if path.suffix.lower() != ".txt":
            if path.suffix.lower() == ".json" and named:
                problem = "describes one file; its caption is taken from a .txt or a table"
            else:
                tables.append(path)
        elif not named:
            problem = "caption without a media file of its name"
        elif path not in [texts.setdefault(media, path) for media in named]:
            problem = f"another caption for {Path(named[0]).name}; {texts[named[0]].name} is used"
        if problem:
            others.append(replace(found, problem=problem))
    tables.sort(key=lambda table: (len(table.parts), table))  # those of the outer folders first
    return texts, tables


def _closeness(text: str, names: FileNames) -> tuple[bool, bool, str]:
    """Order of text files that could belong to one media file."""
    stem, ending = os.path.splitext(text)
    return stem not in names or ending != ".txt", Path(stem).suffix.lower() in MEDIA, text


def probe_file(found: MediaFile) -> MediaFile:
    """Copy of `found` with `info` and `content`, or with the reason why it cannot be used."""
    try:
        return replace(found, info=probe(found.path), content=file_hash(Path(found.path)))
    except MediaError as error:
        return replace(found, problem=str(error))
    except Exception as error:  # a bug of a decoder must not end the run
        return replace(found, problem=f"cannot be read: {type(error).__name__}: {error}"[:200])
