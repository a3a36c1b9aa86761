"""The comparison as plain values, and the page that shows them: one HTML file that opens without a network.

    values = comparison(runs, baseline=0, title="dmd2_lr")
    write_page(Path("out"), values, copy=True)

The template is run_page.html. The page loads nothing but the clips next to it; texts of runs reach it as JSON and are shown
as text only.
"""

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from eval.compare_runs.run_differences import all_differences, differing_settings
from eval.compare_runs.run_lineage import lineage
from eval.compare_runs.run_records import RunRecord, thin
from eval.metrics.registry import Metric, metrics
from magihuman.errors import UserError
from magihuman.io.files import write_atomically

PAGE, GENERATOR = "index.html", "magihuman compare_runs"
TEMPLATE = Path(__file__).with_suffix(".html")
POINTS = 400_000
"""Points of all curves on the page: 500 runs with 20 curves get 40 a curve."""
SHOWN_SCORES = ("attributes", "vowels", "sync_skill", "words_exact", "psnr", "ssim", "energy_look", "sharpness")
"""Metrics of which the first four that there are have a column at first."""
SHOWN_SETTINGS, SHOWN_CURVES = 6, 6
SELDOM_TELLING = frozenset(
    ("damaged_samples", "straggler", "not_finite", "dm_not_finite", "divergence", "time", "seconds", "lr", "samples_per_s",
     "tflops", "mfu", "memory_gb")
)  # fmt: skip
"""First parts of the names of metrics that are equal in most runs, or describe the machine."""
COPIED = 2 << 30
"""Bytes of clips that are copied where they cannot be hard links; more are linked to where they lie."""


@dataclass
class TableColumn:
    """A column of the table.

    Attributes:
        key: unique name; label: heading; about: more of it; group: settings, training, cost or scores.
        direction: up, down, target or "" (see `eval.metrics.registry.Metric`); shown: at first.
    """

    key: str
    label: str
    group: str
    direction: str = ""
    shown: bool = False
    about: str = ""


@dataclass
class ComparedRuns:
    """Everything that is shown.

    Attributes:
        runs: in the order given; baseline: number of the one that others are compared with.
        columns: of the table; cells: per run, column -> text, number or score.
        differences: baseline -> run -> column -> paired difference, see `run_differences.all_differences`.
        sort: column by which the table is sorted at first, and whether the greatest comes first; None: as given.
    """

    title: str
    runs: list[RunRecord]
    baseline: int
    columns: list[TableColumn] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    differences: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    sort: tuple[str, bool] | None = None

    @property
    def counts(self) -> str:
        """ "30 runs: 28 finished, 2 failed"."""
        states = Counter(run.status for run in self.runs)
        return f"{len(self.runs)} runs: {', '.join(f'{count} {status}' for status, count in states.most_common())}"


def metric_of(score: str) -> Metric:
    """The metric of a score "evaluation: metric"; one that is not listed has its key as label and no better side."""
    name = score.partition(": ")[2]
    return metrics().get(name, Metric(name, name))


