"""Statistics of a human study: intervals over raters and prompts, Bradley-Terry-Davidson, agreement, side bias.

    table = VoteTable(rater, group, opponent, outcome, focus_left, pair)
    shares(table)["win"]        # Measure(value=0.61, low=0.52, high=0.69, n=...)

Votes of one rater are alike, and so are votes on one prompt. The bootstrap resamples raters and prompts, both with
replacement, and a vote counts as often as its rater times its prompt was drawn (Owen, "The pigeonhole bootstrap", 2007). Its
intervals are somewhat too wide; those of votes taken as independent are far too narrow (`interval_coverage`).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from eval.stats import LEVEL, RESAMPLES, Measure, ends_of, proportion, unavailable

OUTCOMES = ("win", "tie", "loss")
CHUNK = 1 << 21
"""Weights of votes that are held at once, draws x votes."""
ELO = 400 / np.log(10)
"""Points of a log odds: 400 points are odds of 10 to 1."""
NO_MAXIMUM = "no opponent has both won and lost"


@dataclass(frozen=True)
class VoteTable:
    """Votes on pairs, without checks and repeats; all arrays [n].

    Attributes:
        rater, group, opponent: numbers of rater, prompt and opponent.
        outcome: of the focus: 0 win, 1 tie, 2 loss.
        focus_left: whether the focus was on the left.
        pair: number of the pair; a prompt may have several of one opponent.
    """

    rater: np.ndarray
    group: np.ndarray
    opponent: np.ndarray
    outcome: np.ndarray
    focus_left: np.ndarray
    pair: np.ndarray

    def __len__(self) -> int:
        return len(self.rater)

    def where(self, chosen: np.ndarray) -> "VoteTable":
        """The votes of a mask [n]."""
        return VoteTable(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @cached_property
    def chose_left(self) -> np.ndarray:
        """1 left, 0 right, NaN no difference, fp64 [n]."""
        return np.where(self.outcome == 1, np.nan, (self.outcome == 0) == self.focus_left)

    @property
    def clusters(self) -> tuple[int, int]:
        """Numbers of raters and of prompts."""
        return len(np.unique(self.rater)), len(np.unique(self.group))


def resampled(table: VoteTable, values: np.ndarray, draws: int = RESAMPLES) -> np.ndarray:
    """Weighted sums of values [n,m] in each draw of the two-way bootstrap: fp64 [draws,m].

    Raters are resampled unless there is one only, and prompts likewise.
    """
    rng = np.random.default_rng([0, len(table)])
    raters, rater = np.unique(table.rater, return_inverse=True)
    groups, group = np.unique(table.group, return_inverse=True)
    found = []
    step = max(1, CHUNK // max(1, len(table)))
    for first in range(0, draws, step):
        size = min(step, draws - first)
        weights = _counts(rng, len(raters), size)[:, rater] * _counts(rng, len(groups), size)[:, group]
        found.append(weights @ values)
    return np.concatenate(found)


def _counts(rng: np.random.Generator, clusters: int, draws: int) -> np.ndarray:
    """How often each cluster is drawn: fp64 [draws, clusters]."""
    return rng.multinomial(clusters, np.full(clusters, 1 / clusters), draws).astype(float)


def clustered_means(table: VoteTable, values: np.ndarray, draws: int = RESAMPLES) -> list[Measure]:
    """Means of the columns of values in [0,1] [n,m] with their two-way intervals, from the same draws.

    Where all values of a column are 0 or all are 1, Wilson's interval as if each rater (or each prompt, of which there are
    fewer) gave one vote: resampling could only repeat the value.
    """
    n, columns = values.shape
    if not n:
        return [unavailable("no votes")] * columns
    raters, groups = table.clusters
    if raters == groups == 1:
        return [Measure(float(value), None, None, n) for value in values.mean(0)]
    fewest = groups if raters == 1 else raters if groups == 1 else min(raters, groups)
    sums = resampled(table, np.concatenate([values, np.ones((n, 1))], 1), draws)
    found = []
    for k, value in enumerate(map(float, values.mean(0))):
        if value in (0.0, 1.0):
            ends = proportion(round(value * fewest), fewest)
            found.append(Measure(value, ends.low, ends.high, n))
        else:
            with np.errstate(divide="ignore", invalid="ignore"):
                found.append(Measure(value, *ends_of(sums[:, k] / sums[:, -1]), n))
    return found


def clustered_mean(table: VoteTable, values: np.ndarray, draws: int = RESAMPLES) -> Measure:
    """As `clustered_means` of one column [n], NaN where a vote has no value."""
    known = np.isfinite(values)
    return clustered_means(table.where(known), values[known][:, None], draws)[0]


def shares(table: VoteTable, draws: int = RESAMPLES) -> dict[str, Measure]:
    """Shares of win, tie and loss, and `score`, win plus half of tie."""
    values = np.stack([*(table.outcome == k for k in range(3)), 1 - table.outcome / 2], 1).astype(float)
    return dict(zip((*OUTCOMES, "score"), clustered_means(table, values, draws), strict=True))


def independent(table: VoteTable) -> dict[str, Measure]:
    """Shares with Wilson's interval, which takes votes as independent: for comparison only."""
    return {name: proportion(int((table.outcome == k).sum()), len(table)) for k, name in enumerate(OUTCOMES)}


