"""Checkpoints of the three layouts: what would be executed is refused, and damage is found and named."""

import errno
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from magihuman.errors import UserError
from magihuman.training.checkpoint import LAST, check_shares, find_resume, newest_first, point_to, require_same_training
from magihuman.training.checkpoint_check import (
    METADATA,
    METADATA_CRC,
    DamagedError,
    check,
    check_data,
    write_metadata_checksum,
)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.file),)


def one_file(path: Path, also: object = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": {"w": torch.arange(4096.0)}, "recipe": {"step": 3, "also": also}}, path)
    return path


def sharded(path: Path, also: object = 0) -> Path:
    state = {"state_dict": {"w": torch.arange(4096.0)}, "optimizer_0": {"lr": 0.1, "also": also}}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    torch.save({"recipe": {"step": 3}}, path / "meta.pt")
    write_metadata_checksum(path)
    return path


def deepspeed(path: Path, also: object = 0) -> Path:
    folder = path / "checkpoint"
    folder.mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    torch.save({"module": {"w": torch.arange(4096.0)}, "also": also}, folder / "mp_rank_00_model_states.pt")
    for rank in range(2):
        states = {"optimizer_state_dict": torch.arange(4096.0)}
        torch.save(states, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return path


LAYOUTS = [one_file, sharded, deepspeed]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda function: function.__name__)


def largest(checkpoint: Path) -> Path:
    """The file with the tensors."""
    files = [checkpoint] if checkpoint.is_file() else [f for f in checkpoint.rglob("*") if f.is_file()]
    return max(files, key=lambda file: file.stat().st_size)


def flip(file: Path, at: float = 0.5) -> None:
    """Invert eight bytes."""
    data = bytearray(file.read_bytes())
    start = int(len(data) * at)
    data[start : start + 8] = bytes(255 - b for b in data[start : start + 8])
    file.write_bytes(data)


# -- nothing is executed


@layouts
def test_an_object_that_runs_code_is_refused_and_not_run(layout, tmp_path: Path) -> None:
    checkpoint = layout(tmp_path / "run/checkpoints/step-00000003.ckpt", Payload(tmp_path / "ran"))
    for resume in ("auto", str(checkpoint), str(tmp_path / "run")):
        with pytest.raises(UserError, match=r"mkdir.*nothing of it was run"):
            find_resume(resume, checkpoint.parent)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_metadata_of_a_sharded_checkpoint_is_read_without_executing_it(tmp_path: Path, protocol: int) -> None:
    checkpoint = sharded(tmp_path / "step-00000003.ckpt")
    (checkpoint / METADATA).write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=protocol))
    write_metadata_checksum(checkpoint)
    with pytest.raises(UserError, match="mkdir"):
        find_resume("auto", tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_a_checkpoint_names_no_file_outside_of_itself(tmp_path: Path, name: str) -> None:
    shards, zero = sharded(tmp_path / "a" / "step-00000003.ckpt"), deepspeed(tmp_path / "b" / "step-00000003.ckpt")
    metadata = pickle.loads((shards / METADATA).read_bytes())
    for place in metadata.storage_data.values():
        object.__setattr__(place, "relative_path", name)
    (shards / METADATA).write_bytes(pickle.dumps(metadata))
    write_metadata_checksum(shards)
    with pytest.raises(UserError, match="outside of the checkpoint"):
        check(shards)
    shutil.copytree(zero / "checkpoint", tmp_path / "b" / "secret")
    (zero / "latest").write_text(name)
    with pytest.raises(DamagedError, match="not in the checkpoint"):
        check(zero)


# -- damage is found


@layouts
def test_an_intact_checkpoint_passes(layout, tmp_path: Path) -> None:
    checkpoint = layout(tmp_path / "step-00000003.ckpt")
    check(checkpoint)
    for rank in range(3):
        check_data(checkpoint, rank, 3)
    assert find_resume("auto", tmp_path) == checkpoint


@layouts
def test_flipped_bytes_of_a_tensor_are_found(layout, tmp_path: Path) -> None:
    checkpoint = layout(tmp_path / "step-00000003.ckpt")
    flip(largest(checkpoint))
    found = 0
    for rank in range(2):
        try:
            check_data(checkpoint, rank, 2)
        except DamagedError as error:
            assert "damaged" in str(error)  # noqa: PT017 (one of two processes)
            found += 1
    assert found == 1
    with pytest.raises(UserError, match=r"step-00000003.ckpt is damaged .*no other checkpoint"):
        check_shares(checkpoint, 0, 1)


def test_flipped_bytes_of_metadata_are_found(tmp_path: Path) -> None:
    checkpoint = sharded(tmp_path / "step-00000003.ckpt")
    assert (checkpoint / METADATA_CRC).is_file()
    for at in (0.1, 0.5, 0.9):
        whole = (checkpoint / METADATA).read_bytes()
        flip(checkpoint / METADATA, at)
        with pytest.raises(DamagedError, match=r"checksum of .metadata differs"):
            check(checkpoint)
        (checkpoint / METADATA).write_bytes(whole)


@layouts
@pytest.mark.parametrize("kind", ["empty", "truncated", "not a checkpoint"])
def test_auto_resume_takes_the_intact_checkpoint_before_a_damaged_one(layout, kind, tmp_path: Path, capsys) -> None:
    older, newer = (layout(tmp_path / f"step-{step:08d}.ckpt") for step in (3, 6))
    point_to(tmp_path, newer)
    file = largest(newer)
    file.write_bytes({"empty": b"", "truncated": file.read_bytes()[:-100], "not a checkpoint": b"hello"}[kind])
    with pytest.raises(UserError, match=rf"step-00000006.ckpt is damaged .*intact one is resume={older}"):
        find_resume(str(newer), tmp_path)
    assert find_resume("auto", tmp_path) == older
    line = capsys.readouterr().out
    assert line.startswith("note: step-00000006.ckpt is damaged")
    assert line.count("\n") == 1
    assert (tmp_path / "step-00000006.ckpt.damaged").exists()  # nothing is deleted
    assert newest_first(tmp_path) == [older]


@layouts
def test_every_checkpoint_damaged_is_no_new_training(layout, tmp_path: Path) -> None:
    checkpoint = layout(tmp_path / "step-00000003.ckpt")
    largest(checkpoint).write_bytes(b"")
    for _ in range(2):  # they stay, so that the second start does not begin anew
        with pytest.raises(UserError, match=r"all 1 checkpoints in .* are damaged"):
            find_resume("auto", tmp_path)


@layouts
@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO, errno.ESTALE, errno.EACCES])
def test_an_error_of_the_machine_is_no_damage(layout, number, tmp_path: Path, monkeypatch) -> None:
    checkpoint = layout(tmp_path / "step-00000003.ckpt")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", refuse)
        with pytest.raises(UserError, match=f"cannot be read .{os.strerror(number)}.; nothing is changed"):
            find_resume("auto", tmp_path)
    assert find_resume("auto", tmp_path) == checkpoint


