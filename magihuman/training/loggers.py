"""Loggers of a training: metrics.csv in the run folder, and W&B."""

import csv
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from magihuman.config import WandbSettings
from magihuman.errors import UserError
from magihuman.io.files import atomic_path
from magihuman.schema import one_line
from magihuman.training.runs import RunFolder

WANDB_SECONDS = {"init_timeout": 30.0, "finish_timeout": 300.0}
"""Longest waits for W&B's server, at the start and for what is still to be sent at the end; W&B's own are 90 s and no limit.
The variables WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT change them."""


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
