"""Comparison of two scored sets of clips: paired differences, verdicts, and how many clips such a difference needs.

    python -m eval.compare_scores clips=runs/scores/ours baseline=runs/scores/ovi

Both are output folders of `eval.score` or `eval.run`. Only clips that both have are compared.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.output import publish
from magihuman.errors import UserError

if TYPE_CHECKING:
    from eval.metrics.registry import Metric
    from eval.score_rows import ClipRow

FORMAT = "magihuman-clip-comparison/1"


def run(
    clips: str, baseline: str, output: str | None = None, metrics: str = "", min_coverage: float = 0.9
) -> dict[str, Any]:
    """Compare two scored sets of clips, clip by clip, with intervals over prompts.

    Clips are paired by name, or by prompt where that gives more pairs. Prints a table; with output= writes comparison.json,
    comparison.md and comparison.png. Metrics with a target need the scores of reference clips for a verdict. Ends with status 1
    where a metric that both have lacks coverage, or no clip is common.

    Args:
        clips: output folder of eval.score or eval.run
        baseline: the folder to compare with
        output: folder; none prints only
        metrics: names of metrics with commas; empty for all
        min_coverage: least share of the clips, of those that a metric applies to, that must have a value in both

    Returns:
        The content of comparison.json.

    Raises:
        UserError: a folder without results, an unknown metric, or no clip in common.
    """
    from eval import clip_tables
    from eval.score import require_share
    from eval.score_report import read_rows_of
    from eval.score_summary import compare

    start = time.perf_counter()
    require_share(min_coverage)
    own, other = (read_rows_of(Path(folder)) for folder in (clips, baseline))
    for folder, columns in ((clips, own), (baseline, other)):
        if "clips" not in columns:
            raise UserError(f"{folder} has no scores of clips; run eval.score again")
    other, notes = paired_by_prompt(own, other)
    there = {row.clip for row in other["clips"]}
    common = {row.clip: row for row in own["clips"] if row.clip in there}
    if not common:
        example = f"{own['clips'][0].clip!r} here, {other['clips'][0].clip!r} there"
        raise UserError(
            f"clips={clips} and baseline={baseline} have no clip of the same name ({example}) and none of the same prompt; "
            "give prompts in NAME.txt or the same names in a manifest, and score again"
        )
    if apart := [row.clip for row in other["clips"] if row.clip in common and row.prompt != common[row.clip].prompt]:
        notes.append(f"{len(apart)} clips of the same name have two prompts, such as {apart[0]!r}")
    references, note = common_references(own, other)
    notes += [note] if note else []
    summaries = [read_summary(Path(folder)) for folder in (clips, baseline)]
    changed = measured_otherwise(*(summary["measurements"] for summary in summaries))
    found = compare(own["clips"], other["clips"], references, min_coverage)
    found |= compare_sets(own["clips"], other["clips"], *summaries)
    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in found]:
        near = get_close_matches(unknown[0], found, n=3)
        hint = f"did you mean {', '.join(near)}?" if near else f"they have {', '.join(found)}"
        raise UserError(f"metrics={unknown[0]} is in neither; {hint}")
    found = {key: entry for key, entry in found.items() if not wanted or key in wanted}
    for key, reason in changed.items():
        if key in found:
            found[key] = {**found[key], "verdict": "not compared", "reason": reason}
            found[key] |= {"change": None, "low": None, "high": None, "needed": None}
    values = {
        "format": FORMAT, "name": short(clips, baseline), "baseline_name": short(baseline, clips), "min_coverage": min_coverage,
        "clips": len({row.clip for part in (own, other) for row in part["clips"]}), "common": len(common),
        "notes": notes, "metrics": found, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip

    def draw() -> Any:
        from eval.score_figures import difference_points

        return difference_points(found, f"{values['name']} minus {values['baseline_name']}, {len(common)} clips")

    content = publish(
        Path(output) if output else None,
        "comparison",
        values,
        {"comparison": draw},
        clip_tables.clip_comparison_text(values),
    )
    lacking = [
        key for key, e in found.items() if e["coverage"] < min_coverage and e["reason"].endswith(f"{min_coverage:.0%}")
    ]
    if lacking:
        print(f"too few clips have a value in both: {', '.join(lacking)}; see min_coverage", file=sys.stderr)
        raise SystemExit(1)
    return content


Columns = dict[str, "list[ClipRow]"]


def paired_by_prompt(own: Columns, other: Columns) -> tuple[Columns, list[str]]:
    """The columns of `other` with the names of the clips of `own` that have the same prompts, where names give fewer pairs.

    Several clips of a prompt are paired in the order of their names.

    Returns:
        The columns, and what was done, if anything.
    """
    from eval.clip_list import by_prompt

    mine, theirs = (by_prompt((row.clip, row.prompt) for row in part["clips"]) for part in (own, other))
    names = {theirs[key]: mine[key] for key in theirs if key in mine}
    if len(names) <= len({row.clip for row in own["clips"]} & {row.clip for row in other["clips"]}):
        return other, []
    pairs, taken = len(names), set(names.values())
    for row in other["clips"]:
        if row.clip not in names and row.clip in taken:
            names[row.clip] = (
                f"{row.clip} (baseline)"  # without a partner, it must not have the name of another's partner
            )
    renamed = {
        column: [replace(row, clip=names.get(row.clip, row.clip)) for row in rows] for column, rows in other.items()
    }
    return renamed, [f"{pairs} clips are paired by their prompts, since their names are not the same"]


def common_references(own: Columns, other: Columns) -> "tuple[list[ClipRow], str]":
    """Scores of the reference clips that both sets have, or one of them; none where these are not the same, with a note."""
    mine, theirs = ({row.clip: row for row in part.get("reference", [])} for part in (own, other))
    apart = [name for name in mine if name in theirs and mine[name].sha256 != theirs[name].sha256]
    if apart:
        return [], (
            f"the two were scored with different reference clips, such as that of {apart[0]!r}: metrics with a target have no "
            "better side"
        )
    return list({**theirs, **mine}.values()), ""


def short(name: str, other: str) -> str:
    """Last part of a folder's name; the whole where both end alike."""
    return name if Path(name).name == Path(other).name else Path(name).name


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary.json of a result folder.

    Raises:
        UserError: it cannot be read.
    """
    from eval.score_report import SUMMARY
    from magihuman.io.text import load_json

    try:
        content = load_json(folder / SUMMARY)
        return {**content, "measurements": dict(content["measurements"]), "clips": dict(content["columns"]["clips"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / SUMMARY} cannot be read ({error}); run eval.score again") from error


def measured_otherwise(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, str]:
    """Metrics that two results measured with other versions or settings, with the reason, by their `measurements`."""
    from eval.metrics.registry import measurements

    reasons = {}
    for name in own.keys() & other.keys() & measurements().keys():
        if own[name] != other[name]:
            reason = f"{name} was measured with other settings or another version; score both again"
            reasons.update({metric.key: reason for metric in measurements()[name].metrics})
    return reasons


def compare_sets(
    rows: "Sequence[ClipRow]",
    baseline: "Sequence[ClipRow]",
    summary: Mapping[str, Any],
    other_summary: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Differences of distances of sets, such as FID, by the influences of the groups on both.

    Values are of all clips of a set, so there is a difference only where both have the same clips and reference clips.

    Args:
        summary, other_summary: of the two, with the values of their sets.

    Returns:
        Metric -> entries as of `eval.score_summary.compare`, with "interval" and "baseline_interval", each [low, high].
    """
    from eval.metrics.registry import SetMeasurement, measurements, rate_bound

    found, bound = {}, rate_bound(summary["measurements"])
    for one in measurements().values():
        if not isinstance(one, SetMeasurement):
            continue
        for metric in one.metrics:
            a, b = summary["clips"].get(metric.key), other_summary["clips"].get(metric.key)
            if a is None and b is None:
                continue
            a, b = a or {}, b or {}
            entry = {
                "value": a.get("value"), "interval": [a.get("low"), a.get("high")], "baseline": b.get("value"),
                "baseline_interval": [b.get("low"), b.get("high")], "n": min(a.get("n", 0), b.get("n", 0)),
                "total": len({row.clip for row in (*rows, *baseline)}), "change": None, "low": None, "high": None,
                "needed": None,
            }  # fmt: skip
            entry["coverage"] = entry["n"] / entry["total"]
            reason = _sets_differ(a, b, rows, baseline, metric.key, metric.key in bound)
            refused = {"verdict": "not compared", "reason": reason}
            found[metric.key] = entry | (refused if reason else _set_change(metric, entry, rows, baseline))
    return found


