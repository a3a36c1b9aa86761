"""Checkpoints that a resumed run continues from, bit by bit, and preemption by a signal.

    checkpoints/step-00000100.ckpt   complete state: a file, or a folder for sharded strategies
    checkpoints/last.ckpt            link to the newest complete one, where the disk has symbolic links

A checkpoint is written under a temporary name and renamed when it is complete, and only then the link moves, so a
kill at any moment leaves the previous one valid. Checkpoints are saved at step boundaries only:
in the middle of an accumulation the gradients would be lost. Before one is read, `magihuman.training.checkpoint_check`
looks for damage.

A signal that comes while the training steps sets a flag (`magihuman.preemption`); the next step boundary saves and stops, and
`magihuman.train` then requeues the Slurm job. Lightning's own handlers are switched off (`magihuman.training.parallel.plugins`,
`Session`): they save or communicate inside the signal, in the middle of a step, which loses one batch of the data.
"""

import os
import shutil
import signal
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed.checkpoint.api import CheckpointException

from magihuman import preemption
from magihuman.config import CheckpointSettings
from magihuman.errors import UserError
from magihuman.io.files import atomic_path, replace
from magihuman.schema import locate, one_line
from magihuman.training.callbacks import spent
from magihuman.training.checkpoint_check import DamagedError, check, check_data, write_metadata_checksum, zero_processes

LAST = "last.ckpt"


def remove(path: Path) -> None:
    """Delete a checkpoint, file or folder."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*.ckpt") if path.stem.removeprefix("step-").isdigit())


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name.

    Raises:
        UserError: for a file name of another form.
    """
    digits = checkpoint.stem.removeprefix("step-")
    if not digits.isdigit():
        raise UserError(f"{checkpoint.name} is not named step-NNNNNNNN.ckpt; resume from a checkpoint of a run folder")
    return int(digits)


def point_to(folder: Path, target: Path) -> None:
    """Make `last.ckpt` a link to `target`, atomically; without it, where the disk has no symbolic links."""
    last = folder / LAST
    try:
        if not last.is_symlink():
            remove(last)  # a copy of the run folder has made a file or folder of the link
        with atomic_path(last) as link:
            link.symlink_to(target.name)
    except OSError:
        with suppress(OSError):
            remove(last)  # the newest checkpoint is found by its name, and a link to another would be wrong


def newest_first(folder: Path) -> list[Path]:
    """Complete checkpoints: the one that `last.ckpt` names, then the others from the newest on."""
    last, found = folder / LAST, complete(folder)[::-1]
    linked = os.readlink(last) if last.is_symlink() else None
    return sorted(found, key=lambda path: path.name != linked)


def find_resume(resume: str, checkpoints: Path) -> Path | None:
    """The checkpoint to resume from, or None for a new training.

    Args:
        resume: `auto` takes the folder's newest complete checkpoint if there is one, and a damaged one is moved aside for
            an intact one before it; `none` starts anew; anything else is a path to a checkpoint or a run folder.
        checkpoints: of the run folder.

    Raises:
        UserError: the path holds no checkpoint, or a damaged one; every checkpoint of the folder is damaged; or one holds
            something that would be executed.
    """
    if resume == "none":
        return None
    if resume == "auto":
        damaged: list[tuple[Path, DamagedError]] = []
        for path in newest_first(checkpoints):
            try:
                check(path)
            except DamagedError as error:
                damaged.append((path, error))
            else:
                for each in damaged:
                    _move_aside(*each)
                return path.resolve()
        if damaged:  # they stay where they are, or the next start would find none and begin anew
            raise UserError(
                f"all {len(damaged)} checkpoints in {checkpoints} are damaged ({damaged[0][1]}); give another name= (and init= "
                "to start from exported weights), or resume= with a checkpoint elsewhere"
            )
        return None
    path = Path(os.path.expanduser(resume))
    if (path / "checkpoints").is_dir():
        path = next(iter(newest_first(path / "checkpoints")), path / "checkpoints")
    if not resume or not path.exists() or path.resolve().suffix != ".ckpt":
        raise UserError(f"resume={resume}: no checkpoint there; give a .ckpt, a run folder, `auto` or `none`")
    path = path.resolve()
    try:
        check(path)
    except DamagedError as error:
        raise UserError(f"resume={resume}: {path.name} is damaged ({error}); {_intact_before(path)}") from error
    return path


