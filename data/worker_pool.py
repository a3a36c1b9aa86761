"""Tasks in several processes that survive the death of a worker.

A decoder that crashes (or is shot for its memory) takes its process along and must not take the run along:
the tasks that were under way are repeated one at a time, and an item on which its process dies again is
excluded.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from magihuman.errors import UserError

T = TypeVar("T")

Tick = Callable[[str], None]
"""Called before each item of a task with the item's name; so progress and a crash's culprit are known."""

Task = Callable[[Any, Tick, frozenset[str]], T]
"""(payload, tick, excluded items) -> result; a module-level function."""


def _leave_with_parent() -> None:
    """Set up a worker: the terminal's Ctrl-C is the parent's business, and its death is ours too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            wait_for([parent.sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
    import torch

    torch.set_num_threads(1)


def _attempt(task: Task[Any], payload: Any, note: str, excluded: frozenset[str]) -> Any:
    """Run one task and keep `note` a file with "items begun" and the present item."""
    begun = 0
    with open(note, "wb", buffering=0) as file:

        def tick(item: str) -> None:
            nonlocal begun
            begun += 1
            text = f"{begun}\n{item}\n".encode("utf-8", "surrogateescape")
            os.pwrite(file.fileno(), text, 0)
            os.ftruncate(file.fileno(), len(text))

        return task(payload, tick, excluded)


def _read_note(note: Path) -> tuple[int, str | None]:
    try:
        count, item = note.read_bytes().split(b"\n", 1)
        return int(count), item[:-1].decode("utf-8", "surrogateescape")
    except (OSError, ValueError):
        return 0, None


class Workers:
    """The processes of one run; a context manager.

    Args:
        count: processes; folder: for the notes about work under way.
        excluded: items known to kill their process; grows.
    """

    def __init__(self, count: int, folder: Path, excluded: set[str]) -> None:
        self._count, self._folder, self.excluded = count, folder, excluded
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(
            ["data.encode", "torch", "webdataset.writer", "magihuman.codecs.bundle"]
        )
        self._pool: ProcessPoolExecutor | None = None  # kept between runs, for what workers have loaded

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()  # an interrupted user does not want to wait for shards under way
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self, count: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(count, mp_context=self._context, initializer=_leave_with_parent)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.doing"

    def run(
        self, task: Task[T], payloads: Mapping[str, Any], progress: Callable[[int], Any] = lambda _: None
    ) -> Iterator[tuple[str, T]]:
        """(name, result) of every task, as they end.

        Args:
            progress: called with the number of items newly begun.
        """
        left = dict(payloads)
        begun = dict.fromkeys(left, 0)

        def report(name: str) -> None:
            now, _ = _read_note(self._note(name))
            progress(max(0, now - begun[name]))
            begun[name] = max(now, begun[name])

        while left:
            if self._pool is None:
                self._pool = self._new_pool(self._count)
            waiting: dict[Future[Any], str] = {}
            pending = iter(list(left.items()))
            try:
                while True:
                    # A short queue, so that a crash interrupts few tasks.
                    while len(waiting) < self._count + 1 and (following := next(pending, None)) is not None:
                        name, payload = following
                        arguments = (payload, str(self._note(name)), frozenset(self.excluded))
                        waiting[self._pool.submit(_attempt, task, *arguments)] = name
                    if not waiting:
                        return
                    done, _ = wait(waiting, timeout=0.3, return_when=FIRST_COMPLETED)
                    for name in waiting.values():
                        report(name)
                    for future in done:
                        result, name = future.result(), waiting.pop(future)
                        del left[name]
                        self._note(name).unlink(missing_ok=True)
                        yield name, result
            except BrokenProcessPool:
                self._pool.shutdown(wait=True, cancel_futures=True)
                self._pool = None
                for name in [name for name in waiting.values() if self._note(name).exists()]:
                    result = self._alone(task, name, left.pop(name))
                    report(name)
                    self._note(name).unlink(missing_ok=True)
                    yield name, result

    def _alone(self, task: Task[T], name: str, payload: Any) -> T:
        """Repeat a task in a process of its own, excluding items until it lives through it."""
        while True:
            with self._new_pool(1) as pool:
                try:
                    note, excluded = str(self._note(name)), frozenset(self.excluded)
                    return pool.submit(_attempt, task, payload, note, excluded).result()
                except BrokenProcessPool:
                    _, culprit = _read_note(self._note(name))
                    if culprit is None or culprit in self.excluded:
                        raise UserError(
                            "a worker died before it began (out of memory?); use fewer workers= or a smaller batch="
                        ) from None
                    self.excluded.add(culprit)
