"""Tables of the README from result files: latency beside the published table, decoders, what optimisations bring.

A block of the README between `<!-- latency FOLDER -->` (or `latency-cpu`, `decoders`, `gains`; `predicted FILE`) and
`<!-- end -->` is rendered from the files of that folder; `python -m inference.latency --check` proves it. Predictions
stand in tables or columns of their own and never in a row of measurements.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.latency import records
from inference.latency.ladder_table import gains_table
from inference.latency.predicted_table import predicted_table
from inference.roofline.bounds import PUBLISHED
from magihuman.errors import UserError

REPO = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def block_pattern() -> re.Pattern[str]:
    """Of the README's blocks that are made here."""
    return re.compile(rf"<!-- ({'|'.join(TABLES)}) ([^>]*?) -->\n(.*?)<!-- end -->", re.DOTALL)


def latest(folder: Path, kind: str, key: Callable[[Row], tuple[Any, ...]]) -> list[Row]:
    """Rows of a kind, each with its file's name and provenance; of rows with the same key the newest."""
    found: dict[tuple[Any, ...], Row] = {}
    for values in records.read(folder):
        if values["kind"] == kind:
            for row in values["rows"]:
                found[key(row), values["provenance"]["machine"]] = {
                    **row,
                    "file": values["file"],
                    "made": values["provenance"],
                }
    return list(found.values())


def measured(folder: Path) -> list[Row]:
    """The newest row of every clip, tier, decoder and machine."""

    def key(row: Row) -> tuple[Any, ...]:
        decoder = (row["decoder"] or {}).get("name")
        steps = tuple(stage["steps"] for stage in row["geometry"].values())
        tokens = tuple(stage["tokens"]["total"] for stage in row["geometry"].values())
        return (
            row["size"],
            row["model"],
            row["tier"],
            str(row["options"]),
            row["dtype"],
            decoder,
            steps,
            tokens,
        )

    return latest(folder, "measure", key)


def on_gpu(row: Row) -> bool:
    """Whether a GPU made this row."""
    return "gpu" in row["made"]


