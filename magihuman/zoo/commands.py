"""The commands `zoo convert`, `zoo plan` and `zoo peaks`: settings to a result; without torch until there is work."""

import json
import shlex
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from magihuman import zoo
from magihuman.codecs.bundle import RELEASED_TEXT_CHANNELS, bundle_spec
from magihuman.errors import UserError
from magihuman.io.files import write_atomically
from magihuman.io.provenance import code_version
from magihuman.models.config import Checkpointing, DiTConfig
from magihuman.zoo import memory_plan
from magihuman.zoo.footprint import BF16, FP32
from magihuman.zoo.memory_plan import FORMS, GB, MEMORY, RESERVE, SIZES, ClipRequest, peak

TASKS = ("infer", "pretrain", "lora", "dmd2")
FPS = 25.0
LAYOUTS, DTYPES = ("export", "released", "diffusers"), ("keep", "bf16", "fp32")
PEAKS_FORMAT = "magihuman-peaks/1"
DECODERS = ("wan", "turbo")
WEIGHTS = ("bf16", "fp8", "int4")


def convert(
    src: str,
    dst: str,
    to: str = "export",
    dtype: str = "keep",
    max_shard: str = "5GB",
    role: str | None = None,
    vae: str | None = None,
    audio_vae: str | None = None,
    lora: str | None = None,
) -> str:
    """Convert a checkpoint to another layout; DST appears complete or not at all.

    Args:
        src: published folder (base, distill, ...; shards may be .zst), export, run folder, shipped name, Hub id,
            diffusers-style folder, or one file (.safetensors, or a pickle: .ckpt .pth .pt .bin)
        dst: folder to make; or, from one file, a NEW.safetensors with the same tensors
        to: export (ours), released (as published), or diffusers
        dtype: of the block matrices: keep, bf16 or fp32; all other tensors are fp32 always
        max_shard: upper bound of a file, such as 5GB or 500MB
        role: base, distill, 540p_sr or 1080p_sr, where the name of SRC does not say it
        vae: Wan 2.2 VAE for to=diffusers; none takes MAGIHUMAN_WAN_VAE, or leaves it out
        audio_vae: Stable Audio VAE for to=diffusers; none takes MAGIHUMAN_STABLE_AUDIO, or leaves it out
        lora: LoRA to merge into the weights, with to=export; the whole network is then held in memory

    Returns:
        summary of the written files.

    Raises:
        UserError: SRC is damaged or not this network, or DST cannot be written.
    """
    if to not in LAYOUTS:
        raise UserError(f"to={to} is unknown; choose one of {', '.join(LAYOUTS)}")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
    if to != "diffusers" and (vae or audio_vae):
        raise UserError("vae= and audio_vae= belong to to=diffusers; the other layouts hold no codecs")
    from magihuman.zoo.convert import convert_checkpoint

    return convert_checkpoint(src, dst, to, dtype, max_shard, role, vae, audio_vae, lora)


@dataclass(frozen=True)
class Model:
    """A network to plan for; `guided`: default of the checkpoint; `size`: (height, width) of the base stage."""

    name: str
    config: DiTConfig
    patch: int
    stride: tuple[int, int, int]
    released: bool
    guided: bool
    size: tuple[int, int]


