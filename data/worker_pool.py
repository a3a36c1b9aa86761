"""Pool of worker processes that survives the crash of a worker.

A decoder that crashes, or is killed for its memory, ends its process but not the run: the interrupted tasks are repeated
one at a time, and an item that crashes its process again is excluded.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar

from magihuman.errors import UserError

T = TypeVar("T")

Tick = Callable[[str], None]
"""Called with the name of each item of a task before it is processed, for progress and to identify a crash."""

Task = Callable[[Any, Tick, frozenset[str]], T]
"""(payload, tick, excluded items) -> result; a module-level function."""


def _leave_with_parent() -> None:
    """Set up a worker: the parent handles Ctrl-C, and the worker exits when the parent dies."""
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
    """Run one task; the file `note` holds the number of items begun and the current item."""
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
    """Pool of worker processes.

        with Workers(2, folder, set()) as pool:
            for name, result in pool.run(task, {"first": payload}): ...

    Args:
        count: processes.
        folder: for notes about tasks in progress.
        excluded: items known to crash their process; new ones are added.
        preloaded: modules that are imported once, before the workers are forked.
    """

    def __init__(self, count: int, folder: Path, excluded: set[str], preloaded: Sequence[str] = ()) -> None:
        self._count, self._folder, self.excluded = count, folder, excluded
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(list(preloaded))
        self._pool: ProcessPoolExecutor | None = None  # kept between runs, with the codecs its workers loaded

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: Any) -> None:
        if self._pool is not None:
            for process in list((self._pool._processes or {}).values()):
                process.terminate()  # after Ctrl-C the user should not wait for unfinished shards
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _new_pool(self, count: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(count, mp_context=self._context, initializer=_leave_with_parent)

    def _note(self, name: str) -> Path:
        return self._folder / f"{name}.doing"

    def run(
        self, task: Task[T], payloads: Mapping[str, Any], progress: Callable[[int], Any] = lambda _: None
    ) -> Iterator[tuple[str, T]]:
        """Run tasks; yields (name, result) as they end.

        Args:
            progress: called with the number of items begun since the last call.
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
        """Repeat a task in its own process, excluding items until it completes."""
        while True:
            with self._new_pool(1) as pool:
                try:
                    note, excluded = str(self._note(name)), frozenset(self.excluded)
                    return pool.submit(_attempt, task, payload, note, excluded).result()
                except BrokenProcessPool:
                    _, culprit = _read_note(self._note(name))
                    if culprit is None or culprit in self.excluded:
                        raise UserError("a worker died before it began (out of memory?); use fewer workers=") from None
                    self.excluded.add(culprit)
