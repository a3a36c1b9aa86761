"""Figures of scored clips: distributions per metric, and paired differences.

score_panels({"clips": rows}, summaries).savefig("summary.png")
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.clip_tables import CLIP_COLUMNS
from eval.metrics.registry import metrics
from eval.score_rows import ClipRow

COLOURS = {"clips": "tab:blue", "bound": "tab:orange", "reference": "tab:green"}
BINS = 24


def score_panels(
    columns: Mapping[str, Sequence[ClipRow]], summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Figure:
    """A panel per metric: the distribution over clips of every column, with the average and its interval above it."""
    first = next(iter(summaries.values()))
    keys = [key for key in metrics() if first.get(key, {}).get("value") is not None]
    across = min(4, max(1, len(keys)))
    down = max(1, math.ceil(len(keys) / across))
    figure = Figure(figsize=(3.6 * across, 2.3 * down + 0.5), layout="constrained")
    for number, key in enumerate(keys):
        axes = figure.add_subplot(down, across, number + 1)
        values = {name: _values(rows, key) for name, rows in columns.items()}
        known = np.concatenate(list(values.values()))
        if len(known):
            span = (float(known.min()), float(known.max()))
            edges = list(np.linspace(*(span if span[0] < span[1] else (span[0] - 0.5, span[1] + 0.5)), BINS + 1))
            for name, found in values.items():
                if len(found):
                    share = np.full(len(found), 1 / len(found))
                    axes.hist(found, edges, weights=share, alpha=0.45, color=COLOURS.get(name, "grey"))
        top = axes.get_ylim()[1]
        for level, name in enumerate(columns):
            measure = summaries.get(name, {}).get(key)
            if measure is None or measure.get("value") is None:
                continue
            place, colour = top * (1.08 + 0.1 * level), COLOURS.get(name, "grey")
            axes.plot([measure["value"]], [place], "o", color=colour, ms=4)
            if measure.get("low") is not None:
                axes.plot([measure["low"], measure["high"]], [place, place], color=colour, lw=1.5)
        axes.set_title(_wrapped(metrics()[key].heading), fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
    if len(columns) > 1:
        from matplotlib.patches import Patch

        handles = [Patch(color=COLOURS.get(name, "grey"), label=CLIP_COLUMNS.get(name, name)) for name in columns]
        figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles))
    return figure


def difference_points(found: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Paired differences with intervals, each in units of its interval's half width, so that all metrics share an axis."""
    shown = {key: entry for key, entry in found.items() if entry["verdict"] != "not compared"}
    colours = {"better": "tab:green", "worse": "tab:red", "different": "tab:purple", "undecided": "tab:grey"}
    figure = Figure(figsize=(7.5, 1.3 + 0.27 * max(1, len(shown))), layout="constrained")
    axes = figure.add_subplot()
    for place, entry in enumerate(reversed(shown.values())):
        half = (entry["high"] - entry["low"]) / 2 or 1.0
        value, low, high = (entry[name] / half for name in ("change", "low", "high"))
        limit = 6.0
        axes.plot(np.clip([low, high], -limit, limit), [place, place], color=colours[entry["verdict"]], lw=1.5)
        axes.plot([np.clip(value, -limit, limit)], [place], "o", color=colours[entry["verdict"]], ms=4)
    axes.axvline(0, color="black", lw=0.8)
    axes.set_yticks(range(len(shown)), [metrics()[key].heading for key in reversed(shown)], fontsize=7)
    axes.set_xlabel("difference / half of its 95 % interval, cut at 6; the colour is the verdict", fontsize=8)
    axes.set_title(title, fontsize=9)
    handles = [axes.plot([], [], "o", color=colour, label=word)[0] for word, colour in colours.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=len(handles))
    return figure


def _values(rows: Sequence[ClipRow], key: str) -> np.ndarray:
    values = (row.values[key].value for row in rows if key in row.values)
    return np.array([value for value in values if value is not None], float)


def _wrapped(text: str, width: int = 42) -> str:
    import textwrap

    text = re.sub(r" (?=[↑↓=]$)", "\u00a0", text)  # the sign of the direction stays with the last word
    return "\n".join(textwrap.wrap(text, width))
