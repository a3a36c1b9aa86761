"""What every optimisation should bring and what it brought: predicted and measured rows."""

from pathlib import Path
from typing import Any

from inference.benchmark import result_files
from inference.benchmark.roofline import predict
from inference.benchmark.roofline.cases import make

REPO = Path(__file__).resolve().parents[2]
SIZES = ("256p", "540p", "1080p")


def gains_table(folder: str) -> str:
    """Markdown: seconds of the last loop of every clip after each optimisation: predicted for an H200, and measured."""
    found = _measured(REPO / folder)
    stages = {size: make(size).stages[-1] for size in SIZES}
    heads = [f"{size} {stage.name} x{stage.steps}" for size, stage in stages.items()]
    lines = ["| after | | " + " | ".join(heads) + " |", "|---|---" + "|---:" * len(heads) + "|"]
    before: dict[tuple[str, str], float] = {}
    for rung in predict.LADDER:
        cells: dict[str, list[str]] = {"predicted": [], "measured": []}
        for size, stage in stages.items():
            predicted = stage.passes * predict.one_pass(stage, rung.rates, predict.H200).total
            cells["predicted"].append(_with_gain(predicted, before.get(("predicted", size))))
            before["predicted", size] = predicted
            row = found.get((rung.key, size))
            if row is None or "status" in row:
                cells["measured"].append("-" if row is None else "n/a")
                continue
            seconds = stage.passes * row["stages"][stage.name]["median"]
            cells["measured"].append(_with_gain(seconds, before.get(("measured", size))))
            before["measured", size] = seconds
        lines.append(f"| {rung.name} | *predicted* | " + " | ".join(cells["predicted"]) + " |")
        if set(cells["measured"]) != {"-"}:
            lines.append(f"| {rung.name} | measured | " + " | ".join(cells["measured"]) + " |")
    machines = sorted(
        {
            f"{row['machine']}, {row['date']}, attention {row.get('attention_kernel')}"
            for row in found.values()
        }
    )
    lines += [
        "",
        "Seconds per loop and the change against the rung above. Predicted: computed from FLOPs and bytes at assumed "
        "rates (`python -m inference.benchmark.roofline ladder`), never measured. Measured: one pass times the passes of the "
        "loop; " + (f"{'; '.join(machines)}." if machines else "no GPU was available yet: there is no row."),
    ]
    return "\n".join(lines)


def _with_gain(seconds: float, before: float | None) -> str:
    text = f"{seconds:.2f}"
    return (
        text
        if before is None
        else f"{text} ({before - seconds:+.2f})".replace("(+", "(-").replace("(--", "(+")
    )


def _measured(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Newest row by rung and clip, of GPUs only."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for values in result_files.read(folder):
        made = values["provenance"]
        if values["kind"] == "ladder" and "gpu" in made:
            for row in values["rows"]:
                if row["model"] == "15b":
                    key = row["key"]
                    if key == "attention" and row.get("attention_kernel") != "fa3":
                        key = "windows"  # the ladder's own name for what cuDNN does
                    found[key, row["size"]] = {
                        **row,
                        "machine": made["machine"],
                        "date": made["date"][:10],
                    }
    return found
