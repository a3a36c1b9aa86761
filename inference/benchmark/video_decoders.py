"""Video decoders: parameters, FLOPs, traffic and memory computed from shapes; times and memory measured on a device.

`decode` counts and times the published decoders and ours, on a GPU. `decode_cost` counts the light decoders for any
size without one: a clip is decoded on the "meta" device, in chunks or windows as for real, and every operation is
counted. Nothing is measured there; `cost_report` adds times on this machine's CPU at a small size.
"""

import time
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
from inference.benchmark.components import random_codec
from inference.benchmark.result_files import Row
from inference.benchmark.roofline.cases import ClipCase, make
from inference.benchmark.roofline.work import PUBLISHED, PUBLISHED_DECODERS, bound, decoder_parameters, video_decoder
from inference.benchmark.timers import device_of, peak_memory, reset_peak, time_call
from inference.decoding import Decoder, to_uint8
from magihuman.codecs import costs
from magihuman.errors import UserError
from magihuman.io.files import write_result
from magihuman.models.gpu_specs import GPUS, Gpu
from magihuman.zoo.memory_tracker import Allocations

COMPUTED = "computed, not measured"
_COUNTED_LATENTS = 10  # frames after which no chunk is larger than those before
FORMAT = "magihuman-decode-cost/1"
NAMES = ("released", "a", "b")
REACHED = 400e12
"""Assumed FLOP/s of convolutions in bf16 on an H100 or H200; the peak is 989e12."""
TARGETS = {"256p": 0.04, "540p": 0.12, "1080p": 0.5}  # seconds for B
TARGET_BYTES = 4e9  # for B at 1080p
CPU_SIDE, CPU_LATENTS, CPU_REPEAT = 64, 14, 2  # of the square clip that is timed on the CPU


def decode(size: str, decoder: str, device: str, repeat: int, folder: Path | None) -> str:
    """The command `decode`, which describes settings and errors."""
    place, written = device_of(device), []
    made = result_files.provenance(place)
    for case in [make(name) for name in (PUBLISHED if size == "all" else (size,))]:
        names, rows = components.decoder_names(case), []
        if decoder != "all" and decoder not in names:
            raise UserError(f"decoder={decoder} is unknown; choose one of all, {', '.join(names)}")
        for name in names if decoder == "all" else (decoder,):
            for search in (False, True) if place.type == "cuda" else (False,):
                rows.append(decoder_row(case, name, place, repeat, search))
                print(describe(rows[-1]), flush=True)
        how = {} if any("to_host_seconds" in row["measured"] for row in rows) else {"how": COMPUTED}
        # A file for every size, so that results are kept if time is up before the largest is done.
        written.append(result_files.write("decode", f"{case.size}-{decoder}", rows, made | how, folder))
    return "\n".join(f"written to {path}" for path in written)


def decoder_row(case: ClipCase, name: str, device: torch.device, repeat: int, cudnn_benchmark: bool = False) -> Row:
    """A decoder's computed counts, and its times where there is a GPU.

    Args:
        repeat: timed clips, after one to warm up.
        cudnn_benchmark: let cuDNN time its convolution algorithms on the first clip instead of choosing by heuristics.
    """
    last = case.stages[-1]
    row: Row = {
        "size": case.size,
        "decoder": name,
        "layout": "contiguous",
        "cudnn_benchmark": cudnn_benchmark,
        "latents": [last.frames, last.height, last.width],
        "pixels": list(case.pixels),
        "frames": case.frames,
    }
    if case.released:
        work = video_decoder(case, name)
        row |= {"parameters": decoder_parameters(name), "flops": work.flops}
        row["computed"] = {
            "least_seconds_h100": float(f"{bound(work, GPUS['h100']).seconds:.4g}"),
            "peak_memory_bytes": counted_memory(case, name),
        }
        if device.type == "cpu":
            return row | {"measured": {"status": "n/a", "reason": "no GPU at hand"}}
    # Wan is bfloat16 as released.
    kind = torch.bfloat16 if name == "wan" else dtype_for(case, device)
    if case.released:
        codec = components.released_decoder(name, device, kind)
    else:
        codec = components.make(case, name, device, torch.float32).decoder
    if isinstance(codec, components.Missing):
        return row | {"measured": {"status": "n/a", "reason": codec.reason}}
    if "parameters" not in row:
        row["parameters"] = sum(tensor.numel() for tensor in codec.parameters())
    usual, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, cudnn_benchmark
    try:
        row["measured"] = _measured(case, codec, device, repeat) | {"dtype": str(kind).removeprefix("torch.")}
    except RuntimeError as error:  # too large for the device's memory, or a kernel that it does not have
        row["measured"] = {"status": "n/a", "reason": str(error).strip().splitlines()[0][:200]}
    finally:
        torch.backends.cudnn.benchmark = usual
    return row


