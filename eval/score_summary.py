"""Averages of scored clips with intervals over prompts, and paired differences between two scored sets of clips.

    summarise(rows)["loudness"]           # {"value", "low", "high", "n", "total", "status", "reason", ...}
    compare(rows, baseline_rows)["wer"]   # {"change", "low", "high", "verdict", "needed", "coverage", ...}

Clips of one group (a prompt) are alike: groups are resampled, not clips (percentile bootstrap, 2000 draws, 95 %, widened
for few groups), all metrics with the same draws. An average is sum(weight x value) / sum(weight); the weight is 1 where a
metric has none.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
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
        if (metric.share and edges in ({0.0}, {1.0})) or (metric.weight and edges == {0.0}):
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
    rows: Sequence[ClipRow],
    baseline: Sequence[ClipRow],
    targets: Mapping[str, float] | None = None,
    min_coverage: float = 0.9,
) -> dict[str, dict[str, Any]]:
    """Differences between two scored sets over the clips that both have, by name.

    Args:
        targets: metric -> value aimed at, of metrics whose target is the reference's own.
        min_coverage: least share of the clips of both sets together that have a value in both. Clips that a metric does not
            apply to in either set are not counted.

    Returns:
        Metric -> {"value", "baseline" (averages over the common clips), "change", "low", "high" (value minus baseline),
        "verdict" (better, worse, undecided; different or undecided where no side is better; not compared), "reason", "n"
        (common clips), "total" (clips of either that it applies to), "coverage", "groups", "needed" (clips that would show a
        difference of this size with a power of 80 %; None where the change is 0)}.
    """
    own, other = ({row.clip: row for row in part} for part in (rows, baseline))
    names = sorted(own.keys() | other.keys())
    common = [name for name in names if name in own and name in other]
    keys = [key for key in metrics() if any(key in row.values for row in (*rows, *baseline))]
    groups, count = _groups([other[name].group for name in common])
    a, weight_a = _columns([own[name] for name in common], keys)
    b, weight_b = _columns([other[name] for name in common], keys)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = np.where(both, a, np.nan), np.where(both, b, np.nan)
    sums = [_by_group(values, weights, groups, count) for values, weights in ((a, weight_a), (b, weight_b))]
    draws = [_resampled(*part) for part in sums]
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
        seen = [name for name, there in zip(common, both[:, k], strict=True) if there]
        if metric.per_frame and (reason := rates_differ([own[c] for c in seen], [other[c] for c in seen])):
            found[key] = {**entry, "verdict": "not compared", "reason": reason}
            continue
        mine, theirs = draws[0][:, k], draws[1][:, k]
        change = mine - theirs
        low, high = stats.ends_of(change[1:], used)
        target = metric.target if metric.target is not None else (targets or {}).get(key)
        word = _verdict(metric, mine, theirs, target, used)
        spread = _spread(sums[0], sums[1], k)
        entry |= {
            "value": float(mine[0]),
            "baseline": float(theirs[0]),
            "change": float(change[0]),
            "low": low,
            "high": high,
        }
        needed = None
        if abs(change[0]) > 1e-12 and spread > 0:
            needed = int(np.ceil(NEEDED * (spread / change[0]) ** 2 * n / used))
        found[key] = {**entry, "verdict": word, "reason": "", "needed": needed}
    return found


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


def _verdict(metric: Metric, mine: np.ndarray, theirs: np.ndarray, target: float | None, groups: int) -> str:
    """Whether the interval of the gain excludes 0; without a better side, whether that of the change does."""
    change = mine - theirs
    if metric.direction == "target" and target is not None:
        gain = np.abs(theirs - target) - np.abs(mine - target)
    elif metric.direction in ("up", "down"):
        gain = change if metric.direction == "up" else -change
    else:
        low, high = stats.ends_of(change[1:], groups)
        return "different" if low > 0 or high < 0 else "undecided"
    low, high = stats.ends_of(gain[1:], groups)
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def _spread(own: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray], k: int) -> float:
    """Deviation between groups of the paired difference, of a ratio by its linear approximation."""
    used = own[1][:, k] > 0
    parts = []
    for sums, totals in (own, other):
        s, t = sums[used, k], totals[used, k]
        ratio = s.sum() / t.sum()
        parts.append((s - ratio * t) / t.mean())
    return float(np.std(parts[0] - parts[1], ddof=1)) if used.sum() > 1 else 0.0


# ---- Resampling ----


def _groups(names: Sequence[str]) -> tuple[np.ndarray, int]:
    """Number of each clip's group, and how many groups there are."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], int), len(numbers)


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
