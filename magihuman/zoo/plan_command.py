"""The command `python -m magihuman.zoo plan`: from names and settings to a report."""

from dataclasses import dataclass, replace

from magihuman import zoo
from magihuman.codecs.bundle import bundle_spec
from magihuman.errors import UserError
from magihuman.models.config import Checkpointing, DiTConfig
from magihuman.zoo import plan as infer
from magihuman.zoo import plan_training as training
from magihuman.zoo.footprint import BF16, FP32
from magihuman.zoo.plan import FORMS, GB, MEMORY, SIZES, Request

TASKS = ("infer", "pretrain", "lora", "dmd2")
RELEASED_TEXT = 3584
FPS = 25.0


@dataclass(frozen=True)
class Model:
    """What planning knows of a network: `guided` is its usual way, `size` (height, width) its first stage's."""

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
    """Say what a run will need before anything is loaded, and what to change when it does not fit.

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
        cfg_passes: infer: 1, both sides of the guidance at once; 2, one after the other
        turbo: infer: decode with the Turbo decoder
        checkpointing: training: recompute blocks in the backward pass: true, false, or attention: all but attention
        ema: training: the average on the gpu or the cpu
        rank: lora and dmd2: rank of the LoRAs

    Raises:
        UserError: a setting that cannot be.
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
    request = replace(
        infer_request(known, size, enlarged, seconds, text, batch, guided, cfg_passes),
        turbo=turbo,
        compute=BF16 if dtype == "bfloat16" else FP32,
        memory=memory,
        weights=weights,
    )
    last = enlarged or size
    what = f"{known.name}, {known.config.parameter_count() / 1e9:.2f} B parameters, {task}"
    clip = f"{seconds:g} s of {last[1]}x{last[0]}"
    available = int(gpu_gb * GB)
    if task == "infer":
        sides = "with guidance" if request.guided else "without guidance"
        return infer.infer_report(request, f"{what}, {clip}, {sides}, batch {batch}", available)
    tokens = request.tokens(*last).times(batch)
    run = training.Run(known.config, tokens, request.compute, checkpointing, ema, rank)
    title = f"{what}, {clip}, batch {batch} per GPU, {tokens.total} tokens"
    return training.report(run, task, gpus, title, available)


def check_numbers(**numbers: float) -> None:
    """Refuse settings that are not positive and finite.

    Raises:
        UserError: it names the first of them.
    """
    for name, number in numbers.items():
        if not 0 < number < float("inf"):
            raise UserError(f"{name}={number:g} is impossible; give a positive number")


def infer_request(
    model: Model,
    size: tuple[int, int],
    enlarged: tuple[int, int] | None,
    seconds: float,
    text: int,
    batch: int,
    guided: bool,
    cfg_passes: int,
) -> Request:
    """A clip of a length; (height, width) of the first stage, and of the second if there is one."""
    audio = round(seconds * FPS) + 1
    return Request(
        base=model.config,
        patch=model.patch,
        stride=model.stride,
        released=model.released,
        frames=(audio - 1) // model.stride[0] * model.stride[0] + 1,
        audio=audio,
        height=size[0],
        width=size[1],
        text=text,
        batch=batch,
        guided=guided,
        cfg_passes=cfg_passes,
        second=model.config if enlarged else None,
        enlarged=enlarged or (0, 0),
    )


def model_of(name: str) -> Model:
    """A network by the name of an architecture, of a checkpoint, or by its folder.

    Raises:
        UserError: there is none.
    """
    if name in zoo.arch_names():
        config = zoo.arch(name)
        released = config.text_in_channels == RELEASED_TEXT
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
    """Pixels (height, width) of the first stage, and of the second."""
    if resolution is not None:
        if resolution not in SIZES:
            raise UserError(f"resolution={resolution} is unknown; choose one of {', '.join(SIZES)}")
        if not model.released:
            raise UserError(
                f"resolution={resolution} is for released codecs; give height= and width= instead"
            )
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
