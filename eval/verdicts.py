"""Verdicts of a comparison: words for rows from intervals with margins, Holm's correction, words for claims.

    rows = decide({"vowels": of_gain(gain, margin=0.05), "pitch": of_ratio(ratio, margin=0.1)})
    rows["pitch"]["verdict"]      # equal, lower, higher or undecided

Equal is shown, not assumed: the 90 % interval lies within the margin (two one-sided tests at 5 %). Where the data show
neither equality nor a difference, the word is undecided. Differences are corrected for the rows of their claim
(`stats.holm`). Equality is not: a claim of equality needs all of its rows, which keeps its error at 5 % (Berger 1982).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eval import stats
from eval.stats import Estimate, Measure, RatioEstimate, ShareDistance, unavailable

ERROR = 0.05  # of a test
TARGET_MARGIN = 0.1  # a ratio to what is aimed at within 10 % counts as equal
SHARE_MARGIN = 0.05  # of shares of right clips or syllables
CATEGORY_MARGIN = 0.2  # Cohen's w: of three equal shares, one 9 points off
FASTER = 1.05  # ratio of times from which they count as different


@dataclass(frozen=True)
class Finding:
    """What the data say on one row, before the correction for the number of rows.

    Attributes:
        measure: the difference, ratio or distance, with its interval; kind: which of them.
        margin: largest that counts as equal; None: equality is not judged.
        equal: p-value of "the truth lies outside of the margin"; differs: of "no difference", of ratios "within the margin".
        word: for a difference to the side of the estimate.
    """

    kind: str
    measure: Measure
    margin: float | None
    equal: float
    differs: float
    word: str


def of_gain(gain: Estimate, margin: float | None, clips: int = 0, sign: int = 1) -> Finding:
    """Row with a better side: better, worse, equal or undecided.

    Args:
        gain: difference in the metric's unit, positive where it is better.
        sign: -1 where lower values are better: the measure is the difference of the values, with its 95 % interval.
    """
    low, high = sorted(sign * end for end in gain.interval(1 - ERROR))
    differs = min(1.0, 2 * min(gain.above(0), gain.below(0)))
    equal = 1.0 if margin is None else gain.outside(margin)
    measure = Measure(sign * gain.value, low, high, clips)
    return Finding("difference", measure, margin, equal, differs, "better" if gain.value > 0 else "worse")


def of_ratio(ratio: RatioEstimate, margin: float, clips: int = 0) -> Finding:
    """Row with a target: equal within 1 - margin to 1 / (1 - margin), lower, higher or undecided.

    Lower and higher need the whole 95 % interval outside of the margin. The measure is the ratio with its 90 % interval.
    """
    under, over = ratio.minus(1 - margin), ratio.minus(1 / (1 - margin))
    equal = max(under.above(0), over.below(0))
    differs = min(1.0, 2 * min(under.below(0), over.above(0)))  # either side counts as a difference
    low, high = ratio.interval(1 - 2 * ERROR)
    if not math.isfinite(low) or ratio.other <= 0:
        return not_measured("ratio", "what it is compared with may be 0", clips)
    measure = Measure(ratio.own / ratio.other, low, high, clips)
    return Finding("ratio", measure, margin, equal, differs, "lower" if ratio.own < ratio.other else "higher")


def of_shares(distance: ShareDistance | None, margin: float = CATEGORY_MARGIN, clips: int = 0) -> Finding:
    """Row of category shares: equal where the 90 % confidence region lies within the margin, different, or undecided.

    Args:
        distance: None where fewer than `stats.FEWEST` prompts have recognised clips: n/a.
        clips: that were recognised.
    """
    if distance is None:
        return not_measured("shares", f"needs {stats.FEWEST} prompts with recognised clips", clips)
    measure = Measure(distance.value, *distance.interval(1 - 2 * ERROR), clips)
    equal = 0.0 if measure.high is not None and measure.high < margin else 1.0
    return Finding("shares", measure, margin, equal, distance.p, "different")


def not_measured(kind: str, reason: str, clips: int = 0) -> Finding:
    """Row without values: n/a."""
    return Finding(kind, unavailable(reason, clips), None, 1.0, 1.0, "n/a")


def decide(findings: Mapping[str, Finding]) -> dict[str, dict[str, Any]]:
    """Words for the rows of one claim, as plain values.

    Equal goes before a difference: one that is smaller than the margin does not matter, however sure it is.

    Returns:
        row -> {"kind", the measure's fields, "margin", "verdict", "p" (of a difference, after `stats.holm` over these rows)}.
    """
    known = [name for name, found in findings.items() if found.measure.value is not None]
    corrected = dict(zip(known, stats.holm([findings[name].differs for name in known]), strict=True))
    rows = {}
    for name, found in findings.items():
        if name not in corrected:
            word = "n/a"
        elif found.equal < ERROR:
            word = "equal"
        else:
            word = found.word if corrected[name] < ERROR else "undecided"
        rows[name] = {
            "kind": found.kind, **found.measure.to_dict(), "margin": found.margin, "p": corrected.get(name), "verdict": word,
        }  # fmt: skip
    return rows


# ---- Claims ----


def quality_claim(baseline: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Claim on rows with a better side, against another column.

    Better: some row is, and every other one is better or equal. Worse: some row is, none is better. Mixed: both occur.
    Equal: all rows are. Else undecided, also where a row is better and another one undecided: who claims to be better has
    to show that nothing got worse.

    Returns:
        {"about", "verdict", "rows"}.
    """
    words = {row["verdict"] for row in rows.values()} - {"n/a"}
    if "worse" in words:
        word = "mixed" if "better" in words else "worse"
    elif "undecided" in words or not words:
        word = "undecided" if words else "n/a"
    else:
        word = "better" if "better" in words else "equal"
    return {"about": f"quality against {baseline}", "verdict": word, "rows": dict(rows)}


def match_claim(target: str, rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Claim on rows with a target: equal where all are, different where some row is, else undecided; returns as above."""
    words = {row["verdict"] for row in rows.values()} - {"n/a"}
    if words & {"lower", "higher", "different"}:
        word = "different"
    else:
        word = "n/a" if not words else "equal" if words == {"equal"} else "undecided"
    return {"about": f"match with {target}", "verdict": word, "rows": dict(rows)}


def speed_claim(mine: Mapping[str, Any], teacher: str, theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Claim on denoising time: faster or slower where times differ by more than 5 %, else equal.

    Args:
        mine, theirs: {"calls", "seconds_per_clip"} of the columns.

    Returns:
        as above, with the times as "text".
    """
    own, other = (float(column["seconds_per_clip"]) for column in (mine, theirs))
    ratio = other / own
    word = "faster" if ratio > FASTER else "slower" if ratio < 1 / FASTER else "equal"
    calls = f"{mine['calls']} against {theirs['calls']} network calls"
    how = f"{ratio:.1f} times: {own:.3f} s against {other:.3f} s of denoising per clip; {calls}"
    return {"about": f"speed against {teacher}", "verdict": word, "rows": {}, "text": how}


def scope(checkpoints: int) -> str:
    """What a verdict speaks of: one checkpoint, or the recipe."""
    if checkpoints == 1:
        return "one checkpoint; says nothing about other training seeds"
    return f"the recipe, from {checkpoints} training seeds ({checkpoints - 1} degrees of freedom between them)"
