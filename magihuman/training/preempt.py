"""Preemption has one owner: a signal sets a flag, the next step boundary saves, then the job is requeued.

Lightning's own handler saves inside the signal, in the middle of a step, which loses the position of the data
by one batch; so its Slurm requeue is switched off (see `magihuman.training.strategies`) and this one takes
its place.
"""

import os
import signal
import subprocess
from types import FrameType
from typing import Any

import lightning as L

from magihuman.training.checkpoint import Checkpointer

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
EXIT_STATUS = 75
"""Status of a training that was stopped and can be continued (EX_TEMPFAIL)."""


class Preemption(L.Callback):
    """Stops at the next step boundary after SIGUSR1 or SIGTERM.

    Attributes:
        received: name of the signal that came, or None.
        stopped_at: step at which the training stopped for it, or None.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.received: str | None = None
        self.stopped_at: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.stepped:
            return
        stop = self.received is not None
        # A scheduler may signal some processes only, and all must stop at one step.
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop and self.stopped_at is None:
            self.received = self.received or "a signal to another process"
            self.checkpointer.save(trainer, pl_module)
            self.stopped_at = int(pl_module.step)  # type: ignore[arg-type]
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


def requeue() -> bool:
    """Ask Slurm to run this job again; True when it was asked. Does nothing outside Slurm.

    An array's element is requeued alone. `scontrol requeue` ends the job, so this comes last.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or int(os.environ.get("SLURM_PROCID", "0")) != 0:
        return False
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        return subprocess.run(["scontrol", "requeue", job], timeout=60).returncode == 0
    except (OSError, subprocess.SubprocessError):
        return False
