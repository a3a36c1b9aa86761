"""The table of a sweep: state, progress and scores of its points, read from the run folders."""

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from magihuman.io.markdown import aligned
from magihuman.sweep.points import Points
from magihuman.training.lock import state_of
from magihuman.training.runs import RunFolder

MISSING, QUEUED, RUNNING, LOST, FINISHED, DAMAGED = "missing", "queued", "running", "lost", "finished", "damaged"
STATES = (FINISHED, RUNNING, QUEUED, "preempted", "interrupted", "failed", LOST, MISSING, DAMAGED)
TAIL = 1 << 14
"""Bytes of metrics.csv that are read for the last loss."""


def states(points: Points, in_queue: Callable[[], set[int]] | None = None) -> dict[int, str]:
    """Element -> state. A queued element that no queue has is lost, as a killed training is.

    Args:
        in_queue: gives the elements in Slurm's queue; called only if an element says that it is queued.
    """
    found = {point.element: state_of(point.folder) or MISSING for point in points.points}
    if in_queue is not None and QUEUED in found.values():
        waiting = in_queue()
        for element, state in found.items():
            if state == QUEUED and element not in waiting:
                found[element] = LOST
    return found


def value_at(record: Mapping[str, Any], name: str) -> float | None:
    """The number under a name such as results.eval.sync_skill or metrics.val/video; None where there is none."""
    node: Any = record
    parts = name.split(".")
    while parts and isinstance(node, Mapping):
        whole = ".".join(parts)  # a key may hold a dot
        if whole in node:
            node, parts = node[whole], []
        else:
            node, parts = node.get(parts[0]), parts[1:]
    if isinstance(node, Mapping):
        node = node.get("value")
    return float(node) if isinstance(node, int | float) and not isinstance(node, bool) and not parts else None


def last_loss(folder: Path) -> float | None:
    """The newest `loss` of metrics.csv."""
    try:
        with (folder / "metrics.csv").open("rb") as stream:
            columns = stream.readline().decode("utf-8").strip().split(",")
            if "loss" not in columns:
                return None
            start, end = stream.tell(), stream.seek(0, 2)
            stream.seek(max(start, end - TAIL))
            lines = stream.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return None
    at = columns.index("loss")
    for row in csv.reader(reversed(lines[1:] if end - start > TAIL else lines)):
        if len(row) == len(columns) and row[at]:  # otherwise half a line, or no value in it
            return float(row[at])
    return None


def table(points: Points, found: Mapping[int, str], sort: bool = False) -> str:
    """Lines of text: point, state, step, time left, last loss and main metric, then a count of the states.

    Args:
        found: element -> state.
        sort: by the metric, the best first, instead of by element.
    """
    settings = points.differing()
    rows = []
    for point, differs in zip(points.points, settings, strict=True):
        folder, state = Path(point.folder), found[point.element]
        record = {} if state in (MISSING, DAMAGED) else RunFolder(folder).read()
        progress = record.get("progress") or {}
        step, steps = progress.get("step", record.get("steps")), progress.get("max_steps")
        metric = value_at(record, points.metric["name"])
        shown = f"{state}: {record.get('stage')}" if state == RUNNING and record.get("stage") else state
        rows.append(
            (
                metric,
                str(point.element),
                differs,
                shown,
                "" if step is None else f"{step}/{steps}" if steps else str(step),
                _left(progress) if state == RUNNING else "",
                _number(last_loss(folder)),
                _number(metric),
            )
        )
    if sort:
        sign = -1 if points.metric["goal"] == "max" else 1
        rows.sort(key=lambda row: (row[0] is None, sign * (row[0] or 0)))
    head = ("", "settings", "state", "step", "left", "loss", f"{points.metric['name']} ({points.metric['goal']})")
    body = [head, *(row[1:] for row in rows)]
    return "\n".join([*aligned(body, "rllrrrr"), counted(found)])


def counted(found: Mapping[int, str]) -> str:
    """Such as "3 finished, 1 failed"."""
    values = list(found.values())
    known = [state for state in STATES if state in values] + sorted(set(values) - set(STATES))
    return ", ".join(f"{values.count(state)} {state}" for state in known)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _left(progress: Mapping[str, Any]) -> str:
    seconds = progress.get("seconds_left")
    if not isinstance(seconds, int | float):
        return ""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
