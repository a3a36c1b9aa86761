"""Tables of the README from result files: latency beside the published table, decoders, what optimisations bring.

A block of the README between `<!-- latency FOLDER -->` (or `latency-cpu`, `decoders`, `gains`; `predicted FILE`) and
`<!-- end -->` is rendered from the files of that folder; `python -m inference.benchmark --check` proves it. Predictions
stand in tables or columns of their own and never in a row of measurements.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from inference.benchmark import result_files
from inference.benchmark.gpu_tables import card, memory_table, newest, origin, profile_table, training_table
from inference.benchmark.ladder_table import gains_table
from inference.benchmark.predicted_table import calibrated_table, predicted_table
from inference.benchmark.roofline.bounds import PUBLISHED
from magihuman.errors import UserError
from magihuman.models.gpu_specs import GPUS

REPO = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def block_pattern() -> re.Pattern[str]:
    """Of the README's blocks that are made here."""
    return re.compile(rf"<!-- ({'|'.join(TABLES)}) ([^>]*?) -->\n(.*?)<!-- end -->", re.DOTALL)


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

    return newest(folder, "measure", key)


def on_gpu(row: Row) -> bool:
    """Whether a GPU made this row."""
    return "gpu" in row["made"]


_COLUMNS = (
    "| clip | device | tier | N (base / SR) | steps | base s | SR s | decode + host s | total s | error "
    "| weights |"
)
_RULER = "|---|---|---|---|---|---:|---:|---:|---:|---:|---|"


def latency_table(folder: str) -> str:
    """Markdown: the published table with the rows of ours on the same card below it, and a table for every other card.

    H100s and H200s stay apart: the published card is an H100.
    """
    rows = [row for row in measured(REPO / folder) if on_gpu(row) and row["model"] == "15b"]
    same = [row for row in rows if _is_published_card(row)]
    lines = [_COLUMNS, _RULER]
    for size, times in PUBLISHED.items():
        sr = f"{times['sr']:.1f}" if "sr" in times else "-"
        lines.append(
            f"| {size} | H100, published | not said | not said | 8{' / 5' if 'sr' in times else ''} | "
            f"{times['base']:.1f} | {sr} | {times['decode']:.1f} | {times['total']:.1f} | - | trained |"
        )
        lines += [_gpu_line(row) for row in same if row["size"] == size]
    lines.append("")
    if not same:
        lines.append(
            "No row of ours: no H100 was available yet. `python -m inference.benchmark suite` measures them all."
        )
    for machine in sorted({row["made"]["machine"] for row in rows if not _is_published_card(row)}):
        own = [row for row in rows if row["made"]["machine"] == machine]
        lines += ["", f"{card(machine)}, another card than the published one:", "", _COLUMNS, _RULER]
        lines += [_gpu_line(row) for size in PUBLISHED for row in own if row["size"] == size]
        lines.append("")
    lines += [f"{line}\n" for line in _against_reference(rows)]
    if rows:
        lines.append(
            "Medians with extremes of one process; the total is base + SR + decode with the copy to the host's memory. "
            f"{origin(rows)} N counts video, audio and text tokens. Error: relative L2 distance of the velocities, at "
            "256p from fp32, with windows for 1080p. Random weights: the times stand, the pictures mean nothing."
        )
    return "\n".join(lines)


def _against_reference(rows: list[Row]) -> list[str]:
    """How many times faster than the network as written the base loop is on the same card; a line for each card."""
    lines = []
    for machine in sorted({row["made"]["machine"] for row in rows}):
        own = {r["tier"]: r for r in rows if r["made"]["machine"] == machine and r["size"] == "256p"}
        reference = own.pop("reference", None)
        if reference is None or not own:
            continue
        seconds = reference["stages"]["base"]["median"]
        ratios = [f"{tier} {seconds / row['stages']['base']['median']:.2f}x" for tier, row in own.items()]
        lines.append(
            f"{card(machine)}, base loop against the network as written, eager: {', '.join(ratios)}."
        )
    return lines


def _is_published_card(row: Row) -> bool:
    return card(row["made"]["machine"]) == GPUS["h100"].name


def _gpu_line(row: Row) -> str:
    stages, geometry = row["stages"], row["geometry"]
    total = row.get("comparable")
    mark = "" if row["steady"] else " (unsteady)"
    decoder = "no decoder" if row["decoder"] is None else row["decoder"]["name"]
    cells = [
        row["size"],
        card(row["made"]["machine"]),
        ", ".join([f"{row['tier']} ({row['exactness']})", *_kernel(row), decoder]) + _lacking(row),
        " / ".join(str(stage["tokens"]["total"]) for stage in geometry.values()),
        " / ".join(str(stage["steps"]) for stage in geometry.values()),
        _cell(stages["base"]),
        _cell(stages["sr"]) if "sr" in stages else "-",
        _decode_cell(stages),
        (f"{total['median']:.2f}" if total else "n/a") + mark,
        _error(row),
        row["weights"].split(",")[0],
    ]
    return "| " + " | ".join(cells) + " |"


def decode_seconds(stages: Row) -> float | None:
    """Of the decoder with the copy to the host's memory, measured together or one after the other."""
    names = ("decode to host",) if "decode to host" in stages else ("video decode", "to host")
    if any("median" not in stages.get(name, {}) for name in names):
        return None
    return sum(stages[name]["median"] for name in names)


def _decode_cell(stages: Row) -> str:
    seconds = decode_seconds(stages)
    return "n/a" if seconds is None else f"{seconds:.3f}"


def _kernel(row: Row) -> list[str]:
    """The attention kernel that ran; the reference leaves the choice to torch."""
    return [row["attention_kernel"]] if "attention_kernel" in row else []


