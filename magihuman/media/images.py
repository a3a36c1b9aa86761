"""Images in and out: aspect ratios, cropping, resizing, 8-bit frames, playback sample rate.

The crop, the rounding and the resampling are the release's (SPEC 4.5 and 4.6).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:  # torch takes a second to import and data.prepare's own process does not need it
    import torch
    from PIL.Image import Image

SAME_ASPECT = 0.03
"""Aspect ratios that differ by less count as equal: 1920x1088 and 448x256 differ by 0.8 %."""

Pixels = tuple[int, int]
"""(height, width)."""

PLAYBACK_RATE = 44100


def aspect_difference(a: Pixels, b: Pixels) -> float:
    """|log| of the quotient of two aspect ratios: 0 for equal shapes, 0.01 for 1 % off."""
    return abs(math.log(a[1] / a[0] * b[0] / b[1]))


def same_aspect(a: Pixels, b: Pixels) -> bool:
    """Whether one size can be scaled to the other without visible stretching."""
    return aspect_difference(a, b) <= SAME_ASPECT


def crop_to_aspect(image: Image, height: int, width: int) -> Image:
    """Cut the centre of `image` to the aspect ratio height : width, without resizing.

    The crop's size is truncated to whole pixels; Pillow rounds its (half-pixel) position half to even.
    """
    w, h = image.size
    if (w, h) == (width, height):
        return image
    if h / w > height / width:
        crop_w, crop_h = w, int(w * height / width)
    else:
        crop_w, crop_h = int(h * width / height), h
    left, top = (w - crop_w) / 2, (h - crop_h) / 2
    return image.crop((left, top, left + crop_w, top + crop_h))


def image_to_frame(image: Image, height: int, width: int) -> torch.Tensor:
    """Crop, resize (Lanczos) and scale the first frame that conditions a clip -> [1,3,1,height,width] fp32 in [-1,1]."""
    import torch
    from PIL.Image import Resampling

    cropped = crop_to_aspect(image.convert("RGB"), height, width)
    pixels = np.asarray(cropped.resize((width, height), Resampling.LANCZOS), dtype=np.float32) / 255.0
    return (torch.from_numpy(pixels).permute(2, 0, 1) * 2.0 - 1.0)[None, :, None]


def frames_to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """Decoded frames [B,3,F,H,W] in about [-1,1] -> [B,F,H,W,3] uint8.

    Values are clamped and truncated, not rounded (oddity O14: the release's rule).
    """
    return _to_uint8(frames.float() * 0.5 + 0.5).permute(0, 2, 3, 4, 1).contiguous()


def resize_frames(
    frames: torch.Tensor, height: int, width: int, mode: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
) -> torch.Tensor:
    """Resize 8-bit frames [F,H,W,3] uint8 -> [F,height,width,3] uint8, by the release's rule.

    Frames are resized one at a time, so memory does not grow with the clip.
    """
    import torch
    from torch.nn import functional as F

    corners = None if mode == "nearest" else False
    resized = [
        F.interpolate(
            frame.permute(2, 0, 1)[None].float() / 255.0, size=(height, width), mode=mode, align_corners=corners
        )
        for frame in frames
    ]
    return _to_uint8(torch.cat(resized)).permute(0, 2, 3, 1).contiguous()


def _to_uint8(unit: torch.Tensor) -> torch.Tensor:
    import torch

    return (unit.clamp(0.0, 1.0) * 255.0).to(torch.uint8)


def to_playback_rate(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Resample [...,N] from the model's sample rate to 44.1 kHz by FFT, length int(N * 44100 / sample_rate).

    For the release's 51.2 kHz the ratio is 441/512. fp32 on the CPU.
    """
    import torch
    from scipy.signal import resample

    shared = math.gcd(PLAYBACK_RATE, sample_rate)
    length = waveform.shape[-1] * (PLAYBACK_RATE // shared) // (sample_rate // shared)
    return torch.from_numpy(resample(waveform.float().cpu().numpy(), length, axis=-1))
