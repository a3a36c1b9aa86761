"""Ablation table: trainings that differ in one setting, over seeds.

    python -m eval.ablation runs=runs/turbo_vae output=eval/results/tiny_turbo/ablation
    python -m eval.ablation runs=eval/results/tiny_sr/others.json output=eval/results/tiny_sr/ablation
    python -m eval.ablation runs=runs/compare/arms/compare.json output=eval/results/dmd2/ablation

Decoders: run folders are named VARIANT-sSEED and hold eval/scores.json of `eval.turbo_vae`. Second stages: the file that
`eval.sr parts=others` made of such runs. Few-step students: the file that `eval.dmd2` made of runs with any names; their
variants are the words recipe.KEY=VALUE of their commands, `full` without such words. The variant `full` is what the others are
compared with, seed by seed, so that the effect of the seed cancels. Second stages that `eval.sr steps=5,2,1` sampled have their
metrics in each number of steps; clips enlarged without a network are rows of the table, too.
"""

import json
import re
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from eval.output import publish, training_record
from magihuman.errors import UserError
from magihuman.io.text import load_json

FULL = "full"
NAME = re.compile(r"(?P<variant>[a-z_]+)-s(?P<seed>\d+)(?:, (?P<steps>\d+ steps?))?")
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
SHOWN_SR_STEPS = ("psnr", "mouth_psnr", "sharpness")
"""In each of several numbers of steps."""
UNTRAINED = ("bicubic", "latents")
SHOWN_DMD2 = (
    "attributes", "recognisable", "vowels", "onsets", "sync_skill", "lip_shape", "sharpness", "flicker", "amplitude",
    "energy_look", "energy_motion", "energy_voice", "spread_look", "spread_motion", "spread_voice",
)  # fmt: skip
RECIPE_WORD = re.compile(r"(?<=\brecipe\.)[\w.]+=(?:\{[^}]*\}|\S+)")
Metrics = dict[str, dict[int, dict[str, float]]]
"""variant -> seed -> metric ("COLUMN: psnr" of a decoder's column, "psnr, 5 steps" of a number of steps) -> value."""
Found = tuple[Metrics, list[str], dict[str, dict[str, float]]]
"""Metrics of runs, their commands, and the metrics of clips enlarged without a network by column."""


def read(runs: Path) -> Found:
    """Metrics of all runs named in that form.

    Raises:
        UserError: none of the variant `full`, a variant without its seeds, or runs with different metrics.
    """
    metrics, commands, untrained = _of_comparison(runs) if runs.suffix == ".json" else _of_decoders(runs)
    if FULL not in metrics:
        raise UserError(f"runs={runs} holds no evaluated run named {FULL}-s0; see `python -m eval.ablation --help`")
    first = min(metrics[FULL])
    for variant, seeds in metrics.items():
        if seeds.keys() != metrics[FULL].keys():
            raise UserError(f"{variant} was run with seeds {sorted(seeds)}, {FULL} with {sorted(metrics[FULL])}")
        for seed, found in seeds.items():
            if differing := found.keys() ^ metrics[FULL][first].keys():
                raise UserError(
                    f"{variant}-s{seed} was evaluated otherwise than {FULL}-s{first}: only one of them has "
                    f"{', '.join(sorted(differing))}; evaluate them alike"
                )
    return metrics, commands, untrained


def _of_decoders(runs: Path) -> Found:
    metrics: Metrics = defaultdict(dict)
    commands = []
    for scores in sorted(runs.glob("*/eval/scores.json")):
        run = scores.parents[1]
        if (match := NAME.fullmatch(run.name)) is None:
            continue
        columns = json.loads(scores.read_text())["columns"]
        metrics[match["variant"]][int(match["seed"])] = {
            f"{column}: {row}": columns[column]["table"][row]["value"]
            for column, row in SHOWN
            if column in columns and columns[column]["table"][row]["value"] is not None
        }
        commands.append(training_record(run).get("command", ""))
    return dict(metrics), commands, {}


