"""Video decoders: parameters, FLOPs, traffic and memory computed from shapes; times and memory measured on a device.

`decode` counts and times the published decoders and ours, on a GPU. `decode_cost` counts the light decoders for any
size without one: a clip is decoded on the "meta" device, in chunks or windows as for real, and every operation is
counted. Nothing is measured there; `cost_report` adds times on this machine's CPU at a small size.
"""

import json
import platform
import shlex
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from inference.benchmark import components, result_files
from inference.benchmark.bench_networks import SEED, dtype_for
from inference.benchmark.result_files import Row
from inference.benchmark.roofline.cases import ClipCase, make
from inference.benchmark.roofline.work import (
    PUBLISHED,
    PUBLISHED_DECODERS,
    DeviceLimits,
    bound,
    decoder_parameters,
    video_decoder,
)
from inference.benchmark.timers import device_of, summary, synchronise
from inference.decoding import Decoder, to_pictures
from magihuman.codecs import costs
from magihuman.codecs.bundle import bundle_spec
from magihuman.codecs.causal_decoder import CausalDecoder, CausalDecoderCodec
from magihuman.codecs.turbo_vaed import TurboCodec
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version, processor
from magihuman.models.gpu_specs import GPUS, Gpu
from magihuman.zoo import decoders
from magihuman.zoo.memory_tracker import Allocations

COMPUTED = "computed, not measured"
_COUNTED_LATENTS = 10  # frames after which no chunk is larger than those before
FORMAT = "magihuman-decode-cost/1"
NAMES = ("released", "a", "b")
SIZES = {"256p": (256, 448), "540p": (512, 896), "1080p": (1088, 1920)}  # rows, columns
LATENTS = 32  # of a 5-second clip at 25 fps
REACHED = 400e12
"""Assumed FLOP/s of convolutions in bf16 on an H100 or H200; the peak is 989e12."""
TARGETS = {"256p": 0.04, "540p": 0.12, "1080p": 0.5}  # seconds for B
TARGET_BYTES = 4e9  # for B at 1080p


def decode(
    size: str,
    decoder: str,
    seconds: float | None,
    layouts: str,
    device: str,
    dtype: str,
    repeat: int,
    folder: Path | None,
) -> str:
    """Count, and on a GPU time, the video decoders; see the command `decode` for the settings.

    Raises:
        UserError: a setting that cannot be.
    """
    place, written = device_of(device), []
    wanted = [name.strip() for name in layouts.split(",")]
    for name in wanted:
        if name not in ("contiguous", "channels_last"):
            raise UserError(f"layouts={name} is unknown; choose from contiguous, channels_last")
    made = result_files.provenance(place)
    for case in [make(name, seconds=seconds) for name in (PUBLISHED if size == "all" else (size,))]:
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
        # A file for every size, so that results are kept if time is up before the largest is done.
        written.append(result_files.write("decode", f"{case.size}-{decoder}", rows, made | how, folder))
    return "\n".join(f"written to {path}" for path in written)


