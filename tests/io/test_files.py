"""Atomic and locked files: complete or absent after errors, folders replaced, one process at a time."""

import errno
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from magihuman.errors import UserError
from magihuman.io import files
from magihuman.io.files import atomic_path, disk_problem, locked, replace, require_writable, staged, write_atomically


def _fail_halfway(target: Path, folder: bool) -> None:
    with atomic_path(target, folder=folder) as partial:
        (partial / "half.txt" if folder else partial).write_text("half")
        raise ZeroDivisionError


def test_an_atomic_file_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_atomically(target, "old")
    with atomic_path(target, sync=True) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
        assert partial.parent == target.parent
    assert target.read_text() == "new"
    with pytest.raises(ZeroDivisionError):
        _fail_halfway(target, folder=False)
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_block_that_makes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        pass


@pytest.mark.parametrize("there", ["nothing", "file", "folder"])
def test_an_atomic_folder_replaces_what_is_there(tmp_path: Path, there: str) -> None:
    target = tmp_path / "deep" / "folder"
    if there == "file":
        target.parent.mkdir()
        target.write_text("old")
    elif there == "folder":
        target.mkdir(parents=True)
        (target / "old.txt").touch()
    with atomic_path(target, folder=True) as partial:
        (partial / "new.txt").touch()
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    with pytest.raises(ZeroDivisionError):
        _fail_halfway(target, folder=True)
    assert [path.name for path in target.iterdir()] == ["new.txt"]
    assert [path.name for path in target.parent.iterdir()] == ["folder"]


def test_a_link_to_a_folder_is_replaced_and_its_folder_kept(tmp_path: Path) -> None:
    link = tmp_path / "last"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with atomic_path(link) as partial:
            partial.symlink_to(name)
        assert link.resolve().name == name
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "one", "two"]


def test_replace_takes_a_file_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "new").write_text("file")
    replace(tmp_path / "new", tmp_path / "target")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["file"]


def _try_lock(path: Path, wait: bool, answers: "multiprocessing.Queue[str]") -> None:
    try:
        with locked(path, wait):
            answers.put("locked")
    except BlockingIOError:
        answers.put("refused")


def test_a_lock_is_held_against_other_processes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.Queue[str] = context.Queue()
    path = tmp_path / ".lock"
    refused = context.Process(target=_try_lock, args=(path, False, answers))
    waiting = context.Process(target=_try_lock, args=(path, True, answers))
    with locked(path):
        refused.start()
        assert answers.get(timeout=300) == "refused"
        waiting.start()
        waiting.join(1.0)
        assert answers.empty()
    assert answers.get(timeout=300) == "locked"
    for process in (refused, waiting):
        process.join()


# -- disks that lack something


def test_a_disk_without_locks_is_said_and_this_machine_still_keeps_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Lustre mounted without flock."""
    flock, path, temporary = files.fcntl.flock, tmp_path / "disk" / "lock", tmp_path / "machine"
    path.parent.mkdir()
    temporary.mkdir()

    def only_in_temporary(file, operation: int) -> None:
        if Path(file.name).parent != temporary:
            raise OSError(errno.ENOSYS, "Function not implemented")
        flock(file, operation)

    monkeypatch.setattr(files.fcntl, "flock", only_in_temporary)
    monkeypatch.setattr(files, "gettempdir", lambda: str(temporary))
    with locked(path, wait=False):
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
        with locked(path.with_name("other"), wait=False):
            pass
    assert "has no file locks (Function not implemented)" in capsys.readouterr().err
    for _ in range(2):  # what a killed process left is removed there, too
        (path.parent / ".result.partial-left").mkdir(exist_ok=True)
        (path.parent / ".result.partial-left" / "lock").touch()
        with staged(path.parent / "result", 1) as work:
            (work / "new").write_text("whole")
        assert sorted(p.name for p in path.parent.iterdir()) == ["lock", "other", "result"]
        (path.parent / "result").unlink()


def test_errors_of_the_disk_are_recognised_however_they_are_wrapped(tmp_path: Path) -> None:
    from safetensors import SafetensorError
    from torch.distributed.checkpoint.api import CheckpointException

    with pytest.raises((RuntimeError, OSError)) as raised, Path("/dev/full").open("wb") as full:
        torch.save({"a": torch.zeros(100_000)}, full)
    wrapped = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    quota = OSError(errno.EDQUOT, "Disk quota exceeded", "/home/x/step.ckpt")
    for error, line in (
        (raised.value, "the disk is full; make room"),
        (wrapped, "runs/a: the disk is full; make room"),
        (quota, "/home/x/step.ckpt: your quota of the disk is used up; make room"),
        (CheckpointException("failed", {1: (quota, None)}), "/home/x/step.ckpt: your quota of the disk"),  # type: ignore[dict-item]
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "n" * 5000),
            "n... (5000 characters): a file's name is too long",
        ),
        (OSError(errno.EROFS, "Read-only file system", "/ro/x"), "/ro/x: the disk is read-only"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "is the disk full?"),
    ):
        assert line in str(disk_problem(error, "runs/a"))
    interrupted = KeyboardInterrupt()
    interrupted.__context__ = quota
    for error in (
        interrupted,
        ValueError("os"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        RuntimeError("inline"),
    ):
        assert disk_problem(error) is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("x" * 256, "name too long"),
        (f"{'x' * 300}/y", "name too long"),
        ("file/x", "is a file"),
        ("n" * 5000, "name too long"),
    ],
)
def test_an_output_that_cannot_be_written_is_found_before_the_work(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"output=.* cannot be written: .*{reason}; choose another") as raised:
        require_writable(tmp_path / name, "output")
    assert len(str(raised.value)) < 300
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_output_that_can_be_written_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name in ("new", "deep/er/new", "folder", "file"):
        require_writable(tmp_path / name, "output")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]

    def refused(dir: Path) -> None:
        raise OSError(errno.EROFS, f"Read-only file system: {dir.name}")

    monkeypatch.setattr(files, "TemporaryFile", refused)
    for name, tried in (("folder", "folder"), ("file", tmp_path.name), ("deep/er", tmp_path.name)):
        with pytest.raises(UserError, match=f"Read-only file system: {tried};"):
            require_writable(tmp_path / name, "output")


def test_a_folder_that_a_layered_disk_cannot_rename_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the lower layers of a container's overlayfs."""
    rename = os.rename

    def layered(source: str, target: str) -> None:
        if Path(source).name == "export":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "old").touch()
    monkeypatch.setattr(os, "rename", layered)
    with atomic_path(tmp_path / "export", folder=True) as new:
        (new / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "new"]


def test_inference_is_imported_without_the_modules_that_windows_lacks(tmp_path: Path) -> None:
    code = """
import os, signal, sys
for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
del signal.SIGUSR1, os.pread, os.getuid
import inference.pipeline, inference.infer_command, inference.jobs, inference.loading, magihuman.infer, magihuman.zoo
import magihuman.io.files as files, magihuman.train, data.shards
try:
    with files.locked(files.Path(sys.argv[1])):
        pass
except files.UserError as error:
    print(error)
sys.argv = ["train", "+recipe=pretrain"]
magihuman.train.main()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "lock")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout == "this needs file locks, which Python has on Linux and macOS only; on Windows use WSL2\n"
    assert done.stderr == "error: training runs on Linux and macOS; on Windows use WSL2\n"
    assert done.returncode == 2
