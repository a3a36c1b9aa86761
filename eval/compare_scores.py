"""Comparison of two scored sets of clips: paired differences, verdicts, and how many clips such a difference needs.

    python -m eval.compare_scores clips=runs/scores/ours baseline=runs/scores/ovi

Both are output folders of `eval.score` or `eval.run`. Only clips that both have are compared.
"""

import sys
import time
from pathlib import Path
from typing import Any

from eval.output import publish
from magihuman.errors import UserError

FORMAT = "magihuman-clip-comparison/1"


def run(
    clips: str, baseline: str, output: str | None = None, metrics: str = "", min_coverage: float = 0.9
) -> dict[str, Any]:
    """Compare two scored sets of clips, clip by clip of the same name, with intervals over prompts.

    Prints a table; with output= writes comparison.json, comparison.md and comparison.png. Metrics with a target need the scores
    of reference clips for a verdict. Ends with status 1 where a metric that both have lacks coverage, or no clip is common.

    Args:
        clips: output folder of eval.score or eval.run
        baseline: the folder to compare with
        output: folder; none prints only
        metrics: names of metrics with commas; empty for all
        min_coverage: least share of the clips, of those that a metric applies to, that must have a value in both

    Returns:
        The content of comparison.json.

    Raises:
        UserError: a folder without results, an unknown metric, or clips measured in two ways.
    """
    from eval import tables
    from eval.metrics.registry import metrics as registered
    from eval.score import require_share
    from eval.score_report import read_rows_of
    from eval.score_summary import compare, rates_differ, summarise

    start = time.perf_counter()
    require_share(min_coverage)
    own, other = (read_rows_of(Path(folder)) for folder in (clips, baseline))
    for folder, columns in ((clips, own), (baseline, other)):
        if "clips" not in columns:
            raise UserError(f"{folder} has no scores of clips; run eval.score again")
    common = {row.clip for row in own["clips"]} & {row.clip for row in other["clips"]}
    if not common:
        example = f"{own['clips'][0].clip!r} here, {other['clips'][0].clip!r} there"
        raise UserError(f"clips={clips} and baseline={baseline} have no clip of the same name ({example})")
    changed = measured_otherwise(Path(clips), Path(baseline))
    real = {row.clip: row for row in own.get("reference") or other.get("reference") or []}
    targets = {key: m["value"] for key, m in summarise(list(real.values())).items() if m["value"] is not None}
    met = [row for row in own["clips"] if row.clip in common and row.clip in real]
    if reason := rates_differ(met, [real[row.clip] for row in met]):
        aimed = [key for key in targets if registered()[key].per_frame and registered()[key].direction == "target"]
        targets = {key: value for key, value in targets.items() if key not in aimed}
        if aimed:
            print(f"note: the reference is no target of {', '.join(aimed)}: {reason}", file=sys.stderr)
    found = compare(own["clips"], other["clips"], targets, min_coverage)
    wanted = [name.strip() for name in metrics.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in found]:
        if unknown[0] in distances_of_sets():
            raise UserError(
                f"metrics={unknown[0]} is a distance of sets, without values per clip: see summary.json of both"
            )
        raise UserError(f"metrics={unknown[0]} is in neither; they have {', '.join(found)}")
    found = {key: entry for key, entry in found.items() if not wanted or key in wanted}
    for key, reason in changed.items():
        if key in found:
            found[key] = {**found[key], "verdict": "not compared", "reason": reason}
    values = {
        "format": FORMAT, "name": short(clips, baseline), "baseline_name": short(baseline, clips), "min_coverage": min_coverage,
        "clips": len({row.clip for part in (own, other) for row in part["clips"]}), "common": len(common),
        "metrics": found, "seconds": round(time.perf_counter() - start, 2),
    }  # fmt: skip

    def draw() -> Any:
        from eval.score_figures import difference_points

        return difference_points(found, f"{values['name']} minus {values['baseline_name']}, {len(common)} clips")

    content = publish(
        Path(output) if output else None,
        "comparison",
        values,
        {"comparison": draw},
        tables.clip_comparison_text(values),
    )
    lacking = [
        key for key, e in found.items() if e["coverage"] < min_coverage and e["reason"].endswith(f"{min_coverage:.0%}")
    ]
    if lacking:
        print(f"too few clips have a value in both: {', '.join(lacking)}; see min_coverage", file=sys.stderr)
        raise SystemExit(1)
    return content


def short(name: str, other: str) -> str:
    """Last part of a folder's name; the whole where both end alike."""
    return name if Path(name).name == Path(other).name else Path(name).name


def distances_of_sets() -> set[str]:
    """Metrics that have one value for a whole set of clips."""
    from eval.metrics.registry import SetMeasurement, measurements

    return {m.key for one in measurements().values() if isinstance(one, SetMeasurement) for m in one.metrics}


def measured_otherwise(own: Path, other: Path) -> dict[str, str]:
    """Metrics that two result folders measured with other versions or settings, with the reason.

    Raises:
        UserError: a summary.json that cannot be read.
    """
    from eval.metrics.registry import measurements
    from eval.score_report import SUMMARY
    from magihuman.io.text import load_json

    used = []
    for folder in (own, other):
        try:
            used.append(load_json(folder / SUMMARY)["measurements"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / SUMMARY} cannot be read ({error}); run eval.score again") from error
    reasons = {}
    for name in used[0].keys() & used[1].keys() & measurements().keys():
        if used[0][name] != used[1][name]:
            reason = f"{name} was measured with other settings or another version; score both again"
            reasons.update({metric.key: reason for metric in measurements()[name].metrics})
    return reasons


if __name__ == "__main__":
    from magihuman.cli import run as command

    command(run, "python -m eval.compare_scores")
