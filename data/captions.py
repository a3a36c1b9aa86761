"""Captions of media files: a .txt next to the file, or a table (.csv, .tsv, .jsonl) with files and captions.

A .txt has priority over a table. Paths in a table are relative to the table's folder.
"""

import csv
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FILE_COLUMNS = ("file", "path", "file_name", "filename", "video", "video_path", "media")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description")
TABLES = (".csv", ".tsv", ".jsonl")


class Rejected(Exception):
    """A file or a caption that cannot be used; the message is the reason for the report."""


@dataclass
class Tables:
    """Rows of all caption tables.

    Attributes:
        captions: absolute path of a media file -> its caption.
        named: absolute path -> "table.csv line 3", for files that may not exist.
        problems: (table, reason) for tables or rows that could not be read.
    """

    captions: dict[str, str] = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[Path, str]] = field(default_factory=list)


def tidy(text: str) -> str:
    """Collapse a text to one line with single spaces, without control characters."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else " " for c in text).split())


def read_text(path: Path) -> str:
    """Content of a UTF-8 file without byte-order mark.

    Raises:
        Rejected: unreadable or not UTF-8.
    """
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Rejected(
            f"caption {path.name} is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); "
            "save it as UTF-8"
        ) from error
    except OSError as error:
        raise Rejected(f"caption {path.name} cannot be read: {error.strerror}") from error


def _pick(row: dict[str, Any], names: tuple[str, ...]) -> str | None:
    lowered = {str(key).strip().lower(): value for key, value in row.items() if key is not None}
    return next((str(lowered[name]) for name in names if lowered.get(name) is not None), None)


def _rows(table: Path, text: str) -> list[tuple[int, dict[str, Any] | str]]:
    """(line number, row) pairs; for an unreadable row, the reason in its place."""
    if table.suffix.lower() == ".jsonl":
        rows: list[tuple[int, dict[str, Any] | str]] = []
        # Split at line feeds alone: JSON strings may hold U+2028, where str.splitlines would cut as well.
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                rows.append((number, f"is not JSON ({error.msg})"))
                continue
            rows.append((number, row if isinstance(row, dict) else "is not a JSON object"))
        return rows
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t" if table.suffix.lower() == ".tsv" else ",")
    return [(reader.line_num, row) for row in reader]


def read_tables(tables: list[Path]) -> Tables:
    """Read all tables; errors are listed in `problems`."""
    found = Tables()
    for table in tables:
        try:
            rows = _rows(table, read_text(table))
        except (Rejected, csv.Error) as error:
            found.problems.append((table, str(error)))
            continue
        for number, row in rows:
            where = f"{table.name} line {number}"
            if isinstance(row, str):
                found.problems.append((table, f"line {number} {row}"))
                continue
            file, caption = _pick(row, FILE_COLUMNS), _pick(row, CAPTION_COLUMNS)
            if file is None or caption is None:
                missing, names = ("file", FILE_COLUMNS) if file is None else ("caption", CAPTION_COLUMNS)
                found.problems.append((table, f"line {number} has no {missing}: a column {' or '.join(names[:3])}"))
                if file is None and table.suffix.lower() != ".jsonl":
                    break  # the header lacks the column, so every row does
                continue
            key = str((table.parent / file.strip()).absolute())
            if key in found.captions and found.captions[key] != tidy(caption):
                found.problems.append((table, f"line {number} names {file} again; the first caption is used"))
                continue
            found.captions[key], found.named[key] = tidy(caption), where
    return found


def caption_of(path: Path, tables: Tables) -> str:
    """Caption of a media file; "" if there is none.

    Raises:
        Rejected: its text file cannot be read.
    """
    for text in (path.with_suffix(".txt"), path.with_name(path.name + ".txt")):
        if text.is_file():
            return tidy(read_text(text))
    return tables.captions.get(str(path), "")
