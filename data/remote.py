"""Shards that lie elsewhere: at URLs, behind shell commands or in folders, read from any offset on, with retries.

What webdataset has for this is not used, because a long training needs more (webdataset 1.0.2, by reading its source):

- it opens URLs by curl, which gives up where a body breaks off; here reading goes on at the byte where it stopped;
- its tar reader loses the rest of a shard behind a damaged sample, and unpacks compressed members of any size; here the
  index gives place and CRC-32 of every sample, as in local reading;
- its cache knows files by their last name alone, so two data sets with a shard-000000.tar would be mixed.

Nothing that was fetched is executed: a command comes from the user's setting alone, and the names of shards, which an
index states, may hold letters, digits, `.`, `_` and `-` only.
"""

import base64
import errno
import http.client
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
import torch

from data.shards import INDEX, MAX_INDEX_BYTES, NULL_TEXT, SampleError, SampleIndex, Shards
from magihuman.console import say
from magihuman.errors import UserError
from magihuman.io.files import atomic_path, locked
from magihuman.io.provenance import fingerprint

BLOCK = 1 << 20  # bytes asked for at once
SKIPPED_BYTES = 8 << 20  # a gap up to this is read and dropped; beyond it, a new request is faster
MAX_SAMPLE_BYTES = 4 << 30
MAX_NULL_TEXT_BYTES = 64 << 20
FIRST_DELAY, MAX_DELAY = 0.5, 30.0  # seconds before the second try; doubled up to the limit
PASSING = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may pass
SAID = 3  # lost connections that a process names; the further ones are counted
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}")
CACHE = "magihuman-stream"
ABANDONED = 3600.0  # seconds after which a copy that is not written on is left from a killed process
START_TRIES = 5  # for index.json: a wrong address should not take minutes


class MissingError(SampleError):
    """A file that does not exist or may not be read: trying again is useless."""


class LostError(SampleError):
    """A file cannot be read on, after all tries or because it ends too early."""


class _NoRoomError(Exception):
    """The cache's limit is taken by copies that are being made."""


# ------------------------------------------------------------------------------------------------------ locations


@dataclass(frozen=True)
class Location:
    """Where the files of a folder of shards are: an address with a place for the file's name.

        Location.parse("https://host/shards").at("index.json")  # "https://host/shards/index.json"

    Attributes:
        kind: url, pipe or path.
        before, after: the address around the name; pattern: names of the shards that are chosen, with braces, or None.
    """

    kind: str
    before: str
    after: str
    pattern: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Location":
        """The location that a setting means: a folder, its index.json, or a brace pattern of its tars; as a URL, a path, or
        `pipe:` and a shell command that prints one of them.

        Raises:
            UserError: another form.
        """
        if text.startswith("pipe:"):
            found = list(re.finditer(r"index\.json|[^\s/'\"=]+\.tar(?![\w.])", text))
            if len(found) != 1:
                raise UserError(
                    f"data.module.shards={text} names {len(found)} files; a command names index.json or the shards once, as in "
                    "pipe:aws s3 cp s3://bucket/shards/index.json -"
                )
            match = found[0]
            return cls("pipe", text[5 : match.start()], text[match.end() :], _pattern(match.group()))
        scheme = text.partition("://")[0].lower() if "://" in text else ""
        if scheme in ("http", "https"):
            parts = urlsplit(text)
            above, _, last = parts.path.rpartition("/")
            name = last if last == INDEX or last.endswith(".tar") else ""
            path = above if name or not last else parts.path
            before = urlunsplit((parts.scheme, parts.netloc, f"{path.rstrip('/')}/", "", ""))
            return cls("url", before, f"?{parts.query}" if parts.query else "", _pattern(name))
        if scheme not in ("", "file"):
            raise UserError(
                f"data.module.shards={text}: {scheme}:// is read through a command that prints the file, such as "
                f"'pipe:aws s3 cp {text.rstrip('/').removesuffix('/' + INDEX)}/{INDEX} -' for s3"
            )
        path_text = os.path.expanduser(text[len("file://") :] if scheme else text)
        name = os.path.basename(path_text)
        is_file = name == INDEX or name.endswith(".tar")
        return cls("path", os.path.join(os.path.dirname(path_text) if is_file else path_text, ""), "", _pattern(name))

    def at(self, name: str) -> str:
        """Address of a file of the folder.

        Raises:
            UserError: a name that could mean something else than a file there.
        """
        if not FILE_NAME.fullmatch(name):
            raise UserError(
                f"{self} names the shard {name!r}; for streaming, names have letters, digits, '.', '_' and '-' only"
            )
        return f"{self.before}{name}{self.after}"

    def names(self) -> list[str] | None:
        """The shards that the pattern chooses, None for all."""
        from braceexpand import braceexpand

        try:
            return None if self.pattern is None else list(braceexpand(self.pattern))
        except ValueError as error:
            raise UserError(f"data.module.shards: {self.pattern} is not a brace pattern ({error})") from error

    def __str__(self) -> str:
        """For messages and records: without a password or the signature in a query."""
        if self.kind != "url":
            return f"{'pipe:' if self.kind == 'pipe' else ''}{self.before}{self.pattern or INDEX}{self.after}"
        parts = urlsplit(self.before)
        path = parts.path + (self.pattern or "")
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path.rstrip('/')}"


