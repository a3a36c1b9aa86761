"""Asynchronous checkpoints of FSDP2: the training goes on meanwhile, and they are those that it would have waited for."""

import json
import os
import signal
import threading
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from processes import Launcher, assert_same, exported
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from magihuman.config import CheckpointSettings
from magihuman.training.checkpoint import Checkpointer

ASYNCHRONOUS = "checkpoint.asynchronous=true"
WRITER = "+callbacks.writer={_target_: training_stub.SlowWriter, %s}"
EVERY_TWO = "checkpoint.every_steps=2"
ALL = "checkpoint.keep=3"


@pytest.fixture(scope="module")
def world(shards) -> Launcher:
    return Launcher(shards)


@pytest.fixture(scope="module")
def waited(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "waited"
    assert world.run(folder, "fsdp2", 1, EVERY_TWO, ALL) == [0]
    return folder


def whole(checkpoint: Path, scratch: Path) -> dict:
    """All entries of a sharded checkpoint, and its other state."""
    dcp_to_torch_save(checkpoint, scratch)
    return {"entries": torch.load(scratch), "meta": torch.load(checkpoint / "meta.pt", weights_only=True)}


def last_link(checkpoints: Path) -> str:
    return os.readlink(checkpoints / "last.ckpt")


def last(folder: Path) -> str:
    return last_link(folder / "checkpoints")


def assert_same_checkpoint(folder: Path, reference: Path, name: str, scratch: Path) -> None:
    mine, theirs = (whole(run / "checkpoints" / name, scratch / "whole.pt") for run in (folder, reference))
    assert_same(mine["entries"], theirs["entries"])
    for part in ("recipe", "global_step", "LatentDataModule", "lr_schedulers"):
        assert_same(mine["meta"][part], theirs["meta"][part], part)


def test_the_training_goes_on_while_its_state_is_written(world, waited, tmp_path) -> None:
    folder = tmp_path / "run"
    # The write after step 2 goes on only when step 3 has ended: a training that waits for it would be 20 s late.
    assert world.run(folder, "fsdp2", 1, EVERY_TWO, ALL, ASYNCHRONOUS, WRITER % "until: 3") == [0]
    assert json.loads((folder / "writers-0.json").read_text()) == {"overtaken": [True, True, True], "most": 1}
    assert last(folder) == "step-00000005.ckpt"
    assert (folder / "checkpoints" / "step-00000004.ckpt" / ".metadata.crc32").exists()
    assert not list((folder / "checkpoints").glob("*.tmp"))
    for step in (2, 4, 5):  # the first was written after the weights had changed
        assert_same_checkpoint(folder, waited, f"step-{step:08d}.ckpt", tmp_path)
    assert_same(exported(folder), exported(waited))


def test_a_kill_during_a_write_leaves_the_checkpoint_before_it(world, waited, tmp_path) -> None:
    folder = tmp_path / "run"
    writer = WRITER % "until: 9"  # beyond the end
    die = "+callbacks.die={_target_: training_stub.DieAt, batch: 4}"
    assert world.run(folder, "fsdp2", 1, "trainer.max_steps=2", "optim.schedule=constant") == [0]
    assert world.run(folder, "fsdp2", 1, EVERY_TWO, "checkpoint.every_steps=3", ASYNCHRONOUS, writer, die) == [
        -signal.SIGKILL
    ]
    assert (folder / "checkpoints" / "step-00000003.ckpt.tmp").is_dir()
    assert last(folder) == "step-00000002.ckpt"


def test_a_write_that_fails_ends_the_training_with_its_reason(world, tmp_path) -> None:
    folder = tmp_path / "run"
    assert world.run(folder, "fsdp2", 1, EVERY_TWO, ASYNCHRONOUS, WRITER % "fails: true") == [1]
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "failed"
    assert "No space left on device" in record["error"]
    assert not list((folder / "checkpoints").iterdir())


def test_an_error_in_the_training_waits_for_the_write(tmp_path, capsys) -> None:
    for step, failure in ((1, None), (2, CheckpointException("full", {}))):
        checkpointer = Checkpointer(tmp_path, CheckpointSettings(1, None, 2, True))
        path, write = tmp_path / f"step-{step:08d}.ckpt", Future[None]()
        temporary = path.with_name(path.name + ".tmp")
        temporary.mkdir()
        (temporary / ".metadata").write_bytes(b"x")
        checkpointer._writing = write, temporary, path
        done = (write.set_exception, failure) if failure else (write.set_result, None)
        threading.Timer(0.2, done[0], [done[1]]).start()
        checkpointer.on_exception(None, None, RuntimeError("of the training"))  # type: ignore[arg-type]
        assert last_link(tmp_path) == "step-00000001.ckpt"
        assert not temporary.exists()
        assert ("the checkpoint that was being written is lost" in capsys.readouterr().out) == (failure is not None)


@pytest.mark.slow
def test_two_processes_write_and_continue_what_they_would_have_waited_for(world, tmp_path) -> None:
    waited, killed = tmp_path / "waited", tmp_path / "killed"
    assert world.run(waited, "fsdp2", 2, EVERY_TWO) == [0, 0]
    die = "+callbacks.die={_target_: training_stub.DieAt, batch: 4}"
    assert world.run(killed, "fsdp2", 2, EVERY_TWO, ASYNCHRONOUS, die)[0] == -signal.SIGKILL
    assert last(killed) == "step-00000002.ckpt"
    assert world.run(killed, "fsdp2", 2, EVERY_TWO, ASYNCHRONOUS, WRITER % "until: 5") == [0, 0]
    for name in ("step-00000004.ckpt", "step-00000005.ckpt"):
        assert_same_checkpoint(killed, waited, name, tmp_path)
    assert_same(exported(killed), exported(waited))
