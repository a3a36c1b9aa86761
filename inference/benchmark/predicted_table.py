"""Predictions as a table, of a file that `python -m inference.benchmark.roofline ladder output=FILE` wrote, or of one that
`python -m inference.benchmark predict` made of measured microbenchmarks."""

import json
from pathlib import Path
from typing import Any

from magihuman.models.gpu_specs import recognise

REPO = Path(__file__).resolve().parents[2]
_NAMES = {"attention": "exact", "fp8": "FP8 linears", "fp8_attention": "FP8 linears and attention"}


def predicted_table(file: str) -> str:
    """Markdown: predicted seconds, labelled so.

    Raises:
        ValueError: the file holds something that is not a prediction.
    """
    values: dict[str, Any] = json.loads((REPO / file).read_text())
    if values["kind"] != "predicted":
        raise ValueError("a number that is not predicted")
    lines = _calibrated(values) if "rates_from" in values else _ladder(values)
    made = values["provenance"]
    commit = made["code"].get("commit", "unknown")[:12] + (
        " with changes" if made["code"].get("changed") else ""
    )
    lines[-1] += f" From [{file}]({file}): {made['date'][:10]}, commit {commit}."
    return "\n".join(lines)


def calibrated_table(folder: str) -> str:
    """Markdown: predictions at measured rates, from files of `predict` for GPUs; below each what a pass took.

    What the rates of products, attention and copies do not explain is launching, waiting, and kernels that move more
    than they must.
    """
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for file in sorted((REPO / folder).glob("*.json")):
        values = json.loads(file.read_text())
        machine = values["provenance"].get("machine", "")
        if "rates_from" in values and recognise(machine) is not None:
            key = machine, values["size"], values["tier"]
            if key not in newest or values["provenance"]["date"] >= newest[key]["provenance"]["date"]:
                newest[key] = values
    lines = [
        "| one pass | | products s | attention s | pointwise s | total s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for (machine, size, tier), values in newest.items():
        known = recognise(machine)
        assert known is not None
        lines += [line.replace("| ", f"| {size} {tier} ", 1) for line in _pass_rows(values, known.name)]
    told = "Predicted at the rates that microbenchmarks of the same run reached; never measured itself."
    return "\n".join([*lines, "", told if newest else "Nothing measured yet: no GPU was available."])


def _ladder(values: dict[str, Any]) -> list[str]:
    """Seconds of base + SR + decode after each optimisation, beside published times, floors and targets."""
    sizes, student = list(values["stages"]), values["assumed"]["student"]
    heads = [f"{size}, N={values['stages'][size]['tokens']}" for size in sizes]
    lines = [
        f"| PREDICTED for one {values['machine']}, seconds: base + SR + decode = total | "
        + " | ".join(heads)
        + f" | total with our decoder {student} |",
        "|---" + "|---:" * (len(sizes) + 1) + "|",
        "| published, one H100 (measured by its authors) | "
        + " | ".join(_cell(values["published"][size], 1) for size in sizes)
        + " | |",
        f"| least possible in bf16 at {values['floor']['tflops']:g} TFLOP/s | "
        + " | ".join(_cell(values["floor"]["clips"][size]) for size in sizes)
        + " | |",
    ]
    for row in values["rows"]:
        cells = [_cell(row["clips"][size]) for size in sizes]
        own = " / ".join(f"{row['student_totals'][size]:.2f}" for size in sizes)
        lines.append(f"| {row['after']} | " + " | ".join(cells) + f" | {own} |")
        if "target" in row:
            wanted = [f"{row['target'][size]:g}" for size in sizes]
            lines.append(f"| *target, {_NAMES[row['key']]}* | " + " | ".join(wanted) + " | |")
    assumed = values["assumed"]
    return [
        *lines,
        "",
        "Computed from FLOPs and bytes at assumed rates of kernels, never measured; decoders at "
        f"{assumed['decode_tflops']:g} TFLOP/s, pictures to the host at {assumed['link_gbps']:g} GB/s. Each row adds "
        "to the one above.",
    ]


def _calibrated(values: dict[str, Any]) -> list[str]:
    """Seconds of a pass by part, at rates of measured microbenchmarks; below each row what a pass took."""
    lines = [
        f"| a pass of {values['size']} {values['tier']} | | products s | attention s | pointwise s | total s |",
        "|---|---|---:|---:|---:|---:|",
    ]
    return [
        *lines,
        *_pass_rows(values, values["provenance"]["machine"]),
        "",
        f"Predicted at the rates of {values['rates_from']}: {values['provenance']['machine']}.",
    ]


def _pass_rows(values: dict[str, Any], machine: str) -> list[str]:
    rows = []
    for name, parts in values["stages"].items():
        cells = [f"{parts[part]:.4f}" for part in ("products", "attention", "pointwise", "total")]
        rows.append(f"| {name}, {machine} | *PREDICTED at measured rates* | " + " | ".join(cells) + " |")
        found = values["measured"]
        if found:
            own = found["stages"][name]
            told = f"{own['seconds_per_pass']:.4f}; {own['explained']:.0%} explained"
            rows.append(f"| {name}, {machine} | measured, {found['of']} | - | - | - | {told} |")
    return rows


def _cell(clip: dict[str, float], digits: int = 2) -> str:
    parts = [clip[name] for name in ("base", "sr", "decode") if clip.get(name)]
    return " + ".join(f"{part:.{digits}f}" for part in parts) + f" = **{clip['total']:.{digits}f}**"
