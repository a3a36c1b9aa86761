"""What a GPU has to hold, said before anything is loaded: python -m magihuman.zoo plan MODEL [key=value ...].

Every number is computed from the config by the formulas of `magihuman.zoo.footprint`; none is measured. Gigabytes are
decimal.
"""

from dataclasses import dataclass, replace
from math import prod

from magihuman.codecs import costs
from magihuman.codecs.causal_decoder_config import CausalDecoderConfig
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig
from magihuman.zoo import footprint
from magihuman.zoo.footprint import BF16, FP32, Tokens

GB = 10**9
RESERVE = int(1.5 * GB)
"""Assumed, not computed: the CUDA context, workspaces of kernels, gaps between allocations."""

MEMORY = ("fast", "balanced", "low")
FORMS = (None, "fp8", "int4")
SIZES = {"256p": (256, 448, None), "540p": (256, 448, (512, 896)), "1080p": (256, 448, (1088, 1920))}
LATENT_COPIES = 12  # latents, noise, velocities, the solver's history
TURBO_FRAMES, WAN_FRAMES = 28, 4  # that a decoder yields at a time


@dataclass(frozen=True)
class Request:
    """A clip to make, or several at once.

    Attributes:
        base: first stage's network; second: of super-resolution, or None.
        patch, stride: of packing and codec; released: codecs and text encoder are the published ones.
        frames, audio: of the clip; height, width: of the first stage in pixels; enlarged: of the second.
        text: tokens of a prompt; batch: clips at once; guided: prompts are joined by negative ones, in the same batch
            where cfg_passes is 1; sr_guided: also in the second stage.
        turbo: the published Turbo decoder decodes; student: one of ours does; tile: pixels a side of its tiles.
        compute: bytes of the compute dtype; memory, weights: as infer's settings.
    """

    base: DiTConfig
    patch: int
    stride: tuple[int, int, int]
    released: bool
    frames: int
    audio: int
    height: int
    width: int
    text: int = 340
    batch: int = 1
    guided: bool = False
    cfg_passes: int = 1
    second: DiTConfig | None = None
    enlarged: tuple[int, int] = (0, 0)
    sr_guided: bool = False
    turbo: bool = False
    student: CausalDecoderConfig | None = None
    tile: int | None = None
    compute: int = BF16
    memory: str = "fast"
    weights: str | None = None

    @property
    def form(self) -> str:
        """Storage of the block matrices."""
        return self.weights or ("bf16" if self.compute == BF16 else "fp32")

    def tokens(self, height: int, width: int) -> Tokens:
        """Of one clip."""
        time, rows, columns = self.stride
        area = (height // rows // self.patch) * (width // columns // self.patch)
        return Tokens(((self.frames - 1) // time + 1) * area, self.audio, self.text)


@dataclass(frozen=True)
class Need:
    """Bytes of one stage: the weights it uses (by the name of the network) and all else."""

    stage: str
    weights: dict[str, int]
    activations: int

    @property
    def alone(self) -> int:
        return sum(self.weights.values()) + self.activations


def needs(request: Request) -> list[Need]:
    """Stage by stage, in the order in which they run."""
    size = request.enlarged if request.second else (request.height, request.width)
    pixels = size[0] * size[1]
    if request.released:
        text = {"text encoder": costs.text_encoder_bytes(request.memory == "low")}
        text_work = costs.text_activation_bytes(min(request.text, costs.TEXT_LIMIT))
        video = costs.WAN_ENCODER
        decoder = costs.TURBO_DECODER if request.turbo else costs.WAN_DECODER
        chunk = TURBO_FRAMES if request.turbo else WAN_FRAMES
        if request.student is not None:
            decoder = costs.causal_decoder_memory(request.student, *size, request.tile)
            chunk = request.student.chunk(pixels // prod(request.stride[1:])) * request.stride[0]
        sound, sound_decoder = costs.OOBLECK_ENCODER, costs.OOBLECK_DECODER
    else:
        text, text_work, chunk = {}, 0, request.frames
        video = decoder = costs.TINY_VIDEO
        sound = sound_decoder = costs.TINY_AUDIO
    audio_codec = {"audio codec": sound.weights}
    light = request.turbo or request.student is not None
    decoder_name = "Turbo decoder" if light else "video codec"
    # The Wan decoder's tiles all keep their past; how much of its memory that is was not counted.
    area = min(pixels, request.tile**2) if request.tile and light else pixels
    # Four fp32 copies of a chunk while it becomes 8-bit pictures.
    decode_work = decoder.activations(area) + footprint.clip_bytes(chunk, *size, 4)
    return [
        Need("text", text, text_work),
        Need(
            "condition",
            {"video codec": video.weights, **audio_codec},
            max(video.activations(pixels), sound.activations(request.audio)),
        ),
        _network("sample", request, request.base, (request.height, request.width), request.guided),
        *(
            [_network("refine", request, request.second, request.enlarged, request.sr_guided)]
            if request.second
            else []
        ),
        Need(
            "decode",
            {decoder_name: decoder.weights, **audio_codec},
            max(decode_work, sound_decoder.activations(request.audio)),
        ),
    ]


def _network(stage: str, request: Request, config: DiTConfig, size: tuple[int, int], guided: bool) -> Need:
    sides = 2 if guided and request.cfg_passes == 1 else 1
    one = request.tokens(*size)
    tokens = one.times(request.batch * sides)
    latents = FP32 * (one.video * config.video_in_channels + one.audio * config.audio_in_channels)
    work = (
        footprint.forward_bytes(config, tokens, request.compute)
        + footprint.restored_bytes(config, request.form, request.compute)
        + LATENT_COPIES * request.batch * latents
    )
    held = footprint.streamed_bytes if request.memory == "low" else footprint.weight_bytes
    return Need(stage, {f"{stage} network": held(config, request.form)}, work)


def peak(request: Request) -> int:
    """Bytes at the worst moment of the run, with the reserve."""
    stages = needs(request)
    if request.memory != "fast":
        return RESERVE + max(need.alone for need in stages)
    resident: dict[str, int] = {}
    for need in stages:
        resident |= need.weights
    return RESERVE + sum(resident.values()) + max(need.activations for need in stages)


def remedies(request: Request, available: int, most: int = 3) -> list[tuple[str, int]]:
    """Settings that make a request fit, those that change no bits first: (what to set, bytes then).

    Where no memory= and weights= alone will do, one pass per side of the guidance, one clip at a time and shorter
    clips are tried with memory=low.
    """
    found: list[tuple[str, int]] = []
    for form in FORMS:
        for memory in MEMORY:
            other = replace(request, memory=memory, weights=form or request.weights)
            changes = [f"memory={memory}"] if memory != request.memory else []
            changes += [f"weights={form}"] if form and form != request.weights else []
            if changes and peak(other) <= available:
                found.append((" ".join(changes), peak(other)))
                break  # a mode that saves more is slower and not needed
    if found:
        return found[:most]
    low = replace(request, memory="low")
    for told, other in (
        ("cfg_passes=2", replace(low, cfg_passes=2)),
        ("batch=1", replace(low, batch=1)),
        ("cfg_passes=2 batch=1", replace(low, cfg_passes=2, batch=1)),
    ):
        if other != low and peak(other) <= available:
            return [(f"memory=low {told}", peak(other))]
    smallest = replace(low, cfg_passes=2, batch=1)
    for frames in range(request.frames - 25, 0, -25):
        other = replace(smallest, frames=frames, audio=min(frames, request.audio))
        if peak(other) <= available:
            seconds = (frames - 1) // 25
            return [(f"memory=low cfg_passes=2 batch=1 seconds={seconds}", peak(other))] if seconds else []
    return []


def require_room(request: Request, available: int) -> None:
    """Refuse what cannot fit.

    Args:
        available: bytes of the GPU.

    Raises:
        UserError: one line with the computed need and what to change.
    """
    needed = peak(request)
    if needed <= available:
        return
    ways = [f"{told} ({_gb(size)})" for told, size in remedies(request, available)]
    worst = max(needs(request), key=lambda need: need.alone if request.memory != "fast" else need.activations)
    raise UserError(
        f"this needs {_gb(needed)} of GPU memory (computed; the stage {worst.stage} decides), and the GPU has "
        f"{_gb(available)}; {'use ' + ', or '.join(ways) if ways else _last_resort(request)}"
    )


def _last_resort(request: Request) -> str:
    if request.second or request.height * request.width > 256 * 448:
        return "no setting helps at this size; choose a smaller resolution, turbo= or a larger GPU"
    return "no setting helps; use device=cpu or a larger GPU"


def infer_report(request: Request, title: str, available: int) -> str:
    """The stages as a table, the peak of every mode, and what to do if it does not fit."""
    lines = [f"{title}; every number is computed, none measured"]
    lines.append(f"{'stage':<28}{'weights':>10}{'other':>10}{'alone':>10}  GB")
    for need in needs(request):
        name = need.stage
        if need.stage in ("sample", "refine"):
            size = (request.height, request.width) if need.stage == "sample" else request.enlarged
            name += f" {size[1]}x{size[0]}, {request.tokens(*size).total} tokens"
        cells = (sum(need.weights.values()), need.activations, need.alone)
        lines.append(f"{name:<28}" + "".join(f"{cell / GB:>10.2f}" for cell in cells))
    lines.append(f"{'assumed for CUDA itself':<48}{RESERVE / GB:>10.2f}")
    lines.append("peak by memory= (columns) and weights= (rows)")
    lines.append(f"{'':<28}" + "".join(f"{memory:>10}" for memory in MEMORY) + "  GB")
    for form in FORMS:
        peaks = [peak(replace(request, memory=memory, weights=form)) for memory in MEMORY]
        name = form or replace(request, weights=None).form
        lines.append(f"  {name:<26}" + "".join(f"{cell / GB:>10.2f}" for cell in peaks))
    needed = peak(request)
    chosen = f"memory={request.memory}" + (f" weights={request.weights}" if request.weights else "")
    if needed <= available:
        lines.append(f"fits: {chosen} needs {_gb(needed)} of {_gb(available)}")
    else:
        lines.append(f"does not fit: {chosen} needs {_gb(needed)}, there are {_gb(available)}")
        ways = remedies(request, available)
        lines += [f"  {told} needs {_gb(size)}" for told, size in ways]
        if not ways:
            lines.append(f"  {_last_resort(request)}")
    return "\n".join(lines)


def _gb(size: int) -> str:
    return f"{size / GB:.1f} GB"