def _lacking(row: Row) -> str:
    """What of the tier this machine could not do."""
    return f", without {' and '.join(row['gave_up'])}" if "gave_up" in row else ""


def _cell(found: Row) -> str:
    """Median and spread, or that there is none."""
    if "status" in found:
        return "n/a"
    digits = 2 if found["median"] >= 1 else 3
    return f"{found['median']:.{digits}f} [{found['min']:.{digits}f}, {found['max']:.{digits}f}]"


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
        f"the clock's times, not the processor's. {origin(rows)}"
    )
    return "\n".join(lines)


def _both(row: Row, stage: str) -> str:
    return f"{row['processor_time'][stage]['median']:.3f}; {_cell(row['stages'][stage])}"


def _ratio(row: Row) -> str:
    clock, worked = (row.get(f"faster_than_reference{end}", {}) for end in ("", "_in_processor_time"))
    cells = [f"{name} {worked[name]:.2f}; {clock[name]:.2f}" for name in clock if name in worked]
    return ", ".join(cells) or "-"


def decoders_table(folder: str) -> str:
    """Markdown: parameters, FLOPs and memory of the video decoders, computed; below each what was measured."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["size"], row["decoder"], row["layout"], row["frames"], row.get("cudnn_benchmark", False)

    rows = [row for row in newest(REPO / folder, "decode", key) if "flops" in row]
    lines = [
        "| clip | decoder | | parameters | TFLOP | peak GB | s |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    order = list(PUBLISHED)
    counted: set[tuple[str, str]] = set()
    for row in sorted(rows, key=lambda r: (order.index(r["size"]), -r["flops"], not _timed(r))):
        name, found = f"| {row['size']} | {row['decoder']} |", row["measured"]
        if (row["size"], row["decoder"]) not in counted:
            counted.add((row["size"], row["decoder"]))
            least = f"at least {row['computed']['least_seconds_h100']:.3f} on an H100"
            cells = [f"{row['parameters'] / 1e6:.1f} M", f"{row['flops'] / 1e12:.1f}"]
            memory = f"{row['computed']['peak_memory_bytes'] / 1e9:.2f}"
            lines.append(f"{name} *computed* | {' | '.join(cells)} | {memory} | {least} |")
        if _timed(row):
            where = f"measured, {card(row['made']['machine'])}, {row['layout'].replace('_', ' ')}"
            where += ", cudnn.benchmark" if row.get("cudnn_benchmark") else ""
            memory = f"{found['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in found else "-"
            lines.append(f"{name} {where} | | | {memory} | {_cell(found['to_host_seconds'])} |")
    told = "5 s at 25 fps, random weights, bf16; times are to pictures in the host's memory."
    return "\n".join([*lines, "", f"{told} {origin(rows)}" if rows else "Nothing computed yet."])


def _timed(row: Row) -> bool:
    return "to_host_seconds" in row["measured"]


TABLES: dict[str, Callable[[str], str]] = {
    "latency": latency_table,
    "latency-cpu": cpu_table,
    "decoders": decoders_table,
    "gains": gains_table,
    "predicted": predicted_table,
    "calibrated": calibrated_table,
    "profile": profile_table,
    "memory-peaks": memory_table,
    "training": training_table,
}
PREDICTIONS = "inference/results/predictions"
PREDICTED = f"{PREDICTIONS}/h100.json"


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


READMES = ("README.md", "inference/benchmark/README.md")
"""Pages with rendered tables, relative to the repository's root."""


def check_readme(readme: Path | None = None) -> str:
    """Prove that the tables of the READMEs are those of the result files, and the picture too.

    Args:
        readme: only this page.

    Raises:
        UserError: a table differs, or there is none.
    """
    from inference.benchmark.figure import check_pictures

    blocks: list[tuple[str, str, str]] = []
    files = [REPO / name for name in READMES] if readme is None else [readme]
    for file in files:
        text = file.read_text(encoding="utf-8")
        blocks += block_pattern().findall(text)
        if render(text) != text:
            raise UserError(f"{file.name} differs from its result files; run `python -m eval.readme_tables`")
    if not any(kind == "latency" for kind, _, _ in blocks):
        raise UserError(
            f"{files[0].name} has no block <!-- latency inference/results/latency --> ... <!-- end -->"
        )
    folders = {argument.strip() for kind, argument, _ in blocks if kind == "latency"}
    pictures = [name for folder in sorted(folders) for name in check_pictures(REPO / folder)]
    names = " and ".join(file.name if readme else str(file.relative_to(REPO)) for file in files)
    return f"{len(blocks)} tables of {names} and {len(pictures)} pictures are those of the result files"


def update_readmes() -> list[str]:
    """Render the benchmark's tables in every page anew; a line for each page that changed."""
    changed = []
    for name in READMES:
        old = (REPO / name).read_text(encoding="utf-8")
        new = render(old)
        if new != old:
            (REPO / name).write_text(new, encoding="utf-8")
            changed.append(f"rendered: {name}")
    return changed


def table(output: str | None = None, picture: bool = True) -> str:
    """Show all tables of the result files, and draw the bars beside the published ones.

    Args:
        output: another folder of results
        picture: draw latency.png into it (needs matplotlib)
    """
    folder = result_files.FOLDER if output is None else Path(output)
    parts = []
    for kind, render_one in TABLES.items():
        argument = {"predicted": PREDICTED, "calibrated": PREDICTIONS}.get(kind, str(folder.absolute()))
        parts.append(f"## {kind}\n\n{render_one(argument)}")
    if picture:
        from inference.benchmark.figure import draw

        parts.append(f"drawn: {draw(folder)}")
    return "\n\n".join(parts)
