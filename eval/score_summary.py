"""Averages of scored clips with intervals over prompts, and paired differences between two scored sets of clips.

    summarise(rows)["loudness"]           # {"value", "low", "high", "n", "total", "status", "reason", ...}
    compare(rows, baseline_rows)["wer"]   # {"change", "low", "high", "verdict", "needed", "coverage", ...}

Clips of one group (a prompt) are alike: groups are resampled, not clips (percentile bootstrap, 2000 draws, 95 %, widened
for few groups), all metrics with the same draws. An average is sum(weight x value) / sum(weight); the weight is 1 where a
metric has none.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from eval import stats
from eval.metrics.registry import Metric, metrics
from eval.score_rows import FAILED, OK, SKIPPED, UNAVAILABLE, ClipRow

DRAWS_AT_ONCE = 200
"""Draws in memory together: with 10,000 prompts, 16 MB."""
POWER = 0.8
"""Probability with which `needed` clips show a difference of the measured size."""
MIN_CLIPS = 2


def summarise(rows: Sequence[ClipRow]) -> dict[str, dict[str, Any]]:
    """Average of every metric of the rows.

    Returns:
        Metric -> {"value", "low", "high", "n" (clips with a value), "total", "status", "reason" (the most frequent one, of
        failures first), "failed", "skipped", "unavailable" (numbers of clips)}.
    """
    keys = [key for key in metrics() if any(key in row.values for row in rows)]
    groups, count = _groups([row.group for row in rows])
    values, weights = _columns(rows, keys)
    sums, totals = _by_group(values, weights, groups, count)
    draws = _resampled(sums, totals)  # [1 + R, K]
    return {key: _measure(rows, key, draws[:, k], values[:, k], groups) for k, key in enumerate(keys)}


def _measure(
    rows: Sequence[ClipRow], key: str, draws: np.ndarray, values: np.ndarray, groups: np.ndarray
) -> dict[str, Any]:
    states = Counter(row.values[key].status for row in rows if key in row.values)
    reasons = Counter(
        (row.values[key].status, row.values[key].reason)
        for row in rows
        if key in row.values and row.values[key].value is None
    )
    # Failures are shown before what does not apply to a clip.
    status, reason = max(reasons, key=lambda kind: (kind[0] == FAILED, reasons[kind])) if reasons else (OK, "")
    n = int(np.isfinite(values).sum())
    content: dict[str, Any] = {"value": None, "low": None, "high": None, "n": n, "total": len(rows)}
    if n and np.isfinite(draws[0]):
        known, used = values[np.isfinite(values)], len(np.unique(groups[np.isfinite(values)]))
        low, high = stats.ends_of(draws[1:], used)
        metric, edges = metrics()[key], set(known)
        rate = metric.weight or (metric.best == 0.0 and not metric.unit)
        if (metric.share and edges in ({0.0}, {1.0})) or (rate and edges == {0.0}):
            # Resampling could only repeat the value. Of an error rate: the share of prompts with any error.
            ends = stats.proportion(round(float(known[0]) * used), used)
            low, high = float(ends.low or 0.0), float(ends.high or 0.0)
        one = used < MIN_CLIPS
        content.update(value=float(draws[0]), low=None if one else low, high=None if one else high)
        status = OK
    counts = {state: states[state] for state in (SKIPPED, FAILED, UNAVAILABLE) if states[state]}
    return {**content, "status": status, "reason": reason, **counts}


def by_language(rows: Sequence[ClipRow]) -> dict[str, dict[str, dict[str, Any]]]:
    """`summarise` of the clips of each language, where there are several; {} otherwise."""
    languages = sorted({row.language for row in rows if row.language})
    if len(languages) < 2:
        return {}
    return {language: summarise([row for row in rows if row.language == language]) for language in languages}


def by_part(rows: Sequence[ClipRow]) -> dict[str, dict[str, dict[str, Any]]]:
    """`summarise` of the clips of each part, where there are several: of "age/19-30" for "age" and for "age/19-30"; else {}."""
    members: dict[str, list[ClipRow]] = {}
    for row in rows:
        levels = row.part.split("/") if row.part else []
        for depth in range(1, len(levels) + 1):
            members.setdefault("/".join(levels[:depth]), []).append(row)
    return {part: summarise(members[part]) for part in sorted(members)} if len(members) > 1 else {}


# ---- Paired differences ----


def compare(
    rows: Sequence[ClipRow], baseline: Sequence[ClipRow], references: Sequence[ClipRow] = (), min_coverage: float = 0.9
) -> dict[str, dict[str, Any]]:
    """Differences between two scored sets over the clips that both have, by name.

    Args:
        references: scores of the reference clips under the clips' names: what metrics without a target of their own aim at.
            They are resampled together with the clips, since all three share a prompt.
        min_coverage: least share of the clips of both sets together that have a value in both. Clips that a metric does not
            apply to in either set are not counted.

    Returns:
        Metric -> {"value", "baseline" (averages over the common clips), "change", "low", "high" (value minus baseline),
        "verdict" (better, worse, undecided; different or undecided where no side is better; not compared), "reason", "n"
        (common clips), "total" (clips of either that it applies to), "coverage", "groups", "needed" (clips that would show a
        difference of this size with a power of 80 %; None where the change is 0)}. Where the metric has a target, also
        "target" and "gain", "gain_low", "gain_high": by how much the clips are nearer to it than the baseline; the verdict
        and "needed" are of the gain.
    """
    own, other, real = ({row.clip: row for row in part} for part in (rows, baseline, references))
    names = sorted(own.keys() | other.keys())
    common = [name for name in names if name in own and name in other]
    keys = [key for key in metrics() if any(key in row.values for row in (*rows, *baseline))]
    groups, count = _joined([own[name].group for name in common], [other[name].group for name in common])
    empty = ClipRow("", "", "", None, None)
    three = [[part.get(name, empty) for name in common] for part in (own, other, real)]
    columns = [_columns(part, keys) for part in three]
    both = np.isfinite(columns[0][0]) & np.isfinite(columns[1][0])
    sums, draws = _paired(columns[:2], both, groups, count)
    # Of metrics with a target that the references give: averages of all three over the clips that have all three.
    aimed = [k for k, key in enumerate(keys) if metrics()[key].direction == "target" and metrics()[key].target is None]
    all_three = (both & np.isfinite(columns[2][0]))[:, aimed]
    of_aimed = [(values[:, aimed], weights[:, aimed]) for values, weights in columns]
    gain_sums, gain_draws = _paired(of_aimed, all_three, groups, count)
    found = {}
    for k, key in enumerate(keys):
        metric, n = metrics()[key], int(both[:, k].sum())
        total = sum(_applies(own.get(name), key) or _applies(other.get(name), key) for name in names)
        entry: dict[str, Any] = {"n": n, "total": total, "coverage": n / total if total else 0.0}
        used = len(np.unique(groups[both[:, k]])) if n else 0
        entry["groups"] = used
        if reason := _not_comparable(rows, baseline, key, entry["coverage"], used, min_coverage):
            found[key] = {**entry, "verdict": "not compared", "reason": reason}
            continue
        seen = np.flatnonzero(both[:, k]).tolist()
        if metric.per_frame and (reason := rates_differ(*([part[c] for c in seen] for part in three[:2]))):
            found[key] = {**entry, "verdict": "not compared", "reason": reason}
            continue
        change = draws[0][:, k] - draws[1][:, k]
        low, high = stats.ends_of(change[1:], used)
        entry |= {
            "value": float(draws[0][0, k]), "baseline": float(draws[1][0, k]), "change": float(change[0]),
            "low": low, "high": high, "reason": "",
        }  # fmt: skip
        spread = _spread([_deviations(*part, k) for part in sums], (1.0, -1.0))
        effect = float(change[0])
        if metric.direction in ("up", "down"):
            word = _verdict(low, high) if metric.direction == "up" else _verdict(-high, -low)
        else:
            gain: _Gain | None = None
            if metric.target is not None:
                gain = _Gain([part[:, k] for part in draws], [_deviations(*part, k) for part in sums], metric.target)
            elif k in aimed and references:
                at = aimed.index(k)
                entry["reason"] = _no_target(three, all_three[:, at], groups, n, metric, min_coverage)
                if not entry["reason"]:
                    gain = _Gain([part[:, at] for part in gain_draws], [_deviations(*part, at) for part in gain_sums])
            if gain is None:
                word = "undecided" if low <= 0 <= high else "different"
            else:
                low, high = stats.ends_of(gain.draws[1:], used)
                word, effect, spread = _verdict(low, high), float(gain.draws[0]), gain.spread
                entry |= {"target": gain.target, "gain": effect, "gain_low": low, "gain_high": high}
        found[key] = {**entry, "verdict": word, "needed": _needed(effect, spread, n / used)}
    return found


class _Gain:
    """By how much clips are nearer to a target than a baseline: |baseline - target| - |clips - target|.

    Args:
        draws: averages [1 + R] of clips and baseline, and of the references where these are the target.
        deviations: of the groups from the same averages, see `_deviations`.
        target: where it is a number.
    """

    def __init__(
        self, draws: Sequence[np.ndarray], deviations: Sequence[np.ndarray], target: float | None = None
    ) -> None:
        aims = draws[2] if target is None else np.full(len(draws[0]), target)
        self.target = float(aims[0])
        self.draws = np.abs(draws[1] - aims) - np.abs(draws[0] - aims)
        own, other = (float(np.sign(part[0] - aims[0])) for part in draws[:2])
        # To first order; what the sides share of the references' deviation falls away.
        self.spread = _spread(deviations, (-own, other, own - other)[: len(deviations)])


def _paired(
    columns: Sequence[tuple[np.ndarray, np.ndarray]], there: np.ndarray, groups: np.ndarray, count: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[np.ndarray]]:
    """Sums by group, and averages with the same draws, of columns (values, weights) over the clips that are `there` [n,K]."""
    sums = [_by_group(np.where(there, values, np.nan), weights, groups, count) for values, weights in columns]
    return sums, [_resampled(*part) for part in sums]


def _no_target(
    three: Sequence[Sequence[ClipRow]],
    there: np.ndarray,
    groups: np.ndarray,
    n: int,
    metric: Metric,
    min_coverage: float,
) -> str:
    """Why the references are no target of a metric; "" where they are.

    Args:
        three: rows of clips, baseline and references.
        there: bool, which of them have a value in all; groups: of all of them.
        n: clips with a value in clips and baseline.
    """
    if there.sum() < min_coverage * n or len(np.unique(groups[there])) < stats.FEWEST:
        return f"no better side: {there.sum()} of {n} clips have a reference with a value"
    clips, real = ([part[c] for c in np.flatnonzero(there).tolist()] for part in (three[0], three[2]))
    if metric.per_frame and (reason := rates_differ(clips, real)):
        return f"no better side, for the references: {reason}"
    return ""


def _applies(row: ClipRow | None, key: str) -> bool:
    """Whether a clip should have a value; a clip that is not there should."""
    return row is None or key not in row.values or row.values[key].status != SKIPPED


NEEDED = (1.959964 + 0.841621) ** 2
"""(z of a two-sided 5 % + z of POWER) squared: groups needed = this x (deviation / difference) squared."""


def _not_comparable(
    rows: Sequence[ClipRow], baseline: Sequence[ClipRow], key: str, coverage: float, groups: int, min_coverage: float
) -> str:
    for name, part in (("clips", rows), ("the baseline", baseline)):
        if not any(key in row.values and row.values[key].value is not None for row in part):
            reasons = Counter(row.values[key].reason for row in part if key in row.values)
            return f"{name} have no value" if not reasons else f"{name}: {reasons.most_common(1)[0][0]}"
    if coverage < min_coverage:
        return f"{coverage:.0%} of the clips have a value in both, and min_coverage is {min_coverage:.0%}"
    return (
        "" if groups >= stats.FEWEST else f"{groups} prompts have a value in both, and a verdict needs {stats.FEWEST}"
    )


SAME_RATE = 0.01
"""Share by which two frame rates may differ: 23.976 and 24 are the same."""


def rates_differ(rows: Sequence[ClipRow], others: Sequence[ClipRow]) -> str:
    """Why values that depend on the frame rate cannot be compared between the clips of two lists, in pairs; "" if they can."""
    if any(row.fps is None for row in (*rows, *others)):
        return "it depends on the frame rate, and results of an older version do not have it; run eval.score again"
    rates = [(float(a.fps or 0), float(b.fps or 0)) for a, b in zip(rows, others, strict=True)]
    apart = Counter((a, b) for a, b in rates if abs(a - b) > SAME_RATE * max(a, b))
    if not apart:
        return ""
    (own, other), _ = apart.most_common(1)[0]
    return (
        f"it depends on the frame rate, and {apart.total()} of {len(rates)} clips have two: {own:.4g} and {other:.4g}"
    )


def _verdict(low: float, high: float) -> str:
    """Whether the interval of a gain excludes 0."""
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def _needed(effect: float, spread: float, clips_per_group: float) -> int | None:
    """Clips that show an effect of this size with a probability of `POWER`; no fewer groups than a verdict needs."""
    if abs(effect) <= 1e-12 or not spread > 0:
        return None
    return int(np.ceil(max(stats.FEWEST, NEEDED * (spread / effect) ** 2) * clips_per_group))


def _spread(deviations: Sequence[np.ndarray], signs: Sequence[float]) -> float:
    """Deviation between groups of a sum of averages with signs."""
    return float(np.std(np.sum([sign * part for sign, part in zip(signs, deviations, strict=True)], axis=0), ddof=1))


def _deviations(sums: np.ndarray, totals: np.ndarray, k: int) -> np.ndarray:
    """What every group with a value adds to an average, a ratio of sums, to first order: fp64 [groups]."""
    used = totals[:, k] > 0
    s, t = sums[used, k], totals[used, k]
    return np.asarray((s - s.sum() / t.sum() * t) / t.mean())


# ---- Resampling ----


def _groups(names: Sequence[str]) -> tuple[np.ndarray, int]:
    """Number of each clip's group, and how many groups there are."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], int), len(numbers)


