"""Predicted seconds of whole clips after each optimisation, beside the published ones, the targets and the floors.

Computed from FLOPs and bytes at assumed rates; nothing here is measured.
"""

from typing import Any

from inference.benchmark.roofline import predict
from inference.benchmark.roofline.bounds import PUBLISHED, Limits, bound
from inference.benchmark.roofline.cases import Case, make
from inference.benchmark.roofline.work import forward, network, video_decoder
from magihuman.models.gpu_specs import GPUS

SIZES = tuple(PUBLISHED)
REACHED = 790.0
"""10^12 FLOP/s of a large bf16 product on an H200, measured before this project; what floors are taken at."""

TARGETS = {
    "attention": {"256p": 1.55, "540p": 6.0, "1080p": 35.0},
    "fp8": {"256p": 1.1, "540p": 4.6, "1080p": 30.0},
    "fp8_attention": {"256p": 1.0, "540p": 4.0, "1080p": 24.0},
}
"""Seconds of base, SR and decode together that a rung of the ladder is to reach; `attention` is the last exact one."""

STUDENT = "b"
"""Our lightest decoder of the released latents (configs/turbo)."""

_DECODE = 350e12  # FLOP/s assumed of a tuned video decoder
_LINK = 50e9  # bytes per second assumed from pinned memory of the device to the host

Cell = dict[str, float]


def clip(case: Case, rates: predict.Rates, machine: predict.Machine, decoder: str = "turbo") -> Cell:
    """Predicted seconds of base, sr (0 where there is none), decode with the copy to the host, and their total."""
    loops = predict.seconds(case, rates, machine)
    decode = video_decoder(case, decoder).flops / _DECODE + case.bytes_out / _LINK
    return _summed(loops["base"], loops.get("sr", 0.0), decode)


def floor(case: Case, tflops: float = REACHED) -> Cell:
    """What no exact bf16 path can pass, as `clip`: all arithmetic at this rate, and nothing else."""
    limits = Limits.of(GPUS["h200"], tflops)
    loops = {stage.name: bound(network(stage), limits).seconds for stage in case.stages}
    return _summed(loops["base"], loops.get("sr", 0.0), bound(video_decoder(case), limits).seconds)


def _summed(base: float, sr: float, decode: float) -> Cell:
    cells = {"base": base, "sr": sr, "decode": decode, "total": base + sr + decode}
    return {name: round(seconds, 4) for name, seconds in cells.items()}


def predictions(machine: predict.Machine) -> dict[str, Any]:
    """All of it for one device: `stages` that are computed, `floor`, and a row for every rung of the ladder.

    A row's `seconds` are those of the clip's last loop alone; its `clips` those of base, SR and decode by the published
    Turbo decoder; `student_totals` those with our lightest decoder instead.
    """
    cases = {size: make(size) for size in SIZES}
    rows = []
    for rung in predict.LADDER:
        last = {
            size: round(
                case.stages[-1].passes * predict.one_pass(case.stages[-1], rung.rates, machine).total, 4
            )
            for size, case in cases.items()
        }
        clips = {size: clip(case, rung.rates, machine) for size, case in cases.items()}
        student = {size: clip(case, rung.rates, machine, STUDENT)["total"] for size, case in cases.items()}
        row: dict[str, Any] = {
            "key": rung.key,
            "after": rung.name,
            "seconds": last,
            "clips": clips,
            "student_totals": student,
        }
        if rung.key in TARGETS:
            row["target"] = TARGETS[rung.key]
        rows.append(row)
    stages = {
        size: {
            "stage": case.stages[-1].name,
            "steps": case.stages[-1].steps,
            "tokens": case.stages[-1].tokens.total,
            "flops_per_pass": forward(case.stages[-1]).total,
        }
        for size, case in cases.items()
    }
    return {
        "machine": machine.name,
        "stages": stages,
        "assumed": {
            "student": STUDENT,
            "decode_tflops": _DECODE / 1e12,
            "link_gbps": _LINK / 1e9,
            "rates": {rung.key: vars(rung.rates) for rung in predict.LADDER},
        },
        "floor": {"tflops": REACHED, "clips": {size: floor(case) for size, case in cases.items()}},
        "rows": rows,
    }