def test_a_folder_without_some_of_its_files_is_damaged(tmp_path: Path) -> None:
    for number, (layout, missing) in enumerate(
        [
            (sharded, "__0_0.distcp"),
            (sharded, "meta.pt"),
            (sharded, METADATA),
            (deepspeed, "latest"),
            (deepspeed, "checkpoint/mp_rank_00_model_states.pt"),
            (deepspeed, "checkpoint/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
        ]
    ):
        checkpoint = layout(tmp_path / str(number) / "step-00000003.ckpt")
        (checkpoint / missing).unlink()
        with pytest.raises(DamagedError):
            check(checkpoint)


def test_deepspeed_on_another_number_of_processes_is_refused_in_a_line(tmp_path: Path) -> None:
    checkpoint = deepspeed(tmp_path / "checkpoints" / "step-00000003.ckpt")
    node = {"trainer": {"devices": 2, "nodes": 2}}
    with pytest.raises(UserError, match=r"saved by 2 processes .*trainer.devices \* trainer.nodes to 2"):
        require_same_training(checkpoint, node)
    require_same_training(checkpoint, {"trainer": {"devices": 2, "nodes": 1}})


# -- disks without symbolic links, and copies


def test_without_symbolic_links_the_newest_checkpoint_is_found(tmp_path: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    older, newer = (one_file(tmp_path / f"step-{step:08d}.ckpt") for step in (3, 6))
    point_to(tmp_path, older)
    monkeypatch.setattr(Path, "symlink_to", refused)
    monkeypatch.setattr(os, "symlink", refused)
    point_to(tmp_path, newer)
    assert not (tmp_path / LAST).is_symlink()  # an old link would be wrong
    assert find_resume("auto", tmp_path) == newer
    assert sorted(path.name for path in tmp_path.iterdir()) == [older.name, newer.name]


@layouts
def test_a_copy_of_a_run_folder_may_have_followed_the_link(layout, tmp_path: Path) -> None:
    """As `cp -rL`, zip files and clouds do."""
    run = tmp_path / "run"
    checkpoint = layout(run / "checkpoints" / "step-00000003.ckpt")
    point_to(checkpoint.parent, checkpoint)
    shutil.copytree(run, tmp_path / "copy", symlinks=False)
    copied = tmp_path / "copy" / "checkpoints"
    assert not (copied / LAST).is_symlink()
    for resume in ("auto", str(tmp_path / "copy")):
        assert find_resume(resume, copied) == copied / checkpoint.name
    point_to(copied, copied / checkpoint.name)
    assert os.readlink(copied / LAST) == checkpoint.name


def test_last_names_the_checkpoint_even_if_another_has_a_later_step(tmp_path: Path) -> None:
    branch, abandoned = (one_file(tmp_path / f"step-{step:08d}.ckpt") for step in (4, 9))
    point_to(tmp_path, branch)
    assert newest_first(tmp_path) == [branch, abandoned]
    assert find_resume("auto", tmp_path) == branch
