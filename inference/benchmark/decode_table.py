"""The README's tables of a file written by `inference.benchmark.decode_cost`: what is computed, and apart from it what was timed.

A block between `<!-- decode-cost FILE -->` and `<!-- end -->` is rendered from here by `python -m eval.readme_tables`.
"""

from typing import Any

Values = dict[str, Any]


def markdown(values: Values) -> str:
    """Both tables of such a file's content, with what was assumed.

    Raises:
        ValueError: figures in the computed rows that are not computed.
    """
    if any(row["how"] != "computed" for row in values["computed"]):
        raise ValueError("a number that is not computed")
    parts = [*_computed(values), ""]
    if values["cpu"] is not None:
        parts += [*_timed(values["cpu"]), ""]
    return "\n".join(parts).rstrip()


def _computed(values: Values) -> list[str]:
    lines = [
        "| computed, 5 s | decoder | parameters | TFLOP | released over this | moved, GB | released over this | "
        "peak, GB | s on an H100, predicted | target, s |",
        "|---|---|" + "---:|" * 8,
    ]
    targets = values["targets_for_b"]
    for row in values["computed"]:
        low, high = row["seconds"]["h100"]
        target = targets["seconds"].get(row["size"], "") if row["decoder"] == "b" else ""
        moved = (row["product_bytes"] + row["pointwise_bytes"]) / 1e9
        cells = [
            row["size"], row["decoder"], f"{row['parameters'] / 1e6:.1f} M", f"{row['flops'] / 1e12:.1f}",
            f"{row['flops_of_released']:.1f}", f"{moved:.0f}", f"{row['bytes_of_released']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}", f"{low:.3f} to {high:.3f}", str(target),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    assumed, published = values["assumed"], values["published_for_released_h100"]
    times = ", ".join(f"{size} {seconds:g}" for size, seconds in published.items())
    lines += [
        "",
        f"Nothing in this table was measured: counts from shapes, bf16, random weights. Predicted at "
        f"{assumed['flops_per_second'] / 1e12:g} TFLOP/s and {assumed['bandwidth']['h100'] / 1e12:g} TB/s, from "
        f"everything fused to every operation a kernel of its own; the release publishes {times} s for its decoder on "
        f"an H100. Target for B's peak at 1080p: {targets['peak_bytes_1080p'] / 1e9:g} GB.",
    ]
    return lines


def _timed(cpu: Values) -> list[str]:
    lines = [
        f"| measured on a CPU: {cpu['side']} px, {cpu['latents']} latents | s, one thread | released over this | "
        "of FLOPs |",
        "|---|---:|---:|---:|",
    ]
    for name, row in cpu["decoders"].items():
        lines.append(
            f"| {name} | {row['seconds']:.2f} | {row['of_released']:.1f} | {row['flops_of_released']:.1f} |"
        )
    lines += [
        "",
        "Processor time in fp32 with random weights, the least of the rounds, all in one run, taking turns.",
    ]
    return lines
