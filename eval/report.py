"""A table of scores as text, JSON and pictures: one column per set of clips, bounds first."""

import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.scores import ROWS, ClipScore, Scores
from eval.stats import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMAT = "magihuman-scores/1"
ARROWS = {"up": "+", "down": "-", "": " "}  # which way is better
# Panels of the picture: rows of the table with a common scale.
PANELS = (
    ("attributes", "face", "hair", "shirt", "wall"),
    ("vowels", "vowels_exact", "words_exact", "syllable_error"),
    ("sync_r", "sync_other", "sync_skill", "sync_retrieval"),
    ("sharpness", "mouth_sharpness", "amplitude"),
)


@dataclass(frozen=True)
class Column:
    """Scores of one set of clips under a name, with facts about how they were made (seconds, settings)."""

    name: str
    scores: Scores
    facts: Mapping[str, Any] = field(default_factory=dict)


def cell(measure: Measure) -> str:
    """ "0.953 [0.921, 0.978]", or why there is nothing."""
    if measure.value is None:
        return "n/a"
    digits = 3 if max(abs(measure.value), 0.01) >= 0.1 else 4
    low, high = (measure.value if end is None else end for end in (measure.low, measure.high))
    return f"{measure.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def table_lines(columns: Sequence[Column]) -> list[list[str]]:
    """Header and body of the table as cells; the last two say which way is better and what a row is."""
    lines = [
        ["", *(f"{c.name} (n={len(c.scores.clips)})" for c in columns), "", "(+ higher, - lower is better)"]
    ]
    for name, (about, better) in ROWS.items():
        lines.append([name, *(cell(c.scores.table[name]) for c in columns), ARROWS[better], about])
    skins = [" ".join(f"{k} {v}" for k, v in c.scores.skins.items()) for c in columns]
    skins = [f"{s}, p={c.scores.skin_p:.2g}" for s, c in zip(skins, columns, strict=True)]
    return [*lines, ["skin tones", *skins, " ", "not prompted; p that they come from equal shares"]]


def text(columns: Sequence[Column]) -> str:
    """The table for a terminal, with the reasons for what is missing."""
    lines = table_lines(columns)
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    rows = [
        "  ".join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    reasons = {
        m.reason: f"{c.name}: {name}"
        for c in columns
        for name, m in c.scores.table.items()
        if m.value is None
    }
    return "\n".join(
        [*rows, *(f"n/a for {where} and others like it: {why}" for why, where in reasons.items())]
    )


def markdown(columns: Sequence[Column]) -> str:
    """The table as Markdown."""
    lines = ["| " + " | ".join(line) + " |" for line in table_lines(columns)]
    return "\n".join([lines[0], "|" + "---|" * len(table_lines(columns)[0]), *lines[1:]])


def folder_for(what: str, *names: str) -> Path:
    """Where results go by default: `what` in a run folder, else runs/`what` under the names of what was measured."""
    if len(names) == 1 and (Path(names[0]) / "export").is_dir():
        return Path(names[0]) / what
    return Path("runs") / what / "+".join(name.strip("./").replace("/", "-") for name in names)[:100]


def provenance() -> dict[str, Any]:
    """Command, commit, machine, date and versions, so that a figure can be made again."""
    import torch

    from magihuman.io.provenance import processor
    from magihuman.training.runs import code_version

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "code": code_version(),
        "machine": device,
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
        "libraries": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def write(columns: Sequence[Column], output: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write scores.json (the return value), scores.md, scores.png and clips.json into `output`."""
    output.mkdir(parents=True, exist_ok=True)
    report = {
        "format": FORMAT,
        **facts,
        "columns": {c.name: {**c.facts, **c.scores.to_dict()} for c in columns},
        "rows": {name: {"about": about, "better": better} for name, (about, better) in ROWS.items()},
        "provenance": provenance(),
    }
    clips = {c.name: [clip.to_dict() for clip in c.scores.clips] for c in columns}
    for name, values in (("scores.json", report), ("clips.json", clips)):
        (output / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    (output / "scores.md").write_text(markdown(columns) + "\n", encoding="utf-8")
    bars(columns).savefig(output / "scores.png", dpi=110)
    return report


def bars(columns: Sequence[Column]) -> "Figure":
    """The table's main rows as bars with their intervals, one colour per set of clips."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(PANELS), 4.4), layout="constrained")
    width = 0.8 / len(columns)
    for axes, names in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for k, column in enumerate(columns):
            places, values, errors = [], [], []
            for place, name in enumerate(names):
                measure = column.scores.table[name]
                if measure.value is None or measure.low is None or measure.high is None:
                    continue
                places.append(place + (k - (len(columns) - 1) / 2) * width)
                values.append(measure.value)
                errors.append((measure.value - measure.low, measure.high - measure.value))
            if places:
                axes.bar(places, values, width * 0.92, label=column.name, color=f"C{k}")
                ends = np.maximum(np.array(errors).T, 0)
                axes.errorbar(places, values, ends, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        axes.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylim(0, 1.08)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=len(columns))
    figure.suptitle("Tiny world: measured beside its bounds (95 % intervals over clips)", fontsize=11)
    return figure


def _said_of(clip: ClipScore) -> str:
    """A clip's caption, what is heard, and what of its looks is not as the caption says."""
    parts = [clip.caption, f"heard: {' '.join(clip.heard.words) or 'nothing'}"]
    wrong = [f"{name} {clip.seen.attributes[name]}" for name, right in clip.right.items() if not right]
    return " | ".join([*parts, f"wrong: {', '.join(wrong)}"] if wrong else parts)


def contact_sheet(
    clips: Sequence[ClipScore], frames: Sequence[np.ndarray], title: str, pictures: int = 9
) -> "Figure":
    """A line per clip: its caption, `pictures` frames, the mouth that is seen and the mouth that is heard."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 1.75 * len(clips) + 0.5), layout="constrained")
    grid = figure.add_gridspec(len(clips), 2, width_ratios=(pictures, 4.2))
    for line, (clip, movie) in enumerate(zip(clips, frames, strict=True)):
        axes = figure.add_subplot(grid[line, 0])
        chosen = np.linspace(0, len(movie) - 1, pictures).round().astype(int)
        axes.imshow(np.concatenate(list(movie[chosen]), axis=1), aspect="equal")
        axes.axis("off")
        axes.set_title(_said_of(clip), fontsize=8, loc="left", pad=2)
        axes = figure.add_subplot(grid[line, 1])
        axes.plot(clip.seen.openness - clip.seen.openness.min(), color="C3", label="mouth seen")
        if clip.called is not None:
            axes.plot(clip.called, color="C0", label="mouth the voice calls for")
        agreement = clip.sync.status if clip.sync.r is None else f"r {clip.sync.r:.2f}, lag {clip.sync.lag}"
        axes.text(0.02, 0.86, agreement, transform=axes.transAxes, fontsize=7)
        axes.set_ylim(-0.004, 0.062)
        axes.tick_params(labelsize=6)
        axes.set_ylabel("opening", fontsize=6)
        if line == len(clips) - 1:
            axes.set_xlabel("frame", fontsize=6)
        if line == 0:
            axes.legend(fontsize=6, loc="upper right")
    figure.suptitle(title, fontsize=10)
    return figure
