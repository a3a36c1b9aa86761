"""Hydra's `-m`: several trainings with one command, one after the other."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from magihuman import preemption
from magihuman.composition import choose_folder, plain
from magihuman.console import say
from magihuman.errors import UserError

INTERRUPTED = 130
"""Status of a training after Ctrl-C; the same command continues it, as after `preemption.STOPPED`."""
SUBMITIT = "SUBMITIT_FOLDER"
"""Environment variable of jobs that submitit has started (`-m hydra/launcher=submitit_slurm`)."""


class Sweep:
    """The jobs of a command with `-m`, one after the other: each has a process and a run folder of its own, and one that
    fails does not end the others.

    A job's number follows its name, unless the names alone differ (`name=a,b`) or are made of settings
    (`name='x-${optim.lr}'`).

    Attributes:
        settings: names of the settings that differ between jobs.
        folders: number of the job that uses it, by folder; failed: the reason, by job.
    """

    def __init__(self, settings: set[str]) -> None:
        self.settings = settings
        self.folders: dict[Path, int] = {}
        self.failed: dict[int, str] = {}

    def run(self, config: Any, number: int, words: list[str]) -> None:
        """Run job `number`.

        Args:
            words: its settings.

        Raises:
            UserError: all jobs would have the same folder.
            ValueError: the job failed, and is one of submitit.
            SystemExit: with the job's status, after a signal or Ctrl-C.
        """
        from omegaconf import OmegaConf

        given = OmegaConf.to_container(config, resolve=False)
        assert isinstance(given, dict)
        made = {key: "${" in str(given.get(key)) for key in ("name", "folder")}
        if given["folder"] is not None and not made["folder"] and self.settings - {"folder"}:
            raise UserError(
                f"folder={given['folder']} would be the folder of every job of this sweep; give name=NAME instead, "
                "for the folders NAME-0, NAME-1, ..."
            )
        say(f"== job {number} of the sweep: {' '.join(words)}")
        try:
            if given.get("recipe") is not None:
                folder = choose_folder(plain(config), None if made["name"] or self.settings <= {"name"} else number)
                if self.folders.setdefault(folder, number) != number:
                    raise UserError(
                        f"job {self.folders[folder]} has the same folder, {folder}; put every setting that differs into the "
                        "name, or give name=NAME for the folders NAME-0, NAME-1, ..."
                    )
                words = [*words, f"++folder={folder}"]
            status = run_job([sys.executable, "-m", "magihuman.train", *words], f"job {number}")
            if status:
                raise UserError(f"status {status}")
        except UserError as error:
            if SUBMITIT in os.environ:  # the process that waits for this job gets the error, and prints it as one line
                raise ValueError(f"job {number}: {error}; its log is in the folder .submitit of the sweep") from error
            self.failed[number] = str(error)

    def report(self) -> None:
        """Raise if a job failed.

        Raises:
            UserError: naming them.
        """
        if self.failed:
            which = "; ".join(f"job {number}: {reason}" for number, reason in self.failed.items())
            raise UserError(f"{len(self.failed)} of the sweep's jobs failed, the others are done ({which})")


def run_job(command: list[str], what: str) -> int:
    """Run one of several trainings; its status.

    Args:
        what: for the message, such as "job 3".

    Raises:
        SystemExit: after a signal or Ctrl-C, with the status that says so; further trainings would not run either.
    """
    status, stopped_by = run_and_pass_signals(command)
    if status in (preemption.STOPPED, INTERRUPTED):
        raise SystemExit(status)
    if stopped_by:  # when the training was done, or before it handled signals
        answer = preemption.told(preemption.requeue())
        say(f"{stopped_by.name}: the sweep stops at {what}; the same command continues; {answer}")
        raise SystemExit(preemption.STOPPED)
    return status


def run_and_pass_signals(command: list[str]) -> tuple[int, signal.Signals | None]:
    """Run a command; its status, and the first signal that came meanwhile. Signals that stop a training go on to it.

    In a job of submitit, whose signal is SIGUSR2, that goes on as SIGUSR1: the training saves and requeues the job, where
    submitit's own handler would requeue it at once.
    """
    children: list[subprocess.Popen[bytes]] = []
    received: list[signal.Signals] = []

    def pass_on(number: int) -> None:
        received.append(signal.Signals(number))
        for child in children:
            child.send_signal(number)

    with preemption.deferred(pass_on):
        if SUBMITIT in os.environ:
            signal.signal(signal.SIGUSR2, lambda number, frame: pass_on(signal.SIGUSR1))
        children.append(subprocess.Popen(command, preexec_fn=_ignore_submitit if SUBMITIT in os.environ else None))
        if received:  # it came while the process was being made
            children[0].send_signal(received[0])
        try:
            return children[0].wait(), received[0] if received else None
        except KeyboardInterrupt:  # the child has it, too
            children[0].wait()
            raise


def _ignore_submitit() -> None:
    """In the new process: Slurm sends SIGUSR2 to all processes of the job, and it would end one that does not handle it."""
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
