"""`resume=`: a start elsewhere, and branches of a run at an older checkpoint."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from one_process import Processes, steps_in
from processes import assert_same, final_state

from magihuman.errors import UserError
from magihuman.training import branch
from magihuman.training.checkpoint import complete
from magihuman.training.runs import RunFolder


def make_run(folder: Path) -> RunFolder:
    """What a finished run of 12 steps leaves."""
    run = RunFolder(folder)
    for part in ("checkpoints", "samples", "export", "eval", "wandb"):
        (folder / part).mkdir(parents=True)
    for step in (3, 6, 9, 12):
        torch.save({}, run.checkpoints / f"step-{step:08d}.ckpt")
        (run.samples / f"step-{step:08d}").mkdir()
        (run.samples / f"step-{step:08d}.png").touch()
    (run.checkpoints / "last.ckpt").symlink_to("step-00000012.ckpt")
    for file in ("export/config.json", "eval/scores.json", "report.md", "config.yaml", "config-1.yaml", "wandb/x"):
        (folder / file).write_text(file)
    (folder / "metrics.csv").write_text("step,loss\n" + "".join(f"{n},0.5\n" for n in range(1, 13)))
    run.update(status="finished", steps=12, results={"eval": {}}, evaluated={"eval": {}}, wandb="old", created="then")
    return run


def rates(file: Path) -> list[float]:
    """The learning rates in a metrics.csv."""
    with file.open(newline="") as stream:
        return [float(row["lr"]) for row in csv.DictReader(stream)]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def assert_branched(run: RunFolder) -> None:
    """At step 6, once."""
    assert files(run.path) == {
        "run.json", "config.yaml", "config-1.yaml", "metrics.csv", "wandb/x", "checkpoints/last.ckpt",
        *(f"checkpoints/step-{step:08d}.ckpt" for step in (3, 6)), *(f"samples/step-{step:08d}.png" for step in (3, 6)),
        *(f"branch-1/checkpoints/step-{step:08d}.ckpt" for step in (9, 12)),
        *(f"branch-1/samples/step-{step:08d}.png" for step in (9, 12)),
        *(f"branch-1/{name}" for name in ("export/config.json", "eval/scores.json", "report.md")),
        *(f"branch-1/{name}" for name in ("run.json", "config.yaml", "metrics.csv")),
    }  # fmt: skip
    assert os.readlink(run.checkpoints / "last.ckpt") == "step-00000006.ckpt"
    assert steps_in(run.path / "metrics.csv") == [1, 2, 3, 4, 5, 6]
    assert steps_in(run.path / "branch-1/metrics.csv") == [7, 8, 9, 10, 11, 12]
    old = RunFolder(run.path / "branch-1").read()
    assert (old["status"], old["steps"], old["wandb"]) == ("finished", 12, "old")
    record = run.read()
    assert not {"steps", "results", "evaluated", "wandb"} & record.keys()
    assert record["created"] == "then"
    (entry,) = record["branches"]
    assert (entry["folder"], entry["checkpoint"], entry["step"]) == ("branch-1", "step-00000006.ckpt", 6)
    assert entry["complete"]
    assert entry["command"][:3] == ["python", "-m", "magihuman.train"]


def test_a_branch_moves_what_came_after_it_and_deletes_nothing(tmp_path, capsys) -> None:
    run = make_run(tmp_path / "run")
    before = {name: (run.path / name).read_bytes() for name in files(run.path) if "step-" in name}
    start = str(run.checkpoints / "step-00000006.ckpt")
    assert branch.is_new_branch(start, run)
    chosen = branch.find_start(start, run)
    branch.begin(run, chosen)
    assert "a new branch of" in capsys.readouterr().out
    assert_branched(run)
    for name, content in before.items():
        assert content in [
            (folder / name).read_bytes() for folder in (run.path, run.path / "branch-1") if (folder / name).exists()
        ]
    # The same command continues it; another checkpoint begins the next.
    torch.save({}, run.checkpoints / "step-00000009.ckpt")
    (run.checkpoints / "last.ckpt").unlink()
    assert not branch.is_new_branch(start, run)
    assert branch.find_start(start, run).name == "step-00000009.ckpt"
    (run.checkpoints / "step-00000006.ckpt").unlink()  # only the newest are kept
    assert branch.find_start(start, run).name == "step-00000009.ckpt"
    second = str(run.checkpoints / "step-00000003.ckpt")
    assert branch.is_new_branch(second, run)
    branch.begin(run, branch.find_start(second, run))
    assert [entry["folder"] for entry in run.read()["branches"]] == ["branch-1", "branch-2"]
    assert (run.path / "branch-2/checkpoints/step-00000009.ckpt").exists()
    with pytest.raises(UserError, match="no checkpoint there"):
        branch.find_start(start, run)


@pytest.mark.parametrize("moves", range(9))
def test_a_branch_that_was_killed_while_moving_is_completed(tmp_path, monkeypatch, moves) -> None:
    run, done, move = make_run(tmp_path / "run"), [], shutil.move

    def die(*arguments: object) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        done.append(move(*arguments))

    start = str(run.checkpoints / "step-00000006.ckpt")
    chosen = branch.find_start(start, run)
    monkeypatch.setattr(shutil, "move", die)
    with pytest.raises(KeyboardInterrupt):
        branch.begin(run, chosen)
    monkeypatch.setattr(shutil, "move", move)
    assert branch.is_new_branch(start, run)
    # Every process of a job finds the same start, whenever it looks.
    assert branch.find_start(start, run).name == "step-00000006.ckpt"
    branch.begin(run, branch.find_start(start, run))
    assert_branched(run)


def test_what_is_no_new_branch(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    other = make_run(tmp_path / "other")
    last, newest = run.checkpoints / "last.ckpt", run.checkpoints / "step-00000012.ckpt"
    for resume in (
        "auto",
        "none",
        str(run.path),
        str(last),
        str(newest),
        str(other.checkpoints / "step-00000003.ckpt"),
    ):
        assert not branch.is_new_branch(resume, run), resume
    for resume in ("auto", str(run.path), str(last), str(newest)):
        assert branch.find_start(resume, run).name == "step-00000012.ckpt"


def test_a_start_elsewhere_counts_until_there_are_own_checkpoints(tmp_path, capsys) -> None:
    run, other = RunFolder(tmp_path / "run"), make_run(tmp_path / "other")
    start = str(other.checkpoints / "step-00000003.ckpt")
    assert branch.find_start(start, run).parent == other.checkpoints
    run.checkpoints.mkdir(parents=True)
    torch.save({}, run.checkpoints / "step-00000005.ckpt")
    assert branch.find_start(start, run) == run.checkpoints / "step-00000005.ckpt"
    assert "continues from its own checkpoints" in capsys.readouterr().out


@pytest.mark.slow
def test_a_branch_ends_as_a_run_that_starts_from_its_checkpoint_and_survives_kills(shards, tmp_path) -> None:
    processes, kill = Processes(shards), "+callbacks.die={_target_: training_stub.DieAt, batch: %d}"
    run, other = tmp_path / "run", tmp_path / "other"
    assert processes.run(run) == 0
    shutil.copytree(run, tmp_path / "before", symlinks=True)
    changed = ["optim.lr=1e-4", f"resume={run}/checkpoints/step-00000009.ckpt", "checkpoint.every_steps=1"]
    assert processes.run(other, *changed) == 0
    for batch in (18, 20, 22):  # two batches a step: at once, after step 10, after step 11
        assert processes.run(run, *changed, kill % batch) == -9
    assert processes.run(run, *changed) == 0
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["steps"], len(record["branches"]), record["starts"]) == ("finished", 12, 1, 5)
    for part in ("state_dict", "optimizer_states", "recipe", "LatentDataModule"):
        assert_same(final_state(run)[part], final_state(other)[part], part)
    assert steps_in(run / "metrics.csv") == list(range(1, 13))
    assert steps_in(other / "metrics.csv") == [10, 11, 12]
    assert steps_in(run / "branch-1/metrics.csv") == [10, 11, 12]
    assert 0 < rates(run / "metrics.csv")[9] < 1e-4 < rates(run / "branch-1/metrics.csv")[0]  # cosine, at the same step
    weights = "model-00001-of-00001.safetensors"
    assert (run / "branch-1/export" / weights).read_bytes() == (tmp_path / "before/export" / weights).read_bytes()
    assert (run / "export" / weights).read_bytes() != (tmp_path / "before/export" / weights).read_bytes()
    assert [path.name for path in complete(run / "branch-1/checkpoints")] == ["step-00000012.ckpt"]
    assert processes.run(run, *changed) == 0  # finished, and no second branch
    assert json.loads((run / "run.json").read_text())["starts"] == 5
    # `resume=` is a start: the run that has its own checkpoints goes on from them.
    assert processes.run(other, *changed, "trainer.max_steps=13") == 0
    assert steps_in(other / "metrics.csv") == [10, 11, 12, 13]
