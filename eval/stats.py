"""Confidence intervals over clips, by scipy with a fixed seed: the same clips give the same table; tests of verdicts.

    stats.mean(np.array([0.8, 1.0, 0.9]))   # Measure(value=0.9, low=..., high=..., n=3)
    stats.Estimate(0.02, ((0.0001, 39),)).above(0)   # p-value of Student's t: 0.026

`Measure` is the result of every metric: a value with its interval, or no value and the reason. `Estimate`,
`RatioEstimate` and `ShareDistance` are what verdicts test (`eval.verdicts`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEWEST = 5
"""Prompts that an interval of a paired difference needs: of two, chance alone excludes 0 in every second comparison."""


@dataclass(frozen=True)
class Measure:
    """A value with its 95 % interval over n clips; None where `status` is not "ok", with the reason."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    status: str = "ok"
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def unavailable(reason: str, n: int = 0) -> Measure:
    """A measure without a value, with the reason."""
    return Measure(None, None, None, n, "unavailable", reason)


def ends_of(draws: np.ndarray, groups: int | None = None) -> tuple[float, float]:
    """Ends of the percentile interval of resampled values, of those that are finite.

    Args:
        groups: how many were resampled. With few, percentiles are too narrow (95 % intervals of 8 normal values miss the
            truth in 12 %, these in 6 %): they are taken farther out, as Student's t and the divisor n - 1 demand
            (Hesterberg 2015, "expanded percentile").
            None takes those of `LEVEL`.
    """
    tail = (1 - LEVEL) / 2 if groups is None else _expanded_tail(groups)
    low, high = np.nanquantile(np.where(np.isfinite(draws), draws, np.nan), [tail, 1 - tail])
    return float(low), float(high)


def _expanded_tail(groups: int) -> float:
    from scipy.special import ndtr, stdtrit

    if groups < 2:
        return 0.0
    return float(ndtr(-math.sqrt(groups / (groups - 1)) * stdtrit(groups - 1, (1 + LEVEL) / 2)))


