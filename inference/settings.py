"""Sampling settings of a clip: the checkpoint's defaults with the user's options in their place.

resolve(zoo.config_of("scene/base"), options=InferOptions(steps=4)).frames    # 37
"""

import math
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from inference.conditioning import RELEASE_VARIABLE, released_negative_prompt
from inference.requests import RELEASED, InferOptions, check_length
from magihuman.codecs.bundle import bundle_spec
from magihuman.codecs.oobleck import OVERLAP
from magihuman.errors import UserError
from magihuman.flow.guidance import EARLY_FRAMES, EARLY_SCALE, Guidance
from magihuman.flow.sampling import Shapes
from magihuman.flow.solvers import SOLVERS
from magihuman.flow.super_resolution import AUDIO_NOISE, NOISE_INDEX
from magihuman.io.export import ExportConfig, Size

# A clip far longer or larger than what a model was trained on is noise at best and exhausts the memory at worst: at most so
# many times the usual length, the usual longer side, and the usual pixels of all frames.
LONGEST, WIDEST, LARGEST = 16, 8, 64
BIGGEST = 8192  # side of resized frames in pixels
COMPATIBLE = ("o2",)


@dataclass(frozen=True)
class SecondStage:
    """Settings of super-resolution (SPEC 4.4).

    Attributes:
        steps, shift: of its UniPC solver.
        guidance: scale for the video, 1 is none; early_guidance: the most for the first early_frames latent frames.
        height, width: of the clip in pixels.
        noise_index: of the noise on the enlarged latents, 0 is none; audio_noise: share of noise in the audio it reads.
    """

    steps: int
    shift: float
    guidance: float
    height: int
    width: int
    noise_index: int = NOISE_INDEX
    audio_noise: float = AUDIO_NOISE
    early_frames: int = EARLY_FRAMES
    early_guidance: float = EARLY_SCALE


