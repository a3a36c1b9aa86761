"""A training that was stopped, anyhow and anywhere, ends as one that ran through."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
import training_stub
from one_process import MORE, Processes, assert_same_training
from processes import final_state

from magihuman.errors import UserError


@pytest.fixture(scope="module")
def processes(shards) -> Processes:
    return Processes(shards)


@pytest.fixture(scope="module")
def reference(processes, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "through"
    assert processes.run(folder) == 0
    return folder


KILL = "+callbacks.die={_target_: training_stub.DieAt, %s}"


@pytest.mark.parametrize(
    "overrides",
    [["batch: 5"], pytest.param(["batch: 8", "batch: 17", "batch: 23"], marks=pytest.mark.slow)],
    ids=["once", "three"],
)
def test_sigkill_between_and_inside_accumulations(processes, reference, tmp_path, overrides) -> None:
    folder = tmp_path / "killed"
    for override in overrides:
        assert processes.run(folder, KILL % override) == -signal.SIGKILL
    assert processes.run(folder) == 0
    assert_same_training(folder, reference)
    assert json.loads((folder / "run.json").read_text())["starts"] == len(overrides) + 1


@pytest.mark.slow
def test_sigkill_at_random_moments(processes, reference, tmp_path) -> None:
    folder = tmp_path / "killed"
    draw = torch.Generator().manual_seed(int(time.time()))
    for _ in range(3):
        process = processes.start(folder, KILL % "delay: 0.02")
        deadline = time.monotonic() + 300
        while not (folder / "metrics.csv").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(float(torch.rand((), generator=draw)) * 0.5)
        process.kill()
        process.join()
    assert processes.run(folder) == 0
    assert_same_training(folder, reference)


def test_sigkill_while_a_checkpoint_is_written(processes, reference, tmp_path) -> None:
    folder = tmp_path / "killed"
    assert processes.run(folder, KILL % "saving: 6") == -signal.SIGKILL
    checkpoints = folder / "checkpoints"
    assert (checkpoints / "step-00000006.ckpt.tmp").exists()  # half a file, under a name that nobody reads
    assert os.readlink(checkpoints / "last.ckpt") == "step-00000003.ckpt"
    assert processes.run(folder) == 0
    assert_same_training(folder, reference)
    assert not list(checkpoints.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_at_the_next_step_boundary_and_loses_nothing(processes, reference, tmp_path, number) -> None:
    folder = tmp_path / "stopped"
    process = processes.start(folder, KILL % "delay: 0.03")
    while not (folder / "metrics.csv").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join(300)
    assert process.exitcode == 75
    record = json.loads((folder / "run.json").read_text())
    assert record["status"] == "preempted"
    assert 1 <= record["steps"] < 12
    assert final_state(folder)["recipe"]["step"] == record["steps"]
    # What there is can be exported on the way, which changes nothing.
    assert processes.run(folder, f"trainer.max_steps={record['steps']}") == 0
    assert json.loads((folder / "export/config.json").read_text())["provenance"]["steps"] == record["steps"]
    assert processes.run(folder) == 0
    assert_same_training(folder, reference)
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"


def test_a_finished_run_is_left_alone_and_more_steps_continue_it(processes, reference, tmp_path) -> None:
    folder = tmp_path / "more"
    shutil.copytree(reference, folder, symlinks=True)
    before = (folder / "export/config.json").stat().st_mtime_ns
    assert processes.run(folder) == 0
    assert (folder / "export/config.json").stat().st_mtime_ns == before
    assert processes.run(folder, "resume=none") == 1  # never overwritten
    with pytest.raises(
        UserError, match=r"finished, with other settings \(optim.lr 0.002 then, 0.5 now\); give another"
    ):
        training_stub.train_here(folder, processes.shards, ["+recipe=pretrain", *MORE, "optim.lr=0.5"])
    assert processes.run(folder, "trainer.max_steps=14") == 0
    assert final_state(folder)["recipe"]["step"] == 14
    assert json.loads((folder / "run.json").read_text())["steps"] == 14


def test_only_the_newest_checkpoints_are_kept(reference) -> None:
    names = sorted(path.name for path in (reference / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000009.ckpt", "step-00000012.ckpt"]
