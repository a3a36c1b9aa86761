"""magihuman.models is pure: networks and dataclasses, without files, processes or other packages of ours."""

import ast
from pathlib import Path

import pytest

MODELS = Path(__file__).resolve().parents[2] / "magihuman" / "models"
ALLOWED = {
    "torch",
    "collections",
    "dataclasses",
    "functools",
    "importlib",
    "math",
    "re",
    "sys",
    "typing",
    "zlib",
    "flash_attn",
}
OURS = ("magihuman.models", "magihuman.errors", "magihuman.schema")


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.py")), ids=lambda p: p.name)
def test_a_module_of_networks_imports_no_files_and_no_processes(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert name.startswith(OURS) or name.split(".")[0] in ALLOWED, f"{path.name} imports {name}"
            assert not name.startswith("torch.distributed"), f"{path.name} imports {name}"
        if isinstance(node, ast.Call):
            function = node.func
            called = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            assert called not in {"open", "read_text", "write_text", "save_file", "load_file"}, path.name
