"""Input of the super-resolution stage: upsampled latents with noise of fixed strength (SPEC 4.4).

Training and inference call `start`:

    video, audio = start(base_video, base_audio, (video_noise, audio_noise), signal_amplitude(NOISE_INDEX))
"""

from typing import Any

import torch
from torch.nn import functional as F

from magihuman.flow.sigmas import zero_snr_table

NOISE_INDEX = 220  # of the discretised table, `magihuman.flow.sigmas`
AUDIO_NOISE = 0.7
SOLVER = "unipc"  # of the released second stage, and of ours


def signal_amplitude(index: int) -> float:
    """Amplitude of the video under the noise of an index 0 to 999; 0 is no noise at all, as in the release."""
    return zero_snr_table()[index].item() if index else 1.0


def upsample_latents(latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[B,C,T,h,w] -> [B,C,T,height,width], trilinear with aligned corners, in latent units."""
    size = (latents.shape[2], height, width)
    return F.interpolate(latents, size=size, mode="trilinear", align_corners=True)


def noise_video(upsampled: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor | float) -> torch.Tensor:
    """Variance-preserving noise: z * signal + eps * sqrt(1 - signal^2), shapes of `upsampled`.

    Not a point of the flow path between data and noise (SPEC O7): the release starts the solver at its first sigma from
    here, which makes it the source of another path (derived in recipes/sr.py).

    Args:
        signal: the table's value at `NOISE_INDEX`, 0.83891 in the release; or one per sample [B].
    """
    added = (1.0 - _exact(signal) ** 2) ** 0.5
    return upsampled * _expand(signal, upsampled) + noise * _expand(added, noise)


def noise_audio(audio: torch.Tensor, noise: torch.Tensor, scale: torch.Tensor | float = AUDIO_NOISE) -> torch.Tensor:
    """Noised audio [B,A,Ca], scale * eps + (1 - scale) * audio; constant input of the stage."""
    return noise * _expand(scale, noise) + audio * _expand(1.0 - _exact(scale), audio)


def start(
    video: torch.Tensor,
    audio: torch.Tensor,
    noise: tuple[torch.Tensor, torch.Tensor],
    signal: torch.Tensor | float,
    audio_scale: torch.Tensor | float = AUDIO_NOISE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Video and audio that the super-resolution stage starts from, in training and in inference.

    Args:
        video: latents of the first stage [B,C,T,h,w]; audio: [B,A,Ca].
        noise: for both, the video's at the size of the second stage.
        signal, audio_scale: as for `noise_video` and `noise_audio`; numbers, or one per sample [B].

    Returns:
        video [B,C,T,H,W] with H, W of the noise, audio [B,A,Ca], fp32.
    """
    upsampled = upsample_latents(video, noise[0].shape[-2], noise[0].shape[-1])
    return noise_video(upsampled, noise[0], signal), noise_audio(audio, noise[1], audio_scale)


def coarsen(latents: torch.Tensor, factor: int) -> torch.Tensor:
    """Remove detail from latents [B,C,T,h,w]: average pooling by `factor`, then upsampling to the same size."""
    if factor == 1:
        return latents
    frames, height, width = latents.shape[2:]
    size = (frames, max(1, height // factor), max(1, width // factor))
    return upsample_latents(F.adaptive_avg_pool3d(latents, size), height, width)


def shrink_pictures(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Images [B,3,F,H,W] in [-1,1] -> [B,3,F,height,width], bicubic with anti-aliasing."""
    flat = frames.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(flat, (height, width), mode="bicubic", antialias=True).clamp(-1, 1)
    return small.unflatten(0, (len(frames), -1)).transpose(1, 2)


def _exact(value: torch.Tensor | float) -> Any:
    """fp64, so that numbers and tensors are rounded once and give equal results."""
    return value.double() if isinstance(value, torch.Tensor) else value


def _expand(value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """A number, or one per sample [B] in fp32, shaped to broadcast over `like`."""
    if isinstance(value, torch.Tensor):
        return value.to(like.device, torch.float32).view(-1, *[1] * (like.ndim - 1))
    return value
