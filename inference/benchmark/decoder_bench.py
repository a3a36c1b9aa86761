"""Decoders side by side: parameters, FLOPs, memory computed; times and memory measured where a GPU is at hand."""

import time
from typing import Any

import torch

from inference.benchmark import components, result_files
from inference.benchmark.bench_networks import SEED, dtype_for
from inference.benchmark.measure import Row, device_of, folder_of
from inference.benchmark.roofline.bounds import Limits, bound
from inference.benchmark.roofline.cases import Case, make
from inference.benchmark.roofline.work import PUBLISHED_DECODERS, video_decoder
from inference.benchmark.timers import spread, synchronise
from inference.decoding import Decoder, to_pictures
from magihuman.errors import UserError
from magihuman.models.gpu_specs import GPUS
from magihuman.zoo import footprint
from magihuman.zoo.memory_tracker import Allocations

SIZES = ("256p", "540p", "1080p")
COMPUTED = "computed, not measured"
_COUNTED_LATENTS = 10  # frames after which no chunk is larger than those before


def decode(
    size: str = "all",
    decoder: str = "all",
    seconds: float | None = None,
    layouts: str = "contiguous,channels_last",
    device: str = "auto",
    dtype: str = "auto",
    repeat: int = 5,
    output: str | None = None,
) -> str:
    """Parameters, FLOPs, peak memory and time of the video decoders; on a CPU the released sizes are computed only.

    Args:
        size: 256p, 540p, 1080p, all of them, or tiny
        decoder: a name, or all: turbo and wan as published, and the students of configs/turbo
        seconds: length of the clip
        layouts: of the weights in memory, for the published Turbo decoder: contiguous, channels_last
        device: auto, cpu or cuda
        dtype: auto, bfloat16 or float32
        repeat: timed clips
        output: another folder for the result

    Raises:
        UserError: a setting that cannot be.
    """
    place, written = device_of(device), []
    wanted = [name.strip() for name in layouts.split(",")]
    for name in wanted:
        if name not in ("contiguous", "channels_last"):
            raise UserError(f"layouts={name} is unknown; choose from contiguous, channels_last")
    made = result_files.provenance(place)
    for case in [make(name, seconds=seconds) for name in (SIZES if size == "all" else (size,))]:
        names, rows = components.decoder_names(case), []
        if decoder != "all" and decoder not in names:
            raise UserError(f"decoder={decoder} is unknown; choose one of all, {', '.join(names)}")
        for name in names if decoder == "all" else (decoder,):
            for layout in wanted if name == "turbo" and place.type == "cuda" else wanted[:1]:
                for search in (False, True) if place.type == "cuda" else (False,):
                    row = decoder_row(case, name, layout, place, dtype, repeat, search)
                    rows.append(row)
                    print(describe(row), flush=True)
        how = {} if any("seconds" in row.get("measured", {}) for row in rows) else {"how": COMPUTED}
        # A file for every size: what is measured is kept if time is up before the largest is done.
        written.append(
            result_files.write("decode", f"{case.size}-{decoder}", rows, made | how, folder_of(output))
        )
    return "\n".join(f"written to {path}" for path in written)


def decoder_row(
    case: Case,
    name: str,
    layout: str,
    device: torch.device,
    dtype: str,
    repeat: int,
    cudnn_benchmark: bool = False,
    to_host_only: bool = False,
) -> Row:
    """What is computed of a decoder, and where a GPU is at hand its times.

    Args:
        layout: of the weights in memory, contiguous or channels_last.
        dtype: of the weights, see `networks.dtype_for`; Wan is bfloat16 as released.
        repeat: timed clips, after one to warm up.
        cudnn_benchmark: let cuDNN time its convolution algorithms on the first clip instead of choosing by heuristics.
        to_host_only: leave out the time without the copy to the host's memory.
    """
    last = case.stages[-1]
    row: Row = {
        "size": case.size,
        "decoder": name,
        "layout": layout,
        "cudnn_benchmark": cudnn_benchmark,
        "latents": [last.frames, last.height, last.width],
        "pixels": list(case.pixels),
        "frames": case.frames,
    }
    if case.released:
        row |= _computed(case, name)
        if device.type == "cpu":
            row["measured"] = {"status": "n/a", "reason": "no GPU at hand"}
            return row
    kind = dtype_for(dtype, case, device)
    if name == "wan":
        kind = torch.bfloat16  # as released
    codec = components.released_decoder(name, device, kind) if case.released else _tiny(case, name, device)
    if isinstance(codec, components.Missing):
        row["measured"] = {"status": "n/a", "reason": codec.reason}
        return row
    if "parameters" not in row:
        row["parameters"] = sum(tensor.numel() for tensor in codec.parameters())
    if layout == "channels_last":
        _channels_last(codec)
    usual, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, cudnn_benchmark
    try:
        row["measured"] = _measured(case, codec, device, repeat, to_host_only) | {
            "dtype": str(kind).removeprefix("torch.")
        }
    except RuntimeError as error:  # too large for the device's memory, or a kernel that it does not have
        row["measured"] = {"status": "n/a", "reason": str(error).strip().splitlines()[0][:200]}
    finally:
        torch.backends.cudnn.benchmark = usual
    return row