def plan(
    model: str,
    task: str = "infer",
    resolution: str | None = None,
    height: int | None = None,
    width: int | None = None,
    seconds: float = 5.0,
    text: int = 340,
    batch: int = 1,
    gpu_gb: float = 80.0,
    gpus: int = 1,
    dtype: str = "bfloat16",
    memory: str = "fast",
    weights: str | None = None,
    guided: bool | None = None,
    cfg_passes: int = 1,
    turbo: bool = False,
    checkpointing: Checkpointing = True,
    ema: str = "gpu",
    rank: int = 128,
) -> str:
    """Compute the memory of a run before anything is loaded, and what to change if it does not fit.

    All numbers are computed from the config, in decimal GB.

    Args:
        model: an architecture or a checkpoint of `python -m magihuman.zoo list`, or a checkpoint's folder
        task: infer, pretrain, lora or dmd2
        resolution: 256p, 540p or 1080p with the released codecs; the latter two include super-resolution by a
            network of the same shape
        height: of the clip in pixels, instead of resolution
        width: of the clip in pixels, instead of resolution
        seconds: length of the clip
        text: tokens of a prompt
        batch: clips at once (per GPU)
        gpu_gb: memory of a GPU in GB
        gpus: over which training state is sharded
        dtype: of the network's products: bfloat16 or float32
        memory: infer: fast, balanced or low
        weights: infer: storage of the matrices: fp8 or int4; none is the dtype
        guided: infer: with guidance; none is the checkpoint's own setting
        cfg_passes: infer: 1, both guidance branches at once; 2, one after the other
        turbo: infer: decode with the Turbo decoder
        checkpointing: training: recompute blocks in the backward pass: true, false, or attention: all but attention
        ema: training: EMA weights on the gpu or the cpu
        rank: lora and dmd2: rank of the LoRAs

    Raises:
        UserError: an impossible setting.
    """
    choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("task", task, TASKS),
        ("memory", memory, MEMORY),
        ("weights", weights, (*FORMS, "bf16")),
        ("dtype", dtype, ("bfloat16", "float32")),
        ("ema", ema, ("gpu", "cpu")),
        ("cfg_passes", cfg_passes, (1, 2)),
    )
    for name, value, allowed in choices:
        if value not in allowed:
            listed = ", ".join(str(choice) for choice in allowed if choice is not None)
            raise UserError(f"{name}={value} is unknown; choose one of {listed}")
    check_numbers(text=text, batch=batch, gpus=gpus, rank=rank, seconds=seconds, gpu_gb=gpu_gb)
    known = model_of(model)
    size, enlarged = _sizes(known, resolution, height, width)
    guided = known.guided if guided is None else guided
    compute = BF16 if dtype == "bfloat16" else FP32
    request = infer_request(
        known, size, enlarged, seconds, text=text, batch=batch, guided=guided, cfg_passes=cfg_passes, turbo=turbo,
        compute=compute, memory=memory, weights=weights,
    )  # fmt: skip
    last = enlarged or size
    what = f"{known.name}, {known.config.parameter_count() / 1e9:.2f} B parameters, {task}"
    clip = f"{seconds:g} s of {last[1]}x{last[0]}"
    available = int(gpu_gb * GB)
    if task == "infer":
        sides = "with guidance" if request.guided else "without guidance"
        return memory_plan.inference_report(request, f"{what}, {clip}, {sides}, batch {batch}", available)
    tokens = request.tokens(*last).times(batch)
    step = memory_plan.TrainingStep(known.config, tokens, request.compute, checkpointing, ema, rank)
    title = f"{what}, {clip}, batch {batch} per GPU, {tokens.total} tokens"
    return memory_plan.training_report(step, task, gpus, title, available)