def counted_memory(case: ClipCase, name: str) -> int:
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
def _measured(case: ClipCase, codec: Any, device: torch.device, repeat: int) -> Row:
    """Seconds to frames in the host's memory, which are copied while the next are decoded."""
    last, decoder = case.stages[-1], Decoder(codec)
    shape = (1, codec.channels, last.frames, last.height, last.width)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(device)

    def clip() -> None:
        for _ in decoder.stream(latents):
            pass

    clip()  # chooses the convolutions' kernels
    reset_peak(device)  # not the workspaces of that search
    row: Row = {"to_host_seconds": time_call(clip, device, warm=0, least=repeat, most=repeat)}
    if memory := peak_memory(device):
        row["peak_memory_bytes"] = memory["peak_bytes"]
    return row


def describe(row: Row) -> str:
    """A row for the terminal."""
    line = f"{row['size']:<6} {row['decoder']:<8}{row['parameters'] / 1e6:>8.1f} M"
    line += " cudnn.benchmark" if row["cudnn_benchmark"] else ""
    if "flops" in row:
        line += f"{row['flops'] / 1e12:>9.1f} TFLOP{row['computed']['peak_memory_bytes'] / 1e9:>7.2f} GB computed"
    found = row["measured"]
    if "reason" in found:
        return f"{line}; not measured: {found['reason']}"
    return f"{line}; to the host {found['to_host_seconds']['median']:.4g} s"


# -- counts of the light decoders


