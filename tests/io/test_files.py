"""Atomic and locked files: complete or absent after errors, folders replaced, one process at a time."""

import multiprocessing
from pathlib import Path

import pytest

from magihuman.io.files import atomic_path, locked, replace, write_atomically


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
        assert answers.get(timeout=60) == "refused"
        waiting.start()
        waiting.join(1.0)
        assert answers.empty()
    assert answers.get(timeout=60) == "locked"
    for process in (refused, waiting):
        process.join()
