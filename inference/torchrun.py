"""Processes of a torchrun command: their ranks, a start and an end together, a value that all share. Imports no torch.

with together(ranks()[1]):
    decided = from_first(decide() if ranks()[0] == 0 else None)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=1)
"""How long a process waits for the others, whose shares of the work may take longer; where one dies, torchrun ends all."""


def ranks() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without it."""
    rank, processes, local = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    return rank, processes, local


@contextmanager
def together(processes: int) -> Iterator[None]:
    """Start and end with all processes; nothing for one process. Within another such block it only ends together."""
    if processes == 1:
        yield
        return
    from torch import distributed

    if distributed.is_initialized():
        yield
        distributed.barrier()
        return
    distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def wait_for_all() -> None:
    """Wait for all processes inside `together`."""
    if ranks()[1] == 1:
        return
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def from_first(value: Any) -> Any:
    """The first process's value in all processes inside `together`, which wait for it; the value itself for one process."""
    if ranks()[1] == 1:
        return value
    from torch import distributed

    held = [value]
    distributed.broadcast_object_list(held, src=0)
    return held[0]
