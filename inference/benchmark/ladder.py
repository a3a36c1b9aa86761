"""Measured gain of each optimisation: one pass of a clip's networks after each rung of the predicted ladder."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from inference.benchmark import bench_networks, result_files
from inference.benchmark.bench_networks import ReferenceOutput, affordable, named, refuse_hopeless
from inference.benchmark.result_files import Row
from inference.benchmark.roofline.cases import ClipCase
from inference.benchmark.roofline.predict import LADDER
from inference.benchmark.timers import device_of, free, peak_rates, time_call

# Tier and options of a rung. Those not named stay as the rung before left them.
_PAD = {
    "pad": True, "grouped": False, "sort": False, "compile": "off", "graphs": False, "attention": "reference",
}  # fmt: skip
_COMPILE = {**_PAD, "compile": "static"}
_GROUPED = {**_COMPILE, "grouped": True, "graphs": True}
_ATTENTION = {**_GROUPED, "attention": "auto"}
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "eager": ("reference", {}),
    "pad": ("fast", _PAD),
    "compile": ("fast", _COMPILE),
    "grouped": ("fast", _GROUPED),
    "attention": ("fast", _ATTENTION),
    "fp8": ("fp8", _ATTENTION),
    "fp8_attention": ("fp8_attention", {**_ATTENTION, "attention": "fp8"}),
}
assert set(RUNGS) <= {rung.key for rung in LADDER}


def ladder(case: ClipCase, rungs: str, options: str | None, device: str, repeat: int, folder: Path | None) -> str:
    """The command `ladder`, which describes settings and errors."""
    names = named("rungs", rungs, RUNGS)
    place = device_of(device)
    refuse_hopeless(case, place)
    kind, changes = bench_networks.dtype_for(case, place), bench_networks.options_from(options)
    made, peaks = result_files.provenance(place), peak_rates(place, kind)
    reference, weights = bench_networks.build(case, place, kind, None)
    inputs = {stage.name: bench_networks.draw(stage, reference, place) for stage in case.stages}
    outputs = {
        stage.name: ReferenceOutput(bench_networks.view(reference, stage), inputs[stage.name], affordable(stage))
        for stage in case.stages
    }

    def measured(tier: str, own: dict[str, Any]) -> Row:
        network = bench_networks.faster(reference, tier, place, False, {**own, **changes} if own else {})
        row: Row = {"stages": {}, "errors": {}, "first_pass": {}, **bench_networks.facts(network)}
        for stage in case.stages:
            call = partial(bench_networks.one_pass, bench_networks.view(network, stage), inputs[stage.name])
            start = time.perf_counter()
            row["errors"][stage.name] = outputs[stage.name].errors(call())
            row["first_pass"][stage.name] = round(time.perf_counter() - start, 3)
            row["stages"][stage.name] = time_call(call, place, least=repeat, most=2 * repeat)
        return row

    rows: list[Row] = []
    for name in names:
        tier, own = RUNGS[name]
        row: Row = {"size": case.size, "model": case.model, "key": name, "tier": tier, "weights": weights}
        row["geometry"] = {s.name: {"tokens": s.tokens.total, "passes": s.passes} for s in case.stages}
        row["roof"] = peaks
        try:
            row |= measured(tier, own)
            found = "one pass of " + ", ".join(f"{s} {cell['median']:.4g} s" for s, cell in row["stages"].items())
        except Exception as error:  # compilers and kernels fail in many ways, and the other rungs still count
            row |= {"status": "n/a", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            found = f"n/a: {row['reason']}"
        rows.append(row)
        print(f"{name:<14} {found}", flush=True)
        free(place)
    return f"written to {result_files.write('ladder', case.size, rows, made, folder)}"
