"""Paired comparison of samplers on the same prompts, several clips of each: intervals over prompts, rows of verdicts.

    found = Comparison(columns)
    found.quality([student], teacher)["vowels"]["verdict"]   # better, worse, equal, undecided; see `eval.verdicts`

Clips of one prompt are alike, so prompts are resampled instead of clips, and all columns alike, which makes differences
between columns paired. A row of `ROWS` is a statistic of one column under weights of the prompts; intervals, differences
and verdicts are arithmetic on its draws. The resampling is own code: scipy's bootstrap cannot share its draws between
columns and statistics. Shares of categories (skin tones) are compared as counts per prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from data.tiny.puppets import WORLDS
from eval import stats, verdicts
from eval.diversity import SPACES, DistributionMetrics
from eval.metrics import puppet_clips, puppet_diversity
from eval.metrics.puppet_clips import CANDIDATES, CLIP_METRICS
from eval.metrics.registry import metrics
from eval.puppet_scores import ClipScore
from eval.puppet_speech import pitch
from eval.scores import Scores, clip_values
from eval.stats import FEWEST, RESAMPLES, Estimate, Measure, Parts, RatioEstimate, ends_of, unavailable


@dataclass(frozen=True)
class OpenAttribute:
    """An attribute that captions leave open, of the clips of a column.

    Attributes:
        numbers: recognised category of every clip, int [P,S]; -1 where none was recognised, or the caption states it.
        shares: category -> its share in the world, in the order of the numbers; sum 1.
    """

    numbers: np.ndarray
    shares: dict[str, float]

    @property
    def expected(self) -> np.ndarray:
        """Shares of the world [k]."""
        return np.array(list(self.shares.values()))

    @property
    def recognised(self) -> np.ndarray:
        """Clips of a prompt that count, int [P]."""
        return np.asarray((self.numbers >= 0).sum(1))

    @property
    def counts(self) -> np.ndarray:
        """Clips of a prompt in each category [P,k]."""
        return np.stack([(self.numbers == number).sum(1) for number in range(len(self.shares))], 1).astype(float)

    def influence(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares [k], and what every prompt adds to them [P,k]: their mean over prompts is 0, shares + mean the estimate.

        The linearised ratio of counts to recognised clips, as prompts may have different numbers of these.
        """
        counts = self.counts
        total = counts.sum(1, keepdims=True)
        shares = counts.sum(0) / max(total.sum(), 1.0)
        return shares, (counts - total * shares) / max(total.mean(), 1e-9)


@dataclass
class Column:
    """Measured clips of one sampler: P prompts, S clips of each.

    Attributes:
        name: as shown; role: truth, bound, teacher, baseline or student.
        values: name -> value per clip [P,S]; NaN where a clip has none.
        open: name of an attribute that captions leave open -> its categories.
        distribution: diversity within prompts and distances to real puppets.
        facts: calls, seconds_per_clip and sampling settings.
    """

    name: str
    role: str
    values: dict[str, np.ndarray]
    open: dict[str, OpenAttribute]
    distribution: DistributionMetrics
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> tuple[int, int]:
        """Prompts, clips of each."""
        prompts, draws = self.distribution.nearest.shape
        return int(prompts), int(draws)

    @property
    def clips(self) -> int:
        return self.distribution.nearest.size


def column(
    name: str,
    role: str,
    scores: Sequence[Scores],
    waves: Sequence[Sequence[np.ndarray | None]],
    distribution: DistributionMetrics,
    facts: dict[str, Any] | None = None,
) -> Column:
    """Column of S clips per prompt, from the scores of each draw of clips; `waves` [S][P] for the pitch."""
    voices = [
        [_voice(clip, wave) for clip, wave in zip(draw.clips, tracks, strict=True)]
        for draw, tracks in zip(scores, waves, strict=True)
    ]  # [S][P][3]
    values = {
        "own": np.array([draw.own for draw in scores]).T,
        "other": np.array([draw.other for draw in scores]).T,
        "sync_retrieval": np.array([draw.found for draw in scores]).T,
        "nearest": distribution.nearest,
        **dict(zip(("semitones", "start_ms", "end_ms"), np.array(voices, float).T, strict=True)),
        **{
            key: np.array([clip_values(metric, draw.clips) for draw in scores]).T
            for key, metric in CLIP_METRICS.items()
            if metric.compared
        },
    }
    return Column(name, role, values, open_attributes(scores), distribution, facts or {})