def _pattern(name: str) -> str | None:
    return name if name.endswith(".tar") else None


# --------------------------------------------------------------------------------------------------------- bytes


@dataclass
class Retries:
    """How often reading is tried, and how often it had to be.

    Attributes:
        tries: in a row without a byte; timeout: seconds without a byte.
        lost: connections that were lost so far in this process.
    """

    tries: int = 10
    timeout: float = 60.0
    lost: int = 0

    def after(self, failures: int, what: str, error: Exception) -> None:
        """Count a lost connection, and wait before the next try.

        Raises:
            LostError: there is no next try.
        """
        self.lost += 1
        reason = _reason(error)
        if failures >= self.tries:
            raise LostError(f"{reason}, {failures} {'tries' if failures > 1 else 'try'}") from error
        pause = min(MAX_DELAY, FIRST_DELAY * 2 ** (failures - 1))
        if self.lost <= SAID:
            more = "; further lost connections are only counted" if self.lost == SAID else ""
            print(f"   note: {what}: {reason}; trying again in {pause:g} s{more}", flush=True)
        time.sleep(pause)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP status {error.code} ({error.reason})"
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, Exception):
        return _reason(error.reason)
    if isinstance(error, TimeoutError):
        return "no answer (timeout)"
    return str(getattr(error, "strerror", None) or error or type(error).__name__)


