"""The comparison as CSV, Markdown and a picture of the curves, for mails, papers and machines."""

import csv
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.compare_runs.run_page import SHOWN_CURVES, ComparedRuns, TableColumn, curve_order
from eval.compare_runs.run_records import RunRecord, Series, thin
from eval.formatting import format_interval
from eval.metrics.registry import SIGNS
from magihuman.io.files import write_atomically
from magihuman.io.markdown import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARKS = {"better": "▲", "worse": "▼", "within noise": "≈", "": ""}
NAMED_CURVES = 10
"""Runs whose curves have a colour and a name; those of others are grey."""


def order(found: ComparedRuns) -> list[int]:
    """Numbers of the runs as the table shows them: by the sweep's metric where there is one, runs without it last."""
    numbers = list(range(len(found.runs)))
    if found.sort is None:
        return numbers
    key, down = found.sort

    def place(number: int) -> tuple[bool, float]:
        value = found.cells[number].get(key)
        value = value["value"] if isinstance(value, dict) else value
        if not isinstance(value, int | float) or not np.isfinite(value):
            return True, 0.0
        return False, -float(value) if down else float(value)

    return sorted(numbers, key=place)


def _difference(found: ComparedRuns, run: int, column: TableColumn) -> dict[str, Any] | None:
    return found.differences.get(found.baseline, {}).get(run, {}).get(column.key)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def csv_text(found: ComparedRuns) -> str:
    """All columns: of a score the value, the ends of its interval, and its paired difference from the baseline."""
    heads = ["run", "place", "status", "reason"]
    for column in found.columns:
        parts = [""]
        if column.group == "scores":
            parts += [" low", " high", " difference", " difference low", " difference high", " prompts", " verdict"]
        heads += [f"{column.key.partition(':')[2] or column.label}{part}".strip() for part in parts]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(heads)
    for number in order(found):
        run, cells = found.runs[number], found.cells[number]
        row = [run.name, run.place, run.status, run.reason]
        for column in found.columns:
            value = cells.get(column.key)
            if column.group != "scores":
                row.append(_text(value))
                continue
            other = _difference(found, number, column) or {}
            row += [_text((value or {}).get(key)) for key in ("value", "low", "high")]
            row += [_text(other.get(key)) for key in ("value", "low", "high", "n", "verdict")]
        writer.writerow([_inert(cell) for cell in row])
    return stream.getvalue()


def _inert(text: str) -> str:
    """A cell that a spreadsheet does not take for a formula."""
    number = re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?|-inf", text)
    return f"'{text}" if re.match(r"[=+@\t\r-]", text) and not number else text


def table_rows(found: ComparedRuns, columns: list[TableColumn] | None = None) -> list[list[str]]:
    """Heading and rows with the columns that the page shows at first, or with `columns`."""
    columns = [column for column in found.columns if column.shown] if columns is None else columns
    heads = ["run", "status", *(f"{column.label} {SIGNS.get(column.direction, '')}".strip() for column in columns)]
    rows = [heads]
    for number in order(found):
        run = found.runs[number]
        shown = [f"{run.name}{' (baseline)' if number == found.baseline else ''}", run.status]
        for column in columns:
            value = found.cells[number].get(column.key)
            cell = format_interval(value) if isinstance(value, dict) else _text(value)
            if (other := _difference(found, number, column)) is not None:
                change = format_interval(other, signed=True)
                cell += f"; {MARKS[other['verdict']]} {change}".rstrip()
            shown.append(cell)
        rows.append(shown)
    return rows


def markdown_text(found: ComparedRuns) -> str:
    """The page's first table, and what is wrong with runs."""
    rows = [[_escaped(cell) for cell in row] for row in table_rows(found)]
    lines = [f"# {_escaped(found.title)}", "", f"{found.counts}.", "", table(rows[0], rows[1:]), ""]
    if found.differences.get(found.baseline):
        name = _escaped(found.runs[found.baseline].name)
        lines += [
            f"Behind a score: its paired difference from {name} on shared prompts; ▲ better, ▼ worse, ≈ within noise.",
            "",
        ]
    for run in found.runs:
        if run.reason:
            lines.append(f"- {_escaped(run.name)}, {run.status}: {_escaped(run.reason)}")
    return "\n".join(lines).rstrip() + "\n"


def _escaped(text: str) -> str:
    """Text of a run as text of one line: no table cell, emphasis, code, HTML or link."""
    return re.sub(r"([\\`*_<>|#&]|\](?=[(:\[]))", r"\\\1", " ".join(text.split()))


def curves_figure(found: ComparedRuns) -> "Figure":
    """The page's first curves, over steps above and over device-hours below; the first runs with colours and names."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    metrics = [m for m in curve_order({m for run in found.runs for m in run.metrics}) if m != "seconds"][:SHOWN_CURVES]
    timed = any(run.seconds for run in found.runs)
    rows, columns = (2 if timed else 1), max(1, len(metrics))
    width, height = 3.4 * columns, 2.9 * rows + 0.8
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(rows, columns, squeeze=False)
    # In inches; a layout that measures all texts takes longer than everything else here.
    edges = {"left": 0.5 / width, "right": 1 - 0.15 / width, "bottom": 1.05 / height, "top": 1 - 0.3 / height}
    figure.subplots_adjust(**edges, wspace=0.22, hspace=0.42)
    named = [number for number in order(found) if found.runs[number].metrics][:NAMED_CURVES]
    if found.baseline not in named and found.runs[found.baseline].metrics:
        named[-1:] = [found.baseline]
    rest = [number for number in range(len(found.runs)) if number not in named]
    unit = next(column.label for column in found.columns if column.key == "hours")
    for row, label in enumerate(("step", unit)[:rows]):
        for axes, metric in zip(panels[row], metrics, strict=False):
            lines = {number: _line(run, metric, row == 1) for number, run in enumerate(found.runs)}
            grey = [np.column_stack(lines[n]) for n in rest if lines[n] is not None]  # type: ignore[arg-type]
            axes.add_collection(LineCollection(grey, colors="0.8", linewidths=0.7, zorder=1))  # one artist is fast
            for place, number in enumerate(named):
                if (line := lines[number]) is not None:
                    axes.plot(*line, linewidth=2 if number == found.baseline else 1, color=f"C{place}")
            axes.autoscale_view()
            axes.set_title(metric, fontsize=9)
            axes.set_xlabel(label, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    if not metrics:
        panels[0, 0].text(0.5, 0.5, "no run has curves", ha="center", va="center")
    elif named:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], color=f"C{k}", label=found.runs[n].name.replace("$", r"\$")) for k, n in enumerate(named)
        ]
        figure.legend(handles=handles, fontsize=8, loc="lower center", ncols=min(5, len(handles)))
    return figure


def _line(run: RunRecord, metric: str, timed: bool) -> Series | None:
    """A thinned curve, over steps or over device-hours."""
    if metric not in run.metrics:
        return None
    series = thin(run.metrics[metric], 400)
    if not timed:
        return series
    clock = run.metrics.get("seconds")
    if clock is None:
        return None
    steps, seconds = np.r_[0, clock.steps], np.r_[0, clock.values]
    return Series(np.interp(series.steps, steps, seconds) * run.devices / 3600, series.values)


def write_tables(folder: Path, found: ComparedRuns) -> None:
    """Write table.csv, table.md and curves.png."""
    write_atomically(folder / "table.csv", csv_text(found).encode("utf-8", "replace"))
    write_atomically(folder / "table.md", markdown_text(found).encode("utf-8", "replace"))
    curves_figure(found).savefig(folder / "curves.png", dpi=100)