def decoder_row(
    case: ClipCase,
    name: str,
    layout: str,
    device: torch.device,
    dtype: str,
    repeat: int,
    cudnn_benchmark: bool = False,
    to_host_only: bool = False,
) -> Row:
    """A decoder's computed counts, and its times where there is a GPU.

    Args:
        layout: of the weights in memory, contiguous or channels_last.
        dtype: of the weights, see `bench_networks.dtype_for`; Wan is bfloat16 as released.
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


def _tiny(case: ClipCase, name: str, device: torch.device) -> Any:
    return components.make(case, name, device, torch.float32).decoder


def _computed(case: ClipCase, name: str) -> Row:
    """Counts from shapes: exact FLOPs, the least time on an H100, peak memory."""
    work = video_decoder(case, name)
    return {
        "parameters": decoder_parameters(name),
        "flops": work.flops,
        "computed": {
            "least_seconds_h100": float(f"{bound(work, DeviceLimits.of(GPUS['h100'])).seconds:.4g}"),
            "peak_memory_bytes": peak_memory(case, name),
        },
    }


def peak_memory(case: ClipCase, name: str) -> int:
    """Computed bytes of weights and activations while a clip is decoded chunk by chunk, bf16, without
    the workspaces of kernels."""
    last = case.stages[-1]
    pixels = case.pixels[0] * case.pixels[1]
    published = {"turbo": costs.TURBO_DECODER, "wan": costs.WAN_DECODER}
    if name in PUBLISHED_DECODERS:
        return published[name].weights + published[name].activations(pixels)
    codec = components.released_decoder(name, torch.device("meta"), torch.bfloat16)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in codec.parameters())
    latents = torch.zeros(1, codec.channels, min(last.frames, _COUNTED_LATENTS), last.height, last.width, device="meta")
    with torch.no_grad(), Allocations() as counted:
        for part in codec.decode_stream(latents):
            del part
    return weights + counted.peak


@torch.no_grad()
def _measured(case: ClipCase, codec: Any, device: torch.device, repeat: int, to_host_only: bool) -> Row:
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
        row[name] = summary(times)
    if device.type == "cuda":
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return row


def describe(row: Row) -> str:
    """A row for the terminal."""
    line = f"{row['size']:<6} {row['decoder']:<8} {row['layout']:<14}{row['parameters'] / 1e6:>8.1f} M"
    line += " cudnn.benchmark" if row["cudnn_benchmark"] else ""
    if "flops" in row:
        line += f"{row['flops'] / 1e12:>9.1f} TFLOP{row['computed']['peak_memory_bytes'] / 1e9:>7.2f} GB computed"
    found = row["measured"]
    if "reason" in found:
        return f"{line}; not measured: {found['reason']}"
    alone = f"{found['seconds']['median']:.4g} s, " if "seconds" in found else ""
    return f"{line}; {alone}to the host {found['to_host_seconds']['median']:.4g} s"


# -- counts of the light decoders


@dataclass(frozen=True)
class DecodeCost:
    """Of one clip from latents to 8-bit pictures on the device, in bf16.

    Attributes:
        latents: T; frames: pictures that come out; height, width: in pixels.
        parameters, weight_bytes: of the network.
        flops: of convolutions and linear maps, multiply-adds x 2, with what windows compute twice.
        product_bytes: what these read and write, weights once per call: all that fused kernels would move.
        pointwise_bytes: what every other operation reads and writes when each is a kernel of its own.
        peak_bytes: most alive at a time: weights, activations, state, pictures; without kernels' own workspace.
    """

    decoder: str
    latents: int
    frames: int
    height: int
    width: int
    parameters: int
    weight_bytes: int
    flops: int
    product_bytes: int
    pointwise_bytes: int
    peak_bytes: int

    def seconds(self, gpu: Gpu, reached: float = REACHED) -> tuple[float, float]:
        """Predicted: (arithmetic and traffic overlap and all else is fused, every operation waits for the other)."""
        compute = self.flops / reached
        fused = max(compute, self.product_bytes / gpu.bandwidth)
        return fused, compute + self.pointwise_bytes / gpu.bandwidth


def random_codec(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
) -> CausalDecoderCodec | TurboCodec:
    """A decoder of configs/decoder for Wan latents with random weights.

    Raises:
        UserError: an unknown name, or a decoder for other latents.
    """
    described = decoders.arch(name)
    if not bundle_spec(described["codecs"]).published:
        raise UserError(f"decoder {name!r} is for the {described['codecs']} codecs; choose one of {', '.join(NAMES)}")
    latents = decoders.Latents("wan2.2", 48, (4, 16, 16))
    config = decoders.DecoderConfig(described["layout"], described["network"], latents)
    network = decoders.build(config, device, seed=0).to(dtype)
    if isinstance(network, CausalDecoder):
        return CausalDecoderCodec(network)
    if isinstance(network, TurboCodec):
        return network.eval().requires_grad_(False)
    raise UserError(f"decoder {name!r} is not one of ours; choose one of {', '.join(NAMES)}")


def decode_cost(name: str, height: int, width: int, latents: int = LATENTS) -> DecodeCost:
    """Count one clip.

    Args:
        name: of configs/decoder, for Wan latents: released, a, b.
        height, width: in pixels, multiples of 16; latents: T.

    Raises:
        UserError: an unknown name or a size that cannot be.
    """
    codec = random_codec(name, "meta")
    if height % codec.stride[1] or width % codec.stride[2] or min(height, width, latents) < 1:
        raise UserError(f"{height}x{width} with {latents} latents: sizes must be multiples of {codec.stride[1]}")
    z = torch.empty(1, codec.channels, latents, height // codec.stride[1], width // codec.stride[2], device="meta")
    weights = [*codec.parameters(), *codec.buffers()]
    frames = 0
    with torch.no_grad(), Allocations().ignore(*weights, z) as memory, _Traffic() as traffic:
        with FlopCounterMode(display=False) as arithmetic:
            for part in Decoder(codec).frames(z):
                frames += to_pictures(part).shape[0]
                del part
    parameters = sum(p.numel() for p in codec.parameters())
    weight_bytes = sum(p.numel() * p.element_size() for p in codec.parameters())
    return DecodeCost(
        decoder=name,
        latents=latents,
        frames=frames,
        height=height,
        width=width,
        parameters=parameters,
        weight_bytes=weight_bytes,
        flops=arithmetic.get_total_flops(),
        product_bytes=traffic.products,
        pointwise_bytes=traffic.pointwise,
        peak_bytes=weight_bytes + memory.peak,
    )


class _Traffic(TorchDispatchMode):
    """Bytes that operations read and write; views and empty tensors move nothing.

    What a convolution yields is in the layout of what it was given, as on CPU and GPU; "meta" would always make
    channels vary slowest, so that copies were counted that nobody makes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.pointwise = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        if func is torch.ops.aten.convolution.default and args[0].movedim(1, -1).is_contiguous():
            channels, *inner = result.shape[1:]
            steps = [channels * prod(inner[i + 1 :]) for i in range(len(inner))]
            result = result.as_strided(result.shape, (channels * prod(inner), 1, *steps))
        # A tensor given as out= is written, not read.
        read = _tensors((args, {key: value for key, value in given.items() if key != "out"}))
        written = _tensors(result)
        storages = {id(t.untyped_storage()) for t in read}
        view = not func._schema.is_mutable and any(id(t.untyped_storage()) in storages for t in written)
        if read and not view:
            moved = sum(_bytes(t) for t in (*read, *written))
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.addmm.default):
                self.products += moved
            else:
                self.pointwise += moved
        return result


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _bytes(tensor: Tensor) -> int:
    """In memory: a tensor that repeats itself is not larger than what it repeats."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


@torch.no_grad()
def cpu_seconds(names: tuple[str, ...], side: int, latents: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Processor seconds per clip of each decoder, random weights in fp32, one thread; the decoders take turns.

    Args:
        side: of the square picture in pixels.
    """
    codecs = {name: random_codec(name, "cpu", torch.float32) for name in names}
    z = torch.randn(1, 48, latents, side // 16, side // 16, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(repeat + 1):
        for name, codec in codecs.items():
            start = time.thread_time()
            for _ in Decoder(codec).stream(z if number else z[:, :, :1]):
                pass
            if number:
                times[name].append(time.thread_time() - start)
    return {name: {"seconds": min(found), "all": found} for name, found in times.items()}


def cost_report(side: int, latents: int, repeat: int, output: Path | None) -> str:
    """Count the light decoders, and time them at a small size; see the command `decode_cost` for the settings.

    Raises:
        UserError: a size that cannot be, or a file that cannot be written.
    """
    if side % 16 or side < 0 or latents < 1 or repeat < 1:
        raise UserError(f"side={side} latents={latents} repeat={repeat}: side is a multiple of 16, the others >= 1")
    rows = []
    lines = [f"{'':<18}{'TFLOP':>9}{'conv GB':>9}{'other GB':>10}{'peak GB':>9}{'H100 s, computed':>20}"]
    for size, (height, width) in SIZES.items():
        base = None
        for name in NAMES:
            cost = decode_cost(name, height, width)
            base = base or cost
            row: dict[str, Any] = {"size": size, "how": "computed", **asdict(cost)}
            row["flops_of_released"] = base.flops / cost.flops
            row["bytes_of_released"] = (base.product_bytes + base.pointwise_bytes) / (
                cost.product_bytes + cost.pointwise_bytes
            )
            row["seconds"] = {key: cost.seconds(GPUS[key]) for key in ("h100", "h200")}
            # The ratio of the release's published time to our prediction for it, applied to the student.
            row["seconds_by_published"] = (
                PUBLISHED[size]["decode"] * cost.seconds(GPUS["h100"])[1] / base.seconds(GPUS["h100"])[1]
            )
            rows.append(row)
            low, high = row["seconds"]["h100"]
            lines.append(
                f"{size:<8}{name:<10}{cost.flops / 1e12:>9.1f}{cost.product_bytes / 1e9:>9.1f}"
                f"{cost.pointwise_bytes / 1e9:>10.1f}{cost.peak_bytes / 1e9:>9.2f}{low:>11.3f} - {high:.3f}"
            )
    measured = None
    if side:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        found = cpu_seconds(NAMES, side, latents, repeat)
        torch.set_num_threads(threads)
        counts = {name: decode_cost(name, side, side, latents) for name in NAMES}
        for name, values in found.items():
            values["flops"] = counts[name].flops
            values["of_released"] = found[NAMES[0]]["seconds"] / values["seconds"]
            values["flops_of_released"] = counts[NAMES[0]].flops / counts[name].flops
            lines.append(
                f"CPU {side} px, {latents} latents, {name:<10}{values['seconds']:>8.2f} s, released takes "
                f"{values['of_released']:.1f} times as long (FLOPs: {values['flops_of_released']:.1f})"
            )
        measured = {
            "how": "measured: processor seconds of one thread, fp32, random weights, all in this run",
            "side": side, "latents": latents, "repeat": repeat, "decoders": found,
        }  # fmt: skip
    if output is None:
        return "\n".join(lines)
    given = {"side": side, "latents": latents, "repeat": repeat, "output": output}
    values = {
        "format": FORMAT,
        "assumed": {"flops_per_second": REACHED, "bandwidth": {k: GPUS[k].bandwidth for k in ("h100", "h200")}},
        "targets_for_b": {"seconds": TARGETS, "peak_bytes_1080p": TARGET_BYTES},
        "published_for_released_h100": {size: times["decode"] for size, times in PUBLISHED.items()},
        "computed": rows,
        "cpu": measured,
        "provenance": {
            "command": shlex.join(
                ["python", "-m", "inference.benchmark", "decode_cost", *(f"{k}={v}" for k, v in given.items())]
            ),
            "code": code_version(),
            "machine": processor(),
            "libraries": {"python": platform.python_version(), "torch": torch.__version__},
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        },
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, json.dumps(values, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write output={output}: {error.strerror or error}") from error
    return "\n".join([*lines, f"written to {output}"])
