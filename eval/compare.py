"""Ways of making the same clips, compared: the same prompts, several clips of each, intervals over prompts.

Clips of one prompt are alike, so prompts and not clips are resampled; every column is resampled in the same way,
which makes differences between columns paired. A row of `ROWS` is a statistic of one column under weights of the
prompts, and everything else (intervals, differences, verdicts) is arithmetic on its draws.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.tiny.puppets import SKINS
from eval import stats
from eval.diversity import Place
from eval.puppet_speech import pitch
from eval.scores import Scores
from eval.stats import LEVEL, Measure, unavailable

TOLERANCE = 0.1  # of diversity: within 10 % of the teacher's


@dataclass
class Column:
    """One way of making the clips, measured.

    Attributes:
        name: as shown; role: truth, bound, teacher, baseline or student.
        values: one value per clip [P,S] by name; NaN where a clip has none.
        skins: numbers of skin tones [P,S].
        facts: about how the clips were made: calls, seconds_per_clip, sampling.
    """

    name: str
    role: str
    values: dict[str, np.ndarray]
    skins: np.ndarray
    place: Place
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def clips(self) -> int:
        return int(self.skins.size)


def column(
    name: str,
    role: str,
    scores: Sequence[Scores],
    waves: Sequence[Sequence[np.ndarray | None]],
    place: Place,
    facts: dict[str, Any] | None = None,
) -> Column:
    """Values of S draws of the prompts' clips from the scores of each draw; `waves` [S][P] for the pitch."""
    values: dict[str, list[list[float]]] = {}
    for draw, sounds in zip(scores, waves, strict=True):
        rows: dict[str, list[float]] = {
            "own": draw.own.tolist(), "other": draw.other.tolist(), "sync_retrieval": draw.found.tolist()
        }  # fmt: skip
        for clip, wave in zip(draw.clips, sounds, strict=True):
            spans, stated = clip.heard.vowel_spans, clip.vowels.reference
            whole = wave is not None and len(spans) == stated
            voice = pitch(wave, clip.heard) if wave is not None else None
            of_clip = {
                "attributes": float(np.mean(list(clip.right.values()))),
                "vowels": clip.vowels.hits / stated,
                "vowels_exact": float(clip.vowels.errors == 0),
                "sharpness": clip.seen.sharpness,
                "mouth_sharpness": clip.seen.mouth_sharpness,
                "amplitude": clip.seen.amplitude,
                "flicker": clip.seen.flicker,
                "semitones": float("nan") if voice is None else 12 * float(np.log2(voice / 150)),
                "start_ms": 1000 * spans[0][0] if whole else float("nan"),
                "end_ms": 1000 * spans[-1][1] if whole else float("nan"),
            }
            for key, value in of_clip.items():
                rows.setdefault(key, []).append(value)
        for key, listed in rows.items():
            values.setdefault(key, []).append(listed)
    tones = list(SKINS)
    skins = np.array([[tones.index(clip.seen.attributes["skin"]) for clip in draw.clips] for draw in scores])
    arrays = {key: np.array(listed, float).T for key, listed in values.items()}
    arrays["nearest"] = place.nearest
    return Column(name, role, arrays, skins.T, place, facts or {})


# ----------------------------------------------------------------------------------------------------
# Statistics: (column, bound, weights [R,P]) -> values [R], or None where it cannot be had
# ----------------------------------------------------------------------------------------------------

Statistic = Callable[[Column, Column, np.ndarray], np.ndarray | None]


def weights(prompts: int) -> np.ndarray:
    """How often every prompt is drawn: [1 + RESAMPLES, P]; the first row is the sample itself."""
    drawn = stats.resample(prompts)
    counts = np.stack([np.bincount(row, minlength=prompts) for row in drawn])
    return np.vstack([np.ones(prompts), counts]).astype(float)


def mean_of(name: str) -> Statistic:
    """Mean over clips."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray:
        return weight @ own.values[name].mean(1) / weight.sum(1)

    return statistic


def sync_skill(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
    """(own - chance) / (bound - chance), chance being the bound's mouths beside other clips' voices."""
    chance = weight @ bound.values["other"].mean(1)
    room = weight @ bound.values["own"].mean(1) - chance
    if room[0] / weight[0].sum() < 0.05:
        return None
    return (weight @ own.values["own"].mean(1) - chance) / np.where(room > 0, room, np.nan)


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


def spread_in(space: str) -> Statistic:
    """Mean distance between clips of one prompt."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray | None:
        distance = own.place.spread.get(space)
        return None if distance is None else weight @ distance / weight.sum(1)

    return statistic


def energy_in(space: str) -> Statistic:
    """Energy distance to real puppets, see `eval.diversity.Reference`."""

    def statistic(own: Column, bound: Column, weight: np.ndarray) -> np.ndarray:
        across, among, real = own.place.energy[space]
        terms = 2 * across - among - real
        terms = terms - np.diag(np.diag(terms))  # clips of one prompt are not independent
        pairs = weight.sum(1) ** 2 - (weight**2).sum(1)
        total = np.einsum("rp,pq,rq->r", weight, terms, weight, optimize=True)
        return total / np.where(pairs > 0, pairs, np.nan)  # with few prompts a draw may hold one of them only

    return statistic


@dataclass(frozen=True)
class Row:
    """A row of the table.

    `better` is up, down, or bound: as near to the bound as can be, on either side. `of` says what it belongs to:
    quality or diversity. `share` marks means of values in [0,1].
    """

    name: str
    about: str
    better: str
    statistic: Statistic
    of: str = "quality"
    share: bool = False