@dataclass(frozen=True)
class Settings:
    """Settings that decide a clip, in addition to prompt, seed, conditioning files and checkpoint.

    Attributes:
        solver, steps, shift, guidance: as in `inference.sampling.sample`.
        negative_prompt: of the unconditional branch of the guidance; "" is the null text of training.
        seconds: as asked for; frames, audio: the resulting numbers of pixel frames and audio latents.
        height, width: of the first stage in pixels.
        cfg_passes: 1, both branches of the guidance in one batch; 2, one after the other (less memory).
        compat: "o2" lets an unguided first stage change the given audio, as the released code does.
        sr: the second stage, or None.
        audio_overlap: share that the windows overlap in which long audio is encoded.
    """

    solver: str
    steps: int
    shift: float
    guidance: Guidance
    negative_prompt: str
    seconds: float
    frames: int
    audio: int
    height: int
    width: int
    cfg_passes: int = 1
    compat: str | None = None
    sr: SecondStage | None = None
    audio_overlap: float = OVERLAP

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def options(self) -> dict[str, Any]:
        """The same as options of the command, for `InferOptions`."""
        names = {f.name for f in fields(InferOptions)} & {f.name for f in fields(self)} - {"sr", "audio"}
        values = {name: getattr(self, name) for name in names} | {"cfg": self.guidance.to_dict()}
        if self.audio_overlap == OVERLAP:
            del values["audio_overlap"]
        if self.sr is not None:
            unused = EARLY if self.sr.guidance == 1 else ()
            values |= {name: getattr(self.sr, field) for name, field in SECOND_STAGE.items() if name not in unused}
        return values

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the finished clip in pixels."""
        return (self.sr.height, self.sr.width) if self.sr else (self.height, self.width)

    @property
    def needs_negative(self) -> bool:
        """A stage is guided away from the negative prompt."""
        return self.guidance.needed or (self.sr is not None and self.sr.guidance != 1)


def longest(config: ExportConfig) -> float:
    """Seconds of the longest clip that is made with a checkpoint."""
    return LONGEST * config.size.frames / config.contract.fps


# Options of the second stage, and the fields of `SecondStage` that they set.
SECOND_STAGE = {
    **{f"sr_{name}": name for name in ("steps", "shift", "height", "width", "noise_index", "audio_noise")},
    **{"sr_cfg": "guidance", "sr_early_frames": "early_frames", "sr_early_cfg": "early_guidance"},
}
EARLY = ("sr_early_frames", "sr_early_cfg")
# The options that `resolve` reads; the others of `InferOptions` choose checkpoints, files and devices.
SAMPLING_OPTIONS = (
    *("steps", "solver", "cfg", "cfg_passes", "shift", "negative_prompt", "seconds", "compat", "resolution"),
    *("height", "width", "audio_overlap", *SECOND_STAGE),
)


def resolve(
    config: ExportConfig,
    second: ExportConfig | None = None,
    options: InferOptions | None = None,
    given_audio: float | None = None,
) -> Settings:
    """The checkpoints' own sampling settings with the user's in their place.

    Args:
        config, second: of the checkpoints of both stages.
        options: those that are None keep the checkpoint's setting; seconds is a number here.
        given_audio: seconds of the audio that the clip is conditioned on.

    Raises:
        UserError: an impossible value, with the possible ones.
    """
    given = InferOptions() if options is None else options
    own = config.sampling
    if not 1 <= config.contract.fps <= 1000 or min(asdict(config.size).values()) < 1:
        raise UserError(f"the checkpoint's config.json is damaged: fps={config.contract.fps:g}, {config.size}")
    sizes = _named_sizes(given, config, second)
    spec, limit = bundle_spec(config.codecs), longest(config)
    negative = own.negative_prompt if given.negative_prompt is None else given.negative_prompt
    check_length(negative, "the negative prompt")
    if given.seconds is None:
        seconds = spec.seconds(config.size.frames, config.contract)
    elif limit < (seconds := float(given.seconds)) < math.inf:
        raise UserError(f"seconds={seconds:g} is too long for this checkpoint; give at most {limit:g}")
    length = spec.length(seconds, config.contract, given_audio)
    chosen = Settings(
        solver=own.solver if given.solver is None else given.solver,
        steps=own.steps if given.steps is None else given.steps,
        shift=own.shift if given.shift is None else given.shift,
        guidance=own.guidance if given.cfg is None else guidance_from(given.cfg),
        negative_prompt=negative if negative.strip() else "",
        seconds=seconds,
        frames=length.frames,
        audio=length.audio,
        height=_side(config, "height", sizes["height"], config.size),
        width=_side(config, "width", sizes["width"], config.size),
        cfg_passes=given.cfg_passes,
        compat=given.compat,
        audio_overlap=OVERLAP if given.audio_overlap is None else given.audio_overlap,
    )
    _check(chosen)
    _check_pixels(chosen, chosen.height, chosen.width, config.size, "height= and width=")
    if second is None:
        for name in SECOND_STAGE:
            if (value := getattr(given, name)) is not None:
                raise UserError(f"{name}={value} needs a checkpoint for the second stage; give sr=CHECKPOINT")
        return _with_released_prompt(chosen, given, config)
    named = {field: getattr(given, name) for name, field in SECOND_STAGE.items()}
    stage = SecondStage(
        steps=second.sampling.steps,
        shift=second.sampling.shift,
        guidance=float(second.sampling.guidance.video_high),
        height=_side(config, "sr_height", sizes["sr_height"], second.size),
        width=_side(config, "sr_width", sizes["sr_width"], second.size),
    )
    sides = ("height", "width")
    stage = replace(
        stage, **{field: value for field, value in named.items() if value is not None and field not in sides}
    )
    _check_second(stage, chosen)
    for name in EARLY:
        if stage.guidance == 1 and (value := getattr(given, name)) is not None:
            raise UserError(f"{name}={value} changes nothing without guidance in the second stage; give sr_cfg=")
    _check_pixels(chosen, stage.height, stage.width, second.size, "sr_height= and sr_width=")
    return _with_released_prompt(replace(chosen, sr=stage), given, config)


def _with_released_prompt(chosen: Settings, given: InferOptions, config: ExportConfig) -> Settings:
    """The settings with the release's negative prompt where it is asked for, and by default where its guided checkpoints
    have none of their own and its code is on this machine."""
    default = given.negative_prompt is None and bundle_spec(config.codecs).negative_prompt
    if given.negative_prompt != RELEASED and not (
        default and chosen.needs_negative and not chosen.negative_prompt and os.environ.get(RELEASE_VARIABLE)
    ):
        return chosen
    return replace(chosen, negative_prompt=released_negative_prompt())


def guidance_from(cfg: float | dict[str, float] | Guidance) -> Guidance:
    """The option cfg=: a number for everything, or fields of `Guidance`.

    Raises:
        UserError: unknown fields, or values that are not numbers.
    """
    if isinstance(cfg, Guidance):
        return cfg
    if not isinstance(cfg, dict):
        return Guidance(cfg, cfg, audio=cfg)
    if not all(isinstance(value, int | float) for value in cfg.values()):
        raise UserError(f'cfg={cfg} needs numbers, for example cfg="{{video_high: 5, video_low: 2, audio: 5}}"')
    return Guidance.from_dict(cfg)


def require_role(config: ExportConfig, name: object, first: bool) -> None:
    """Raises UserError for a checkpoint of the other stage (base or super-resolution).

    A second stage says so in its provenance. All others of ours are first stages, unless they have a second's
    coordinates: such a checkpoint may serve as either.
    """
    released = str(config.provenance.get("released", ""))
    second = released.endswith("_sr") or config.provenance.get("stage") == "second"
    known = second or bool(released) or config.pack.coords_style == "v2"
    if first == second and known:
        use = "second stage; give it as sr=" if second else "first stage; one for the second, as scene/sr, is wanted"
        raise UserError(f"{name} is {released or 'a checkpoint'}, for the {use}")


def latent_shape(config: ExportConfig, settings: Settings, size: tuple[int, int]) -> Shapes:
    """Video and audio latents of one clip at `size` (height, width) in pixels, multiples of the codec's strides."""
    contract = config.contract
    time, rows, columns = contract.video_stride
    video = contract.video_channels, (settings.frames - 1) // time + 1, size[0] // rows, size[1] // columns
    return video, (settings.audio, contract.audio_channels)


