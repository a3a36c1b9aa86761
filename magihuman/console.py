"""Lines of progress on the main process; without torch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


def is_main_process() -> bool:
    """Whether this process prints and writes for the job; from the launchers' variables, before any process group.

    RANK is torchrun's; SLURM_PROCID is srun's, but also 0 in a batch script, below which Lightning starts processes with
    LOCAL_RANK and NODE_RANK.
    """
    ranks = ("RANK",) if "RANK" in os.environ else ("SLURM_PROCID", "LOCAL_RANK", "NODE_RANK")
    return not any(int(os.environ.get(name) or 0) for name in ranks)


def say(text: str) -> None:
    """Print one line of progress, on the main process."""
    if is_main_process():
        print(text, flush=True)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and its time."""
    say(f"== {title}")
    start = time.monotonic()
    yield
    say(f"   {title}: {time.monotonic() - start:.0f} s")
