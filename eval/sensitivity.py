"""Sensitivity of metrics: planted faults against all metrics, as a matrix that shows the blind spots.

    values = matrix(clean, {"hiss": [weak, strong]}, metrics)     # each a list of {key: value} per clip
    figure(values).savefig("sensitivity.png")

The functions know nothing of the clips' origin.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from eval import stats
from eval.faults import FAULTS, Fault
from eval.metrics.registry import Metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "magihuman-sensitivity/1"
SMALLEST_EFFECT = 0.2
"""Change below which a fault counts as unseen, in standard deviations of the clean clips."""
LARGEST_EFFECT = 99.0
"""Reported for larger effects, as of metrics that are equal for all clean clips."""
FEWEST_CLIPS = 3

ClipValues = Mapping[str, float | None]
"""Values of one clip by metric; None, or absent, where the metric gives none."""


# ---- The matrix ----


def matrix(
    clean: Sequence[ClipValues],
    faulty: Mapping[str, Sequence[Sequence[ClipValues]]],
    metrics: Mapping[str, Metric],
    faults: Mapping[str, Fault] = FAULTS,
) -> dict[str, Any]:
    """How each metric answers to each fault.

    Args:
        clean: values of every clip without a fault.
        faulty: fault -> for each of its strengths, weak to strong, the values of the same clips in the same order.

    Returns:
        Content of a result file: {"format", "clips", "faults": {name: {"label", "unit", "strengths"}}, "metrics": {key:
        {"title", "direction", "claims", "clean": {"mean", "sd"}, "faults": {name: cell}}}}; a cell is as `cell` returns it.

    Raises:
        ValueError: other numbers of clips or of strengths than expected.
    """
    for name, sets in faulty.items():
        if len(sets) != len(faults[name].strengths) or any(len(found) != len(clean) for found in sets):
            raise ValueError(f"{name}: expected {len(faults[name].strengths)} strengths of {len(clean)} clips each")
    rows = {}
    for key, metric in metrics.items():
        column = _column(clean, key)
        known = column[np.isfinite(column)]
        if not len(known) and not any(np.isfinite(_column(s, key)).any() for sets in faulty.values() for s in sets):
            continue
        spread = float(known.std(ddof=1)) if len(known) > 1 else 0.0
        rows[key] = {
            "title": metric.title,
            "direction": metric.direction,
            "claims": [name for name in metric.sees if name in faulty],
            "clean": {"mean": float(known.mean()) if len(known) else None, "sd": spread, "n": len(known)},
            "faults": {name: cell(metric, column, [_column(s, key) for s in sets]) for name, sets in faulty.items()},
        }
    described = {
        name: {"label": faults[name].label, "unit": faults[name].unit, "strengths": list(faults[name].strengths)}
        for name in faulty
    }
    return {"format": FORMAT, "clips": len(clean), "faults": described, "metrics": rows}


def _column(clips: Sequence[ClipValues], key: str) -> np.ndarray:
    return np.array([np.nan if (value := clip.get(key)) is None else value for clip in clips], float)


def cell(metric: Metric, clean: np.ndarray, faulty: Sequence[np.ndarray]) -> dict[str, Any]:
    """Answer of one metric to one fault.

    Worse is: lower (up), higher (down), farther from the number (target with a number), farther from the clean clip in the
    direction of the strongest fault (the rest).

    Args:
        clean: [clips], nan where there is no value; faulty: the same for every strength.

    Returns:
        "verdict": "ordered" (worse at the strongest, and with every step), "seen" (worse at the strongest only), "reversed"
        (better at the strongest), "blind", or "no value" (fewer than `FEWEST_CLIPS` clips have one); "effect": mean change
        to the worse at the strongest, in standard deviations of the clean clips; "low", "high": its 95 % interval over
        clips; "means": of the clean clips and of every strength; "n": clips with all values.
    """
    values = np.stack([clean, *faulty])
    values = values[:, np.isfinite(values).all(0)]
    n = values.shape[1]
    if n < FEWEST_CLIPS:
        return {"verdict": "no value", "effect": None, "low": None, "high": None, "means": None, "n": n}
    if metric.direction == "target" and metric.target is not None:
        worse = np.abs(values - metric.target)
    else:
        worse = values if metric.direction == "down" else -values
    change = worse[1:] - worse[0]
    if metric.direction == "" or (metric.direction == "target" and metric.target is None):
        change = change * (np.sign(change[-1].mean()) or 1.0)
    known = clean[np.isfinite(clean)]
    scale = max(float(known.std(ddof=1)), 1e-3 * abs(float(known.mean())), 1e-9)
    measure = stats.mean(change[-1] / scale)
    effect, low, high = (float(np.clip(x, -LARGEST_EFFECT, LARGEST_EFFECT)) for x in _ends(measure))
    rising = bool((np.diff(np.concatenate([[0.0], change.mean(1)])) > 0).all())
    if effect >= SMALLEST_EFFECT and low > 0:
        verdict = "ordered" if rising else "seen"
    else:
        verdict = "reversed" if effect <= -SMALLEST_EFFECT and high < 0 else "blind"
    return {
        "verdict": verdict, "effect": effect, "low": low, "high": high,
        "means": [float(x) for x in values.mean(1)], "n": n,
    }  # fmt: skip


def _ends(measure: stats.Measure) -> tuple[float, float, float]:
    assert measure.value is not None
    assert measure.low is not None
    assert measure.high is not None
    return measure.value, measure.low, measure.high


def broken_claims(values: Mapping[str, Any]) -> list[str]:
    """Claims of metrics that a matrix does not confirm: "flicker does not order blur: seen"."""
    return [
        f"{key} does not order {fault}: {row['faults'][fault]['verdict']}"
        for key, row in values["metrics"].items()
        for fault in row["claims"]
        if row["faults"][fault]["verdict"] != "ordered"
    ]


def blind_spots(values: Mapping[str, Any]) -> list[str]:
    """Faults that no metric orders."""
    return [
        fault
        for fault in values["faults"]
        if not any(row["faults"][fault]["verdict"] == "ordered" for row in values["metrics"].values())
    ]


# ---- Figure ----

COLOURS = {"ordered": "#3b8f5a", "seen": "#a8d5a2", "reversed": "#e8a13a", "blind": "#f1f1f1", "no value": "#ffffff"}
MEANINGS = {
    "ordered": "seen, strengths ordered",
    "seen": "seen, not ordered",
    "reversed": "called better",
    "blind": "blind",
    "no value": "no value (skipped with a reason)",
}


def figure(values: Mapping[str, Any]) -> "Figure":
    """The matrix as a picture: a row per metric, a column per fault, in the cells the effect; claims have a frame."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    faults, rows = values["faults"], values["metrics"]
    drawn = Figure(figsize=(3.6 + 0.46 * len(faults), 2.2 + 0.27 * len(rows)), layout="constrained")
    axes = drawn.add_subplot()
    for down, row in enumerate(rows.values()):
        for right, fault in enumerate(faults):
            found = row["faults"][fault]
            claimed = fault in row["claims"]
            axes.add_patch(
                Rectangle((right - 0.5, down - 0.5), 1, 1, fc=COLOURS[found["verdict"]], ec="#d0d0d0", lw=0.5)
            )
            if claimed:
                axes.add_patch(
                    Rectangle((right - 0.46, down - 0.45), 0.92, 0.9, fill=False, ec="black", lw=1.4, zorder=3)
                )
            if found["verdict"] in ("ordered", "seen", "reversed"):
                size = found["effect"]
                shown = f"{size:.0f}" if abs(size) >= 9.95 else f"{size:.1f}"
                dark = found["verdict"] == "ordered"
                axes.text(right, down, shown, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xlim(-0.5, len(faults) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    labels = [f"{fault['label']}" for fault in faults.values()]
    axes.set_xticks(range(len(faults)), labels, rotation=55, ha="left", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(rows)), [row["title"] for row in rows.values()], fontsize=8)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    for side in axes.spines.values():
        side.set_visible(False)
    handles = [Patch(fc=colour, ec="#b0b0b0", label=MEANINGS[name]) for name, colour in COLOURS.items()]
    handles.append(Patch(fc="white", ec="black", lw=1.4, label="the metric claims to see it"))
    drawn.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    axes.set_xlabel(
        f"Numbers: change to the worse at the strongest fault, in standard deviations of {values['clips']} clean clips",
        fontsize=8,
    )
    return drawn
