"""Atomic and locked files: a result appears under its name when it is complete, and one process makes it."""

import errno
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile, gettempdir, mkdtemp
from typing import IO, Any

from magihuman.errors import UserError

try:
    import fcntl
except ImportError:  # Windows, where files can be read and written, but not locked
    fcntl = None  # type: ignore[assignment]

_PACKAGE = Path(__file__).resolve().parents[1]
CONFIGS = _PACKAGE.parent / "configs"
WEIGHTS = _PACKAGE / "zoo" / "weights"
"""Folder of the checkpoints, decoders and codecs that ship with the package."""

NEW = "new"
_LOCK = "lock"


@contextmanager
def atomic_path(target: Path, sync: bool = False, folder: bool = False) -> Iterator[Path]:
    """A temporary name next to `target`, which the end of the block renames to `target`.

        with atomic_path(folder / "run.json") as partial:
            partial.write_text(text)

    An error in the block leaves `target` as it was and removes the temporary file; a kill leaves `.NAME.*.part`.

    Args:
        sync: flush the file to the disk before the renaming, so that it also survives a power failure.
        folder: make the temporary name an empty folder, and the folders above `target` where they are missing.
    """
    partial = target.with_name(f".{target.name[:200]}.{os.urandom(4).hex()}.part")
    try:
        if folder:
            partial.mkdir(parents=True)
        yield partial
        if sync:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        replace(partial, target)
    finally:
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def write_atomically(target: Path, content: str | bytes, sync: bool = False) -> None:
    """Replace a small file in one step: a kill leaves the old content or the new. Text is stored as UTF-8."""
    with atomic_path(target, sync) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_result(path: Path, values: Mapping[str, Any]) -> Path:
    """Write a result file, indented JSON of plain values, and the folders above it; returns `path`.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def require_writable(path: Path, setting: str) -> None:
    """Check before the work that a file or folder can be made: its name, and the nearest folder above that exists.

    Args:
        setting: the user's, for the message.

    Raises:
        UserError: the name is too long or not UTF-8, something above it is a file, or that folder cannot be written to.
    """
    if str(path) != str(path).encode("utf-8", "replace").decode():  # it is written into records
        raise UserError(f"{setting}={str(path)!r} is not UTF-8; choose another")
    path = Path(os.path.expanduser(path)).absolute()
    try:
        above = [part for part in (path, *path.parents) if _exists(part) and (part != path or path.is_dir())]
        if not above[0].is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{above[0]} is a file")
        with TemporaryFile(dir=above[0]) as file:
            file.write(b"x")
    except OSError as error:
        raise UserError(f"{setting}={_shortened(path)} cannot be written: {error.strerror}; choose another") from error


def _shortened(path: object) -> str:
    text = str(path)
    return text if len(text) <= 100 else f"{text[:100]}... ({len(text)} characters)"


def _exists(path: Path) -> bool:
    """As `Path.exists`, but raises OSError for a name that cannot exist."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


_DISK = {
    errno.ENOSPC: "the disk is full; make room",
    errno.EDQUOT: "your quota of the disk is used up; make room",
    errno.EROFS: "the disk is read-only",
    errno.EFBIG: "a file became larger than the disk or a limit of this process allows",
    errno.EIO: "the disk reports an error (Input/output error)",
    errno.ESTALE: "the network disk has lost the file (Stale file handle)",
    errno.EACCES: "no permission",
    errno.EPERM: "the disk does not permit it",
    errno.ENAMETOOLONG: "a file's name is too long",
}


def disk_problem(error: BaseException, place: str | Path | None = None) -> UserError | None:
    """The line for an error that the disk caused, however libraries have wrapped it; None for any other error.

    Args:
        place: what was being written, where the error does not name it.
    """
    if isinstance(error, SystemExit | KeyboardInterrupt):  # also while an error of the disk is handled
        return None
    waiting, seen = [error], set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        found = re.search(r"os error (\d+)", str(each))  # of safetensors
        number = each.errno if isinstance(each, OSError) else int(found[1]) if found else None
        if number in _DISK:
            where = getattr(each, "filename", None) or place
            return UserError(f"{'' if where is None else f'{_shortened(where)}: '}{_DISK[number]}")
        failures = getattr(each, "failures", None)  # of the processes, in torch.distributed.checkpoint
        waiting += [failure[0] for failure in failures.values()] if isinstance(failures, dict) else []
        waiting += [each.__cause__, each.__context__]  # type: ignore[list-item]
    if "inline_container" in str(error):  # torch.save to a path forgets the reason
        return UserError(f"{place}: a file could not be written in full; is the disk full?")
    return None


