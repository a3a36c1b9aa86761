"""Super-resolution stage: upsampled and noised latents are denoised by a second network (SPEC 4.4).

The noise comes from the generators of the first stage:

    noise = draw(shape, generators, device)
    video = refine(sr_denoiser, base_video, base_audio, text, None, shape, noise, steps=5)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from inference.sampling import Scales, sample
from magihuman.flow.sampling import Noise, Pair, Shapes, draw_noise
from magihuman.flow.super_resolution import AUDIO_NOISE, NOISE_INDEX, SOLVER, signal_amplitude, start
from magihuman.models.denoiser import Denoiser


def draw(
    shape: Shapes, generators: Sequence[torch.Generator], device: torch.device | str, noise_index: int = NOISE_INDEX
) -> tuple[Tensor, Tensor]:
    """Noise for video [B,C,T,h,w], then audio [B,A,Ca], from generators that drew the first stage's (SPEC 4.2).

    With `noise_index` 0 nothing is drawn for the video, which gets zeros.
    """
    if noise_index:
        return draw_noise(shape, generators, device=device, video_first=True).start
    audio = torch.stack([torch.randn(tuple(shape[1]), generator=generator) for generator in generators])
    return torch.zeros(len(audio), *shape[0], device=device), audio.to(device)


def refine(
    denoiser: Denoiser,
    video: Tensor,
    audio: Tensor,
    text: Sequence[Tensor],
    negative_text: Sequence[Tensor] | None,
    shape: Shapes,
    noise: tuple[Tensor, Tensor],
    *,
    steps: int,
    shift: float = 5.0,
    guidance: Scales | None = None,
    noise_index: int = NOISE_INDEX,
    audio_noise: float = AUDIO_NOISE,
    **options: Any,
) -> Tensor:
    """Run the super-resolution stage.

    Args:
        denoiser: the second stage's.
        video, audio: latents of the first stage, [B,C,T,h,w] and [B,A,Ca].
        text, negative_text: as for the first stage; the latter only with `guidance`.
        shape: of one sample's latents in this stage.
        noise: for both, from `draw`.
        steps, shift: of the solver, which is UniPC.
        guidance: from `magihuman.flow.guidance.frame_scales`, or None.
        noise_index: of the video's noise, as for `draw`; audio_noise: noise level of the audio.
        options: image_latent (at this stage's size), progress, cfg_passes, device of `inference.sampling.sample`.

    Returns:
        video latents at the new size, fp32; the clip keeps the audio of the first stage.
    """
    video, noised_audio = start(video, audio, noise, signal_amplitude(noise_index), audio_noise)
    return sample(
        denoiser,
        text,
        negative_text,
        shape,
        steps,
        SOLVER,
        guidance,
        shift,
        audio_latent=noised_audio,
        noise=Noise(Pair(video, noised_audio)),
        **options,
    )[0]
