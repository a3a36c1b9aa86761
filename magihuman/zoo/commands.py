"""The commands of `python -m magihuman.zoo`: settings to a text; without torch until there is work."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from magihuman import zoo
from magihuman.cli import option
from magihuman.codecs.bundle import RELEASED_TEXT_CHANNELS, bundle_spec
from magihuman.codecs.costs import TEXT_LIMIT, USUAL_TEXT
from magihuman.errors import UserError
from magihuman.io.files import WEIGHTS, write_result
from magihuman.io.provenance import computed
from magihuman.models.config import Checkpointing
from magihuman.models.flops import SampleTokens
from magihuman.models.gpu_specs import GPUS, gpu
from magihuman.schema import divisors
from magihuman.zoo import memory_plan, names
from magihuman.zoo.footprint import BF16, FORMS, FP32, Form
from magihuman.zoo.memory_plan import GB, MEMORY, RESERVE, SIZES, ClipRequest, Memory, peak

FPS = 25.0
CLIPS = {"pretrain": 4, "sr": 1, "lora": 1, "dmd2": 2}
"""Clips at once on one of eight GPUs by task, as in configs/experiment/pretrain_15b, sr_540p and dmd2_15b.yaml."""
LIMITS = {
    **{"seconds": 600, "text": TEXT_LIMIT, "batch": 1000, "height": 16384, "width": 16384, "rank": 8192},
    **{"gpus": 100_000, "gpu_gb": 100_000, "steps": 10**9},
}
"""Of what `plan` and `peaks` compute; what lies beyond is a slip."""
PEAKS_FORMAT = "magihuman-peaks/1"


def list_names() -> str:
    """Architectures and student decoders with their sizes, checkpoints and decoders that ship with the package."""
    from magihuman.zoo import decoders

    lines = ["architectures"]
    for name in sorted(zoo.arch_names(), key=lambda n: zoo.arch(n).parameter_count()):
        config = zoo.arch(name)
        lines.append(
            f"  {name:<8} {config.parameter_count():>14,} parameters  {config.num_layers} layers, "
            f"hidden {config.hidden_size}, {config.num_heads} heads, {config.num_query_groups} key/value heads, "
            f"patch {zoo.pack(name).patch_size}"
        )
    lines.append("student decoders")
    for name in names.arch_names("decoder"):
        lines.append(f"  {name:<8} {decoders.summary(name)}")
    for title, shipped in (("checkpoints", zoo.checkpoint_names()), ("decoders", names.decoder_names())):
        lines.append(title)
        for name in shipped:
            size = sum(f.stat().st_size for f in (WEIGHTS / name).glob("*.safetensors"))
            lines.append(f"  {name:<8} {size / 1e6:.1f} MB")
    return "\n".join(lines)


def inspect(path: str) -> str:
    """Tensors, shapes, dtypes, sizes, config and provenance of a checkpoint.

    Args:
        path: safetensors file, exported or diffusers-style folder, LoRA, run folder, or a shipped name such as scene/base

    Raises:
        UserError: there is no checkpoint.
    """
    from magihuman.zoo.inspect import describe

    return describe(WEIGHTS / path if path in (*zoo.checkpoint_names(), *names.decoder_names()) else path)


def verify(folder: str, strict: bool = False, only: str = "") -> tuple[str, int]:
    """Run stored vectors against this implementation: case, kind, largest absolute error, tolerance and pass.

    Exit status: 0 all passed, 1 something failed, 2 no such folder.

    Args:
        folder: folder that holds manifest.json and safetensors files
        strict: count unsupported cases as failures
        only: only cases whose name starts so, such as dit_

    Raises:
        UserError: no readable manifest, or no case of that name.
    """
    from magihuman.zoo.verify import report, verify

    return report(verify(folder, only), strict)


def convert(
    src: str,
    dst: str,
    to: Literal["export", "released", "diffusers"] = "export",
    dtype: Literal["keep", "bf16", "fp32"] = "keep",
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
    if to != "diffusers" and (vae or audio_vae):
        raise UserError("vae= and audio_vae= belong to to=diffusers; the other layouts hold no codecs")
    from magihuman.zoo import convert as conversion

    limit, target = conversion.parse_size(max_shard), Path(os.path.expanduser(dst))
    if lora is not None:
        if (to, dtype) != ("export", "keep"):
            raise UserError("lora= makes an export with the release's types; convert that one further (to=, dtype=)")
        return conversion.merge_lora(src, target, lora, limit, role)
    if target.suffix == ".safetensors":
        if not Path(src).is_file() or (to, dtype, role) != ("export", "keep", None):
            raise UserError(f"{dst} is a file: SRC must be one too, and its tensors stay as they are (no to=, dtype=)")
        return conversion.convert_file(Path(src), target)
    matrices = {"keep": None, "bf16": "BF16", "fp32": "F32"}[dtype]
    given = {"vae": vae, "audio_vae": audio_vae}
    return conversion.convert_checkpoint(src, target, to, matrices, limit, role, given)


def card(folder: str, scores: str | None = None) -> str:
    """Write the model card of a checkpoint, README.md, or write its block in an existing one anew.

    The numbers are those of the folder's and its run's JSON files. Text outside of the block is kept. Scores that eval.run
    made with other weights are refused; of clips that do not say what made them, the card says so.

    Args:
        folder: export, LoRA or decoder; or a run folder, of which all that it has exported gets a card
        scores: result files of evaluations (summary.json, clip_values.json) or their folders, with commas, besides the run's

    Returns:
        what was written.

    Raises:
        UserError: no checkpoint there, a file that cannot be read, or scores of other weights.
    """
    from magihuman.zoo.model_card import write_card

    path = Path(os.path.expanduser(folder))
    inner = [each for each in (path / "export", path / "adapter") if (each / "config.json").is_file()]
    files = [Path(os.path.expanduser(file)) for file in (scores or "").split(",") if file]
    lines = []
    for each in inner or [path]:
        notes = write_card(each, files)
        lines += [f"written: {each / 'README.md'}", *(f"note: {note}" for note in notes)]
    return "\n".join(lines)


@dataclass(frozen=True)
class ClipOptions:
    """Settings that `plan` and `peaks` share."""

    model: str = option("an architecture or a checkpoint of `python -m magihuman.zoo list`, or a checkpoint's folder")
    seconds: float = option("length of the clip", 5.0)
    text: int = option("tokens of a prompt", USUAL_TEXT)
    batch: int = option("clips at once (per GPU); 0 is 1, and for training that of the 15B experiments", 0)
    guided: bool | None = option("infer: with guidance in the base stage; none is the checkpoint's own setting", None)
    cfg_passes: Literal[1, 2] = option("infer: 1, both guidance branches at once; 2, one after the other", 1)

    def __post_init__(self) -> None:
        for name, number in vars(self).items():
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            if not (0 < number < float("inf") or (name == "batch" and number == 0)):
                raise UserError(f"{name}={number:g} is impossible; give a positive number")
            if number > LIMITS.get(name, number):
                raise UserError(f"{name}={number:g} is too much; give at most {LIMITS[name]}")

    @property
    def clips(self) -> int:
        """Clips at once."""
        return self.batch or 1


@dataclass(frozen=True)
class PlanOptions(ClipOptions):
    """Compute the memory of a run before anything is loaded, and what to change if it does not fit.

    All numbers are computed from the config, in decimal GB.
    """

    task: Literal["infer", "pretrain", "sr", "lora", "dmd2"] = option("infer, pretrain, sr, lora or dmd2", "infer")
    resolution: str | None = option(
        "256p, 540p or 1080p with the released codecs; the latter two include super-resolution by a network of the "
        "same shape; none is 256p, and 540p for task=sr",
        None,
    )
    height: int | None = option("of the clip in pixels, instead of resolution", None)
    width: int | None = option("of the clip in pixels, instead of resolution", None)
    gpu_gb: float | None = option("memory of a GPU in GB; none is that of gpu", None)
    gpu: str = option(f"kind of GPU: {', '.join(GPUS)}", "h100")
    gpus: int = option("over which training state is sharded", 1)
    steps: int = option("pretrain, sr and lora: optimiser steps for the predicted hours", 1000)
    dtype: Literal["bfloat16", "float32"] = option("of the network's products: bfloat16 or float32", "bfloat16")
    memory: Memory = option("infer: fast, balanced or low", "fast")  # noqa: RUF009
    weights: Form | None = option(  # noqa: RUF009
        "infer: storage of the matrices: bf16, fp8 or int4; none is the dtype", None
    )
    turbo: bool = option("infer: decode with the Turbo decoder", False)
    checkpointing: Checkpointing = option(  # noqa: RUF009
        "training: recompute blocks in the backward pass: true, false, or attention: all but attention", True
    )
    ema: Literal["gpu", "cpu"] = option("training: EMA weights on the gpu or the cpu", "gpu")
    rank: int = option("lora and dmd2: rank of the LoRAs", 128)
    gan: bool = option("dmd2: with the GAN loss", True)
    teacher: int | None = option("sr: steps of a frozen teacher of the same shape (recipe.teacher)", None)
    optim: Literal["adamw", "adamw8bit"] = option("training: AdamW, or with moments in 8 bits", "adamw")
    context_parallel: int = option("training: GPUs that share the tokens of a batch", 1)

    @property
    def clips(self) -> int:
        """Clips at once; where they are not given, as the experiments have them."""
        return self.batch or CLIPS.get(self.task, 1)


@dataclass(frozen=True)
class PeaksOptions(ClipOptions):
    """Compute the peak of GPU memory for every resolution, decoder, weights= and memory= of infer.

    From text to video with the released codecs; products in bfloat16; decimal GB.
    """

    output: str | None = option("JSON file to write the numbers to, in bytes", None)


def plan(options: PlanOptions) -> str:
    """The command `plan`.

    Raises:
        UserError: an impossible setting.
    """
    if options.teacher is not None and options.task != "sr":
        raise UserError(f"teacher={options.teacher} is of task=sr, and the task is {options.task}; leave it out")
    request = infer_request(options)
    sized = options.resolution, options.height, options.width
    if options.task == "sr" and request.released and sized == (None, None, None):
        sized = "540p", None, None
    request = _sized(request, *sized)
    request = replace(
        request, turbo=options.turbo, memory=options.memory, weights=options.weights,
        compute=BF16 if options.dtype == "bfloat16" else FP32,
    )  # fmt: skip
    last = request.enlarged if request.second else (request.height, request.width)
    what = f"{options.model}, {request.base.parameter_count() / 1e9:.2f} B parameters, {options.task}"
    clip = f"{options.seconds:g} s of {last[1]}x{last[0]}"
    device = gpu(options.gpu, "gpu")
    available = int(device.memory if options.gpu_gb is None else options.gpu_gb * GB)
    if options.task == "infer":
        sides = "with guidance" if request.guided else "without guidance"
        return memory_plan.inference_report(request, f"{what}, {clip}, {sides}, batch {options.clips}", available)
    tokens = request.tokens(*last).times(options.clips)
    together = options.context_parallel
    for name, number in (("gpus", options.gpus), ("key/value heads", request.base.num_query_groups)):
        if number % together:
            raise UserError(
                f"context_parallel={together} does not divide the {number} {name}; choose one of {divisors(number)}"
            )
    step = memory_plan.TrainingStep(
        request.base, tokens, request.compute, options.checkpointing, options.ema, options.rank, options.optim, together,
        options.gan, options.teacher or 0,
    )  # fmt: skip
    per = "GPU" if together == 1 else f"group of {together} GPUs"
    title = f"{what}, {clip}, batch {options.clips} per {per}, {tokens.total} tokens"
    report = memory_plan.training_report(step, options.task, options.gpus, title, available)
    if options.task == "dmd2" or options.dtype != "bfloat16":
        return report + "\nno time is predicted for dmd2 and for dtype=float32"
    one = request.tokens(*last)
    frames = (request.frames - 1) // request.stride[0] + 1
    clip_tokens = SampleTokens(one.video, one.audio, one.text, frames)
    seconds = memory_plan.predict_step(step, options.task, clip_tokens, options.clips, options.gpus, device)
    clips = options.clips * options.gpus // together
    return f"{report}\n{memory_plan.time_report(seconds, options.steps, clips, options.gpus, device)}"


def peaks(options: PeaksOptions) -> str:
    """The command `peaks`.

    Raises:
        UserError: an impossible setting, or a file that cannot be written.
    """
    plain = infer_request(options)
    if not plain.released:
        raise UserError(f"{options.model} has codecs of its own; peaks are for released ones, such as those of 15b")
    rows: list[dict[str, Any]] = []
    for resolution in SIZES:
        request = _sized(plain, resolution)
        for decoder in ("wan", "turbo"):
            for weights in FORMS:
                for memory in MEMORY:
                    mode = replace(request, turbo=decoder == "turbo", weights=weights, memory=memory)
                    named = {"resolution": resolution, "decoder": decoder, "weights": weights, "memory": memory}
                    rows.append({**named, "bytes": peak(mode), "how": "computed"})
    shared = ("seconds", "text", "batch", "guided", "cfg_passes")
    settings = {name: getattr(options, name) for name in shared} | {"batch": options.clips, "guided": plain.guided}
    if options.output is not None:
        given = [f"{name}={value}" for name, value in settings.items()]
        command = ["magihuman.zoo", "peaks", options.model, *given, f"output={options.output}"]
        values = {
            "format": PEAKS_FORMAT,
            "model": options.model,
            "parameters": plain.base.parameter_count(),
            "settings": settings,
            "assumed_for_cuda_bytes": RESERVE,
            "peaks": rows,
            "provenance": computed("computed from the config, not measured", *command),
        }
        write_result(Path(options.output), values)
    sides = "with guidance" if plain.guided else "without guidance"
    clip = f"{options.model}, {options.seconds:g} s, {sides}, batch {options.clips}"
    lines = [
        f"{clip}: peak in GB by memory=; computed, none measured",
        " " * 28 + "".join(f"{memory:>10}" for memory in MEMORY),
    ]
    for i in range(0, len(rows), len(MEMORY)):
        name = "  ".join(f"{rows[i][key]:<8}" for key in ("resolution", "decoder", "weights"))
        lines.append(name + "".join(f"{row['bytes'] / GB:>10.2f}" for row in rows[i : i + len(MEMORY)]))
    return "\n".join(lines)


def infer_request(options: ClipOptions) -> ClipRequest:
    """A clip of that length and of the usual size of an architecture or a checkpoint.

    Raises:
        UserError: there is none of that name.
    """
    name = options.model
    if name in zoo.arch_names():
        base, patch, guided = zoo.arch(name), zoo.pack(name).patch_size, True
        released = base.text_in_channels == RELEASED_TEXT_CHANNELS
        stride, (height, width) = ((4, 16, 16), (256, 448)) if released else ((4, 4, 4), (64, 64))
    elif "/" not in name and not Path(name).exists():
        known = names.choices(name, "architecture", "checkpoint")
        raise UserError(f"model {name!r} is neither an architecture nor a checkpoint ({known})")
    else:
        found = zoo.config_of(name)
        base, patch, guided = found.model, found.pack.patch_size, found.sampling.guidance.needed
        released, stride = bundle_spec(found.codecs).published, found.contract.video_stride
        height, width = found.size.height, found.size.width
    audio = round(options.seconds * FPS) + 1
    return ClipRequest(
        base, patch, stride, released, (audio - 1) // stride[0] * stride[0] + 1, audio, height, width,
        text=options.text, batch=options.clips, cfg_passes=options.cfg_passes,
        guided=guided if options.guided is None else options.guided,
    )  # fmt: skip


def _sized(
    request: ClipRequest, resolution: str | None, height: int | None = None, width: int | None = None
) -> ClipRequest:
    """The clip at this resolution, with super-resolution by a network of the same shape where it has a second stage."""
    if resolution is not None:
        if resolution not in SIZES:
            raise UserError(f"resolution={resolution} is unknown; choose one of {', '.join(SIZES)}")
        if not request.released:
            raise UserError(f"resolution={resolution} is for released codecs; give height= and width= instead")
        if height is not None or width is not None:
            raise UserError(f"resolution={resolution} and height= or width= contradict each other; give one")
        rows, columns, larger = SIZES[resolution]
        second = request.base if larger else None
        return replace(request, height=rows, width=columns, second=second, enlarged=larger or (0, 0))
    request = replace(request, height=height or request.height, width=width or request.width)
    for name, stride in zip(("height", "width"), request.stride[1:], strict=True):
        pixels, unit = getattr(request, name), stride * request.patch
        if pixels < unit or pixels % unit:
            raise UserError(f"{name}={pixels} is not a multiple of {unit}")
    return request


COMMANDS: dict[str, Callable[..., str | tuple[str, int]]] = {
    "list": list_names,
    "inspect": inspect,
    "verify": verify,
    "convert": convert,
    "card": card,
    "plan": plan,
    "peaks": peaks,
}
