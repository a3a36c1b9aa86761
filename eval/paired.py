"""Paired comparison of samplers on the same prompts, several clips of each: intervals over prompts, verdicts.

    found = Comparison(columns)
    found.against(student, teacher, ROWS[0])["verdict"]   # better, worse, within noise

Clips of one prompt are alike, so prompts are resampled instead of clips, and all columns alike, which makes differences
between columns paired. A row of `ROWS` is a statistic of one column under weights of the prompts; intervals, differences
and verdicts are arithmetic on its draws. The resampling is own code: scipy's bootstrap cannot share its draws between
columns and statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.tiny.puppets import SKINS
from eval import stats
from eval.diversity import SPACES, DistributionMetrics
from eval.metrics import puppet_clips, puppet_diversity
from eval.metrics.puppet_clips import CANDIDATES, CLIP_METRICS
from eval.metrics.registry import metrics
from eval.puppet_scores import ClipScore
from eval.puppet_speech import pitch
from eval.scores import Scores, clip_values
from eval.stats import RESAMPLES, Measure, ends_of, unavailable
from eval.tables import format_interval

TOLERANCE = 0.1  # of diversity: within 10 % of the teacher's
FASTER = 1.05  # ratio of times from which they count as different


@dataclass
class Column:
    """Measured clips of one sampler: P prompts, S clips of each.

    Attributes:
        name: as shown; role: truth, bound, teacher, baseline or student.
        values: name -> value per clip [P,S]; NaN where a clip has none.
        skins: numbers of skin tones [P,S].
        distribution: diversity within prompts and distances to real puppets.
        facts: calls, seconds_per_clip and sampling settings.
    """

    name: str
    role: str
    values: dict[str, np.ndarray]
    skins: np.ndarray
    distribution: DistributionMetrics
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return int(self.skins.size)


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
    tones = list(SKINS)
    skins = np.array([[tones.index(clip.vision.attributes["skin"]) for clip in draw.clips] for draw in scores])
    return Column(name, role, values, skins.T, distribution, facts or {})


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


def weights(prompts: int) -> np.ndarray:
    """How often every prompt is drawn: [1 + RESAMPLES, P]; the first row is the sample itself."""
    drawn = np.random.Generator(np.random.PCG64([0, prompts])).integers(prompts, size=(RESAMPLES, prompts))
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


def skin_tones(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray:
    """Effective number of skin tones: exp of the entropy of their shares, 1 to 3."""
    counts = weight @ np.stack([(own.skins == tone).sum(1) for tone in range(len(SKINS))], 1)  # [R, tones]
    share = counts / counts.sum(1, keepdims=True)
    return np.exp(-(share * np.log(np.where(share > 0, share, 1))).sum(1))


def deviation_of(*names: str) -> Statistic:
    """Standard deviation between clips of one prompt, the root mean square over prompts and `names`."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
        squares = np.zeros(len(own.skins))
        counts = np.zeros(len(own.skins))
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
    """A compared metric.

    Attributes:
        name: key of the metric.
        diversity: whether it is of diversity; share: whether it is a mean of values in [0,1].
        needs: what is missing where there is no value.
    """

    name: str
    statistic: Statistic
    diversity: bool = False
    share: bool = False
    needs: str = "several clips of a prompt"

    @property
    def direction(self) -> str:
        return metrics()[self.name].direction


_ORDER = [metric.key for metric in (*puppet_clips.METRICS, *puppet_diversity.METRICS)]
ROWS = tuple(
    sorted(
        (
            *(
                Row(name, mean_of_known(name), share=metric.share, needs="clips with a value")
                for name, metric in CLIP_METRICS.items()
                if metric.compared
            ),
            Row("sync_skill", sync_skill),
            Row("sync_retrieval", mean_of("sync_retrieval"), share=True, needs=f"{CANDIDATES} prompts with audio"),
            Row("nearest", mean_of("nearest")),
            *(Row(f"energy_{space}", energy_in(space)) for space in SPACES),
            Row("skin_tones", skin_tones, diversity=True),
            *(Row(f"spread_{space}", dispersion_in(space), diversity=True) for space in SPACES),
            Row("pitch", deviation_of("semitones"), diversity=True),
            Row("timing", deviation_of("start_ms", "end_ms"), diversity=True),
        ),
        key=lambda row: _ORDER.index(row.name),
    )
)


