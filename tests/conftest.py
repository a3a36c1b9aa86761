"""How the suite runs, and fixtures shared by all tests.

Where pytest-xdist is installed, tests run in parallel on all cores. `-n 0` runs them in one process; so do --pdb and
a single test.
"""

import os
from pathlib import Path

import fork_server
import pytest

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO.parent / "shared" / "golden"

# Commands that tests start find the helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(REPO), str(REPO / "tests" / "support"), os.environ.get("PYTHONPATH")))
)
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # networks here are too small for more, and cores are for tests
fork_server.preload()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Before pytest-xdist reads its options: all cores, unless the caller has chosen, debugs or names a test."""
    option = config.option
    named = all("::" in argument for argument in config.args)
    if named and option.markexpr == "not slow":
        option.markexpr = ""  # a slow test that is asked for by its name runs
    if "PYTEST_XDIST_WORKER" in os.environ:
        return  # a worker, or a pytest that a test starts
    if getattr(option, "numprocesses", 0) is not None or option.dist != "no" or option.tx:
        return  # chosen, or no pytest-xdist
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    watching = option.usepdb or option.trace or option.collectonly or option.capture == "no"
    if cores > 1 and not watching and not (named and len(config.args) == 1):
        option.numprocesses, option.dist = cores, "worksteal"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of test vectors computed with the released implementation; tests skip where it is absent."""
    if not (GOLDEN / "manifest.json").exists():
        pytest.skip(f"the released implementation's vectors are not at {GOLDEN}")
    return GOLDEN


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small shards of three buckets (`training_stub.write_shards`), to read only."""
    from training_stub import write_shards

    return write_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="session")
def parent(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a small pretraining, for recipes that start from a checkpoint; to read only."""
    from training_stub import train_here

    return train_here(tmp_path_factory.mktemp("parent") / "run", shards, ["+recipe=pretrain"])


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the released layout, eight layers deep."""
    from fake_release import make_weights

    root = tmp_path_factory.mktemp("release") / "weights"
    make_weights(root, layers=8)
    return root


@pytest.fixture
def base(release: Path, tmp_path: Path) -> Path:
    """A copy of the first of them to damage."""
    folder = tmp_path / "src" / "base"
    folder.mkdir(parents=True)
    for file in (release / "base").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an export, of the fake codecs."""
    from fake_bundle import fake_checkpoint

    folder = tmp_path_factory.mktemp("run")
    fake_checkpoint(folder / "export")
    return folder


@pytest.fixture
def with_fake_codecs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every codec bundle that is loaded is the fake one."""
    from fake_bundle import fake_bundle

    monkeypatch.setattr("magihuman.codecs.bundle.load_bundle", fake_bundle)
