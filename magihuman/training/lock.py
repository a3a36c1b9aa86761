"""The lock of a run folder, so that two trainings never write into one; without torch.

    with RunLock("runs/pretrain/a"): ...       # UserError where another training holds it
    state_of("runs/pretrain/a")                # "running", "finished", ..., or "lost" for a process that was killed

The lock is the file `run.lock`, which the main process creates exclusively (O_EXCL), touches every 30 seconds and removes at
every orderly end. Its content is JSON: host, boot id of the kernel, pid namespace, pid and start time of the process, Slurm
job and its number of restarts, time, and a random text. A killed process leaves it behind, so it is broken, and a line says so,
when its holder is dead:

1. The same Slurm job, requeued since: dead. Slurm ends all processes of a job before it starts it again.
2. The same kernel and pid namespace (boot id): dead when there is no process of this pid, or it started at another time.
3. Anything else (another machine, a container, this machine after a reboot): dead when the lock was not touched for 5 minutes;
   for 2 minutes where the host has the same name. Both times are the file server's, since clocks of machines differ.

Host names decide nothing alone: containers often share one. One breaks at a time (`magihuman.io.files.locked`), so a fresh lock
is never broken. A process that slept longer than rule 3 allows, and whose lock another has taken, ends itself.

Assumed of the disk: exclusive creation and times of the server (local disks, NFS 3 and later, Lustre, GPFS, BeeGFS, CephFS).
File locks are used for breaking only; without them two machines that break one lock in the same millisecond may both succeed.
"""

import json
import os
import platform
import subprocess
import threading
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from magihuman.console import say
from magihuman.errors import UserError
from magihuman.io.files import locked
from magihuman.preemption import say_raw, slurm_job, slurm_restarts

LOCK = "run.lock"
HEARTBEAT = 30.0
"""Seconds between two touches of the lock."""
SILENCE, SILENCE_OF_THIS_NAME = 300.0, 120.0
"""Seconds without a touch after which the holder on another machine is dead; where that has this machine's name."""


def start_time(pid: int) -> str | None:
    """When a process started, as the system says it; None where there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()[19]  # in ticks since the boot
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True)  # macOS
    return shown.stdout.strip() or None


@cache
def this_kernel() -> str:
    """Boot id of the kernel and pid namespace: within both a pid means one process. The host's name where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def disk_time(folder: Path) -> float:
    """The time of the disk's server: of a file that is made for it. This machine's where nothing can be written."""
    probe = folder / f".clock.{os.urandom(4).hex()}.part"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def holder(folder: Path) -> dict[str, Any] | None:
    """Content of the lock, and `touched`, its time on the disk; None where there is none. Of a file that is just being
    written, or was left empty, `touched` alone."""
    file = folder / LOCK
    try:
        touched = file.stat().st_mtime
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        content = dict(json.loads(text))
    except (ValueError, TypeError):
        content = {}
    return {**content, "touched": touched}


def why_dead(content: dict[str, Any], folder: Path) -> str | None:
    """The reason for which the holder of a lock counts as dead, or None for one that is alive."""
    job = slurm_job()
    if job is not None and content.get("job") == job and slurm_restarts() > int(content.get("restarts") or 0):
        return "of this job before its requeue"
    if content.get("kernel") == this_kernel():
        began = start_time(int(content["pid"]))
        if began == content.get("started"):
            return None
        return "gone" if began is None else "gone, and its pid belongs to another process"
    silent = disk_time(folder) - content["touched"]
    limit = SILENCE_OF_THIS_NAME if content.get("host") == platform.node() else SILENCE
    return f"silent for {silent:.0f} s, more than {limit:.0f}" if silent > limit else None