def _named_sizes(options: InferOptions, config: ExportConfig, second: ExportConfig | None) -> dict[str, int | None]:
    """height, width, sr_height and sr_width as given, or by the name of a resolution."""
    name = options.resolution
    given = {key: getattr(options, key) for key in ("height", "width", "sr_height", "sr_width")}
    if name is None:
        return given
    known = bundle_spec(config.codecs).resolutions
    if name not in known:
        names = ", ".join(known or bundle_spec("released").resolutions)
        other = f"unknown; choose one of {names}, or give sizes"
        if not known and name in names:
            other = "for the published weights; give height= and width= instead"
        raise UserError(f"resolution={name} is {other}")
    both = [key for key, value in given.items() if value is not None]
    if both:
        raise UserError(f"resolution={name} and {both[0]}= contradict each other; give one of them")
    base, large = known[name]
    if large is not None and second is None:
        raise UserError(f"resolution={name} needs a second stage; give sr=CHECKPOINT, the folder {name}_sr")
    if large is None and second is not None:
        raise UserError(f"resolution={name} is the first stage alone; leave sr= out, or choose 540p or 1080p")
    sizes = dict(zip(("height", "width", "sr_height", "sr_width"), (*base, *(large or (None, None))), strict=True))
    return sizes


def parse_output_size(text: str) -> tuple[int, int]:
    """The option output_size=, WIDTHxHEIGHT, as (height, width).

    Raises:
        UserError: not of this form, odd (H.264 needs even sides), or more than `BIGGEST` a side.
    """
    found = re.fullmatch(r"(\d{1,9})x(\d{1,9})", text.strip())
    width, height = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(2 <= side <= BIGGEST and side % 2 == 0 for side in (width, height)):
        raise UserError(
            f"output_size={text} is impossible; give even WIDTHxHEIGHT up to {BIGGEST} a side, such as 1920x1080"
        )
    return height, width


