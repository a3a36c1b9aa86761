"""Markdown tables of the result files, for the README: latency next to the published times, decoders, optimisations.

A block `<!-- latency FOLDER -->` (or another name of `TABLES`) of a README is rendered from the files of that folder, or
from that file. Predictions have tables or rows of their own, labelled so.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from inference.benchmark.result_files import Row, card, is_published_card, measured, newest, on_gpu, origin
from inference.benchmark.roofline import predict
from inference.benchmark.roofline.cases import make
from inference.benchmark.roofline.work import PUBLISHED
from magihuman.errors import UserError
from magihuman.io import markdown
from magihuman.models.gpu_specs import recognise

REPO = Path(__file__).resolve().parents[2]
PAGE = "inference/benchmark/README.md"
"""The page with the tables of the benchmark."""
PREDICTIONS = "inference/results/predictions"
DECODE_COST = "inference/results/decode_cost.json"
NOTHING = "Nothing measured yet: no GPU was available."


def _measured(
    heads: Sequence[str],
    alignment: str,
    cells: Iterable[Sequence[str]],
    caption: str,
    rows: list[Row],
    nothing: str = NOTHING,
) -> str:
    """A table with its caption and the origin of its rows, or a note that there are none."""
    return f"{markdown.table(heads, cells, alignment)}\n\n{f'{caption} {origin(rows)}' if rows else nothing}"


def _newest_15b(folder: str, kind: str, *settings: str) -> list[Row]:
    """Newest rows of the 15B network, one for each value of these columns on each machine."""
    rows = newest(REPO / folder, kind, lambda row: tuple(row[name] for name in ("model", *settings)))
    return [row for row in rows if row["model"] == "15b"]


# -- clips


_LATENCY = (
    "clip", "device", "tier", "N (base / SR)", "steps", "base s", "SR s", "decode + host s", "total s", "error",
    "weights",
)  # fmt: skip


def latency_table(folder: str) -> str:
    """The published table with our rows of the same card below it, and a table for every other card.

    H100s and H200s have tables of their own: the published card is an H100.
    """
    rows = [row for row in measured(REPO / folder) if on_gpu(row) and row["model"] == "15b"]
    same = [row for row in rows if is_published_card(row)]
    cells = []
    for size, times in PUBLISHED.items():
        sr, steps = (f"{times['sr']:.1f}", "8 / 5") if "sr" in times else ("-", "8")
        seconds = f"{times['base']:.1f}", sr, f"{times['decode']:.1f}", f"{times['total']:.1f}"
        cells.append([size, "H100, published", "not said", "not said", steps, *seconds, "-", "trained"])
        cells += [_gpu_cells(row) for row in same if row["size"] == size]
    parts = [markdown.table(_LATENCY, cells, "lllllrrrrrl")]
    if not same:
        parts.append(
            "No row of ours: no H100 was available yet. `python -m inference.benchmark suite` measures them all."
        )
    for machine in sorted({row["made"]["machine"] for row in rows if not is_published_card(row)}):
        own = [row for row in rows if row["made"]["machine"] == machine]
        cells = [_gpu_cells(row) for size in PUBLISHED for row in own if row["size"] == size]
        parts.append(f"{card(machine)}, another card than the published one:")
        parts.append(markdown.table(_LATENCY, cells, "lllllrrrrrl"))
    parts += _speedups(rows)
    if rows:
        parts.append(
            "Medians with extremes of one process; the total is base + SR + decode with the copy to the host's memory. "
            f"{origin(rows)} N counts video, audio and text tokens. Error: relative L2 distance of the velocities, at "
            "256p from fp32, with windows for 1080p. Random weights: the times hold, the images mean nothing."
        )
    return "\n\n".join(parts)


def _speedups(rows: list[Row]) -> list[str]:
    """Base loops of the tiers compared with the network as written; a line for each card."""
    lines = []
    for machine in sorted({row["made"]["machine"] for row in rows}):
        own = {r["tier"]: r for r in rows if r["made"]["machine"] == machine and r["size"] == "256p"}
        reference = own.pop("reference", None)
        if reference is None or not own:
            continue
        seconds = reference["stages"]["base"]["median"]
        ratios = [f"{tier} {seconds / row['stages']['base']['median']:.2f}x" for tier, row in own.items()]
        lines.append(f"{card(machine)}, base loop against the network as written, eager: {', '.join(ratios)}.")
    return lines


def _gpu_cells(row: Row) -> list[str]:
    stages, geometry, total = row["stages"], row["geometry"], row.get("comparable")
    decoder = "no decoder" if row["decoder"] is None else row["decoder"]["name"]
    # The reference leaves the choice of the attention kernel to torch.
    kernel = [row["attention_kernel"]] if "attention_kernel" in row else []
    lacking = f", without {' and '.join(row['gave_up'])}" if "gave_up" in row else ""
    decode = decode_seconds(stages)
    return [
        row["size"],
        card(row["made"]["machine"]),
        ", ".join([f"{row['tier']} ({row['exactness']})", *kernel, decoder]) + lacking,
        *_geometry_cells(geometry, "steps"),
        _summary_cell(stages["base"]),
        _summary_cell(stages["sr"]) if "sr" in stages else "-",
        "n/a" if decode is None else f"{decode:.3f}",
        (f"{total['median']:.2f}" if total else "n/a") + ("" if row["steady"] else " (unsteady)"),
        _error_cell(row),
        row["weights"].split(",")[0],
    ]


def _geometry_cells(geometry: Row, count: str) -> list[str]:
    """Tokens, and steps or passes, of every stage."""
    tokens = " / ".join(str(stage["tokens"]["total"]) for stage in geometry.values())
    return [tokens, " / ".join(str(stage[count]) for stage in geometry.values())]


def decode_seconds(stages: Row) -> float | None:
    """Of the decoder with the copy to the host's memory, measured together or one after the other."""
    names = ("decode to host",) if "decode to host" in stages else ("video decode", "to host")
    if any("median" not in stages.get(name, {}) for name in names):
        return None
    return sum(stages[name]["median"] for name in names)


