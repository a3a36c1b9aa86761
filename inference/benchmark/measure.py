"""Times of a clip's stages in one or more tiers: `python -m inference.benchmark size=256p tier=fast`."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from inference.benchmark import bench_networks, components, result_files
from inference.benchmark.bench_networks import LARGE, ReferenceOutput, affordable, refuse_hopeless
from inference.benchmark.case_options import MeasureOptions
from inference.benchmark.request import CONDITIONS, PUBLISHED_STAGES, STAGES, TimedRequest
from inference.benchmark.result_files import Row
from inference.benchmark.roofline.cases import ClipCase
from inference.benchmark.roofline.work import forward, video_decoder
from inference.benchmark.timers import (
    UNSTEADY,
    device_of,
    free,
    peak_memory,
    peak_rates,
    reset_peak,
    summaries,
    summary,
)
from inference.fast import TIERS, require_kernel
from magihuman.models.denoiser import Denoiser
from magihuman.models.gpu_specs import recognise


@dataclass
class Contender:
    """A tier ready to run."""

    request: TimedRequest
    row: Row
    times: list[dict[str, float]] = field(default_factory=list)
    worked: list[dict[str, float]] = field(default_factory=list)


def measure(chosen: MeasureOptions) -> str:
    """Times of all stages in some tiers, which a new result file holds too; returns a text.

    Raises:
        UserError: a setting that cannot be.
    """
    place, case = device_of(chosen.device), chosen.case(chosen.size)
    refuse_hopeless(case, place)
    kind = bench_networks.dtype_for(case, place)
    changes = bench_networks.options_from(chosen.options)
    names = bench_networks.named("tier", chosen.tier, TIERS)
    for name in names:
        if "attention" not in changes:
            require_kernel(name, place, kind)
    small = case.stages[0].config.parameter_count() <= LARGE
    made, peaks = result_files.provenance(place), peak_rates(place, kind)
    rows: list[Row] = []
    for group in [names] if small else [[name] for name in names]:
        contenders = _prepare(case, group, place, kind, chosen.weights, chosen.decoder, changes)
        _run(contenders, place, chosen.warm, chosen.repeat, chosen.budget)
        rows += [_finished(case, contender, peaks, place) for contender in contenders]
        contenders.clear()
        free(place)
    _compare_in_run(rows)
    folder = None if chosen.output is None else Path(chosen.output)
    path = result_files.write("measure", f"{case.size}-{'-'.join(names)}", rows, made, folder)
    return "\n".join([*map(describe, rows), f"written to {path}"])


def _prepare(
    case: ClipCase,
    names: Sequence[str],
    device: torch.device,
    dtype: torch.dtype,
    checkpoint: str | None,
    decoder: str,
    changes: Mapping[str, Any],
) -> list[Contender]:
    """Every tier's network with its errors against the reference on the same inputs."""
    start = time.perf_counter()
    reference, weights = bench_networks.build(case, device, dtype, checkpoint)
    built = time.perf_counter() - start
    print(f"{case.size}: network of {weights} in {built:.1f} s", flush=True)
    inputs, truths = {}, {}
    for stage in case.stages:
        seen = bench_networks.view(reference, stage)
        inputs[stage.name] = bench_networks.draw(stage, reference, device)
        truths[stage.name] = ReferenceOutput(seen, inputs[stage.name], affordable(stage))
    found = None if case.size == "layer" else components.make(case, decoder, device, dtype)
    contenders = []
    for name in names:
        start = time.perf_counter()
        network = bench_networks.faster(reference, name, device, len(names) == 1 and name != "reference", changes)
        prepared = time.perf_counter() - start
        denoisers = {stage.name: bench_networks.view(network, stage) for stage in case.stages}
        errors, first = {}, {}
        gave_up: dict[str, str] = {}
        for stage in case.stages:
            start = time.perf_counter()
            seen = denoisers[stage.name]
            velocities, reasons = bench_networks.first_passes(seen, (network, *denoisers.values()), inputs[stage.name])
            gave_up |= {option: reason.splitlines()[0] for option, reason in reasons.items()}
            errors[stage.name] = truths[stage.name].errors(velocities)
            first[stage.name] = round(time.perf_counter() - start, 4)
            print(f"  {name}, {stage.name}: first pass {first[stage.name]:.1f} s", flush=True)
            for option, reason in reasons.items():
                print(f"  without {option}: {reason.splitlines()[0]}", flush=True)
        row = described(case, name, network, weights, found)
        row["errors"] = errors
        if gave_up:
            row["gave_up"] = gave_up
        row["cold"] = {"build": round(built, 3), "prepare": round(prepared, 4), "first_pass": first}
        contenders.append(Contender(TimedRequest(case, denoisers, found, device), row))
    return contenders


def _run(contenders: list[Contender], device: torch.device, warm: int, repeat: int, budget: float) -> None:
    """Warm up, then time; contenders take turns, so that a disturbance affects all of them."""
    for contender in contenders:
        for number in range(warm):
            times = contender.request.run(look_for_waits=number == warm - 1)
            if device.type == "cuda":  # of the last one
                contender.row["host_waits"] = contender.request.waits
            if not number:
                contender.row["cold"]["first_request"] = {k: round(v, 4) for k, v in times.items()}
        print(f"  {contender.row['tier']}: warm, request {times['request']:.3g} s", flush=True)
    reset_peak(device)
    start, done = time.perf_counter(), 0
    while done < repeat or (time.perf_counter() - start < budget and done < 4 * repeat):
        for contender in contenders:
            contender.times.append(contender.request.run())
            contender.worked.append(contender.request.worked)
        done += 1
    if memory := peak_memory(device):
        for contender in contenders:
            contender.row["peak_memory_bytes"] = memory["peak_bytes"]


