"""Figures of the evaluation: bars and points with intervals, curves, contact sheets. Numbers come from result files.

figures.score_bars(json.loads(Path("scores.json").read_text())).savefig("scores.png")
"""

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from eval.formatting import Values
from eval.metrics.registry import metrics
from eval.puppet_tables import DECODER_KEYS, SR_COLUMNS, ablation_intervals, ablation_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

    from eval.clips import SheetColumn
    from eval.puppet_scores import ClipScore

# ---- Shared parts ----


def _interval(axes: "Axes", place: float, measure: Values, bar: float | None = None, **style: Any) -> None:
    """A value with its interval at `place`, as a point or as a bar of width `bar`; nothing without a value."""
    if measure["value"] is None or measure["low"] is None:
        return
    value = measure["value"]
    ends = np.maximum([[value - measure["low"]], [measure["high"] - value]], 0)
    if bar is None:
        axes.errorbar([place], [value], yerr=ends, fmt="o", ms=4, capsize=2, **style)
    else:
        axes.bar([place], [value], bar, yerr=ends, capsize=2, error_kw={"elinewidth": 1}, **style)


def _legend(figure: "Figure | SubFigure", colours: Mapping[str, str], columns: int = 4) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=name) for name, colour in colours.items()]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=min(columns, len(handles)))


def _legend_below(axes: "Axes") -> None:
    """The legend of one panel below it, where it hides no point."""
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, frameon=False)


def _wrapped(title: str, width: int) -> str:
    """A title in lines of at most so many characters."""
    return "\n".join(line for part in title.split("\n") for line in textwrap.wrap(part, width))