def _summary_cell(found: Row) -> str:
    """Median and extremes, or that there is none."""
    if "status" in found:
        return "n/a"
    digits = 2 if found["median"] >= 1 else 3
    return f"{found['median']:.{digits}f} [{found['min']:.{digits}f}, {found['max']:.{digits}f}]"


def _error_cell(row: Row) -> str:
    """Error against fp32, with the reference's own, where it was computed; else against the reference."""

    def worst(key: str) -> float | None:
        """The larger relative L2 distance of video and audio over all stages."""
        found = [stage[key] for stage in row["errors"].values() if "video_relative_l2" in stage.get(key, {})]
        distances = [max(value["video_relative_l2"], value["audio_relative_l2"]) for value in found]
        return max(distances, default=None)

    exact = worst("against_float32_reference")
    if exact is not None:
        own = worst("reference_against_float32")
        return f"{exact:.1e} of fp32; the reference {own:.1e}" if own is not None else f"{exact:.1e}"
    own = worst(f"against_{row['dtype']}_reference")
    return "n/a" if own is None else f"{own:.1e}"


def cpu_table(folder: str) -> str:
    """The tiny world's clip and one full-width layer on a CPU, with ratios within a run."""

    def both(row: Row, stage: str) -> str:
        return f"{row['processor_time'][stage]['median']:.3f}; {_summary_cell(row['stages'][stage])}"

    def ratio(row: Row) -> str:
        clock, worked = (row.get(f"faster_than_reference{end}", {}) for end in ("", "_in_processor_time"))
        cells = [f"{name} {worked[name]:.2f}; {clock[name]:.2f}" for name in clock if name in worked]
        return ", ".join(cells) or "-"

    rows = [row for row in measured(REPO / folder) if not on_gpu(row)]
    cells = []
    for row in rows:
        what = "one layer of the 15B network" if row["size"] == "layer" else f"{row['size']} clip"
        sr = both(row, "sr") if "sr" in row["stages"] else "-"
        named = f"{what}, {row['dtype']}", f"{row['tier']} ({row['exactness']})"
        cells.append([*named, *_geometry_cells(row["geometry"], "passes"), both(row, "base"), sr, ratio(row),
                      _error_cell(row)])  # fmt: skip
    heads = (
        "what", "tier", "N (base / SR)", "passes", "base: processor s; clock s", "SR: processor s; clock s",
        "speed against the reference, same run (in processor time; by clock)", "error",
    )  # fmt: skip
    threads = " or ".join(sorted({str(row["made"]["threads"]) for row in rows}))
    load = max((row["made"].get("load_average", 0.0) for row in rows), default=0.0)
    caption = (
        f"Measured on a CPU, medians; the clock's with extremes. {threads} thread(s); load average of the machine at the "
        f"start up to {load:g}: where it is above the threads, other programs lengthened the clock's times, not the "
        "processor's."
    )
    return _measured(heads, "lllllllr", cells, caption, rows, "Nothing measured yet.")