def _of_comparison(file: Path) -> Found:
    metrics: Metrics = defaultdict(dict)
    if not file.exists():
        raise UserError(f"there is no file runs={file}; `eval.sr parts=others` or `eval.dmd2` writes it")
    compared = load_json(file)
    if "sets" not in compared:
        return _of_students(compared)
    columns = compared["sets"]["clip"]["columns"]
    found = {name: match for name in columns if (match := NAME.fullmatch(name))}
    for name, match in found.items():
        steps, table = match["steps"], columns[name]
        rows = SHOWN_SR_STEPS if steps else SHOWN_SR
        metrics[match["variant"]].setdefault(int(match["seed"]), {}).update(
            {f"{row}, {steps}" if steps else row: table[row]["value"] for row in rows}
        )
    names = list(dict.fromkeys(row for seeds in metrics.values() for rows in seeds.values() for row in rows))
    untrained = {
        column: {name: columns[column][name.partition(", ")[0]]["value"] for name in names}
        for column in UNTRAINED
        if column in columns
    }
    return dict(metrics), [run.get("command", "") for run in compared["trained"].values()], untrained


def _of_students(compared: dict[str, Any]) -> Found:
    metrics: Metrics = defaultdict(dict)
    commands = []
    for name, column in compared["columns"].items():
        if column["role"] != "student":
            continue
        command, seed = column["trained"].get("command"), column["trained"].get("seed")
        if command is None or seed is None:
            raise UserError(f"{name} has no record of its training; compare run folders")
        variant = " ".join(RECIPE_WORD.findall(command)) or FULL
        if seed in metrics[variant]:
            raise UserError(f"two students of variant {variant} have seed {seed}: {name} is the second; leave one out")
        metrics[variant][seed] = {row: column["rows"][row]["value"] for row in SHOWN_DMD2}
        commands.append(command)
    return dict(metrics), commands, {}


def compare(metrics: Metrics) -> dict[str, dict[str, dict[str, float]]]:
    """variant -> metric -> mean and standard deviation over seeds, of it and of its difference from `full` by seed."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for variant, seeds in metrics.items():
        table[variant] = {}
        for name in metrics[FULL][min(metrics[FULL])]:
            values = np.array([seeds[seed][name] for seed in sorted(seeds)])
            against = np.array([metrics[FULL][seed][name] for seed in sorted(seeds)])
            deviations = {"sd": values.std(ddof=1), "difference_sd": (values - against).std(ddof=1)}
            table[variant][name] = {
                "mean": float(values.mean()),
                "difference": float((values - against).mean()),
                **{key: float(value) if len(values) > 1 else 0.0 for key, value in deviations.items()},
            }
    return table


def summarise(runs: str = "runs/turbo_vae", output: str | None = None) -> dict[str, Any]:
    """Make the table of an ablation.

    Args:
        runs: folder of the run folders VARIANT-sSEED, one variant called full; or others.json of `eval.sr`; or compare.json of
            `eval.dmd2`
        output: folder for ablation.json, ablation.md and ablation.png; none prints the table only

    Raises:
        UserError: runs that cannot be compared.
    """
    metrics, commands, untrained = read(Path(runs))
    report: dict[str, Any] = {
        "format": "magihuman-ablation/1",
        "seeds": sorted(metrics[FULL]),
        "table": compare(metrics),
        "untrained": untrained,
        "figures": {variant: {str(s): row for s, row in rows.items()} for variant, rows in metrics.items()},
        "commands": commands,
    }
    from eval.figures import ablation_bars

    publish(None if output is None else Path(output), "ablation", report, {"ablation": partial(ablation_bars, report)})
    return {variant: {name: cell["mean"] for name, cell in row.items()} for variant, row in report["table"].items()}


if __name__ == "__main__":
    from magihuman.cli import run

    run(summarise, "python -m eval.ablation")