def _sets_differ(
    a: Mapping[str, Any], b: Mapping[str, Any], rows: "Sequence[ClipRow]", baseline: "Sequence[ClipRow]", key: str, bound: bool,
) -> str:  # fmt: skip
    """Why two values of the distance `key` have no difference; "" where they have one. `bound`: to the frame rate."""
    from eval.score_summary import rates_differ
    from eval.stats import FEWEST

    for whose, part in (("the clips have", a), ("the baseline has", b)):
        if part.get("value") is None:
            return f"{whose} no value" + (f": {part['reason']}" if part.get("reason") else "")
    own, other = ({row.clip: row for row in part} for part in (rows, baseline))
    if own.keys() != other.keys() or a["n"] != b["n"]:
        return (
            f"a distance is of all clips of a set, and these are {a['n']} here and {b['n']} there that are not the same"
        )
    if a.get("reference") is None or a.get("reference") != b.get("reference"):
        return "the reference clips are not the same, or unknown as of an older version"
    if {name: row.group for name, row in own.items()} != {name: row.group for name, row in other.items()}:
        return "the clips of the same names are of other groups"
    if any(key not in row.influence for row in (*rows, *baseline)):
        return "results of an older version have no influences of prompts; run eval.score again"
    if (groups := len({row.group for row in rows})) < FEWEST:
        return f"{groups} prompts have a value in both, and a verdict needs {FEWEST}"
    return rates_differ(list(own.values()), [other[name] for name in own]) if bound else ""


def _set_change(
    metric: "Metric", entry: Mapping[str, Any], rows: "Sequence[ClipRow]", baseline: "Sequence[ClipRow]"
) -> dict[str, Any]:
    """Difference, interval and verdict of two values from the same reference clips."""
    from eval.score_summary import NEEDED
    from eval.set_distance import difference
    from eval.stats import FEWEST

    moved: list[dict[str, float]] = [{}, {}]
    for part, of in zip((rows, baseline), moved, strict=True):
        for row in part:
            of[row.group] = of.get(row.group, 0.0) + row.influence[metric.key]
    error, half = difference(*moved)
    change = entry["value"] - entry["baseline"]
    low, high = change - half, change + half
    gain = -1 if metric.direction == "down" else 1
    word = "undecided" if low <= 0 <= high else "better" if gain * change > 0 else "worse"
    needed = None
    if abs(change) > 1e-12 and error > 0:
        needed = math.ceil(max(NEEDED * (error / change) ** 2, FEWEST / len(moved[0])) * entry["n"])
    return {
        "change": change, "low": low, "high": high, "verdict": word, "reason": "", "groups": len(moved[0]), "needed": needed,
    }  # fmt: skip


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.compare_scores")
