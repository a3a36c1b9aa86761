"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
GOLDEN = REPO.parent / "shared" / "golden"

os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of test vectors computed with the released implementation; tests skip where it is absent."""
    if not (GOLDEN / "manifest.json").exists():
        pytest.skip(f"the released implementation's vectors are not at {GOLDEN}")
    return GOLDEN
