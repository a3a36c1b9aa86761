"""Signals that ask a training to end, SIGUSR1 and SIGTERM, and the requeue of its Slurm job.

    preemption.install()                      # first line of the process
    with preemption.recorded(record):         # `record` writes the reason down and requeues
        ...                                   # a signal raises Preempted here,
        with preemption.deferred(): ...       # but only sets a flag here

What a signal does depends on where the process is:

| where | what happens |
|---|---|
| before there is a run folder | the process requeues its job and ends at once |
| in `recorded` (start, data, export, evaluation) | `Preempted` is raised in the main thread; the stage is done again later |
| in `deferred` (steps of a training) | the flag is set; the training saves at the next step boundary |
| the main thread does not come back from C code | a thread records and ends the process after `GRACE` seconds |

The exit status is `STOPPED`. Signals after the first change nothing. This module is imported before all others, so it imports
little; a signal before its first line (some 30 ms of Python's own start) still kills the process.
"""

import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from magihuman.console import is_main_process

SIGNALS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGTERM") if hasattr(signal, name))
STOPPED = 75
"""Exit status of a training that a signal has ended and the same command continues (EX_TEMPFAIL)."""
GRACE = 30.0
"""Seconds that a process may take to end after a signal outside of its training steps."""
ACCEPTED, HELD = "accepted", "held"
MARKER = ".preempted"
"""File in the run folder by which a process of a job tells the main process that it has left after a signal."""


class Preempted(BaseException):
    """A signal has asked the process to end. No Exception, so that no library takes it for an error of its own."""


class _State:
    """Of this process."""

    def __init__(self) -> None:
        self.installed = False
        self.received: str | None = None  # name of the first signal
        self.deferred: Callable[[int], None] | None = None
        self.record: Callable[[str], None] | None = None
        self.marker: Path | None = None
        self.left = False
        self.finished = False
        self.once = threading.Lock()


_state = _State()


def install() -> None:
    """Handle the signals from now on, in the whole process; call it in the main thread. A second call does nothing.

    Nor does any on Windows, where `magihuman.train` refuses to run.
    """
    if _state.installed or not hasattr(signal, "SIGUSR1"):
        return
    _state.installed = True
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    for number in SIGNALS:
        signal.signal(number, _handle)
    # The number of a signal is written there at once, also while the main thread is in C code and runs no handler.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="preemption", daemon=True).start()
    os.register_at_fork(after_in_child=_forget)
    signal.pthread_sigmask(
        signal.SIG_UNBLOCK, SIGNALS
    )  # an element of a sweep blocks them while it becomes the training


def received() -> str | None:
    """Name of the signal that this process has received, or None."""
    return _state.received


def check() -> None:
    """Raise if a signal was received: between stages, for libraries that swallow what is raised inside of them.

    Raises:
        Preempted: naming the signal.
    """
    if _state.received is not None:
        raise Preempted(_state.received)


@contextmanager
def recorded(record: Callable[[str], None], folder: Path | None = None) -> Iterator[None]:
    """In the block a signal raises Preempted; `leave` and the thread of `GRACE` call `record`, once.

    Args:
        record: gets the reason, such as "SIGTERM"; may be called in another thread.
        folder: of the run, on the main process, which looks there for other processes that leave (`tell_main_process`).
    """
    _state.record, _state.left, _state.finished = record, False, False
    _state.marker = None if folder is None else folder / MARKER
    with suppress(OSError):  # of an earlier start
        if _state.marker is not None:
            _state.marker.unlink()
    try:
        yield
    finally:
        _state.record = _state.marker = None
        ended()  # nothing is left to stop or to requeue


@contextmanager
def deferred(on_signal: Callable[[int], None] = lambda number: None) -> Iterator[None]:
    """In the block a signal sets the flag of `received` and calls `on_signal` with its number; nothing is raised.

    Where `install` was not called the signals are handled in this block only.
    """
    before = {} if _state.installed else {number: signal.signal(number, _handle) for number in SIGNALS}
    outer, _state.deferred = _state.deferred, on_signal
    try:
        yield
    finally:
        _state.deferred = outer
        for number, handler in before.items():
            signal.signal(number, handler)
        if before:
            _state.received = None


def leave(reason: str) -> None:
    """Call the record of the run, or requeue where there is none, once."""
    with _state.once:
        if not _state.left:
            _state.left = True
            (_state.record or _without_run)(reason)


def ended() -> None:
    """Signals change nothing from now on: the training is done or has failed, and its loggers may take their time."""
    _state.finished = _state.installed and not _state.left


