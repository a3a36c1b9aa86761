"""Motion weights of the loss, and the sync gap: how much the audio helps to predict the moving part of the video.

The weights w are a function of the clean clip, which the network does not see. So they change what it learns: the minimiser
of E[w (F(x) - v)^2] is E[w v | x] / E[w | x], not E[v | x]. The two agree where the noisy x
shows which clip it is, at low noise, and differ where several clips with different motion are possible: the network leans
towards those that move more at a position. Hence:
  - a floor that rises to 1 by the end of a training (`recipe.motion_floor`) leaves no bias; one that ends below keeps some;
  - a fake score that is compared with the network in a distillation needs the same weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from magihuman.flow.path import add_noise, x0_from_velocity

CLAMP = 6.0
"""Largest weight of a position, so that a few fast ones do not make up the whole loss."""


def motion_weight(x0: Tensor, floor: float) -> Tensor:
    """Loss weight of each position: floor + (1 - floor) * its variance over time / the clip's mean variance.

    Args:
        x0: clean video latents [B,C,T,h,w].
        floor: weight of a position where nothing moves, in [0, 1]; 1 gives all positions the same weight.

    Returns:
        fp32 [B,1,1,h,w]; all ones for a clip without motion or with a single frame.
    """
    frames, height, width = x0.shape[2:]
    if floor >= 1 or frames == 1:
        return x0.new_ones(len(x0), 1, 1, height, width, dtype=torch.float32)
    variance = x0.float().var(dim=2, correction=0).mean(dim=1)  # [B,h,w]
    mean = variance.mean(dim=(1, 2), keepdim=True)
    relative = torch.where(mean > 1e-8, variance / mean.clamp(min=1e-8), torch.ones_like(variance))
    return (floor + (1 - floor) * relative.clamp(max=CLAMP))[:, None, None]


@torch.no_grad()
def sync_gap(
    denoiser: nn.Module,
    video: Tensor,
    audio: Tensor,
    text: Sequence[Tensor],
    noise: tuple[Tensor, Tensor],
    sigmas: tuple[float, float] = (0.95, 0.5),
) -> float:
    """Sync gap: how much better the moving part of the video is predicted with its own audio than with another clip's.

    Both predictions get the same noisy video; for the second, the audio is shifted by one clip within the batch. With
    e the motion-weighted error of the predicted x0, the gap is (e_other - e_own) / e_other: 0 for a network that
    ignores the audio (its samples will not be in sync, whatever its loss), positive for one that uses it.

    Args:
        denoiser: (video, audio, text) -> velocities.
        video: clean latents [B,C,T,h,w] with B >= 2; audio: [B,A,Ca]; text: B tensors [S,Ct].
        noise: of the shapes of video and audio.
        sigmas: of video and audio.

    Returns:
        The gap, or nan without audio or with fewer than two clips.
    """
    if len(video) < 2 or audio.shape[1] == 0:
        return float("nan")
    sigma_video, sigma_audio = sigmas
    noisy_video = add_noise(video, noise[0], sigma_video)
    noisy_audio = add_noise(audio, noise[1], sigma_audio)
    weight = motion_weight(video, floor=0.0)
    errors = []
    for paired_audio in (noisy_audio, noisy_audio.roll(1, dims=0)):
        velocity, _ = denoiser(noisy_video, paired_audio, text)
        errors.append((weight * (x0_from_velocity(noisy_video, velocity, sigma_video) - video).square()).mean())
    own, other = (float(e) for e in errors)
    return (other - own) / max(other, 1e-12)
