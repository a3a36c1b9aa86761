"""The computed roofline at rates that this machine's microbenchmarks gave: how much of a pass they explain.

Predicted seconds of a pass are those of its products, at the rates of the same shapes; its attention, at the rate of
the kernel; and its pointwise kernels, at the bandwidth of a copy. What measured passes take beyond this is launching,
waiting, and kernels that move more than they must. Predictions go to a folder of their own.
"""

from pathlib import Path

from inference.benchmark import result_files
from inference.benchmark.result_files import Row, measured
from inference.benchmark.roofline.cases import ClipCase, DenoisingStage, make
from inference.benchmark.roofline.work import forward
from inference.fast import check_tier
from magihuman.errors import UserError
from magihuman.io.files import write_result
from magihuman.io.provenance import code_version, sources_hash
from magihuman.models.flops import attention_pairs, pointwise_bytes

FORMAT = "magihuman-predictions/1"
FOLDER = result_files.FOLDER.parent / "predictions"
_MATRICES = ("qkv", "proj", "up", "down")


def predict(size: str, tier: str, output: Path | None, results: Path | None) -> str:
    """The command `predict`, which describes settings and errors."""
    check_tier(tier)
    case, folder = make(size), results or result_files.FOLDER
    found = _newest_micro(folder, size)
    usual = "padded" if "gpu" in found["provenance"] else "as is"
    kind = "fp8" if tier.startswith("fp8") else usual  # of layers without experts: those stay in bf16
    predicted = {stage.name: _one_pass(stage, found["rows"], kind, usual) for stage in case.stages}
    # Of the same number of tokens too: others are other passes.
    tokens = {stage.name: stage.tokens.total for stage in case.stages}
    own = [
        row
        for row in measured(folder)
        if (row["tier"], row["size"], row["made"]["machine"]) == (tier, size, found["provenance"]["machine"])
        and {name: stage["tokens"]["total"] for name, stage in row["geometry"].items()} == tokens
    ]
    values: Row = {
        "format": FORMAT,
        "kind": "predicted",
        "size": size,
        "tier": tier,
        "rates_from": found["file"],
        "forms": kind,
        "stages": predicted,
        "measured": _compared(case, own[-1], predicted) if own else None,
        "provenance": {
            "how": "computed from FLOPs and bytes at the rates of measured microbenchmarks; not measured itself",
            "command": f"python -m inference.benchmark predict size={size} tier={tier}",
            "code": {**code_version(), "sources": sources_hash()},
            "machine": found["provenance"]["machine"],
            "date": found["provenance"]["date"],
        },
    }
    name = f"{size}-{tier}-{found['file'].partition('-')[0]}.json"
    path = write_result((output or FOLDER) / name, values)
    return "\n".join([*_lines(values), f"written to {path}"])


def _newest_micro(folder: Path, size: str) -> Row:
    """The newest products and the newest attention of a size on one machine, which may lie in a file each: rows, the
    files' names, the newest one's provenance."""
    wanted, rows, files = {"product", "attention"}, [], []
    made: Row = {}
    for values in reversed(result_files.read(folder)):
        if values["kind"] != "micro" or not any(row.get("size") == size for row in values["rows"]):
            continue
        kinds = {row["what"] for row in values["rows"]} & wanted
        if not kinds or (made and made["machine"] != values["provenance"]["machine"]):
            continue
        made = made or values["provenance"]
        wanted -= kinds
        rows += [row for row in values["rows"] if row["what"] in kinds or row["what"] == "roof"]
        files.append(values["file"])
        if not wanted:
            return {"rows": rows, "file": " and ".join(files), "provenance": made}
    raise UserError(
        f"there are no microbenchmarks of size={size}; run `python -m inference.benchmark micro size={size}`"
    )


def _one_pass(stage: DenoisingStage, rows: list[Row], form: str, experts_form: str) -> Row:
    """Predicted seconds of a pass, by part. The products of all layers are equally many.

    Args:
        form: of products in layers that share their weights; experts_form: in those with experts.
    """
    config, tokens = stage.config, stage.tokens
    shared = sum(config.experts(layer) == 1 for layer in range(config.num_layers)) / config.num_layers
    flops = forward(stage).products
    products = flops * shared / _rate(rows, form)
    if shared < 1:
        products += flops * (1 - shared) / _rate(rows, experts_form)
    attention = 0.0
    for layer in range(config.num_layers):
        window = stage.window if layer in config.local_attn_layers else None
        pairs = attention_pairs(tokens.video, tokens.audio + tokens.text, stage.frames, window)
        attention += 4 * pairs * config.hidden_size / _attention_rate(rows, window)
    copy = next(row["copy_tbps"] for row in rows if row.get("what") == "roof") * 1e12
    parts = {"products": products, "attention": attention, "pointwise": pointwise_bytes(config, tokens.total) / copy}
    return {
        **{name: float(f"{value:.4g}") for name, value in parts.items()},
        "total": float(f"{sum(parts.values()):.4g}"),
    }


def _attention_rate(rows: list[Row], window: int | None) -> float:
    """FLOP/s of the fastest kernel, with windows where those were measured."""
    kernels = [row for row in rows if row.get("what") == "attention" and "seconds" in row]
    wanted = "dense" if window is None else f"window {window}"
    own = [row for row in kernels if row["name"] == wanted] or kernels
    return 1e12 * max(row["tflops"] for row in own)


def _rate(rows: list[Row], form: str) -> float:
    """FLOP/s of a layer's products together, each with the most rows, in the form or, where it has no other, as it is."""
    largest = []
    for name in _MATRICES:
        found = [row for row in rows if row.get("what") == "product" and row["name"] == name and "seconds" in row]
        own = [row for row in found if row["form"] == form] or [row for row in found if row["form"] == "as is"]
        largest.append(max(own, key=lambda row: row["tokens"]))
    return sum(row["flops"] for row in largest) / sum(row["flops"] / (row["tflops"] * 1e12) for row in largest)


def _compared(case: ClipCase, row: Row, predicted: dict[str, Row]) -> Row:
    """Seconds per pass of the measured loops, and which share of them is predicted."""
    times: Row = row["processor_time"] if "processor_time" in row else row["stages"]
    found = {}
    for stage in case.stages:
        seconds = times[stage.name]["median"] / row["geometry"][stage.name]["passes"]
        share = predicted[stage.name]["total"] / seconds
        found[stage.name] = {"seconds_per_pass": float(f"{seconds:.4g}"), "explained": round(share, 3)}
    return {"file": row["file"], "of": "processor time" if "processor_time" in row else "clock", "stages": found}


def _lines(values: Row) -> list[str]:
    lines = [f"{values['size']} {values['tier']}: predicted seconds per pass, from {values['rates_from']}"]
    for name, parts in values["stages"].items():
        line = f"  {name:<6}" + ", ".join(f"{part} {seconds:.4g}" for part, seconds in parts.items())
        if values["measured"]:
            own = values["measured"]["stages"][name]
            line += f"; measured {own['seconds_per_pass']:.4g} ({values['measured']['of']})"
            line += f", explained {own['explained']:.0%}"
        lines.append(line)
    return lines