def decode_cost(name: str, height: int, width: int, latents: int) -> Row:
    """Count one clip from latents to 8-bit frames on the device, in bf16.

    Args:
        name: of configs/decoder, for Wan latents: released, a, b.
        height, width: in pixels, multiples of 16; latents: T.

    Returns:
        the arguments, and
        frames: number of decoded frames;
        parameters, weight_bytes: of the network;
        flops: of convolutions and linear maps, multiply-adds x 2, with what windows compute twice;
        product_bytes: what these read and write, weights once per call: all that fused kernels would move;
        pointwise_bytes: what every other operation reads and writes when each is a kernel of its own;
        peak_bytes: most alive at a time: weights, activations, state, frames; without kernels' own workspace.
    """
    codec = random_codec(name, "meta")
    z = torch.empty(1, codec.channels, latents, height // codec.stride[1], width // codec.stride[2], device="meta")
    weights = [*codec.parameters(), *codec.buffers()]
    frames = 0
    with torch.no_grad(), Allocations().ignore(*weights, z) as memory, _Traffic() as traffic:
        with FlopCounterMode(display=False) as arithmetic:
            for part in Decoder(codec).frames(z):
                frames += to_uint8(part).shape[0]
                del part
    weight_bytes = sum(p.numel() * p.element_size() for p in codec.parameters())
    return {
        "decoder": name,
        "latents": latents,
        "frames": frames,
        "height": height,
        "width": width,
        "parameters": sum(p.numel() for p in codec.parameters()),
        "weight_bytes": weight_bytes,
        "flops": arithmetic.get_total_flops(),
        "product_bytes": traffic.products,
        "pointwise_bytes": traffic.pointwise,
        "peak_bytes": weight_bytes + memory.peak,
    }


def predicted_seconds(cost: Row, gpu: Gpu) -> tuple[float, float]:
    """Of `decode_cost`: (arithmetic and traffic overlap and all else is fused, every operation waits for the other)."""
    compute = cost["flops"] / REACHED
    fused = max(compute, cost["product_bytes"] / gpu.bandwidth)
    return fused, compute + cost["pointwise_bytes"] / gpu.bandwidth


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
def cpu_seconds() -> dict[str, dict[str, Any]]:
    """Processor seconds per small clip of each decoder, random weights in fp32, one thread; the decoders take turns."""
    codecs = {name: random_codec(name, "cpu", torch.float32) for name in NAMES}
    z = torch.randn(1, 48, CPU_LATENTS, CPU_SIDE // 16, CPU_SIDE // 16, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {name: [] for name in NAMES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for number in range(CPU_REPEAT + 1):
        for name, codec in codecs.items():
            start = time.thread_time()
            for _ in Decoder(codec).stream(z if number else z[:, :, :1]):
                pass
            if number:
                times[name].append(time.thread_time() - start)
    torch.set_num_threads(threads)
    return {name: {"seconds": min(found), "all": found} for name, found in times.items()}


def cost_report(output: Path | None) -> str:
    """The command `decode_cost`, which describes settings and errors."""
    rows = []
    lines = [f"{'':<18}{'TFLOP':>9}{'conv GB':>9}{'other GB':>10}{'peak GB':>9}{'H100 s, computed':>20}"]
    for case in map(make, PUBLISHED):
        counted = {name: decode_cost(name, *case.pixels, case.stages[-1].frames) for name in NAMES}
        base = counted["released"]
        for name, cost in counted.items():
            row: Row = {"size": case.size, "how": "computed", **cost}
            row["flops_of_released"] = base["flops"] / cost["flops"]
            moved, own = (each["product_bytes"] + each["pointwise_bytes"] for each in (base, cost))
            row["bytes_of_released"] = moved / own
            row["seconds"] = {key: predicted_seconds(cost, GPUS[key]) for key in ("h100", "h200")}
            rows.append(row)
            low, high = row["seconds"]["h100"]
            lines.append(
                f"{case.size:<8}{name:<10}{cost['flops'] / 1e12:>9.1f}{cost['product_bytes'] / 1e9:>9.1f}"
                f"{cost['pointwise_bytes'] / 1e9:>10.1f}{cost['peak_bytes'] / 1e9:>9.2f}{low:>11.3f} - {high:.3f}"
            )
    found = cpu_seconds()
    flops = {name: decode_cost(name, CPU_SIDE, CPU_SIDE, CPU_LATENTS)["flops"] for name in NAMES}
    for name, values in found.items():
        values["flops"] = flops[name]
        values["of_released"] = found[NAMES[0]]["seconds"] / values["seconds"]
        values["flops_of_released"] = flops[NAMES[0]] / flops[name]
        lines.append(
            f"CPU {CPU_SIDE} px, {CPU_LATENTS} latents, {name:<10}{values['seconds']:>8.2f} s, released takes "
            f"{values['of_released']:.1f} times as long (FLOPs: {values['flops_of_released']:.1f})"
        )
    if output is None:
        return "\n".join(lines)
    values = {
        "format": FORMAT,
        "assumed": {"flops_per_second": REACHED, "bandwidth": {k: GPUS[k].bandwidth for k in ("h100", "h200")}},
        "targets_for_b": {"seconds": TARGETS, "peak_bytes_1080p": TARGET_BYTES},
        "published_for_released_h100": {size: times["decode"] for size, times in PUBLISHED.items()},
        "computed": rows,
        "cpu": {
            "how": "measured: processor seconds of one thread, fp32, random weights, all in this run",
            "side": CPU_SIDE,
            "latents": CPU_LATENTS,
            "repeat": CPU_REPEAT,
            "decoders": found,
        },
        "provenance": {**result_files.provenance(torch.device("cpu")), "how": "counted; times of the CPU measured"},
    }
    return "\n".join([*lines, f"written to {write_result(output, values)}"])
