"""From the JSON lines of a run to committed results, tables and the picture: `python -m inference.latency collect`.

The steps of one run become rows of the result files in inference/results/latency: a clip's row takes its loops, its
decoder and its errors from the steps that measured each. Nothing is computed anew but sums and medians; predictions at
the rates that were measured go to files of their own (`inference.latency.calibrate`).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inference.fast import TIERS
from inference.latency import records
from inference.latency.budget import RecordedRun, read_runs
from inference.latency.clock import UNSTEADY, medians, spread
from inference.latency.suite import DECODERS, FOLDER, SIZES
from inference.roofline.cases import make
from inference.roofline.work import video_decoder
from magihuman.errors import UserError
from magihuman.gpus import recognise
from magihuman.provenance import code_version, sources_hash

Values = dict[str, Any]

_CHECKED_AT = {"256p": ("base", "256p"), "windows": ("windows", "windows"), "540p": ("sr", "540p")}


def collect(input: str = str(FOLDER), output: str | None = None) -> str:
    """Turn the results of `suite` and `train` into committed files, and make tables, picture and README anew.

    Example:
        python -m inference.latency collect input=runs/latency
        git add inference README.md && git commit -m "Latency on an H100"

    Args:
        input: a .jsonl file of `suite` or `train`, or a folder of them
        output: another folder than inference/results/latency; README and predictions are then left alone

    Raises:
        UserError: no such file, a file of something else, or nothing but dry runs.
    """
    given, folder = Path(input), records.FOLDER if output is None else Path(output)
    files = sorted(given.glob("*.jsonl")) if given.is_dir() else [given]
    if not files:
        raise UserError(
            f"input={input} holds no .jsonl file; give the folder that `suite` or `train` wrote to"
        )
    lines: list[str] = []
    runs = [(run, file) for file in files for run in read_runs(file)]
    every = [run for run, _ in runs]
    if output is None and all(run.header["dry"] for run, _ in runs):
        raise UserError(
            f"input={input} holds dry runs only, none of it is a result; give output=FOLDER to look at it"
        )
    for run, file in runs:
        others = [other for other in every if other is not run and _same_origin(other, run)]
        lines += _collected(run, others, file, folder, committed=output is None)
    if output is None:
        lines += _rendered(folder)
    return "\n".join(lines)


def _same_origin(a: RecordedRun, b: RecordedRun) -> bool:
    """Whether two runs are of one machine and of the same sources."""
    made, other = a.header["provenance"], b.header["provenance"]
    same = made["machine"] == other["machine"] and made["code"].get("sources") == other["code"].get("sources")
    return same and a.header["dry"] == b.header["dry"]


def _collected(
    run: RecordedRun, others: Sequence[RecordedRun], file: Path, folder: Path, committed: bool
) -> list[str]:
    """Write one run's files; a line for each."""
    header = run.header
    name = f"{header['command']} of {header['provenance']['date']}"
    if header["dry"] and committed:
        return [f"{file.name}: {name} is a dry run and was left out"]
    identity = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    known = [found["file"] for found in records.read(folder) if found["provenance"].get("run") == identity]
    if known:
        return [f"{file.name}: {name} is there already: {', '.join(known)}; delete these to collect it again"]
    made = _provenance(header["provenance"]) | {"run": identity, "collected_from": file.name}
    lines = []
    for kind, rows in rows_of(run, others).items():
        if rows:
            name_of_file = header["command"] if header["command"] != kind else "15b"
            path = records.write(kind, name_of_file, rows, made, folder)
            lines.append(f"{path.name}: {len(rows)} rows")
    if not run.whole:
        lines.append(
            f"{file.name}: the last line of {name} is incomplete (the run was killed) and was left out"
        )
    failed = [step for step, line in run.steps.items() if line["status"] == "failed"]
    if failed:
        lines.append(f"failed steps: {', '.join(failed)}; reasons are in the steps file")
    if "commit" not in made["code"]:
        lines.append("the commit is unknown: the sources of the run are not those of this checkout's HEAD")
    return lines


def _provenance(found: Values) -> Values:
    """With the commit, where the machine had no git and its sources are those of a clean HEAD here."""
    code = dict(found["code"])
    if "commit" not in code and code.get("sources") == sources_hash():
        here = code_version()
        if here and not here["changed"]:
            code |= here
    return {**found, "code": code}


