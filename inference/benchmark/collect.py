"""Turns the JSON lines of runs into committed results, tables and the figure: `python -m inference.benchmark collect`.

The steps of one run become rows of the result files in inference/results/latency: a clip's row takes its loops, its
decoder and its errors from the steps that measured each. Only sums, medians and rates are computed here; predictions at
the measured rates go to files of their own (`inference.benchmark.calibrate`).
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from inference.benchmark import calibrate, figure, result_files, result_tables
from inference.benchmark.budget import RecordedRun, read_runs
from inference.benchmark.measure import rates
from inference.benchmark.micro import with_share
from inference.benchmark.suite import DECODERS, SIZES
from inference.benchmark.timers import UNSTEADY, summaries, summary
from inference.fast import TIERS
from magihuman.errors import UserError
from magihuman.io.provenance import code_version, sources_hash

Values = dict[str, Any]

_MEMORY = ("peak_bytes", "reserved_bytes")
_STAGE_OF = {"256p": "base", "windows": "windows", "540p": "sr"}  # whose error a first pass tells


def collect(source: Path, output: Path | None) -> str:
    """The command `collect`, which describes settings and errors."""
    folder = output or result_files.FOLDER
    files = sorted(source.glob("*.jsonl")) if source.is_dir() else [source]
    if not files:
        raise UserError(f"input={source} holds no .jsonl file; give the folder that `suite` or `train` wrote to")
    lines: list[str] = []
    runs = [(run, file) for file in files for run in read_runs(file)]
    if output is None and all(run.header["dry"] for run, _ in runs):
        raise UserError(f"input={source} holds dry runs only, none of it is a result; give output=FOLDER to look at it")
    for run, file in runs:
        others = [other for other, _ in runs if other is not run and _same_origin(other, run)]
        lines += _collected(run, others, file, folder, committed=output is None)
    if output is None:
        lines += _rendered(folder)
    return "\n".join(lines)


def _same_origin(a: RecordedRun, b: RecordedRun) -> bool:
    """Whether two runs are of one machine and of the same sources."""
    made, other = a.header["provenance"], b.header["provenance"]
    same = made["machine"] == other["machine"] and made["code"].get("sources") == other["code"].get("sources")
    return same and a.header["dry"] == b.header["dry"]


def _collected(run: RecordedRun, others: Sequence[RecordedRun], file: Path, folder: Path, committed: bool) -> list[str]:
    """Write one run's files; a line for each."""
    header = run.header
    name = f"{header['command']} of {header['provenance']['date']}"
    if header["dry"] and committed:
        return [f"{file.name}: {name} is a dry run and was left out"]
    identity = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:12]
    known = [found["file"] for found in result_files.read(folder) if found["provenance"].get("run") == identity]
    if known:
        return [f"{file.name}: {name} is there already: {', '.join(known)}; delete these to collect it again"]
    made = _provenance(header["provenance"]) | {"run": identity, "collected_from": file.name}
    lines = []
    for kind, rows in rows_of(run, others).items():
        if rows:
            name_of_file = header["command"] if header["command"] != kind else "15b"
            path = result_files.write(kind, name_of_file, rows, made, folder)
            lines.append(f"{path.name}: {len(rows)} rows")
    if not run.whole:
        lines.append(f"{file.name}: the last line of {name} is incomplete (the run was killed) and was left out")
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
    peaks = (run.done("roof") or {}).get("roof")
    kernels = [row for line in _done(run, "kernels ") for row in line["rows"]]
    if peaks and kernels:
        kernels = [{"what": "roof", **peaks}, *(with_share(row, peaks) for row in kernels)]
    kept = ("step", "status", "at", "seconds", "reason", "trace", "gave_up", "compiler", *_MEMORY)
    return {
        "measure": [row for tier in TIERS for size in SIZES for row in _clip_rows([run, *others], tier, size, peaks)],
        "decode": [line["row"] for line in _done(run, "decode ")],
        "micro": kernels,
        "profile": [_profile_row(run, line) for line in _done(run, "profile ")],
        "train": [
            {**line["row"], "roof": peaks, **{key: line[key] for key in _MEMORY if key in line}}
            for line in run.steps.values()
            if line["status"] == "done" and "recipe" in line.get("row", {})
        ],
        "steps": [{key: line[key] for key in kept if key in line} for line in run.steps.values()],
    }


def _done(run: RecordedRun, prefix: str) -> Iterable[Values]:
    return (line for name, line in run.steps.items() if name.startswith(prefix) and line["status"] == "done")


def _profile_row(run: RecordedRun, line: Values) -> Values:
    tier, size = line["step"].split()[1:]
    row = run.steps[f"{tier} {size} first"]["row"]  # which the profile needs
    facts = {key: row[key] for key in ("geometry", "attention_kernel", "model")}
    return {"size": size, "tier": tier, **facts, **line["profile"]}