def state_of(folder: str | Path) -> str | None:
    """The status of a run for tables: that of run.json, but "lost" for one that says running and whose process is dead.

    None where there is no run.json, and "damaged" for one that cannot be read. Takes under a millisecond on a local disk.
    """
    folder = Path(folder)
    for _ in range(2):  # a run that ends just now has no lock, but a new status
        try:
            status = str(dict(json.loads((folder / "run.json").read_text(encoding="utf-8"))).get("status"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError):
            return "damaged"
        if status != "running":
            return status
        content = holder(folder)
        if content is not None and why_dead(content, folder) is None:
            return status
    return "lost"


def named(content: dict[str, Any]) -> str:
    """Who holds a lock, for messages."""
    if "pid" not in content:
        return "a process that is just starting"
    job = f", Slurm job {content['job']}" if content.get("job") else ""
    return f"process {content['pid']} on {content.get('host')}{job}, since {content.get('since')}"


class RunLock:
    """Lock of a run folder while the block runs, on the main process; see the module.

        with RunLock(folder): ...

    Args:
        folder: of the run; made where it is missing, and removed at the end where it is still empty.
        main: whether this is the job's main process. Others only refuse a folder that another Slurm job holds, so that they
            do not wait for a main process that has ended.

    Attributes:
        held: whether this process holds it.

    Raises:
        UserError: another training holds it; on entry.
    """

    def __init__(self, folder: str | Path, main: bool = True) -> None:
        self.folder, self.main = Path(folder), main
        self.content = {
            "host": platform.node(),
            "kernel": this_kernel(),
            "pid": os.getpid(),
            "started": start_time(os.getpid()),
            "job": slurm_job(),
            "restarts": slurm_restarts(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "nonce": os.urandom(8).hex(),
        }
        self.held = False
        self._ended = threading.Event()

    def __enter__(self) -> "RunLock":
        if not self.main:
            found = holder(self.folder)
            if found and slurm_job() not in (None, found.get("job")) and why_dead(found, self.folder) is None:
                raise self._refused(found)
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        while not self._create():
            self._break()
        self.held = True
        threading.Thread(target=self._beat, name="run lock", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Remove the lock, if it is still this process's."""
        if not self.held:
            return
        self.held = False
        self._ended.set()
        with suppress(OSError):
            if (holder(self.folder) or {}).get("nonce") == self.content["nonce"]:
                (self.folder / LOCK).unlink()
            self.folder.rmdir()  # where nothing was begun

    def _create(self) -> bool:
        """Create the lock; False where there is one."""
        try:
            number = os.open(self.folder / LOCK, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        with os.fdopen(number, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(self.content) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        return True

    def _break(self) -> None:
        """Remove the lock of a dead holder; raises UserError for a live one."""
        found = holder(self.folder)
        if found is None:
            return
        if why_dead(found, self.folder) is None:
            raise self._refused(found)
        with locked(self.folder / f".{LOCK}.breaking"):
            found = holder(self.folder)  # nobody but its holder or whoever is in here removes a lock
            reason = found and why_dead(found, self.folder)
            if found and reason:
                (self.folder / LOCK).unlink()
                say(f"note: {self.folder} was locked by {named(found)}, which is {reason}; the lock is broken")

    def _refused(self, found: dict[str, Any]) -> UserError:
        return UserError(
            f"{self.folder} is in use by {named(found)}; wait for it or end it, or choose another name= (if it is certainly "
            f"dead, remove {self.folder / LOCK})"
        )

    def _beat(self) -> None:
        """The thread that touches the lock."""
        while not self._ended.wait(HEARTBEAT):
            with suppress(OSError):
                self.beat()

    def beat(self) -> None:
        """Touch the lock once; ends the process when another has taken it, and makes it again where it was removed."""
        found = holder(self.folder)
        if found is None and not self._create():
            found = holder(self.folder)
        if found and found.get("nonce") not in (None, self.content["nonce"]) and self.held:
            say_raw(
                f"error: {self.folder} was taken over by {named(found)}, because this process had stopped for minutes; it ends "
                "and leaves the folder to the other"
            )
            os._exit(2)
        os.utime(self.folder / LOCK)