def _frame_row(axes: "Axes", frames: Iterable[np.ndarray], label: str = "", title: str = "") -> None:
    """Frames uint8 [H,W,3] next to each other."""
    axes.imshow(np.concatenate(list(frames), axis=1), aspect="equal", interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_frame_on(False)
    axes.set_ylabel(label, fontsize=8)
    axes.set_title(title, fontsize=7, loc="left", pad=2)


def _evenly(clip: np.ndarray, count: int) -> np.ndarray:
    """`count` frames of a clip [F,H,W,3], evenly over its time."""
    return clip[np.linspace(0, len(clip) - 1, count).round().astype(int)]


# ---- eval.puppets ----

# Panels: metrics with a common scale.
PANELS = (
    ("attributes", "face", "hair", "shirt", "wall"),
    ("vowels", "vowels_exact", "words_exact", "syllable_error"),
    ("sync_r", "sync_other", "sync_skill", "sync_retrieval"),
    ("sharpness", "mouth_sharpness", "amplitude"),
)


def score_bars(values: Values) -> Figure:
    """Main metrics of a scores.json as bars with their intervals, a colour per set of clips."""
    columns = values["columns"]
    figure = Figure(figsize=(4.2 * len(PANELS), 4.4), layout="constrained")
    width = 0.8 / len(columns)
    for axes, keys in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for number, column in enumerate(columns.values()):
            for place, key in enumerate(keys):
                shift = (number - (len(columns) - 1) / 2) * width
                _interval(axes, place + shift, column["table"][key], 0.92 * width, color=f"C{number}")
        axes.set_xticks(range(len(keys)), [key.replace("_", "\n") for key in keys], fontsize=8)
        axes.axhline(0, color="black", linewidth=0.6)
        axes.grid(axis="y", alpha=0.3)
    figure.axes[0].set_ylim(0, 1.08)
    _legend(figure, {name: f"C{number}" for number, name in enumerate(columns)})
    figure.suptitle("Puppets: clips and their upper bounds (95 % intervals over clips)", fontsize=11)
    return figure


# ---- Contact sheets of eval.puppets and eval.dmd2 ----


def contact_sheet(shown: Sequence["SheetColumn"]) -> Figure:
    """Per prompt nine frames of every column, and curves of the mouth opening: visible, and called for by the audio."""
    figure = Figure(figsize=(13.5, 1.4 * len(shown) * len(shown[0].scores) + 0.5), layout="constrained")
    _clip_rows(figure, shown)
    return figure


def _clip_rows(figure: "Figure | SubFigure", shown: Sequence["SheetColumn"], prompts: int | None = None) -> None:
    """Rows of a contact sheet, of the first `prompts` prompts only where that is given."""
    count = len(shown[0].scores[:prompts])
    grid = figure.add_gridspec(count * len(shown), 2, width_ratios=(9, 3))
    for prompt in range(count):
        for place, column in enumerate(shown):
            line, score = prompt * len(shown) + place, column.scores[prompt]
            axes = figure.add_subplot(grid[line, 0])
            caption = f"{score.caption}\n" if place == 0 else ""
            words = " ".join(score.speech.words) or "nothing"
            wrong = ", ".join(f"{k} {score.shown[k]}" for k, right in score.right.items() if not right)
            title = f"{caption}{column.name} | recognised: {words}" + (f" | wrong: {wrong}" if wrong else "")
            _frame_row(axes, _evenly(column.clips.frames[prompt], 9), title=title)
            axes = figure.add_subplot(grid[line, 1])
            _mouth_curves(axes, score, legend=line == 0, last=line == count * len(shown) - 1)


def _mouth_curves(axes: "Axes", score: "ClipScore", legend: bool, last: bool) -> None:
    """Mouth opening over the frames: the visible one, and the one that the audio calls for."""
    axes.plot(score.vision.openness - score.vision.openness.min(), color="C3", lw=1, label="visible mouth")
    if score.called is not None:
        axes.plot(score.called, color="C0", lw=1, label="mouth that the audio calls for")
    agreement = score.sync.status if score.sync.r is None else f"r {score.sync.r:.2f}, lag {score.sync.lag}"
    axes.text(0.02, 0.84, agreement, transform=axes.transAxes, fontsize=6)
    axes.set_ylim(-0.004, 0.062)
    axes.tick_params(labelsize=5)
    axes.set_ylabel("opening", fontsize=6)
    if last:
        axes.set_xlabel("frame", fontsize=6)
    else:
        axes.set_xticks([])
    if legend:
        axes.legend(fontsize=5, loc="upper right")


# ---- eval.dmd2 ----

COLOURS = {"truth": "0.6", "bound": "0.3", "teacher": "C0"}
BASELINES = ("C1", "C2", "C4")
STUDENTS = ("C3", "C6", "C8", "C9", "C5")
ACROSS = 5  # panels side by side
# Panels of a run's page: columns of metrics.csv, and "video", "audio": ratios of errors.
CURVES = (
    ("matching gradient", ("dm/video", "dm/audio")),
    ("fake score: loss", ("fake_score/video", "fake_score/audio")),
    ("error on samples, fake score / teacher", ("video", "audio")),
    (
        "collapse monitor: student / teacher",
        ("monitor/std_video", "monitor/std_audio", "monitor/diversity_video", "monitor/diversity_audio"),
    ),
    ("gradient norms", ("grad_norm", "grad_norm/fake_score")),
)
# Names in metrics.csv before version 0.2.
OLD_NAMES = (("critic", "fake_score"), ("health/spread", "monitor/diversity"), ("health/", "monitor/"))


def _colours(values: Values) -> dict[str, str]:
    """Colour of every column, the same in every figure."""
    palettes = {"baseline": iter(BASELINES * 9), "student": iter(STUDENTS * 9)}
    roles = {name: column["role"] for name, column in values["columns"].items()}
    return {name: COLOURS.get(role) or next(palettes[role]) for name, role in roles.items()}


def comparison_points(values: Values) -> Figure:
    """A panel per metric of a compare.json: all columns with their intervals, the codec bound as a line."""
    palette = _colours(values)
    keys = list(next(iter(values["columns"].values()))["rows"])
    down = -(-(len(keys) + 1) // ACROSS)
    figure = Figure(figsize=(3.1 * ACROSS, 2.15 * down + 0.7), layout="constrained")
    panels = figure.subplots(down, ACROSS).ravel()
    for axes, key in zip(panels, keys, strict=False):
        for place, (name, column) in enumerate(values["columns"].items()):
            measure = column["rows"][key]
            _interval(axes, place, measure, color=palette[name])
            if column["role"] == "bound" and measure["value"] is not None:
                axes.axhline(measure["value"], color=palette[name], ls="--", lw=0.8)
        axes.set_title(f"{key}\n{metrics()[key].better}", fontsize=8)
        axes.set_xticks([])
        axes.tick_params(labelsize=7)
        axes.grid(axis="y", alpha=0.3)
    _time_bars(panels[len(keys)], values, palette)
    for axes in panels[len(keys) + 1 :]:
        axes.axis("off")
    _legend(figure, palette)
    figure.suptitle("Students, their teacher and bounds (95 % intervals over prompts)", fontsize=11)
    return figure


def _time_bars(axes: "Axes", values: Values, palette: Mapping[str, str]) -> None:
    timed = {name: c["seconds_per_clip"] for name, c in values["columns"].items() if "seconds_per_clip" in c}
    axes.barh(list(timed), list(timed.values()), color=[palette[name] for name in timed])
    for place, value in enumerate(timed.values()):
        axes.text(value, place, f" {value:.3f}", va="center", fontsize=7)
    axes.set_title("seconds of denoising per clip\nlower is better", fontsize=8)
    axes.set_xlim(0, 1.25 * max(timed.values()))
    axes.invert_yaxis()
    axes.set_yticks([])
    axes.tick_params(labelsize=7)


def run_page(metrics: Path, shown: Sequence["SheetColumn"]) -> Figure:
    """One page of a distillation run: training curves, and clips of teacher and student."""
    few = [column for column in shown if column.role in ("teacher", "student")]
    lines = min(3, len(shown[0].scores)) * len(few)
    heights = (3.1, 1.25 * lines + 0.4)
    figure = Figure(figsize=(15, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)
    _training_curves(parts[0], metrics)
    _clip_rows(parts[1], few, prompts=3)
    return figure


def _training_curves(figure: "Figure | SubFigure", metrics: Path) -> None:
    """Losses and the collapse monitor's signals over the training."""
    from magihuman.training.report import read_metrics

    series = {}
    for column, points in read_metrics(metrics).items():
        for old, new in OLD_NAMES:
            column = column.replace(old, new)
        series[column] = points
    for kind in ("video", "audio"):
        teacher, own = dict(series.get(f"teacher_error/{kind}", ())), series.get(f"fake_score_error/{kind}", ())
        series[kind] = [(step, error / teacher[step]) for step, error in own if teacher.get(step)]
    for axes, (title, names) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        for name in names:
            if curve := series.get(name):
                axes.plot(*zip(*curve, strict=True), label=name, lw=1, marker="." if len(curve) < 20 else "")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
        if axes.lines:
            _legend_below(axes)
        else:
            axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes)


# ---- eval.sr ----


def _sr_panels(
    keys: Sequence[str],
    curves: Mapping[str, Sequence[Values]],
    places: Sequence[float],
    ticks: Sequence[str],
    label: str,
) -> Figure:
    """A panel per metric; a curve per label over the columns of a result file."""
    figure = Figure(figsize=(4.2 * len(keys), 3.8), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys)), keys, strict=True):
        for name, columns in curves.items():
            found = [column[key] for column in columns]
            ends = np.array([[f["value"] - f["low"], f["high"] - f["value"]] for f in found]).T
            value = [f["value"] for f in found]
            axes.errorbar(places, value, yerr=np.maximum(ends, 0), marker="o", capsize=3, label=name)
        axes.set_xticks(places, ticks)
        axes.set_xlabel(label)
        axes.set_ylabel(_wrapped(metrics()[key].title, 38), fontsize=8)
        axes.grid(alpha=0.3)
    return figure