@rank_zero_only
def _move_aside(path: Path, error: DamagedError) -> None:
    """Rename a damaged checkpoint, so that it is neither read nor counted, and say so."""
    kept = path.with_name(f"{path.name}.damaged")
    with suppress(OSError):
        replace(path, kept)
    print(f"note: {path.name} is damaged ({error}); it is now {kept.name}, the one before it is used", flush=True)


def _intact_before(damaged: Path) -> str:
    """The remedy for a damaged checkpoint: the newest of its folder that is not."""
    for path in complete(damaged.parent)[::-1]:
        if path != damaged:
            with suppress(DamagedError):
                check(path)
                return f"the newest intact one is resume={path}"
    return "no other checkpoint there is intact"


def check_shares(checkpoint: Path, rank: int, processes: int) -> None:
    """Compare the checksums of a checkpoint's tensors; every process reads its share.

    Raises:
        UserError: on every process, naming what is damaged and the newest intact checkpoint.
    """
    problems: list[str | None] = [None] * processes
    try:
        check_data(checkpoint, rank, processes)
    except DamagedError as error:
        problems[rank] = str(error)
    if torch.distributed.is_initialized():
        torch.distributed.all_gather_object(problems, problems[rank])
    found = [problem for problem in problems if problem is not None]
    if found:
        raise UserError(f"{checkpoint} is damaged ({found[0]}); move it away; {_intact_before(checkpoint)}")


FIXED = (
    "recipe._target_",
    "model.dit",
    "model.pack",
    "optim.algorithm",
    "strategy.name",
    "seed",
    "data.module._target_",
    "data.module.batch_size",
)
"""Settings that no resumed training may change; a recipe adds its own (`Recipe.fixed_on_resume`)."""


def require_same_training(checkpoint: Path, node: Mapping[str, Any]) -> None:
    """Raise unless a checkpoint was saved by a training of the same network, optimiser and recipe.

    Args:
        node: the present configuration; the checkpoint's is the config.yaml of its run folder, where there is one.

    Raises:
        UserError: naming what differs.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    wrote, now = zero_processes(checkpoint), node["trainer"]["devices"] * node["trainer"]["nodes"]
    if wrote not in (None, now):
        raise UserError(
            f"{checkpoint.name} was saved by {wrote} processes and DeepSpeed cannot divide it among {now}; set "
            f"trainer.devices * trainer.nodes to {wrote}, or give another name= and init= with exported weights"
        )
    file = checkpoint.parent.parent / "config.yaml"
    if not file.exists():
        return
    then = yaml.safe_load(file.read_text())
    with suppress(
        OmegaConfBaseException
    ):  # an interpolation of what is no longer there, such as an environment variable
        then = OmegaConf.to_container(OmegaConf.create(then), resolve=True)
    recipe = locate(node["recipe"]["_target_"], "recipe")
    for path in (*FIXED, *(f"recipe.{name}" for name in getattr(recipe, "fixed_on_resume", ()))):
        old, new = _entry(then, path), _entry(node, path)
        if isinstance(old, str):
            old = getattr(recipe, "renamed_values", {}).get(old, old)
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
    """Lightning plugin that writes a one-file checkpoint and syncs it to the disk before it returns."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with Path(path).open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Read it to the CPU, said by name: Lightning's function for that cannot read 8-bit moments."""
        return super().load_checkpoint(path, map_location, weights_only)


