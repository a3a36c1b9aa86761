"""The run folder of a training: its files and run.json.

runs/<recipe>/<name>/
  config.yaml     the whole configuration
  run.json        status, parents with sha256, metrics, provenance
  metrics.csv     one line per log step
  samples/        clips and contact sheets of the training
  checkpoints/    to resume from (magihuman.training.checkpoint)
  export/         weights in the released layout
  run.lock        while a process trains (magihuman.training.lock)
  branch-1/       what a new branch has replaced (magihuman.training.branch)

Fields of run.json that tell how far it is:
  status          queued, running, preempted, interrupted (Ctrl-C), failed or finished; of a process that was killed it stays
                  running: `magihuman.training.lock.state_of` tells
  stage           start, data, training, export, or the name of the evaluation; where it stopped, unless it is finished
  progress        {step, max_steps, seconds_left, time}, written every half minute
  host, pid, job, restarts    of the last start; the Slurm job, as 17 or 16_3, and how often Slurm has requeued it
  starts          number of starts
  requeue         after a preemption: "accepted", "held: REASON", or why Slurm was not asked or refused
  stops           {place: [stage, step], count}: how many starts in a row signals have ended at this place
  evaluated       {name: {steps, settings}} of the finished evaluations; settings is a hash

This module imports neither torch nor Lightning.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from magihuman.console import is_main_process
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version
from magihuman.io.text import load_json
from magihuman.preemption import slurm_job, slurm_restarts

FORMAT = "magihuman-run/1"


class RunFolder:
    """One training run on disk; only the main process writes.

        run = RunFolder("runs/NAME")
        run.read()["metrics"]

    Args:
        path: the folder; made when it is first written to.

    Attributes:
        stage: in which this process is.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.stage = "start"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def read(self) -> dict[str, Any]:
        """run.json, or {} where there is none.

        Raises:
            UserError: when the file is not valid.
        """
        file = self.path / "run.json"
        if not file.exists():
            return {}
        try:
            return dict(load_json(file))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error}); move the folder away or choose another name=") from error

    def holds_training(self) -> bool:
        """Whether something was trained here, and not only queued or begun."""
        return (self.path / "metrics.csv").exists() or any(self.checkpoints.glob("step-*.ckpt")) or self.export.exists()

    def update(self, **fields: Any) -> None:
        """Set fields of run.json, on the main process; mappings are merged one level deep."""
        if is_main_process():
            self._set(self.read(), **fields)

    def _set(self, record: dict[str, Any], **fields: Any) -> None:
        for key, value in fields.items():
            old = record.get(key)
            record[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        self.write(record)

    def write(self, record: dict[str, Any]) -> None:
        """Replace run.json."""
        record["updated"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "run.json", json.dumps(record, indent=2, default=str) + "\n")

    def enter(self, stage: str) -> None:
        """Record that a stage begins."""
        self.stage = stage
        self.update(stage=stage)

    def fail(self, error: BaseException) -> None:
        """Record that the training failed or was interrupted; on a full disk by a change in place, which needs no space."""
        if not is_main_process():
            return
        try:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.update(status=status, stage=self.stage, error=f"{type(error).__name__}: {error}"[:2000])
        except OSError:
            file = self.path / "run.json"
            with suppress(OSError):
                text = re.sub(
                    r'"status": "(\w{6,})"',
                    lambda found: '"status": "failed"' + " " * (len(found[1]) - 6),
                    file.read_text(),
                )
                with file.open("r+") as stream:
                    stream.write(text)

    def start(self, config: Mapping[str, Any], config_yaml: str) -> None:
        """Record the start of a training, or its continuation, on the main process.

        A continuation with other settings keeps the earlier ones as config-1.yaml, config-2.yaml, ..., and
        `earlier` in run.json has the command of each and the step that it reached.
        """
        if not is_main_process():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.path.glob(".*.part"), *self.path.glob(".*.old.*")):  # of a process that was killed
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
        record = self.read()
        earlier, settings = list(record.get("earlier", [])), self.path / "config.yaml"
        if settings.exists() and settings.read_text(encoding="utf-8") != config_yaml and self.holds_training():
            kept = f"config-{len(earlier) + 1}.yaml"
            settings.rename(self.path / kept)
            command = record.get("provenance", {}).get("command", [])
            earlier.append({"config": kept, "command": command, "steps": record.get("steps")})
        write_atomically(settings, config_yaml)
        for of_the_last_start in ("error", "requeue", "progress"):
            record.pop(of_the_last_start, None)
        self._set(
            record,
            format=FORMAT,
            recipe=str(config["recipe"]["_target_"]),
            name=self.path.name,
            sweep=config.get("sweep") or record.get("sweep"),
            status="running",
            stage="start",
            host=platform.node(),
            pid=os.getpid(),
            job=slurm_job(),
            restarts=slurm_restarts(),
            created=record.get("created", time.strftime("%Y-%m-%d %H:%M:%S")),
            starts=record.get("starts", 0) + 1,
            earlier=earlier,
            config_sha256=hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            provenance={
                "command": ["python", "-m", "magihuman.train", *sys.argv[1:]],
                "seed": config.get("seed"),
                "code": code_version(),
                "libraries": {
                    "python": platform.python_version(),
                    "torch": version("torch"),
                    "lightning": version("lightning"),
                },
            },
        )
