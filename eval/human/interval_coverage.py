"""Simulation of human studies: how often 95 % intervals hold the true share of wins.

    python -m eval.human coverage                                           # prints
    python -m eval.human coverage output=eval/results/human_coverage.json   # the committed result

A vote is a win with probability sigmoid(m + a + b): a is the rater's, b the prompt's deviation, both normal. The true share
is the mean over all raters and prompts, by Gauss-Hermite quadrature.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from eval.human.study_statistics import VoteTable, clustered_mean, independent
from magihuman.errors import UserError

FORMAT = "magihuman-interval-coverage/1"


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 1 / (1 + np.exp(-x))


def true_share(mean: float, deviation: float) -> float:
    """E[sigmoid(mean + deviation z)] for a standard normal z."""
    points, weights = np.polynomial.hermite_e.hermegauss(80)
    return float((sigmoid(mean + deviation * points) * weights).sum() / weights.sum())


def simulated_study(
    raters: int, pairs: int, share: bool, mean: float, rater_sd: float, prompt_sd: float, rng: np.random.Generator
) -> VoteTable:
    """Votes of raters on `pairs` prompts each: the same for all (`share`), or different ones."""
    rater = np.repeat(np.arange(raters), pairs)
    group = np.tile(np.arange(pairs), raters) if share else np.arange(raters * pairs)
    chance = sigmoid(
        mean + rater_sd * rng.standard_normal(raters)[rater] + prompt_sd * rng.standard_normal(group.max() + 1)[group]
    )
    lost = rng.random(len(rater)) >= chance
    zeros = np.zeros(len(rater), int)
    return VoteTable(rater, group, zeros, np.where(lost, 2, 0), zeros.astype(bool), group)


def coverage_of(
    studies: int, raters: int, pairs: int, share: bool, mean: float, rater_sd: float, prompt_sd: float, seed: int,
    draws: int = 500,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """Share of studies whose interval holds the true share, and the mean width, of both kinds of interval."""
    truth = true_share(mean, float(np.hypot(rater_sd, prompt_sd)))
    held, width = np.zeros(2), np.zeros(2)
    for study in range(studies):
        rng = np.random.default_rng([seed, study, share])
        table = simulated_study(raters, pairs, share, mean, rater_sd, prompt_sd, rng)
        found = clustered_mean(table, (table.outcome == 0).astype(float), draws), independent(table)["win"]
        for k, measure in enumerate(found):
            low, high = measure.low or 0.0, 1.0 if measure.high is None else measure.high
            held[k] += low <= truth <= high
            width[k] += high - low
    names = ("raters and prompts", "independent votes")
    return {
        name: {"coverage": round(float(held[k] / studies), 4), "width": round(float(width[k] / studies), 4)}
        for k, name in enumerate(names)
    }


def coverage_table(values: dict[str, Any]) -> str:
    """Markdown of a result file: how often intervals hold the true share of wins, and how wide they are."""
    from magihuman.io.markdown import table

    made = values["settings"]
    rows = [
        [design, kind, f"{100 * of['coverage']:.1f} %", f"{100 * of['width']:.1f} points"]
        for design, kinds in values["designs"].items()
        for kind, of in kinds.items()
    ]
    about = (
        f"{made['studies']} simulated studies of each design, {made['raters']} raters x {made['pairs']} pairs with one "
        f"opponent; true share of wins {100 * values['true_share']:.1f} %; nominal coverage 95 %."
    )
    return f"{table(['design', 'interval over', 'coverage', 'mean width'], rows, 'llrr')}\n\n{about}"


def simulate_coverage(
    output: str | None, studies: int, raters: int, pairs: int, rater_sd: float, prompt_sd: float, win: float, seed: int
) -> dict[str, Any]:
    """Simulate both designs, print the table and write the result file where there is `output`; the command `coverage`.

    Raises:
        UserError: impossible settings.
    """
    from eval.output import provenance, require_at_least
    from magihuman.io.files import write_result

    require_at_least(studies=(studies, 1), raters=(raters, 2), pairs=(pairs, 2), seed=(seed, 0))
    if not 0 < win < 1 or rater_sd < 0 or prompt_sd < 0:
        raise UserError(
            f"win={win}, rater_sd={rater_sd}, prompt_sd={prompt_sd}: win is in (0,1), the others are at least 0"
        )
    start, mean = time.perf_counter(), float(np.log(win / (1 - win)))
    designs = {
        name: coverage_of(studies, raters, pairs, share, mean, rater_sd, prompt_sd, seed)
        for name, share in (("the same pairs for all raters", True), ("different pairs for every rater", False))
    }
    settings = {
        "studies": studies, "raters": raters, "pairs": pairs, "rater_sd": rater_sd, "prompt_sd": prompt_sd, "win": win,
        "seed": seed,
    }  # fmt: skip
    values = {
        "format": FORMAT, "settings": settings, "true_share": round(true_share(mean, float(np.hypot(rater_sd, prompt_sd))), 4),
        "designs": designs, "seconds": round(time.perf_counter() - start, 1), "provenance": provenance(),
    }  # fmt: skip
    print(coverage_table(values))
    if output is not None:
        write_result(Path(output), values)
        print(f"written to {output}")
    return values
