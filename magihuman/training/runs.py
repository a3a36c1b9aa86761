"""The run folder of a training: its files, run.json, metrics.csv, and the loggers.

runs/<recipe>/<name>/
  config.yaml     the whole configuration
  run.json        status, parents with sha256, metrics, provenance
  metrics.csv     one line per log step
  samples/        clips and contact sheets of the training
  checkpoints/    to resume from (magihuman.training.checkpoint)
  export/         weights in the released layout
"""

import csv
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from magihuman.config import WandbSettings
from magihuman.errors import UserError
from magihuman.io.files import atomic_path, write_atomically
from magihuman.io.provenance import code_version
from magihuman.io.text import load_json
from magihuman.schema import one_line

FORMAT = "magihuman-run/1"
WANDB_SECONDS = {"init_timeout": 30.0, "finish_timeout": 300.0}
"""Longest waits for W&B's server, at the start and for what is still to be sent at the end; W&B's own are 90 s and no limit.
The variables WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT change them."""


class RunFolder:
    """One training run on disk; only the main process writes.

        run = RunFolder("runs/NAME")
        run.read()["metrics"]

    Args:
        path: the folder; made when it is first written to.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

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

    @rank_zero_only
    def update(self, **fields: Any) -> None:
        """Set fields of run.json; mappings are merged one level deep."""
        record = self.read()
        for key, value in fields.items():
            old = record.get(key)
            record[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        record["updated"] = time.strftime("%Y-%m-%d %H:%M:%S")
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / "run.json", json.dumps(record, indent=2, default=str) + "\n")

    @rank_zero_only
    def fail(self, error: BaseException) -> None:
        """Record that the training failed or was interrupted; on a full disk by a change in place, which needs no space."""
        try:
            status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            self.update(status=status, error=f"{type(error).__name__}: {error}"[:2000])
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

    @rank_zero_only
    def start(self, config: Mapping[str, Any], config_yaml: str, parents: list[dict[str, Any]]) -> None:
        """Record the start of a training, or its continuation.

        A continuation with other settings keeps the earlier ones as config-1.yaml, config-2.yaml, ..., and
        `earlier` in run.json has the command of each and the step that it reached.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        previous = self.read()
        earlier, settings = list(previous.get("earlier", [])), self.path / "config.yaml"
        if settings.exists() and settings.read_text(encoding="utf-8") != config_yaml:
            kept = f"config-{len(earlier) + 1}.yaml"
            settings.rename(self.path / kept)
            command = previous.get("provenance", {}).get("command", [])
            earlier.append({"config": kept, "command": command, "steps": previous.get("steps")})
        write_atomically(settings, config_yaml)
        self.update(
            format=FORMAT,
            recipe=str(config["recipe"]["_target_"]),
            name=self.path.name,
            status="running",
            created=previous.get("created", time.strftime("%Y-%m-%d %H:%M:%S")),
            starts=previous.get("starts", 0) + 1,
            earlier=earlier,
            config_sha256=hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest(),
            parents=parents,
            provenance={
                "command": ["python", "-m", "magihuman.train", *sys.argv[1:]],
                "seed": config.get("seed"),
                "code": code_version(),
                "libraries": {
                    "python": platform.python_version(),
                    "torch": torch.__version__,
                    "lightning": lightning.__version__,
                },
            },
        )