def latency_table(folder: str) -> str:
    """Markdown: the published table, and every measured row of the same clips on a GPU."""
    lines = [
        "| clip | device | tier | N (base / SR) | steps | base s | SR s | decode + host s | total s | "
        "error vs reference | weights |",
        "|---|---|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    rows = [row for row in measured(REPO / folder) if on_gpu(row)]
    for size, times in PUBLISHED.items():
        sr = f"{times['sr']:.1f}" if "sr" in times else "-"
        lines.append(
            f"| {size} | H100, published | not said | not said | 8{' / 5' if 'sr' in times else ''} | "
            f"{times['base']:.1f} | {sr} | {times['decode']:.1f} | {times['total']:.1f} | - | trained |"
        )
        lines += [_gpu_line(row) for row in rows if row["size"] == size]
    lines.append("")
    if not rows:
        lines.append(
            "No GPU was at hand yet: there is no row of ours. `python -m inference.latency suite` measures them all."
        )
        return "\n".join(lines)
    lines.append(
        f"Medians; the total is base + SR + decode + copy to the host's memory. {_made(rows)} N counts video, audio "
        "and text tokens. Random weights: the times stand, the pictures mean nothing. An H200 is not the H100 of the "
        "published table: its arithmetic is equal, its memory faster, which is worth 3 to 5 % here."
    )
    return "\n".join(lines)


def _gpu_line(row: Row) -> str:
    stages, geometry = row["stages"], row["geometry"]
    host = _seconds(stages, "video decode", "to host")
    total = row.get("comparable")
    mark = "" if row["steady"] else " (unsteady)"
    cells = [
        row["size"],
        row["made"]["machine"],
        f"{row['tier']} ({row['exactness']}), {row['decoder']['name']}" + _lacking(row),
        " / ".join(str(stage["tokens"]["total"]) for stage in geometry.values()),
        " / ".join(str(stage["steps"]) for stage in geometry.values()),
        _cell(stages["base"]),
        _cell(stages["sr"]) if "sr" in stages else "-",
        host,
        (f"{total['median']:.2f}" if total else "n/a") + mark,
        _error(row),
        row["weights"].split(",")[0],
    ]
    return "| " + " | ".join(cells) + " |"


def _lacking(row: Row) -> str:
    """What of the tier this machine could not do."""
    return f", without {' and '.join(row['gave_up'])}" if "gave_up" in row else ""


def _cell(found: Row) -> str:
    """Median and spread, or that there is none."""
    if "status" in found:
        return "n/a"
    digits = 2 if found["median"] >= 1 else 3
    return f"{found['median']:.{digits}f} [{found['min']:.{digits}f}, {found['max']:.{digits}f}]"


def _seconds(stages: Row, *names: str) -> str:
    if any("status" in stages.get(name, {"status": ""}) for name in names):
        return "n/a"
    return f"{sum(stages[name]['median'] for name in names):.3f}"


def worst(errors: Row, key: str) -> float | None:
    """The larger relative L2 distance of video and audio over all stages; None where it was not computed."""
    found = [stage[key] for stage in errors.values() if "video_relative_l2" in stage.get(key, {})]
    if not found:
        return None
    return max(max(value["video_relative_l2"], value["audio_relative_l2"]) for value in found)


def _error(row: Row) -> str:
    """Against fp32, with the reference's own error beside it, where it was computed; else against the reference."""
    exact = worst(row["errors"], "against_float32_reference")
    if exact is not None:
        own = worst(row["errors"], "reference_against_float32")
        return f"{exact:.1e} of fp32; the reference {own:.1e}" if own is not None else f"{exact:.1e}"
    own = worst(row["errors"], f"against_{row['dtype']}_reference")
    return "n/a" if own is None else f"{own:.1e}"


def cpu_table(folder: str) -> str:
    """Markdown: the puppet world's clip and one full-width layer, measured on a CPU; ratios within a run."""
    lines = [
        "| what | tier | N (base / SR) | passes | base: processor s; clock s | SR: processor s; clock s | "
        "speed against the reference, same run (in processor time; by clock) | error |",
        "|---|---|---|---|---|---|---|---:|",
    ]
    rows = [row for row in measured(REPO / folder) if not on_gpu(row)]
    for row in rows:
        geometry, stages = row["geometry"], row["stages"]
        what = "one layer of the 15B network" if row["size"] == "layer" else f"{row['size']} clip"
        cells = [
            f"{what}, {row['dtype']}",
            f"{row['tier']} ({row['exactness']})",
            " / ".join(str(stage["tokens"]["total"]) for stage in geometry.values()),
            " / ".join(str(stage["passes"]) for stage in geometry.values()),
            _both(row, "base"),
            _both(row, "sr") if "sr" in stages else "-",
            _ratio(row),
            _error(row),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    if not rows:
        return "\n".join([*lines, "Nothing measured yet."])
    threads = sorted({row["made"]["threads"] for row in rows})
    load = max(row["made"].get("load_average", 0.0) for row in rows)
    lines.append(
        f"Measured on a CPU, medians; the clock's with extremes. {' or '.join(map(str, threads))} thread(s); load "
        f"average of the machine at the start up to {load:g}: where it is above the threads, other programs lengthened "
        f"the clock's times, not the processor's. {_made(rows)}"
    )
    return "\n".join(lines)


def _both(row: Row, stage: str) -> str:
    return f"{row['processor_time'][stage]['median']:.3f}; {_cell(row['stages'][stage])}"


def _ratio(row: Row) -> str:
    clock, worked = (row.get(f"faster_than_reference{end}", {}) for end in ("", "_in_processor_time"))
    cells = [f"{name} {worked[name]:.2f}; {clock[name]:.2f}" for name in clock if name in worked]
    return ", ".join(cells) or "-"


def decoders_table(folder: str) -> str:
    """Markdown: parameters and arithmetic of the video decoders, computed; their times where they were measured."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["size"], row["decoder"], row["layout"], row["frames"]

    rows = [row for row in latest(REPO / folder, "decode", key) if "flops" in row]
    lines = [
        "| clip | decoder | parameters | TFLOP, computed | memory, computed | least s on an H100, computed | "
        "measured s |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    order = list(PUBLISHED)
    for row in sorted(rows, key=lambda r: (order.index(r["size"]), -r["flops"])):
        found = row["measured"]
        where = f"{row['made']['machine']}, {row['layout']}"
        cells = [
            row["size"],
            row["decoder"],
            f"{row['parameters'] / 1e6:.1f} M",
            f"{row['flops'] / 1e12:.1f}",
            f"{row['computed']['peak_memory_bytes'] / 1e9:.2f} GB",
            f"{row['computed']['least_seconds_h100']:.3f}",
            "-" if "status" in found else f"{_cell(found['seconds'])}, {where}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"5 s at 25 fps, random weights, bf16. {_made(rows)}" if rows else "Nothing computed yet.",
    ]
    return "\n".join(lines)


def _made(rows: list[Row]) -> str:
    """Where rows come from: newest and oldest day, commits, machines."""
    days = sorted({row["made"]["date"][:10] for row in rows})
    commits = {
        row["made"]["code"].get("commit", "sources " + row["made"]["code"].get("sources", "unknown"))[:12]
        + (" with changes" if row["made"]["code"].get("changed") else "")
        for row in rows
    }
    machines = {f"{row['made']['machine']}, torch {row['made']['libraries']['torch']}" for row in rows}
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(sorted(machines))}; {when}; commit {', '.join(sorted(commits))}."


TABLES: dict[str, Callable[[str], str]] = {
    "latency": latency_table,
    "latency-cpu": cpu_table,
    "decoders": decoders_table,
    "gains": gains_table,
    "predicted": predicted_table,
}
PREDICTED = "inference/results/predictions/h200.json"


def render(text: str) -> str:
    """A text with every block of `TABLES` made anew.

    Raises:
        UserError: a block that cannot be rendered.
    """

    def block(match: re.Match[str]) -> str:
        kind, argument = match[1], match[2].strip()
        try:
            table = TABLES[kind](argument)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"README block '{kind} {argument}' cannot be rendered: {error!r}") from error
        return f"<!-- {kind} {argument} -->\n{table}\n<!-- end -->"

    return block_pattern().sub(block, text)


def check_readme(readme: Path | None = None) -> str:
    """Prove that the README's tables are those of the result files, and the picture too.

    Raises:
        UserError: a table differs, or there is none.
    """
    from inference.latency.picture import check_pictures

    file = REPO / "README.md" if readme is None else readme
    text = file.read_text(encoding="utf-8")
    blocks = block_pattern().findall(text)
    if not any(kind == "latency" for kind, _, _ in blocks):
        raise UserError(
            f"{file.name} has no block <!-- latency inference/results/latency --> ... <!-- end -->"
        )
    if render(text) != text:
        raise UserError(f"{file.name} differs from its result files; run `python -m eval.readme`")
    folders = {argument.strip() for kind, argument, _ in blocks if kind == "latency"}
    pictures = [name for folder in sorted(folders) for name in check_pictures(REPO / folder)]
    return f"{len(blocks)} tables of {file.name} and {len(pictures)} pictures are those of the result files"


def table(output: str | None = None, picture: bool = True) -> str:
    """Show all tables of the result files, and draw the bars beside the published ones.

    Args:
        output: another folder of results
        picture: draw latency.png into it (needs matplotlib)
    """
    folder = records.FOLDER if output is None else Path(output)
    parts = []
    for kind, render_one in TABLES.items():
        argument = PREDICTED if kind == "predicted" else str(folder.absolute())
        parts.append(f"## {kind}\n\n{render_one(argument)}")
    if picture:
        from inference.latency.picture import draw

        parts.append(f"drawn: {draw(folder)}")
    return "\n\n".join(parts)
