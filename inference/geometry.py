"""Sizes and lengths of clips: what is asked for, brought to what codecs and network can make (SPEC 4.1)."""

import math
from dataclasses import dataclass

from magihuman.codecs.oobleck import WINDOW_LATENTS
from magihuman.errors import UserError
from magihuman.models.latent_contract import Contract

# Pixel (height, width) of the first stage, and of the second where there is one. 1088 is not cut to 1080.
RESOLUTIONS: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "256p": ((256, 448), None),
    "540p": ((256, 448), (512, 896)),
    "1080p": ((256, 448), (1088, 1920)),
}


@dataclass(frozen=True)
class Length:
    """frames: of the picture; audio: latents of the sound (A), one per 1/fps seconds."""

    frames: int
    audio: int


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


def frames_for(seconds: float, fps: float, stride: int) -> int:
    """The number of frames stride * k + 1 that is nearest to `seconds` at `fps`, at least 1.

    Raises:
        UserError: seconds is not positive.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds={seconds:g} must be positive")
    return max(0, round((seconds * fps - 1) / stride)) * stride + 1


def tiny_length(seconds: float, contract: Contract) -> Length:
    """The tiny world: as many audio latents as frames, given sound is padded."""
    frames = frames_for(seconds, contract.fps, contract.video_stride[0])
    return Length(frames, frames)


def released_length(seconds: float, contract: Contract, sound: float | None = None) -> Length:
    """The released codecs: fps * seconds + 1 audio latents, and as many latent frames as they begin.

    A given sound decides: its latents are counted after it was cut to `seconds`, so a short one makes a
    short clip. Above 29 s, where it is encoded in windows, a started latent counts (SPEC 4.7).

    Args:
        sound: seconds of the given sound, or None.

    Raises:
        UserError: seconds is not positive, or the sound is shorter than one latent.
    """
    if not 0 < seconds < math.inf:
        raise UserError(f"seconds={seconds:g} must be positive")
    if sound is None:
        audio = round(contract.fps * seconds) + 1
    else:
        latents = round(min(sound, seconds) * contract.fps, 6)  # a sample is worth 5e-4 latents
        audio = math.floor(latents) if latents <= WINDOW_LATENTS else math.ceil(latents)
        if audio < 1:
            raise UserError(f"the given sound lasts {sound:.3f} s; give at least {1 / contract.fps:g} s")
    stride = contract.video_stride[0]
    return Length((audio - 1) // stride * stride + 1, audio)