def comparison(runs: list[RunRecord], baseline: int, title: str, goal: tuple[str, str] | None = None) -> ComparedRuns:
    """Columns, cells and differences of runs.

    Args:
        goal: name of the metric to look at ("results.NAME.METRIC" or "metrics.NAME") and max or min.
    """
    found = ComparedRuns(title, runs, baseline)
    recipe = runs[baseline].recipe
    alike = [run for run in runs if run.recipe == recipe]
    settings = differing_settings(runs, alike)
    hours = "GPU-hours" if any(run.on_gpu for run in runs) else "device-hours"
    main = None if goal is None else _goal_column(goal[0])
    several = len({score.partition(": ")[0] for run in runs for score in run.scores}) > 1
    found.columns = [
        TableColumn("recipe", "recipe", "settings", shown=len({run.recipe for run in runs if run.recipe}) > 1),
        *(TableColumn(f"s:{name}", name, "settings", shown=n < SHOWN_SETTINGS) for n, name in enumerate(settings)),
        TableColumn("step", "step", "training", shown=True),
        *(
            TableColumn(f"m:{name}", name, "training")
            for name in sorted({m for run in runs for m in run.metrics} - {"seconds"})
        ),
        TableColumn(
            "hours", hours, "cost", shown=any(run.hours for run in runs), about="devices x seconds of training / 3600"
        ),
        TableColumn(
            "samples", "samples seen", "cost", shown=any(run.samples for run in runs), about="steps x batch size"
        ),
    ]
    for score in sorted({score for run in runs for score in run.scores}, key=_score_order):
        metric, evaluation = metric_of(score), score.partition(": ")[0]
        short = re.sub(r" \(.*\)", "", metric.title)
        label = f"{evaluation}: {short}" if several else short
        found.columns.append(TableColumn(f"e:{score}", label, "scores", metric.direction, about=metric.title))
    scores = [column for column in found.columns if column.group == "scores"]
    names = {column.key.partition(": ")[2]: column for column in reversed(scores)}
    for column in [names[name] for name in SHOWN_SCORES if name in names][:4] or scores[:4]:
        column.shown = True
    for column in found.columns:
        if column.key == main:
            column.shown, found.sort = True, (column.key, goal is not None and goal[1] == "max")
    found.cells = [_cells(run, {name: values[n] for name, values in settings.items()}) for n, run in enumerate(runs)]
    found.differences = {
        against: {run: {f"e:{score}": d for score, d in cells.items()} for run, cells in rows.items()}
        for against, rows in all_differences(runs, baseline).items()
    }
    return found


def _goal_column(name: str) -> str:
    """TableColumn of a sweep's metric: results.eval.vowels[.value] or metrics.loss."""
    kind, _, rest = name.partition(".")
    if kind == "results":
        evaluation, _, metric = rest.removesuffix(".value").partition(".")
        return f"e:{evaluation}: {metric}"
    return f"m:{rest if kind == 'metrics' else name}"


def _score_order(score: str) -> tuple[str, int, str]:
    evaluation, _, metric = score.partition(": ")
    known = list(metrics())
    return evaluation, known.index(metric) if metric in metrics() else len(known), metric


def _cells(run: RunRecord, settings: dict[str, str]) -> dict[str, Any]:
    last = {f"m:{name}": run.last(name) for name in run.metrics}
    return {
        "recipe": run.recipe,
        **{f"s:{name}": value for name, value in settings.items() if value},
        "step": run.step,
        **{key: value for key, value in last.items() if key != "m:seconds"},
        "hours": run.hours,
        "samples": run.samples,
        **{f"e:{score}": measure for score, measure in run.scores.items() if measure["value"] is not None},
    }


# ---- The page ----


def check_page(folder: Path) -> None:
    """Refuse to replace a page that is not ours.

    Raises:
        UserError: the folder holds such a page.
    """
    page = folder / PAGE
    if page.is_dir() or (page.is_file() and GENERATOR.encode() not in page.read_bytes()[:1000]):
        raise UserError(f"{page} is there and was not made by this command; give another output=")


def write_page(folder: Path, found: ComparedRuns, copy: bool = True) -> str:
    """Write index.html, and the clips next to it.

    Args:
        copy: put the clips into the folder (as hard links where that is possible), so that it may be moved; else the page
            links to them where they lie.

    Returns:
        What was done with the clips, in words; "" if there are none.

    Raises:
        UserError: another page is there.
    """
    check_page(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "clips", ignore_errors=True)
    links, done = _place_clips(folder, found.runs, copy)
    from jinja2 import Environment

    template = Environment(autoescape=True, keep_trailing_newline=True).from_string(
        TEMPLATE.read_text(encoding="utf-8")
    )
    data = json.dumps(_data(folder, found, links), separators=(",", ":"), allow_nan=False)
    page = template.render(
        generator=GENERATOR,
        title=found.title,
        counts=found.counts,
        graph=lineage(found.runs),
        # In a script element nothing ends the JSON but a "<".
        data=data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"),
    )
    write_atomically(folder / PAGE, page.encode("utf-8", "replace"))
    return done


