"""One element of a sweep, as this process: the run folder is prepared and the training takes the process over."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from magihuman import preemption
from magihuman.console import is_main_process, say
from magihuman.io.files import write_atomically
from magihuman.sweep.points import Point, Points
from magihuman.training.runs import FORMAT, RunFolder

SWEEP = "MAGIHUMAN_SWEEP"
"""Environment variable with the sweep's name, the setting `sweep` of a training."""


def run_element(folder: Path, number: int) -> NoReturn:
    """Replace this process by the training of an element: signals, exit status and output are the training's.

    Args:
        folder: of the sweep.

    Raises:
        UserError: no such sweep or element.
    """
    points = Points.load(folder)
    point = points.element(number)
    if is_main_process():
        if not RunFolder(point.folder).read():
            mark_queued(points, point)
        _join_wandb_sweep(point)
    os.environ[SWEEP] = points.name
    sys.stdout.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)  # until the training's first line; they wait meanwhile
    os.execv(sys.executable, [sys.executable, "-m", "magihuman.train", *point.overrides])


def mark_queued(points: Points, point: Point) -> tuple[Path, str | None]:
    """Write into run.json that the element waits, with its W&B id and the sweep's name; the remainder stays.

    Returns:
        the file and its content before, for `restore`.
    """
    run, file = RunFolder(point.folder), Path(point.folder) / "run.json"
    before = file.read_text(encoding="utf-8") if file.exists() else None
    new = {"format": FORMAT, "name": run.path.name, "created": time.strftime("%Y-%m-%d %H:%M:%S"), "wandb": point.wandb}
    run.write({**new, **run.read(), "status": "queued", "sweep": points.name})
    return file, before


def restore(record: tuple[Path, str | None]) -> None:
    """Undo `mark_queued`, where the element could not be submitted."""
    file, before = record
    if before is None:
        file.unlink(missing_ok=True)
    else:
        write_atomically(file, before)


def _join_wandb_sweep(point: Point) -> None:
    """Under `wandb agent`: the first start takes the agent's run; a later one continues that run outside of the agent.

    In a sweep wandb.init ignores `id` and takes the agent's, which is another one at each start.
    """
    given = os.environ.get("WANDB_RUN_ID")
    if not given or not os.environ.get("WANDB_SWEEP_ID"):
        return
    record = RunFolder(point.folder).read()
    if not record.get("starts"):
        RunFolder(point.folder).update(wandb=given)
    elif record.get("wandb") != given:
        say(
            f"note: {point.folder} continues its W&B run {record.get('wandb')}; the agent's new run {given} stays empty"
        )
        for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH"):
            os.environ.pop(name, None)
