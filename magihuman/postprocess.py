"""From decoded tensors to what players take: 8-bit frames and 44.1 kHz sound (SPEC 4.5)."""

import math
from typing import Literal

import torch
from torch.nn import functional as F

PLAYBACK_RATE = 44100


def frames_to_uint8(frames: torch.Tensor) -> torch.Tensor:
    """[B,3,F,H,W] in about [-1,1] -> [B,F,H,W,3] uint8.

    Values are clamped and truncated, not rounded (oddity O14: the release's rule).
    """
    return _to_uint8(frames.float() * 0.5 + 0.5).permute(0, 2, 3, 4, 1).contiguous()


def resize_frames(
    frames: torch.Tensor, height: int, width: int, mode: Literal["bilinear", "bicubic", "nearest"] = "bicubic"
) -> torch.Tensor:
    """Resize finished pictures [F,H,W,3] uint8 -> [F,height,width,3] uint8, by the release's rule.

    Frames are resized one at a time, so memory does not grow with the clip.
    """
    corners = None if mode == "nearest" else False
    resized = [
        F.interpolate(
            frame.permute(2, 0, 1)[None].float() / 255.0,
            size=(height, width),
            mode=mode,
            align_corners=corners,
        )
        for frame in frames
    ]
    return _to_uint8(torch.cat(resized)).permute(0, 2, 3, 1).contiguous()


def _to_uint8(unit: torch.Tensor) -> torch.Tensor:
    return (unit.clamp(0.0, 1.0) * 255.0).to(torch.uint8)


def to_playback_rate(waveform: torch.Tensor, sample_rate: int) -> torch.Tensor:
    """Resample [...,N] from the model's time base to 44.1 kHz by FFT, length int(N * 44100 / sample_rate).

    For the release's 51.2 kHz the ratio is 441/512. fp32 on the CPU.
    """
    from scipy.signal import resample

    shared = math.gcd(PLAYBACK_RATE, sample_rate)
    length = waveform.shape[-1] * (PLAYBACK_RATE // shared) // (sample_rate // shared)
    return torch.from_numpy(resample(waveform.float().cpu().numpy(), length, axis=-1))
