"""The house's shape: who may import whom, what every module says of itself."""

import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("magihuman", "recipes", "data", "eval", "inference")
MAY_IMPORT = {
    "magihuman": set(),
    "recipes": {"magihuman"},
    "data": {"magihuman"},
    "inference": {"magihuman"},
    # The tiny world's measures need its palette and its voice.
    "eval": {"magihuman", "inference", "data"},
}
# The benchmark of training steps runs the recipes; nothing else of inference knows them.
EXTRA = {"inference/benchmark/training_bench.py": {"recipes"}}
# Inside magihuman, lower floors never import upper ones.
LOWER_FLOORS = {
    "magihuman.flow": {
        "magihuman.models",
        "magihuman.training",
        "magihuman.zoo",
        "magihuman.models.denoiser",
    },
    "magihuman.models": {
        "magihuman.flow",
        "magihuman.training",
        "magihuman.zoo",
        "magihuman.models.denoiser",
    },
}
HEAVY = {"lightning", "transformers", "diffusers", "wandb", "matplotlib", "av", "scipy"}
LIGHT_MODULES = ("magihuman/zoo/__main__.py", "magihuman/train.py", "magihuman/infer.py")

SOURCES = sorted(path for package in PACKAGES for path in (REPO / package).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_imports_follow_the_arrows(path: Path) -> None:
    package = path.relative_to(REPO).parts[0]
    siblings = {name.split(".")[0] for name in _imports(path)} & set(PACKAGES) - {package}
    allowed = MAY_IMPORT[package] | EXTRA.get(path.relative_to(REPO).as_posix(), set())
    assert siblings <= allowed, f"{package} must not import {siblings - allowed}"
    module = ".".join(path.relative_to(REPO).with_suffix("").parts)
    for floor, above in LOWER_FLOORS.items():
        if module.startswith(floor + "."):
            wrong = {
                name for name in _imports(path) if any(name == a or name.startswith(a + ".") for a in above)
            }
            assert not wrong, f"{module} lies below {wrong}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(REPO)))
def test_module_and_public_names_are_documented(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module says nothing of itself"
    undocumented = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not undocumented, f"public names without a docstring: {undocumented}"


@pytest.mark.parametrize("name", LIGHT_MODULES)
def test_entry_points_import_heavy_parts_lazily(name: str) -> None:
    top = ast.parse((REPO / name).read_text()).body
    at_import = {
        alias.name.split(".")[0] for node in top if isinstance(node, ast.Import) for alias in node.names
    } | {(node.module or "").split(".")[0] for node in top if isinstance(node, ast.ImportFrom)}
    assert not at_import & (HEAVY | {"torch"})


def test_top_level_holds_what_was_agreed() -> None:
    folders = {p.name for p in REPO.iterdir() if p.is_dir() and not p.name.startswith(".")}
    agreed = {"configs", "magihuman", "recipes", "data", "eval", "inference", "tests", "slurm"}
    made_by_use = {
        "runs",
        "outputs",
        "multirun",
        "wandb",
        "tiny_world",
        "magihuman.egg-info",
        "__pycache__",
        "build",
    }
    assert agreed <= folders
    assert folders - agreed <= made_by_use
