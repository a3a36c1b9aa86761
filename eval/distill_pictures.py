"""Pictures of the comparison of `eval.dmd2`, the clips that go with them, and the page of a training run."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.tiny.puppets import FPS, SAMPLE_RATE
from eval.distill_report import ARROWS, markdown, seconds, short_cell
from eval.scores import ClipScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

COLOURS = {"truth": "0.6", "bound": "0.3", "teacher": "C0", "student": "C3"}
BASELINES = ("C1", "C2", "C4")
STUDENTS = ("C3", "C6", "C8", "C9", "C5")
ACROSS = 5  # panels side by side
# Of metrics.csv: panels of the page with the columns that they show; a pair is shown as a ratio.
CURVES: tuple[tuple[str, tuple[str | tuple[str, str, str], ...]], ...] = (
    ("matching gradient", ("dm/video", "dm/audio")),
    ("critic's loss", ("critic/video", "critic/audio")),
    (
        "critic's error / teacher's, on samples",
        (
            ("video", "critic_error/video", "teacher_error/video"),
            ("audio", "critic_error/audio", "teacher_error/audio"),
        ),
    ),
    (
        "student / teacher",
        ("health/std_video", "health/std_audio", "health/spread_video", "health/spread_audio"),
    ),
    ("gradient norms", ("grad_norm", "grad_norm/critic")),
)


@dataclass(frozen=True)
class Shown:
    """The clips of one column that are shown: frames uint8 [F,H,W,3], waves fp32 [N], and their scores."""

    name: str
    role: str
    frames: Sequence[np.ndarray]
    waves: Sequence[np.ndarray | None]
    scores: Sequence[ClipScore]


def colours(values: Mapping[str, Any]) -> dict[str, str]:
    """Column -> colour, the same in every picture."""
    baselines, students = iter(BASELINES * 9), iter(STUDENTS * 9)
    return {
        name: next(baselines)
        if column["role"] == "baseline"
        else next(students)
        if column["role"] == "student"
        else COLOURS[column["role"]]
        for name, column in values["columns"].items()
    }


def multiples(values: Mapping[str, Any]) -> "Figure":
    """A panel per row of the table: all columns with their intervals, the bound as a line."""
    from matplotlib.figure import Figure

    palette, rows = colours(values), values["rows"]
    down = -(-(len(rows) + 1) // ACROSS)
    figure = Figure(figsize=(3.1 * ACROSS, 2.15 * down + 0.7), layout="constrained")
    panels = figure.subplots(down, ACROSS).ravel()
    for axes, (name, row) in zip(panels, rows.items(), strict=False):
        for place, (title, column) in enumerate(values["columns"].items()):
            found = column["rows"][name]
            if found["value"] is None:
                continue
            ends = np.maximum([[found["value"] - found["low"]], [found["high"] - found["value"]]], 0)
            axes.errorbar(
                [place], [found["value"]], yerr=ends, fmt="o", ms=4, capsize=2, color=palette[title]
            )
            if column["role"] == "bound":
                axes.axhline(found["value"], color=palette[title], ls="--", lw=0.8)
        better = {"up": "more is better", "down": "less is better", "bound": "to meet the line"}[
            row["better"]
        ]
        axes.set_title(f"{name}\n{better}", fontsize=8)
        axes.set_xticks([])
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    _seconds(panels[len(rows)], values, palette)
    for axes in panels[len(rows) + 1 :]:
        axes.axis("off")
    _legend(figure, palette)
    figure.suptitle("Students beside their teacher: 95 % intervals over prompts", fontsize=11)
    return figure


def _seconds(axes: "Axes", values: Mapping[str, Any], palette: Mapping[str, str]) -> None:
    timed = {name: c["seconds_per_clip"] for name, c in values["columns"].items() if "seconds_per_clip" in c}
    axes.barh(list(timed), list(timed.values()), color=[palette[name] for name in timed])
    for place, value in enumerate(timed.values()):
        axes.text(value, place, f" {value:.3f}", va="center", fontsize=7)
    axes.set_title("seconds of denoising per clip\nless is better", fontsize=8)
    axes.set_xlim(0, 1.25 * max(timed.values()))
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.tick_params(labelsize=7)


def _legend(figure: "Figure | SubFigure", palette: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=c, label=name) for name, c in palette.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4)


def sheet(shown: Sequence[Shown], pictures: int = 9) -> "Figure":
    """Per prompt a strip of frames of every column, and the mouth that is seen beside the one that is heard."""
    from matplotlib.figure import Figure

    count = len(shown) * len(shown[0].frames)
    figure = Figure(figsize=(13.5, 1.32 * count + 0.5), layout="constrained")
    strips(figure, shown, pictures)
    return figure


def strips(
    figure: "Figure | SubFigure", shown: Sequence[Shown], pictures: int, prompts: int | None = None
) -> None:
    """Draw the strips of the first `prompts` prompts into a figure."""
    count = len(shown[0].frames) if prompts is None else min(prompts, len(shown[0].frames))
    grid = figure.add_gridspec(count * len(shown), 2, width_ratios=(pictures, 3))
    for prompt in range(count):
        for place, one in enumerate(shown):
            line, movie, score = prompt * len(shown) + place, one.frames[prompt], one.scores[prompt]
            axes = figure.add_subplot(grid[line, 0])
            chosen = np.linspace(0, len(movie) - 1, pictures).round().astype(int)
            axes.imshow(np.concatenate(list(movie[chosen]), axis=1), aspect="equal", interpolation="nearest")
            axes.axis("off")
            heard = " ".join(score.heard.words) or "nothing"
            caption = f"{score.caption}\n" if place == 0 else ""
            axes.set_title(f"{caption}{one.name} | heard: {heard}", fontsize=7, loc="left", pad=2)
            axes = figure.add_subplot(grid[line, 1])
            axes.plot(score.seen.openness - score.seen.openness.min(), color="C3", lw=1, label="mouth seen")
            if score.called is not None:
                axes.plot(score.called, color="C0", lw=1, label="mouth the voice calls for")
            axes.set_ylim(-0.004, 0.062)
            axes.set_xticks([])
            axes.tick_params(labelsize=5)
            if line == 0:
                axes.legend(fontsize=5, loc="upper right")


def page(metrics: Path, values: Mapping[str, Any], shown: Sequence[Shown], prompts: int = 3) -> "Figure":
    """One page of a run: its curves, the table in short, and clips of the teacher and the student."""
    from matplotlib.figure import Figure

    few = [one for one in shown if one.role in ("teacher", "student")]
    lines = min(prompts, len(shown[0].frames)) * len(few)
    heights = (2.6, 0.24 * (len(values["rows"]) + 3) + 0.7, 1.25 * lines + 0.4)
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    upper, middle, lower = parts
    curves(upper, metrics)
    table(middle.subplots(), values)
    strips(lower, few, 9, prompts)
    return figure


def curves(figure: "Figure | SubFigure", metrics: Path) -> None:
    """Losses and signals of health over the training."""
    from magihuman.training.report import read_metrics

    series = read_metrics(metrics)
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for name in names:
            points = _points(series, name)
            if points:
                label = name if isinstance(name, str) else name[0]
                marker = "." if len(points) < 20 else ""
                axes.plot(*zip(*points, strict=True), label=label, lw=1, marker=marker)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("cycle", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
        else:
            axes.text(
                0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes
            )


def _points(
    series: Mapping[str, Sequence[tuple[int, float]]], name: str | tuple[str, str, str]
) -> list[tuple[int, float]]:
    if isinstance(name, str):
        return list(series.get(name, ()))
    _, top, below = name
    under = dict(series.get(below, ()))
    return [(step, value / under[step]) for step, value in series.get(top, ()) if under.get(step)]


def table(axes: "Axes", values: Mapping[str, Any]) -> None:
    """The table without intervals; a student's cell is green or red where it differs from the full teacher's."""
    columns = values["columns"]
    teacher = next(name for name, c in columns.items() if c["role"] == "teacher")
    tints = {"better": "#cfe8cf", "worse": "#f3cdcd"}
    body, fills, labels = [], [], []
    for name, row in values["rows"].items():
        labels.append(f"{ARROWS[row['better']]}  {name}")
        body.append([short_cell(c["rows"][name]) for c in columns.values()])
        verdicts = [values["against"].get(c, {}).get(teacher, {}).get(name, {}) for c in columns]
        fills.append([tints.get(v.get("verdict", ""), "white") for v in verdicts])
    times = [seconds(values, c) for c in columns]
    labels += ["-  seconds per clip", "-  network calls"]
    body += [
        ["" if t is None else f"{t:.3f}" for t in times],
        [str(c.get("calls", "")) for c in columns.values()],
    ]
    fills += [["white"] * len(columns)] * 2
    axes.axis("off")
    drawn = axes.table(
        body, cellColours=fills, rowLabels=labels, cellLoc="center", loc="center",
        colLabels=[name.replace(", ", "\n", 1) for name in columns],
    )  # fmt: skip
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(8)
    drawn.scale(1, 1.15)
    for place in range(len(columns)):
        drawn[0, place].set_height(2 * drawn[1, 0].get_height())
    axes.set_title(
        f"students in green: better than {teacher}, in red: worse (95 % intervals over prompts); "
        "+ more is better, - less, = as the bound (through codec)", fontsize=8,
    )  # fmt: skip


def save_clips(shown: Sequence[Shown], folder: Path) -> list[Path]:
    """Write the teacher's and the students' clips as mp4, with their captions beside them."""
    from magihuman.media.mp4 import write_mp4

    saved = []
    for one in shown:
        if one.role not in ("teacher", "student"):
            continue
        name = one.name.split(",")[0].replace("student ", "").replace("/", "-").strip(".- ")
        for number, (frames, wave, score) in enumerate(zip(one.frames, one.waves, one.scores, strict=True)):
            path = folder / f"{name}-{number}.mp4"
            write_mp4(path, frames, FPS, None if wave is None else wave[None], SAMPLE_RATE)
            path.with_suffix(".txt").write_text(score.caption + "\n", encoding="utf-8")
            saved.append(path)
    return saved


def write_page(
    run: Path, folder: Path, values: Mapping[str, Any], shown: Sequence[Shown], saved: Sequence[Path]
) -> Path:
    """Write report.md and report.png into a run folder: the curves, the table, teacher and student side by side.

    Args:
        folder: of the comparison's own files; saved: its clips.
    """
    from magihuman.training.report import heading, sample_sheets

    page(run / "metrics.csv", values, shown).savefig(run / "report.png", dpi=90)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    links = [os.path.relpath(path, run) for path in saved]
    lines = [
        *heading(record),
        markdown(values),
        "",
        "![curves, table, clips](report.png)",
        "",
        f"Row by row: [compare.png]({os.path.relpath(folder / 'compare.png', run)}), all clips: "
        f"[sheet.png]({os.path.relpath(folder / 'sheet.png', run)}), all figures: "
        f"[compare.json]({os.path.relpath(folder / 'compare.json', run)}).",
        "",
        "Clips: " + ", ".join(f"[{Path(link).stem}]({link})" for link in links) + ".",
        "",
        *sample_sheets(run),
    ]
    (run / "report.md").write_text("\n".join(lines), encoding="utf-8")
    return run / "report.md"
