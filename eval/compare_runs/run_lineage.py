"""Lineage of runs, from data over teachers to students, by the sha256 in their run.json: a small graph with places to draw.

graph = lineage(runs)
graph.nodes[0].label, graph.edges[0]
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.compare_runs.run_records import RunRecord
from magihuman.io.files import WEIGHTS
from magihuman.io.provenance import fingerprint
from magihuman.io.text import load_json

TOGETHER = 4
"""Runs with the same parents that are drawn one by one; more are one box."""
WIDTH, HEIGHT, GAP_X, GAP_Y = 190, 46, 60, 16
"""Size of a box and the space between boxes, in pixels."""


@dataclass
class LineageNode:
    """A box: data, a checkpoint, a run, or several runs with the same parents.

    Attributes:
        kind: data, checkpoint or run; label, about: its two lines; sha256: "" where none is recorded.
        x, y: of its upper left corner in pixels.
    """

    kind: str
    label: str
    about: str = ""
    sha256: str = ""
    x: int = 0
    y: int = 0


@dataclass
class Lineage:
    """Boxes and arrows.

    Attributes:
        edges: (from, to) as numbers of nodes; width, height: in pixels.
    """

    nodes: list[LineageNode] = field(default_factory=list)
    edges: list[tuple[int, int]] = field(default_factory=list)
    width: int = 0
    height: int = 0


def lineage(runs: Sequence[RunRecord]) -> Lineage:
    """The graph of all runs with parents, their parents among them or elsewhere, and theirs as far as they are known."""
    nodes: dict[str, LineageNode] = {}
    parents: dict[str, list[str]] = {}
    exports = _exports(runs)

    def add_parent(parent: Mapping[str, str]) -> str:
        sha = parent["sha256"]
        if sha in exports:
            return exports[sha]
        key = sha or f"{parent['role']} {parent['name']}"
        if key not in nodes:
            data = parent["role"] in ("shards", "prompts")
            about = parent["role"] if data else "checkpoint"
            nodes[key] = LineageNode("data" if data else "checkpoint", parent["name"], about, sha)
            made = {} if data else _training_of(parent)
            if made:
                nodes[key].about = str(made.get("recipe", "")).rpartition(".")[2] or about
            parents[key] = [add_parent(above) for above in _parents_in(made)]
        return key

    together: dict[tuple[str, ...], list[int]] = defaultdict(list)
    has_child = {exports[parent["sha256"]] for run in runs for parent in run.parents if parent["sha256"] in exports}
    for number, run in enumerate(runs):
        if run.parents or f"run {number}" in has_child:
            origin = tuple(add_parent(parent) for parent in run.parents)
            together[(*origin, str(f"run {number}" in has_child and number), run.recipe)].append(number)
    for (*above, _, recipe), members in together.items():
        groups = [members] if len(members) > TOGETHER else [[number] for number in members]
        for group in groups:
            key, label = f"run {group[0]}", runs[group[0]].name
            if len(group) > 1:
                label = f"{len(group)} runs"
            nodes[key] = LineageNode("run", label, recipe, runs[group[0]].sha256 if len(group) == 1 else "")
            parents[key] = list(dict.fromkeys(above))
    return _placed(nodes, parents)


def _exports(runs: Sequence[RunRecord]) -> dict[str, str]:
    """sha256 of an export -> key of the run that made it. Hashed where another run seems to start from it."""
    wanted = {parent["sha256"] for run in runs for parent in run.parents if parent["role"] not in ("shards", "prompts")}
    names = {Path(parent["name"]).name for run in runs for parent in run.parents}
    found = {}
    for number, run in enumerate(runs):
        sha = run.sha256
        if not sha and run.folder is not None and wanted and run.name.rpartition("/")[2] in names:
            sha = _hash_of(run.folder / "export")
        if sha in wanted:
            run.sha256 = sha
            found[sha] = f"run {number}"
    return found


def _hash_of(folder: Path) -> str:
    try:
        return str(fingerprint(folder)["sha256"]) if folder.is_dir() else ""
    except OSError:
        return ""


def _training_of(parent: Mapping[str, str]) -> dict[str, Any]:
    """run.json of the training behind a checkpoint that ships or lies in a run folder, if the hash is still the same."""
    name = parent["name"]
    for export, record in (
        (WEIGHTS / name, WEIGHTS / name / "training.json"),
        (Path(name) / "export", Path(name) / "run.json"),
        (Path(name), Path(name).parent / "run.json"),
    ):
        try:
            if record.is_file() and _hash_of(export) == parent["sha256"]:
                return dict(load_json(record))
        except (OSError, ValueError, TypeError):
            continue
    return {}


def _parents_in(record: Mapping[str, Any]) -> list[dict[str, str]]:
    parents = record.get("parents")
    return [
        {key: str(parent.get(key, "")) for key in ("role", "name", "sha256")}
        for parent in (parents if isinstance(parents, list) else [])
        if isinstance(parent, dict)
    ]


def _placed(nodes: Mapping[str, LineageNode], parents: Mapping[str, Sequence[str]]) -> Lineage:
    """Boxes in columns: each to the right of all its parents."""
    depth: dict[str, int] = {}

    def depth_of(key: str, below: frozenset[str] = frozenset()) -> int:
        if key not in depth:
            above = [p for p in parents.get(key, ()) if p in nodes and p not in below]
            depth[key] = 1 + max((depth_of(p, below | {key}) for p in above), default=-1)
        return depth[key]

    order = {key: number for number, key in enumerate(nodes)}
    columns: dict[int, int] = defaultdict(int)
    for key, node in sorted(nodes.items(), key=lambda item: (depth_of(item[0]), order[item[0]])):
        node.x = depth[key] * (WIDTH + GAP_X)
        node.y = columns[depth[key]] * (HEIGHT + GAP_Y)
        columns[depth[key]] += 1
    edges = [(order[above], order[key]) for key in nodes for above in parents.get(key, ()) if above in order]
    width = (max(columns, default=-1) + 1) * (WIDTH + GAP_X) - GAP_X
    height = max(columns.values(), default=0) * (HEIGHT + GAP_Y) - GAP_Y
    return Lineage(list(nodes.values()), edges, max(width, 0), max(height, 0))