def rows_of(run: RecordedRun, others: Sequence[RecordedRun] = ()) -> dict[str, list[Values]]:
    """Rows by kind of result file.

    Args:
        others: further runs of the same machine and sources, for decoders that this one did not measure.
    """
    roof_line = run.done("roof")
    roof = roof_line["roof"] if roof_line else None
    kernels = [row for line in _done(run, "kernels ") for row in line["rows"]]
    if roof:
        kernels = [_with_share(row, roof) for row in kernels]
        kernels = [{"what": "roof", **roof}, *kernels] if kernels else []
    kept = ("step", "status", "at", "seconds", "reason", "trace", "gave_up", "peak_bytes", "reserved_bytes")
    return {
        "measure": [
            row for tier in TIERS for size in SIZES for row in _clip_rows([run, *others], tier, size, roof)
        ],
        "decode": [line["row"] for line in _done(run, "decode ")],
        "micro": kernels,
        "profile": [_profile_row(run, line) for line in _done(run, "profile ")],
        "train": [line["row"] | {"roof": roof} for line in run.steps.values() if _is_training(line)],
        "steps": [{key: line[key] for key in kept if key in line} for line in run.steps.values()],
    }


def _done(run: RecordedRun, prefix: str) -> Iterable[Values]:
    return (line for name, line in run.steps.items() if name.startswith(prefix) and line["status"] == "done")


def _is_training(line: Values) -> bool:
    return line["status"] == "done" and "recipe" in line.get("row", {})


def _with_share(row: Values, roof: Values) -> Values:
    return row | {"of_roof": round(row["tflops"] / roof["tflops"], 4)} if "tflops" in row else row


def _profile_row(run: RecordedRun, line: Values) -> Values:
    tier, size = line["step"].split()[1:]
    first = run.done(f"{tier} {size} first")
    facts = {} if first is None else {k: first["row"][k] for k in ("geometry", "attention_kernel", "model")}
    return {"size": size, "tier": tier, **facts, **line["profile"]}


def _clip_rows(runs: Sequence[RecordedRun], tier: str, size: str, roof: Values | None) -> list[Values]:
    """A clip's row of the first run for each decoder that was measured; one without a decoder where none was."""
    run, first_line = runs[0], f"{tier} {size} first"
    first = run.done(first_line)
    requests = run.runs.get(f"{tier} {size}", [])
    if first is None or not requests:
        return []
    counted = [line for line in requests if line["counted"]]
    if not counted:
        return []
    found = medians([line["times"] for line in counted])
    row: Values = dict(first["row"])
    loops = list(row["geometry"])
    row["errors"], row["gave_up"] = _errors(run, tier, size), {}
    for name in dict.fromkeys(("256p", size)):
        gave_up = (run.done(f"{tier} {name} first") or {}).get("gave_up", {})
        row["gave_up"] |= {option: reason.splitlines()[0] for option, reason in gave_up.items()}
    if not row["gave_up"]:
        del row["gave_up"]
    row["cold"] = {**row["cold"], "first_pass": {loops[-1]: first["first_pass"]}}
    row["stages"] = {name: found[name] for name in ("noise", *loops)}
    if all("processor_time" in line for line in counted):
        row["processor_time"] = medians([line["processor_time"] for line in counted])
    # All passes of a loop do the same work; with one request per size they are all there is to judge by.
    row["passes"] = {
        name: spread([second for line in counted for second in line["passes"][name]]) for name in loops
    }
    row["steady"] = all(row["passes"][name]["cv"] <= UNSTEADY for name in loops)
    end = run.done(f"{tier} {size}") or {}
    row |= {to: end[key] for key, to in _OF_THE_END.items() if key in end}
    row["host_waits"] = row.get("host_waits") or {loops[-1]: first["host_waits"]}
    # Replaying a CUDA graph allocates nothing, so the peak of a loop can be that of the pass that was recorded.
    peaks = [line["peak_bytes"] for line in (first, end) if "peak_bytes" in line]
    if peaks:
        row["peak_memory_bytes"] = max(peaks)
    work = {name: stage["passes"] * stage["flops_per_pass"] for name, stage in row["geometry"].items()}
    machine, rows = run.header["provenance"]["machine"], []
    for decoder in DECODERS:
        decoded = next(filter(None, (_fastest(each, size, decoder) for each in runs)), None)
        if decoded is not None:
            stages = {**row["stages"], "decode to host": decoded["measured"]["to_host_seconds"]}
            named = {"name": decoder, "weights": "random", "cudnn_benchmark": decoded["cudnn_benchmark"]}
            clip = {**row, "decoder": named, "stages": stages, "comparable": _sum(stages, loops)}
            flops = work | (
                {"decode to host": _decoder_flops(size, decoder)} if row["model"] == "15b" else {}
            )
            rows.append(clip | _rates(stages, flops, roof, machine))
    return rows or [{**row, "decoder": None, **_rates(row["stages"], work, roof, machine)}]


