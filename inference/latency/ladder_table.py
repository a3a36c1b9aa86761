"""What every optimisation should bring and what it brought: predictions and measurements side by side."""

from pathlib import Path
from typing import Any

from inference.latency import records
from inference.roofline import predict
from inference.roofline.cases import make

REPO = Path(__file__).resolve().parents[2]
SIZES = ("256p", "540p", "1080p")


def gains_table(folder: str) -> str:
    """Markdown: seconds of the last loop of every clip after each optimisation, predicted for an H200 | measured."""
    found = _measured(REPO / folder)
    stages = {size: make(size).stages[-1] for size in SIZES}
    heads = [f"{size} {stage.name} x{stage.steps}" for size, stage in stages.items()]
    lines = [
        "| after | " + " | ".join(f"{head}: predicted | measured" for head in heads) + " |",
        "|---" + "|---:|---:" * len(heads) + "|",
    ]
    before: dict[tuple[str, str], float] = {}
    for rung in predict.LADDER:
        cells = []
        for size, stage in stages.items():
            predicted = stage.passes * predict.one_pass(stage, rung.rates, predict.H200).total
            cells.append(_with_gain(predicted, before.get(("predicted", size))))
            before["predicted", size] = predicted
            row = found.get((rung.key, size))
            if row is None or "status" in row:
                cells.append("-" if row is None else "n/a")
                continue
            seconds = stage.passes * row["stages"][stage.name]["median"]
            cells.append(_with_gain(seconds, before.get(("measured", size))))
            before["measured", size] = seconds
        lines.append(f"| {rung.name} | " + " | ".join(cells) + " |")
    machines = sorted(
        {
            f"{row['machine']}, {row['date']}, attention {row.get('attention_kernel')}"
            for row in found.values()
        }
    )
    lines += [
        "",
        "Seconds per loop and what the row saves against the one above. Predicted: computed from FLOPs and bytes at "
        "assumed rates (`python -m inference.roofline ladder`), never measured. Measured: one pass times the passes of "
        "the loop; "
        + (f"{'; '.join(machines)}." if machines else "no GPU was at hand yet, so the column is empty."),
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
    for values in records.read(folder):
        made = values["provenance"]
        if values["kind"] == "ladder" and "gpu" in made:
            for row in values["rows"]:
                if row["model"] == "15b":
                    found[row["key"], row["size"]] = {
                        **row,
                        "machine": made["machine"],
                        "date": made["date"][:10],
                    }
    return found