OPEN_TITLES = {
    "skin": "skin tones",
    "side": "sides",
    "size": "sizes",
    "camera": "cameras",
    "voice": "voices",
    "sound": "background sounds",
    "object": "objects",
}


def open_attributes(scores: Sequence[Scores]) -> dict[str, OpenAttribute]:
    """Attributes that captions of these clips leave open, by title; a clip whose caption states one does not count."""
    found = {}
    for name, attribute in WORLDS[scores[0].clips[0].world].open.items():
        categories = dict(zip(attribute.values, attribute.expected, strict=True))
        order = list(categories)
        numbers = np.array(
            [
                [
                    order.index(clip.shown[name]) if name not in clip.stated and clip.shown[name] in order else -1
                    for clip in draw.clips
                ]
                for draw in scores
            ]
        ).T
        if any(name not in clip.stated for clip in scores[0].clips):
            found[OPEN_TITLES[name]] = OpenAttribute(numbers, categories)
    return found


def _voice(clip: ClipScore, wave: np.ndarray | None) -> tuple[float, float, float]:
    """Pitch in semitones, start and end of the speech in ms; NaN where they were not recognised."""
    if wave is None:
        return np.nan, np.nan, np.nan
    spans, hertz = clip.speech.vowel_spans, pitch(wave, clip.speech)
    semitones = np.nan if hertz is None else 12 * float(np.log2(hertz / 150))
    if len(spans) != clip.vowels.reference:
        return semitones, np.nan, np.nan
    return semitones, 1000 * spans[0][0], 1000 * spans[-1][1]


# ---- Statistics: (column, bound, weights [R,P]) -> values [R], or None where it cannot be had ----

Statistic = Callable[[Column, Column, np.ndarray], np.ndarray | None]


def weights(prompts: int, resamples: int = RESAMPLES) -> np.ndarray:
    """How often every prompt is drawn: [1 + resamples, P]; the first row is the sample itself."""
    drawn = np.random.Generator(np.random.PCG64([0, prompts])).integers(prompts, size=(resamples, prompts))
    counts = np.stack([np.bincount(row, minlength=prompts) for row in drawn])
    return np.vstack([np.ones(prompts), counts]).astype(float)


def mean_of(name: str) -> Statistic:
    """Mean over clips; None where a clip has no value."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
        values = own.values[name]
        return weight @ values.mean(1) / weight.sum(1) if np.isfinite(values).all() else None

    return statistic


def mean_of_known(name: str) -> Statistic:
    """Mean over the clips that have a value; None where no prompt has one."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
        known = np.isfinite(own.values[name])
        counts = weight @ known.sum(1)
        if not counts[0]:
            return None
        return weight @ np.where(known, own.values[name], 0).sum(1) / np.where(counts > 0, counts, np.nan)

    return statistic