class Checkpointer(L.Callback):
    """Saves checkpoints every so many steps or minutes, on demand and at the end; keeps the newest ones.

    Args:
        folder: `checkpoints/` of the run.
        settings: intervals and number kept.
    """

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self.folder = folder
        self.settings = settings
        self._saved_at = -1
        self._clock = time.monotonic()
        self._writing: tuple[Future[Any], Path, Path] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_at = trainer.global_step if trainer.ckpt_path else -1
        self._clock = time.monotonic()
        if trainer.is_global_zero:  # left behind by a kill during saving
            for leftover in (*self.folder.glob("*.tmp"), *self.folder.glob(".*.part")):
                remove(leftover)

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not recipe.stepped:
            return
        if self._writing is not None and self._writing[0].done():
            self.wait()
        due = self.settings.every_steps > 0 and recipe.step % self.settings.every_steps == 0
        if self.settings.every_minutes is not None:
            late = time.monotonic() - self._clock > 60 * self.settings.every_minutes
            due = due or bool(trainer.strategy.broadcast(late))
        if due or trainer.should_stop:
            with spent(recipe, "checkpoint"):
                self.save(trainer, recipe)

    def save(self, trainer: L.Trainer, recipe: Any) -> Path:
        """Save now (on all processes); returns the checkpoint's path. Once per step.

        Where the strategy writes asynchronously the file has that name only later, when it is complete: after `wait`, at
        one of the next steps, or at the end of the training.
        """
        step = recipe.step
        path = self.folder / f"step-{step:08d}.ckpt"
        if step == self._saved_at:
            return path
        self.wait()  # at most one is written at a time
        temporary = path.with_name(path.name + ".tmp")  # one name for all ranks
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove(temporary)
        trainer.strategy.barrier()
        try:
            trainer.save_checkpoint(temporary)  # ends with a barrier
        except BaseException:
            self._discard(temporary)
            raise
        write: Future[Any] | None = getattr(trainer.strategy, "writing", None)
        if write is None:
            self._publish(temporary, path)
        else:
            self._writing = write, temporary, path
        trainer.strategy.barrier()
        self._saved_at = step
        self._clock = time.monotonic()
        return path

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete, and give it its name.

        Raises:
            Exception: what went wrong in writing it; the checkpoint before it is kept.
        """
        if self._writing is None:
            return
        (write, temporary, path), self._writing = self._writing, None
        try:
            write.result()
        except BaseException:
            self._discard(temporary)
            raise
        self._publish(temporary, path)

    @rank_zero_only
    def _publish(self, temporary: Path, path: Path) -> None:
        write_metadata_checksum(temporary)
        replace(temporary, path)
        point_to(self.folder, path)
        # Later ones are of a training that went on from here before, and not this one's to remove.
        earlier = [each for each in complete(self.folder) if step_of(each) <= step_of(path)]
        for old in earlier[: -self.settings.keep]:
            remove(old)

    @rank_zero_only
    def _discard(self, temporary: Path) -> None:
        """Remove an incomplete checkpoint: on a full disk the run's record needs the space."""
        with suppress(OSError):
            remove(temporary)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.wait()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Complete a checkpoint that is being written; the error that ends the training is the one to show."""
        try:
            self.wait()
        except (Exception, CheckpointException) as error:
            print(f"note: the checkpoint that was being written is lost ({one_line(str(error))})", flush=True)


class Preemption(L.Callback):
    """Stops at the next step boundary after SIGUSR1 or SIGTERM.

    Attributes:
        received: name of the received signal, or None.
        stopped_at: step at which it stopped the training, or None.
    """

    def __init__(self, checkpointer: Checkpointer) -> None:
        self.checkpointer = checkpointer
        self.received: str | None = None
        self.stopped_at: int | None = None
        self._steps = ExitStack()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps.enter_context(preemption.deferred(self._note))

    def _note(self, number: int) -> None:
        self.received = signal.Signals(number).name
        preemption.say_raw(f"{self.received}: saving and stopping at the end of this step")

    def on_train_batch_end(self, trainer: L.Trainer, recipe: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not recipe.stepped:
            return
        stop = self.received is not None
        # A scheduler may signal some processes only, and all must stop at one step.
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop and self.stopped_at is None:
            self.received = self.received or "a signal to another process"
            self.checkpointer.save(trainer, recipe)
            self.stopped_at = recipe.step
            trainer.should_stop = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._steps.close()
