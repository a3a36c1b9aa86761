"""Some cells of `tests/resume_matrix.py`, whose whole table is eval/results/resume/matrix.json."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    file = Path(__file__).resolve().parents[1] / "resume_matrix.py"
    spec = importlib.util.spec_from_file_location("resume_matrix", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["resume_matrix"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "strategy"), [("sr", "single"), ("dmd2 (lora)", "ddp")])
def test_a_killed_training_ends_like_an_unbroken_one(matrix, recipe, strategy) -> None:
    cell = matrix.run(only=recipe, strategies=strategy, kills=1)["cells"][recipe][strategy]
    found = {key: cell.get(key) for key in ("checkpoint_equal", "export_equal", "metrics_equal", "every_step_once")}
    assert all(found.values()), cell