def _bootstrap(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Measure:
    """Value of `statistic(*samples, axis)` with its percentile interval, clips [n] resampled in pairs."""
    from scipy.stats import bootstrap

    value, n = float(statistic(*samples, axis=-1)), len(samples[0])
    if n == 1:  # nothing to resample
        return Measure(value, value, value, n)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = bootstrap(
            samples, statistic, n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile",
            paired=len(samples) > 1, vectorized=True, random_state=np.random.default_rng([0, n]),
        )  # fmt: skip
    return Measure(value, *ends_of(found.bootstrap_distribution), n)


def mean(values: np.ndarray) -> Measure:
    """Mean of one finite value per clip [n], with its bootstrap interval."""
    values = np.asarray(values, float)
    return _bootstrap(np.mean, values) if len(values) else unavailable("no clips")


def share(values: np.ndarray) -> Measure:
    """Mean of values in [0,1], one per clip [n]: Wilson where every clip is all right or all wrong, else bootstrap.

    Resampling clips that are all right can only give "1.000 to 1.000"; Wilson's interval over the clips does not.
    """
    values = np.asarray(values, float)
    if np.isin(values, (0.0, 1.0)).all():
        return proportion(int(values.sum()), len(values))
    return mean(values)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> Measure:
    """Sum of `numerator` [n] over sum of `denominator` [n], clips resampled in pairs."""
    numerator, denominator = np.asarray(numerator, float), np.asarray(denominator, float)
    if len(numerator) == 0 or abs(denominator.sum()) < 1e-12:
        return unavailable("nothing to divide by", len(numerator))
    return _bootstrap(lambda a, b, axis: a.sum(axis) / b.sum(axis), numerator, denominator)


def proportion(hits: int, n: int) -> Measure:
    """Share of independent yes/no outcomes with Wilson's interval, which stays honest near 0 and 1."""
    if n == 0:
        return unavailable("no clips")
    # Wilson (1927). Own arithmetic: importing scipy.stats takes seconds, and scores from the cache need nothing else of it.
    share, z = hits / n, NormalDist().inv_cdf((1 + LEVEL) / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (0.0 if hits == 0 else centre - half), (1.0 if hits == n else centre + half)
    return Measure(share, low, high, n)


def distance_to_shares(counts: np.ndarray, shares: np.ndarray) -> Measure:
    """Total-variation distance of counts [k] from known shares [k], with its bootstrap interval.

    A sample of n from these shares itself has a positive expected distance: compare with the ground truth's column.
    The draws are own code: scipy resamples observations, not counts.
    """
    counts = np.asarray(counts, int)
    n = int(counts.sum())
    if n == 0:
        return unavailable("no clips")
    drawn = np.random.default_rng([0, n]).multinomial(n, counts / n, RESAMPLES)
    low, high = ends_of(0.5 * np.abs(drawn / n - shares).sum(1))
    return Measure(float(0.5 * np.abs(counts / n - shares).sum()), low, high, n)


def fit_of_shares(counts: np.ndarray, shares: np.ndarray) -> float:
    """Chi-square p-value that counts [k], not all 0, come from known shares [k]."""
    from scipy.stats import chisquare

    return float(chisquare(np.asarray(counts, float), np.sum(counts) * shares).pvalue)


# ---- Tests of verdicts ----

Parts = tuple[tuple[float, float], ...]
"""Variance components of an estimate, each with its degrees of freedom."""


@dataclass(frozen=True)
class Estimate:
    """An estimate whose variance is a sum of independent components, tested with Student's t.

    Every component counts with the quantile of its own degrees of freedom: half the width of an interval is
    sqrt(sum(t_f^2 v)), Cochran's approximation (1964) of the Behrens-Fisher problem. With three training seeds the component
    between seeds has 2 degrees of freedom. Satterthwaite's single number of degrees of freedom would be too sure here: where
    seeds dominate, its tests at .05/14 reject 4.7 times too often (three seeds, 40 prompts, 15000 simulations).

    Attributes:
        value: the estimate.
        parts: (variance, degrees of freedom) of each component.
    """

    value: float
    parts: Parts

    def half(self, tail: float) -> float:
        """Half the width of the interval with the one-sided error `tail`."""
        from scipy.special import stdtrit

        return math.sqrt(sum(v * float(stdtrit(f, 1 - tail)) ** 2 for v, f in self.parts if v > 0))

    def interval(self, level: float) -> tuple[float, float]:
        """Ends of the interval of a level such as .95."""
        half = self.half((1 - level) / 2)
        return self.value - half, self.value + half

    def above(self, bound: float) -> float:
        """One-sided p-value of "the truth is at most `bound`"."""
        return _tail(self.value - bound, self.half)

    def below(self, bound: float) -> float:
        """One-sided p-value of "the truth is at least `bound`"."""
        return _tail(bound - self.value, self.half)

    def outside(self, margin: float) -> float:
        """The larger p-value of two one-sided tests (Schuirmann 1987) of "the truth is `margin` or more away from 0"."""
        return max(self.above(-margin), self.below(margin))


@dataclass(frozen=True)
class RatioEstimate:
    """A ratio of two estimates, tested without dividing: own - ratio x other has mean 0 where the ratio is the truth.

    Attributes:
        own, other: the estimates.
        parts: (variance of own, covariance, variance of other, degrees of freedom) of each component.
    """

    own: float
    other: float
    parts: tuple[tuple[float, float, float, float], ...]

    def minus(self, ratio: float) -> Estimate:
        """Estimate of own - ratio x other."""
        parts = tuple((max(a - 2 * ratio * c + ratio**2 * b, 0.0), f) for a, c, b, f in self.parts)
        return Estimate(self.own - ratio * self.other, parts)

    def interval(self, level: float) -> tuple[float, float]:
        """Fieller's interval (1954): the ratios that no test of the level rejects; infinite ends where `other` may be 0."""
        from scipy.special import stdtrit

        squares = [float(stdtrit(f, (1 + level) / 2)) ** 2 for *_, f in self.parts]
        a, b, c = (
            product - sum(q * part[k] for q, part in zip(squares, self.parts, strict=True))
            for k, product in ((2, self.other**2), (1, self.own * self.other), (0, self.own**2))
        )  # ratio^2 a - 2 ratio b + c = 0
        if a <= 0:
            return -math.inf, math.inf
        root = math.sqrt(max(b * b - a * c, 0.0))
        return (b - root) / a, (b + root) / a


def _tail(size: float, critical: Callable[[float], float], most: float = 0.5) -> float:
    """The p-value at which `critical` (p -> critical value, falling to 0 at `most`) is `size`; 1 for sizes below 0."""
    if size <= 0:
        return 1.0 if size < 0 else most
    low, high = math.log(1e-14), math.log(most)
    if critical(math.exp(low)) <= size:
        return 0.0
    for _ in range(40):  # bisection of the logarithm: 12 digits
        middle = (low + high) / 2
        low, high = (middle, high) if critical(math.exp(middle)) > size else (low, middle)
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class ShareDistance:
    """Distance of category shares from others, Cohen's w = sqrt(sum((p - q)^2 / q)), with clips clustered in prompts.

    The chi-square statistic of n independent clips is n w^2. Clips of a prompt are alike, so w^2 is divided by the measured
    variance instead: the first-order correction of Rao and Scott (1981), tested with F as by Thomas and Rao (1987).

    Attributes:
        value: w, at least 0.
        free: categories - 1, at least 1: the degrees of freedom of the shares.
        parts: mean variance per free share in units of q, with the degrees of freedom of its clusters.
    """

    value: float
    free: int
    parts: Parts

    def radius(self, tail: float) -> float:
        """Radius of the confidence region around the shares, in units of w, that misses with probability `tail`."""
        from scipy.special import fdtri

        found = sum(v * self.free * float(fdtri(self.free, self.free * f, 1 - tail)) for v, f in self.parts if v > 0)
        return math.sqrt(found)

    def interval(self, level: float) -> tuple[float, float]:
        """Least and largest w of shares in the confidence region."""
        radius = self.radius(1 - level)
        return max(self.value - radius, 0.0), self.value + radius

    @property
    def p(self) -> float:
        """P-value of "the shares are the same"."""
        return _tail(self.value, self.radius, most=1.0)


def share_distance(off: np.ndarray, expected: np.ndarray) -> ShareDistance:
    """Distance of shares from expected ones.

    The variance over prompts is at least 1 / (P + 1)^2, what one more prompt, drawn from `expected`, adds to it: prompts of
    equal shares, such as those with one category in all clips, do not show that there is no variance.

    Args:
        off: influence of every prompt on the difference of the shares [seeds,P,k], only of prompts that have recognised
            clips; means over P are the differences of a training seed; rows sum to 0.
        expected: shares [k] > 0 that the differences are divided by; sum 1.

    Raises:
        ValueError: fewer than two prompts.
    """
    seeds, prompts, categories = off.shape
    if prompts < 2:
        raise ValueError(f"a variance over prompts needs two of them, not {prompts}")
    apart = off.mean(1)  # [seeds,k]
    together = off.mean(0)  # [P,k]
    free = max(categories - 1, 1)  # one category in all clips of both: no distance, and the least variance
    variance = together.var(0, ddof=1) / prompts
    parts = [(max(float((variance / expected).sum() / free), 1 / (prompts + 1) ** 2), prompts - 1.0)]
    if seeds > 1:
        parts.append((float((apart.var(0, ddof=1) / seeds / expected).sum() / free), seeds - 1.0))
    return ShareDistance(float(np.sqrt((apart.mean(0) ** 2 / expected).sum())), free, tuple(parts))


def holm(p: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm 1979): with those below .05 taken, the chance of any false one is 5 %."""
    order = np.argsort(p, kind="stable")
    found, largest = [1.0] * len(p), 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[place]))
        found[place] = largest
    return found