def _place_clips(folder: Path, runs: Sequence[RunRecord], copy: bool) -> tuple[list[list[str]], str]:
    """Addresses of every run's clips from the page, and what was done in words."""
    addresses: list[list[str]] = [[] for _ in runs]
    clips = [(number, clip, clip.path.resolve()) for number, run in enumerate(runs) for clip in run.clips]
    if not clips:
        return addresses, ""
    disk = folder.stat().st_dev
    far = sum(size.st_size for *_, path in clips if (size := path.stat()).st_dev != disk)
    if not copy or far > COPIED:
        for number, _, path in clips:
            addresses[number].append(_address(Path(os.path.relpath(path, folder.resolve()))))
        why = f", since copies of them would take {far / 1e9:.1f} GB" if copy else ""
        return addresses, f"the page links to {len(clips)} clips where they lie{why}"
    linked = 0
    for number, clip, path in clips:
        step = f"-{clip.step}" if clip.step >= 0 else ""
        place = Path("clips", f"{number:03d}", f"{clip.kind}{step}-{clip.path.name}")
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(path, folder / place)
            linked += 1
        except OSError:
            shutil.copyfile(path, folder / place)
        addresses[number].append(_address(place))
    return addresses, f"{len(clips)} clips are in {folder / 'clips'}, {linked} as hard links, which take no space"


def _address(path: Path) -> str:
    """Relative address of a file: quoted as bytes, so that any file name works."""
    return quote(os.fsencode(path.as_posix()), safe="/")


def _data(folder: Path, found: ComparedRuns, links: list[list[str]]) -> dict[str, Any]:
    """What the page's script reads."""
    runs = found.runs
    names = curve_order({name for run in runs for name in run.metrics})
    curves = sum(len(run.metrics) for run in runs)
    points = min(400, max(24, POINTS // max(1, curves)))
    recipe = runs[found.baseline].recipe
    shown = [
        {
            "name": run.name,
            "place": run.place,
            "link": None
            if run.folder is None
            else _address(Path(os.path.relpath(run.folder.resolve(), folder.resolve()))),
            "status": run.status,
            "reason": run.reason,
            "other": bool(run.recipe) and run.recipe != recipe,
            "max_steps": run.max_steps,
            "devices": run.devices,
            "cells": {key: _rounded(value) for key, value in cells.items()},
            "curves": {name: [_numbers(part) for part in thin(series, points)] for name, series in run.metrics.items()},
            "clips": [
                {"kind": clip.kind, "step": clip.step, "prompt": clip.prompt, "seed": clip.seed, "src": link}
                for clip, link in zip(run.clips, addresses, strict=True)
            ],
        }
        for run, cells, addresses in zip(runs, found.cells, links, strict=True)
    ]
    return {
        "baseline": found.baseline,
        "sort": found.sort,
        "columns": [vars(column) for column in found.columns],
        "curves": [name for name in names if name != "seconds"],
        "shown_curves": SHOWN_CURVES,
        "runs": shown,
        "differences": _rounded(found.differences),
    }


def curve_order(names: Iterable[str]) -> list[str]:
    """Names of curves, the most telling first: validation, scores, losses, monitors, gradient norms; health, speed and bands of
    noise levels last. Ends of the scores' intervals are left out."""
    names = set(names)
    ends = {f"{name}{end}" for name in names if name.startswith("scores/") for end in ("_low", "_high")}

    def rank(name: str) -> tuple[float, str]:
        if "/sigma_" in name:
            return 9, name
        first = name.split("/")[0]
        if first in SELDOM_TELLING:
            return 8, name
        return {"val": 0, "scores": 0.5, "loss": 1, "fake_score": 1, "monitor": 2, "grad_norm": 3}.get(first, 4), name

    return sorted(names - ends, key=rank)


def _numbers(values: np.ndarray) -> list[float | None]:
    """Values [N] with five digits for JSON; None for those that are not finite."""
    known = np.isfinite(values)
    size = np.abs(np.where(known & (values != 0), values, 1.0))
    scale = 10.0 ** (4 - np.floor(np.log10(size)))
    plain = np.where(known, np.round(np.where(known, values, 0) * scale) / scale, 0)
    listed: list[float | None] = plain.tolist()
    return listed if known.all() else [value if ok else None for value, ok in zip(listed, known.tolist(), strict=True)]


def _rounded(value: Any) -> Any:
    """Plain values for JSON: five digits, no NaN."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 1e15 else float(f"{value:.5g}")
    return value