def _joined(own: Sequence[str], other: Sequence[str]) -> tuple[np.ndarray, int]:
    """As `_groups` of pairs: clips that are one group in either of two sets are one, directly or through others."""
    root: dict[tuple[int, str], tuple[int, str]] = {}

    def find(node: tuple[int, str]) -> tuple[int, str]:
        while (above := root.setdefault(node, node)) != node:
            root[node] = root[above]
            node = root[node]
        return node

    for mine, theirs in zip(own, other, strict=True):
        root[find((0, mine))] = find((1, theirs))
    return _groups([repr(find((0, mine))) for mine in own])


def _columns(rows: Sequence[ClipRow], keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values [n,K], NaN where there is none, and weights [n,K], 0 there."""
    values = np.full((len(rows), len(keys)), np.nan)
    weights = np.zeros_like(values)
    known = metrics()
    for i, row in enumerate(rows):
        for k, key in enumerate(keys):
            found = row.values.get(key)
            if found is None or found.value is None:
                continue
            weight = 1.0
            if known[key].weight:
                given = row.values.get(known[key].weight)
                weight = 0.0 if given is None or given.value is None else given.value
            values[i, k], weights[i, k] = found.value, weight
    return values, weights


def _by_group(values: np.ndarray, weights: np.ndarray, groups: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of weight x value and of weights by group [G,K]."""
    weights = np.where(np.isfinite(values), weights, 0.0)
    sums, totals = np.zeros((count, values.shape[1])), np.zeros((count, values.shape[1]))
    np.add.at(sums, groups, weights * np.nan_to_num(values))
    np.add.at(totals, groups, weights)
    return sums, totals


def _resampled(sums: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Averages [1 + RESAMPLES, K]: of the sample itself, then of draws of its groups; NaN where the weights add up to 0."""
    count = len(sums)
    rng = np.random.Generator(np.random.PCG64([0, count]))
    both = np.concatenate([sums, totals], 1)

    def averages(counts: np.ndarray) -> np.ndarray:
        top, bottom = np.split(counts @ both, 2, axis=1)
        return np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), np.nan)

    parts = [averages(np.ones((1, count)))]
    for _ in range(0, stats.RESAMPLES if count else 0, DRAWS_AT_ONCE):
        drawn = rng.integers(count, size=(DRAWS_AT_ONCE, count))
        counts = np.stack([np.bincount(row, minlength=count) for row in drawn]).astype(float)
        parts.append(averages(counts))
    return np.concatenate(parts)