# ---- Measures and verdicts ----


def measure_of(draws: np.ndarray | None, count: int, row: Row) -> Measure:
    """The first draw with the percentile interval of the others.

    Where a statistic is at its ceiling (all skin tones equally often), all other draws lie below: the interval
    reaches up to the value then.
    """
    if draws is None or not np.isfinite(draws[0]):
        return unavailable(f"needs {row.needs}", count)
    value, (low, high) = float(draws[0]), ends_of(draws[1:])
    return Measure(value, min(low, value), max(high, value), count)


class Comparison:
    """Columns of the same prompts, resampled together.

    Args:
        columns: in the order of the table; one has the role bound, one teacher.

    Raises:
        ValueError: columns of other prompts or numbers of clips.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        shapes = {c.skins.shape for c in columns}
        if len(shapes) != 1:
            raise ValueError(f"columns need the same prompts and draws, not {sorted(shapes)}")
        self.columns = list(columns)
        self.prompts, self.draws = columns[0].skins.shape
        self.bound = self.of_role("bound")[0]
        self.teacher = self.of_role("teacher")[0]
        weight = weights(self.prompts)
        self.found = {(c.name, row.name): row.statistic(c, self.bound, weight) for c in columns for row in ROWS}

    def of_role(self, *roles: str) -> list[Column]:
        return [c for c in self.columns if c.role in roles]

    def value(self, own: Column, row: Row) -> Measure:
        """Measure of a column; Wilson's interval over prompts where all clips are right, or all wrong."""
        draws = self.found[own.name, row.name]
        if row.share and draws is not None and draws[0] in (0.0, 1.0):
            return stats.proportion(round(draws[0] * self.prompts), self.prompts)
        return measure_of(draws, own.clips, row)

    def off(self, own: Column, row: Row) -> Measure:
        """Share by which a cell lies over the bound, or (negative) under it."""
        mine, bound = self.found[own.name, row.name], self.found[self.bound.name, row.name]
        return measure_of(None if mine is None or bound is None else mine / bound - 1, own.clips, row)

    def against(self, own: Column, baseline: Column, row: Row) -> dict[str, Any]:
        """Paired difference of `own` and `baseline`, as plain values.

        Returns:
            {"change": measure in the metric's unit; "gain": the change with the sign that makes positive better, of
            metrics with a target by how much nearer to the bound, as a share of the bound; "verdict": better or worse
            where the gain's interval excludes 0, else within noise; n/a without values}.
        """
        mine, theirs = self.found[own.name, row.name], self.found[baseline.name, row.name]
        bound = self.found[self.bound.name, row.name]
        changes = gains = None
        if mine is not None and theirs is not None and bound is not None:
            changes = mine - theirs
            if row.direction == "target":
                gains = np.abs(theirs / bound - 1) - np.abs(mine / bound - 1)
            else:
                gains = -changes if row.direction == "down" else changes
        gain, word = measure_of(gains, own.clips, row), "n/a"
        if gain.low is not None and gain.high is not None:
            word = "better" if gain.low > 0 else "worse" if gain.high < 0 else "within noise"
        change = measure_of(changes, own.clips, row)
        return {"change": change.to_dict(), "gain": gain.to_dict(), "verdict": word}

    def kept(self, own: Column, row: Row) -> dict[str, Any]:
        """Diversity as a ratio to the teacher's, and whether it is within `TOLERANCE`, as plain values.

        Returns:
            {"ratio": measure; "verdict": kept where the ratio is within; lost or over where the whole interval is outside;
            low or high, both "within noise", where only the ratio is; n/a without values}.
        """
        mine, theirs = self.found[own.name, row.name], self.found[self.teacher.name, row.name]
        ratio = measure_of(None if mine is None or theirs is None else mine / theirs, own.clips, row)
        under, over = 1 - TOLERANCE, 1 + TOLERANCE
        if ratio.value is None or ratio.low is None or ratio.high is None:
            word = "n/a"
        elif ratio.value < under:
            word = "lost" if ratio.high < under else "low, within noise"
        elif ratio.value > over:
            word = "over" if ratio.low > over else "high, within noise"
        else:
            word = "kept"
        return {"ratio": ratio.to_dict(), "verdict": word}


