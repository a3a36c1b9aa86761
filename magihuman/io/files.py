"""Big results made whole or not at all, and by one process: filled beside their place and moved there at the end."""

import errno
import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from magihuman.errors import UserError

NEW = "new"
_LOCK = "lock"


@contextmanager
def staged(target: Path, nbytes: int) -> Iterator[Path]:
    """A work folder beside `target`. What the block makes in it under the name NEW, a file or a folder, becomes
    `target`; anything else in it is scratch. After an error nothing is left; after a kill only a hidden work folder,
    which the next call for the same target removes.

    Args:
        nbytes: room that the block will need.

    Raises:
        UserError: `target` is there already, the disk has too little room, or a file cannot be written.
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
        with (work / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
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


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process of the machine at a time: those of a training would all make the same file, or read it half-made.

    Args:
        path: of a lock, which stays behind, empty.
    """
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_left_over(parent: Path, prefix: str) -> None:
    """Remove work folders whose maker is gone, which its lock tells."""
    for work in parent.glob(f"{prefix}*"):
        try:
            with (work / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # still at work, or only just begun
            continue
        shutil.rmtree(work, ignore_errors=True)
