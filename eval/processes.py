"""A function of many items in forked processes, one per core: puppets are drawn and measured by code that uses one core.

scores = in_processes(score_one, clips)
"""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from magihuman.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

FEWEST = 8  # items per process: for fewer, starting it and moving them takes longer


def in_processes(function: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """`[function(item) for item in items]`; in this process for few items, on one core and where forking is not safe (macOS).

    The first item is processed here, so that caches which it fills are there in the other processes.

    Args:
        function: a function of a module, which must not use torch: its threads do not survive a fork.

    Raises:
        UserError: a process was killed. What the function raises is raised here.
    """
    items = list(items)
    count = min(_cores(), len(items) // FEWEST)
    if count < 2 or sys.platform != "linux":
        return [function(item) for item in items]
    first = function(items[0])
    try:
        with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("fork")) as pool:
            return [first, *pool.map(function, items[1:], chunksize=FEWEST // 4)]
    except BrokenProcessPool as error:
        raise UserError(
            "a process that measured clips was killed, perhaps for want of memory; run again with OMP_NUM_THREADS=1, which "
            "keeps to one process"
        ) from error


def _cores() -> int:
    """Cores that this process may use; OMP_NUM_THREADS, by which users give several processes a share each, is a limit."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    limit = os.environ.get("OMP_NUM_THREADS", "")
    return min(own, int(limit)) if limit.isdigit() and int(limit) else own
