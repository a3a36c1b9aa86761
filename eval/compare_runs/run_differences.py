"""What tells runs apart: settings that differ, and paired differences of scores on the prompts that two runs share.

differing_settings(runs)                              # {"optim.lr": ["0.001", "0.002"]}
paired_differences(mine.values["eval"], theirs.values["eval"])["vowels"]["verdict"]
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from eval.clip_values import ClipValues
from eval.compare_runs.run_records import RunRecord
from eval.metrics.registry import metrics as known_metrics
from eval.paired import weights
from eval.stats import FEWEST, LEVEL

LEVELS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
PAIRS_OF = 12
"""Runs up to which every pair is compared, so that the page can change its baseline."""


def differing_settings(runs: Sequence[RunRecord], of: Sequence[RunRecord]) -> dict[str, list[str]]:
    """Settings that are not the same in all of `of`, with their values in all `runs`.

    A setting that a run does not have counts as null there. Settings that differ in the same way, such as a learning rate
    that another one refers to, are one entry: "optim.lr, recipe.fake_score.lr".

    Args:
        runs: all runs of the page; of: those to which the question is put, for example of one recipe.
    """
    known = [run for run in of if run.settings and not run.partial]
    alike: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(name for run in known for name in run.settings):
        values = tuple(run.settings.get(name, "null") for run in known)
        if len(set(values)) > 1:
            alike.setdefault(values, []).append(name)
    found = {}
    for names in alike.values():
        names.sort(key=lambda name: (name.count("."), name))
        found[", ".join(names)] = [_value_in(run, names) for run in runs]
    return found


def _value_in(run: RunRecord, names: Sequence[str]) -> str:
    """Value of the settings, which are the same; of a run that has not begun, of the one that its sweep gives."""
    missing = "null" if run.settings and not run.partial else ""
    return next((run.settings[name] for name in names if name in run.settings), missing)


def paired_differences(mine: ClipValues, theirs: ClipValues) -> dict[str, dict[str, Any]]:
    """Differences of two models on the prompts of both, by metric.

    Every prompt counts once: clips of one prompt are alike. Prompts are resampled for both models alike (`eval.paired`), so
    that what makes a prompt hard cancels. Prompts of which either has a clip without a value are left out.

    Returns:
        metric -> {"value", "low", "high", "n", "verdict"}: the mean difference, its 95 % interval (None for fewer than
        `eval.stats.FEWEST` prompts), the number of prompts, and better, worse, within noise, or "" where no side is better.
    """
    found = {}
    groups: dict[tuple[str, ...], list[str]] = {}
    for metric in mine.paired.keys() & theirs.paired.keys() & known_metrics().keys():
        shared = tuple(prompt for prompt in mine.paired[metric] if prompt in theirs.paired[metric])
        if shared:
            groups.setdefault(shared, []).append(metric)
    for prompts, metrics in groups.items():
        own, best = _resampled(mine, tuple(metrics), prompts)
        other, _ = _resampled(theirs, tuple(metrics), prompts)
        change, gain = own - other, _gain(metrics, own, other, best)
        ends = [np.quantile(draws[1:], LEVELS, axis=0) for draws in (change, gain)]  # [2, metrics] each
        for place, metric in enumerate(metrics):
            low, high = (float(end) for end in ends[0][:, place])
            known = len(prompts) >= FEWEST
            found[metric] = {
                "value": float(change[0, place]), "low": low if known else None, "high": high if known else None,
                "n": len(prompts), "verdict": _verdict(*ends[1][:, place]) if known else "",
            }  # fmt: skip
    return {metric: found[metric] for metric in known_metrics() if metric in found}


@lru_cache(maxsize=64)
def _shares(prompts: int) -> np.ndarray:
    """Share of every prompt in every sample: [1 + RESAMPLES, P], the first row is the prompts themselves."""
    weight = weights(prompts)
    return np.asarray(weight / weight.sum(1, keepdims=True))


@lru_cache(maxsize=2 * PAIRS_OF)
def _resampled(values: ClipValues, metrics: tuple[str, ...], prompts: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Means of the model and of its bound over every sample of the prompts, [1 + RESAMPLES, metrics] each; NaN without."""
    tables = [
        np.array([[of.get(metric, {}).get(prompt, np.nan) for metric in metrics] for prompt in prompts])
        for of in (values.paired, values.bound)
    ]  # [P, metrics]
    share = _shares(len(prompts))
    return share @ tables[0], share @ tables[1]


def _gain(metrics: Sequence[str], own: np.ndarray, other: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Differences [R, metrics] with the sign that makes positive better; with a target, how much nearer to it.

    NaN where no side is better, or the target is unknown.
    """
    gain = own - other
    for place, metric in enumerate(metrics):
        about = known_metrics()[metric]
        if about.direction == "down":
            gain[:, place] *= -1
        elif about.direction == "target":
            target = best[:, place] if about.target is None else about.target
            gain[:, place] = np.abs(other[:, place] - target) - np.abs(own[:, place] - target)
        elif not about.direction:
            gain[:, place] = np.nan
    return gain


def _verdict(low: float, high: float) -> str:
    if np.isnan(low):
        return ""
    return "better" if low > 0 else "worse" if high < 0 else "within noise"


def all_differences(runs: Sequence[RunRecord], baseline: int) -> dict[int, dict[int, dict[str, dict[str, Any]]]]:
    """Paired differences of runs: baseline -> run -> "evaluation: metric" -> difference of the run and the baseline.

    Of up to `PAIRS_OF` runs every one is a baseline, of more only `baseline`.
    """
    found: dict[int, dict[int, dict[str, dict[str, Any]]]] = {}
    for against in range(len(runs)) if len(runs) <= PAIRS_OF else [baseline]:
        theirs: Mapping[str, ClipValues] = runs[against].values
        rows = {}
        for number, run in enumerate(runs):
            if number == against:
                continue
            cells = {
                f"{evaluation}: {metric}": measure
                for evaluation in run.values.keys() & theirs.keys()
                for metric, measure in paired_differences(run.values[evaluation], theirs[evaluation]).items()
            }
            if cells:
                rows[number] = cells
        if rows:
            found[against] = rows
    return found
