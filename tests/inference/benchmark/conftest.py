"""Dry runs that several tests look at, made once by one of the parallel workers."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from inference.benchmark import timers
from inference.benchmark.__main__ import suite, train


def _once(factory: pytest.TempPathFactory, name: str, run: Callable[[str], str]) -> Path:
    """NAME.jsonl of a run; workers have folders of their own in one that they share."""
    own = factory.getbasetemp()
    shared = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / f"dry-{name}"
    shared.mkdir(exist_ok=True)
    file = shared / f"{name}.jsonl"
    with (shared / "lock").open("w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "done").exists():
            patch.setitem(timers._SIDE, "cpu", 256)
            patch.setitem(timers._COPIED, "cpu", 1 << 20)
            told = run(str(shared))
            assert told.endswith(f"next: python -m inference.benchmark collect input={file}")
            (shared / "done").touch()
    return file


@pytest.fixture(scope="session")
def dry_suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """suite.jsonl of a dry run; to read only."""
    return _once(tmp_path_factory, "suite", lambda folder: suite(dry=True, output=folder))


@pytest.fixture(scope="session")
def dry_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl of a dry run, which has time on a busy machine too; to read only."""
    return _once(tmp_path_factory, "train", lambda folder: train(minutes=10, dry=True, output=folder))
