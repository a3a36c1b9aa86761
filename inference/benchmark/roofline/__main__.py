"""`python -m inference.benchmark.roofline [stages|gpus|published|ladder] [key=value ...]`: computed costs, without torch."""

import sys
from collections.abc import Callable
from pathlib import Path

from inference.benchmark.calibrate import FORMAT
from inference.benchmark.case_options import StagesOptions
from inference.benchmark.roofline import predict
from inference.benchmark.roofline.cases import make
from inference.benchmark.roofline.work import PUBLISHED, bound, limits
from inference.benchmark.roofline.work import stages as stages_of
from magihuman.cli import run_one
from magihuman.errors import UserError
from magihuman.io.files import write_result
from magihuman.io.provenance import computed
from magihuman.models.gpu_specs import GPUS, gpu

NOTE = "computed, not measured"


def stages(chosen: StagesOptions) -> str:
    """Tokens, FLOPs, bytes and least time of every stage."""
    peak = limits(gpu(chosen.device), chosen.tflops, chosen.bandwidth)
    lines = [f"limits of {peak.name}: {peak.bf16 / 1e12:g} TFLOP/s, {peak.bandwidth / 1e12:g} TB/s; {NOTE}"]
    for case in map(chosen.case, _sizes(chosen.size)):
        height, width = case.pixels
        parameters = case.stages[0].config.parameter_count()
        lines += [
            "",
            f"{case.size}: {case.model} of {parameters / 1e9:.3g} B parameters, {case.seconds:g} s, "
            f"{case.frames} frames of {width}x{height}",
            f"{'stage':<14}{'tokens v+a+t=N':>24}{'passes':>8}{'TFLOP/pass':>12}{'PFLOP':>10}{'GB':>10}"
            f"{'least s':>10}  by",
        ]
        works = stages_of(case, chosen.decoder)
        for work in works:
            n, least = work.tokens, bound(work, peak)
            tokens = "" if n is None else f"{n.video}+{n.audio}+{n.text}={n.total}"
            lines.append(
                f"{work.stage:<14}{tokens:>24}{work.passes:>8}{work.flops / work.passes / 1e12:>12.4g}"
                f"{work.flops / 1e15:>10.4g}{work.moved / 1e9:>10.4g}{least.seconds:>10.3g}  {least.by}"
            )
        wanted = [bound(work, peak).seconds for work in works if work.stage in ("base", "sr", "video decode")]
        lines.append(f"base + sr + video decode: at least {sum(wanted):.3g} s")
    return "\n".join(lines)


def _sizes(size: str) -> tuple[str, ...]:
    return tuple(PUBLISHED) if size == "all" else (size,)


def gpus(size: str = "all", decoder: str = "turbo") -> str:
    """Least seconds of base + super-resolution + video decode in bf16 on every known device.

    Args:
        size: 256p, 540p, 1080p, or all of them
        decoder: turbo, wan, or a student of configs/decoder such as a and b
    """
    cases = [make(name) for name in _sizes(size)]
    lines = [f"{NOTE}; data sheets, bf16", f"{'':<16}" + "".join(f"{case.size:>10}" for case in cases) + "  s"]
    for device in GPUS.values():
        cells = []
        for case in cases:
            works = [w for w in stages_of(case, decoder) if w.stage in ("base", "sr", "video decode")]
            cells.append(sum(bound(work, device).seconds for work in works))
        lines.append(f"{device.name:<16}" + "".join(f"{cell:>10.3g}" for cell in cells))
    return "\n".join(lines)


def published(tflops: float = 790.0) -> str:
    """Rates and utilisation that the published table (5-second clip, one H100) implies, and its ratio to the least time.

    Args:
        tflops: the peak that the least time is taken at, in TFLOP/s
    """
    device = GPUS["h100"]
    lines = [f"{'stage':<20}{'N':>8}{'PFLOP':>8}{'paper s':>9}{'TFLOP/s':>9}{'MFU':>8}{'least s':>9}{'ratio':>7}"]
    for size, times in PUBLISHED.items():
        for work in stages_of(make(size)):
            seconds = times.get({"video decode": "decode"}.get(work.stage, work.stage))
            if seconds is None:
                continue
            rate, least = work.flops / seconds, bound(work, limits(device, tflops)).seconds
            tokens = work.tokens.total if work.tokens else ""
            lines.append(
                f"{size + ' ' + work.stage:<20}{tokens:>8}{work.flops / 1e15:>8.3f}{seconds:>9.1f}"
                f"{rate / 1e12:>9.0f}{rate / device.bf16:>8.1%}{least:>9.2f}{seconds / least:>7.2f}"
            )
    return "\n".join(lines)


def ladder(device: str = "h200", output: str | None = None) -> str:
    """Predicted seconds of every denoising loop and clip after each optimisation, at assumed rates of kernels.

    Args:
        device: h100 or h200
        output: JSON file to write the predictions to

    Raises:
        UserError: another device, or a file that cannot be written.
    """
    machines = {"h100": predict.H100, "h200": predict.H200}
    if device not in machines:
        raise UserError(f"device={device} has no assumed rates; choose one of {', '.join(machines)}")
    values = predict.predictions(machines[device])
    if output is not None:
        how = "computed from the config at assumed rates (inference.benchmark.roofline.predict), not measured"
        made = computed(how, "inference.benchmark.roofline", "ladder", f"device={device}", f"output={output}")
        head = {"format": FORMAT, "kind": "predicted"}
        write_result(Path(output), {**head, **values, "published": PUBLISHED, "provenance": made})
    heads = [f"{size} {stage['stage']} x{stage['steps']}" for size, stage in values["stages"].items()]
    lines = [
        f"{values['machine']}, seconds per loop, and of base + sr + decode; {NOTE}, at assumed rates",
        f"{'after':<76}" + "".join(f"{h:>14}" for h in heads) + "".join(f"{h:>10}" for h in PUBLISHED),
    ]
    least = values["floor"]
    cells = "".join(f"{clip['sr'] or clip['base']:>14.2f}" for clip in least["clips"].values())
    cells += "".join(f"{clip['total']:>10.2f}" for clip in least["clips"].values())
    name = f"least, at {least['tflops']:g} TFLOP/s"
    lines.append(f"{name:<76}{cells}")
    for row in values["rows"]:
        cells = "".join(f"{cell:>14.2f}" for cell in row["seconds"].values())
        cells += "".join(f"{clip['total']:>10.2f}" for clip in row["clips"].values())
        lines.append(f"{row['after']:<76}{cells}")
        if "target" in row:
            wanted = "".join(f"{row['target'][size]:>10.2f}" for size in PUBLISHED)
            lines.append(f"{'  target':<76}{'':>14}{'':>14}{'':>14}{wanted}")
    return "\n".join(lines)


COMMANDS: dict[str, Callable[..., str]] = {"stages": stages, "gpus": gpus, "published": published, "ladder": ladder}

if __name__ == "__main__":
    try:
        print(run_one(COMMANDS, "python -m inference.benchmark.roofline"))
    except BrokenPipeError:
        sys.exit(0)