def replace(new: Path, target: Path) -> None:
    """Rename the file or folder `new` to `target`, in place of what is there."""
    if (new.is_dir() or target.is_dir()) and target.exists() and not new.is_symlink():
        # Folders cannot be replaced in one step: the old one is moved away first.
        old = Path(mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
        shutil.move(target, old / target.name)  # copies where a layered disk cannot rename folders
        new.rename(target)
        shutil.rmtree(old)
    else:
        os.replace(new, target)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock between the processes of this machine.

    On a disk without file locks (some Lustre and FUSE mounts) the lock is a file in the machine's temporary folder, and a
    note says that other machines are not noticed.

    Args:
        path: of the lock file, which stays, empty.
        wait: for another holder; without it BlockingIOError is raised at once.

    Raises:
        UserError: on Windows.
    """
    with path.open("w") as lock:
        try:
            _flock(lock, wait)
        except BlockingIOError:
            raise
        except OSError as error:
            name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
            print(
                f"note: the disk of {path.parent} has no file locks ({error.strerror}); another machine that writes there "
                "at the same time is not noticed",
                file=sys.stderr,
            )
            with Path(gettempdir(), f"magihuman-{os.getuid()}-{name}.lock").open("w") as here:
                _flock(here, wait)
                yield
        else:
            yield


def _flock(lock: IO[str], wait: bool) -> None:
    if fcntl is None:
        raise UserError("this needs file locks, which Python has on Linux and macOS only; on Windows use WSL2")
    fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def staged(target: Path, nbytes: int) -> Iterator[Path]:
    """A work folder next to `target` for a large result with scratch files.

    The file or folder that the block makes in it under the name NEW becomes `target`; the remainder is removed.
    After an error nothing is left; after a kill a hidden work folder, which the next call for the target removes.

    Args:
        nbytes: disk space that the block will need.

    Raises:
        UserError: `target` exists, the disk is too full, or a file cannot be written.
    """
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UserError(f"{target} exists already; remove it or choose another place")
    work: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{target.name}.partial-"
        _remove_left_over(target.parent, prefix)
        free = shutil.disk_usage(target.parent).free
        if free < nbytes:
            raise UserError(
                f"{target} needs {nbytes / 1e9:.2f} GB, but {target.parent} has {free / 1e9:.2f} GB free; make room "
                "or choose another disk"
            )
        work = Path(mkdtemp(prefix=prefix, dir=target.parent))
        with locked(work / _LOCK):
            yield work
            new = work / NEW
            if new.is_dir():
                new.chmod(0o755)
            new.rename(target)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full; make room" if full else f"{error.strerror or error}; choose another place"
        raise UserError(f"{target} cannot be written, nothing is left of it: {why}") from None
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def _remove_left_over(parent: Path, prefix: str) -> None:
    """Remove work folders whose maker no longer holds their lock."""
    for work in parent.glob(f"{prefix}*"):
        try:
            (work / _LOCK).lstat()
            with locked(work / _LOCK, wait=False):
                pass
        except OSError:  # in use, or only just made
            continue
        shutil.rmtree(work, ignore_errors=True)


def hub_folder(repo: str) -> Path | None:
    """Snapshot of a repository in the cache of the Hugging Face Hub, without network access; None where it is not there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, local_files_only=True))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError):
        return None


def is_hub_id(source: str | Path) -> bool:
    """Whether `source` looks like an `owner/name` of the Hub and is not an existing path."""
    return (
        bool(re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", str(source))) and not Path(os.path.expanduser(source)).exists()
    )
