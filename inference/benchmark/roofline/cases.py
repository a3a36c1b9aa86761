"""The clips that are timed and computed: sizes, tokens and steps of every stage."""

from dataclasses import dataclass, replace

from magihuman import zoo
from magihuman.codecs.bundle import RELEASED_TEXT_CHANNELS, bundle_spec, frames_for
from magihuman.codecs.costs import USUAL_TEXT
from magihuman.errors import UserError
from magihuman.models.config import DiTConfig, PackConfig, local_layers
from magihuman.zoo.footprint import TokenCounts
from magihuman.zoo.memory_plan import SIZES as RELEASED_SIZES

SIZES = (*RELEASED_SIZES, "tiny", "layer")
FPS = 25
# The published table: a distilled base network without guidance, then super-resolution without guidance (SPEC 4.4).
BASE_STEPS, SR_STEPS = 8, 5
TINY_TEXT = 12  # words of the puppet world's example prompt
TINY_SIDE, TINY_LARGE = 64, 128


@dataclass(frozen=True)
class DenoisingStage:
    """One network's denoising loop.

    Attributes:
        name: base or sr.
        frames, height, width: of the latents (T, h, w); audio, text: tokens.
        steps: of the solver; sides: passes per step, 2 with guidance.
    """

    name: str
    config: DiTConfig
    pack: PackConfig
    frames: int
    height: int
    width: int
    audio: int
    text: int
    steps: int
    sides: int = 1

    @property
    def tokens(self) -> TokenCounts:
        """Of one pass."""
        area = (self.height // self.pack.patch_size) * (self.width // self.pack.patch_size)
        return TokenCounts(self.frames * area, self.audio, self.text)

    @property
    def window(self) -> int | None:
        """Frames that local layers attend to on each side, or None where all layers attend to everything."""
        return self.pack.frame_receptive_field if self.config.local_attn_layers else None

    @property
    def passes(self) -> int:
        """Forward passes of the whole loop."""
        return self.steps * self.sides


@dataclass(frozen=True)
class ClipCase:
    """A clip to make.

    Attributes:
        size: a name of `SIZES`; model: name of the architecture or the checkpoint.
        released: codecs and text encoder are the published ones.
        stages: one, or two with super-resolution.
        stride: pixels per latent (frames, rows, columns).
    """

    size: str
    model: str
    released: bool
    seconds: float
    stages: tuple[DenoisingStage, ...]
    stride: tuple[int, int, int]

    @property
    def frames(self) -> int:
        """Frames of the clip."""
        return self.stride[0] * (self.stages[0].frames - 1) + 1

    @property
    def pixels(self) -> tuple[int, int]:
        """(height, width) of the finished clip."""
        last = self.stages[-1]
        return last.height * self.stride[1], last.width * self.stride[2]

    @property
    def audio(self) -> int:
        """Audio latents."""
        return self.stages[0].audio

    @property
    def bytes_out(self) -> int:
        """Of the 8-bit frames."""
        return 3 * self.frames * self.pixels[0] * self.pixels[1]


def make(
    size: str,
    steps: int | None = None,
    sr_steps: int | None = None,
    seconds: float | None = None,
    text: int | None = None,
    guided: bool = False,
    model: str | None = None,
) -> ClipCase:
    """The clip called `size`: 256p, 540p and 1080p of the released network, 5 s; `tiny` of the puppet world, 1 s, with
    a second stage of the same network at twice the size; `layer`, one pass of one full-width layer, 1 s of 256p.

    Args:
        steps, sr_steps: of the solvers; those of the published table where absent.
        guided: the base stage runs the conditional and the unconditional branch of guidance.
        model: another network than `15b` or `tiny`: of configs/model, or a checkpoint's name or folder, which needs torch

    Raises:
        UserError: a size, number or network that cannot be.
    """
    if size not in SIZES:
        raise UserError(f"size={size} is unknown; choose one of {', '.join(SIZES)}")
    for name, number in (("steps", steps), ("sr_steps", sr_steps), ("seconds", seconds), ("text", text)):
        if number is not None and not 0 < number < 1000:
            raise UserError(f"{name}={number:g} is impossible; give a number above 0 and below 1000")
    model = model or ("tiny" if size == "tiny" else "15b")
    config, pack, released = _network(model)
    if released == (size == "tiny"):
        fitting = ", ".join(RELEASED_SIZES) if released else "tiny"
        raise UserError(f"size={size} is not for {model}; choose one of {fitting}")
    seconds = seconds or (5.0 if size in RELEASED_SIZES else 1.0)
    large: tuple[int, int] | None
    if released:
        stride, usual_text, audio = (4, 16, 16), USUAL_TEXT, round(seconds * FPS) + 1  # SPEC 4.1
        *small, large = RELEASED_SIZES["256p" if size == "layer" else size]
    else:
        stride, usual_text, audio = (4, 4, 4), TINY_TEXT, frames_for(seconds, FPS, 4)
        small, large = [TINY_SIDE, TINY_SIDE], (TINY_LARGE, TINY_LARGE)
    if size == "layer":  # of the middle: shared by the modalities, SwiGLU7
        config = replace(config, num_layers=1, mm_layers=(), gelu7_layers=())

    frames, (_, down, across) = (audio - 1) // stride[0] + 1, stride
    height, width = small[0] // down, small[1] // across
    steps, words, sides = steps or (1 if size == "layer" else BASE_STEPS), text or usual_text, 2 if guided else 1
    stages = [DenoisingStage("base", config, pack, frames, height, width, audio, words, steps, sides)]
    if large is not None:
        if size == "1080p":
            config = replace(config, local_attn_layers=local_layers(config.num_layers))
        if released:
            pack = replace(pack, coords_style="v1")
        height, width = large[0] // down, large[1] // across
        stages.append(DenoisingStage("sr", config, pack, frames, height, width, audio, words, sr_steps or SR_STEPS))
    return ClipCase(size, model, released, seconds, tuple(stages), stride)


def _network(model: str) -> tuple[DiTConfig, PackConfig, bool]:
    """Shapes of an architecture or a checkpoint, and whether it is for the published codecs."""
    if model in zoo.arch_names():
        config = zoo.arch(model)
        return config, zoo.pack(model), config.text_in_channels == RELEASED_TEXT_CHANNELS
    found = zoo.config_of(model)
    return found.model, found.pack, bundle_spec(found.codecs).published