def peaks(
    model: str,
    seconds: float = 5.0,
    text: int = 340,
    batch: int = 1,
    guided: bool | None = None,
    cfg_passes: int = 1,
    output: str | None = None,
) -> str:
    """Compute the peak of GPU memory for every resolution, decoder, weights= and memory= of infer.

    From text to video with the released codecs; products in bfloat16; decimal GB.

    Args:
        model: an architecture or a checkpoint with released codecs, such as 15b
        seconds: length of the clip
        text: tokens of a prompt
        batch: clips at once
        guided: with guidance in the base stage; none is the model's own setting
        cfg_passes: 1, both guidance branches at once; 2, one after the other
        output: JSON file to write the numbers to, in bytes

    Raises:
        UserError: an impossible setting, or a file that cannot be written.
    """
    check_numbers(seconds=seconds, text=text, batch=batch)
    if cfg_passes not in (1, 2):
        raise UserError(f"cfg_passes={cfg_passes} is unknown; choose one of 1, 2")
    known = model_of(model)
    if not known.released:
        raise UserError(f"{model} has codecs of its own; peaks are for released ones, such as those of 15b")
    guided = known.guided if guided is None else guided
    rows: list[dict[str, Any]] = []
    for resolution, (height, width, enlarged) in SIZES.items():
        request = infer_request(
            known, (height, width), enlarged, seconds, text=text, batch=batch, guided=guided, cfg_passes=cfg_passes
        )
        for decoder in DECODERS:
            for weights in WEIGHTS:
                for memory in MEMORY:
                    form = None if weights == "bf16" else weights
                    mode = replace(request, turbo=decoder == "turbo", weights=form, memory=memory)
                    named = {"resolution": resolution, "decoder": decoder, "weights": weights, "memory": memory}
                    rows.append({**named, "bytes": peak(mode), "how": "computed"})
    settings = {"seconds": seconds, "text": text, "batch": batch, "guided": guided, "cfg_passes": cfg_passes}
    if output is not None:
        given = [f"{name}={value}" for name, value in settings.items()]
        command = ["python", "-m", "magihuman.zoo", "peaks", model, *given, f"output={output}"]
        values = {
            "format": PEAKS_FORMAT,
            "model": model,
            "parameters": known.config.parameter_count(),
            "settings": settings,
            "assumed_for_cuda_bytes": RESERVE,
            "peaks": rows,
            "provenance": {
                "how": "computed from the config, not measured",
                "command": shlex.join(command),
                "code": code_version(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        }
        try:
            Path(output).parent.mkdir(parents=True, exist_ok=True)
            write_atomically(Path(output), json.dumps(values, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"cannot write output={output}: {error.strerror or error}") from error
    sides = "with guidance" if guided else "without guidance"
    lines = [
        f"{model}, {seconds:g} s, {sides}, batch {batch}: peak in GB by memory=; computed, none measured",
        " " * 28 + "".join(f"{memory:>10}" for memory in MEMORY),
    ]
    for i in range(0, len(rows), len(MEMORY)):
        name = "  ".join(f"{rows[i][key]:<8}" for key in ("resolution", "decoder", "weights"))
        lines.append(name + "".join(f"{row['bytes'] / GB:>10.2f}" for row in rows[i : i + len(MEMORY)]))
    return "\n".join(lines)


def check_numbers(**numbers: float) -> None:
    """Refuse settings that are not positive and finite.

    Raises:
        UserError: naming the first of them.
    """
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise UserError(f"{name}={number:g} is impossible; give a positive number")


def infer_request(
    model: Model, size: tuple[int, int], enlarged: tuple[int, int] | None, seconds: float, **settings: Any
) -> ClipRequest:
    """A clip of that length; (height, width) of the base stage, and of super-resolution if there is one."""
    audio = round(seconds * FPS) + 1
    return ClipRequest(
        base=model.config,
        patch=model.patch,
        stride=model.stride,
        released=model.released,
        frames=(audio - 1) // model.stride[0] * model.stride[0] + 1,
        audio=audio,
        height=size[0],
        width=size[1],
        second=model.config if enlarged else None,
        enlarged=enlarged or (0, 0),
        **settings,
    )


def model_of(name: str) -> Model:
    """A network by the name of an architecture or checkpoint, or by its folder.

    Raises:
        UserError: there is none.
    """
    if name in zoo.arch_names():
        config = zoo.arch(name)
        released = config.text_in_channels == RELEASED_TEXT_CHANNELS
        stride, size = ((4, 16, 16), (256, 448)) if released else ((4, 4, 4), (64, 64))
        return Model(name, config, zoo.pack(name).patch_size, stride, released, True, size)
    found = zoo.config_of(name)
    return Model(
        name,
        found.model,
        found.pack.patch_size,
        found.contract.video_stride,
        bundle_spec(found.codecs).published,
        found.sampling.guidance.needed,
        (found.size.height, found.size.width),
    )


def _sizes(
    model: Model, resolution: str | None, height: int | None, width: int | None
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Pixels (height, width) of the base stage, and of super-resolution."""
    if resolution is not None:
        if resolution not in SIZES:
            raise UserError(f"resolution={resolution} is unknown; choose one of {', '.join(SIZES)}")
        if not model.released:
            raise UserError(f"resolution={resolution} is for released codecs; give height= and width= instead")
        if height is not None or width is not None:
            raise UserError(f"resolution={resolution} and height= or width= contradict each other; give one")
        rows, columns, enlarged = SIZES[resolution]
        return (rows, columns), enlarged
    size = (height or model.size[0], width or model.size[1])
    for name, pixels, stride in zip(("height", "width"), size, model.stride[1:], strict=True):
        unit = stride * model.patch
        if pixels < unit or pixels % unit:
            raise UserError(f"{name}={pixels} is not a multiple of {unit}")
    return size, None