def sr_steps(values: Values) -> Figure:
    """PSNR, sharpness and lip-sync skill over the number of solver steps, with the codec bound as a line."""
    columns, keys = dict(values["sets"]["clip"]["columns"]), ("psnr", "sharpness", "sync_skill")
    bound, names = columns.pop("bound"), list(columns)
    places = [float(np.log2(int(name))) for name in names]
    figure = _sr_panels(keys, {"second stage": list(columns.values())}, places, names, "solver steps")
    for axes, key in zip(figure.axes[1:], keys[1:], strict=True):
        axes.axhline(bound[key]["value"], color="0.5", ls="--", label="codec bound")
        _legend_below(axes)
    return figure


def sr_audio(values: Values) -> Figure:
    """Lip-sync skill and mouth PSNR over the coarseness of the first stage, with the audio and with noise for it."""
    sets = values["sets"]
    curves = {
        SR_COLUMNS[name]: [content["columns"][name] for content in sets.values()]
        for name in ("bicubic", "latents", "sr", "sr, noise for sound")
    }
    ticks = [f"x{factor}" for factor in sets]
    figure = _sr_panels(("sync_skill", "mouth_psnr"), curves, range(len(sets)), ticks, "coarseness of the first stage")
    for axes in figure.axes:
        _legend_below(axes)
    return figure


