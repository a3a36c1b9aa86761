"""Trainings in processes of their own, which a test may stop, and the comparison with one that ran through."""

import multiprocessing
import os
from pathlib import Path

import torch
import training_stub
from processes import assert_same, final_state

MORE = [
    "trainer.max_steps=12",
    "trainer.accumulate=2",
    "checkpoint.every_steps=3",
    "callbacks.validation.every_steps=4",
]


def _child(folder: str, shards: str, overrides: list[str], environment: dict[str, str]) -> None:
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    from magihuman import preemption

    os.environ.update(environment)
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # a real process learns it at import
    preemption.GRACE = float(environment.get("TEST_GRACE", preemption.GRACE))
    preemption.install()
    torch.set_num_threads(1)
    training_stub.train_here(Path(folder), Path(shards), overrides)


class Processes:
    """Trainings as the command makes them, on shards of three buckets with epochs of an odd number of batches."""

    def __init__(self, shards: Path) -> None:
        self.shards = shards
        self.context = multiprocessing.get_context("forkserver")

    def start(self, folder: Path, *overrides: str, **environment: str):
        arguments = (str(folder), str(self.shards), ["+recipe=pretrain", *MORE, *overrides], environment)
        process = self.context.Process(target=_child, args=arguments)
        process.start()
        return process

    def run(self, folder: Path, *overrides: str, **environment: str) -> int:
        process = self.start(folder, *overrides, **environment)
        process.join(300)
        assert process.exitcode is not None
        return process.exitcode


def assert_same_training(folder: Path, reference: Path) -> None:
    """The state, the export and the steps in metrics.csv are those of the reference."""
    mine, theirs = final_state(folder), final_state(reference)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "recipe", "LatentDataModule", "global_step"):
        assert_same(mine[part], theirs[part], part)
    assert any(key.startswith("ema.") for key in mine["state_dict"])
    exported = "export/model-00001-of-00001.safetensors"
    assert (folder / exported).read_bytes() == (reference / exported).read_bytes()
    assert steps_in(folder / "metrics.csv") == list(range(1, 13))


def steps_in(file: Path) -> list[int]:
    """The first column of a metrics.csv."""
    return [int(line.split(",")[0]) for line in file.read_text().splitlines()[1:]]
