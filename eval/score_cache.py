"""Cache of measured values by content: an SQLite file with a value per clip's bytes, measurement, version and settings.

    with ScoreCache(Path("runs/score_cache.sqlite")) as cache:
        cache.get(cache.key(sha256=cache.sha256(path), measurement="loudness"))

Copied and renamed clips are found again; a changed byte, weight, setting or reference text is another key. Several processes
may use one file. A file that is damaged is put aside with a note, since all in it can be measured again.
"""

import hashlib
import json
import sqlite3
import sys
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from magihuman.errors import UserError

DEFAULT = "runs/score_cache.sqlite"
VERSION = 1
WAIT = 60.0  # seconds for another process's write


class ScoreCache:
    """Values by key, and sha256 of files by path, size and time of change; in memory only with `path` None."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._data = self._opened()
        except (sqlite3.DatabaseError, OSError) as error:
            if path is None or not any(word in str(error) for word in ("not a database", "malformed")):
                raise UserError(f"the cache {path} cannot be opened ({error}); give another with cache=FILE") from error
            aside = path.with_suffix(".damaged")
            path.replace(aside)
            print(f"the cache {path} is damaged; it is now {aside}, and values are measured again", file=sys.stderr)
            self._data = self._opened()

    def _opened(self) -> sqlite3.Connection:
        data = sqlite3.connect(":memory:" if self._path is None else self._path, timeout=WAIT)
        data.execute("create table if not exists files (path text primary key, size int, changed int, sha256 text)")
        data.execute("create table if not exists results (key text primary key, content blob)")
        data.execute("select count(*) from results").fetchone()
        data.commit()
        data.execute("begin immediate")  # a file that cannot be written is an error now, not after the first clip
        data.commit()
        return data

    def __enter__(self) -> "ScoreCache":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._data.commit()
        self._data.close()

    def sha256(self, path: Path) -> str:
        """Hash of a file's content; from the cache where path, size and time of change are the same.

        Raises:
            OSError: it cannot be read.
        """
        name, state = str(path.resolve()), path.stat()
        row = self._data.execute("select size, changed, sha256 from files where path = ?", (name,)).fetchone()
        if row is not None and row[:2] == (state.st_size, state.st_mtime_ns):
            return str(row[2])
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        entry = (name, state.st_size, state.st_mtime_ns, found)
        # On the disk at once: an open transaction would keep other processes waiting until the first value is measured.
        self._write("insert or replace into files values (?, ?, ?, ?)", [entry])
        return found

    @staticmethod
    def key(**parts: Any) -> str:
        """Key of all that a value depends on, as plain values."""
        content = json.dumps({"format": VERSION, **parts}, sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(content.encode()).hexdigest()

    def get(self, keys: Iterable[str]) -> dict[str, bytes]:
        """Content by key, of those keys that are known."""
        found: dict[str, bytes] = {}
        wanted = list(keys)
        for first in range(0, len(wanted), 500):  # SQLite's limit of variables
            part = wanted[first : first + 500]
            marks = ",".join("?" * len(part))
            found.update(
                self._data.execute(f"select key, content from results where key in ({marks})", part).fetchall()
            )
        return found

    def put(self, values: dict[str, bytes]) -> None:
        """Keep values; they are on the disk when this returns.

        Raises:
            UserError: the disk is full, or another process writes for longer than `WAIT`.
        """
        self._write("insert or replace into results values (?, ?)", values.items())

    def _write(self, command: str, rows: Iterable[tuple[Any, ...]]) -> None:
        try:
            self._data.executemany(command, rows)
            self._data.commit()
        except sqlite3.OperationalError as error:
            raise UserError(
                f"the cache {self._path} cannot be written ({error}); run again, or give cache=FILE"
            ) from error
