"""Structure of the code: import directions, no circles, pure models, names, speed of --help, relative paths in results."""

import ast
import collections
import itertools
import os
import re
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("magihuman", "recipes", "data", "eval", "inference")
MAY_IMPORT = {
    "magihuman": set(),
    "recipes": {"magihuman"},
    "data": {"magihuman"},
    "inference": {"magihuman"},
    # The metrics of puppets need their palette and their voice.
    "eval": {"magihuman", "inference", "data"},
}
# The benchmark of training steps runs the recipes.
EXTRA = {"inference.benchmark.training_steps": {"recipes"}}
# Lower floors never import upper ones; what stands in one line may not import each other either.
FLOORS = {
    "magihuman": (
        ("errors",),
        ("schema",),
        ("flow",),
        ("models",),
        ("io", "cpu", "console"),
        ("preemption",),
        ("media", "cli"),
        ("codecs",),
        ("zoo",),
        ("context_parallel",),
        ("config",),
        ("composition",),
        ("training",),
        ("distill",),
        ("multirun",),
        ("sweep",),
        ("train", "infer"),
    ),
    "inference": (
        ("requests",),
        ("prompting",),
        ("fast",),
        ("memory",),
        ("pipeline",),
        ("infer_command",),
        ("benchmark",),
    ),
}
HEAVY = {"torch", "lightning", "transformers", "diffusers", "wandb", "matplotlib", "av", "scipy"}
# Every package may have these.
SHARED_NAMES = {"__init__", "__main__"}
RECIPES = sorted(path.stem for path in (REPO / "recipes").glob("*.py") if path.stem not in ("__init__", "base"))
HELP_SECONDS = 1.0

SOURCES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((REPO / package).rglob("*.py"))
}
COMMANDS = sorted(
    name.removesuffix(".__main__")
    for name, path in SOURCES.items()
    if re.search(r"^if __name__ == .__main__.:", path.read_text(), re.M)
)
EVERY_MODULE = pytest.mark.parametrize("name", SOURCES)


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(SOURCES[name].read_text())


def named_by(text: str) -> str | None:
    """The module that a string such as "data.prepare:main" or "eval.dmd2.run" refers to."""
    if not re.fullmatch(r"[a-z_]+(\.\w+)+(:\w+)?", text):
        return None
    if re.fullmatch(r"data\.(module|make)(\.[a-z_]+)?", text):  # settings
        return None
    parts = text.split(":")[0].split(".")
    known = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((name for name in known if name in SOURCES), None)


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of this repository that a module imports, anywhere in it, also by a string."""
    found = set()
    # "-m", "magihuman.train" in a list is a command that somebody may type.
    commands = [
        after
        for node in ast.walk(tree(name))
        if isinstance(node, ast.List)
        for before, after in itertools.pairwise(node.elts)
        if isinstance(before, ast.Constant) and before.value == "-m"
    ]
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in SOURCES else str(node.module))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in commands:
            found.add(named_by(node.value) or "")
    return frozenset((found & SOURCES.keys()) - {name})


@EVERY_MODULE
def test_packages_import_only_what_they_may(name: str) -> None:
    package = name.split(".")[0]
    siblings = {other.split(".")[0] for other in imports(name)} - {package}
    allowed = MAY_IMPORT[package] | EXTRA.get(name, set())
    assert siblings <= allowed, f"{package} must not import {siblings - allowed}"


def test_lower_floors_import_no_upper_ones() -> None:
    wrong = []
    for package, floors in FLOORS.items():
        height = {room: number for number, rooms in enumerate(floors) for room in rooms}
        for name in SOURCES:
            room = name.split(".")[1] if name.startswith(package + ".") else None
            for other in imports(name) if room in height else ():
                above = other.split(".")[1] if other.startswith(package + ".") else None
                if above in height and above != room and height[above] >= height[room]:
                    wrong.append(f"{name} imports {other}")
    assert not wrong, "\n".join(wrong)


def test_no_import_circle() -> None:
    """Tarjan's strongly connected components of more than one module."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in imports(name):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            members = []
            while not members or members[-1] != name:
                members.append(stack.pop())
            if len(members) > 1:
                circles.append(sorted(members))

    for name in SOURCES:
        if name not in index:
            visit(name)
    assert not circles