def left_by_another() -> str | None:
    """What another process of the job wrote when a signal ended it, or None; on the main process."""
    with suppress(OSError):
        if _state.marker is not None:
            return _state.marker.read_text(encoding="utf-8").strip() or None
    return None


def tell_main_process(folder: Path, reason: str) -> None:
    """Say in the run folder that this process leaves after a signal: the main process may have had none, and waits."""
    with suppress(OSError):
        (folder / MARKER).write_text(f"{reason} to process {os.getpid()} on {os.uname().nodename}\n", encoding="utf-8")


def wait_for_parent(seconds: float = 2 * GRACE) -> None:
    """Return when the process that started this one has ended, at the latest after `seconds`."""
    parent, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.1)


def end_with_parent() -> None:
    """Have SIGTERM sent to this process when the one that started it ends, however that happens (Linux only)."""
    import ctypes

    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG


def _handle(number: int, frame: FrameType | None) -> None:
    """The signal handler, in the main thread."""
    if _state.received is not None or _state.finished or _state.left:
        return
    _state.received = signal.Signals(number).name
    if _state.deferred is not None:
        _state.deferred(number)
    elif _state.record is None:
        _end(_state.received)  # raising could leave half an import behind, and there is nothing to clean up
    else:
        raise Preempted(_state.received)


def _watch(reading: int) -> None:
    """The thread: ends a process whose main thread does not, and notices that another process has left."""
    reason, since = "", 0.0
    while True:
        ready = select.select([reading], [], [], 1.0)[0]
        numbers = [number for number in os.read(reading, 64) if number in SIGNALS] if ready else []
        if numbers and not reason:
            reason, since = signal.Signals(numbers[0]).name, time.monotonic()
        other = left_by_another()
        if other and not reason:
            os.kill(os.getpid(), signal.SIGUSR1)
        if _state.deferred is not None and not other:  # the steps take their time, unless a partner is gone
            since = time.monotonic()
        if reason and not _state.finished and time.monotonic() - since > GRACE:
            _end(reason)


def _end(reason: str) -> NoReturn:
    """Record and end the process from wherever it is."""
    try:
        leave(reason)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
        os._exit(STOPPED)


def _without_run(reason: str) -> None:
    say_raw(f"{reason}: stopped before the training began; {told(requeue())}")


def _forget() -> None:
    """In a forked child, such as a worker of a data loader: signals do what they usually do, SIGUSR1 nothing."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _state.__init__()  # type: ignore[misc]


def say_raw(text: str) -> None:
    """Print a line on stderr from a signal handler, where `print` may be in use."""
    os.write(2, f"{text}\n".encode())


# -- Slurm ---------------------------------------------------------------------------------------------------------


def slurm_job() -> str | None:
    """The Slurm job of this process, such as "17", or "16_3" for an array's element; None outside of Slurm."""
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ.get("SLURM_JOB_ID")


def slurm_restarts() -> int:
    """How often Slurm has requeued this job; 0 outside of Slurm."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def requeue(hold: str = "") -> str:
    """Requeue this Slurm job, an array's element alone: "accepted", "held: " and the reason, or why not.

    Slurm ends the job when it has accepted, so this comes last.

    Args:
        hold: the reason for which the job is to wait until a person releases it; "" for none.
    """
    job = slurm_job()
    if job is None:
        return "not a Slurm job"
    if not is_main_process():
        return "left to the main process"
    shown = _scontrol("show", "--oneliner", "job", job).stdout
    facts: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", shown))
    if facts.get("BatchFlag") == "0":
        return "an interactive job, which Slurm cannot requeue"
    if (
        int(facts.get("Restarts") or 0) > slurm_restarts()
    ):  # Slurm itself preempts by a requeue, or a person asked for one
        return ACCEPTED
    # scancel and the time limit end a job with SIGTERM, too; a job that was cancelled must not rise again.
    if facts.get("JobState") in ("COMPLETING", "CANCELLED") and facts.get("Reason") != "TimeLimit":
        return "the job is being cancelled"
    done = _scontrol("requeuehold" if hold else "requeue", job)
    if done.returncode:
        return " ".join((done.stderr or done.stdout).split()) or "scontrol failed"
    return f"{HELD}: {hold}" if hold else ACCEPTED


def told(answer: str) -> str:
    """The answer of `requeue` as part of a line."""
    job = slurm_job()
    if answer.startswith(f"{HELD}: "):
        return f"Slurm job {job} is requeued and {answer}; scontrol release {job} starts it again"
    return f"Slurm job {job} is requeued" if answer == ACCEPTED else f"not requeued ({answer})"


def _scontrol(*words: str) -> Any:
    try:
        return subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return subprocess.CompletedProcess(words, 1, "", f"scontrol: {error}")