def fit_side(name: str, pixels: int, stride: int, patch: int) -> int:
    """A height or width as the network can make it: a multiple of stride * patch, the next one below.

    Only what the codec can make is rounded, as the release does (480 x 272 becomes 480 x 256); a size that is
    no multiple of the codec's stride is taken for a mistake.

    Raises:
        UserError: too small or no multiple of the stride; names the nearest that is possible.
    """
    unit = stride * patch
    if pixels < unit or pixels % stride:
        nearest = max(1, round(pixels / unit)) * unit
        raise UserError(f"{name}={pixels} is not a multiple of {unit}; the nearest is {nearest}")
    return pixels // unit * unit


def _side(config: ExportConfig, name: str, given: int | None, usual: Size) -> int:
    """The option `name` as the network can make it; `usual`: size of the stage's training clips."""
    axis = name.removeprefix("sr_")
    limit = WIDEST * max(usual.height, usual.width)
    if given is not None and given > limit:
        raise UserError(f"{name}={given} is too large for this checkpoint; give at most {limit}")
    stride = config.contract.video_stride[1 if axis == "height" else 2]
    return fit_side(name, getattr(usual, axis) if given is None else given, stride, config.pack.patch_size)


def _check_pixels(chosen: Settings, height: int, width: int, usual: Size, names: str) -> None:
    times = chosen.frames * height * width / (usual.frames * usual.height * usual.width)
    if times > LARGEST:
        raise UserError(
            f"{width}x{height} at {chosen.seconds:g} s has {times:.0f} times the pixels of this checkpoint's training "
            f"clips, and {LARGEST} times is the most; give a smaller {names} or fewer seconds="
        )


def _check_second(stage: SecondStage, chosen: Settings) -> None:
    if not 1 <= stage.steps <= 1000:
        raise UserError(f"sr_steps={stage.steps} is impossible; give 1 to 1000")
    for name, scale in (("sr_cfg", stage.guidance), ("sr_early_cfg", stage.early_guidance)):
        if not 1 <= scale < math.inf:
            raise UserError(f"{name}={scale:g} is impossible; scales start at 1, which is none")
    if not 0 < stage.shift < math.inf:
        raise UserError(f"sr_shift={stage.shift:g} is impossible; give a positive number")
    if not 0 <= stage.noise_index < 1000:
        raise UserError(f"sr_noise_index={stage.noise_index} is impossible; give 0 (none) to 999")
    if not 0 <= stage.audio_noise <= 1:
        raise UserError(f"sr_audio_noise={stage.audio_noise:g} is impossible; give 0 to 1")
    if stage.early_frames < 0:
        raise UserError(f"sr_early_frames={stage.early_frames} is impossible; give 0 or more")
    if stage.height < chosen.height or stage.width < chosen.width:
        raise UserError(
            f"the second stage's {stage.width}x{stage.height} is smaller than the first's "
            f"{chosen.width}x{chosen.height}; give a larger sr_width= and sr_height="
        )


def _check(chosen: Settings) -> None:
    scales = chosen.guidance
    if chosen.solver not in SOLVERS:
        raise UserError(f"solver={chosen.solver} is unknown; choose one of {', '.join(SOLVERS)}")
    if not 1 <= chosen.steps <= 1000:
        raise UserError(f"steps={chosen.steps} is impossible; give 1 to 1000")
    if not 1e-3 <= chosen.shift <= 1e3:  # beyond, noise levels round to 0 or 1
        raise UserError(f"shift={chosen.shift:g} is impossible; give 0.001 to 1000")
    if not all(1 <= scale < math.inf for scale in (scales.video_high, scales.video_low, scales.audio)):
        raise UserError(f"guidance {scales.to_dict()} is impossible; scales start at 1, which is none")
    if chosen.cfg_passes not in (1, 2):
        raise UserError(f"cfg_passes={chosen.cfg_passes} is impossible; choose 1 (faster) or 2 (less memory)")
    if not 0 <= chosen.audio_overlap <= 0.9:
        raise UserError(f"audio_overlap={chosen.audio_overlap:g} is impossible; give 0 to 0.9")
    if chosen.compat is not None and chosen.compat not in COMPATIBLE:
        raise UserError(f"compat={chosen.compat} is unknown; choose {', '.join(COMPATIBLE)}, or leave it out")
