"""report.md of a finished training: command, curves, metrics, evaluations and sample clips."""

import csv
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magihuman.io.text import load_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = (
    ("loss", ("loss/video", "loss/audio", "val/video", "val/audio")),
    ("sync gap", ("val/sync_gap", "val/audio_gap")),
    ("gradient norm", ("grad_norm",)),
)
DECODER_PANELS = (
    ("loss", ("loss/pixel", "loss/perceptual", "loss/temporal", "loss/align", "loss/lpips")),
    ("validation PSNR, dB", ("val/psnr",)),
    ("gradient norm", ("grad_norm",)),
)


SCORES_PNG = "score_curves.png"
ENDS = ("_low", "_high")
"""Of the names of an interval's ends; `scores/KEY` is the value."""


def read_metrics(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Column -> (step, value) of every filled cell of metrics.csv."""
    series: dict[str, list[tuple[int, float]]] = {}
    with file.open(newline="") as stream:
        for row in csv.DictReader(stream):
            step = int(row.pop("step"))
            for name, value in row.items():
                if value:
                    series.setdefault(name, []).append((step, float(value)))
    return series


def write_report(run: str) -> dict[str, Any]:
    """Write report.md, curves.png and, of a training with `callbacks=scores`, score_curves.png into a run folder.

    Args:
        run: the folder.

    Returns:
        {"report": path}.
    """
    folder = Path(run)
    record = load_json(folder / "run.json")
    series = read_metrics(folder / "metrics.csv")
    _draw(series, folder / "curves.png")
    scores = score_figure(series)
    if scores is not None:
        scores.savefig(folder / SCORES_PNG, dpi=100)
    lines = [
        *heading(record),
        "![curves](curves.png)",
        "",
        *([f"![scores during the training]({SCORES_PNG})", ""] if scores is not None else []),
        "| last metric | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in record.get("metrics", {}).items()),
        "",
    ]
    for start in record.get("earlier", []):
        lines += [f"Up to step {start['steps']} with `{start['config']}`: `{' '.join(start['command'])}`", ""]
    for name, result in record.get("results", {}).items():
        lines += [f"## {name}", "", *_result(result, folder), ""]
    lines += sample_sheets(folder)
    (folder / "report.md").write_text("\n".join(lines))
    return {"report": str(folder / "report.md")}


def heading(record: dict[str, Any]) -> list[str]:
    """First lines of a run's report, from its run.json: command, steps, seed, code."""
    provenance = record.get("provenance", {})
    return [
        f"# {record['recipe'].split('.')[-1]}: {record['name']}",
        "",
        f"Command: `{' '.join(provenance.get('command', []))}`",
        "",
        f"Started {record['created']}, {record.get('steps', 0)} steps, seed {provenance.get('seed')}, "
        f"code {str(provenance.get('code', {}).get('commit', 'unknown'))[:12]}"
        f"{' with changes' if provenance.get('code', {}).get('changed') else ''}.",
        "",
    ]


def sample_sheets(folder: Path) -> list[str]:
    """Lines that show the last contact sheet and link the others; none where there are none."""
    sheets = sorted(path.relative_to(folder).as_posix() for path in folder.glob("samples/*.png"))
    if not sheets:
        return []
    others = (f"- [{s}]({s})" for s in sheets[:-1])
    return ["## Samples during training", "", f"![{sheets[-1]}]({sheets[-1]})", "", *others, ""]


def _result(result: dict[str, Any], folder: Path) -> list[str]:
    """An evaluation's own table and figures where it wrote some, else its result as JSON."""
    scores = Path(str(result.get("scores", "scores.json")))
    table = scores.with_suffix(".md")
    if "scores" not in result or not table.exists():
        return ["```json", json.dumps(result, indent=2), "```"]
    figures = [scores.with_name(name) for name in ("scores.png", "clips.png")]
    links = [f"![{p.stem}]({os.path.relpath(p, folder)})" for p in figures if p.exists()]
    return [table.read_text(encoding="utf-8").strip(), "", *(line for link in links for line in (link, ""))]


def _draw(series: dict[str, list[tuple[int, float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = DECODER_PANELS if "loss/pixel" in series else PANELS
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.9), layout="constrained")
    for axis, (title, names) in zip(axes, panels, strict=True):
        for name in names:
            if name in series:
                marker = "." if len(series[name]) < 20 else ""  # a single point has no line
                axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1, marker=marker)
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.lines:
            # Below, where it hides no point.
            axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, frameon=False)
        else:
            axis.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axis.transAxes)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def score_figure(series: dict[str, list[tuple[int, float]]]) -> "Figure | None":
    """A panel per score of the training, with its interval as a band; None of a training without scores.

    Args:
        series: column -> (step, value), see `read_metrics`.
    """
    keys = sorted(name for name in series if name.startswith("scores/") and not _is_end(name, series))
    if not keys:
        return None
    from matplotlib.figure import Figure

    columns = min(5, len(keys))
    rows = -(-len(keys) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="constrained")
    for axis, key in zip(figure.subplots(rows, columns, squeeze=False).flat, keys, strict=False):
        axis.plot(*zip(*series[key], strict=True), linewidth=1, marker="." if len(series[key]) < 20 else "")
        low, high = (dict(series.get(key + end, ())) for end in ENDS)
        steps = sorted(low.keys() & high.keys())
        if steps:
            axis.fill_between(steps, [low[s] for s in steps], [high[s] for s in steps], alpha=0.25, linewidth=0)
        axis.set_title(key.removeprefix("scores/"), fontsize=9)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", integer=True, nbins=5)
    for axis in figure.axes[len(keys) :]:
        axis.set_visible(False)
    figure.supxlabel("step; bands: 95 % intervals", fontsize=8)
    return figure


def _is_end(name: str, series: dict[str, list[tuple[int, float]]]) -> bool:
    """Whether a column is an end of another score's interval."""
    return any(name.endswith(end) and name.removesuffix(end) in series for end in ENDS)
