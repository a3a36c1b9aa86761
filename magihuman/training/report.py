"""One page about a finished training: what was run, its curves, its figures and where its clips are."""

import csv
import json
from pathlib import Path
from typing import Any

PANELS = (
    ("loss", ("loss/video", "loss/audio", "val/video", "val/audio")),
    ("own-minus-other-audio gap", ("val/sync_gap",)),
    ("gradient norm", ("grad_norm",)),
)


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
    """Write report.md and curves.png into a run folder.

    Args:
        run: the folder.

    Returns:
        {"report": path}.
    """
    folder = Path(run)
    record = json.loads((folder / "run.json").read_text())
    series = read_metrics(folder / "metrics.csv")
    _draw(series, folder / "curves.png")
    provenance = record.get("provenance", {})
    lines = [
        f"# {record['recipe'].split('.')[-1]}: {record['name']}",
        "",
        f"Command: `{' '.join(provenance.get('command', []))}`",
        "",
        f"Started {record['created']}, {record.get('steps', 0)} steps, seed {provenance.get('seed')}, "
        f"code {str(provenance.get('code', {}).get('commit', 'unknown'))[:12]}"
        f"{' with changes' if provenance.get('code', {}).get('changed') else ''}.",
        "",
        "![curves](curves.png)",
        "",
        "| last figure | value |",
        "|---|---|",
        *(f"| {name} | {value:.4g} |" for name, value in record.get("metrics", {}).items()),
        "",
    ]
    for name, result in record.get("results", {}).items():
        lines += [f"## {name}", "", "```json", json.dumps(result, indent=2), "```", ""]
    sheets = sorted(path.relative_to(folder).as_posix() for path in folder.glob("samples/*.png"))
    if sheets:
        lines += [
            "## Samples on the way",
            "",
            f"![{sheets[-1]}]({sheets[-1]})",
            "",
            *(f"- {s}" for s in sheets),
            "",
        ]
    (folder / "report.md").write_text("\n".join(lines))
    return {"report": str(folder / "report.md")}


def _draw(series: dict[str, list[tuple[int, float]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(5 * len(PANELS), 3.5), layout="constrained")
    for axis, (title, names) in zip(axes, PANELS, strict=True):
        for name in names:
            if name in series:
                axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1)
        axis.set_title(title)
        axis.set_xlabel("step")
        if axis.lines:
            axis.legend(fontsize=8)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)
