"""What the super-resolution stage starts from (SPEC 4.4). Noise is given, never drawn here."""

import torch
from torch.nn import functional as F

NOISE_INDEX = 220  # of the discretised table, `magihuman.flow.sigmas`
AUDIO_NOISE = 0.7


def upsample_latents(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B,C,T,h,w] -> [B,C,T,height,width], trilinear with aligned corners, in latent units."""
    size = (latents.shape[2], height, width)
    return F.interpolate(latents, size=size, mode="trilinear", align_corners=True)


def noise_video(upsampled: torch.Tensor, noise: torch.Tensor, signal: float) -> torch.Tensor:
    """Variance-preserving noise: z * signal + eps * sqrt(1 - signal^2), shapes of `upsampled`.

    Not the flow path (oddity O7): the release runs the solver from its first sigma on this.

    Args:
        signal: the table's value at `NOISE_INDEX`, 0.83891 in the release.
    """
    return upsampled * signal + noise * (1.0 - signal**2) ** 0.5


def noise_audio(audio: torch.Tensor, noise: torch.Tensor, scale: float = AUDIO_NOISE) -> torch.Tensor:
    """[B,A,Ca] -> scale * eps + (1 - scale) * audio; the stage reads it and never updates it."""
    return noise * scale + audio * (1.0 - scale)