class CSVLog(Logger):
    """Logger of metrics.csv, also over a resume.

    A resumed run repeats the steps after its checkpoint: `rewind` drops their lines first, so that every step occurs
    once. New columns are added when they appear.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        return "csv"

    @property
    def version(self) -> str:
        return ""

    def _rows(self) -> list[dict[str, str]]:
        if not self.file.exists():
            return []
        with self.file.open(newline="") as stream:
            return [row for row in csv.DictReader(stream) if row.get("step", "").isdigit()]

    def _write(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        with atomic_path(self.file) as partial, partial.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, columns, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Drop the lines after `step`."""
        rows = self._rows()
        if rows:
            self._columns = list(rows[0])
            self._write([row for row in rows if int(row["step"]) <= step], self._columns)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one line."""
        row = {"step": str(step or 0), **{k: f"{v:.6g}" for k, v in metrics.items()}}
        if self._columns is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            rows = self._rows()
            self._columns = list(rows[0]) if rows else []
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._write([*self._rows(), row], self._columns)
            return
        with self.file.open("a", newline="") as stream:
            csv.DictWriter(stream, self._columns, restval="", lineterminator="\n").writerow(row)

    @rank_zero_only
    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The configuration is in config.yaml."""


class WandbMirror(WandbLogger):
    """Lightning's W&B logger, whose errors do not stop a training: metrics.csv has the same values."""

    broken = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one line, unless W&B's process on this machine has failed."""
        if self.broken:
            return
        try:
            super().log_metrics(dict(metrics), step)
        except Exception as error:
            self.broken = True
            print(f"note: W&B has failed ({_reason(error)}); further values are in metrics.csv only", flush=True)


def build_loggers(folder: RunFolder, wandb: WandbSettings | None, config: Mapping[str, Any]) -> list[Logger]:
    """metrics.csv, and W&B where its settings are given (offline unless the user is logged in).

    Args:
        config: mirrored to W&B.

    Raises:
        UserError: W&B is asked to be online and is not.
    """
    loggers: list[Logger] = [CSVLog(folder.path)]
    if wandb is None:
        return loggers
    run = _wandb_run(folder, wandb, config)
    return loggers if run is None else [*loggers, WandbMirror(experiment=run, save_dir=str(folder.path))]


@rank_zero_only
def _wandb_run(folder: RunFolder, settings: WandbSettings, config: Mapping[str, Any]) -> Any:
    """The W&B run of this folder, continued where one exists; its files go to wandb/ in the folder.

    A user who is logged in but cannot reach W&B gets an offline run, or an error where online was asked for. None where
    not even that can be made.
    """
    import wandb

    chosen = os.environ.get("WANDB_MODE") or settings.mode
    first = chosen if chosen != "auto" else "online" if _wandb_login() else "offline"
    identifier = folder.read().get("wandb") or hashlib.sha256(os.urandom(16)).hexdigest()[:8]
    folder.update(wandb=identifier)
    os.environ.setdefault("WANDB_SILENT", "true")
    limits = {name: value for name, value in WANDB_SECONDS.items() if f"WANDB_{name.upper()}" not in os.environ}
    for mode in dict.fromkeys((first, "offline")):
        try:
            run = wandb.init(
                name=f"{folder.path.parent.name}/{folder.path.name}",
                dir=str(folder.path),
                project=settings.project,
                entity=settings.entity,
                tags=list(settings.tags),
                id=identifier,
                resume="allow" if mode == "online" else None,
                mode=mode,  # type: ignore[arg-type]
                config=dict(config),
                settings={key: value for key, value in limits.items() if key in wandb.Settings.model_fields},
            )
            run.define_metric("*", step_metric="trainer/global_step")
            return run
        except Exception as error:
            wandb.teardown(1)  # the failed run would hold the identifier
            if chosen == "online":
                raise UserError(f"W&B: {_reason(error)}; give logger.wandb.mode=offline or logger=csv") from error
            if mode == "offline":
                print(f"note: W&B is left out ({_reason(error)}); metrics.csv has the values", flush=True)
            else:
                print(
                    f"note: W&B cannot be used online ({_reason(error)}); logging offline, later send it with: wandb sync "
                    f"{folder.path}/wandb/offline-run-*-{identifier}",
                    flush=True,
                )
    return None


def _reason(error: Exception) -> str:
    return one_line(str(error) or type(error).__name__)[:200]


def _wandb_login() -> bool:
    """Whether W&B has a key, without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False
