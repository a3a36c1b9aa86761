"""What each part of a training is worth: trainings that differ in one part, over seeds.

    python -m eval.ablation runs=runs/turbo_vae output=eval/results/tiny_turbo/ablation
    python -m eval.ablation runs=eval/results/tiny_sr/others.json output=eval/results/tiny_sr/ablation

Decoders: run folders are named VARIANT-sSEED and hold eval/scores.json of `eval.turbo_vae`. Second stages: the file that
`eval.sr parts=others` made of such runs. The variant `full` is what the others are compared with, seed by seed, so that
what a seed brings about cancels.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from eval.report import provenance
from eval.sr_report import ROWS as SR_ROWS
from eval.turbo_vae import ROWS
from magihuman.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = "full"
NAME = re.compile(r"(?P<variant>[a-z_]+)-s(?P<seed>\d+)")
SHOWN = (
    ("student", "psnr"),
    ("student", "ssim"),
    ("student", "change"),
    ("student", "flicker"),
    ("student", "sharpness"),
    ("student, teacher as truth", "psnr"),
    ("student, sampled latents, teacher as truth", "psnr"),
)
SHOWN_SR = ("psnr", "mouth_psnr", "ssim", "sharpness", "sync_skill")
Figures = dict[str, dict[int, dict[str, float]]]
"""variant -> seed -> "column: row" -> value."""


def read(runs: Path) -> tuple[Figures, list[str]]:
    """The figures of all runs named in that form, and the commands that made them.

    Raises:
        UserError: none of the variant `full`, a variant without its seeds, or runs with different figures.
    """
    figures, commands = _of_second_stages(runs) if runs.suffix == ".json" else _of_decoders(runs)
    if FULL not in figures:
        raise UserError(
            f"runs={runs} holds no evaluated run named {FULL}-s0; see `python -m eval.ablation --help`"
        )
    for variant, seeds in figures.items():
        if seeds.keys() != figures[FULL].keys():
            raise UserError(
                f"{variant} was run with seeds {sorted(seeds)}, {FULL} with {sorted(figures[FULL])}"
            )
    wanted = figures[FULL][min(figures[FULL])].keys()
    for variant, seeds in figures.items():
        for seed, found in seeds.items():
            if found.keys() != wanted:
                raise UserError(
                    f"{variant}-s{seed} was evaluated otherwise than {FULL}-s{min(figures[FULL])}: only one of them "
                    f"has {', '.join(sorted(found.keys() ^ wanted))}; evaluate them alike"
                )
    return figures, commands


def _of_decoders(runs: Path) -> tuple[Figures, list[str]]:
    figures: Figures = defaultdict(dict)
    commands = []
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        match, scores = NAME.fullmatch(folder.name), folder / "eval" / "scores.json"
        if match is None or not scores.exists():
            continue
        columns = json.loads(scores.read_text())["columns"]
        figures[match["variant"]][int(match["seed"])] = {
            f"{column}: {row}": columns[column]["table"][row]["value"]
            for column, row in SHOWN
            if column in columns and columns[column]["table"][row]["value"] is not None
        }
        record = json.loads((folder / "run.json").read_text())
        commands.append(" ".join(record["provenance"]["command"]))
    return dict(figures), commands


def _of_second_stages(file: Path) -> tuple[Figures, list[str]]:
    figures: Figures = defaultdict(dict)
    if not file.exists():
        raise UserError(f"there is no file runs={file}; `python -m eval.sr parts=others ...` writes it")
    compared = json.loads(file.read_text())
    for name, table in compared["sets"]["clip"]["columns"].items():
        if match := NAME.fullmatch(name):
            figures[match["variant"]][int(match["seed"])] = {row: table[row]["value"] for row in SHOWN_SR}
    return dict(figures), [run.get("command", "") for run in compared["trained"].values()]


def compare(figures: Figures) -> dict[str, dict[str, dict[str, float]]]:
    """variant -> figure -> its mean and standard deviation over seeds, and of its difference to `full` by seed."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for variant, seeds in figures.items():
        table[variant] = {}
        for name in figures[FULL][min(figures[FULL])]:
            values = np.array([seeds[seed][name] for seed in sorted(seeds)])
            against = np.array([figures[FULL][seed][name] for seed in sorted(seeds)])
            spread = {"sd": values.std(ddof=1), "difference_sd": (values - against).std(ddof=1)}
            table[variant][name] = {
                "mean": float(values.mean()),
                "difference": float((values - against).mean()),
                **{key: float(value) if len(values) > 1 else 0.0 for key, value in spread.items()},
            }
    return table


