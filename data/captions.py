"""Captions of media files: a .txt next to the file, or a row of a table (.csv, .tsv, .jsonl, .json).

A .txt has priority over a table. Paths in a table are relative to the table's folder.
"""

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from magihuman.errors import UserError
from magihuman.io.text import CAPTION_COLUMNS, MAX_CHARACTERS, TableRow, prompt_text, read_rows, read_text

FILE_COLUMNS = (
    "file", "path", "file_name", "filename", "file_path", "filepath", "media", "media_path", "video", "video_path",
    "video_file", "clip", "image", "image_path",
)  # fmt: skip
"""Names of a table's column with media files; the first one with a value is used."""
LONGEST = 1 << 20  # bytes of a text file


class Rejected(Exception):
    """A file or a caption that cannot be used; the message is the reason for the report."""


class NoCaption(Rejected):
    """A file without a caption."""


class FileNames:
    """Media files by path, with or without its ending.

        FileNames(["/a/Dog.mp4"]).find("/a/dog.MP4")  # ["/a/Dog.mp4"]

    Where no file has exactly a name, one is taken that differs in case, in the Unicode form of its accents (macOS
    decomposes them) or by backslashes, if it is the only one.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        self._exact: dict[str, list[str]] = defaultdict(list)
        for path in paths:
            for name in {path, os.path.splitext(path)[0]}:
                self._exact[os.path.normpath(name)].append(path)
        self._similar: dict[str, list[str]] = defaultdict(list)
        for name in self._exact:
            self._similar[_fold(name)].append(name)

    def __contains__(self, name: str) -> bool:
        return os.path.normpath(name) in self._exact

    def find(self, name: str) -> list[str]:
        """Files of an absolute path; several where it has no ending."""
        whole = os.path.normpath(name)
        if whole not in self._exact:
            similar = self._similar.get(_fold(os.path.normpath(name.replace("\\", "/"))), [])
            if len(similar) != 1:
                return []
            whole = similar[0]
        found = self._exact[whole]
        # dog.mkv is that file, not its poster dog.mkv.png too.
        return [path for path in found if os.path.splitext(path)[1] and os.path.normpath(path) == whole] or found


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


@dataclass(frozen=True)
class CaptionRow:
    """A caption in a table, or the reason why its row cannot be used; line: "line 3"."""

    table: str
    line: str
    caption: str
    problem: str = ""


@dataclass
class Captions:
    """Captions of media files.

    Attributes:
        texts: path of a media file -> its text file.
        rows: path of a media file -> its row.
        missing: (path, row) of rows whose file is not among the media files.
        problems: table -> reasons why it or rows of it could not be used.
    """

    texts: Mapping[str, Path] = field(default_factory=dict)
    rows: dict[str, CaptionRow] = field(default_factory=dict)
    missing: list[tuple[str, CaptionRow]] = field(default_factory=list)
    problems: dict[str, list[str]] = field(default_factory=dict)

    def of(self, path: str) -> str:
        """Caption of a media file, not empty.

        Raises:
            NoCaption: it has none, or an empty one.
            Rejected: its text file or row cannot be read.
        """
        row = self.rows.get(path)
        if path in self.texts:
            text = self.texts[path]
            try:
                caption = prompt_text(read_text(text, f"caption {text.name}", LONGEST))
                _check_length(caption)
            except UserError as error:
                raise Rejected(str(error)) from error
            except ValueError as error:
                raise Rejected(f"caption {text.name} {error}") from error
            if row is not None and row.caption not in ("", caption):
                self.problems[row.table].append(f"{row.line} has another caption than {text.name}, which is used")
            if not caption:
                raise NoCaption(f"has no caption: {text.name} is empty")
            return caption
        if row is None:
            shown = [
                f"{table} ({found[0] if len(found) == 1 else f'{len(found)} problems'})" if found else table
                for table, found in islice(self.problems.items(), 3)
            ]
            tables = f"no row in {', '.join(shown)}{' ...' * (len(self.problems) > 3)}" if shown else "no caption table"
            raise NoCaption(f"has no caption: no {Path(path).stem}.txt next to it and {tables}")
        if row.problem:
            raise Rejected(f"caption in {row.table} {row.line} {row.problem}")
        if not row.caption:
            raise NoCaption(f"has no caption: {row.table} {row.line} has an empty one")
        return row.caption


def _check_length(caption: str) -> None:
    if len(caption) > MAX_CHARACTERS:
        raise ValueError(f"has {len(caption)} characters, and {MAX_CHARACTERS} is the most; shorten it")


def read_tables(tables: Iterable[Path], root: Path, names: FileNames, texts: Mapping[str, Path]) -> Captions:
    """Rows of all tables, and the text files.

    Args:
        root: folder for the tables' names; names: of the media files; texts: path of a media file -> its text file.
    """
    found = Captions(texts)
    for path in tables:
        table = path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)
        problems = found.problems.setdefault(table, [])
        try:
            rows = list(read_rows(path, table, (FILE_COLUMNS, CAPTION_COLUMNS), ("file", "caption")))
        except UserError as error:
            problems.append(str(error).removeprefix(f"{table} "))
            continue
        missing = len(found.missing)
        used = [_enter(found, table, path.parent.absolute(), row, names) for row in rows]
        if path.suffix.lower() == ".json" and not any(used):  # of another purpose
            del found.missing[missing:]
            problems[:] = ["names no media file"]
    return found


def _enter(found: Captions, table: str, folder: Path, row: TableRow, names: FileNames) -> bool:
    """Enter a row; whether it names a media file."""
    problem, caption, file = row.problem, "", ""
    try:
        file = row.text(FILE_COLUMNS)
        caption = row.text(CAPTION_COLUMNS)
        _check_length(caption)
    except ValueError as error:
        problem = problem or str(error)
    # A stray quote joins rows of a .csv to one cell.
    if "\n" in caption and table.lower().endswith((".csv", ".tsv")):
        parts = [part.strip(' "') for part in re.split("[,;\t\n]", caption)[1:]]
        if joined := next((part for part in parts if "." in part and names.find(str(folder / part))), None):
            problem = problem or f"holds the row of {joined}: a quote is not closed"
    entry = CaptionRow(table, row.where, caption, problem)
    paths = names.find(str(folder / file)) if file else []
    if not file and not problem:
        problem = f"has no file ({', '.join(FILE_COLUMNS)})"
    elif not caption and not problem:
        problem = f"has no caption ({', '.join(CAPTION_COLUMNS)})"
    elif file and not paths and not problem:
        found.missing.append((str(folder / file), entry))
    if problem:
        found.problems[table].append(f"{row.where} {problem}")
    for path in paths:
        first = found.rows.setdefault(path, entry)
        if first is not entry:
            found.problems[table].append(f"{row.where} names {file} again; {first.table} {first.line} is used")
    return bool(paths)
