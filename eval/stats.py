"""Confidence intervals: clips are the unit, resampled with a fixed seed so that a table can be printed twice.

`Measure` is the result type of every measure: a value with its interval, or no value and the reason.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95


@dataclass(frozen=True)
class Measure:
    """A value with its 95 % interval over n clips; None where `status` is not "ok", and `reason` says why."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    status: str = "ok"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def unavailable(reason: str, n: int = 0) -> Measure:
    """A measure that could not be taken, and why."""
    return Measure(None, None, None, n, "unavailable", reason)


def resample(n: int, seed: int = 0) -> np.ndarray:
    """Clip indices drawn with replacement, int [RESAMPLES, n]; same n and seed, same draw."""
    return np.random.Generator(np.random.PCG64([seed, n])).integers(n, size=(RESAMPLES, n))


def bootstrap(statistic: Callable[[np.ndarray], float], n: int, seed: int = 0) -> Measure:
    """Percentile bootstrap of `statistic`, a function of clip indices [n] (with repeats), over n clips."""
    if n == 0:
        return unavailable("no clips")
    value = statistic(np.arange(n))
    if not np.isfinite(value):
        return unavailable("the statistic is not finite", n)
    draws = np.array([statistic(indices) for indices in resample(n, seed)])
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if len(draws) else (value, value)
    return Measure(float(value), float(low), float(high), n)


def mean(values: np.ndarray, seed: int = 0) -> Measure:
    """Mean of one finite value per clip [n], with its bootstrap interval."""
    values = np.asarray(values, float)
    if len(values) == 0:
        return unavailable("no clips")
    draws = values[resample(len(values), seed)].mean(1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measure(float(values.mean()), float(low), float(high), len(values))


def share(values: np.ndarray, seed: int = 0) -> Measure:
    """Mean of values in [0,1], one per clip [n]: Wilson where every clip is all right or all wrong, else
    bootstrap.

    Resampling clips that are all right can only say "1.000 to 1.000"; Wilson over the clips keeps the doubt.
    """
    values = np.asarray(values, float)
    if np.isin(values, (0.0, 1.0)).all():
        return proportion(int(values.sum()), len(values))
    return mean(values, seed)


def ratio(numerator: np.ndarray, denominator: np.ndarray, seed: int = 0) -> Measure:
    """Sum of `numerator` [n] over sum of `denominator` [n], clips resampled in pairs."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    if len(numerator) == 0 or abs(denominator.sum()) < 1e-12:
        return unavailable("nothing to divide by", len(numerator))
    draw = resample(len(numerator), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        draws = numerator[draw].sum(1) / denominator[draw].sum(1)
    low, high = np.quantile(draws[np.isfinite(draws)], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measure(float(numerator.sum() / denominator.sum()), float(low), float(high), len(numerator))


def difference(a: np.ndarray, b: np.ndarray, seed: int = 0) -> Measure:
    """Mean of a - b over clips of the same prompts (paired): [n] each.

    Raises:
        ValueError: the two have not the same length.
    """
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.shape != b.shape:
        raise ValueError(f"paired values need the same clips: {len(a)} against {len(b)}")
    return mean(a - b, seed)


def proportion(hits: int, n: int) -> Measure:
    """Share of independent yes/no outcomes with Wilson's interval, which stays honest near 0 and 1."""
    if n == 0:
        return unavailable("no clips")
    z = 1.959964
    p, square = hits / n, z * z / n
    centre = (p + square / 2) / (1 + square)
    half = z * np.sqrt(p * (1 - p) / n + square / n / 4) / (1 + square)
    low = 0.0 if hits == 0 else float(centre - half)  # exact at the ends, whatever the rounding
    high = 1.0 if hits == n else float(centre + half)
    return Measure(p, low, high, n)


def distance_to_uniform(counts: np.ndarray, seed: int = 0) -> Measure:
    """Total-variation distance, 0 to 1 - 1/k, of counts [k] from equal shares, with its bootstrap interval.

    A sample of n from the uniform itself has a positive expected distance: compare with the ground truth's
    row.
    """
    counts = np.asarray(counts, int)
    n, k = int(counts.sum()), len(counts)
    if n == 0:
        return unavailable("no clips")
    drawn = np.random.Generator(np.random.PCG64([seed, n])).multinomial(n, counts / n, RESAMPLES)
    draws = 0.5 * np.abs(drawn / n - 1 / k).sum(1)
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Measure(float(0.5 * np.abs(counts / n - 1 / k).sum()), float(low), float(high), n)


def uniformity(counts: np.ndarray) -> float:
    """Chi-square p-value that counts [k], not all 0, come from equal shares."""
    from scipy.stats import chisquare

    return float(chisquare(np.asarray(counts, float)).pvalue)