def memory_table(folder: str) -> str:
    """Peak memory of each clip's loops, measured, and as `python -m magihuman.zoo plan` computes it."""
    rows = [row for row in _newest_15b(folder, "measure", "size", "tier") if "peak_memory_bytes" in row]
    cells = []
    for row in rows:
        where = f"{row['size']} {row['tier']}, {card(row['made']['machine'])}"
        cells.append([where, "measured peak", f"{row['peak_memory_bytes'] / 1e9:.1f}"])
        if "planned_bytes" in row:
            cells.append([where, "*computed by `zoo plan`*", f"{row['planned_bytes'] / 1e9:.1f}"])
    return _measured(("clip, without codecs", "", "GB"), "llr", cells, "GB are 10^9 bytes.", rows)


# -- decoders


def decoders_table(folder: str) -> str:
    """Parameters, FLOPs and memory of the video decoders, computed; below each the measurements."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["size"], row["decoder"], row["layout"], row["frames"], row.get("cudnn_benchmark", False)

    def timed(row: Row) -> bool:
        return "to_host_seconds" in row["measured"]

    rows = [row for row in newest(REPO / folder, "decode", key) if "flops" in row]
    order, cells = list(PUBLISHED), []
    counted: set[tuple[str, str]] = set()
    for row in sorted(rows, key=lambda r: (order.index(r["size"]), -r["flops"], not timed(r))):
        name, found = (row["size"], row["decoder"]), row["measured"]
        if name not in counted:
            counted.add(name)
            numbers = f"{row['parameters'] / 1e6:.1f} M", f"{row['flops'] / 1e12:.1f}"
            memory = f"{row['computed']['peak_memory_bytes'] / 1e9:.2f}"
            least = f"at least {row['computed']['least_seconds_h100']:.3f} on an H100"
            cells.append([*name, "*computed*", *numbers, memory, least])
        if timed(row):
            where = f"measured, {card(row['made']['machine'])}, {row['layout'].replace('_', ' ')}"
            where += ", cudnn.benchmark" if row.get("cudnn_benchmark") else ""
            memory = f"{found['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in found else "-"
            cells.append([*name, where, "", "", memory, _summary_cell(found["to_host_seconds"])])
    caption = "5 s at 25 fps, random weights, bf16; times are to frames in the host's memory."
    heads = ("clip", "decoder", "", "parameters", "TFLOP", "peak GB", "s")
    return _measured(heads, "lllrrrl", cells, caption, rows, "Nothing computed yet.")


def decode_cost_table(file: str) -> str:
    """Computed counts of the light decoders (`python -m inference.benchmark decode_cost`), and its CPU times apart from them.

    Raises:
        ValueError: computed rows that hold anything else.
    """
    values = json.loads((REPO / file).read_text())
    if any(row["how"] != "computed" for row in values["computed"]):
        raise ValueError("a number that is not computed")
    targets, cells = values["targets_for_b"], []
    for row in values["computed"]:
        low, high = row["seconds"]["h100"]
        target = targets["seconds"].get(row["size"], "") if row["decoder"] == "b" else ""
        moved = (row["product_bytes"] + row["pointwise_bytes"]) / 1e9
        cells.append([
            row["size"], row["decoder"], f"{row['parameters'] / 1e6:.1f} M", f"{row['flops'] / 1e12:.1f}",
            f"{row['flops_of_released']:.1f}", f"{moved:.0f}", f"{row['bytes_of_released']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}", f"{low:.3f} to {high:.3f}", str(target),
        ])  # fmt: skip
    heads = (
        "computed, 5 s", "decoder", "parameters", "TFLOP", "released over this", "moved, GB", "released over this",
        "peak, GB", "s on an H100, predicted", "target, s",
    )  # fmt: skip
    assumed, published = values["assumed"], values["published_for_released_h100"]
    times = ", ".join(f"{size} {seconds:g}" for size, seconds in published.items())
    caption = (
        "Nothing in this table was measured: counts from shapes, bf16, random weights. Predicted at "
        f"{assumed['flops_per_second'] / 1e12:g} TFLOP/s and {assumed['bandwidth']['h100'] / 1e12:g} TB/s, from "
        f"everything fused to every operation a kernel of its own; the release publishes {times} s for its decoder on "
        f"an H100. Target for B's peak at 1080p: {targets['peak_bytes_1080p'] / 1e9:g} GB."
    )
    parts = [markdown.table(heads, cells, "llrrrrrrrr"), caption]
    cpu = values["cpu"]
    if cpu is not None:
        timed = [
            [name, f"{row['seconds']:.2f}", f"{row['of_released']:.1f}", f"{row['flops_of_released']:.1f}"]
            for name, row in cpu["decoders"].items()
        ]
        first = f"measured on a CPU: {cpu['side']} px, {cpu['latents']} latents"
        parts += [
            markdown.table((first, "s, one thread", "released over this", "of FLOPs"), timed),
            "Processor time in fp32 with random weights, the least of the rounds, all in one run, taking turns.",
        ]
    return "\n\n".join([*parts, markdown.origin(file, values["provenance"])])


# -- single passes and training steps


def profile_table(folder: str) -> str:
    """Seconds of one pass by kind of kernel, measured by the profiler, and as predicted."""
    rows, cells = _newest_15b(folder, "profile", "size", "tier"), []
    for row in rows:
        kinds, machine = row["kinds"], predict.machine_of(row["made"]["machine"])
        where = f"{row['size']} {row['tier']}, {card(row['made']['machine'])}"
        seconds = [*(kinds[kind] for kind in ("products", "attention", "pointwise", "other", "idle")), row["wall"]]
        cells.append([where, f"measured, {row['attention_kernel']}", *(f"{s:.4f}" for s in seconds)])
        if machine is not None:
            # The rates assumed of the attention kernel that ran.
            rates = predict.rates_of(row["tier"], row["attention_kernel"])
            found = predict.one_pass(make(row["size"]).stages[-1], rates, machine)
            seconds = [found.products, found.attention, found.pointwise, found.ends, found.host, found.total]
            cells.append([where, "*predicted at assumed rates*", *(f"{s:.4f}" for s in seconds)])
    heads = ("one pass", "", "products s", "attention s", "pointwise s", "other s", "idle s", "total s")
    return _measured(heads, "llrrrrrr", cells, "Measured with torch's profiler running.", rows)


_RECIPES = {"lora": "LoRA step", "dmd2": "DMD-2 iteration, adapters on one base"}
_CHECKPOINTING = {"blocks": "whole blocks", "attention": "all but attention", "none": "nothing"}


def training_table(folder: str) -> str:
    """Training steps of the 15B network on one GPU."""
    rows = _newest_15b(folder, "train", "recipe", "batch", "compile", "activation_checkpointing", "rank")
    cells, computed = [], []
    for row in rows:
        name = f"{_RECIPES[row['recipe']]}, rank {row['rank']}"
        recomputed = _CHECKPOINTING[row["activation_checkpointing"]]
        found = row["seconds"]
        cells.append([
            name, card(row["made"]["machine"]), str(row["batch"]), "yes" if row["compile"] else "no", recomputed,
            f"{found['median']:.2f} [{found['min']:.2f}, {found['max']:.2f}]", f"{row['tokens_per_second']:.0f}",
            f"{row['model_flops'] / 1e15:.2f}", "n/a" if row["mfu"] is None else f"{row['mfu']:.1%}",
            f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "n/a",
        ])  # fmt: skip
        where = f"{name}, {row['batch']} clips, {recomputed} recomputed"
        computed.append([where, "*computed by `zoo plan`*", f"{row['planned_bytes'] / 1e9:.1f}"])
    heads = ("step", "device", "clips", "compiled", "recomputed", "s", "tokens/s", "model PFLOP", "MFU", "peak GB")
    tokens = " or ".join(sorted({str(row["tokens_per_clip"]) for row in rows}))
    caption = (
        f"One GPU, 5 s at 256p ({tokens} tokens), random weights; medians with extremes. Model "
        "FLOPs are those that the recipe needs: what is computed again in the backward pass does not count. MFU is "
        "their share of the data sheet's bf16 peak."
    )
    steps = _measured(heads, "llrllrrrrr", cells, caption, rows)
    return f"{steps}\n\n{markdown.table(('', '', 'GB'), computed, 'llr')}" if rows else steps


# -- predictions


def gains_table(folder: str) -> str:
    """Seconds of the last loop of every clip after each optimisation: predicted for an H200, and measured."""
    found = _measured_rungs(folder)
    stages = {size: make(size).stages[-1] for size in PUBLISHED}
    rows, before = [], dict[tuple[str, str], float]()

    def with_gain(kind: str, size: str, seconds: float) -> str:
        last, text = before.get((kind, size)), f"{seconds:.2f}"
        before[kind, size] = seconds
        if last is None:
            return text
        return f"{text} ({last - seconds:+.2f})".replace("(+", "(-").replace("(--", "(+")

    for rung in predict.LADDER:
        cells: dict[str, list[str]] = {"predicted": [], "measured": []}
        for size, stage in stages.items():
            seconds = stage.passes * predict.one_pass(stage, rung.rates, predict.H200).total
            cells["predicted"].append(with_gain("predicted", size, seconds))
            row = found.get((rung.key, size))
            if row is None or "status" in row:
                cells["measured"].append("-" if row is None else "n/a")
            else:
                seconds = stage.passes * row["stages"][stage.name]["median"]
                cells["measured"].append(with_gain("measured", size, seconds))
        rows.append([rung.name, "*predicted*", *cells["predicted"]])
        if set(cells["measured"]) != {"-"}:
            rows.append([rung.name, "measured", *cells["measured"]])
    made = [(row["made"], row.get("attention_kernel")) for row in found.values()]
    machines = sorted({f"{m['machine']}, {m['date'][:10]}, attention {kernel}" for m, kernel in made})
    heads = ["after", "", *(f"{size} {stage.name} x{stage.steps}" for size, stage in stages.items())]
    caption = (
        "Seconds per loop and the change against the rung above. Predicted: computed from FLOPs and bytes at assumed "
        "rates (`python -m inference.benchmark.roofline ladder`), never measured. Measured: one pass times the passes of "
        f"the loop; {'; '.join(machines) or 'no GPU was available yet: there is no row'}."
    )
    return f"{markdown.table(heads, rows, 'll' + 'r' * len(stages))}\n\n{caption}"


def _measured_rungs(folder: str) -> dict[tuple[str, str], Row]:
    """Newest row by rung and clip, of GPUs only."""
    found: dict[tuple[str, str], Row] = {}
    for row in sorted(_newest_15b(folder, "ladder", "key", "size"), key=lambda row: row["made"]["date"]):
        if on_gpu(row):
            # The ladder's own name for windows by cuDNN.
            by_cudnn = row["key"] == "attention" and row.get("attention_kernel") != "fa3"
            found["windows" if by_cudnn else row["key"], row["size"]] = row
    return found


_TARGETS = {"attention": "exact", "fp8": "FP8 linears", "fp8_attention": "FP8 linears and attention"}


def predicted_table(file: str) -> str:
    """Predicted base + SR + decode after each optimisation, labelled so, with published times, floors and targets.

    Args:
        file: of `roofline ladder output=FILE`.

    Raises:
        ValueError: the file holds something that is not a prediction.
    """
    values: Row = json.loads((REPO / file).read_text())
    if values["kind"] != "predicted":
        raise ValueError("a number that is not predicted")

    def total(clip: dict[str, float], digits: int = 2) -> str:
        parts = [clip[name] for name in ("base", "sr", "decode") if clip.get(name)]
        return " + ".join(f"{part:.{digits}f}" for part in parts) + f" = **{clip['total']:.{digits}f}**"

    sizes, assumed, floor = list(values["stages"]), values["assumed"], values["floor"]
    heads = [
        f"PREDICTED for one {values['machine']}, seconds: base + SR + decode = total",
        *(f"{size}, N={values['stages'][size]['tokens']}" for size in sizes),
        f"total with our decoder {assumed['student']}",
    ]
    published = [total(values["published"][size], 1) for size in sizes]
    rows = [
        ["published, one H100 (measured by its authors)", *published, ""],
        [
            f"least possible in bf16 at {floor['tflops']:g} TFLOP/s",
            *(total(floor["clips"][size]) for size in sizes),
            "",
        ],
    ]
    for row in values["rows"]:
        own = " / ".join(f"{row['student_totals'][size]:.2f}" for size in sizes)
        rows.append([row["after"], *(total(row["clips"][size]) for size in sizes), own])
        if "target" in row:
            wanted = [f"{row['target'][size]:g}" for size in sizes]
            rows.append([f"*target, {_TARGETS[row['key']]}*", *wanted, ""])
    caption = (
        "Computed from FLOPs and bytes at assumed rates of kernels, never measured; decoders at "
        f"{assumed['decode_tflops']:g} TFLOP/s, frames to the host at {assumed['link_gbps']:g} GB/s. Each row adds "
        f"to the one above. {markdown.origin(file, values['provenance'])}"
    )
    return f"{markdown.table(heads, rows)}\n\n{caption}"


def calibrated_table(folder: str) -> str:
    """Predictions at measured rates, from files of `predict` for GPUs; below each, the measured seconds of a pass.

    What the rates of products, attention and copies do not explain is launching, waiting, and kernels that move more
    than they must.
    """
    files = [json.loads(file.read_text()) for file in sorted((REPO / folder).glob("*.json"))]
    latest: dict[tuple[str, ...], Row] = {}
    for values in sorted(files, key=lambda values: values["provenance"]["date"]):
        machine = values["provenance"].get("machine", "")
        if "rates_from" in values and recognise(machine) is not None:
            latest[machine, values["size"], values["tier"]] = values
    parts, cells = ("products", "attention", "pointwise", "total"), []
    for (machine, size, tier), values in latest.items():
        for name, seconds in values["stages"].items():
            where = f"{size} {tier} {name}, {card(machine)}"
            cells.append([where, "*PREDICTED at measured rates*", *(f"{seconds[part]:.4f}" for part in parts)])
            if found := values["measured"]:
                own = found["stages"][name]
                explained = f"{own['seconds_per_pass']:.4f}; {own['explained']:.0%} explained"
                cells.append([where, f"measured, {found['of']}", "-", "-", "-", explained])
    caption = "Predicted at the rates that microbenchmarks of the same run reached; never measured itself."
    heads = ("one pass", "", *(f"{part} s" for part in parts))
    return f"{markdown.table(heads, cells, 'llrrrr')}\n\n{caption if latest else NOTHING}"


# -- the README


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
    "decode-cost": decode_cost_table,
}
SOURCES = {"predicted": f"{PREDICTIONS}/h100.json", "calibrated": PREDICTIONS, "decode-cost": DECODE_COST}
"""Source of a table where it is not the folder of the result files."""


def all_tables(folder: Path) -> str:
    """Every table, the measured ones of this folder."""
    usual = str(folder.absolute())
    return "\n\n".join(f"## {kind}\n\n{make_one(SOURCES.get(kind, usual))}" for kind, make_one in TABLES.items())


def render_readme(check: bool = False) -> bool:
    """Render the tables of the README again; whether that changes it.

    Args:
        check: write nothing, and refuse a change.

    Raises:
        UserError: a block that cannot be rendered, none of the latency, or with check one that differs.
    """
    readme = REPO / PAGE
    old = readme.read_text(encoding="utf-8")
    if "<!-- latency " not in old:
        raise UserError(f"{PAGE} has no block <!-- latency inference/results/latency --> ... <!-- end -->")
    new = markdown.render(old, TABLES, PAGE)
    if new == old:
        return False
    if check:
        raise UserError(f"{PAGE} differs from its result files; run `python -m eval.readme_tables`")
    readme.write_text(new, encoding="utf-8")
    return True