def sr_frames(movies: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """One row per method of enlarging, two frames of each of four clips side by side."""
    figure = Figure(figsize=(2.1 * 8, 2.15 * len(movies)), layout="constrained")
    for axes, (name, made) in zip(figure.subplots(len(movies), 1), movies.items(), strict=True):
        frames = [movie[k] for movie in made[:4] for k in (len(movie) // 3, 2 * len(movie) // 3)]
        _frame_row(axes, frames, name)
    return figure


# ---- eval.world_checks ----


def world_checks(values: Values) -> Figure:
    """What the early steps decide, and shares over the number of steps without guidance."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    early, few = figure.subplots(1, 2)
    for place, (name, kinds) in enumerate(values.get("swap", {}).items()):
        for kind, shares in kinds.items():
            style = {"color": f"C{place}", "ls": "-" if kind == "to_other" else ":"}
            early.plot(range(len(shares)), shares, label=f"{name}, then {kind.split('_')[1]}", **style)
    early.set_xlabel("steps of 8 with the first prompt;\nthe others see another value, or none (any)")
    early.set_ylabel("share of clips that show the first prompt's value")
    columns = {
        int(name.split()[0]): column
        for name, column in values["columns"].items()
        if name.endswith(" steps, no CFG") and "re-noise" not in name
    }
    steps = sorted(columns)
    shown = [key for key in columns[steps[0]] if metrics()[key].direction == "up"]
    for place, key in enumerate(shown):
        style = {"color": f"C{place % 10}", "ls": "-" if place < 10 else "--"}
        few.plot(steps, [columns[count][key]["value"] for count in steps], marker="o", ms=3, label=key, **style)
    few.set_xscale("log", base=2)
    few.set_xticks(steps, [str(count) for count in steps])
    few.set_xlabel("steps without guidance")
    for axes in (early, few):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


# ---- eval.turbo_vae and eval.ablation ----


def decoder_bars(values: Values) -> Figure:
    """Metrics of a decoder study with a better side as bars with their intervals, a colour per column."""
    columns = values["columns"]
    titles = {key: metrics()[DECODER_KEYS.get(key, key)] for key in next(iter(columns.values()))["table"]}
    titles = {key: metric for key, metric in titles.items() if metric.direction in ("up", "down")}
    figure = Figure(figsize=(3.4 * len(titles), 3.8), layout="constrained")
    for axes, (key, metric) in zip(figure.subplots(1, len(titles)), titles.items(), strict=True):
        for place, column in enumerate(columns.values()):
            _interval(axes, place, column["table"][key], 0.8, color=f"C{place}")
        axes.set_title(_wrapped(f"{metric.title}\n({metric.better})", 40), fontsize=8)
        axes.set_xticks([])
        axes.grid(axis="y", alpha=0.3)
    _legend(figure, {name: f"C{place}" for place, name in enumerate(columns)}, len(columns))
    return figure


def decoder_frames(shown: Mapping[str, np.ndarray]) -> Figure:
    """Rows of eight frames of two clips: the truth, every decoder's frames, and their error, eight times enlarged.

    Args:
        shown: "truth" and decoders -> clips uint8 [N,F,H,W,3].
    """
    rows: list[tuple[str, np.ndarray]] = []
    for clip in range(min(2, len(shown["truth"]))):
        frames = {name: _evenly(movies[clip], 8) for name, movies in shown.items()}
        rows += frames.items()
        for name in [name for name in frames if name != "truth"]:
            error = np.abs(frames[name].astype(int) - frames["truth"])
            rows.append((f"{name}, error x 8", np.clip(8 * error, 0, 255).astype(np.uint8)))
    figure = Figure(figsize=(1.3 * 8 + 1.5, 1.3 * len(rows)), layout="constrained")
    for axes, (name, row) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        _frame_row(axes, row, name)
    return figure


def ablation_bars(values: Values) -> Figure:
    """Differences from `full` as bars with their 95 % interval over training seeds, a panel per metric."""
    means = values["table"]
    variants, names = sorted(set(means) - {"full"}), list(means["full"])
    half, _ = ablation_intervals(values)
    across = min(len(names), 5)
    down = -(-len(names) // across)
    figure = Figure(figsize=(2 + 2.6 * across, down * (1.1 + 0.32 * len(variants))), layout="constrained")
    figure.subplots(down, across, sharey=True)
    for axes in figure.axes[len(names) :]:
        axes.set_axis_off()
    places = range(len(variants))
    for axes, name in zip(figure.axes, names, strict=False):
        differences = [means[variant][name]["difference"] for variant in variants]
        axes.barh(places, differences, xerr=half[name], capsize=3, color=[f"C{i}" for i in places])
        axes.axvline(0, color="black", linewidth=0.6)
        axes.set_yticks(places, [_wrapped(variant, 28) for variant in variants], fontsize=7)
        axes.tick_params(axis="x", labelsize=7)
        axes.locator_params(axis="x", nbins=4)
        title = f"{ablation_title(name)}\ndifference from full ({means['full'][name]['mean']:.4g})"
        axes.set_title(_wrapped(title, 36), fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()  # the order of the table; shared by all panels
    return figure