# ---- Verdicts from the values of a compare.json ----


def claims(values: Mapping[str, Any], student: str) -> list[dict[str, Any]]:
    """Verdicts on a student: against each baseline, on diversity, on speed.

    The word for a baseline: better where some metric is and none is worse, worse in the opposite case, mixed where there
    are both, within noise where there are neither. For diversity: kept, or not kept where a metric is lost or over.

    Returns:
        [{"about", "verdict" (the word), "details" (lines)}].
    """
    columns = values["columns"]
    teacher = next(name for name, c in columns.items() if c["role"] == "teacher")
    found = [_against_claim(name, rows) for name, rows in values["against"][student].items()]
    found.append(_diversity_claim(values["diversity"][student]))
    mine, theirs = (columns[name].get("seconds_per_clip") for name in (student, teacher))
    if mine and theirs:
        ratio = theirs / mine
        word = "faster" if ratio > FASTER else "slower" if ratio < 1 / FASTER else "as fast"
        calls = f"{columns[student]['calls']} against {columns[teacher]['calls']} network calls"
        how = f"{ratio:.1f} times: {mine:.3f} s against {theirs:.3f} s of denoising per clip; {calls}"
        found.append({"about": f"speed against {teacher}", "verdict": word, "details": [how]})
    return found


def _against_claim(baseline: str, rows: Mapping[str, Any]) -> dict[str, Any]:
    better, worse, level = (
        [name for name, verdict in rows.items() if verdict["verdict"] == word]
        for word in ("better", "worse", "within noise")
    )
    word = "mixed" if better and worse else "better" if better else "worse" if worse else "within noise"
    details = [
        f"{title}: {'; '.join(_change(name, rows[name]) for name in names)}"
        for title, names in (("better", better), ("worse", worse))
        if names
    ]
    details += [f"within noise: {', '.join(level)}"] if level else []
    return {"about": f"against {baseline}", "verdict": word, "details": details}


def _diversity_claim(kept: Mapping[str, Any]) -> dict[str, Any]:
    """Whether clips of a prompt differ as the teacher's do, within `TOLERANCE`."""
    known = {name: found for name, found in kept.items() if found["verdict"] != "n/a"}
    words = [found["verdict"] for found in known.values()]
    lost = any(word in ("lost", "over") for word in words)
    near = any("noise" in word for word in words)
    details = [f"{name} {format_interval(found['ratio'])}: {found['verdict']}" for name, found in known.items()]
    return {
        "about": f"diversity: within {TOLERANCE:.0%} of the teacher's (ratios)".replace("%", " %"),
        "verdict": "not kept" if lost else "kept within noise" if near else "kept" if known else "n/a",
        "details": ["; ".join(details)] if known else ["needs several seeds"],
    }


def _change(name: str, verdict: Mapping[str, Any]) -> str:
    """Change of a metric in its unit; of one with a target, how much nearer to the bound or farther from it."""
    if metrics()[name].direction != "target":
        return f"{name} {format_interval(verdict['change'], signed=True)}"
    gain = verdict["gain"]
    if gain["value"] > 0:
        return f"{name} {format_interval(gain, 100, unit=' %')} nearer the bound"
    turned = {"value": -gain["value"], "low": -gain["high"], "high": -gain["low"]}
    return f"{name} {format_interval(turned, 100, unit=' %')} farther from the bound"
