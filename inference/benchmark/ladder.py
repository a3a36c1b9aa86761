"""What each optimisation brings: one pass of a clip's networks after each rung of the predicted ladder, measured."""

import gc
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from inference.benchmark import bench_networks, result_files
from inference.benchmark.measure import Row, device_of, folder_of, refuse_hopeless
from inference.benchmark.numerical_error import Truth, affordable
from inference.benchmark.peak_rate import measure_roof
from inference.benchmark.roofline.cases import Case, make
from inference.benchmark.roofline.predict import LADDER
from inference.benchmark.timers import time_call
from magihuman.errors import UserError
from magihuman.models.denoiser import Denoiser

# What a rung switches on: tier and options. Those not named stay as the rung before left them.
_PAD = {
    "pad": True,
    "grouped": False,
    "sort": False,
    "compile": "off",
    "graphs": False,
    "attention": "reference",
}
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


def ladder(
    size: str = "256p",
    rungs: str = ",".join(RUNGS),
    model: str | None = None,
    seconds: float | None = None,
    text: int | None = None,
    options: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    warm: int = 2,
    repeat: int = 3,
    output: str | None = None,
) -> str:
    """Time one pass of every stage after each optimisation, in the order of the predictions.

    A rung that cannot run here is recorded with its reason.

    Args:
        size: as for measure
        rungs: of eager, pad, compile, grouped, attention, fp8, fp8_attention
        model: another architecture of configs/model
        seconds: length of the clip
        text: tokens of the prompt
        options: changes of every rung's options, such as compile=off
        device: auto, cpu or cuda
        dtype: auto, bfloat16 or float32
        warm: passes before the timed ones
        repeat: timed passes
        output: another folder for the result

    Raises:
        UserError: a setting that cannot be.
    """
    names = [name.strip() for name in rungs.split(",")]
    for name in names:
        if name not in RUNGS:
            raise UserError(f"rungs={name} is unknown; choose from {', '.join(RUNGS)}")
    case, place = make(size, seconds=seconds, text=text, model=model), device_of(device)
    refuse_hopeless(case, place)
    kind, changes = bench_networks.dtype_for(dtype, case, place), bench_networks.options_from(options)
    made, roof = result_files.provenance(place), measure_roof(place, kind)
    reference, weights = bench_networks.build(case, place, kind, None)
    inputs = {stage.name: bench_networks.draw(stage, reference, place) for stage in case.stages}
    truths = {
        stage.name: Truth(bench_networks.view(reference, stage), inputs[stage.name], affordable(stage))
        for stage in case.stages
    }
    rows: list[Row] = []
    for name in names:
        row: Row = {
            "size": size,
            "model": case.model,
            "key": name,
            "tier": RUNGS[name][0],
            "weights": weights,
        }
        row["geometry"] = {s.name: {"tokens": s.tokens.total, "passes": s.passes} for s in case.stages}
        row["roof"] = roof
        try:
            row |= _climbed(case, name, reference, inputs, truths, changes, place, warm, repeat)
        except Exception as error:  # compilers and kernels fail in many ways, and the other rungs still count
            row |= {"status": "n/a", "reason": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        rows.append(row)
        print(_line(row), flush=True)
        gc.collect()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    path = result_files.write("ladder", size, rows, made, folder_of(output))
    return f"written to {path}"


def _climbed(
    case: Case,
    name: str,
    reference: Denoiser,
    inputs: Mapping[str, bench_networks.Inputs],
    truths: Mapping[str, Truth],
    changes: Mapping[str, Any],
    device: torch.device,
    warm: int,
    repeat: int,
) -> Row:
    """Options, errors and times of one rung."""
    tier, own = RUNGS[name]
    network = bench_networks.faster(reference, tier, device, False, {**own, **changes} if own else {})
    row: Row = {"stages": {}, "errors": {}, "first_pass": {}, **bench_networks.facts(network)}
    for stage in case.stages:
        seen, given = bench_networks.view(network, stage), inputs[stage.name]
        start = time.perf_counter()
        row["errors"][stage.name] = truths[stage.name].errors(bench_networks.one_pass(seen, given))
        row["first_pass"][stage.name] = round(time.perf_counter() - start, 3)
        call = partial(bench_networks.one_pass, seen, given)
        row["stages"][stage.name] = time_call(call, device, warm=warm, least=repeat, most=2 * repeat)
    return row


def _line(row: Row) -> str:
    if "status" in row:
        return f"{row['key']:<14} n/a: {row['reason']}"
    cells = [f"{name} {cell['median']:.4g} s" for name, cell in row["stages"].items()]
    return f"{row['key']:<14} one pass of {', '.join(cells)}"