ROWS = (
    Row("attributes", "face, hair, shirt and wall as prompted", "up", mean_of("attributes"), share=True),
    Row("vowels", "vowels right", "up", mean_of("vowels"), share=True),
    Row("vowels_exact", "whole vowel sequence right", "up", mean_of("vowels_exact"), share=True),
    Row("sync_skill", "lip-sync skill: chance 0, codec bound 1", "up", sync_skill),
    Row("sync_retrieval", "own voice found among 20", "up", mean_of("sync_retrieval"), share=True),
    Row("sharpness", "sharpness: variance of the Laplacian", "bound", mean_of("sharpness")),
    Row("mouth_sharpness", "sharpness around the mouth", "bound", mean_of("mouth_sharpness")),
    Row("amplitude", "mouth opening's range, share of the picture", "bound", mean_of("amplitude")),
    Row("flicker", "change between frames away from the mouth", "down", mean_of("flicker")),
    Row("nearest", "look: distance to the nearest real puppet", "down", mean_of("nearest")),
    Row("energy_look", "look: energy distance to real puppets", "down", energy_in("look")),
    Row("energy_motion", "motion: energy distance to real puppets", "down", energy_in("motion")),
    Row("energy_voice", "voice: energy distance to real puppets", "down", energy_in("voice")),
    Row("skin_tones", "effective number of skin tones, of 3", "bound", skin_tones, "diversity"),
    Row("spread_look", "look: distance between clips of a prompt", "bound", spread_in("look"), "diversity"),
    Row("spread_motion", "motion: distance between clips of a prompt", "bound", spread_in("motion"), "diversity"),
    Row("spread_voice", "voice: distance between clips of a prompt", "bound", spread_in("voice"), "diversity"),
    Row("pitch", "pitch: deviation in a prompt, semitones", "bound", deviation_of("semitones"), "diversity"),
    Row("timing", "speech's start and end: deviation in a prompt, ms", "bound",
        deviation_of("start_ms", "end_ms"), "diversity"),
)  # fmt: skip


# ----------------------------------------------------------------------------------------------------
# Measures and verdicts
# ----------------------------------------------------------------------------------------------------


def measure(draws: np.ndarray | None, count: int, why: str = "needs several clips of a prompt") -> Measure:
    """The first draw with the percentile interval of the others.

    Where a statistic is at its ceiling (all skin tones equally often), all other draws lie below: the interval
    reaches up to the value then.
    """
    if draws is None or not np.isfinite(draws[0]):
        return unavailable(why, count)
    low, high = np.nanquantile(draws[1:], [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = float(draws[0])
    return Measure(value, min(float(low), value), max(float(high), value), count)


@dataclass(frozen=True)
class Verdict:
    """How one column does beside another in one row.

    `change` is column minus baseline in the row's own unit; `gain` the same turned so that more is better (for rows
    with better = bound: by how much nearer, in shares of the bound). `word` is better, worse, within noise or n/a.
    """

    change: Measure
    gain: Measure
    word: str

    def to_dict(self) -> dict[str, Any]:
        return {"change": self.change.to_dict(), "gain": self.gain.to_dict(), "verdict": self.word}


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
        self.found = {
            (c.name, row.name): row.statistic(c, self.bound, weight) for c in columns for row in ROWS
        }

    def of_role(self, *roles: str) -> list[Column]:
        return [c for c in self.columns if c.role in roles]

    def value(self, own: Column, row: Row) -> Measure:
        """A cell. Where all clips are right, or all wrong, Wilson's interval over prompts keeps the doubt."""
        draws = self.found[own.name, row.name]
        if row.share and draws is not None and draws[0] in (0.0, 1.0):
            return stats.proportion(round(draws[0] * self.prompts), self.prompts)
        return measure(draws, own.clips)

    def off(self, own: Column, row: Row) -> Measure:
        """Share by which a cell lies over the bound, or (negative) under it."""
        mine, bound = self.found[own.name, row.name], self.found[self.bound.name, row.name]
        return measure(None if mine is None or bound is None else mine / bound - 1, own.clips)

    def against(self, own: Column, baseline: Column, row: Row) -> Verdict:
        """`own` beside `baseline`, paired."""
        mine, theirs = self.found[own.name, row.name], self.found[baseline.name, row.name]
        bound = self.found[self.bound.name, row.name]
        if mine is None or theirs is None or bound is None:
            nothing = measure(None, own.clips)
            return Verdict(nothing, nothing, "n/a")
        gains = mine - theirs
        if row.better == "down":
            gains = theirs - mine
        elif row.better == "bound":
            gains = np.abs(theirs / bound - 1) - np.abs(mine / bound - 1)
        gain = measure(gains, own.clips)
        assert gain.low is not None
        assert gain.high is not None
        word = "better" if gain.low > 0 else "worse" if gain.high < 0 else "within noise"
        return Verdict(measure(mine - theirs, own.clips), gain, word)

    def kept(self, own: Column, row: Row) -> tuple[Measure, str]:
        """Diversity as a ratio to the teacher's, and whether it is within `TOLERANCE`.

        The word is kept where the ratio is within; lost or over where the whole interval is outside; low or high, both
        "within noise", where only the ratio is.
        """
        mine, theirs = self.found[own.name, row.name], self.found[self.teacher.name, row.name]
        ratio = measure(None if mine is None or theirs is None else mine / theirs, own.clips)
        if ratio.value is None or ratio.low is None or ratio.high is None:
            return ratio, "n/a"
        under, over = 1 - TOLERANCE, 1 + TOLERANCE
        if ratio.value < under:
            return ratio, "lost" if ratio.high < under else "low, within noise"
        if ratio.value > over:
            return ratio, "over" if ratio.low > over else "high, within noise"
        return ratio, "kept"