def described(case: ClipCase, tier: str, network: Denoiser, weights: str, found: components.Parts | None) -> Row:
    """The columns of a row other than times."""
    geometry = {
        stage.name: {
            "latents": [stage.frames, stage.height, stage.width],
            "tokens": asdict(stage.tokens) | {"total": stage.tokens.total},
            "steps": stage.steps,
            "passes": stage.passes,
            "window": stage.window,
            "flops_per_pass": forward(stage).total,
        }
        for stage in case.stages
    }
    decoder = None if found is None else {"name": found.decoder_name, "weights": found.decoder_weights}
    return {
        "size": case.size,
        "model": case.model,
        "parameters": case.stages[0].config.parameter_count(),
        "weights": weights,
        "clip": {"seconds": case.seconds, "frames": case.frames, "pixels": list(case.pixels)},
        "geometry": geometry,
        "tier": tier,
        "exactness": TIERS[tier],
        **bench_networks.facts(network),
        "dtype": str(network.model.compute_dtype).removeprefix("torch."),
        "decoder": decoder,
    }


def _finished(case: ClipCase, contender: Contender, peaks: Mapping[str, float], device: torch.device) -> Row:
    """The row with its times."""
    row, requests = contender.row, contender.times
    names = [*STAGES, *CONDITIONS] if contender.request.parts is not None else [s.name for s in case.stages]
    found = summaries(requests)
    cells = {name: {"status": "n/a", "reason": reason} for name, reason in contender.request.missing.items()} | found
    row["stages"] = {name: cells[name] for name in names if name in cells}
    if device.type == "cpu":
        row["processor_time"] = summaries(contender.worked)
    row["request"] = found["request"]
    if all(name in found for name in PUBLISHED_STAGES if name != "sr"):
        row["comparable"] = summary([sum(t.get(name, 0.0) for name in PUBLISHED_STAGES) for t in requests])
    work = {stage.name: stage.passes * forward(stage).total for stage in case.stages}
    if case.released and row["decoder"] and "video decode" in found:
        work["video decode"] = video_decoder(case, row["decoder"]["name"]).flops
    one_thread = device.type == "cpu" and torch.get_num_threads() == 1  # see `timers.undisturbed`
    times = row["processor_time"] if one_thread else found
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    row["rates"] = rates(times, work, peaks, machine)
    row["roof"] = dict(peaks)
    row["steady"] = all(found[stage.name]["cv"] <= UNSTEADY for stage in case.stages)
    return row


def rates(times: Mapping[str, Any], work: Mapping[str, int], peaks: Mapping[str, float] | None, machine: str) -> Row:
    """TFLOP/s of each stage, its share of the measured peak, and of the data sheet's bf16 peak (MFU) if known.

    Args:
        times: spread of seconds by stage; work: FLOPs by stage.
        machine: the device's name as torch gives it.
    """
    known, found = recognise(machine), {}
    for name, flops in work.items():
        reached = flops / times[name]["median"] / 1e12
        found[name] = {"tflops": round(reached, 5)}
        if peaks is not None:
            found[name]["of_roof"] = round(reached / peaks["tflops"], 4)
        if known is not None:
            found[name]["mfu"] = round(reached * 1e12 / known.bf16, 4)
    return found


def _compare_in_run(rows: list[Row]) -> None:
    """Give every row the speed of its loops compared with the reference of the same run."""
    reference = next((row for row in rows if row["tier"] == "reference" and not row["options"]), None)
    if reference is None or len(rows) < 2:
        return
    for row in rows:
        for key, of in (("", "stages"), ("_in_processor_time", "processor_time")):
            if of in row:
                ratios = {s: round(reference[of][s]["median"] / row[of][s]["median"], 3) for s in row["geometry"]}
                row[f"faster_than_reference{key}"] = ratios


def describe(row: Row) -> str:
    """A row for the terminal."""
    lines = [
        f"{row['size']} {row['tier']} ({row['exactness']}), {row['weights']}, {row['dtype']}"
        + ("" if row["steady"] else "; unsteady: the loops vary by more than 3 %")
    ]
    for name, cell in row["stages"].items():
        if "status" in cell:
            lines.append(f"  {name:<15} n/a: {cell['reason']}")
            continue
        line = f"  {name:<15}{cell['median']:>10.4g} s   [{cell['min']:.4g}, {cell['max']:.4g}], n={cell['n']}"
        if name in row["geometry"]:
            tokens = row["geometry"][name]["tokens"]
            line += f"   N={tokens['total']}, {row['geometry'][name]['passes']} passes"
        if name in row["rates"]:
            line += f", {row['rates'][name]['tflops']:.4g} TFLOP/s"
        lines.append(line)
    lines.append(f"  {'request':<15}{row['request']['median']:>10.4g} s")
    for name, where in row.get("host_waits", {}).items():
        lines.append(f"  {name}: the host waited {len(where)} times for the GPU {' '.join(sorted(set(where)))}")
    for key, words in (("", ""), ("_in_processor_time", " in processor time")):
        for name, ratio in row.get(f"faster_than_reference{key}", {}).items():
            lines.append(f"  {name}: {ratio:.2f} times the reference's speed in this run{words}")
    return "\n".join(lines)
