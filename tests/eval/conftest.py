"""Fixtures of several test files of the evaluation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from toy_metrics import TOY, metric_file


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Path]:
    """Folder of a file with the measurements of `TOY`, which the registry finds."""
    with metric_file(tmp_path / "metric_files", TOY):
        yield tmp_path / "metric_files"
