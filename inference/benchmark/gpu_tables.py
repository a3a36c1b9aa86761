"""Tables of GPU measurements other than clip latency: time by kind of kernel, peak memory, training steps.

Measured and computed figures stand in rows of their own, named as such.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from inference.benchmark import result_files
from inference.benchmark.roofline import predict
from inference.benchmark.roofline.cases import make
from magihuman.models.gpu_specs import recognise

REPO = Path(__file__).resolve().parents[2]
Row = dict[str, Any]

NOTHING = "Nothing measured yet: no GPU was available."


def newest(folder: Path, kind: str, key: Callable[[Row], tuple[Any, ...]]) -> list[Row]:
    """Rows of a kind, each with its file's name and provenance; of rows with the same key on one machine the newest."""
    found: dict[tuple[Any, ...], Row] = {}
    for values in result_files.read(folder):
        if values["kind"] == kind:
            for row in values["rows"]:
                named = {**row, "file": values["file"], "made": values["provenance"]}
                found[key(row), values["provenance"]["machine"]] = named
    return list(found.values())


def card(machine: str) -> str:
    """A GPU's short name."""
    known = recognise(machine)
    return machine.removeprefix("NVIDIA ") if known is None else known.name


def origin(rows: Iterable[Row]) -> str:
    """Machines, days and commits that rows come from."""
    rows = list(rows)
    days = sorted({row["made"]["date"][:10] for row in rows})
    commits = {
        row["made"]["code"].get("commit", "sources " + row["made"]["code"].get("sources", "unknown"))[:12]
        + (" with changes" if row["made"]["code"].get("changed") else "")
        for row in rows
    }
    machines = {f"{row['made']['machine']}, torch {row['made']['libraries']['torch']}" for row in rows}
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{'; '.join(sorted(machines))}; {when}; commit {', '.join(sorted(commits))}."


def profile_table(folder: str) -> str:
    """Markdown: seconds of one pass by kind of kernel, measured by the profiler, and what was predicted."""
    rows = newest(REPO / folder, "profile", lambda row: (row["size"], row["tier"], row["model"]))
    rows = [row for row in rows if row["model"] == "15b"]
    lines = [
        "| one pass | | products s | attention s | pointwise s | other s | idle s | total s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        kinds, stage = row["kinds"], make(row["size"]).stages[-1]
        where = f"{row['size']} {row['tier']}, {card(row['made']['machine'])}"
        cells = [
            kinds["products"],
            kinds["attention"],
            kinds["pointwise"],
            kinds["other"],
            kinds["idle"],
            row["wall"],
        ]
        lines.append(f"| {where} | measured, {row['attention_kernel']} | " + _seconds(cells))
        machine = predict.machine_of(row["made"]["machine"])
        if machine is not None:
            # The rates assumed of the attention kernel that ran.
            parts = predict.one_pass(stage, predict.rates_of(row["tier"], row["attention_kernel"]), machine)
            cells = [parts.products, parts.attention, parts.pointwise, parts.ends, parts.host, parts.total]
            lines.append(f"| {where} | *predicted at assumed rates* | " + _seconds(cells))
    told = f"Measured with torch's profiler running. {origin(rows)}" if rows else NOTHING
    return "\n".join([*lines, "", told])


def _seconds(cells: list[float]) -> str:
    return " | ".join(f"{cell:.4f}" for cell in cells) + " |"


def memory_table(folder: str) -> str:
    """Markdown: peak memory of each clip's loops, measured, and as `python -m magihuman.zoo plan` computes it."""
    rows = newest(REPO / folder, "measure", lambda row: (row["size"], row["tier"], row["model"]))
    rows = [row for row in rows if row["model"] == "15b" and "peak_memory_bytes" in row]
    lines = ["| clip, without codecs | | GB |", "|---|---|---:|"]
    for row in rows:
        where = f"{row['size']} {row['tier']}, {card(row['made']['machine'])}"
        lines.append(f"| {where} | measured peak | {row['peak_memory_bytes'] / 1e9:.1f} |")
        if "planned_bytes" in row:
            lines.append(f"| {where} | *computed by `zoo plan`* | {row['planned_bytes'] / 1e9:.1f} |")
    return "\n".join([*lines, "", f"GB are 10^9 bytes. {origin(rows)}" if rows else NOTHING])


_SETTINGS = ("recipe", "batch", "compile", "activation_checkpointing")
_RECIPES = {"lora": "LoRA step", "dmd2": "DMD-2 iteration, adapters on one base"}
_CHECKPOINTING = {"blocks": "whole blocks", "attention": "all but attention", "none": "nothing"}


def training_table(folder: str) -> str:
    """Markdown: training steps of the 15B network on one GPU."""
    rows = newest(
        REPO / folder, "train", lambda row: tuple(row[name] for name in (*_SETTINGS, "model", "rank"))
    )
    rows = [row for row in rows if row["model"] == "15b"]
    lines = [
        "| step | device | clips | compiled | recomputed | s | tokens/s | model PFLOP | MFU | peak GB |",
        "|---|---|---:|---|---|---:|---:|---:|---:|---:|",
    ]
    computed = ["| | | GB |", "|---|---|---:|"]
    for row in rows:
        found, device = row["seconds"], card(row["made"]["machine"])
        name = f"{_RECIPES[row['recipe']]}, rank {row['rank']}"
        recomputed = _CHECKPOINTING[row["activation_checkpointing"]]
        cells = [
            name,
            device,
            str(row["batch"]),
            "yes" if row["compile"] else "no",
            recomputed,
            f"{found['median']:.2f} [{found['min']:.2f}, {found['max']:.2f}]",
            f"{row['tokens_per_second']:.0f}",
            f"{row['model_flops'] / 1e15:.2f}",
            "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "n/a",
        ]
        lines.append("| " + " | ".join(cells) + " |")
        where = f"{name}, {row['batch']} clips, {recomputed} recomputed"
        computed.append(f"| {where} | *computed by `zoo plan`* | {row['planned_bytes'] / 1e9:.1f} |")
    if not rows:
        return "\n".join([*lines, "", NOTHING])
    return "\n".join(
        [
            *lines,
            "",
            f"One GPU, 5 s at 256p ({rows[0]['tokens_per_clip']} tokens), random weights; medians with extremes. Model "
            "FLOPs are those that the recipe needs: what is computed again in the backward pass does not count. MFU is "
            f"their share of the data sheet's bf16 peak. {origin(rows)}",
            "",
            *computed,
        ]
    )
