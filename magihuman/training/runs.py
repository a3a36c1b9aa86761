"""The run folder of a training: its files and run.json.

runs/<recipe>/<name>/
  config.yaml     the whole configuration
  run.json        status, parents with sha256, metrics, provenance
  metrics.csv     one line per log step
  samples/        clips and contact sheets of the training
  checkpoints/    to resume from (magihuman.training.checkpoint)
  export/         weights in the released layout
"""

import hashlib
import json
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
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version
from magihuman.io.text import load_json

FORMAT = "magihuman-run/1"


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
