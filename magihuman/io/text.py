"""Text that users give: captions, prompts, and tables of them (.csv, .tsv, .jsonl, .json), read with limits.

    for row in read_rows("a.csv", "table=a.csv", (["file"], CAPTION_COLUMNS), ("file", "caption")):
        print(row.where, row.values, row.problem)

Lines end at a line feed, or a carriage return and a line feed, and nowhere else: captions may hold U+2028, U+0085 or form
feeds, where `str.splitlines` would cut. In a file without any line feed, carriage returns end lines.
"""

import codecs
import csv
import errno
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from magihuman.errors import UserError

TABLES = (".csv", ".tsv", ".jsonl", ".json")
CAPTION_COLUMNS = ("caption", "text", "prompt", "description", "cap", "captions")
"""Names of the column or key that holds a caption or a prompt; the first one with a value is used."""
MAX_CHARACTERS = 10_000  # scripts without spaces have long words
"""Longest caption or prompt."""
MAX_DEPTH = 100
"""Deepest nesting of JSON."""
MAX_TABLE, MAX_JSON = 512 << 20, 64 << 20
"""Bytes of a table and of a JSON file of settings."""
MAX_LINES = 1000
"""Lines of a row of a .csv or .tsv, which bounds the search for a closing quote."""


def _read_bytes(path: str | Path, limit: int) -> bytes:
    """Content of a file, cut behind `limit` bytes and one more. A pipe or device, which may never end, is an OSError."""
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise OSError(errno.EINVAL, "it is no regular file")
    with path.open("rb") as file:
        return file.read(limit + 1)