@pytest.mark.parametrize("name", [name for name in SOURCES if name.startswith("magihuman.models.")])
def test_models_are_pure(name: str) -> None:
    modules = {alias.name for node in ast.walk(tree(name)) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom)}
    calls = {
        node.func.id for node in ast.walk(tree(name)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not {m for m in modules if m.startswith(("torch.distributed", "safetensors", "pathlib", "json", "os"))}
    assert "distributed" not in {
        alias.name for node in ast.walk(tree(name)) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert "open" not in calls


def test_the_engine_knows_no_recipe() -> None:
    engine = [n for n in SOURCES if n.startswith("magihuman.training") or n in ("magihuman.train", "magihuman.config")]
    named = [
        f"{name}:{node.lineno}: {node.value!r}"
        for name in engine
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (node.value in RECIPES or re.search(rf"\brecipes\.({'|'.join(RECIPES)})\b", node.value))
    ]
    assert not named, "\n".join(named)


@EVERY_MODULE
def test_module_and_public_names_are_documented(name: str) -> None:
    assert ast.get_docstring(tree(name)), "no module docstring"
    undocumented = [
        node.name
        for node in tree(name).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not undocumented, f"public names without a docstring: {undocumented}"


def test_names_have_one_meaning() -> None:
    files = collections.defaultdict(set)
    classes = collections.defaultdict(set)
    for name in SOURCES:
        if not name.startswith("magihuman.zoo.checks."):  # each is called after what it checks
            files[name.split(".")[-1]].add(name)
        for node in tree(name).body:
            if isinstance(node, ast.ClassDef):
                classes[node.name].add(name)
    for stem in SHARED_NAMES:
        files.pop(stem, None)
    # A package and a module of another package may be about the same: recipes.dmd2 trains what eval.dmd2 evaluates.
    twice = {stem: sorted(names) for stem, names in files.items() if len(names) > 1 and stem not in SAME_SUBJECT}
    assert not twice
    assert not {stem: sorted(names) for stem, names in classes.items() if len(names) > 1}


# Basenames that occur in two packages because both files are about the same thing.
SAME_SUBJECT = {
    "dmd2": "recipes trains, eval evaluates",
    "sr": "recipes trains, eval evaluates",
    "turbo_vae": "recipes trains, eval evaluates",
    "lora": "magihuman.models has the layers, recipes trains them",
    "puppets": "data draws them, eval evaluates clips of them",
    "config": "of networks in magihuman.models, of trainings in magihuman",
    "inspect": "of shards in data, of checkpoints in magihuman.zoo",
    "super_resolution": "its start in magihuman.flow, its stage in inference",
    "conditioning": "read in inference, evaluated in eval",
    "sampling": "the loop in magihuman.flow, its networks in inference",
    "decoders": "loaded by magihuman.zoo, timed by inference.benchmark",
    "tiny": "puppets' clips in data, their codecs in magihuman.codecs",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_starts_fast(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    times = []
    while (
        len(times) < 3 and min(times, default=HELP_SECONDS) >= HELP_SECONDS
    ):  # a busy machine makes single ones longer
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", name, "--help"],
            cwd=REPO,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0, done.stderr
        assert "usage" in done.stdout.lower() or "+recipe" in done.stdout
    assert min(times) < HELP_SECONDS, f"{times} s of processor time; import heavy packages inside functions"


def test_results_hold_no_path_of_a_machine() -> None:
    found = [
        f"{path.relative_to(REPO)}: {match.group()}"
        for folder in ("eval/results", "inference/results", "magihuman/zoo/weights")
        for path in sorted((REPO / folder).rglob("*"))
        if path.suffix in (".json", ".md", ".csv", ".yaml")
        for match in [re.search(r"/(?:work|tmp|root|home)/[\w./-]+", path.read_text())]
        if match
    ]
    assert not found, "\n".join(found)


def test_top_level_holds_what_was_agreed() -> None:
    folders = {p.name for p in REPO.iterdir() if p.is_dir() and not p.name.startswith(".")}
    agreed = {"configs", "magihuman", "recipes", "data", "eval", "inference", "tests", "slurm"}
    made_by_use = {"runs", "outputs", "multirun", "wandb", "tiny_world", "magihuman.egg-info", "__pycache__", "build"}
    assert agreed <= folders
    assert folders - agreed <= made_by_use | {"dist"}
