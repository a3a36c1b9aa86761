"""Classifier-free guidance with a scale per modality and timestep: v = v_uncond + w (v_cond - v_uncond) (SPEC 4.3).

    guidance = Guidance(video_high=5.0, video_low=2.0, threshold=500, audio=5.0)
    v = combine(v_cond, v_uncond, guidance("video", timestep))

Scales of 1 need no unconditional branch (`Guidance.needed`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from magihuman.schema import PlainConfig

MODALITIES = ("video", "audio")


@dataclass(frozen=True)
class Guidance(PlainConfig):
    """Guidance scales of the release: for video `video_high` at timesteps above `threshold`, else `video_low`.

    Attributes:
        threshold: on the truncated integer timestep, 0 to 1000.
        audio: scale of the audio at every timestep.
    """

    video_high: float = 5.0
    video_low: float = 2.0
    threshold: int = 500
    audio: float = 5.0

    def __call__(self, modality: str, timestep: int) -> float:
        """Scale for "video" or "audio" at an integer timestep.

        Raises:
            ValueError: for another modality.
        """
        if modality not in MODALITIES:
            raise ValueError(f"unknown modality {modality!r}; choose video or audio")
        if modality == "audio":
            return self.audio
        return self.video_high if timestep > self.threshold else self.video_low

    def at(self, modality: str, sigma: Tensor, like: Tensor) -> Tensor:
        """Scales at noise levels [B], shaped to broadcast over the latents of the modality.

        Args:
            like: a tensor on the device of the result.
        """
        scales = [self(modality, int(1000 * level)) for level in sigma.tolist()]
        return torch.tensor(scales, device=like.device).view(-1, *[1] * (4 if modality == "video" else 2))

    @property
    def needed(self) -> bool:
        """False when every scale is 1 and the unconditional branch can be skipped."""
        return not self.video_high == self.video_low == self.audio == 1


def combine(positive: Tensor, negative: Tensor, scale: Tensor | float) -> Tensor:
    """negative + scale * (positive - negative), fp32; a tensor of scales is broadcast (one per latent frame, for example)."""
    negative = negative.float()
    return negative + scale * (positive.float() - negative)


# The first latent frames of a super-resolution stage get a lower scale.
EARLY_FRAMES, EARLY_SCALE = 13, 2.0


@dataclass(frozen=True, eq=False)
class FrameScales:
    """Guidance of the super-resolution stage: one scale per latent frame, [1,1,T,1,1]; none for audio (SPEC 4.4)."""

    video: Tensor
    needed: bool = True

    def __call__(self, modality: str, timestep: int) -> Tensor | float:
        """Scale for "video" or "audio"; the timestep is ignored."""
        return self.video if modality == "video" else 1.0


def frame_scales(
    scale: float,
    frames: int,
    early_frames: int = EARLY_FRAMES,
    early_scale: float = EARLY_SCALE,
    device: torch.device | str = "cpu",
) -> FrameScales:
    """`scale` for every one of T = `frames` latent frames, at most `early_scale` for the first ones."""
    scales = torch.full((1, 1, frames, 1, 1), float(scale))
    scales[:, :, :early_frames] = min(early_scale, scale)
    return FrameScales(scales.to(device))