def summarise(runs: str = "runs/turbo_vae", output: str | None = None) -> dict[str, Any]:
    """Make the table of an ablation.

    Args:
        runs: folder of the run folders VARIANT-sSEED, one variant called full; or others.json of `eval.sr`
        output: folder for ablation.json, ablation.md and ablation.png; none prints the table only

    Raises:
        UserError: runs that cannot be compared.
    """
    figures, commands = read(Path(runs))
    table = compare(figures)
    seeds = sorted(figures[FULL])
    text = markdown(table, len(seeds))
    print(text)
    if output is not None:
        folder = Path(output)
        folder.mkdir(parents=True, exist_ok=True)
        report = {
            "format": "magihuman-ablation/1",
            "seeds": seeds,
            "table": table,
            "figures": {
                variant: {str(s): row for s, row in rows.items()} for variant, rows in figures.items()
            },
            "commands": commands,
            "rows": {row: about for row, (about, _) in (SR_ROWS if runs.endswith(".json") else ROWS).items()},
            "provenance": provenance(),
        }
        (folder / "ablation.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        (folder / "ablation.md").write_text(text + "\n", encoding="utf-8")
        picture(table).savefig(folder / "ablation.png", dpi=110)
    return {variant: {name: cell["mean"] for name, cell in row.items()} for variant, row in table.items()}


def markdown(table: dict[str, dict[str, dict[str, float]]], seeds: int) -> str:
    """A row per variant: the mean, and the difference to `full` with its standard deviation over seeds."""
    names = list(table[FULL])
    lines = ["| | " + " | ".join(names) + " |", "|---" + "|---:" * len(names) + "|"]
    for variant in [FULL, *sorted(set(table) - {FULL})]:
        cells = []
        for name in names:
            cell = table[variant][name]
            digits = 2 if abs(cell["mean"]) >= 2 else 4
            off = (
                ""
                if variant == FULL
                else f" ({cell['difference']:+.{digits}f} ± {cell['difference_sd']:.{digits}f})"
            )
            cells.append(f"{cell['mean']:.{digits}f}{off}")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(
        [*lines, "", f"Means over {seeds} seeds; in brackets the difference to full, seed by seed, ± its sd."]
    )


def picture(table: dict[str, dict[str, dict[str, float]]]) -> "Figure":
    """Differences to `full` as bars with their spread over seeds, a panel per figure."""
    from matplotlib.figure import Figure

    variants, names = sorted(set(table) - {FULL}), list(table[FULL])
    figure = Figure(figsize=(3.2 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        cells = [table[variant][name] for variant in variants]
        axes.bar(
            range(len(variants)), [c["difference"] for c in cells], yerr=[c["difference_sd"] for c in cells],
            capsize=3, color=[f"C{i}" for i in range(len(variants))],
        )  # fmt: skip
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xticks(range(len(variants)), [v.replace("_", "\n") for v in variants], fontsize=8)
        axes.set_title(f"{name}\nagainst {FULL} ({table[FULL][name]['mean']:.4g})", fontsize=8)
        axes.grid(axis="y", alpha=0.3)
    return figure


if __name__ == "__main__":
    from magihuman.cli import run

    run(summarise, "python -m eval.ablation")