# ---- Bradley-Terry-Davidson ----


def davidson(counts: np.ndarray, iterations: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Maximum likelihood of Davidson's model with ties (JASA 65, 1970), in a study of one focus against others.

    P(win) : P(tie) : P(loss) = 1 : nu sqrt(p) : p, with the opponent's strength p, that of the focus 1.

    Args:
        counts: wins, ties and losses of the focus against each opponent, fp64 [draws,opponents,3], may be weighted.

    Returns:
        log p [draws,opponents] and log nu [draws]. Without a maximum (`has_maximum`) they run off to large numbers, held by
        a ridge of 1e-6.
    """
    counts = np.asarray(counts, float)
    draws, opponents, _ = counts.shape
    features = np.zeros((opponents, 3, opponents + 1))  # outcome -> derivative of its logit
    for k in range(opponents):
        features[k, 1, k], features[k, 2, k], features[k, 1, -1] = 0.5, 1.0, 1.0
    totals = counts.sum(2)
    found = np.zeros((draws, opponents + 1))
    ridge = 1e-6 * np.eye(opponents + 1)
    for _ in range(iterations):
        logits = np.einsum("kcj,bj->bkc", features, found)
        chances = np.exp(logits - logits.max(2, keepdims=True))
        chances /= chances.sum(2, keepdims=True)
        slope = np.einsum("kcj,bkc->bj", features, counts - totals[..., None] * chances) - found @ ridge
        mean = np.einsum("kcj,bkc->bkj", features, chances)
        square = np.einsum("kci,kcj,bkc->bkij", features, features, chances)
        curvature = np.einsum("bk,bkij->bij", totals, square - mean[..., :, None] * mean[..., None, :]) + ridge
        step = np.clip(np.linalg.solve(curvature, slope[..., None])[..., 0], -2, 2)
        found += step
        if np.abs(step).max() < 1e-9:
            break
    return found[:, :-1], found[:, -1]


def has_maximum(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether Davidson's likelihood has a maximum at finite p of each opponent, and at finite nu.

    With ties it needs some opponent with both wins and losses: of wins and ties alone, more ties and a weaker opponent cannot
    be told apart. An opponent without ties needs both itself.

    Args:
        counts: as of `davidson`.

    Returns:
        bool [draws,opponents] and [draws].
    """
    wins, ties, losses = np.moveaxis(np.asarray(counts), -1, 0) > 0
    both = wins & losses
    anywhere = both.any(-1)
    return both | (ties & anywhere[:, None]), anywhere


def strengths(table: VoteTable, opponents: int, draws: int = RESAMPLES) -> dict[str, list[Measure] | Measure]:
    """Davidson's strengths of the opponents, in Elo points relative to the focus, with intervals of the two-way bootstrap.

    Returns:
        "elo": a measure per opponent; "tie": nu, the odds of a tie between equals against a win. Without a value where the
        likelihood has no maximum, without an interval where that of 2.5 % of the resamples has none.
    """
    onehot = np.zeros((len(table), opponents * 3))
    onehot[np.arange(len(table)), 3 * table.opponent + table.outcome] = 1
    counts = onehot.sum(0).reshape(opponents, 3)
    if not counts.sum():
        return {"elo": [unavailable("no votes")] * opponents, "tie": unavailable("no votes")}
    logs, ties = davidson(counts[None])
    resamples = resampled(table, onehot, draws).reshape(draws, opponents, 3)
    drawn, drawn_ties = davidson(resamples)
    (known, _), (drawn_known, drawn_ties_known) = has_maximum(counts[None]), has_maximum(resamples)

    def measure(value: float, draws: np.ndarray, known: np.ndarray, n: int, reason: str) -> Measure:
        if reason:
            return unavailable(reason, n)
        if table.clusters == (1, 1):
            return Measure(value, None, None, n)
        if (~known).mean() >= (1 - LEVEL) / 2:
            return Measure(value, None, None, n, reason="too few votes for an interval")
        return Measure(value, *ends_of(draws), n)

    elo = []
    for k in range(opponents):
        kinds = int((counts[k] > 0).sum())
        reason = "no votes" if not kinds else "all votes are equal" if kinds == 1 else "" if known[0, k] else NO_MAXIMUM
        elo.append(measure(float(ELO * logs[0, k]), ELO * drawn[:, k], drawn_known[:, k], int(counts[k].sum()), reason))
    tied = counts[:, 1].sum()
    reason = "no ties" if tied == 0 else "ties only" if tied == counts.sum() else "" if known.any() else NO_MAXIMUM
    return {
        "elo": elo,
        "tie": measure(float(np.exp(ties[0])), np.exp(drawn_ties), drawn_ties_known, len(table), reason),
    }


# ---- Agreement, sides ----


def agreement(table: VoteTable, draws: int = 500) -> Measure:
    """Krippendorff's alpha of the ordered outcomes loss < tie < win over pairs that several raters judged; prompts resampled.

    1: raters agree; 0: no more than by chance. By the package krippendorff; where it is missing, unavailable.
    """
    from eval.metrics.registry import missing_package

    if (missing := missing_package("krippendorff")) is not None:
        return unavailable(str(missing))
    import krippendorff

    pairs, first, pair = np.unique(table.pair, return_index=True, return_inverse=True)
    counts = np.zeros((len(pairs), 3))
    np.add.at(counts, (pair, table.outcome), 1)
    shared = counts.sum(1) > 1
    counts, groups = counts[shared], table.group[first][shared]
    if not len(counts):
        return unavailable("no pair was judged by two raters")
    if (counts.sum(0) > 0).sum() < 2:
        return unavailable("all votes are equal")

    def alpha(values: np.ndarray) -> float:
        if (values.sum(0) > 0).sum() < 2:
            return float("nan")
        return float(krippendorff.alpha(value_counts=values, level_of_measurement="ordinal"))

    found, (names, group) = alpha(counts), np.unique(groups, return_inverse=True)
    n = int(counts.sum())
    if len(names) == 1:
        return Measure(found, None, None, n)
    rng = np.random.default_rng([0, n])
    repeats = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws)[:, group]
    return Measure(found, *ends_of(np.array([alpha(np.repeat(counts, times, axis=0)) for times in repeats])), n)


def side_bias(table: VoteTable) -> tuple[Measure, float | None]:
    """Share of "left" among votes that are no tie, and the exact p-value of 1/2 as if votes were independent.

    Sides are balanced, so that the systems' difference cancels.
    """
    from scipy.stats import binomtest

    chosen = table.chose_left[np.isfinite(table.chose_left)]
    if not len(chosen):
        return unavailable("no vote that is no tie"), None
    return clustered_mean(table, table.chose_left), float(binomtest(int(chosen.sum()), len(chosen)).pvalue)