# What the last line of a clip's step says, and what the row calls it.
_OF_THE_END = {
    "host_waits": "host_waits",
    "planned_bytes": "planned_bytes",
    "gpu": "gpu_after",
}


def _errors(run: RecordedRun, tier: str, size: str) -> Values:
    """By what was compared: the base pass, windows at 256p's length for 1080p, the second stage's pass at 540p."""
    wanted = {"256p": ("256p",), "540p": ("256p", "540p"), "1080p": ("256p", "windows")}[size]
    lines = {name: run.done(f"{tier} {name} first") for name in wanted}
    return {_CHECKED_AT[name][0]: line["errors"] for name, line in lines.items() if line and "errors" in line}


def _fastest(run: RecordedRun, size: str, decoder: str) -> Values | None:
    """A decoder's row, by cuDNN's heuristics or by its search."""
    lines = [run.done(f"decode {size} {decoder}{end}") for end in ("", " search")]
    timed = [line["row"] for line in lines if line and "to_host_seconds" in line["row"]["measured"]]
    return min(timed, key=lambda row: row["measured"]["to_host_seconds"]["median"], default=None)


def _decoder_flops(size: str, decoder: str) -> int:
    return video_decoder(make(size), decoder).flops


def _sum(stages: Values, loops: list[str]) -> Values:
    """Of stages that were measured one after the other in one process: sums of medians and of extremes."""
    parts = [stages[name] for name in (*loops, "decode to host")]
    total = {key: sum(part[key] for part in parts) for key in ("median", "min", "max")}
    return {**spread([total["median"]]), **total, "n": min(part["n"] for part in parts)}


def _rates(stages: Values, work: dict[str, int], roof: Values | None, machine: str) -> Values:
    """TFLOP/s of each stage, its share of the measured roof and of the data sheet's peak (MFU)."""
    known, rates = recognise(machine), {}
    for name, flops in work.items():
        reached = flops / stages[name]["median"] / 1e12
        rates[name] = {"tflops": round(reached, 5)}
        if roof is not None:
            rates[name]["of_roof"] = round(reached / roof["tflops"], 4)
        if known is not None:
            rates[name]["mfu"] = round(reached * 1e12 / known.bf16, 4)
    return {"rates": rates, "roof": roof}


def _rendered(folder: Path) -> list[str]:
    """Predictions at measured rates, the picture, and every README with its tables."""
    from inference.latency.calibrate import predict
    from inference.latency.picture import draw
    from inference.latency.tables import update_readmes

    lines = []
    sizes = {
        row["size"]
        for found in records.read(folder)
        if found["kind"] == "micro" and "gpu" in found["provenance"]
        for row in found["rows"]
        if row.get("size") in SIZES
    }
    for size in sorted(sizes):
        for tier in ("fast", "fp8"):
            try:
                lines.append(predict(size, tier).splitlines()[-1])
            except (
                UserError,
                ValueError,
                KeyError,
                StopIteration,
            ) as error:  # not all of its rates were measured
                lines.append(
                    f"no prediction at measured rates for {size} {tier}: {error or type(error).__name__}"
                )
    try:
        lines.append(f"drawn: {draw(folder)}")
    except UserError:
        lines.append("the picture was not drawn: pip install matplotlib, then collect again")
    return [*lines, *update_readmes()]