def read_text(path: str | Path, what: str, limit: int = MAX_TABLE) -> str:
    """Content of a UTF-8 file, or a UTF-16 file with a byte-order mark, without the mark and with line feeds as line ends.

    Args:
        what: the file in error messages, such as "prompts=a.txt".
        limit: in bytes.

    Raises:
        UserError: it cannot be read, is longer than `limit`, or is neither of these.
    """
    try:
        data = _read_bytes(path, limit)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise UserError(f"{what} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > limit:
        raise UserError(f"{what} has more than {limit >> 20} MiB; cut it into parts")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{what} is not UTF-8 (byte {data[error.start]:#04x} at {error.start}); save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(f"{what} is not text (it holds NUL; UTF-16 needs a byte-order mark); save it as UTF-8")
    return text.replace("\r\n", "\n") if "\n" in text else text.replace("\r", "\n")


def prompt_text(text: str) -> str:
    """A caption or prompt as text encoders get it, in training as in inference.

    White space at both ends goes and lines end with a line feed alone; every other character stays.

    Raises:
        ValueError: it holds half a character (an unpaired surrogate).
    """
    text = text.replace("\r\n", "\n").strip()
    if half := re.search("[\ud800-\udfff]", text):
        raise ValueError(f"holds half a character ({half[0]!r} at {half.start()}); save the text as UTF-8")
    return text


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """`json.loads` whose every failure is a ValueError with a message of one line.

    Raises:
        ValueError: not JSON, nested deeper than `MAX_DEPTH`, or a number of thousands of digits.
    """
    deep = f"it is nested deeper than {MAX_DEPTH} levels"
    try:
        value = json.loads(text, **hooks)
    except RecursionError:
        raise ValueError(deep) from None
    except ValueError as error:
        raise ValueError(
            "a number has too many digits" if "integer string conversion" in str(error) else str(error)
        ) from None
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(deep)


def load_json(path: str | Path) -> Any:
    """The value in a JSON file of settings or results.

    Raises:
        OSError, ValueError: it cannot be read, has more than `MAX_JSON` bytes, or as `parse_json` says.
    """
    data = _read_bytes(path, MAX_JSON)
    if len(data) > MAX_JSON:
        raise ValueError(f"it has more than {MAX_JSON >> 20} MiB")
    return parse_json(data)


# ---------------------------------------------------------------------------------------------------- tables


class TableRow(NamedTuple):
    """A row of a table.

    Attributes:
        where: "line 3", or "entry 3" of a .json.
        values: by column, whose name is in lower case with "_" for spaces and hyphens; empty cells are left out.
        problem: why the row cannot be used, or "".
    """

    where: str
    values: dict[str, Any]
    problem: str = ""

    def text(self, columns: Sequence[str]) -> str:
        """The text in the first of `columns` that has a value, "" if none has; a list of one text counts as the text.

        Null, an empty or blank text and an empty list are no value.

        Raises:
            ValueError: it is no text.
        """
        for name in columns:
            value = self.values.get(name)
            if isinstance(value, list) and len(value) == 1:
                value = value[0]
            if value is None or value == [] or (isinstance(value, str) and not value.strip()):
                continue
            if not isinstance(value, str):
                what = f"a list of {len(value)}" if isinstance(value, list) else reprlib.repr(value)
                raise ValueError(f"has {what} as {name}; give one text")
            return prompt_text(value)
        return ""


def read_rows(
    path: str | Path, what: str, needed: Sequence[Sequence[str]], pair: tuple[str, str]
) -> Iterator[TableRow]:
    """Rows of a table; a faulty row has the reason, and reading goes on behind it.

    .csv and .tsv have a header, then rows. Cells are separated by commas, semicolons or tabs (whichever the header has
    most of); a cell that holds one of these, quotes or a line feed is quoted, with the quotes in it doubled. .jsonl has
    an object a line. .json is a list of objects, or an object of names, each with its text or with an object.

    Args:
        what: the file in error messages.
        needed: groups of column names; a header has a column of every group.
        pair: columns for a name and its text in a .json of names.

    Raises:
        UserError: the file cannot be read, has no such header or is not JSON.
    """
    text, suffix = read_text(path, what), Path(path).suffix.lower()
    if suffix == ".jsonl":
        return _jsonl_rows(text)
    return _json_rows(text, what, pair) if suffix == ".json" else _csv_rows(text, what, needed)


def prompt_rows(path: str | Path, what: str) -> Iterator[TableRow]:
    """Rows with a prompt each: of a table, or else the lines of a text file that are not empty.

    Raises:
        UserError: as `read_rows`.
    """
    if Path(path).suffix.lower() in TABLES:
        return read_rows(path, what, (CAPTION_COLUMNS,), ("name", "prompt"))
    lines = enumerate(read_text(path, what).split("\n"), 1)
    return (TableRow(f"line {number}", {"prompt": line}) for number, line in lines if line.strip())


def _column(name: object) -> str:
    return re.sub(r"[\s-]+", "_", str(name).strip().lower())


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for a key that stands twice, of which `dict` would take the last."""
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"{key!r} stands there twice")
        values[key] = value
    return values


def _row(where: str, value: Any) -> TableRow:
    if not isinstance(value, dict):
        return TableRow(where, {}, "is not a JSON object")
    try:
        return TableRow(where, _unique((_column(key), inner) for key, inner in value.items()))
    except ValueError as error:
        return TableRow(where, {}, str(error))


def _jsonl_rows(text: str) -> Iterator[TableRow]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield _row(f"line {number}", parse_json(line, object_pairs_hook=_unique))
            except ValueError as error:
                yield TableRow(f"line {number}", {}, f"is not JSON ({error})")


def _json_rows(text: str, what: str, pair: tuple[str, str]) -> Iterator[TableRow]:
    try:
        content = parse_json(text, object_pairs_hook=_unique)
    except ValueError as error:
        raise UserError(f"{what} is not JSON ({error})") from error
    if isinstance(content, dict):
        name, text = pair
        content = [
            {name: key, **(value if isinstance(value, dict) else {text: value})} for key, value in content.items()
        ]
    if not isinstance(content, list):
        raise UserError(f"{what} is neither a list of objects nor an object of names and texts")
    return (_row(f"entry {number}", value) for number, value in enumerate(content, 1))


def _csv_problem(error: csv.Error) -> str:
    if "field limit" in str(error):
        return f"has a cell of more than {csv.field_size_limit()} characters; shorten it or close its quote"
    if "new-line" in str(error):
        return "has a carriage return outside of quotes; quote the whole cell"
    return f"has a faulty quote ({error}); quote the whole cell and double the quotes in it"


def _csv_rows(text: str, what: str, needed: Sequence[Sequence[str]]) -> Iterator[TableRow]:
    lines = text.split("\n")
    at = next((number for number, line in enumerate(lines) if line.strip()), 0)
    top = f"{what} line {at + 1}"
    delimiter = max(",;\t", key=lines[at].count)

    def record(first: int) -> tuple[list[str], int]:
        """Cells of the record that starts at a line, and the next record's line."""
        following = (lines[i] + "\n" for i in range(first, min(len(lines), first + MAX_LINES)))
        reader = csv.reader(following, delimiter=delimiter, strict=True, skipinitialspace=True)
        return next(reader), first + reader.line_num

    try:
        header, at = record(at)
    except csv.Error as error:
        raise UserError(f"{top} is not a header ({error})") from error
    columns = [_column(name) for name in header]
    for names in needed:
        if not set(names) & set(columns):
            raise UserError(f"{top} has no column {' or '.join(names)}; it has {', '.join(header)[:200]}")
    if twice := {name for name in columns if name and columns.count(name) > 1}:
        raise UserError(f"{top} names the column {min(twice)} twice")
    while at < len(lines):
        where = f"line {at + 1}"
        try:
            cells, following = record(at)
            if delimiter == "\t" and any("\n" in cell and "\t" in cell for cell in cells):
                raise csv.Error("a cell holds the next row")
        except csv.Error as error:
            yield TableRow(where, {}, _csv_problem(error))
            at += 1
            continue
        at = following
        named = zip(columns, cells, strict=False)
        values = {name: cell for name, cell in named if name and cell.strip()}
        # A column without a name is the row's number where it is the first, and else the end of a text with commas.
        outside = [cell for i, cell in enumerate(cells) if cell.strip() and i and (i >= len(columns) or not columns[i])]
        if outside or len(cells) > len(columns):
            sign = {"\t": "tabs", ";": "semicolons"}.get(delimiter, "commas")
            yield TableRow(where, values, f"has more cells than the header; quote a text that has {sign}")
        elif any(cell.strip() for cell in cells):
            yield TableRow(where, values)