class ByteSource(Protocol):
    """An open file: `start` is the offset of its first byte, `total` the size of the whole if known, and `can_seek` says
    whether opening at another offset spares the bytes before it."""

    start: int
    total: int | None
    can_seek: bool

    def read1(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end."""
        ...

    def close(self) -> None: ...


class _UrlSource:
    def __init__(self, address: str, offset: int, timeout: float) -> None:
        headers = {"User-Agent": "magihuman", **({"Range": f"bytes={offset}-"} if offset else {})}
        parts = urlsplit(address)
        user, _, host = parts.netloc.rpartition("@")
        try:
            request = urllib.request.Request(urlunsplit(parts._replace(netloc=host)), headers=headers)
            if user:  # which urllib takes for a part of the host; not for the server of a redirect
                code = base64.b64encode(unquote(user).encode()).decode()
                request.add_unredirected_header("Authorization", f"Basic {code}")
            self._response = urllib.request.urlopen(request, timeout=timeout)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                raise SampleError("cut off") from None
            if error.code not in PASSING:
                raise MissingError(_reason(error)) from None
            raise
        except (ValueError, http.client.InvalidURL) as error:
            raise MissingError(str(error)) from None
        head = self._response.headers
        self.start, self.total = 0, None
        if head.get("Content-Length", "").isdigit():
            self.total = int(head["Content-Length"])
        if self._response.status == 206:
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", head.get("Content-Range", ""))
            if found is None or int(found[1]) != offset:
                self.close()
                raise MissingError(f"the server answered with the range {head.get('Content-Range')!r}")
            self.start, self.total = offset, int(found[2]) if found[2] != "*" else None
        self.can_seek = self._response.status == 206 or head.get("Accept-Ranges") == "bytes"

    def read1(self, count: int) -> bytes:
        return bytes(self._response.read1(count))

    def close(self) -> None:
        self._response.close()


class _PipeSource:
    start: int = 0
    total: int | None = None
    can_seek = False

    def __init__(self, command: str, timeout: float) -> None:
        self._timeout = timeout
        # A group of its own, so that a pipeline in the command ends as a whole.
        self._process = subprocess.Popen(
            command, shell=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._output, selectors.EVENT_READ)

    def read1(self, count: int) -> bytes:
        if not self._ready.select(self._timeout):
            raise TimeoutError
        data = self._output.read(count)
        if not data and (status := self._process.wait(self._timeout)):
            raise OSError(f"the command ended with status {status}")
        return data or b""

    def close(self) -> None:
        self._ready.close()
        self._output.close()
        if self._process.poll() is None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class _PathSource:
    start: int
    total: int | None
    can_seek = True

    def __init__(self, path: str, offset: int) -> None:
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
            raise MissingError(str(error.strerror)) from None
        self.start, self.total = offset, os.fstat(self._file.fileno()).st_size
        self._file.seek(offset)

    def read1(self, count: int) -> bytes:
        return self._file.read(count)

    def close(self) -> None:
        self._file.close()


def open_source(location: Location, name: str, offset: int, timeout: float) -> ByteSource:
    """Open a file of a location, from `offset` on where its kind allows that.

    Raises:
        MissingError: there is none; OSError: the connection failed.
    """
    address = location.at(name)
    if location.kind == "url":
        return _UrlSource(address, offset, timeout)
    return _PipeSource(address, timeout) if location.kind == "pipe" else _PathSource(address, offset)


def _read1(source: ByteSource, count: int, position: int) -> bytes:
    """Up to `count` bytes from `position` on, none at the end; raises OSError where there should be more."""
    data = source.read1(count)
    if not data and source.total is not None and position < source.total:
        raise OSError(errno.ECONNRESET, "the connection ended early")
    return data


class RemoteFile:
    """The bytes of one file from an offset on, read forwards; a lost connection is opened again where it stopped.

    Args:
        opened: opens the file from an offset on; name: for messages; retries: how often; source: open at `offset` already.
    """

    def __init__(
        self,
        opened: Callable[[int], ByteSource],
        name: str,
        retries: Retries,
        offset: int = 0,
        source: ByteSource | None = None,
    ) -> None:
        self._opened, self._name, self._retries = opened, name, retries
        self.offset = offset
        self._source = source

    def _connect(self) -> ByteSource:
        source = self._source = self._opened(self.offset)
        position = source.start
        while position < self.offset:  # sources that only start at the beginning
            dropped = _read1(source, min(BLOCK, self.offset - position), position)
            if not dropped:
                raise SampleError("cut off")
            position += len(dropped)
        return source

    def next(self, limit: int) -> bytes:
        """The next bytes, up to `limit` and `BLOCK`; none at the end of the file.

        Raises:
            LostError: the file cannot be read, after all tries; MissingError: it cannot be opened.
        """
        for failures in range(1, self._retries.tries + 1):
            try:
                source = self._source or self._connect()
                data = _read1(source, min(limit, BLOCK), self.offset)
                self.offset += len(data)
                return data
            except SampleError:
                self.close()
                raise
            except (OSError, http.client.HTTPException, subprocess.TimeoutExpired) as error:
                self.close()
                self._retries.after(failures, self._name, error)
        raise AssertionError

    def read(self, count: int) -> bytes:
        """`count` bytes, fewer at the end of the file; memory grows with what arrives."""
        parts = []
        while count and (data := self.next(count)):
            parts.append(data)
            count -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def copy_to(self, file: IO[bytes], limit: int) -> int:
        """Copy up to `limit` bytes into a file; returns how many."""
        copied = 0
        while copied < limit and (data := self.next(limit - copied)):
            file.write(data)
            copied += len(data)
        return copied

    def skip_to(self, offset: int) -> None:
        """Go on at a later offset."""
        if self._source is not None and self._source.can_seek and offset - self.offset > SKIPPED_BYTES:
            self.close()
            self.offset = offset
        while self._source is not None and self.offset < offset:
            if not self.next(offset - self.offset):
                raise SampleError("cut off")
        self.offset = offset

    def close(self) -> None:
        """Close the connection; the next read opens it again."""
        if self._source is not None:
            with suppress(OSError):
                self._source.close()
            self._source = None


# --------------------------------------------------------------------------------------------------------- cache


class ShardCache:
    """Copies of shards on a local disk, of which the least recently used make room for new ones.

    Several processes may share it. The size that a copy will have is taken before it is fetched, so the limit holds
    at any time.

    Args:
        folder: of the cache, shared by data sets; data: name of this one; limit: bytes of all of them together.
    """

    def __init__(self, folder: Path, data: str, limit: int) -> None:
        self._root, self._folder, self._limit = folder / CACHE, folder / CACHE / data, limit
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"data.module.cache_dir={folder} cannot be written ({error.strerror})") from error

    def path(self, name: str, size: int, opened: Callable[[], RemoteFile]) -> Path | None:
        """The copy of a shard's first `size` bytes, fetched if there is none; None where it does not fit.

        Raises:
            SampleError: it cannot be fetched; OSError: the disk.
        """
        target = self._folder / name
        if target.exists() and target.stat().st_size == size:
            os.utime(target)
            return target
        remote = opened()
        try:
            with atomic_path(target) as partial:
                with locked(self._root / "lock"):
                    self._make_room(size)
                    with partial.open("wb") as file:
                        file.truncate(size)
                with partial.open("r+b") as file:
                    if remote.copy_to(file, size) < size:
                        raise SampleError("cut off")
        except _NoRoomError:
            return None
        finally:
            remote.close()
        return target

    def _make_room(self, size: int) -> None:
        """Delete the copies that were not used for longest; raises _NoRoomError where that is not enough."""
        files = []
        for file in self._root.glob("*/*"):
            with suppress(OSError):  # another process has deleted it
                status = file.stat()
                files.append((status.st_mtime, status.st_size, file))
        used, now = sum(each for _, each, _ in files), time.time()
        for modified, each, file in sorted(files):
            if used + size <= self._limit:
                return
            if file.suffix == ".part" and now - modified < ABANDONED:
                continue  # another process is writing it
            file.unlink(missing_ok=True)
            used -= each
        if used + size > self._limit:
            raise _NoRoomError


# -------------------------------------------------------------------------------------------------------- shards


class RemoteShards(Shards):
    """Shards at a `Location`: read in the order of a shard, each is one connection.

        shards = RemoteShards("https://host/shards", Retries())
        sample = shards.read(0)

    Attributes:
        parent: role, name and hash of the index, for the records of a training; chosen: bool [shards], those of the pattern.
        retries: counts the lost connections; lost: the shard of which the rest cannot be read, and why; it is tried again
            after another one.

    Raises:
        UserError: the index cannot be fetched, or it is not one.
    """

    def __init__(self, location: str, retries: Retries, cache_dir: str | None = None, cache_gb: float = 100.0) -> None:
        self.location, self.retries = Location.parse(location), retries
        self.name = str(self.location)
        self._file: tuple[int, str, RemoteFile] | None = None  # process, shard and its connection
        self.lost: tuple[str, str] | None = None
        self.index, identity = self._fetched_index()
        self.parent = {"role": "shards", "name": self.name, **identity}
        self._check()
        self._cache = None
        if cache_dir is not None and self.location.kind != "path":
            limit = int(cache_gb * 1e9)
            self._cache = ShardCache(Path(cache_dir).expanduser(), str(identity["sha256"])[:16], limit)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}  # a worker process opens its own connections

    def _fetched_index(self) -> tuple[SampleIndex, dict[str, Any]]:
        """The index, and its hash as that of a local one."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            at_start = replace(self.retries, tries=min(START_TRIES, self.retries.tries))
            try:
                remote = self._remote(INDEX, retries=at_start)
                with (folder / INDEX).open("wb") as file:
                    if remote.copy_to(file, MAX_INDEX_BYTES + 1) > MAX_INDEX_BYTES:
                        raise UserError(
                            f"{self.name}: {INDEX} has more than {MAX_INDEX_BYTES} bytes; use several folders"
                        )
                remote.close()
            except SampleError as error:
                raise UserError(
                    f"data.module.shards={self.name}: {INDEX} cannot be read ({error}); give the folder that data.prepare made"
                ) from error
            try:
                return SampleIndex.load(folder), fingerprint(folder / INDEX)
            except UserError as error:
                raise UserError(str(error).replace(str(folder / INDEX), f"{self.name}: {INDEX}")) from error

    def _check(self) -> None:
        """Raises UserError unless the index states a place for every sample and the pattern chooses some of its shards."""
        if not len(self.index):
            raise UserError(f"the shards in {self.name} hold no sample")
        rows, shards = self.index.rows, self.index.shards
        wrong = (rows["offset"] < 0) | (rows["bytes"] <= 0) | (rows["bytes"] > MAX_SAMPLE_BYTES)
        wrong |= rows["offset"] > np.iinfo(np.int64).max - MAX_SAMPLE_BYTES
        if wrong.any():
            raise UserError(
                f"{self.name}: {INDEX} states no place for {self.index[int(wrong.argmax())].key}, or one of more than "
                f"{MAX_SAMPLE_BYTES} bytes; prepare the shards again"
            )
        for shard in shards:
            self.location.at(shard)
        self._ends = np.zeros(len(shards), np.int64)
        np.maximum.at(self._ends, rows["shard"], rows["offset"] + rows["bytes"])
        self.chosen = np.ones(len(shards), bool)
        if (names := self.location.names()) is not None:
            if unknown := sorted(set(names) - set(shards))[:3]:
                raise UserError(
                    f"{self.name}: {INDEX} does not know {', '.join(unknown)}; it has {shards[0]} ... {shards[-1]}"
                )
            self.chosen = np.isin(shards, names)

    def _remote(self, name: str, offset: int = 0, retries: Retries | None = None) -> RemoteFile:
        def opened(start: int) -> ByteSource:
            return open_source(self.location, name, start, self.retries.timeout)

        return RemoteFile(opened, name, retries or self.retries, offset)

    def _opened(self, shard: str, offset: int) -> RemoteFile:
        """The open connection, if it is this shard's and not yet beyond the offset, else a new one."""
        if self._file is not None:
            process, name, remote = self._file
            if (process, name) == (os.getpid(), shard) and remote.offset <= offset:
                return remote
            if process == os.getpid():  # else it belongs to the process from which this one was forked
                remote.close()
        remote = self._cached(shard, offset) or self._remote(shard, offset)
        self._file, self.lost = (os.getpid(), shard, remote), None
        return remote

    def _cached(self, shard: str, offset: int) -> RemoteFile | None:
        if self._cache is None:
            return None
        size = int(self._ends[self.index.shards.index(shard)])
        try:
            path = self._cache.path(shard, size, lambda: self._remote(shard))
        except OSError as error:
            print(
                f"   note: data.module.cache_dir: {error.strerror or error}; reading without it from here on",
                flush=True,
            )
            self._cache, path = None, None
        if path is None:
            return None
        # Opened at once: another process may delete the file, and an open one stays readable.
        source = _PathSource(str(path), offset)
        return RemoteFile(lambda start: _PathSource(str(path), start), shard, self.retries, offset, source)

    def _read_bytes(self, shard: str, offset: int, count: int) -> bytes:
        if self.lost is not None and self.lost[0] == shard:
            raise LostError(self.lost[1])
        try:
            remote = self._opened(shard, offset)
            remote.skip_to(offset)
            data = remote.read(count)
            if len(data) < count:
                raise SampleError("cut off")
            return data
        except SampleError as error:
            self.lost, self._file = (shard, str(error)), None
            rows = self.index.rows[self.index.rows["shard"] == self.index.shards.index(shard)]
            behind = int((rows["offset"] >= offset).sum())
            print(f"   note: {shard}: {error}; its last {behind} samples are lost for now", flush=True)
            raise LostError(str(error)) from error

    def null_text(self) -> torch.Tensor | None:
        """[S,Ct] fp32 features of the empty prompt, None where there are none.

        Raises:
            UserError: the file is damaged or cannot be fetched.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        remote = self._remote(NULL_TEXT, retries=replace(self.retries, tries=min(START_TRIES, self.retries.tries)))
        try:
            return load(remote.read(MAX_NULL_TEXT_BYTES))["text"].float()
        except MissingError as error:
            say(f"note: {self.name}: {NULL_TEXT} is not there ({error}); the empty prompt is encoded anew")
            return None
        except (SampleError, SafetensorError, KeyError) as error:
            raise UserError(f"{self.name}: {NULL_TEXT} cannot be read ({error}); copy it again") from error
        finally:
            remote.close()
