"""Loggers of a training: metrics.csv in the run folder, W&B, TensorBoard."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from magihuman.config import LoggerSettings
from magihuman.io.files import atomic_path
from magihuman.training.runs import RunFolder
from magihuman.training.tensorboard_log import TensorBoardLog
from magihuman.training.wandb_log import WandbMirror, open_wandb


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


def build_loggers(folder: RunFolder, settings: LoggerSettings, config: Mapping[str, Any]) -> list[Logger]:
    """metrics.csv, and W&B (offline unless the user is logged in) and TensorBoard where the settings say so.

    Args:
        config: the whole configuration, which W&B and TensorBoard get.

    Raises:
        UserError: W&B is asked to be online and is not.
    """
    loggers: list[Logger] = [CSVLog(folder.path)]
    if settings.tensorboard:
        loggers.append(TensorBoardLog(folder, config))
    mirror = None if settings.wandb is None else open_wandb(folder, settings.wandb, config)
    return loggers if mirror is None else [*loggers, mirror]


def rewind(loggers: Iterable[Logger], step: int) -> None:
    """Drop what was logged after `step`, where a logger can."""
    for logger in loggers:
        if isinstance(logger, CSVLog | TensorBoardLog):
            logger.rewind(step)


def close(loggers: Iterable[Logger]) -> None:
    """Write final scores and status, which run.json has, and end the logging; a second call does nothing."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLog | WandbMirror):
            logger.close()
