"""Votes of a human study in SQLite: one transaction each, on the disk before it is confirmed.

    store = VoteStore(Path("study/votes.sqlite"), plan="sha256 of plan.json")
    store.play(0, 0, "left", now); store.played(0, 0, "left", now + 5, 4.5); ...
    store.vote(0, 0, "left", now + 12)

A kill at any time, or a power cut, loses nothing that was confirmed. The journal is SQLite's rollback journal, since the
write-ahead log does not work on network file systems.
"""

import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from magihuman.errors import UserError

SIDES = ("left", "right")
CHOICES = ("left", "tie", "right")

SCHEMA = """
CREATE TABLE IF NOT EXISTS study (plan TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS plays (
    rater INTEGER NOT NULL, trial INTEGER NOT NULL, side TEXT NOT NULL, started REAL NOT NULL, ended REAL,
    UNIQUE (rater, trial, side)
);
CREATE TABLE IF NOT EXISTS votes (
    rater INTEGER NOT NULL, trial INTEGER NOT NULL, choice TEXT NOT NULL CHECK (choice IN ('left', 'tie', 'right')),
    seconds REAL NOT NULL, at REAL NOT NULL,
    UNIQUE (rater, trial)
);
"""


class VoteRefused(Exception):
    """A vote or play that is not accepted, with the reason; `wait`: seconds after which it would be."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Vote:
    """A vote: numbers of rater and trial, left, tie or right, seconds since the first clip began, and Unix time."""

    rater: int
    trial: int
    choice: str
    seconds: float
    at: float


class VoteStore:
    """The votes of one plan; methods may be called from several threads.

    Args:
        path: of the database, made where it does not exist.
        plan: fingerprint of the plan that the votes belong to.

    Raises:
        UserError: no database, or one of another plan.
    """

    def __init__(self, path: Path, plan: str) -> None:
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, timeout=30, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA synchronous = EXTRA")
            self._connection.executescript(SCHEMA)
            self._connection.execute("BEGIN IMMEDIATE")
            known = self._connection.execute("SELECT plan FROM study").fetchone()
            if known is None:
                self._connection.execute("INSERT INTO study VALUES (?)", (plan,))
            self._connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be used: {error}") from error
        if known is not None and known[0] != plan:
            raise UserError(
                f"{path} has votes of another plan: plan.json was changed after the first vote; put the old one back"
            )

    def close(self) -> None:
        """Close the database."""
        self._connection.close()

    def answered(self, rater: int) -> int:
        """Number of the first trial that a rater has not answered, which is the number of answers."""
        with self._lock:
            return int(self._connection.execute("SELECT COUNT(*) FROM votes WHERE rater = ?", (rater,)).fetchone()[0])

    def heard(self, rater: int, trial: int) -> list[str]:
        """Sides of a trial that have been played to their end."""
        query = "SELECT side FROM plays WHERE rater = ? AND trial = ? AND ended IS NOT NULL"
        with self._lock:
            return [side for (side,) in self._connection.execute(query, (rater, trial))]

    def play(self, rater: int, trial: int, side: str, now: float) -> None:
        """A clip begins to play; the first time counts."""
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO plays VALUES (?, ?, ?, ?, NULL)", (rater, trial, side, now))

    def played(self, rater: int, trial: int, side: str, now: float, seconds: float) -> None:
        """A clip has been played to its end.

        Raises:
            VoteRefused: it began less than `seconds` ago, or never.
        """
        where = "rater = ? AND trial = ? AND side = ?"
        with self._lock:
            row = self._connection.execute(f"SELECT started FROM plays WHERE {where}", (rater, trial, side)).fetchone()
            if row is None:
                raise VoteRefused("the clip has not begun to play")
            if now < row[0]:  # the clock was set back; its owner need not wait until it is there again
                self._connection.execute(f"UPDATE plays SET started = ? WHERE {where}", (now, rater, trial, side))
                raise VoteRefused("the clip cannot have ended yet", seconds)
            if now - row[0] < seconds:
                raise VoteRefused("the clip cannot have ended yet", seconds - (now - row[0]))
            self._connection.execute(
                f"UPDATE plays SET ended = ? WHERE {where} AND ended IS NULL", (now, rater, trial, side)
            )

    def vote(self, rater: int, trial: int, choice: str, now: float) -> None:
        """Store a vote, in one transaction with its checks.

        Raises:
            VoteRefused: a clip was not played to its end, the trial is answered, or an earlier one is not.
        """
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                (count,) = self._connection.execute("SELECT COUNT(*) FROM votes WHERE rater = ?", (rater,)).fetchone()
                if trial > count:
                    raise VoteRefused("an earlier pair is not answered")
                plays = self._connection.execute(
                    "SELECT started FROM plays WHERE rater = ? AND trial = ? AND ended IS NOT NULL", (rater, trial)
                ).fetchall()
                if len(plays) < len(SIDES):
                    raise VoteRefused("both clips must be played to their end")
                seconds = max(0.0, now - min(start for (start,) in plays))  # 0: the clock was set back
                self._connection.execute(
                    "INSERT INTO votes VALUES (?, ?, ?, ?, ?)", (rater, trial, choice, seconds, now)
                )
                self._connection.execute("COMMIT")
            except sqlite3.IntegrityError as error:
                self._connection.execute("ROLLBACK")
                raise VoteRefused("this pair is answered") from error
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise

    def votes(self) -> list[Vote]:
        """All votes, by rater and trial."""
        query = "SELECT rater, trial, choice, seconds, at FROM votes ORDER BY rater, trial"
        with self._lock:
            return [Vote(*row) for row in self._connection.execute(query)]