def sync_skill(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
    """(own - chance) / (bound - chance), chance being the bound's mouths with other clips' audio."""
    chance = weight @ bound.values["other"].mean(1)
    best = weight @ bound.values["own"].mean(1) - chance
    if best[0] / weight[0].sum() < 0.05:
        return None
    return (weight @ own.values["own"].mean(1) - chance) / np.where(best > 0, best, np.nan)


def deviation_of(*names: str) -> Statistic:
    """Standard deviation between clips of one prompt, the root mean square over prompts and `names`."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
        squares = np.zeros(own.shape[0])
        counts = np.zeros(own.shape[0])
        for name in names:
            known = np.isfinite(own.values[name])
            enough = known.sum(1) > 1
            if enough.any():
                squares[enough] += np.nanvar(own.values[name][enough], axis=1, ddof=1)
                counts[enough] += 1
        if counts.sum() < 2:
            return None
        return np.sqrt(weight @ squares / np.maximum(weight @ counts, 1e-9))

    return statistic


def dispersion_in(space: str) -> Statistic:
    """Mean distance between clips of one prompt."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
        distance = own.distribution.dispersion.get(space)
        return None if distance is None else weight @ distance / weight.sum(1)

    return statistic


def energy_in(space: str) -> Statistic:
    """Energy distance to real puppets, see `eval.diversity.Reference`."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray:
        across, among, real = own.distribution.energy[space]
        terms = 2 * across - among - real
        terms = terms - np.diag(np.diag(terms))  # clips of one prompt are not independent
        pairs = weight.sum(1) ** 2 - (weight**2).sum(1)
        total = np.einsum("rp,pq,rq->r", weight, terms, weight, optimize=True)
        return total / np.where(pairs > 0, pairs, np.nan)  # with few prompts a draw may hold one of them only

    return statistic


@dataclass(frozen=True)
class Row:
    """A compared metric. One with a better side is compared by its difference, one with a target by its ratio.

    Attributes:
        name: key of the metric.
        share: whether it is a mean of values in [0,1].
        needs: what is missing where there is no value.
        values: of which a prompt has any in `clips` clips at least, to count; none: every prompt counts.
    """

    name: str
    statistic: Statistic
    share: bool = False
    needs: str = "several clips of a prompt"
    values: tuple[str, ...] = ()
    clips: int = 1

    def prompts(self, *columns: Column) -> int:
        """Number of prompts that have a value in each of the columns."""
        known = np.ones(columns[0].shape[0], bool)
        for own in columns if self.values else ():
            known &= np.any([np.isfinite(own.values[name]).sum(1) >= self.clips for name in self.values], 0)
        return int(known.sum())

    @property
    def direction(self) -> str:
        return metrics()[self.name].direction

    @property
    def margin(self) -> float | None:
        """Largest difference that counts as equal: the metric's own, else that of its kind; None: never equal."""
        own = metrics()[self.name].margin
        if own is not None:
            return own
        return verdicts.TARGET_MARGIN if self.direction == "target" else verdicts.SHARE_MARGIN if self.share else None


_ORDER = [metric.key for metric in (*puppet_clips.METRICS, *puppet_diversity.METRICS)]
ROWS = tuple(
    sorted(
        (
            *(
                Row(name, mean_of_known(name), share=metric.share, needs="clips with a value", values=(name,))
                for name, metric in CLIP_METRICS.items()
                if metric.compared
            ),
            Row("sync_skill", sync_skill),
            Row("sync_retrieval", mean_of("sync_retrieval"), share=True, needs=f"{CANDIDATES} prompts with audio"),
            Row("nearest", mean_of("nearest")),
            *(Row(f"energy_{space}", energy_in(space)) for space in SPACES),
            *(Row(f"spread_{space}", dispersion_in(space)) for space in SPACES),
            Row("pitch", deviation_of("semitones"), values=("semitones",), clips=2),
            Row("timing", deviation_of("start_ms", "end_ms"), values=("start_ms", "end_ms"), clips=2),
        ),
        key=lambda row: _ORDER.index(row.name),
    )
)


# ---- Measures and verdicts ----


def measure_of(draws: np.ndarray | None, count: int, row: Row) -> Measure:
    """The first draw with the percentile interval of the others, which reaches up to the value where all lie on one side."""
    if draws is None or not np.isfinite(draws[0]):
        return unavailable(f"needs {row.needs}", count)
    value, (low, high) = float(draws[0]), ends_of(draws[1:])
    return Measure(value, min(low, value), max(high, value), count)


class Comparison:
    """Columns of the same prompts, resampled together.

    What is judged is a list of columns: one checkpoint, or several that are one recipe trained with several seeds. Of these
    the mean is judged, and its variance has a component between seeds (`eval.stats.Estimate`).

    Args:
        columns: in the order of the table; one has the role bound.
        rows: that are compared; resamples: of the prompts.

    Raises:
        ValueError: columns of other prompts or numbers of clips.
    """

    def __init__(self, columns: Sequence[Column], rows: Sequence[Row] = ROWS, resamples: int = RESAMPLES) -> None:
        shapes = {c.shape for c in columns}
        if len(shapes) != 1:
            raise ValueError(f"columns need the same prompts and draws, not {sorted(shapes)}")
        self.columns, self.rows = list(columns), list(rows)
        self.prompts, self.draws = columns[0].shape
        self.bound = self.of_role("bound")[0]
        weight = weights(self.prompts, resamples)
        self.found = {(c.name, row.name): row.statistic(c, self.bound, weight) for c in columns for row in rows}

    def of_role(self, *roles: str) -> list[Column]:
        return [c for c in self.columns if c.role in roles]

    def value(self, own: Column, row: Row) -> Measure:
        """Measure of a column; Wilson's interval over prompts with a value where all clips are right, or all wrong."""
        draws = self.found[own.name, row.name]
        if row.share and draws is not None and draws[0] in (0.0, 1.0):
            prompts = row.prompts(own)
            return stats.proportion(round(draws[0] * prompts), prompts)
        return measure_of(draws, own.clips, row)

    def off(self, own: Column, row: Row) -> Measure:
        """Share by which a cell lies over the bound, or (negative) under it."""
        mine, bound = self.found[own.name, row.name], self.found[self.bound.name, row.name]
        return measure_of(None if mine is None or bound is None else mine / bound - 1, own.clips, row)

    def quality(self, own: Sequence[Column], baseline: Column) -> dict[str, dict[str, Any]]:
        """Rows with a better side, by their differences from a baseline; see `eval.verdicts.decide`."""
        found = {}
        for row in self.rows:
            if row.direction in ("up", "down"):
                sign = -1 if row.direction == "down" else 1
                draws, prompts = self._draws(own, baseline, row), row.prompts(*own, baseline)
                if draws is None or prompts < FEWEST:
                    found[row.name] = verdicts.not_measured("difference", _lacks(row, draws, prompts), own[0].clips)
                else:
                    gain = _gain(sign * (draws[0] - draws[1]), row, prompts)
                    found[row.name] = verdicts.of_gain(gain, row.margin, len(own) * own[0].clips, sign)
        return verdicts.decide(found)

    def match(self, own: Sequence[Column], target: Column) -> dict[str, dict[str, Any]]:
        """Rows with a target, by their ratios to a column that is to be matched, and shares of open attributes.

        Against the bound, whose clips are true ones, shares are compared with those of the world, which are known.
        """
        found = {}
        for row in self.rows:
            if row.direction == "target":
                draws, prompts = self._draws(own, target, row), row.prompts(*own, target)
                if draws is None or row.margin is None or prompts < FEWEST:
                    found[row.name] = verdicts.not_measured("ratio", _lacks(row, draws, prompts), own[0].clips)
                else:
                    found[row.name] = verdicts.of_ratio(_ratio(*draws, prompts), row.margin, len(own) * own[0].clips)
        for name in own[0].open:
            shown = [c.open[name] for c in own]
            other = None if target is self.bound else target.open[name]
            there = recognised_prompts(shown, other)
            clips = int(sum(attribute.recognised[there].sum() for attribute in shown))
            found[name] = verdicts.of_shares(share_distance_of(shown, other), clips=clips)
        return verdicts.decide(found)

    def _draws(self, own: Sequence[Column], other: Column, row: Row) -> tuple[np.ndarray, np.ndarray] | None:
        """Draws of columns [seeds, 1 + n] and of the other one [1 + n], those that are finite in all; None with few of them."""
        theirs, mine = self.found[other.name, row.name], [self.found[c.name, row.name] for c in own]
        known = [draws for draws in mine if draws is not None]
        if theirs is None or len(known) < len(own):
            return None
        stacked = np.stack(known)
        finite = np.isfinite(stacked).all(0) & np.isfinite(theirs)
        if not finite[0] or finite.mean() < 0.9:
            return None
        return stacked[:, finite], theirs[finite]


def _lacks(row: Row, draws: object, prompts: int) -> str:
    """Reason for a row without a verdict."""
    if draws is None or prompts >= FEWEST:
        return f"needs {row.needs}"
    return f"{prompts} prompts have a value in both, and a verdict needs {FEWEST}"


def _resampled(prompts: int) -> float:
    """What a bootstrap's variance over prompts lacks: P / (P - 1)."""
    return prompts / (prompts - 1)


def _gain(gains: np.ndarray, row: Row, prompts: int) -> Estimate:
    """Mean over training seeds of differences [seeds, 1 + n], of a number of prompts that have a value in all columns."""
    variance = float(gains[:, 1:].mean(0).var()) * _resampled(prompts)
    if row.share:
        # Half a prompt for each way to differ: the interval of equal shares has a width, too (Agresti and Min 2005).
        variance += 1 / (prompts + 2) ** 2
    parts: Parts = ((variance, prompts - 1.0),)
    if len(gains) > 1:
        parts = (*parts, (float(gains[:, 0].var(ddof=1)) / len(gains), len(gains) - 1.0))
    return Estimate(float(gains[:, 0].mean()), parts)


def _ratio(mine: np.ndarray, theirs: np.ndarray, prompts: int) -> RatioEstimate:
    """Ratio of the mean over training seeds of draws [seeds, 1 + n] to draws [1 + n]; `prompts` as above."""
    (own, both), (_, other) = (np.cov(mine[:, 1:].mean(0), theirs[1:], ddof=0) * _resampled(prompts)).tolist()
    parts = [(own, both, other, prompts - 1.0)]
    if len(mine) > 1:
        parts.append((float(mine[:, 0].var(ddof=1)) / len(mine), 0.0, 0.0, len(mine) - 1.0))
    return RatioEstimate(float(mine[:, 0].mean()), float(theirs[0]), tuple(parts))


def recognised_prompts(own: Sequence[OpenAttribute], other: OpenAttribute | None = None) -> np.ndarray:
    """Whether a prompt has a recognised clip in each of the columns, bool [P]; only such prompts tell anything of shares."""
    return np.all([attribute.recognised > 0 for attribute in (*own, *((other,) if other else ()))], 0)


def share_distance_of(own: Sequence[OpenAttribute], other: OpenAttribute | None = None) -> stats.ShareDistance | None:
    """Distance of the shares of checkpoints of one recipe from those of the world, or of another column.

    Args:
        own: of every checkpoint; other: of the same prompts, None for the world.

    Returns:
        The distance over the prompts that have recognised clips in all of these; None with fewer than `FEWEST` of them.
    """
    there = recognised_prompts(own, other)
    if there.sum() < FEWEST:
        return None
    found = [replace(attribute, numbers=attribute.numbers[there]).influence() for attribute in own]
    shares = np.stack([shares for shares, _ in found])  # [seeds,k]
    effect = np.stack([effect for _, effect in found])  # [seeds,P,k]
    expected = own[0].expected
    if other is not None:
        theirs, their_effect = replace(other, numbers=other.numbers[there]).influence()
        expected = (shares.mean(0) + theirs) / 2
        known = expected > 0
        shares, effect, expected = (
            shares[:, known] - theirs[known], (effect - their_effect)[..., known], expected[known]
        )  # fmt: skip
    else:
        shares = shares - expected
    return stats.share_distance(shares[:, None] + effect, expected)
