"""Bar chart latency.png: measured stages with the published ones, and predictions in a panel of their own."""

import hashlib
import json
from pathlib import Path
from typing import Any

from inference.benchmark.result_files import card, measured, on_gpu
from inference.benchmark.result_tables import decode_seconds
from inference.benchmark.roofline import predict
from inference.benchmark.roofline.cases import make
from inference.benchmark.roofline.work import PUBLISHED
from magihuman.errors import UserError

NAME = "latency.png"
KEY = "magihuman-values"
_COLOURS = {"base": "#4878d0", "sr": "#ee854a", "decode": "#6acc64"}
_SHOWN_RUNGS = {
    "windows": "exact, cuDNN",
    "attention": "exact, FA3",
    "fp8": "FP8 linears, FA3",
    "fp8_attention": "+ FP8 attention",
}


def values(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The bars: seconds of base, SR and decode with the copy to the host; of one card after the other."""
    bars = []
    # The published card first.
    rows = sorted(measured(folder), key=lambda row: ("H100" not in row["made"]["machine"], row["made"]["machine"]))
    for size, times in PUBLISHED.items():
        bars.append({"size": size, "name": "published", **{k: times.get(k, 0.0) for k in _COLOURS}})
        for row in rows:
            if row["size"] != size or not on_gpu(row) or "comparable" not in row:
                continue
            stages = row["stages"]
            own = "" if row["decoder"]["name"] == "turbo" else f" + {row['decoder']['name']}"
            name = f"{row['tier']}{own}, {card(row['made']['machine'])}"
            seconds = {k: stages[k]["median"] if k in stages else 0.0 for k in ("base", "sr")}
            bars.append({"size": size, "name": name, **seconds, "decode": decode_seconds(stages)})
    predicted = []
    for rung in predict.LADDER:
        if rung.key in _SHOWN_RUNGS:
            for size in PUBLISHED:
                cells = predict.clip(make(size), rung.rates, predict.H100)
                bar = {"size": size, "name": _SHOWN_RUNGS[rung.key], **{k: cells[k] for k in _COLOURS}}
                target = {"target": predict.TARGETS[rung.key][size]} if rung.key in predict.TARGETS else {}
                predicted.append(bar | target)
    return {"measured": bars, "predicted": predicted}


def draw(folder: Path) -> Path:
    """Draw the bars into the folder; the file carries a hash of its values.

    Raises:
        UserError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("drawing needs matplotlib; use picture=false") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    shown = values(folder)
    figure = Figure(figsize=(10, 5.5), layout="constrained")
    most = {panel: max(sum(bar["size"] == size for bar in bars) for size in PUBLISHED) for panel, bars in shown.items()}
    ratios = [1 + count for count in most.values()]
    axes = figure.subplots(2, len(PUBLISHED), squeeze=False, height_ratios=ratios)
    measured_too = len(shown["measured"]) > len(PUBLISHED)
    titles = {
        "measured": "published and measured" if measured_too else "published; none measured yet",
        "predicted": "PREDICTED, H100 (line: target)",
    }
    # One scale for measured and predicted bars of a size.
    everything = [bar for bars in shown.values() for bar in bars]
    widest = {
        size: 1.2 * max(sum(bar[part] for part in _COLOURS) for bar in everything if bar["size"] == size)
        for size in PUBLISHED
    }
    for line, (panel, bars) in enumerate(shown.items()):
        for column, size in enumerate(PUBLISHED):
            axis = axes[line][column]
            own = [bar for bar in bars if bar["size"] == size]
            left = [0.0] * len(own)
            for part, colour in _COLOURS.items():
                widths = [bar[part] for bar in own]
                hatch = "//" if panel == "predicted" else None
                axis.barh(
                    [bar["name"] for bar in own], widths, left=left, color=colour, label=part, hatch=hatch,
                    edgecolor="white", height=0.6,
                )  # fmt: skip
                left = [a + b for a, b in zip(left, widths, strict=True)]
            for place, total in enumerate(left):
                axis.text(total, place, f" {total:.2f}", va="center", fontsize=8)
            for place, bar in enumerate(own):
                if "target" in bar:
                    axis.plot([bar["target"]] * 2, [place - 0.4, place + 0.4], color="black", lw=1.5)
            axis.set_ylim(most[panel] - 0.4, -0.6)
            axis.set_xlim(0, widest[size])
            axis.set_title(f"{size}: {titles[panel]}", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, loc="outside upper center", ncols=len(labels))
    figure.supxlabel("seconds of a 5-second clip: base + SR + decode with the copy to the host", fontsize=9)
    path = folder / NAME
    figure.savefig(path, dpi=110, metadata={KEY: digest(shown), "Software": None})
    return path


def digest(shown: dict[str, list[dict[str, Any]]]) -> str:
    """Hash of the bars."""
    return hashlib.sha256(json.dumps(shown, sort_keys=True).encode()).hexdigest()


def check_figures(folder: Path) -> list[str]:
    """The folder's figure, if it has one.

    Raises:
        UserError: it does not show the folder's values.
    """
    from PIL import Image

    path = folder / NAME
    if not path.exists():
        return []
    with Image.open(path) as image:
        shown = image.info.get(KEY)
    if shown != digest(values(folder)):
        raise UserError(f"{path} does not show the result files; run `python -m inference.benchmark table`")
    return [NAME]