def _clip_rows(runs: Sequence[RecordedRun], tier: str, size: str, peaks: Values | None) -> list[Values]:
    """A clip's rows of the first run: one for each decoder that was measured, one without a decoder if none was."""
    run = runs[0]
    first = run.done(f"{tier} {size} first")
    counted = [line for line in run.runs.get(f"{tier} {size}", []) if line["counted"]]
    if first is None or not counted:
        return []
    last = run.done(f"{tier} {size}") or {}  # missing where the run was killed between two requests
    found = summaries([line["times"] for line in counted])
    row: Values = {**first["row"], "errors": _errors(run, tier, size)}
    loops = list(row["geometry"])
    gave_up: dict[str, str] = {}
    for name in ("256p", size):
        gave_up |= (run.done(f"{tier} {name} first") or {}).get("gave_up", {})
    if gave_up:
        row["gave_up"] = {option: reason.splitlines()[0] for option, reason in gave_up.items()}
    row["cold"] = {**row["cold"], "first_pass": {loops[-1]: first["first_pass"]}}
    row["stages"] = {name: found[name] for name in ("noise", *loops)}
    if all("processor_time" in line for line in counted):
        row["processor_time"] = summaries([line["processor_time"] for line in counted])
    # All passes of a loop do the same work, so they show how steady a single request was.
    row["passes"] = {name: summary([second for line in counted for second in line["passes"][name]]) for name in loops}
    row["steady"] = all(row["passes"][name]["cv"] <= UNSTEADY for name in loops)
    row["host_waits"] = last.get("host_waits") or {loops[-1]: first["host_waits"]}
    if "planned_bytes" in last:
        row["planned_bytes"] = last["planned_bytes"]
    # Replaying a CUDA graph allocates nothing: the peak of a loop can be that of the first pass, which was recorded.
    memory = [line["peak_bytes"] for line in (first, last) if "peak_bytes" in line]
    if memory:
        row["peak_memory_bytes"] = max(memory)
    if last.get("gpu"):
        row["gpu_after"] = last["gpu"]
    row["roof"], machine = peaks, run.header["provenance"]["machine"]
    work = {name: stage["passes"] * stage["flops_per_pass"] for name, stage in row["geometry"].items()}
    rows = []
    for decoder in DECODERS:
        decoded = next(filter(None, (_fastest(each, size, decoder) for each in runs)), None)
        if decoded is not None:
            stages = {**row["stages"], "decode to host": decoded["measured"]["to_host_seconds"]}
            named = {"name": decoder, "weights": "random", "cudnn_benchmark": decoded["cudnn_benchmark"]}
            flops = work | ({"decode to host": decoded["flops"]} if "flops" in decoded else {})
            found = {"comparable": _sum(stages, loops), "rates": rates(stages, flops, peaks, machine)}
            rows.append({**row, "decoder": named, "stages": stages, **found})
    return rows or [{**row, "decoder": None, "rates": rates(row["stages"], work, peaks, machine)}]


def _errors(run: RecordedRun, tier: str, size: str) -> Values:
    """By what was compared: the base pass, windows at 256p's length for 1080p, the second stage's pass at 540p."""
    wanted = {"256p": ("256p",), "540p": ("256p", "540p"), "1080p": ("256p", "windows")}[size]
    lines = {name: run.done(f"{tier} {name} first") for name in wanted}
    return {_STAGE_OF[name]: line["errors"] for name, line in lines.items() if line and "errors" in line}


def _fastest(run: RecordedRun, size: str, decoder: str) -> Values | None:
    """A decoder's row, by cuDNN's heuristics or by its search."""
    lines = [run.done(f"decode {size} {decoder}{end}") for end in ("", " search")]
    timed = [line["row"] for line in lines if line and "to_host_seconds" in line["row"]["measured"]]
    return min(timed, key=lambda row: row["measured"]["to_host_seconds"]["median"], default=None)


def _sum(stages: Values, loops: list[str]) -> Values:
    """Sums of the medians and of the extremes of stages that were measured separately, in one process."""
    parts = [stages[name] for name in (*loops, "decode to host")]
    total = {key: sum(part[key] for part in parts) for key in ("median", "min", "max")}
    return {**total, "n": min(part["n"] for part in parts)}


def _rendered(folder: Path) -> list[str]:
    """Predictions at measured rates, the figure, and the tables of the README."""
    lines = []
    sizes = {
        row["size"]
        for found in result_files.read(folder)
        if found["kind"] == "micro" and "gpu" in found["provenance"]
        for row in found["rows"]
        if row.get("size") in SIZES
    }
    for size in sorted(sizes):
        for tier in ("fast", "fp8"):
            try:
                lines.append(calibrate.predict(size, tier, None, None).splitlines()[-1])
            # Not all of its rates were measured.
            except (UserError, ValueError, KeyError, StopIteration) as error:
                lines.append(f"no prediction at measured rates for {size} {tier}: {error or type(error).__name__}")
    try:
        lines.append(f"drawn: {figure.draw(folder)}")
    except UserError:
        lines.append("the figure was not drawn: pip install matplotlib, then collect again")
    return [*lines, *([f"rendered: {result_tables.PAGE}"] if result_tables.render_readme() else [])]
