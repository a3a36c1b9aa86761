"""Checkpoints that a resumed run continues from, bit by bit.

    checkpoints/step-00000100.ckpt   complete state: a file, or a folder for sharded strategies
    checkpoints/last.ckpt            link to the newest complete one

A checkpoint is written under a temporary name and renamed when it is whole, and the link moves only after
that, so a kill at any moment leaves the previous one in force. Checkpoints are saved at step boundaries only:
in the middle of an accumulation the gradients would be lost.
"""

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from magihuman.config import CheckpointSettings
from magihuman.errors import UserError
from magihuman.io.files import atomic_path, replace

LAST = "last.ckpt"


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*.ckpt"))


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name.

    Raises:
        UserError: for a file that this program did not name.
    """
    digits = checkpoint.stem.removeprefix("step-")
    if not digits.isdigit():
        raise UserError(
            f"{checkpoint.name} is not named step-NNNNNNNN.ckpt; resume from a checkpoint of a run folder"
        )
    return int(digits)


def point_to(folder: Path, target: Path) -> None:
    """Make `last.ckpt` name `target`, in one step."""
    with atomic_path(folder / LAST) as link:
        link.symlink_to(target.name)


def find_resume(resume: str, checkpoints: Path) -> Path | None:
    """The checkpoint that a run starts from.

    Args:
        resume: `auto` takes the folder's newest complete checkpoint if there is one, `none` starts anew,
            anything else is a path to a checkpoint or a run folder.
        checkpoints: of the run folder.

    Raises:
        UserError: when a given path holds no checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        last = checkpoints / LAST
        if last.exists():
            return last.resolve()
        found = complete(checkpoints)
        return found[-1] if found else None
    path = Path(resume)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / LAST
    if not path.exists():
        raise UserError(f"resume={resume}: no checkpoint there; give a .ckpt, a run folder, `auto` or `none`")
    return path.resolve()


def require_same_training(checkpoint: Path, node: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint was saved by a training of the same network, optimiser and recipe.

    Args:
        node: the configuration of now; the checkpoint's is the config.yaml of its run folder, where there is one.

    Raises:
        UserError: naming what differs.
    """
    import yaml

    file = checkpoint.parent.parent / "config.yaml"
    if not file.exists():
        return
    then = yaml.safe_load(file.read_text())
    for path in (
        "recipe._target_",
        "model.dit",
        "model.pack",
        "recipe.lora",
        "recipe.networks",
        "recipe.gan.taps",
        "optim.algorithm",
        "strategy.name",
        "seed",
        "data.module.batch_size",
    ):
        old, new = _entry(then, path), _entry(node, path)
        # Single and ddp read each other's files; the others shard in their own ways.
        if path == "strategy.name":
            old, new = ("files" if name in ("single", "ddp") else name for name in (old, new))
        if old != new:
            what = ""
            if isinstance(old, dict) and isinstance(new, dict):
                wrong = [f"{k} {old.get(k)} then, {new.get(k)} now" for k in new if old.get(k) != new.get(k)]
                what = f" ({'; '.join(wrong)})"
            raise UserError(
                f"{checkpoint.name} was saved with another {path}{what or f' ({old} then, {new} now)'}; continue with "
                "the settings of its config.yaml, or give another name= (and init= to start from its weights)"
            )


def _entry(node: Any, path: str) -> Any:
    for key in path.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


class SyncedFiles(TorchCheckpointIO):
    """Writes a one-file checkpoint straight to the disk; it is there when the call returns."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with Path(path).open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())


class Checkpointer(L.Callback):
    """Saves every so many steps or minutes, when asked to, and at the end; keeps the newest few.

    Args:
        folder: `checkpoints/` of the run.
        settings: intervals and number kept.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._saved_at = -1
        self._clock = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step if trainer.ckpt_path else -1
        self._clock = time.monotonic()
        if trainer.is_global_zero:  # what a kill during saving left behind
            for leftover in (*self.folder.glob("*.tmp"), *self.folder.glob(".*.part")):
                remove(leftover)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not pl_module.stepped:
            return
        step = self._step(pl_module)
        due = self.settings.every_steps > 0 and step % self.settings.every_steps == 0
        if self.settings.every_minutes is not None:
            late = time.monotonic() - self._clock > 60 * self.settings.every_minutes
            due = due or bool(trainer.strategy.broadcast(late))
        if due or trainer.should_stop:
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Path:
        """Save now (on all processes); returns the checkpoint's path. Once per step."""
        step = self._step(pl_module)
        path = self.folder / f"step-{step:08d}.ckpt"
        if step == self._saved_at:
            return path
        temporary = path.with_name(path.name + ".tmp")  # one name for all ranks
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(temporary)
        trainer.strategy.barrier()
        trainer.save_checkpoint(temporary)  # ends with a barrier
        if trainer.is_global_zero:
            replace(temporary, path)
            point_to(self.folder, path)
            for old in complete(self.folder)[: -self.settings.keep]:
                remove(old)
        trainer.strategy.barrier()
        self._saved_at = step
        self._clock = time.monotonic()
        return path

    @staticmethod
    def _step(pl_module: L.LightningModule) -> int:
        return int(pl_module.step)  # type: ignore[arg-type]