def _channels_last(codec: torch.nn.Module) -> None:
    """Kernels of convolutions with channels varying fastest. (`Module.to` takes one format for 4 and 5 dimensions.)"""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    for parameter in codec.parameters():
        if parameter.ndim in formats:
            parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])


def _tiny(case: Case, name: str, device: torch.device) -> Any:
    return components.make(case, name, device, torch.float32).decoder


def _computed(case: Case, name: str) -> Row:
    """What follows from shapes: exact FLOPs, the least time on an H100, peak memory."""
    from inference.benchmark.roofline.work import decoder_parameters

    work = video_decoder(case, name)
    return {
        "parameters": decoder_parameters(name),
        "flops": work.flops,
        "computed": {
            "least_seconds_h100": float(f"{bound(work, Limits.of(GPUS['h100'])).seconds:.4g}"),
            "peak_memory_bytes": peak_memory(case, name),
        },
    }


def peak_memory(case: Case, name: str) -> int:
    """Computed bytes of weights and activations while a clip is decoded chunk by chunk, bf16, without what kernels
    take for themselves."""
    last = case.stages[-1]
    pixels = case.pixels[0] * case.pixels[1]
    published = {"turbo": footprint.TURBO_DECODER, "wan": footprint.WAN_DECODER}
    if name in PUBLISHED_DECODERS:
        return published[name].weights + published[name].activations(pixels)
    codec = components.released_decoder(name, torch.device("meta"), torch.bfloat16)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in codec.parameters())
    latents = torch.zeros(
        1, codec.channels, min(last.frames, _COUNTED_LATENTS), last.height, last.width, device="meta"
    )
    with torch.no_grad(), Allocations() as counted:
        for part in codec.decode_stream(latents):
            del part
    return weights + counted.peak


@torch.no_grad()
def _measured(case: Case, codec: Any, device: torch.device, repeat: int, to_host_only: bool) -> Row:
    """Seconds to 8-bit pictures on the device, and to pictures in the host's memory while the next are decoded."""
    last, decoder = case.stages[-1], Decoder(codec)
    generator = torch.Generator().manual_seed(SEED)
    shape = (1, codec.channels, last.frames, last.height, last.width)
    latents = torch.randn(shape, generator=generator).to(device)

    def on_device() -> None:
        for part in decoder.frames(latents):
            to_pictures(part)

    def to_host() -> None:
        for _ in decoder.stream(latents):
            pass

    row: Row = {}
    for name, call in (("seconds", on_device), ("to_host_seconds", to_host)):
        if to_host_only and call is on_device:
            continue
        times = []
        for number in range(repeat + 1):  # the first one chooses the convolutions' kernels
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            if number:
                times.append(time.perf_counter() - start)
            elif device.type == "cuda":  # not the workspaces of the search
                torch.cuda.reset_peak_memory_stats(device)
        row[name] = spread(times)
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def describe(row: Row) -> str:
    """A row for the terminal."""
    line = f"{row['size']:<6} {row['decoder']:<8} {row['layout']:<14}{row['parameters'] / 1e6:>8.1f} M"
    line += " cudnn.benchmark" if row["cudnn_benchmark"] else ""
    if "flops" in row:
        line += (
            f"{row['flops'] / 1e12:>9.1f} TFLOP{row['computed']['peak_memory_bytes'] / 1e9:>7.2f} GB computed"
        )
    found = row["measured"]
    if "reason" in found:
        return f"{line}; not measured: {found['reason']}"
    alone = f"{found['seconds']['median']:.4g} s, " if "seconds" in found else ""
    return f"{line}; {alone}to the host {found['to_host_seconds']['median']:.4g} s"
