"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO.parent / "shared" / "golden"

# Commands that tests start find the helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(REPO), str(REPO / "tests" / "support"), os.environ.get("PYTHONPATH")))
)
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of test vectors computed with the released implementation; tests skip where it is absent."""
    if not (GOLDEN / "manifest.json").exists():
        pytest.skip(f"the released implementation's vectors are not at {GOLDEN}")
    return GOLDEN


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
