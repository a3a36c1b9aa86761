"""Lines of progress on the main process; without torch."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager


def is_main_process() -> bool:
    """Whether this process prints and writes for the job; from the launchers' variables, before any process group."""
    for variables in (("RANK",), ("SLURM_PROCID",), ("LOCAL_RANK", "NODE_RANK")):
        if variables[0] in os.environ:
            return all(int(os.environ.get(variable, "0")) == 0 for variable in variables)
    return True


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
